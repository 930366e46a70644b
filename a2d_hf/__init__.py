"""a2d_hf: turn any open-weight autoregressive language model into a diffusion language model.

Owns the names that users import, each loaded when it is first used, so that `import a2d_hf`, `from a2d_hf import
detect` and `a2d --help` do not import torch. Importing the package also makes transformers' Auto classes know
converted checkpoints (see auto_registration.py).
"""

import importlib
from typing import TYPE_CHECKING, Any

from .auto_registration import register_auto_classes


__version__ = "0.1.0"

_HOME = {
    "A2DConfig": "a2d_hf.modeling.configuration_a2d",
    "A2DEvalCallback": "a2d_hf.eval_callback",
    "A2DForMaskedDiffusion": "a2d_hf.modeling.modeling_a2d",
    "A2DGenerationConfig": "a2d_hf.modeling.generation_config_a2d",
    "AttentionPattern": "a2d_hf.modeling.attention_pattern",
    "BD3LMConfig": "a2d_hf.trainers.bd3lm_config",
    "BD3LMTrainer": "a2d_hf.trainers.bd3lm_trainer",
    "DecodePromptsCallback": "a2d_hf.trainers.decoding_callback",
    "MDLMConfig": "a2d_hf.trainers.mdlm_config",
    "MDLMTrainer": "a2d_hf.trainers.mdlm_trainer",
    "RepAlignConfig": "a2d_hf.trainers.repalign_config",
    "RepAlignTrainer": "a2d_hf.trainers.repalign_trainer",
    "detect": "a2d_hf.detection",
    "convert": "a2d_hf.conversion",
}

__all__ = [
    "A2DConfig",
    "A2DEvalCallback",
    "A2DForMaskedDiffusion",
    "A2DGenerationConfig",
    "AttentionPattern",
    "BD3LMConfig",
    "BD3LMTrainer",
    "DecodePromptsCallback",
    "MDLMConfig",
    "MDLMTrainer",
    "RepAlignConfig",
    "RepAlignTrainer",
    "convert",
    "detect",
]

if TYPE_CHECKING:
    from .conversion import convert
    from .detection import detect
    from .eval_callback import A2DEvalCallback
    from .modeling.attention_pattern import AttentionPattern
    from .modeling.configuration_a2d import A2DConfig
    from .modeling.generation_config_a2d import A2DGenerationConfig
    from .modeling.modeling_a2d import A2DForMaskedDiffusion
    from .trainers.bd3lm_config import BD3LMConfig
    from .trainers.bd3lm_trainer import BD3LMTrainer
    from .trainers.decoding_callback import DecodePromptsCallback
    from .trainers.mdlm_config import MDLMConfig
    from .trainers.mdlm_trainer import MDLMTrainer
    from .trainers.repalign_config import RepAlignConfig
    from .trainers.repalign_trainer import RepAlignTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


register_auto_classes()
