"""What trains a diffusion language model: one configuration and one trainer per objective, over one thin base."""

from .a2d_config import A2DTrainingConfig
from .a2d_trainer import A2DTrainer
from .anchor_cache import AnchorCache, precompute_anchors
from .bd3lm_config import BD3LMConfig
from .bd3lm_trainer import BD3LMTrainer
from .checkpoints import last_complete_checkpoint
from .dataset_preparation import PreparationReport, RowRules, prepare_dataset
from .decoding_callback import DecodePromptsCallback
from .diffusion_collator import DiffusionCollator
from .mdlm_config import MDLMConfig
from .mdlm_trainer import MDLMTrainer
from .repalign_config import RepAlignConfig
from .repalign_trainer import RepAlignTrainer
from .teacher_cache import TeacherCache, precompute_teacher_logits


__all__ = [
    "A2DTrainer",
    "A2DTrainingConfig",
    "AnchorCache",
    "BD3LMConfig",
    "BD3LMTrainer",
    "DecodePromptsCallback",
    "DiffusionCollator",
    "MDLMConfig",
    "MDLMTrainer",
    "PreparationReport",
    "RepAlignConfig",
    "RepAlignTrainer",
    "RowRules",
    "TeacherCache",
    "last_complete_checkpoint",
    "precompute_anchors",
    "precompute_teacher_logits",
    "prepare_dataset",
]
