"""Bytes that autograd keeps for the backward pass: what training needs beside weights, whatever the device."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(model: torch.nn.Module, act: Callable[[], object]) -> int:
    """The peak of what graphs hold while `act` runs: each storage once, those of the model's parameters not at all."""
    saved = _Saved(model)
    with saved_tensors_hooks(lambda x: _Held(x, saved), lambda held: held.x):
        act()
    return saved.peak


class _Saved:
    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.holders: Counter[int] = Counter()
        self.now = self.peak = 0

    def hold(self, x: Tensor, change: int) -> None:
        """One holder of a storage more, or less."""
        place, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
        if place in self.parameters:
            return
        before = self.holders[place]
        self.holders[place] += change
        if not before or not self.holders[place]:
            self.now += change * size
            self.peak = max(self.peak, self.now)


class _Held:
    """A saved tensor, counted for as long as a graph holds it."""

    def __init__(self, x: Tensor, saved: _Saved) -> None:
        self.x, self.saved = x.detach(), saved  # an output that held its own graph would never go
        saved.hold(self.x, 1)

    def __del__(self) -> None:
        self.saved.hold(self.x, -1)
