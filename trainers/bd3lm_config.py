"""What block diffusion training can be told. Owns the fields of the BD3LM objective."""

from dataclasses import dataclass, field

from .a2d_config import A2DTrainingConfig
from .diffusion_noise import NOISE_SCHEDULES


@dataclass
class BD3LMConfig(A2DTrainingConfig):
    r"""
    Configuration of [`BD3LMTrainer`].

    Only the parameters of the objective are listed here; see [`A2DTrainingConfig`] for those of the model and the data
    and [`~transformers.TrainingArguments`] for the rest. `token_shift` is the model's: set it when converting, or in
    `model_init_kwargs`.

    Parameters:
        block_size (`int`, *optional*):
            Tokens per block. By default the model's own, or 32 where it has none. Must divide `max_length`.
        block_size_curriculum (`list[int]`, *optional*):
            Block sizes to walk through, for example `[1, 4, 32]`. Each must divide the next, and the last must be the
            block size. With `token_shift`, block size 1 is the autoregressive parent's own objective, so that training
            starts exactly at its likelihood. Evaluation always uses the last.
        block_size_curriculum_steps (`int`, *optional*):
            Optimizer steps until the last size is reached; the others share them equally. By default half of all.
        clean_context (`str`, *optional*):
            How clean text attends to itself: `"block"` (open inside a block) or `"causal"` (as the parent does). By
            default the model's own, or `"block"`.
        mask_sampling (`str`, *optional*, defaults to `"count"`):
            How the masked tokens of a block are drawn in training: `"count"` (of n tokens k at random, k uniform on 1
            to n, each counting n / k: the NELBO with the time integrated out, at a lower variance) or `"bernoulli"`
            (a coin per token at the block's time, as published). Evaluation always tosses coins.
        noise_schedule (`str`, *optional*, defaults to `"linear"`):
            How the masked share grows with time t: `"linear"` (t) or `"cosine"` (sin(π/2 t)). Of coins only, as are
            the next two.
        time_epsilon (`float`, *optional*, defaults to `1e-3`):
            Smallest time of a block in training. Bounds the weight of a masked token, which is 1/t for the linear
            schedule.
        time_maximum (`float`, *optional*):
            Largest time of a block in training. By default 1, or 1 - `time_epsilon` with `complementary_views`. A
            clipped range lowers the variance of the loss (section 5.3 of the paper), which is then no longer the
            NELBO; evaluation always covers the full range.
        complementary_views (`bool`, *optional*, defaults to `False`):
            Whether every row is noised twice, the second time with exactly the tokens masked that the first one left,
            so that every token is trained at every step. Both share one clean copy. Coins: linear schedule only.
        nested_views (`int`, *optional*, defaults to 1):
            How many times every row is noised, all sharing one clean copy: the first view hides the fewest tokens of
            each block, every further one more of the same random order. At most the block size. A step reads
            `nested_views` + 1 copies and learns that much more from its tokens. Needs `mask_sampling="count"`.
        nested_orders (`int`, *optional*, defaults to 1):
            How many orders the nested views follow, each the one before moved on by a token, with views of its own:
            with as many orders and views as a block has tokens, every token of it is hidden alone once. At most the
            block size. A step reads that many times the views, but a view that hides whole blocks once for all orders.
        steps_per_row (`int`, *optional*, defaults to 1):
            In how many steps a row is trained: it becomes as many rows, each with the targets of a stretch of its
            blocks and the text before as clean context. Every token is trained as often as before, in more and smaller
            steps, and the context is read again for each.
        teacher_targets (`bool`, *optional*, defaults to `False`):
            Whether the frozen parent's distribution takes the place of the token itself as target wherever the parent,
            which reads from left to right, has read no less than the model: masked tokens behind which nothing of
            their block is visible, and the clean copy's next tokens (`ar_loss_weight`). On text that the parent wrote
            itself the expectation is the same and the variance lower. In place of `teacher_kl_weight`, not beside it.
        fill_last_block (`bool`, *optional*, defaults to `True`):
            Whether the last block of rows that end with EOS is filled up with EOS, so that the model learns what
            stands behind an end. Left out of the reported NELBO.
    """

    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per block. None: the model's own, or 32 where it has none."}
    )
    block_size_curriculum: list[int] | None = field(
        default=None,
        metadata={"help": "Block sizes to walk through, for example 1 4 32; each divides the next."},
    )
    block_size_curriculum_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps until the last size of the curriculum is reached. None: half of all."},
    )
    clean_context: str | None = field(
        default=None,
        metadata={
            "help": "How clean text attends to itself: 'block' or 'causal'. None: the model's own, or 'block'.",
            "choices": ["block", "causal"],
        },
    )
    noise_schedule: str = field(
        default="linear",
        metadata={
            "help": "How the masked share grows with time: 'linear' or 'cosine'.",
            "choices": [*NOISE_SCHEDULES],
        },
    )
    time_epsilon: float = field(
        default=1e-3, metadata={"help": "Smallest time of a block; bounds the weight of a masked token."}
    )
    time_maximum: float | None = field(
        default=None,
        metadata={"help": "Largest time of a block. None: 1, or 1 - `time_epsilon` with `complementary_views`."},
    )
    mask_sampling: str = field(
        default="count",
        metadata={
            "help": "How the masked tokens of a block are drawn: 'count' (k of n) or 'bernoulli' (coins at its time).",
            "choices": ["count", "bernoulli"],
        },
    )
    complementary_views: bool = field(
        default=False,
        metadata={"help": "Whether rows are noised twice, the second time with the other tokens masked."},
    )
    nested_views: int = field(
        default=1,
        metadata={"help": "How many times rows are noised, each time with more of the same tokens masked."},
    )
    nested_orders: int = field(
        default=1,
        metadata={"help": "How many orders the nested views follow, each the one before moved on by a token."},
    )
    steps_per_row: int = field(
        default=1,
        metadata={"help": "In how many steps a row is trained, each on a stretch of its blocks after clean context."},
    )
    teacher_targets: bool = field(
        default=False,
        metadata={"help": "Whether the parent's distribution is the target wherever it has read no less."},
    )
    fill_last_block: bool = field(
        default=True, metadata={"help": "Whether the last block of rows that end with EOS is filled up with EOS."}
    )

    @property
    def needs_teacher(self) -> bool:
        return super().needs_teacher or self.teacher_targets

    def __post_init__(self):
        super().__post_init__()
        if self.noise_schedule not in NOISE_SCHEDULES:
            raise ValueError(
                f"`noise_schedule` must be one of {', '.join(NOISE_SCHEDULES)}, not {self.noise_schedule!r}."
            )
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"`block_size` must be positive, not {self.block_size}.")
        if self.steps_per_row < 1:
            raise ValueError(f"`steps_per_row` must be at least 1, not {self.steps_per_row}.")
        if self.steps_per_row > 1 and self.teacher_logits_cache is not None:
            raise ValueError(
                "`teacher_logits_cache` knows whole rows, and `steps_per_row` cuts them: leave one of the two out."
            )
        if self.clean_context not in (None, "block", "causal"):
            raise ValueError(f"`clean_context` must be 'block' or 'causal', not {self.clean_context!r}.")
        if self.teacher_targets and self.teacher_kl_weight > 0:
            raise ValueError("`teacher_targets` puts the teacher in the tokens' place: leave `teacher_kl_weight` out.")
        self._check_times()
        self._check_curriculum()

    def _check_times(self) -> None:
        longest = 1.0 - self.time_epsilon if self.complementary_views else 1.0
        if self.mask_sampling not in ("count", "bernoulli"):
            raise ValueError(f"`mask_sampling` must be 'count' or 'bernoulli', not {self.mask_sampling!r}.")
        for name in ("nested_views", "nested_orders"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, not {value}.")
            if value > 1 and self.complementary_views:
                raise ValueError(f"`{name}` and `complementary_views` are two ways to noise a row again: choose one.")
            if value > 1 and self.mask_sampling != "count":
                raise ValueError(f"`{name}` counts the tokens that are hidden: set `mask_sampling='count'` too.")
        if self.mask_sampling == "count":
            set_elsewhere = {
                "noise_schedule": self.noise_schedule != "linear",
                "time_epsilon": self.time_epsilon != BD3LMConfig.time_epsilon,
                "time_maximum": self.time_maximum not in (None, longest),
            }
            for name in (name for name, is_set in set_elsewhere.items() if is_set):
                raise ValueError(f"`{name}` is about times, which only `mask_sampling='bernoulli'` has: set that too.")
        if self.time_maximum is None:
            self.time_maximum = longest
        if not 0.0 < self.time_epsilon < self.time_maximum <= 1.0:
            raise ValueError(
                f"`time_epsilon` {self.time_epsilon} and `time_maximum` {self.time_maximum} must satisfy "
                "0 < time_epsilon < time_maximum <= 1."
            )
        if not self.complementary_views:
            return
        if self.noise_schedule != "linear":
            raise ValueError("`complementary_views` needs `noise_schedule='linear'`: the second view has time 1 - t.")
        if abs(self.time_epsilon + self.time_maximum - 1.0) > 1e-9:
            raise ValueError(
                f"`complementary_views` needs times symmetric about 1/2: with `time_epsilon={self.time_epsilon}`, set "
                f"`time_maximum={1.0 - self.time_epsilon}` or leave it out."
            )

    def _check_curriculum(self) -> None:
        sizes = self.block_size_curriculum
        if sizes is None:
            if self.block_size_curriculum_steps is not None:
                raise ValueError(
                    "`block_size_curriculum_steps` needs a `block_size_curriculum`, for example [1, 4, 32]."
                )
            return
        if not sizes or any(size < 1 for size in sizes):
            raise ValueError(f"`block_size_curriculum` must be a list of positive sizes, not {sizes!r}.")
        for small, large in zip(sizes, sizes[1:], strict=False):
            if large <= small or large % small:
                raise ValueError(
                    f"`block_size_curriculum` must grow, each size dividing the next: {large} does not follow {small}."
                )
        if self.block_size is None:
            self.block_size = sizes[-1]
        if sizes[-1] != self.block_size:
            raise ValueError(
                f"`block_size_curriculum` ends with {sizes[-1]}, and `block_size` is {self.block_size}: make them "
                "equal."
            )
        if self.block_size_curriculum_steps is not None and self.block_size_curriculum_steps < 1:
            raise ValueError(
                f"`block_size_curriculum_steps` must be positive, not {self.block_size_curriculum_steps}."
            )
