"""A run's folder as others read it: `best/` weights and their configuration. Without Ray.

STORAGE/NAME/config.yaml              the resolved configuration; a preset
STORAGE/NAME/identity.json            what must not change between starts
STORAGE/NAME/best/model.safetensors   the best weights so far, with their metrics in the file's header
STORAGE/NAME/checkpoint_*             for resume: training/checkpoint.py
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common import config as configs
from common import retry, storage
from common.errors import NotFoundError, RunError
from training import models
from training.config import TrainConfig
from training.models import Retriever


def run_url(config: TrainConfig) -> str:
    """The folder of a run, absolute."""
    return storage.join(storage.absolute(config.run.storage), config.run.name)


def save_best(run: str, model: Retriever, step: int, metrics: dict[str, float]) -> None:
    """Publish the weights as `best/`, whole or not at all. One file, so weights and metrics never disagree."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        header = {"step": str(step), "metrics": json.dumps(metrics)}
        safetensors.torch.save_file(weights, path, metadata=header)
        retry.again(lambda: storage.publish(path, best_url(run)))


def best_url(run: str) -> str:
    return storage.join(run, "best", "model.safetensors")


def no_best(run: str) -> RunError:
    return RunError(f"run {run} has no best weights: train it, or correct the run's URL")


def load_best(run: str, model: Retriever) -> dict[str, Any]:
    """Load `best/` of a run into a model; returns its header ({"step", "metrics"}). Raises RunError."""
    values, header = read_best(run)
    try:
        model.load_state_dict(values)
    except RuntimeError as error:
        raise RunError(f"{best_url(run)} does not fit its config.yaml: {str(error).splitlines()[0]}") from None
    return {"step": int(header["step"]), "metrics": json.loads(header["metrics"])}


def read_best(run: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The values of `best/` of a run, and its header. Raises RunError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        try:
            retry.again(lambda: storage.download(best_url(run), path))
            with safe_open(path, "pt") as file:
                return safetensors.torch.load_file(path), file.metadata()
        except NotFoundError:
            raise no_best(run) from None
        except SafetensorError as error:
            raise RunError(f"{best_url(run)} cannot be read: {str(error).splitlines()[0]}") from None


def best_scores(run: str) -> tuple[int, dict[str, float]] | None:
    """The step of `best/` and its validation metrics, from the file's header alone; None if there is none."""
    try:
        length = int.from_bytes(storage.read_range(best_url(run), 0, 8), "little")  # safetensors' format
        header = json.loads(storage.read_range(best_url(run), 8, length))["__metadata__"]
    except NotFoundError:
        return None
    return int(header["step"]), json.loads(header["metrics"])


def load_config(run: str) -> TrainConfig:
    """The configuration of a run by its folder or config.yaml. Raises RunError, ConfigError."""
    url = run if run.endswith(".yaml") else storage.join(run, "config.yaml")
    try:
        return configs.load(TrainConfig, url)
    except NotFoundError:
        raise RunError(f"{url} does not exist: {run} is not the folder of a run (STORAGE/NAME)") from None


def load_run(run: str) -> tuple[TrainConfig, Retriever]:
    """A run's configuration and its model with the best weights, in eval mode on the CPU. Raises RunError."""
    run = run.removesuffix("/config.yaml").rstrip("/")
    config = load_config(run)
    model = models.build(config.model, load=False)
    load_best(run, model)
    return config, model.eval()


def weights_sha256(run: str) -> str:
    """Names the weights of `best/`, so that vectors and indexes can tell which model made them."""
    digest = hashlib.sha256()
    try:
        with storage.open_stream(best_url(run)) as stream:
            while chunk := stream.read(storage.CHUNK_BYTES):
                digest.update(chunk)
    except NotFoundError:
        raise no_best(run) from None
    return digest.hexdigest()
