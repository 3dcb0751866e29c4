"""Compare a method with reference tensors: `python -m tests.parity FILE.npz ...`.

The file's name up to the first `_` or `.` names the method, whose entry in tests/golden*.py runs it; every size is read
from the file. Prints the largest error per tensor in float64 and in float32 and exits 1 above the tolerances (float64:
1e-9 of the tensor's maximum, at least of 1; float32: outputs 2e-5 + 1e-4 relative, gradients 1e-4 of the tensor's
maximum; X-CLIP, whose temperature of 0.01 acts twice, in float32: similarity and loss 3e-3, its terms 5e-4, gradients
5e-3 of the tensor's maximum; a token shift alone: equality). Every `out.*` and `grad.*` of a file is compared; caption
logits at the counted positions only, and in float32 not what TS2-Net selects, and all that follows, where rounding
decided it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError, exit_with
from tests.golden import TWO_TOWER, Golden, Values
from tests.golden_scorers import TEXT_CONDITIONED, undecided
from training.models.captioner import counted_positions

METHODS = TWO_TOWER | TEXT_CONDITIONED


def read(path: Path) -> tuple[Golden, Values]:
    """A file, and the references in it."""
    with np.load(path, allow_pickle=False) as file:
        sizes = json.loads(str(file["config"]))
        values = {k: torch.from_numpy(np.asarray(file[k])) for k in file.files if k != "config"}

    def part(prefix: str) -> Values:
        return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}

    references = {k: v for k, v in values.items() if k.startswith(("out.", "grad."))}
    golden = Golden(sizes, part("w."), part("in."))
    if "out.caption_logits" in references:
        # Positions after the end token hold whatever the producing run padded with.
        counted = counted_positions(golden.inputs["text"])
        references["out.caption_logits"] = references["out.caption_logits"][counted]
    return golden, references


def in_precision(golden: Golden, dtype: torch.dtype) -> Golden:
    """Fresh leaves, the inputs too: their gradients are compared."""

    def cast(values: Values, is_leaf: bool) -> Values:
        floats = {k: v.to(dtype, copy=True) for k, v in values.items() if v.is_floating_point()}
        return {k: floats[k].requires_grad_(is_leaf) if k in floats else v for k, v in values.items()}

    return Golden(golden.sizes, cast(golden.weights, False), cast(golden.inputs, True))


def allowed(method: str, key: str, reference: Tensor, dtype: torch.dtype) -> Tensor:
    largest = reference.abs().max()
    if key.startswith("out.shift_"):  # moves values, computes none
        return torch.zeros(())
    if dtype == torch.float64:
        return 1e-9 * largest.clamp(min=1)
    if method == "xclip" and not key.endswith("video_mean"):
        is_scaled = key.endswith(("similarity", "loss_square"))
        return 5e-3 * largest if key.startswith("grad.") else torch.tensor(3e-3 if is_scaled else 5e-4)
    return 1e-4 * largest if key.startswith("grad.") else 2e-5 + 1e-4 * reference.abs()


def compare(path: Path) -> bool:
    """Print a line per tensor; True if all are within tolerance."""
    method = path.name.split(".")[0].split("_")[0]
    if method not in METHODS:
        raise ConfigError(f"no parity test for {method!r}; known: {', '.join(sorted(METHODS))}")
    golden, references = read(path)
    fits = True
    for dtype in (torch.float64, torch.float32):
        found = METHODS[method](in_precision(golden, dtype))
        skipped = undecided(golden, found, references) if dtype == torch.float32 else set()
        if skipped:
            print(f"{path.name}  float32  two scores within rounding changed places; what that decides is left out")
        for key, reference in references.items():
            if key in skipped:
                continue
            value = found[key].detach().reshape(reference.shape)
            error = (value.double() - reference.double()).abs()
            ok = bool((error <= allowed(method, key, reference, dtype)).all())
            fits &= ok
            name = str(dtype).removeprefix("torch.")
            print(f"{path.name}  {name}  {key:<36} max error {error.max():.1e}  {'ok' if ok else 'TOO LARGE'}")
    return fits


def main() -> int:
    if not sys.argv[1:]:
        raise ConfigError("no file given: python -m tests.parity FILE.npz ...")
    results = [compare(Path(name)) for name in sys.argv[1:]]
    print(f"{sum(results)} of {len(results)} files within tolerance")
    return 0 if all(results) else 1


if __name__ == "__main__":
    exit_with(main)
