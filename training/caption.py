"""Captions of a split by a run's caption head, written by all workers of a Ray cluster.

    python -m training.caption RUN [data.test=SPLIT] [captions.beams=5] ...

RUN is the run's folder (STORAGE/NAME); its config.yaml is the preset, and data.test names the split. Writes a line of
JSON for each video, {"video_id", "caption", "score"}, to captions.output, and beside it .metrics.json: BLEU-4 and
CIDEr-D against the data's own captions. Next: python -m retrieval.search "a sentence" captions=FILE contact_sheet=HTML
"""

import json
import sys
import time
from typing import Any

import ray
import torch
from ray.train.torch import get_device

from common import config as configs
from common import logs, shards, storage
from common.errors import ConfigError, exit_with
from training import models
from training.beam_search import write
from training.caption_metrics import caption_metrics
from training.collectives import gather_objects
from training.config import PRESETS, CaptionRun, run_lines
from training.encode import encode_views
from training.evaluate import on_workers, split_batches
from training.failures import without_traceback
from training.train import connect
from training.weights import load_best, run_url, weights_sha256

Line = dict[str, Any]  # video_id, caption, score


def caption_run(config: CaptionRun) -> dict[str, Any]:
    """Write the captions and their metrics; returns the metrics. Raises RunError, DataError as one sentence."""
    configs.refuse_relative_in_job(config, "captions.output")
    run, split = run_url(config), config.data.test
    output = storage.absolute(config.captions.output or storage.join(run, "captions", f"{split}.jsonl"))
    storage.check_writable(output.rpartition("/")[0])
    lines, references = on_workers(config, _worker, f"captions-{split}-{time.strftime('%Y%m%d-%H%M%S')}")
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    storage.publish_bytes(content.encode(), output)
    result = {
        "captions": output,
        "run": run,
        "weights_sha256": weights_sha256(run),
        "dataset": storage.absolute(config.data.dataset),
        "dataset_sha256": shards.read_dataset(config.data.dataset)[1],
        "split": split,
        "views": config.eval.views,
        **config.captions.model_dump(exclude={"output"}),
        "videos": len(lines),
        **caption_metrics([line["caption"] for line in lines], references),
    }
    metrics = output.removesuffix(".jsonl") + ".metrics.json"
    storage.publish_bytes(json.dumps(result, indent=2).encode(), metrics)
    return result


def _worker(values: dict[str, Any]) -> tuple[list[Line], list[list[str]]]:
    """All ranks' captions in the order of the video ids, and the data's own."""
    config = CaptionRun.model_validate(values["config"])
    logs.setup(ray.train.get_context().get_world_rank())
    with without_traceback():
        parts = gather_objects(_written(config))
    everything = sorted((pair for part in parts for pair in part), key=lambda pair: pair[0]["video_id"])
    return [line for line, _ in everything], [sentences for _, sentences in everything]


def _written(config: CaptionRun) -> list[tuple[Line, list[str]]]:
    """What this rank writes, and the data's own captions of the same videos."""
    device = get_device()
    model = models.build(config.model, load=False).to(device).eval()
    load_best(run_url(config), model)
    start, end = models.tokenizer(config.model.backbone, 2)([""])[0].tolist()
    detokenize = models.detokenizer(config.model.backbone)
    written = []
    for batch in split_batches(config):
        with torch.inference_mode():
            video = encode_views(model, batch.frames_BFCHW.to(device, non_blocking=True), config.eval.views)
        sentences, scores = write(model.towers, video.frames_BFD, start, end, config.captions)
        for info, ids, score in zip(batch.videos, sentences, scores, strict=True):
            line = {"video_id": info.video_id, "caption": detokenize(ids), "score": score}
            written.append((line, [caption.text for caption in info.captions]))
    return written


def main() -> int:
    given = run_lines(sys.argv[1:])
    if len(given) > 1:
        raise ConfigError(f"{len(given)} runs given: captions are written by one at a time")
    config = configs.from_command_line(CaptionRun, PRESETS, "training.caption", given[0])
    logs.setup()
    connect()
    print(json.dumps(caption_run(config), indent=2))
    return 0


if __name__ == "__main__":
    exit_with(main)
