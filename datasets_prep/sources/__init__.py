"""Sources: annotation files → clips. To add a benchmark, write one function and enter it in SOURCES."""

from collections.abc import Callable, Iterable
from typing import Any

from datasets_prep.plan import Clip
from datasets_prep.sources import custom, moving_shapes

# The config section of a source is its argument; `videos` in it is the folder that clips are relative to.
SOURCES: dict[str, Callable[[Any], Iterable[Clip]]] = {
    "custom": custom.read,
    "moving_shapes": moving_shapes.read,
}
