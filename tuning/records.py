"""What is known of a study's trials, a small JSON file for each: the one place from which everything else follows.

STORAGE/NAME/trials/0007.json   values, status, every validation report, cost, reason of a failure

Which values come next, which trial is behind, the table and the report are functions of these files, so a study that
was killed at any moment goes on as if it had not been.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from common import retry, storage
from tuning.config import StudyConfig

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass
class Record:
    """One trial. `running` is also one that waits to be started again.

    Attributes:
        values: dotted training key → sampled value.
        run: URL of the training run's folder.
        cost: the second objective, of one video: images or GFLOP; 0 if the study has none.
        reports: of each evaluation, in order: "step", the validation metrics, "time" (seconds since 1970) and
            "worker_s" as below, until then.
        worker_s: seconds in the training loop times ranks, over all starts; of a start that was killed, up to its
            last report.
        seconds: the same by the clock, with start-up and waiting.
        failures: starts that failed.
        error: the last failure's reason.
    """

    number: int
    values: dict[str, Any]
    run: str
    cost: float = 0.0
    status: Status = "running"
    reports: list[dict[str, float]] = field(default_factory=list)
    worker_s: float = 0.0
    seconds: float = 0.0
    failures: int = 0
    error: str | None = None

    @property
    def name(self) -> str:
        return f"{self.number:04d}"

    @property
    def step(self) -> int:
        """The step of the last report."""
        return int(self.reports[-1]["step"]) if self.reports else 0

    def metric(self, study: StudyConfig) -> float | None:
        """The best of the reports, whose weights are in best/; None without any."""
        pick = max if study.mode == "max" else min
        return pick((r[study.metric] for r in self.reports if study.metric in r), default=None)


class Records:
    """The trials of the study in `folder`, by number."""

    def __init__(self, folder: str) -> None:
        self.folder = storage.join(folder, "trials")
        files = [entry.url for entry in storage.list_files(self.folder) if entry.url.endswith(".json")]
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda url: Record(**json.loads(retry.again(lambda: storage.read(url)))), files)
        self.all = sorted(found, key=lambda record: record.number)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def save(self, record: Record) -> None:
        """Publish a record, new or changed. Raises StorageError."""
        if record not in self.all:
            self.all.append(record)
        data = json.dumps(dataclasses.asdict(record), indent=1).encode()
        retry.again(lambda: storage.publish_bytes(data, storage.join(self.folder, f"{record.name}.json")))


def ranked(study: StudyConfig, records: Iterable[Record]) -> list[Record]:
    """The trials that have a metric and did not fail, the best first; of equal ones the cheapest."""
    sign = -1 if study.mode == "max" else 1
    scored = [(sign * m, r.cost, r) for r in records if r.status != "failed" and (m := r.metric(study)) is not None]
    return [record for *_, record in sorted(scored, key=lambda row: row[:2])]


def front(study: StudyConfig, records: Iterable[Record]) -> list[Record]:
    """The trials that no other one beats in both metric and cost; the best metric, which costs most, first."""
    chosen: list[Record] = []
    for record in ranked(study, records):
        if not chosen or record.cost < chosen[-1].cost:
            chosen.append(record)
    return chosen
