"""Paired rounds: all sides one after the other in alternating order, kept in a file, so that a call can go on."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeVar

from common import config as configs
from common.config import Settings

S = TypeVar("S", bound=Settings)
Times = dict[str, float]  # span → seconds
Side = Callable[[], Times]


def configured(schema: type[S]) -> S:
    """The configuration of `python -m benchmarks.X [key=value ...]`; `--help` prints the keys and exits."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(f"{(sys.modules['__main__'].__doc__ or '').strip()}\n\n{configs.describe(schema)}")
        sys.exit(0)
    return configs.validate(schema, configs.parse_overrides(arguments))


def run(
    file: Path, key: dict[str, Any], count: int, minutes: float, sides: Mapping[str, Side], output: Path
) -> list[dict[str, Times]]:
    """The rows of all rounds under `key`: those in `file`, and more while there is time; `output` is emptied before."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rows = [line["times"] for line in lines if line["config"] == key]
    start, longest = time.monotonic(), 0.0
    while len(rows) < count:
        began = time.monotonic()
        if began + longest - start > 60 * minutes:
            print(f"{len(rows)} of {count} rounds in the time there was: run it again to go on")
            break
        order = list(sides) if len(rows) % 2 == 0 else list(sides)[::-1]
        row = {}
        for side in order:
            shutil.rmtree(output, ignore_errors=True)
            row[side] = sides[side]()
        shutil.rmtree(output, ignore_errors=True)
        rows.append({side: row[side] for side in sides})
        with open(file, "a") as out:
            out.write(json.dumps({"config": key, "times": rows[-1]}) + "\n")
        longest = max(longest, time.monotonic() - began)
        print(f"round {len(rows)}: " + ", ".join(f"{s} {t['tasks']:.2f} s" for s, t in rows[-1].items()), flush=True)
    return rows


def seconds(act: Callable[[], None]) -> Times:
    start = time.monotonic()
    act()
    return {"tasks": time.monotonic() - start}


def spread(values: list[float]) -> str:
    """Median [lowest; quartiles; highest] of some rounds."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    between = f"min {min(values):.3f}, quartiles {low:.3f} and {high:.3f}, max {max(values):.3f}"
    return f"{median(values):.3f} ({between}; {len(values)} rounds)"
