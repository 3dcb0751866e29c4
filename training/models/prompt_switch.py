"""Prompt Switch (Deng et al., ICCV 2023, arXiv 2308.07648): a cube of prompts lets frames talk inside CLIP.

Trained: all of CLIP, the cube, the aggregation, the caption head. Cached per video: one D vector. Multiply-adds per
text-video pair: D.

Shapes: B videos, F frames, S edge of the cube (= prompts per frame), K = F/S chunks, N = B*F images, L image tokens,
D width.
"""

import torch
from torch import Tensor, nn

from training.model_config import PromptSwitchConfig
from training.models import clip as clip_tower
from training.models.two_tower import TwoTower


class PromptSwitch(TwoTower):
    """CLIP whose image tower carries a prompt cube, switches it before each attention, and gathers it at the end.

    The frame count is read from the input: any multiple of S works. Frames come as K chunks of S consecutive ones;
    a chunk spans the whole video (see training/data/decode.py), and prompts are exchanged inside a chunk only.
    """

    def __init__(self, config: PromptSwitchConfig, clip: clip_tower.open_clip.CLIP | None = None) -> None:
        super().__init__(config, clip)
        self.switch = config.switch
        width = self.clip.visual.conv1.out_channels
        if config.cube:
            shape = (config.num_prompts, config.num_prompts, width)
            self.prompt_cube = nn.Parameter(torch.randn(shape) * config.cube_init_std)
        else:
            self.register_parameter("prompt_cube", None)
        self.aggregation = None
        if config.aggregation:
            self.aggregation = nn.MultiheadAttention(width, clip_tower.vision_heads(self.clip.visual), batch_first=True)
            # Zero output: training starts at plain CLIP's frame features (official code).
            nn.init.zeros_(self.aggregation.out_proj.weight)
            nn.init.zeros_(self.aggregation.out_proj.bias)
        self.aggregation_is_new = config.aggregation_group == "new"

    @property
    def is_plain_clip(self) -> bool:
        return self.prompt_cube is None and self.temporal is None

    def new_parameter_names(self) -> set[str]:
        new = super().new_parameter_names()
        return new if self.aggregation_is_new else {n for n in new if not n.startswith("aggregation.")}

    def frame_features(self, pixels_BFCHW: Tensor) -> Tensor:
        visual, (videos, frames) = self.clip.visual, pixels_BFCHW.shape[:2]
        x_NLD = clip_tower.image_tokens(visual, pixels_BFCHW.flatten(0, 1))
        image_tokens = x_NLD.shape[1]
        mix = None
        if self.prompt_cube is not None:
            x_NLD = torch.cat([x_NLD, self._prompts(videos, frames)], dim=1)
        if self.switch == "attention":
            mix = lambda y_NLD: self._switched(y_NLD, image_tokens)
        for layer in range(visual.transformer.layers):
            if self.switch == "residual":
                x_NLD = self._switched(x_NLD, image_tokens)
            x_NLD = clip_tower.run_block(visual, layer, x_NLD, mix)
        cls_BFD = x_NLD[:, 0].unflatten(0, (videos, frames))
        if self.aggregation is not None:
            prompts_BPD = x_NLD[:, image_tokens:].reshape(videos, -1, x_NLD.shape[-1])
            cls_BFD = cls_BFD + self.aggregation(cls_BFD, prompts_BPD, prompts_BPD, need_weights=False)[0]
        return clip_tower.project_cls(visual, cls_BFD)

    def _prompts(self, videos: int, frames: int) -> Tensor:
        """The cube for every chunk of every video, NSD: frame f of a clip carries row f mod S."""
        size = len(self.prompt_cube)
        assert frames % size == 0, f"{frames} frames are no multiple of the cube's {size}"
        return self.prompt_cube.repeat(videos * frames // size, 1, 1)

    def _switched(self, y_NLD: Tensor, image_tokens: int) -> Tensor:
        """Exchange frame and prompt index inside each chunk: prompt j of frame i becomes prompt i of frame j."""
        size = len(self.prompt_cube)
        prompts = y_NLD[:, image_tokens:].unflatten(0, (-1, size)).transpose(1, 2)
        return torch.cat([y_NLD[:, :image_tokens], prompts.flatten(0, 1)], dim=1)
