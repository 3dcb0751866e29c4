"""CLIP4Clip-seqTransf (Luo et al., Neurocomputing 2022, arXiv 2104.08860): a transformer over the frames' vectors.

Trained: all of CLIP at the backbone's rate (the official code keeps the token embedding, patch projection, positions
and `ln_pre` fixed), the temporal transformer at the new modules' (official: 1e-7 and 1e-4). Cached per video: one D
vector. Multiply-adds per text-video pair: D.

Shapes: see training/models/temporal.py, which holds the transformer: `model.temporal` puts it on other methods too.
"""

from training.models.mean_pool import MeanPool


class SeqTransf(MeanPool):
    """Mean pooling of frames that have seen each other: order counts, by the temporal transformer's positions."""

    @property
    def is_plain_clip(self) -> bool:
        return False
