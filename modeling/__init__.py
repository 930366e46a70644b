"""What travels with a checkpoint: configuration, attention patterns, model and decoder.

Needs torch and transformers, nothing else. The files of this folder are copied beside the weights of an exported
checkpoint, so they import each other as flat siblings only. Importing this package makes the auto classes of
transformers load converted checkpoints.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .attention_pattern import AttentionPattern
from .configuration_a2d import A2DConfig
from .generation_config_a2d import A2DGenerationConfig
from .modeling_a2d import A2DForMaskedDiffusion


AutoConfig.register(A2DConfig.model_type, A2DConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
    auto_class.register(A2DConfig, A2DForMaskedDiffusion, exist_ok=True)

__all__ = ["A2DConfig", "A2DForMaskedDiffusion", "A2DGenerationConfig", "AttentionPattern"]
