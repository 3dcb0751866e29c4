"""Resume checkpoints: Ray Train's list of the newest, each whole, checksummed and plain data.

STORAGE/NAME/checkpoint_*/state.pt       model, optimiser, moving average, position
STORAGE/NAME/checkpoint_*/state.sha256   of state.pt

No random state is among them: every draw is a function of the seed and of the step or the sample.
"""

import functools
import hashlib
import logging
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import ray.train
import torch
from ray.train import CheckpointUploadMode
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel

from common import retry, storage
from common.errors import DataError, NotFoundError, RunError, StorageError
from training.collectives import gather_objects
from training.config import TrainConfig
from training.models import Retriever
from training.weights import run_url

log = logging.getLogger(__name__)
STATE, SHA256 = "state.pt", "state.sha256"


class Position(NamedTuple):
    """Where training stands: the next step, and the best validation score so far (None: none yet)."""

    step: int = 0
    best: float | None = None


class State(NamedTuple):
    """All that an optimiser step changes. `ema` is the moving average of the model, or None."""

    model: Retriever
    optimizer: AdamW
    ema: AveragedModel | None = None

    @property
    def best(self) -> Retriever:
        """What is evaluated and kept."""
        return self.model if self.ema is None else cast(Retriever, self.ema.module)

    def values(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._asdict().items() if part is not None}

    def load(self, values: dict[str, Any]) -> None:
        for name, part in self._asdict().items():
            if part is not None:
                part.load_state_dict(values[name])


def report(
    config: TrainConfig, state: State, position: Position, metrics: dict[str, float], in_background: bool
) -> None:
    """Save a resume checkpoint and hand it to Ray Train. A barrier: every rank calls it at the same steps.

    In the background, training goes on during the upload; the next call waits for it. An upload that fails ends the
    attempt, and Ray starts the workers again.
    """
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics)
        return
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    torch.save({**state.values(), **position._asdict()}, folder / STATE)
    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC if in_background else CheckpointUploadMode.SYNC,
        checkpoint_upload_fn=functools.partial(_upload, run_url(config), config.checkpoint.upload_timeout_s),
        delete_local_checkpoint_after_upload=True,
    )


def _upload(run: str, timeout_s: float, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
    """Ray lists a checkpoint only after this returns, so half of one is never met."""
    folder = Path(checkpoint.path)

    def publish() -> None:
        (folder / SHA256).write_text(_sha256(folder / STATE))  # here, beside training
        for file in (STATE, SHA256):
            storage.publish(folder / file, storage.join(run, name, file))

    _within(timeout_s, lambda: retry.again(publish), f"the upload of {storage.join(run, name)}")
    place = ray.train.get_context().get_storage()
    return ray.train.Checkpoint(f"{place.experiment_fs_path}/{name}", place.storage_filesystem)


def _within(timeout_s: float, act: Callable[[], None], what: str) -> None:
    """`act()`, or StorageError after `timeout_s`: a connection that neither moves nor breaks would block for ever."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # not waited for when the process ends
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise StorageError(f"{what} did not end within checkpoint.upload_timeout_s={timeout_s:g}: raise it")
    if errors:
        raise errors[0]


def restore(config: TrainConfig, state: State) -> Position:
    """Load the run's newest whole checkpoint if there is one; returns where to go on. A collective.

    Raises:
        RunError: there are checkpoints, but all are damaged.
    """
    reported = ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)
    for one in reversed(reported):
        try:
            values = _read(run_url(config), Path(one.checkpoint.path).name)
        except DataError as error:
            log.warning("%s: going on from the one before", error)
            continue
        state.load(values)
        position = Position(values["step"], values["best"])
        break
    else:
        if reported:
            raise RunError(f"all {len(reported)} checkpoints are damaged: choose a new run.name to begin again")
        position = Position()
    found = gather_objects(position.step)
    if len(set(found)) > 1:
        raise StorageError(f"the ranks read checkpoints of different steps, {found}: the storage is not consistent")
    return position


def _read(run: str, name: str) -> dict[str, Any]:
    """A checkpoint's values. Each rank takes its own copy: Ray's shared one on a node may go while it is read.

    Raises:
        DataError: it is not as it was written.
    """
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        path, url = Path(folder) / STATE, storage.join(run, name)
        try:
            found = retry.again(lambda: storage.download(storage.join(url, STATE), path))
            expected = retry.again(lambda: storage.read(storage.join(url, SHA256)))
        except NotFoundError as error:
            raise DataError(f"checkpoint {name} is not whole ({error})") from None
        if found != expected.decode():
            raise DataError(f"checkpoint {name} is damaged")
        # Tensors and plain containers only: a checkpoint can't run code.
        values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return values


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_draining() -> bool:
    """True while a node of this run is being taken away. A collective."""
    return ray.train.get_preemption_info() is not None
