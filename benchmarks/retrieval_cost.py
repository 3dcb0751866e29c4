"""What a method costs per query, per video and in training, on one CPU thread.

    python -m benchmarks.retrieval_cost [methods=["prompt_switch", "xpool"]] [sizes=[1000, 10000]] [key=value ...]

A method is a preset of training, here with random weights. Times are CPU times, since other work may run beside:

query    all V videos' scores for a sentence and the best ten, from what can be kept of a video: by a dot product, by
         FAISS's exact index as retrieval/index.py builds it, or by the method's own scorer. V videos of more than
         `max_gib` are not measured but taken in proportion to the most that were; their cells begin with ≈
encode   a sentence; a clip up to what is kept of it, with its operations
train    bytes that autograd keeps of a clip for the backward pass, at the peak of a step's forward and backward

Rounds are kept in folder/*.jsonl, so another call goes on. The plot of the queries is folder/retrieval_cost.svg.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import faiss
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import loglog, rounds
from benchmarks.rounds import Times
from benchmarks.saved_bytes import saved_bytes
from benchmarks.step import operations
from common import config as configs
from common.config import Settings
from common.errors import exit_with
from retrieval.index import Index
from training import models
from training.config import PRESETS, TrainConfig
from training.models import Retriever, TextConditioned
from training.models import clip as clip_tower
from training.step import accumulate

OURS = "prompt_switch"
VECTOR, FAISS = "one vector", "one vector, FAISS"
BLOCK = 10_000  # videos with features of their own; more of them repeat these
BEST = 10
LEAST_S = 0.1  # CPU seconds of repetitions that make a time
METHODS = [
    *("zero_shot", "mean_pool", "seq_transf", OURS, "token_shift", "clip_vip"),
    *("vop", "vop_p", "vop_c", "vop_f", "vop_fp", "vop_fc"),
    *("ts2net", "xclip", "xpool", "prompt_switch_xpool"),
]


class CostBenchConfig(Settings):
    """What is measured, and how much of it."""

    folder: str = Field("data/bench-cost", description="local folder of the results")
    methods: list[str] = Field(METHODS, description="presets of training", min_length=1)
    sizes: list[PositiveInt] = Field([1_000, 10_000, 100_000, 1_000_000], description="videos V", min_length=1)
    rounds: PositiveInt = Field(7, description="paired rounds")
    minutes: PositiveFloat = Field(
        7.0, description="no round of a part begins that would end later; run again to go on"
    )
    backbone: str = Field("ViT-B-32-quickgelu", description="open_clip model name; its weights are random")
    frames: PositiveInt = Field(12, description="frames of a clip")
    words: PositiveInt = Field(16, ge=3, description="tokens of a sentence with start and end")
    max_gib: PositiveFloat = Field(4.0, description="most memory for what is kept of V videos")
    chunk: PositiveInt = Field(256, description="videos that a scorer sees at once")


class Subject(NamedTuple):
    """A method's model with its losses, and something to encode."""

    model: Retriever
    config: TrainConfig
    frames_BFCHW: Tensor
    tokens_BL: Tensor

    def video(self) -> Tensor:
        """What can be kept of a clip, 1KD or 1D."""
        key = self.model.key(self.model.towers.encode_video(self.frames_BFCHW))
        return self.model.scorer.cached(key) if isinstance(self.model, TextConditioned) else key

    def text(self) -> Tensor:
        """What a score reads of a sentence, 1QD or 1D."""
        return self.model.query(self.model.towers.encode_text(self.tokens_BL))


def subject(config: CostBenchConfig, clip: clip_tower.Clip, method: str) -> Subject:
    """A method's model around towers that all share: what differs is built anew, the same for each call."""
    sizes = {"backbone": config.backbone, "pretrained": None, "num_frames": config.frames}
    preset = configs.load(TrainConfig, method, [], PRESETS)
    preset = configs.apply(preset, {f"model.{key}": value for key, value in sizes.items()})
    torch.manual_seed(0)
    model = models.build(preset.model, clip).eval()
    size, end = models.image_size(preset.model), clip.vocab_size - 1
    tokens_BL = torch.randint(1, end - 1, (1, config.words))
    tokens_BL[:, 0], tokens_BL[:, -1] = end - 1, end
    frames_BFCHW = torch.randint(0, 256, (1, config.frames, 3, size, size), dtype=torch.uint8)
    return Subject(model, preset, frames_BFCHW, tokens_BL)


def facts(one: Subject) -> Times:
    """What does not depend on the machine: parameters, bytes, operations. (`tasks`: the seconds that it took.)"""
    start = time.monotonic()
    trained = sum(p.numel() for p in one.model.parameters() if p.requires_grad)
    kept = one.video().detach()
    found = {
        "trained": trained if one.config.optim.steps else 0,
        "kept": kept.numel() * kept.element_size(),
        "operations": operations(one.video),
        "saved": step_bytes(one) if one.config.optim.steps else 0,
    }
    return {"tasks": time.monotonic() - start, **found}


def step_bytes(one: Subject) -> int:
    """Bytes that autograd keeps at the peak of one pair's gradients."""
    weights_V, model = torch.ones(one.model.clip.vocab_size), one.model.train()
    towers: Any = model.towers  # without DDP, which would keep its own

    def step() -> None:
        accumulate(towers, one.frames_BFCHW, one.tokens_BL, one.config.losses, weights_V, [1], model=model)

    found = saved_bytes(model, step)
    model.zero_grad()
    model.eval()
    return found


def encoding(one: Subject) -> Times:
    times = {"video": cpu_seconds(one.video), "text": cpu_seconds(one.text)}
    return {"tasks": sum(times.values()), **times}


def kind_of(method: str) -> str:
    """How a method's videos are searched."""
    scorer = configs.load(TrainConfig, method, [], PRESETS).model.scorer
    return scorer.name if scorer else VECTOR


@torch.no_grad()
def searching(kind: str, config: CostBenchConfig, one: Subject) -> Times:
    """CPU seconds of a query by the number of videos; those that `max_gib` has no room for are left out."""
    query, kept = one.text(), one.video()
    block = normalize(torch.randn(min(BLOCK, max(config.sizes)), *kept.shape[1:]), dim=-1)
    times = {}
    for size in config.sizes:
        if size * kept[0].numel() * kept.element_size() <= config.max_gib * 2**30:
            videos = torch.cat([block] * -(-size // len(block)))[:size] if size > len(block) else block[:size]
            times[str(size)] = cpu_seconds(query_of(kind, one.model, query, videos, config.chunk))
    return {"tasks": sum(times.values()), **times}


def query_of(kind: str, model: Retriever, query: Tensor, videos: Tensor, chunk: int) -> Callable[[], object]:
    """One query for the best of `videos`."""
    best = min(BEST, len(videos))
    if kind == FAISS:
        vectors = faiss.IndexFlatIP(videos.shape[1])
        vectors.add(videos.numpy())
        index, query_1D = Index(None, vectors, None), query.numpy()  # type: ignore[arg-type]
        return lambda: index.nearest(query_1D, best)
    if isinstance(model, TextConditioned):
        parts, scorer = videos.split(chunk), model.scorer
        return lambda: torch.cat([scorer.pairs(query, part) for part in parts], dim=1).topk(best)
    return lambda: model.score(query, videos).topk(best)


@torch.no_grad()
def cpu_seconds(act: Callable[[], object]) -> float:
    act()  # allocations and first calls
    start, count, spent = time.process_time(), 0, 0.0
    while spent < LEAST_S:
        act()
        count, spent = count + 1, time.process_time() - start
    return spent / count


def query_seconds(
    rows: Sequence[Mapping[str, Times]], kind: str, config: CostBenchConfig
) -> dict[int, tuple[float, bool]]:
    """Median CPU seconds of a query by V, and whether that was measured."""
    measured = {v: median(row[kind][str(v)] for row in rows) for v in config.sizes if str(v) in rows[0][kind]}
    most = max(measured)
    return {v: (measured.get(v, measured[most] * v / most), v in measured) for v in config.sizes}


def search_table(rows: Sequence[Mapping[str, Times]], config: CostBenchConfig) -> list[str]:
    """Markdown: milliseconds of a query by the number of videos, and how many times those of one vector each."""
    lines = [
        "| a query over | " + " | ".join(f"{v:,}" for v in config.sizes) + " |",
        "| --- |" + " ---: |" * len(config.sizes),
    ]
    vectors = query_seconds(rows, VECTOR, config) if VECTOR in rows[0] else {}
    for kind in rows[0]:
        cells = []
        for v, (seconds, is_measured) in query_seconds(rows, kind, config).items():
            times = f" ({number(seconds / vectors[v][0])} ×)" if vectors and kind != VECTOR else ""
            cells.append(f"{'' if is_measured else '≈ '}{number(1000 * seconds)} ms{times}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def number(x: float) -> str:
    """Three digits, or all those before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


COLUMNS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "trained": ("facts", "trained", lambda x: f"{number(x / 1e6)} M"),
    "kept of a video": ("facts", "kept", lambda x: f"{number(x / 1024)} KiB"),
    "encode a sentence": ("encode", "text", lambda x: f"{number(1000 * x)} ms"),
    "encode a video": ("encode", "video", lambda x: f"{number(x)} s"),
    "operations of that": ("facts", "operations", lambda x: f"{number(x / 1e9)} G"),
    "saved of a clip in training": ("facts", "saved", lambda x: f"{number(x / 2**20)} MiB"),
}


def method_table(found: Mapping[str, Sequence[Mapping[str, Times]]]) -> list[str]:
    """Markdown: a row per method; in brackets how many times Prompt Switch's, the median over the rounds."""
    lines = [f"| method | {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * len(COLUMNS)]
    for method in found["facts"][0]:
        cells = []
        for part, name, form in COLUMNS.values():
            rows = found[part]
            text = form(median(row[method][name] for row in rows)) if rows[0][method][name] else "0"
            if OURS in rows[0] and method != OURS and rows[0][method][name]:
                text += f" ({number(median(row[method][name] / row[OURS][name] for row in rows))} ×)"
            cells.append(text)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    config = rounds.configured(CostBenchConfig)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    clip = clip_tower.build_clip(config.backbone, None)

    def side(act: Callable[[Subject], Times], method: str) -> Callable[[], Times]:
        return lambda: act(subject(config, clip, method))

    kinds: dict[str, str] = {}  # → a method that is searched so
    for method in config.methods:
        kind = kind_of(method)
        kinds.setdefault(kind, method)
        if kind == VECTOR:
            kinds.setdefault(FAISS, method)
    sides: dict[str, dict[str, Callable[[], Times]]] = {
        "facts": {method: side(facts, method) for method in config.methods},
        "encode": {method: side(encoding, method) for method in config.methods},
        "search": {kind: side(functools.partial(searching, kind, config), method) for kind, method in kinds.items()},
    }
    key, found = config.model_dump(exclude={"folder", "rounds", "minutes"}), {}
    for part, of_part in sides.items():
        count = 1 if part == "facts" else config.rounds
        found[part] = rounds.run(folder / f"{part}.jsonl", key, count, config.minutes, of_part, folder / "out")
        if not found[part]:
            print(f"{part}: no round yet")
            return 0
    print("\n".join([*search_table(found["search"], config), "", *method_table(found)]))
    lines = {kind: query_seconds(found["search"], kind, config) for kind in kinds}
    (folder / "retrieval_cost.svg").write_text(loglog.svg(lines, "videos", "CPU seconds a query"))
    return 0


if __name__ == "__main__":
    exit_with(main)
