"""How sure a number is: over the queries of one run, and over runs that differ in their seed.

Shapes: Q queries, V videos, R resamples.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from training.metrics import Measured

Interval = tuple[float, float]


def bootstrap(measured: Measured, resamples: int, confidence: float, seed: int = 0) -> dict[str, Interval]:
    """Percentile intervals of every metric, by its full name.

    Whole videos are drawn again, with all their queries: captions of one video succeed and fail together, and drawn one
    by one they would look like that many more observations. The items that are ranked stay as they are.
    """
    random = np.random.default_rng(seed)
    order = measured.ranks_Q.argsort()  # once: what is in order is quickly sorted again
    measured = measured._replace(ranks_Q=measured.ranks_Q[order], videos_Q=measured.videos_Q[order])
    videos, video_Q = np.unique(measured.videos_Q, return_inverse=True)
    draws = []
    for _ in range(resamples):
        times_V = np.bincount(random.integers(len(videos), size=len(videos)), minlength=len(videos))
        draws.append(measured.metrics(times_V[video_Q]))
    ends = [50 * (1 - confidence), 50 * (1 + confidence)]
    found = {name: np.percentile([draw[name] for draw in draws], ends) for name in draws[0]}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def over_runs(values: Sequence[float], confidence: float) -> tuple[float, Interval]:
    """Mean over two runs or more, and Student's interval of it: a few runs are too few to draw from."""
    mean, count = float(np.mean(values)), len(values)
    reach = float(stdtrit(count - 1, (1 + confidence) / 2) * np.std(values, ddof=1) / np.sqrt(count))
    return mean, (mean - reach, mean + reach)
