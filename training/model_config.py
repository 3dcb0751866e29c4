"""The configuration of each method. Light like `training/config.py`, which holds the rest of a run."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from common.config import Settings
from training.backbone import Trait, refusal


class CaptionerConfig(Settings):
    """The caption head: a causal decoder over the frame features. Retrieval does not use it."""

    layers: PositiveInt = Field(2, description="decoder layers")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the decoder in training")


class TemporalConfig(Settings):
    """CLIP4Clip-seqTransf's transformer over the frame features, a copy of the text tower's first layers."""

    layers: PositiveInt = Field(4, description="layers, at most as many as the text tower has")


class ScorerSettings(Settings):
    """What every scorer has."""

    counts_frames: ClassVar[bool] = False  # its parameters have the number of frames as a size
    reads_words: ClassVar[bool] = False  # of a sentence it looks at more than where it is read out

    @property
    def reads_padding(self) -> bool:
        """True if what stands behind a sentence's end token is a part of its score."""
        return False


class XPoolConfig(ScorerSettings):
    """X-Pool (CVPR 2022): a text pools the frames that it is about."""

    name: Literal["xpool"] = Field("xpool", description="scorer")
    heads: PositiveInt = Field(1, description="heads of the pooling attention (official: 1)")
    dropout: float = Field(0.3, ge=0, lt=1, description="dropout of the residual map in training (official: 0.3)")


class XClipConfig(ScorerSettings):
    """X-CLIP (ACM MM 2022): sentence and words against video and frames."""

    counts_frames: ClassVar[bool] = True
    reads_words: ClassVar[bool] = True
    name: Literal["xclip"] = Field("xclip", description="scorer")
    temperature: PositiveFloat = Field(0.01, description="of the attention over similarities (official: 0.01)")
    padded_words: bool = Field(
        False, description="padding up to max_tokens counts as words, as in the official code; false = words only"
    )

    @property
    def reads_padding(self) -> bool:
        return self.padded_words


class TS2NetScorerConfig(ScorerSettings):
    """TS2-Net (ECCV 2022): frames weighted by their fit to the text."""

    name: Literal["ts2net"] = Field("ts2net", description="scorer")
    sharpness: PositiveFloat = Field(
        4.0, description="factor of a frame's share of its video's cosines before their softmax (official: 4)"
    )


ScorerConfig = Annotated[XPoolConfig | XClipConfig | TS2NetScorerConfig, Field(discriminator="name")]


class TwoTowerConfig(Settings):
    """What every two-tower method has."""

    backbone: str = Field(description="open_clip model name, a name in training/models/backbones, or a .json path")
    pretrained: str | None = Field(None, description="open_clip tag, local path or s3:// URL of weights; null = random")
    init_from: str | None = Field(
        None, description="run, export or import whose weights training starts from, instead of pretrained; path or URL"
    )
    image_size: PositiveInt | None = Field(
        None, description="pixels of a frame's side, to which image positions are resampled; null = the backbone's own"
    )
    num_frames: PositiveInt = Field(6, description="frames per clip in training")
    max_tokens: PositiveInt = Field(77, description="longer captions are cut, in tokens with start and end")
    freeze_backbone: bool = Field(
        False, description="train the new modules only: CLIP, with its logit scale, stays as it is, in evaluation mode"
    )
    temporal: TemporalConfig | None = Field(
        None, description="transformer over the frame features (CLIP4Clip-seqTransf), or null for none"
    )
    captioner: CaptionerConfig | None = Field(None, description="caption head, or null for none")
    scorer: ScorerConfig | None = Field(
        None, description="score texts and videos together: such a model can only re-rank; null = by one vector each"
    )

    @property
    def segments(self) -> int:
        """Equal time segments a clip is cut into; each gives one frame to every chunk."""
        return self.num_frames

    @property
    def adds_to_clip(self) -> bool:
        """True if retrieval goes through a module that is not CLIP's."""
        return self.temporal is not None

    @property
    def needs(self) -> dict[Trait, str]:
        """What the backbone must have, each with the keys that ask for it."""
        needs: dict[Trait, str] = {}
        if self.captioner or self.temporal:
            needs["text as wide as frames"] = "model.captioner" if self.captioner else "model.temporal"
        if self.captioner:
            needs["CLIP's tokenizer"] = "model.captioner"
        if self.scorer and self.scorer.reads_words:
            needs["end token"] = f"model.scorer.name={self.scorer.name}"
        return needs

    @model_validator(mode="after")
    def _check_backbone(self) -> Self:
        reason = refusal(self.backbone, self.needs, self.max_tokens)
        if reason:
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _check_frozen(self) -> Self:
        if self.freeze_backbone and not self.adds_to_clip:
            raise ValueError("model.freeze_backbone=true leaves nothing to train in the towers: set it to false")
        return self


class MeanPoolConfig(TwoTowerConfig):
    """CLIP with the mean of frame features (CLIP4Clip-meanP): the baseline."""

    name: Literal["mean_pool"] = Field("mean_pool", description="method")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.temporal is not None:
            raise ValueError("model.temporal on mean pooling is another method: set model.name=seq_transf")
        return self


class SeqTransfConfig(TwoTowerConfig):
    """CLIP4Clip-seqTransf: a transformer over the frame features, then their mean."""

    name: Literal["seq_transf"] = Field("seq_transf", description="method")
    temporal: TemporalConfig = Field(TemporalConfig(), description="the transformer over the frame features")


class PromptSwitchConfig(TwoTowerConfig):
    """Prompt Switch (ICCV 2023); without cube, switch, aggregation or captioner: the paper's ablation rows."""

    name: Literal["prompt_switch"] = Field("prompt_switch", description="method")
    cube: bool = Field(True, description="add a prompt cube")
    num_prompts: PositiveInt = Field(6, description="edge of the cube; num_frames is a multiple of it")
    cube_init_std: PositiveFloat = Field(
        0.02, description="std of the cube's initial values: paper 0.02, official code 0.02/sqrt(width) = 7e-4"
    )
    cube_layers: tuple[NonNegativeInt, NonNegativeInt] | None = Field(
        None, description="first and last layer, counted from 0, that carry the cube; null = all, as published"
    )
    cube_per_layer: bool = Field(False, description="every layer adds a cube of its own to the prompts (unpublished)")
    switch: Literal["attention", "residual", "off"] = Field(
        "attention",
        description="exchange frames and prompts in the attention branch (official code), in the residual, or not",
    )
    aggregation: bool = Field(True, description="frames attend to all prompts of the clip after the last layer")
    aggregation_group: Literal["new", "backbone"] = Field(
        "new", description="learning-rate group of the aggregation; the official code trains it as backbone"
    )
    pool_frames: PositiveInt | None = Field(
        None,
        description="in training, a video is the mean of this many of its frames, drawn at random (the author's "
        "ActivityNet scripts: 8 of 16); null = of all",
    )

    @property
    def segments(self) -> int:
        return self.num_prompts if self.cube else self.num_frames

    @property
    def adds_to_clip(self) -> bool:
        return self.cube or super().adds_to_clip

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.cube and (self.switch != "off" or self.aggregation):
            raise ValueError("model.cube=false leaves no prompts: set model.switch=off and model.aggregation=false too")
        if self.cube_layers and self.cube_layers[0] > self.cube_layers[1]:
            raise ValueError(f"model.cube_layers={list(self.cube_layers)} is no range: write [first, last]")
        if self.pool_frames and self.pool_frames > self.num_frames:
            raise ValueError(
                f"model.pool_frames={self.pool_frames} is more than model.num_frames={self.num_frames}: lower it"
            )
        if self.cube and self.num_frames % self.num_prompts:
            raise ValueError(
                f"model.num_frames={self.num_frames} is no multiple of model.num_prompts={self.num_prompts}"
            )
        return self


class VoPConfig(TwoTowerConfig):
    """VoP (CVPR 2023): prompts in every layer of both towers; `specific` and `joint_layers` give its variants."""

    name: Literal["vop"] = Field("vop", description="method")
    num_frames: PositiveInt = Field(12, description="frames per clip in training, also the rows of tables by position")
    max_tokens: PositiveInt = Field(69, description="longer captions are cut; with text_prompts at most 77 in CLIP")
    freeze_backbone: bool = Field(True, description="train the prompts only, as published; false = CLIP too")
    visual_prompts: NonNegativeInt = Field(8, description="prompts of a layer of the image tower")
    text_prompts: NonNegativeInt = Field(8, description="prompts of a layer of the text tower")
    text_suffix: NonNegativeInt = Field(
        0,
        description="of them, those before the last slot of the padded sentence. The released code has 4, and then "
        "reads 4 slots behind the end token: hence 0",
    )
    text_front: bool = Field(
        False, description="text prompts before the start token (paper, Eq. 3) instead of behind it (released code)"
    )
    specific: Literal["position", "context"] | None = Field(
        None, description="what some prompts of a frame depend on: its place (VoP^P), the frames' content (VoP^C); null"
    )
    specific_prompts: PositiveInt = Field(4, description="of visual_prompts, those that `specific` makes")
    joint_layers: NonNegativeInt = Field(0, description="last layers that attend over all frames at once (VoP^F: 4)")
    frame_positions: bool = Field(
        True,
        description="learned frame positions before the joint layers (the paper has, but does not count them)",
    )
    prompt_init_std: PositiveFloat = Field(0.02, description="std of the prompts' initial values")

    @property
    def num_specific(self) -> int:
        return self.specific_prompts if self.specific else 0

    @property
    def adds_to_clip(self) -> bool:
        return bool(self.visual_prompts or self.text_prompts) or super().adds_to_clip

    @property
    def needs(self) -> dict[Trait, str]:
        needs = super().needs
        if self.text_prompts:
            needs["causal text"] = f"model.text_prompts={self.text_prompts}"
        if self.specific == "context":
            needs["cls"] = "model.specific=context"
        return needs

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_specific > self.visual_prompts:
            raise ValueError(
                f"model.specific_prompts={self.specific_prompts} are part of the {self.visual_prompts} of "
                "model.visual_prompts: lower them"
            )
        if self.text_suffix > self.text_prompts or (self.text_suffix and self.text_front):
            raise ValueError(
                f"model.text_suffix={self.text_suffix} needs as many model.text_prompts and model.text_front=false"
            )
        return self


class ShiftConfig(TwoTowerConfig):
    """What the methods that shift tokens between frames have."""

    num_frames: PositiveInt = Field(12, description="frames per clip in training")
    shift: Literal["cls", "patches"] = Field("cls", description="channels of CLS (TokShift) or patch tokens (TS2-Net)")
    div: int = Field(4, ge=2, description="1/div of CLS's channels each way (official: 4), or of tokens (official: 7)")
    last_layers: PositiveInt | None = Field(
        None, description="shift in the last layers only; null = in all (official: cls null, patches 2)"
    )
    unit_frames: bool = Field(
        True, description="frames are made unit length before their mean, as in retrieval; TokShift's classifier: false"
    )

    @property
    def needs(self) -> dict[Trait, str]:
        return {"cls": f"model.name={self.name}", **super().needs}  # type: ignore[attr-defined]


class TokenShiftConfig(ShiftConfig):
    """Token shift between frames: TokShift's (ACM MM 2021) of CLS channels, or TS2-Net's (ECCV 2022) of patches."""

    name: Literal["token_shift"] = Field("token_shift", description="method")


class TS2NetConfig(ShiftConfig):
    """TS2-Net (ECCV 2022): token shift, selection of tokens, a temporal transformer; its scorer is `ts2net`, too."""

    name: Literal["ts2net"] = Field("ts2net", description="method")
    shift: Literal["cls", "patches"] = Field("patches", description="patch tokens (TS2-Net) or channels of CLS")
    div: int = Field(7, ge=2, description="1/div of the tokens each way (official: 7)")
    last_layers: PositiveInt | None = Field(2, description="shift in the last layers only (official: 2); null = in all")
    temporal: TemporalConfig = Field(TemporalConfig(), description="the transformer over the frames' selected tokens")
    num_selected: PositiveInt = Field(3, description="patches of a frame that are selected, beside CLS (official: 3)")
    samples: PositiveInt = Field(500, description="noise samples of the differentiable selection (official: 500)")
    sigma: PositiveFloat = Field(0.05, description="std of that noise (official: 0.05)")
    full_gradient: bool = Field(
        False, description="the whole gradient of the noisy selection; false = its diagonal, as in the official code"
    )
    noise_in_eval: bool = Field(
        False,
        description="draw the noise in evaluation too: the official code does, and so a video's features are never "
        "twice the same; false = plain selection of the best",
    )
    tiled_mask: bool = Field(
        False,
        description="mask padded frames' tokens as the official code does, which hits others; no matter where no frame "
        "is padded, as in our loader",
    )


class ClipVipConfig(TwoTowerConfig):
    """Video Proxy of CLIP-ViP (ICLR 2023)."""

    name: Literal["clip_vip"] = Field("clip_vip", description="method")
    num_frames: PositiveInt = Field(12, description="frames per clip in training, also the temporal table's rows")
    num_proxies: int = Field(4, ge=2, description="proxy tokens of a video, CLIP's CLS among them")
    proxy_init_std: PositiveFloat = Field(0.02, description="std of the added proxies' initial values")

    @property
    def adds_to_clip(self) -> bool:
        return True

    @property
    def needs(self) -> dict[Trait, str]:
        return {"cls": "model.name=clip_vip", "own ViT": "model.name=clip_vip"}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.temporal is not None or self.captioner is not None or self.scorer is not None:
            raise ValueError(
                "clip_vip has no frame features: set model.temporal, model.captioner and model.scorer to null"
            )
        return self


ModelConfig = Annotated[
    MeanPoolConfig | SeqTransfConfig | PromptSwitchConfig | VoPConfig | TokenShiftConfig | TS2NetConfig | ClipVipConfig,
    Field(discriminator="name"),
]
