"""VoP (Huang et al., "VoP: Text-Video Co-operative Prompt Tuning", CVPR 2023, arXiv 2211.12764), all six variants.

Every layer of both towers gets prompts of its own, whose outputs are thrown away. On the video side the variants are:

    VoP        the same prompts for every frame
    VoP^P      `specific: position`: some prompts of a layer depend on the frame's place in the clip
    VoP^C      `specific: context`: ... are made from the CLS tokens that enter the layer, by an LSTM over the frames
    VoP^F      `joint_layers: 4`: the last layers attend over all frames' tokens at once, with prompts of the video
    VoP^{F+P}, VoP^{F+C}: both; P or C below the joint layers

Trained: the prompts and what makes them; all of CLIP is fixed. Cached per video: one D vector. Multiply-adds per
text-video pair: D.

Base VoP is checked against the authors' port. No code of the variants was published; where the paper is silent: every
prompt of the first layer passes `ln_pre`, context is read behind it, frame positions begin at 0, the LSTM as torch's.

Shapes: B videos, F frames, N = B*F images, L tokens, P prompts of a layer, S those that are specific, T texts, W words,
D width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from common.errors import ConfigError
from training.model_config import VoPConfig
from training.models import clip as clip_tower
from training.models.two_tower import TextOut, TwoTower


class VoP(TwoTower):
    """CLIP with prompts in the layers of both towers.

    Any number of frames works: tables by position are read at the frame's relative place in the clip.

    Raises:
        ConfigError: the backbone has too few layers or text positions.
    """

    def __init__(self, config: VoPConfig, clip: clip_tower.Clip | None = None) -> None:
        super().__init__(config, clip)
        self.config = config
        visual = self.clip.visual
        width, frame_layers = clip_tower.image_width(visual), clip_tower.layers(visual) - config.joint_layers
        generic, specific = config.visual_prompts - config.num_specific, config.num_specific
        self._check(frame_layers)

        def table(*shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.randn(*shape) * config.prompt_init_std) if 0 not in shape else None

        text_width = clip_tower.text_tower(self.clip).token_embedding.embedding_dim
        self.text_prompts = table(clip_tower.layers(self.clip), config.text_prompts, text_width)
        self.frame_prompts = table(frame_layers, generic, width)
        self.video_prompts = table(config.joint_layers, config.visual_prompts, width)
        self.position_prompts = self.context = None
        if config.specific == "position":
            self.position_prompts = table(frame_layers, config.num_frames, specific, width)
        if config.specific == "context":
            self.context = ContextPrompts(width, specific)
        self.frame_positions = None
        if config.joint_layers and config.frame_positions:
            self.frame_positions = nn.Parameter(torch.zeros(config.num_frames, width))  # starts at CLIP's own function

    def _check(self, frame_layers: int) -> None:
        config, context = self.config, len(clip_tower.text_tower(self.clip).positional_embedding)
        if frame_layers < (1 if config.specific else 0):
            raise ConfigError(
                f"model.joint_layers={config.joint_layers} leaves none of {config.backbone}'s "
                f"{clip_tower.layers(self.clip.visual)} layers for frames on their own: lower it"
            )
        if config.text_prompts and config.max_tokens + config.text_prompts > context:
            raise ConfigError(
                f"model.max_tokens={config.max_tokens} and model.text_prompts={config.text_prompts} are more than the "
                f"{context} text positions of {config.backbone}: set model.max_tokens={context - config.text_prompts}"
            )

    def frame_features(self, pixels_BFCHW: Tensor) -> Tensor:
        visual, (videos, frames) = self.clip.visual, pixels_BFCHW.shape[:2]
        layers, joint = clip_tower.layers(visual), self.config.joint_layers
        x_NLD = clip_tower.image_tokens(visual, pixels_BFCHW.flatten(0, 1))
        for layer in range(layers - joint):
            prompts_NPD = self._frame_prompts(layer, x_NLD[:, 0].unflatten(0, (videos, frames)))
            x_NLD = _with_prompts(visual, layer, x_NLD, prompts_NPD)
        if joint:
            x_BFLD = x_NLD.unflatten(0, (videos, frames))
            if self.frame_positions is not None:
                positions_FD = self.frame_positions[_places(frames, self.frame_positions)]
                x_BFLD = x_BFLD + positions_FD[:, None].to(x_BFLD.dtype)
            x_BLD = x_BFLD.flatten(1, 2)  # one sequence per video
            for layer in range(joint):
                prompts_PD = None if self.video_prompts is None else self.video_prompts[layer]
                x_BLD = _with_prompts(visual, layers - joint + layer, x_BLD, prompts_PD, frames)
            x_NLD = x_BLD.unflatten(1, (frames, -1)).flatten(0, 1)
        return clip_tower.project(visual, clip_tower.pooled(visual, x_NLD)).unflatten(0, (videos, frames))

    def _frame_prompts(self, layer: int, cls_BFD: Tensor) -> Tensor | None:
        """The prompts of a layer for each frame on its own, NPD or PD."""
        videos, frames = cls_BFD.shape[:2]
        generic_PD = None if self.frame_prompts is None else self.frame_prompts[layer]
        if self.position_prompts is not None:
            places_F = _places(frames, self.position_prompts, 1)
            specific_NSD = self.position_prompts[layer, places_F].repeat(videos, 1, 1)
        elif self.context is not None:
            specific_NSD = self.context(cls_BFD).flatten(0, 1)
        else:
            return generic_PD
        if generic_PD is None:
            return specific_NSD
        return torch.cat([generic_PD.expand(len(specific_NSD), -1, -1).to(specific_NSD.dtype), specific_NSD], dim=1)

    def encode_text(self, tokens_TL: Tensor) -> TextOut:
        if self.text_prompts is None:
            return super().encode_text(tokens_TL)
        clip, count, suffix = self.clip, self.text_prompts.shape[1], self.config.text_suffix
        tower = clip_tower.text_tower(clip)
        ends_T = clip_tower.lengths(tokens_TL) - 1
        mask_TL = torch.arange(tokens_TL.shape[1], device=tokens_TL.device) <= ends_T[:, None]
        if suffix:  # its place is in the longest sentence that fits, as released: padding is part of it
            tokens_TL = pad(tokens_TL, (0, len(tower.positional_embedding) - count - tokens_TL.shape[1]))
        words, start, prefix = tokens_TL.shape[1], 0 if self.config.text_front else 1, count - suffix
        slots = range(words + count)
        last = words - 1 if suffix else words  # the first word behind the suffix
        word_slots = [*slots[:start], *slots[start + prefix : last + prefix], *slots[last + count :]]
        slots_W = torch.tensor(word_slots, device=tokens_TL.device)

        x_TWD = tower.token_embedding(tokens_TL)
        for layer in range(clip_tower.layers(clip)):
            prompts_TPD = self.text_prompts[layer].to(x_TWD.dtype).expand(len(x_TWD), -1, -1)
            parts = [x_TWD[:, :start], prompts_TPD[:, :prefix], x_TWD[:, start:last]]
            x_TLD = torch.cat([*parts, prompts_TPD[:, prefix:], x_TWD[:, last:]], dim=1)
            if layer == 0:  # the first prompts take positions, so words move on by `prefix`
                x_TLD = x_TLD + tower.positional_embedding[: len(slots)]
            x_TLD = clip_tower.run_block(clip, layer, x_TLD, mask=tower.attn_mask[: len(slots), : len(slots)])
            x_TWD = x_TLD[:, slots_W]
        # Behind all prompts, as released: with a suffix that is no longer the end token's slot.
        vector_TD, all_TLD = clip_tower.read_out(clip, x_TLD, ends_T + count)
        return TextOut(normalize(vector_TD, dim=-1), all_TLD[:, slots_W][:, : mask_TL.shape[1]], mask_TL)


class ContextPrompts(nn.Module):
    """VoP^C's module, shared by the layers: CLS of the frames → an LSTM both ways over time → S prompts per frame."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * width, count * width)

    def forward(self, cls_BFD: Tensor) -> Tensor:
        """Prompts BFSD."""
        # In full precision: not every LSTM kernel has bf16, and a dozen steps cost nothing.
        with torch.autocast(cls_BFD.device.type, enabled=False):
            context_BFE = self.lstm(cls_BFD.to(self.linear.weight.dtype))[0]
            return self.linear(context_BFE).unflatten(-1, (self.count, -1))


def _with_prompts(
    visual: clip_tower.ImageTower, layer: int, x_NLD: Tensor, prompts: Tensor | None, images: int = 1
) -> Tensor:
    """One block with prompts behind the tokens of the images; what comes out at them is dropped.

    Published is a place behind CLS, which is the same: attention knows a token's place by its position only.
    """
    if prompts is None:
        return clip_tower.run_block(visual, layer, x_NLD, images=images)
    # Those of the first layer meet ln_pre, as patches do.
    prompts_NPD = clip_tower.pre_norm(visual, prompts) if layer == 0 else prompts
    prompts_NPD = prompts_NPD.to(x_NLD.dtype).expand(len(x_NLD), -1, -1)
    both_NLD = clip_tower.run_block(visual, layer, torch.cat([x_NLD, prompts_NPD], dim=1), images=images)
    return both_NLD[:, : x_NLD.shape[1]]


def _places(frames: int, table: Tensor, dim: int = 0) -> Tensor:
    """The row of a table by position for each frame: its own, or that of its relative place if there are others."""
    return torch.arange(frames, device=table.device) * table.shape[dim] // frames
