"""The configuration of each method. Light like `training/config.py`, which holds the rest of a run."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from common.config import Settings


class CaptionerConfig(Settings):
    """The caption head: a causal decoder over the frame features, used in training only."""

    layers: PositiveInt = Field(2, description="decoder layers")


class TwoTowerConfig(Settings):
    """What every two-tower method has."""

    backbone: str = Field(description="open_clip model name, a name in training/models/backbones, or a .json path")
    pretrained: str | None = Field(None, description="open_clip tag, local path or s3:// URL of weights; null = random")
    num_frames: PositiveInt = Field(6, description="frames per clip in training")
    max_tokens: PositiveInt = Field(77, description="longer captions are cut, in tokens with start and end")
    captioner: CaptionerConfig | None = Field(None, description="caption head, or null for none")

    @property
    def segments(self) -> int:
        """Equal time segments a clip is cut into; each gives one frame to every chunk."""
        return self.num_frames


class MeanPoolConfig(TwoTowerConfig):
    """CLIP with the mean of frame features (CLIP4Clip-meanP): the baseline."""

    name: Literal["mean_pool"] = Field("mean_pool", description="method")


class PromptSwitchConfig(TwoTowerConfig):
    """Prompt Switch (ICCV 2023); without cube, switch, aggregation or captioner: the paper's ablation rows."""

    name: Literal["prompt_switch"] = Field("prompt_switch", description="method")
    cube: bool = Field(True, description="add a prompt cube")
    num_prompts: PositiveInt = Field(6, description="edge of the cube; num_frames is a multiple of it")
    cube_init_std: PositiveFloat = Field(
        0.02, description="std of the cube's initial values: paper 0.02, official code 0.02/sqrt(width) = 7e-4"
    )
    switch: Literal["attention", "residual", "off"] = Field(
        "attention",
        description="exchange frames and prompts in the attention branch (official code), in the residual, or not",
    )
    aggregation: bool = Field(True, description="frames attend to all prompts of the clip after the last layer")
    aggregation_group: Literal["new", "backbone"] = Field(
        "new", description="learning-rate group of the aggregation; the official code trains it as backbone"
    )

    @property
    def segments(self) -> int:
        return self.num_prompts if self.cube else self.num_frames

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.cube and (self.switch != "off" or self.aggregation):
            raise ValueError("model.cube=false leaves no prompts: set model.switch=off and model.aggregation=false too")
        if self.cube and self.num_frames % self.num_prompts:
            raise ValueError(
                f"model.num_frames={self.num_frames} is no multiple of model.num_prompts={self.num_prompts}"
            )
        return self


ModelConfig = Annotated[MeanPoolConfig | PromptSwitchConfig, Field(discriminator="name")]
