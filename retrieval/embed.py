"""Encode the videos of a split into vectors, by a pool of Ray actors.

Writes one parquet part per shard below `output` and embeddings.json last. Run again after an interruption: parts that
are there are kept. Next: python -m retrieval.index.

A run with model.scorer has no vectors: what its scorer reads of each video is written, and can re-rank what an index
finds. Next: python -m retrieval.search "a sentence" index=URL rerank=OUTPUT.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray.exceptions

from common import logs, shards, storage
from common.config import apply, from_command_line, refuse_relative_in_job
from common.errors import ConfigError, RunError, exit_with, told
from common.shards import ShardEntry
from retrieval.config import PRESETS, EmbedConfig
from retrieval.embeddings import Embeddings, Part, Source, claim, part_name
from retrieval.encoder import Embedder, kept_shape
from training.data.loader import check_frames
from training.models import TwoTower
from training.train import connect
from training.weights import load_run, weights_sha256

log = logging.getLogger(__name__)
WAIT_S = 30.0
RESTARTS = 3


def embed(config: EmbedConfig) -> Embeddings:
    """Write what the run keeps of a split's videos; returns the content of embeddings.json. Needs a running Ray.

    Raises:
        ConfigError, DataError, RunError, StorageError: as one sentence.
    """
    start = time.monotonic()
    refuse_relative_in_job(config, "run", "dataset", "output")
    config = config.model_copy(update={"output": storage.absolute(config.output), "run": storage.absolute(config.run)})
    source, entries = _source(config)
    storage.check_writable(config.output)
    claim(config.output, source)
    there = {entry.url.rsplit("/", 1)[-1] for entry in storage.list_files(config.output)}
    missing = [(entry, number) for number, entry in enumerate(entries) if part_name(number) not in there]
    if len(missing) < len(entries):
        log.info("%d of %d parts are there already", len(entries) - len(missing), len(entries))
    with logs.progress(_encode(config, source, missing), "shards", len(missing)) as encoded:
        done = sum(encoded)
    parts = [Part(name=part_name(i), shard=e.name, videos=e.samples) for i, e in enumerate(entries)]
    embeddings = Embeddings(source=source, parts=parts)
    storage.publish_bytes(embeddings.model_dump_json(indent=2).encode(), storage.join(config.output, "embeddings.json"))
    log.info(
        "%d videos in %d parts at %s; %d of them encoded now, in %s",
        embeddings.videos, len(parts), config.output, done, logs.duration(time.monotonic() - start),
    )  # fmt: skip
    return embeddings


def _source(config: EmbedConfig) -> tuple[Source, list[ShardEntry]]:
    """What the vectors are made from, and the shards to read. Loads the model once, to refuse it here if need be."""
    run_config, model = load_run(config.run)
    url = storage.absolute(config.dataset or run_config.data.dataset)
    dataset, dataset_sha256 = shards.read_dataset(url)
    views = config.views or run_config.eval.views
    apply(run_config, {"eval.views": views})  # not every scorer takes more frames than it was trained with
    check_frames(run_config, url, dataset, config.split, views)
    source = Source(
        run=config.run,
        dataset=url,
        weights_sha256=weights_sha256(config.run),
        dataset_sha256=dataset_sha256,
        split=config.split,
        views=views,
        kind="vectors" if isinstance(model, TwoTower) else "features",
        shape=kept_shape(run_config, model, views),
        dtype=config.dtype,
    )
    return source, dataset.split(config.split).shards


def _encode(config: EmbedConfig, source: Source, missing: list[tuple[ShardEntry, int]]) -> Iterator[int]:
    """Encode shards on a pool of actors; yields their numbers of videos as they finish."""
    actors = _actors(config, source, len(missing)) if missing else []
    try:
        yield from _results(config, actors, missing)
    except ray.exceptions.RayActorError as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(
            f"an encoding actor died {RESTARTS + 1} times ({reason}): run the same command again to go on"
        ) from None
    except ray.exceptions.RayTaskError as error:
        raise (told(error) or error) from None
    finally:
        for actor in actors:
            ray.kill(actor)


def _results(config: EmbedConfig, actors: list[Any], missing: list[tuple[ShardEntry, int]]) -> Iterator[int]:
    """One call in flight on each actor; its first one loads the model, so an actor that never starts holds no shard."""
    waiting, left = list(reversed(missing)), len(missing)
    calls: dict[Any, Any] = {actor.start.remote(): actor for actor in actors}
    started, deadline = False, time.monotonic() + config.start_timeout_s
    while left:
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=None if started else WAIT_S)
        if ready:
            started = True
            actor, videos = calls.pop(ready[0]), ray.get(ready[0])
            if waiting:
                calls[actor.embed.remote(*waiting.pop())] = actor
            if videos is not None:
                left -= 1
                yield videos
        elif time.monotonic() > deadline:
            raise RunError(
                f"no actor got its {config.cpus_per_actor} CPUs in start_timeout_s={config.start_timeout_s}: "
                "wait for other jobs to end, or lower cpus_per_actor"
            )
        else:
            log.warning("waiting for an actor with %d CPUs", config.cpus_per_actor)


def _actors(config: EmbedConfig, source: Source, wanted: int) -> list[Any]:
    """At most `wanted` actors; their number comes from the config, else from what the nodes hold."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in nodes)
    use_gpu = gpus > 0 if config.use_gpu is None else config.use_gpu
    fit = sum(int(node.get("CPU", 0) // config.cpus_per_actor) for node in nodes)
    fit = min(fit, int(gpus)) if use_gpu else fit
    count = min(config.actors or fit, wanted)
    if count == 0:
        most = max((node.get("CPU", 0) for node in nodes), default=0)
        raise ConfigError(
            f"no node holds an actor with cpus_per_actor={config.cpus_per_actor}{' and a GPU' if use_gpu else ''}: "
            f"the largest has {most:g} CPUs and the cluster {gpus:g} GPUs; lower cpus_per_actor or set use_gpu"
        )
    log.info("%d actors with %d CPUs%s each", count, config.cpus_per_actor, " and a GPU" if use_gpu else "")
    actor = ray.remote(Embedder).options(
        num_cpus=config.cpus_per_actor,
        num_gpus=1 if use_gpu else 0,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,  # a lost node costs its shard a repetition; a part is published whole or not
    )
    return [actor.remote(config, source, "cuda" if use_gpu else "cpu") for _ in range(count)]


def main() -> None:
    logs.setup()
    config = from_command_line(EmbedConfig, PRESETS / "embed", "retrieval.embed")
    connect()
    embed(config)


if __name__ == "__main__":
    exit_with(main)
