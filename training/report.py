"""What an evaluation found: the records of report.json, which report.html shows (training/report_page.py)."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from training.config import EvalConfig, EvaluateConfig
from training.intervals import bootstrap, over_runs
from training.metrics import Evaluation, Measured, summary

EDGES = (1, 5, 10, 50, 100, 500, 1000, 10_000, 100_000, 1_000_000)  # last rank of each bin of the histograms
DUAL_SOFTMAX = (
    "The dual softmax reads the whole query set before it answers one query, which a search never can: its numbers "
    "(dsl_) compare with others of its kind only, and select nothing."
)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(_Record):
    """A metric with its interval."""

    value: float
    low: float
    high: float


class Example(_Record):
    """A caption as a query. `rival` is the best wrong video; `margin`: the right video's score over the rival's."""

    query: str
    rank: float
    video: str
    rival: str
    margin: float


class RunReport(_Record):
    """What was measured of one run. `recall` is the run whose vectors found the candidates, None its own towers."""

    run: str
    step: int
    seed: int
    settings: EvalConfig
    recall: str | None
    questions: str | None
    labels: str | None
    templates: list[str]
    videos: int
    captions: int
    metrics: dict[str, Estimate]
    histograms: dict[str, dict[str, int]]
    hardest: list[Example]
    easiest: list[Example]

    @property
    def values(self) -> dict[str, float]:
        return {name: estimate.value for name, estimate in self.metrics.items()}


class Report(_Record):
    """The content of report.json. `over_runs` is there for several runs that differ in their seed alone."""

    dataset: str
    dataset_sha256: str
    split: str
    confidence: float
    resamples: int
    runs: list[RunReport]
    over_runs: dict[str, Estimate] | None
    notes: list[str]


def of_run(config: EvaluateConfig, run: str, step: int, evaluation: Evaluation) -> RunReport:
    """Everything that the report says of one run's evaluation."""
    return RunReport(
        run=run,
        step=step,
        seed=config.seed,
        settings=config.eval,
        recall=config.recall,
        questions=config.questions,
        labels=config.labels,
        templates=config.templates,
        videos=len(evaluation.infos),
        captions=len(evaluation.by_text.ranks_Q),
        metrics=estimates(evaluation.measured, config.resamples, config.confidence),
        histograms={m.prefix: histogram(m) for m in evaluation.measured if m.table is summary},
        hardest=examples(evaluation, config.examples, hardest=True),
        easiest=examples(evaluation, config.examples, hardest=False),
    )


def mean_over_runs(runs: Sequence[RunReport], confidence: float) -> dict[str, Estimate]:
    """Of every metric that all runs have."""
    names = [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]
    found = {name: over_runs([run.metrics[name].value for run in runs], confidence) for name in names}
    return {name: Estimate(value=mean, low=low, high=high) for name, (mean, (low, high)) in found.items()}


def estimates(measured: Sequence[Measured], resamples: int, confidence: float) -> dict[str, Estimate]:
    """Every metric with its interval over the queries."""
    found = {}
    for part in measured:
        intervals = bootstrap(part, resamples, confidence)
        for name, value in part.metrics().items():
            found[name] = Estimate(value=value, low=intervals[name][0], high=intervals[name][1])
    return found


def histogram(measured: Measured) -> dict[str, int]:
    """Queries by their rank; up to the last bin that has any. Half ranks count for the next whole one."""
    bins = np.searchsorted(EDGES, measured.ranks_Q)
    counts = np.bincount(bins)
    lasts = [EDGES[0], *(f"{low + 1:,}–{high:,}" for low, high in itertools.pairwise(EDGES))]
    return {str(name): int(count) for name, count in zip([*lasts, f"over {EDGES[-1]:,}"], counts, strict=False)}


def examples(evaluation: Evaluation, count: int, hardest: bool) -> list[Example]:
    """The captions with the best, or worst, ranks, at most one of each video; of equal ranks the clearest margins."""
    ranking, infos = evaluation.by_text, evaluation.infos
    if len(infos) < 2:
        return []
    captions = [(v, caption.text) for v, info in enumerate(infos) for caption in info.captions]
    order = np.lexsort((-ranking.margins_Q, ranking.ranks_Q))
    chosen: dict[int, int] = {}
    for query in order[::-1] if hardest else order:
        if len(chosen) == count:
            break
        if np.isfinite(float(ranking.margins_Q[query])):
            chosen.setdefault(captions[query][0], int(query))
    return [
        Example(
            query=captions[query][1],
            rank=float(ranking.ranks_Q[query]),
            video=infos[video].video_id,
            rival=infos[int(ranking.rivals_Q[query])].video_id,
            margin=float(ranking.margins_Q[query]),
        )
        for video, query in chosen.items()
    ]


def notes(runs: Sequence[RunReport], confidence: float, resamples: int) -> list[str]:
    """What a reader must know to compare the numbers with others."""
    settings = [run.settings for run in runs]
    said = [
        f"Intervals: {confidence:.0%}, percentiles over {resamples:,} draws of the videos, each with all its captions; "
        "of a mean over runs Student's. R@k: percent of the queries whose right answer is among the first k; MdR, MnR: "
        "median and mean rank; rSum = R@1 + R@5 + R@10. A wrong answer that scores the same counts half a rank.",
        "A video is found by its best caption, among the other videos' best.",
    ]
    if any(one.shared_captions for one in settings):
        said.append(
            "A sentence that several videos have, word for word, finds any of them. Papers count only the video "
            "that it came with: eval.shared_captions=false."
        )
    two_stages = {(run.settings.rerank_top, run.recall) for run in runs if run.settings.rerank_top}
    for top, recall in sorted(two_stages, key=str):
        finder = f"the vectors of {recall}" if recall else "the towers' own vectors"
        said.append(
            f"Two stages: the first {top:,} by {finder} are ranked again by the scorer; all others stay behind them, "
            "in the first stage's order. A margin between one of these and one of those is no difference of scores."
        )
    if any(one.dsl_temperature for one in settings):
        said.append(DUAL_SOFTMAX)
    return said


def shown(report: Report) -> dict[str, Any]:
    """What the command prints: the numbers, without examples."""

    def of(run: RunReport) -> dict[str, Any]:
        intervals = {name: [estimate.low, estimate.high] for name, estimate in run.metrics.items()}
        counts = {"num_videos": run.videos, "best_step": run.step}
        return {"run": run.run, "split": report.split, **run.values, **counts, "intervals": intervals}

    if len(report.runs) == 1:
        return of(report.runs[0])
    mean = report.over_runs or {}
    return {"runs": [of(run) for run in report.runs], "over_runs": {name: e.model_dump() for name, e in mean.items()}}
