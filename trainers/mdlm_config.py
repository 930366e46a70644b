"""What masked diffusion training can be told. Owns the fields of the MDLM objective."""

from dataclasses import dataclass, field

from .a2d_config import A2DTrainingConfig
from .diffusion_noise import NOISE_SCHEDULES


@dataclass
class MDLMConfig(A2DTrainingConfig):
    r"""
    Configuration of [`MDLMTrainer`].

    Only the parameters of the objective are listed here; see [`A2DTrainingConfig`] for those of the model and the data
    and [`~transformers.TrainingArguments`] for the rest. `token_shift` is the model's: set it when converting, or in
    `model_init_kwargs`.

    Parameters:
        noise_schedule (`str`, *optional*, defaults to `"linear"`):
            How the masked share grows with time t: `"linear"` (t) or `"cosine"` (sin(π/2 t)).
        time_epsilon (`float`, *optional*, defaults to `1e-3`):
            Smallest time. Bounds the weight of a masked token, which is 1/t for the linear schedule.
        loss_weighting (`str`, *optional*, defaults to `"elbo"`):
            What a masked token's cross-entropy counts: `"elbo"` (-α'(t) / (1 - α(t)), which makes the loss the NELBO
            per token) or `"uniform"` (1).
        loss_normalization (`str`, *optional*, defaults to `"token"`):
            What the sum is divided by, over the global batch: `"token"` (tokens that may be masked), `"sequence"`
            (each row by its own tokens, then the mean over rows) or `"masked"` (tokens that are masked; what
            DiffuLLaMA and Repr-Align published). Only `"token"` with `"elbo"` is the NELBO.
        max_eos_tail (`int`, *optional*, defaults to `64`):
            Rows that end with EOS get a random number of further ones, at most this many, so that the model learns
            what stands behind an end. They are left out of the reported NELBO. 0 for none.
        attention_anneal_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps over which attention opens, from causal to bidirectional; exactly open from the last of
            them on. 0: open from the start. Evaluation is always open.
        attention_anneal_form (`str`, *optional*, defaults to `"stochastic"`):
            `"stochastic"` (each future edge is open with a probability that grows, one mask per step; DiffuLLaMA) or
            `"log_bias"` (each future edge has a weight that grows).
    """

    noise_schedule: str = field(
        default="linear",
        metadata={
            "help": "How the masked share grows with time: 'linear' or 'cosine'.",
            "choices": [*NOISE_SCHEDULES],
        },
    )
    time_epsilon: float = field(default=1e-3, metadata={"help": "Smallest time; bounds the weight of a masked token."})
    loss_weighting: str = field(
        default="elbo",
        metadata={
            "help": "What a masked token's cross-entropy counts: 'elbo' (the NELBO's weight) or 'uniform' (1).",
            "choices": ["elbo", "uniform"],
        },
    )
    loss_normalization: str = field(
        default="token",
        metadata={
            "help": "What the loss is divided by over the global batch: 'token', 'sequence' or 'masked'.",
            "choices": ["token", "sequence", "masked"],
        },
    )
    max_eos_tail: int = field(
        default=64, metadata={"help": "Most EOS tokens added after a row that ends with EOS; 0 for none."}
    )
    attention_anneal_steps: int = field(
        default=0, metadata={"help": "Optimizer steps over which attention opens; 0: open from the start."}
    )
    attention_anneal_form: str = field(
        default="stochastic",
        metadata={
            "help": "How attention opens: 'stochastic' (edge by edge) or 'log_bias' (all edges, weighted).",
            "choices": ["stochastic", "log_bias"],
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.noise_schedule not in NOISE_SCHEDULES:
            raise ValueError(
                f"`noise_schedule` must be one of {', '.join(NOISE_SCHEDULES)}, not {self.noise_schedule!r}."
            )
        if self.loss_weighting not in ("elbo", "uniform"):
            raise ValueError(f"`loss_weighting` must be 'elbo' or 'uniform', not {self.loss_weighting!r}.")
        if self.loss_normalization not in ("token", "sequence", "masked"):
            raise ValueError(
                f"`loss_normalization` must be 'token', 'sequence' or 'masked', not {self.loss_normalization!r}."
            )
        if not 0.0 < self.time_epsilon < 1.0:
            raise ValueError(f"`time_epsilon` must lie between 0 and 1, not {self.time_epsilon!r}.")
        if self.max_eos_tail < 0:
            raise ValueError(f"`max_eos_tail` must be 0 or more, not {self.max_eos_tail}.")
        if self.attention_anneal_steps < 0:
            raise ValueError(f"`attention_anneal_steps` must be 0 or more, not {self.attention_anneal_steps}.")
        if self.attention_anneal_form not in ("stochastic", "log_bias"):
            raise ValueError(
                f"`attention_anneal_form` must be 'stochastic' or 'log_bias', not {self.attention_anneal_form!r}."
            )
        if self.loss_normalization == "sequence":
            for name in ("ar_loss_weight", "teacher_kl_weight", "router_aux_loss_weight"):
                if getattr(self, name) > 0:
                    raise ValueError(f"`{name}` is a sum over tokens: use `loss_normalization='token'` or 'masked'.")
