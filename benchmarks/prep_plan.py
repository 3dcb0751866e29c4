"""Time and memory of the plan of many clips, and memory of what is read before it.

python -m benchmarks.prep_plan [CLIPS]     # 10,000,000 if not given
python -m benchmarks.prep_plan names       # of one folder, while it is listed
python -m benchmarks.prep_plan custom      # lines of a custom file
"""

import json
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from common import storage
from datasets_prep.config import CustomConfig, ShardConfig
from datasets_prep.plan import Clip, make_plan
from datasets_prep.sources import custom

T = TypeVar("T")
MANY = 200_000


def plan(count: int) -> None:
    """The clips lie in a file that is mapped: its pages leave when memory is short, so they are told apart."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.monotonic()
    made, heap = _peak(lambda: make_plan(_clips(count), ShardConfig(), 0, {}))
    seconds = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    file = sum(batch.nbytes for batch in made.clips.batches)
    print(f"{made.num_clips:,} clips, {len(made.cuts):,} shards: {seconds:.0f} s ({cpu_s:.0f} s CPU)")
    for what, size in (("heap at its peak", heap), ("mapped file", file)):
        print(f"{what}: {size / 2**30:.2f} GiB, {size / made.num_clips:.0f} B a clip")
    print(f"resident at its peak, with all else: {after.ru_maxrss / 2**20:.2f} GiB")


def names() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for i in range(MANY):
            Path(folder, f"clip_{i:011d}.mp4").touch()
        count, heap = _peak(lambda: sum(1 for _ in storage.list_files(folder)))
    print(f"{heap / count:.0f} B a name of 20 letters")


def lines() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.mp4").write_bytes(b"a")
        with open(Path(folder, "annotations.jsonl"), "w") as file:
            for i, clip in enumerate(_clips(MANY)):
                file.write(json.dumps({"video": f"clip_{i:011d}.mp4", "caption": clip.captions[0]}) + "\n")
        clips, heap = _peak(lambda: custom.read(CustomConfig(annotations=file.name, videos=folder)))
    print(f"{heap / len(clips):.0f} B a line")


def _peak(act: Callable[[], T]) -> tuple[T, int]:
    """What `act` returns, and by how many bytes the heap had grown at its peak."""
    ended = threading.Event()
    heap = [_heap()]

    def watch() -> None:
        while not ended.wait(0.02):
            heap.append(max(heap[-1], _heap()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    made = act()
    ended.set()
    watcher.join()
    return made, heap[-1] - heap[0]


def _heap() -> int:
    """Bytes of this process that no file backs."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def _clips(count: int) -> Iterator[Clip]:
    """Clips as a large web set has them: five to a long video, one sentence each."""
    for i in range(count):
        source = f"{i // 5 * 2654435761 % 2**32:011x}"  # as long as an id of YouTube
        caption = f"a person number {i} walks along the beach at sunset while a dog runs ahead"
        start = 12.5 * (i % 5)
        yield Clip(
            "train", f"{source}_{i % 5:03d}", source, (caption,), f"{source}.mp4", start, start + 10.0, 4_000_000
        )


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "10_000_000"
    modes = {"names": names, "custom": lines}
    modes[what]() if what in modes else plan(int(what))
