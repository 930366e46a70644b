"""What training with representation alignment can be told. Owns the fields that it adds to masked diffusion."""

from dataclasses import dataclass, field

from .mdlm_config import MDLMConfig


@dataclass
class RepAlignConfig(MDLMConfig):
    r"""
    Configuration of [`RepAlignTrainer`].

    Only the parameters of the alignment are listed here; see [`MDLMConfig`] for those of masked diffusion. To train as
    Repr-Align was published, also set `loss_weighting="uniform"`, `loss_normalization="masked"`,
    `model_init_kwargs={"token_shift": True}` and `frozen_parameters=["embeddings", "head"]`.

    Parameters:
        align_weight (`float`, *optional*, defaults to `10.0`):
            Weight of the alignment loss, 1 - mean cosine.
        align_weight_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"`, or a decay to 0 over the training: `"linear"` or `"cosine"`.
        align_positions (`str`, *optional*, defaults to `"masked_shift"`):
            Where student and teacher are compared: `"masked_shift"` (one before each masked token: where the parent
            predicts it), `"unmasked"` (tokens that the student can read) or `"all"`. Always the same place in both.
        align_layers (`list[int]`, *optional*):
            Which of the hidden states to compare: 0 is the embedding's output, the last what the head reads. Negative
            numbers count from the end. By default all.
        align_sample_layers (`int`, *optional*):
            How many of those to draw anew at every optimizer step. By default all of them.
        align_token_share (`float`, *optional*, defaults to `1.0`):
            Share of the positions to draw anew at every optimizer step.
        anchor_cache (`str`, *optional*):
            Folder of hidden states that `scripts/precompute_anchors.py` has written; takes the place of the teacher.
        anchor_strict (`bool`, *optional*, defaults to `True`):
            Whether a row without anchors is an error. If not, it is trained without alignment, and counted.
        frozen_parameters (`list[str]`, *optional*):
            Parameters that stay as they are: `"embeddings"`, `"head"`, or any part of their names, for example
            `"mlp"`.
    """

    align_weight: float = field(default=10.0, metadata={"help": "Weight of the alignment loss, 1 - mean cosine."})
    align_weight_schedule: str = field(
        default="constant",
        metadata={
            "help": "'constant', or a decay to 0 over the training: 'linear' or 'cosine'.",
            "choices": ["constant", "linear", "cosine"],
        },
    )
    align_positions: str = field(
        default="masked_shift",
        metadata={
            "help": "Where student and teacher are compared: 'masked_shift', 'unmasked' or 'all'.",
            "choices": ["masked_shift", "unmasked", "all"],
        },
    )
    align_layers: list[int] | None = field(
        default=None, metadata={"help": "Which hidden states to compare; 0 is the embedding's output. None: all."}
    )
    align_sample_layers: int | None = field(
        default=None, metadata={"help": "How many of those to draw anew at every step. None: all of them."}
    )
    align_token_share: float = field(
        default=1.0, metadata={"help": "Share of the positions to draw anew at every step."}
    )
    anchor_cache: str | None = field(
        default=None, metadata={"help": "Folder of precomputed hidden states; takes the place of the teacher."}
    )
    anchor_strict: bool = field(default=True, metadata={"help": "Whether a row without anchors is an error."})
    frozen_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Parameters that stay as they are: 'embeddings', 'head', or any part of their names."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.align_weight < 0:
            raise ValueError(f"`align_weight` must be 0 or more, not {self.align_weight}.")
        if self.align_weight_schedule not in ("constant", "linear", "cosine"):
            raise ValueError(
                "`align_weight_schedule` must be 'constant', 'linear' or 'cosine', not "
                f"{self.align_weight_schedule!r}."
            )
        if self.align_positions not in ("masked_shift", "unmasked", "all"):
            raise ValueError(
                f"`align_positions` must be 'masked_shift', 'unmasked' or 'all', not {self.align_positions!r}."
            )
        if not 0.0 < self.align_token_share <= 1.0:
            raise ValueError(f"`align_token_share` must lie in (0, 1], not {self.align_token_share}.")
        if self.align_sample_layers is not None and self.align_sample_layers < 1:
            raise ValueError(f"`align_sample_layers` must be positive, not {self.align_sample_layers}.")
