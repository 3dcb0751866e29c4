"""The imports of open_clip and timm, which need a torchvision that can be imported.

The code that touches their internals is here and in clip.py, clip_weights.py, timm_tower.py and tokenizer.py.
"""

import importlib.util
from pathlib import Path

import torch

_torchvision_ops: torch.library.Library | None = None


def _declare_torchvision_ops() -> None:
    """Let a torchvision built for CUDA import beside a CPU torch.

    PyPI's torchvision has no CPU build; its import annotates two operators that only its CUDA library would
    register. Declaring their schemas is enough: what needs the compiled code still says that it is missing.
    """
    global _torchvision_ops
    spec = importlib.util.find_spec("torchvision")
    if torch.version.cuda or torch.version.hip or spec is None or not spec.origin or _torchvision_ops is not None:
        return
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
            return
        except OSError:
            continue
    _torchvision_ops = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        _torchvision_ops.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declare_torchvision_ops()
import open_clip  # noqa: E402
from open_clip.timm_model import TimmModel  # noqa: E402
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer  # noqa: E402
from timm.models.eva import Eva, EvaBlock  # noqa: E402
from timm.models.vision_transformer import Block as TimmBlock  # noqa: E402
from timm.models.vision_transformer import VisionTransformer as TimmViT  # noqa: E402

__all__ = ["Eva", "EvaBlock", "ResidualAttentionBlock", "TextTransformer", "TimmBlock", "TimmModel", "TimmViT"]
__all__ += ["VisionTransformer", "open_clip"]
