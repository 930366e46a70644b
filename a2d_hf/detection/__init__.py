"""Detection: from `config.json` alone, whether and how a model converts, or exactly why not.

The rooms: config_reading (find and read), type_table (what transformers knows), paradigm (the rules), layers,
attention_shape, capabilities, quantization, weights, mask_token, parameters, plan, and verdict, which asks them all.
None of them imports torch or transformers, reads a tensor or uses the network.
"""

from .verdict import Detection, detect


__all__ = ["Detection", "detect"]
