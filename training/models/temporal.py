"""CLIP4Clip-seqTransf's temporal transformer (Luo et al., Neurocomputing 2022, arXiv 2104.08860) over frame features.

Used by `seq_transf`, and by any other method whose `model.temporal` is set: frames → frames + transformer(frames +
positions). X-CLIP and TS2-Net have the same one.

Shapes: B videos, F frames (or other tokens in time), D joint width, H heads.
"""

from torch import Tensor, nn

from common.errors import ConfigError
from training.models import clip as clip_tower

LN_EPS = 1e-12  # official, here only; CLIP's own is 1e-5
MASKED = -1e6


class TemporalTransformer(nn.Module):
    """Blocks and positions begin as copies of the text tower's first ones (official); no LayerNorm around the stack.

    Raises:
        ConfigError: the text tower has too few layers or positions, or another width than the frame features.
    """

    def __init__(self, clip: clip_tower.Clip, layers: int, num_frames: int) -> None:
        super().__init__()
        table_LD, joint = clip_tower.text_tower(clip).positional_embedding, clip_tower.joint_width(clip)
        positions, width = table_LD.shape
        if width != joint or clip_tower.layers(clip) < layers:
            raise ConfigError(
                f"model.temporal.layers={layers} are copied from the text tower, which has {clip_tower.layers(clip)} "
                f"layers of width {width} (frame features: {joint}): lower it, or choose another model.backbone"
            )
        if num_frames > positions:
            raise ConfigError(f"model.num_frames={num_frames} is more than model.temporal's {positions} positions")
        self.heads = clip_tower.text_heads(clip)
        self.transformerClip = clip_tower.TextBlocks(clip, layers, LN_EPS)
        self.frame_position_embeddings = nn.Embedding.from_pretrained(table_LD.detach().clone(), False)

    def forward(self, frames_BFD: Tensor, mask_BF: Tensor | None = None) -> Tensor:
        """What the frames' context adds to them, BFD; padded frames are no keys to any other."""
        count = frames_BFD.shape[1]
        assert count <= self.frame_position_embeddings.num_embeddings, f"{count} frames are more than positions"
        mask = None
        if mask_BF is not None:
            added_BF = (1 - mask_BF.to(frames_BFD.dtype)) * MASKED
            mask = added_BF[:, None, None].expand(-1, self.heads, count, -1).flatten(0, 1)
        return self.transformerClip(frames_BFD + self.frame_position_embeddings.weight[:count], mask)
