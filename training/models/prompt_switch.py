"""Prompt Switch (Deng et al., ICCV 2023, arXiv 2308.07648): a cube of prompts lets frames talk inside CLIP.

Trained: all of CLIP, the cube, the aggregation, the caption head; with `freeze_backbone` all but CLIP. Cached per
video: one D vector. Multiply-adds per text-video pair: D. Beyond the paper: that, `cube_layers` and `cube_per_layer`.

Shapes: B videos, F frames, S edge of the cube (= prompts per frame), K = F/S chunks, N = B*F images, L image tokens,
D width.
"""

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from training.model_config import PromptSwitchConfig
from training.models import clip as clip_tower
from training.models.two_tower import TwoTower


class PromptSwitch(TwoTower):
    """CLIP whose image tower carries a prompt cube, switches it before each attention, and gathers it at the end.

    The frame count is read from the input: any multiple of S works. Frames come as K chunks of S consecutive ones;
    a chunk spans the whole video (see training/data/decode.py), and prompts are exchanged inside a chunk only.
    """

    def __init__(self, config: PromptSwitchConfig, clip: clip_tower.Clip | None = None) -> None:
        super().__init__(config, clip)
        self.switch = config.switch
        self.pool_frames = config.pool_frames
        width, layers = clip_tower.image_width(self.clip.visual), clip_tower.layers(self.clip.visual)
        first, last = config.cube_layers or (0, layers - 1)
        if last >= layers:
            raise ConfigError(f"model.cube_layers={[first, last]}: {config.backbone}'s layers are 0 to {layers - 1}")
        self.cube_layers = range(first, last + 1) if config.cube else range(0)
        if config.cube:
            count = (len(self.cube_layers),) if config.cube_per_layer else ()
            shape = (*count, config.num_prompts, config.num_prompts, width)
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
        for layer in range(clip_tower.layers(visual)):
            mix = None
            if layer in self.cube_layers:
                x_NLD = self._with_prompts(x_NLD, layer - self.cube_layers.start, videos, frames)
                if self.switch == "attention":
                    mix = lambda y_NLD: self._switched(y_NLD, image_tokens)
                elif self.switch == "residual":
                    x_NLD = self._switched(x_NLD, image_tokens)
            x_NLD = clip_tower.run_block(visual, layer, x_NLD, mix)
            if layer == self.cube_layers.stop - 1:
                x_NLD, prompts_NSD = x_NLD[:, :image_tokens], x_NLD[:, image_tokens:]
        frames_BFD = clip_tower.pooled(visual, x_NLD).unflatten(0, (videos, frames))
        if self.aggregation is not None:
            prompts_BPD = prompts_NSD.reshape(videos, -1, x_NLD.shape[-1])
            frames_BFD = frames_BFD + self.aggregation(frames_BFD, prompts_BPD, prompts_BPD, need_weights=False)[0]
        return clip_tower.project(visual, frames_BFD)

    def _with_prompts(self, x_NLD: Tensor, cube: int, videos: int, frames: int) -> Tensor:
        """The tokens that enter the cube's `cube`-th layer: its first one appends prompts, one per layer adds to them.

        Frame f of a clip carries row f mod S, so that every chunk of every video has the whole cube.
        """
        per_layer, size = self.prompt_cube.ndim == 4, self.prompt_cube.shape[-2]
        assert frames % size == 0, f"{frames} frames are no multiple of the cube's {size}"
        if cube and not per_layer:
            return x_NLD
        cube_SSD = self.prompt_cube[cube] if per_layer else self.prompt_cube
        prompts_NSD = cube_SSD.repeat(videos * frames // size, 1, 1)
        if not cube:
            return torch.cat([x_NLD, prompts_NSD], dim=1)
        return torch.cat([x_NLD[:, :-size], x_NLD[:, -size:] + prompts_NSD], dim=1)

    def _switched(self, y_NLD: Tensor, image_tokens: int) -> Tensor:
        """Exchange frame and prompt index inside each chunk: prompt j of frame i becomes prompt i of frame j."""
        size = self.prompt_cube.shape[-2]
        prompts = y_NLD[:, image_tokens:].unflatten(0, (-1, size)).transpose(1, 2)
        return torch.cat([y_NLD[:, :image_tokens], prompts.flatten(0, 1)], dim=1)

    def pooled(self, frames_BFD: Tensor, mask_BF: Tensor | None = None) -> Tensor:
        if self.training and self.pool_frames is not None:
            # Another random subset for each video: what a frame says must not need the others.
            drawn_BF = torch.rand(frames_BFD.shape[:2], device=frames_BFD.device).topk(self.pool_frames, dim=1).indices
            frames_BFD = frames_BFD.gather(1, drawn_BF[..., None].expand(-1, -1, frames_BFD.shape[-1]))
        return super().pooled(frames_BFD, mask_BF)
