"""The gradients of one global batch, whatever part of it a rank holds and however small its forward passes are.

The contrastive loss couples all pairs of the global batch, so it can't be summed over pieces of it. It is computed on
the vectors alone, cut off from the towers, and each piece then takes its vectors' gradients back through them (Gao et
al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021, arXiv 2101.06983). A
single piece keeps its graph; several are run once without and once with it: a third more work, for memory that does
not grow with the batch.

Shapes: B videos of this rank, F frames, C channels, H height, W width, L tokens, D joint width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from training import losses
from training.collectives import sum_gradients, world_size
from training.config import LossConfig
from training.models import Outputs, Retriever, TextConditioned
from training.models.captioner import counted_rows

Piece = tuple[Tensor, Tensor, Tensor]  # frames, tokens, counted rows
Context = Callable[[], AbstractContextManager[object]]


class Cut(NamedTuple):
    """All that the contrastive losses read, cut off from what made it; `backward` fills in its gradients.

    `query` and `key` are the model's: vectors BD, or what a scorer reads.
    """

    query: Tensor
    key: Tensor
    frames_BFD: Tensor
    logit_scale: Tensor


def accumulate(
    ddp: DistributedDataParallel,
    frames_BFCHW: Tensor,
    tokens_BL: Tensor,
    config: LossConfig,
    token_weights_V: Tensor,
    counts: list[int],
    chunk_size: int | None = None,
    autocast: Context = nullcontext,
    model: Retriever | None = None,
) -> dict[str, Tensor]:
    """Add the global objective's gradients to the parameters; returns this rank's part of each weighted loss.

    A collective. The collectives come in the same order on ranks with different numbers of pieces: first the losses',
    then DDP's, which reduces the gradients in the last piece's backward.

    Args:
        tokens_BL: on the CPU, as they come.
        counts: rows of each rank.
        chunk_size: most videos in a forward pass with a graph; None = all of this rank's.
        autocast: makes the context of a forward pass.
        model: the one whose towers `ddp` holds; None = `ddp` holds a two-tower model.
    """
    model = ddp.module if model is None else model
    assert model is not None
    device, size = frames_BFCHW.device, chunk_size or len(frames_BFCHW)
    # Found here, where it takes no look at the device.
    counted = [counted_rows(part_BL).to(device, non_blocking=True) for part_BL in tokens_BL.split(size)]
    tokens_BL = tokens_BL.to(device, non_blocking=True)
    pieces: list[Piece] = list(zip(frames_BFCHW.split(size), tokens_BL.split(size), counted, strict=True))
    # Through the wrapper: DDP reduces the gradients of nothing else, `logit_scale` too.
    kept = _forward(ddp, pieces[0], autocast) if len(pieces) == 1 else None
    cut, states = (_cut(model, [kept]), []) if kept else _without_graph(model, pieces, autocast)
    parts = {}
    if config.contrastive:
        loss = losses.contrastive(cut.query, cut.key, cut.logit_scale, counts, model.score)
        parts["contrastive"] = config.contrastive * loss
        parts["contrastive"].backward()
        if isinstance(model, TextConditioned):  # its scorer has worked on the cut features, where DDP does not look
            sum_gradients(model.scorer.parameters())
    if config.frame_contrastive:
        loss = losses.frame_contrastive(cut.query, cut.frames_BFD, cut.logit_scale, counts)
        parts["frame_contrastive"] = config.frame_contrastive * loss
        parts["frame_contrastive"].backward()
    if config.caption:
        parts["caption"] = torch.zeros((), dtype=cut.query.dtype, device=device)
        total = losses.caption_total(tokens_BL, token_weights_V)
    for i, piece in enumerate(pieces):
        is_last = i == len(pieces) - 1
        with nullcontext() if is_last else ddp.no_sync():
            if kept:
                outputs = kept
            else:
                with _random_state(states[i], device):
                    outputs = _forward(ddp, piece, autocast)
            objective = torch.zeros((), dtype=cut.query.dtype, device=device)
            if config.reads_text:
                rows = slice(i * size, i * size + len(piece[0]))
                objective = objective + _pulled(model, outputs, cut, rows, with_scale=is_last)
            if config.caption:
                part = config.caption * losses.caption(outputs, token_weights_V, total)
                parts["caption"] += part.detach()
                objective = objective + part
            # The parts add up over ranks, and DDP takes the mean of the gradients.
            (objective * world_size()).backward()
    return {name: part.detach() for name, part in parts.items()}


def _forward(model: torch.nn.Module, piece: Piece, autocast: Context) -> Outputs:
    with autocast():
        outputs: Outputs = model(*piece)
    return outputs


def _cut(model: Retriever, outputs: list[Outputs]) -> Cut:
    def leaf(values: list[Tensor]) -> Tensor:
        joined = torch.cat(values).detach()
        # Logits and their softmax over the global batch in full precision.
        return (joined.float() if joined.dtype.itemsize < 4 else joined).requires_grad_()

    queries, keys = [model.query(out.text) for out in outputs], [model.key(out.video) for out in outputs]
    frames = [out.video.frames_BFD for out in outputs]
    return Cut(leaf(queries), leaf(keys), leaf(frames), leaf([outputs[0].logit_scale.reshape(1)]))


def _without_graph(model: Retriever, pieces: list[Piece], autocast: Context) -> tuple[Cut, list[list[Tensor]]]:
    """The vectors of all pieces, and the random state before each. The raw model: DDP counts forward passes."""
    outputs, states = [], []
    with torch.no_grad():
        for frames, tokens, _ in pieces:
            states.append(_states(tokens.device))
            with autocast():
                video, text = model.towers.encode_video(frames), model.towers.encode_text(tokens)
                outputs.append(Outputs(text, video, model.clip.logit_scale.exp(), None, None))
    return _cut(model, outputs), states


def _pulled(model: Retriever, outputs: Outputs, cut: Cut, rows: slice, with_scale: bool) -> Tensor:
    """A number whose gradient is the loss's, by way of these rows of the vectors and, once, of the scale."""
    assert cut.query.grad is not None and cut.logit_scale.grad is not None
    pulled = (model.query(outputs.text) * cut.query.grad[rows]).sum()
    for value, leaf in ((model.key(outputs.video), cut.key), (outputs.video.frames_BFD, cut.frames_BFD)):
        if leaf.grad is not None:  # the losses that are on read it
            pulled = pulled + (value * leaf.grad[rows]).sum()
    return pulled + (outputs.logit_scale * cut.logit_scale.grad).sum() if with_scale else pulled


def _states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextmanager
def _random_state(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """The same dropout as in the pass without a graph; afterwards the state is what it was."""
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if is_cuda else []):
        torch.set_rng_state(states[0])
        if is_cuda:
            torch.cuda.set_rng_state(states[1], device)
        yield
