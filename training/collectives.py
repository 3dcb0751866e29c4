"""The only door to other ranks. Everything is the identity in one plain process."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(count: int) -> slice:
    """This rank's consecutive part of `count` things; the ranks' parts are all of them, each once."""
    return slice(rank() * count // world_size(), (rank() + 1) * count // world_size())


def gather(x_BD: Tensor, counts: list[int]) -> Tensor:
    """Rows of all ranks, in the order of the ranks, with gradients; `counts` are their numbers of rows."""
    return _Gather.apply(x_BD, counts) if world_size() > 1 else x_BD


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks, without gradients; a new tensor."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up, over ranks, the gradients of parameters that DDP does not hold."""
    if world_size() > 1:
        for parameter in parameters:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)


def gather_objects(item: Any) -> list[Any]:
    """One small picklable thing per rank, in the order of the ranks."""
    items = [None] * world_size()
    if world_size() == 1:
        return [item]
    dist.all_gather_object(items, item)
    return items


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums, over ranks, the gradients of this rank's rows.

    Padded to the longest rank: collectives want equal shapes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        start = sum(ctx.counts[: rank()])
        return grad[start : start + ctx.counts[rank()]], None
