"""Time and memory of the plan of many clips.

python -m benchmarks.prep_plan [CLIPS]     # 10,000,000 if not given
"""

import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from datasets_prep.config import ShardConfig
from datasets_prep.plan import Clip, make_plan


def measure(count: int) -> None:
    """The clips lie in a file that is mapped: its pages leave when memory is short, so they are told apart."""
    peak = threading.Event()
    heap = [_heap()]

    def watch() -> None:
        while not peak.wait(0.02):
            heap.append(max(heap[-1], _heap()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.monotonic()
    made = make_plan(_clips(count), ShardConfig(), 0, {})
    seconds = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    peak.set()
    watcher.join()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    file = sum(batch.nbytes for batch in made.clips.batches)
    print(f"{made.num_clips:,} clips, {len(made.cuts):,} shards: {seconds:.0f} s ({cpu_s:.0f} s CPU)")
    for what, size in (("heap at its peak", heap[-1] - heap[0]), ("mapped file", file)):
        print(f"{what}: {size / 2**30:.2f} GiB, {size / made.num_clips:.0f} B a clip")
    print(f"resident at its peak, with all else: {after.ru_maxrss / 2**20:.2f} GiB")


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
    measure(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000)
