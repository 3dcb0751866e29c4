"""Sources: annotation files → clips. To add a benchmark, write one function and enter it in SOURCES."""

from collections.abc import Callable, Iterable
from typing import Any

from datasets_prep.plan import Clip
from datasets_prep.sources import activitynet, custom, didemo, lsmdc, moving_shapes, msrvtt, msvd, table, vatex

# The config section of a source is its argument; `videos` in it is the folder that clips are relative to.
SOURCES: dict[str, Callable[[Any], Iterable[Clip]]] = {
    "activitynet": activitynet.read,
    "custom": custom.read,
    "didemo": didemo.read,
    "lsmdc": lsmdc.read,
    "moving_shapes": moving_shapes.read,
    "msrvtt": msrvtt.read,
    "msvd": msvd.read,
    "table": table.read,
    "vatex": vatex.read,
}
