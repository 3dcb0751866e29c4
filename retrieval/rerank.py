"""The second stage of a search: a text-conditioned scorer orders what the index has found. On the CPU, without Ray.

Shapes: T texts, K videos.
"""

import torch

from common import storage
from common.errors import DataError, RunError
from retrieval.config import SearchConfig
from retrieval.embeddings import Source, read_embeddings
from retrieval.features import read_features
from retrieval.result import Hit, Reranking
from training import models
from training.weights import load_run, weights_sha256


@torch.inference_mode()
def rerank(config: SearchConfig, index: Source, hits: list[Hit]) -> tuple[list[Hit], Reranking]:
    """The hits in the order of the scorer's scores; of equal ones the index's order stands.

    Raises:
        DataError, RunError: the features are not of the index's dataset and split, or not of the run's weights.
    """
    assert config.rerank is not None
    url = storage.absolute(config.rerank)
    embeddings = read_embeddings(url)
    source = embeddings.source
    _check(url, source, index)
    run = storage.absolute(config.rerank_run or source.run)
    run_config, model = load_run(run)
    if weights_sha256(run) != source.weights_sha256:
        raise RunError(
            f"the best weights of run {run} are not those that made the features at {url}: embed again with it"
        )
    assert run_config.model.scorer is not None
    key_K = torch.from_numpy(read_features(url, embeddings, [(hit.shard, hit.video_id) for hit in hits]))
    query_T = model.query(model.encode_text(models.tokenize(run_config.model)([config.query])))
    score_K = model.score(query_T, key_K)[0]
    order_K = score_K.argsort(descending=True, stable=True).tolist()
    ordered = [
        hits[place].model_copy(update={"rank": rank, "score": float(score_K[place])})
        for rank, place in enumerate(order_K, 1)
    ]
    return ordered, Reranking(features=url, run=run, scorer=run_config.model.scorer.name, videos=len(hits))


def _check(url: str, source: Source, index: Source) -> None:
    if source.kind != "features":
        raise DataError(
            f"rerank={url} holds vectors of run {source.run}, which has no model.scorer: re-ranking needs what "
            "retrieval.embed writes of a run with one"
        )
    if source.dataset_sha256 != index.dataset_sha256:
        raise DataError(
            f"rerank={url} is of another dataset ({source.dataset}) than the index ({index.dataset}), or of an older "
            "build of it: embed the index's dataset with the re-ranking run"
        )
