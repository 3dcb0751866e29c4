"""What happened in this process, as plain numbers; training hands them to Ray's metrics (training/monitor.py)."""

from collections import Counter

so_far: Counter[str] = Counter()


def take() -> dict[str, int]:
    """What was counted since the last call."""
    taken = {name: count for name, count in so_far.items() if count}
    so_far.subtract(taken)
    return taken
