"""The ways to convert that bench_conversion.py measures, and the learning rates that each is tried at.

Owns the list, and nothing that runs.
"""

from dataclasses import dataclass, field
from typing import Any


MDLM, BD3LM, REPALIGN = "mdlm", "bd3lm", "repalign"


@dataclass(frozen=True)
class LastPart:
    """
    A second training of the same model, for the last part of the tokens.

    Attributes:
        share (`float`): of the tokens.
        rate (`float`): where the first part's learning rates end and the second's begin, as a share of their peak.
        config (`dict`): fields of the trainer's configuration, in place of the first part's.
    """

    share: float
    rate: float
    config: dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """
    One way to convert.

    Attributes:
        name (`str`): as it stands in the table.
        objective (`str`): which trainer.
        token_shift (`bool`): whether predictions are read one position to the left.
        model (`dict`): further fields of the conversion.
        config (`dict`): fields of the trainer's configuration.
        anneal (`float`): share of the steps over which attention opens.
        lora (`bool`): adapters of rank 16 on every linear layer in place of all weights.
        own_text (`bool`): trained on what the parent wrote (`--own-text`) in place of the data.
        last ([`LastPart`], *optional*): what comes after, on the data itself, within the same number of tokens.
    """

    name: str
    objective: str
    token_shift: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    anneal: float = 0.0
    lora: bool = False
    own_text: bool = False
    last: LastPart | None = None


# Tried on the first seed, by objective. A block's model starts near its parent and wants smaller steps.
LEARNING_RATES = {MDLM: (1e-3, 2e-3, 4e-3), REPALIGN: (1e-3, 2e-3, 4e-3), BD3LM: (2.5e-4, 5e-4, 1e-3)}
CAUSAL = {"clean_context": "causal"}
FOUR, COUNTED = {"block_size": 4}, {"block_size": 4, "mask_sampling": "count"}
BEST = COUNTED | {"complementary_views": True, "teacher_kl_weight": 1.0}
NESTED = COUNTED | {"nested_views": 4}
OWN = NESTED | {"muon_learning_rate": 2e-3, "ar_loss_weight": 0.5, "teacher_targets": True}
ALL_ORDERS = OWN | {"nested_orders": 4}
IN_SHARES = ALL_ORDERS | {"steps_per_row": 4, "ar_loss_weight": 0.1}
# The rest of a run on the data itself: its own tokens, no longer the parent's distribution, are the target.
ON_DATA = {name: value for name, value in IN_SHARES.items() if name != "teacher_targets"}
ARMS = (
    Arm("MDLM", MDLM),
    Arm("MDLM, shift", MDLM, True),
    Arm("MDLM, shift, annealed", MDLM, True, anneal=0.5),
    Arm("MDLM, shift, RepAlign 1", REPALIGN, True, config={"align_weight": 1.0}),
    Arm("MDLM, shift, AR loss 0.3", MDLM, True, config={"ar_loss_weight": 0.3}),
    Arm("MDLM, shift, teacher KL 1", MDLM, True, config={"teacher_kl_weight": 1.0}),
    Arm("MDLM, shift, uniform weights", MDLM, True, config={"loss_weighting": "uniform"}),
    Arm("MDLM, shift, LoRA 16", MDLM, True, lora=True),
    Arm("BD3LM 16, shift", BD3LM, True, CAUSAL, {"block_size": 16}),
    Arm("BD3LM 4", BD3LM, False, CAUSAL, FOUR),
    Arm("BD3LM 4, shift", BD3LM, True, CAUSAL, FOUR),
    Arm("BD3LM 4, shift, block-open context", BD3LM, True, {"clean_context": "block"}, FOUR),
    Arm("BD3LM 4, shift, 1 to 4", BD3LM, True, CAUSAL, FOUR | {"block_size_curriculum": [1, 2, 4]}),
    Arm("BD3LM 4, shift, AR loss 0.3", BD3LM, True, CAUSAL, FOUR | {"ar_loss_weight": 0.3}),
    Arm("BD3LM 4, shift, counted", BD3LM, True, CAUSAL, COUNTED),
    Arm("BD3LM 4, shift, counted, two views", BD3LM, True, CAUSAL, COUNTED | {"complementary_views": True}),
    Arm("BD3LM 4, shift, counted, teacher KL 1", BD3LM, True, CAUSAL, COUNTED | {"teacher_kl_weight": 1.0}),
    Arm("BD3LM 4, shift, counted, two views, teacher KL 1", BD3LM, True, CAUSAL, BEST),
    Arm("BD3LM 4, shift, four nested views", BD3LM, True, CAUSAL, NESTED),
    Arm("BD3LM 4, nested views, Muon, own text", BD3LM, False, CAUSAL, OWN, own_text=True),
    Arm("BD3LM 4, nested views, Muon, own text, all orders", BD3LM, False, CAUSAL, ALL_ORDERS, own_text=True),
    Arm(
        "BD3LM 4, nested views, Muon, own text, all orders, four steps a row",
        BD3LM,
        model=CAUSAL,
        config=IN_SHARES,
        own_text=True,
    ),
    Arm(
        "BD3LM 4, nested views, Muon, own text, all orders, four steps a row, then the data",
        BD3LM,
        model=CAUSAL,
        config=IN_SHARES,
        own_text=True,
        last=LastPart(share=0.25, rate=0.35, config=ON_DATA),
    ),
    Arm("BD3LM 4, shift, nested views, Muon, own text", BD3LM, True, CAUSAL, OWN, own_text=True),
    Arm("BD3LM 1, shift", BD3LM, True, CAUSAL, {"block_size": 1}),
)
