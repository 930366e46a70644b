"""Every choice that a conversion takes, with its default, checked in one place.

Owns the fields that the command line, `a2d_hf.convert` and a run's manifest share; a resumed run reads them back.
Imports no torch, so that the command line can show the defaults at once.
"""

from dataclasses import asdict, dataclass
from typing import Any

from .errors import BadInput


OBJECTIVES = ("mdlm", "bd3lm", "repalign")
CLEAN_CONTEXTS = ("block", "causal")
ALIGN_POSITIONS = ("masked_shift", "unmasked", "all")
DEFAULT_BLOCK_SIZE, DEFAULT_ALIGN_WEIGHT, DEFAULT_ALIGN_POSITIONS = 32, 10.0, "masked_shift"
SLIDING_WINDOWS = ("keep", "open")
GATES = ("auto", "full", "streamed")
DEVICES = ("auto", "cpu", "cuda", "mps")
LONGEST_DEFAULT_ROW = 1024
# Adam's best learning rate falls with the width of a model (muP, https://huggingface.co/papers/2203.03466). The anchor
# is what Tiny-A2D used for Qwen3-0.6B, whose hidden size is 1024.
ANCHOR_RATE, ANCHOR_WIDTH = 1e-4, 1024
LOWEST_RATE, HIGHEST_RATE = 1e-5, 2e-3
# An adapter's best rate is about ten times that of the weights ("LoRA Without Regret", Thinking Machines Lab, 2025).
ADAPTER_RATE = 10.0


@dataclass(frozen=True)
class ConversionSettings:
    """
    Args:
        source (`str`): the parent: a folder, or a Hub id in the local cache.
        data (`str`, *optional*): what to train on, a file or a Hub data set; without it only surgery and gates run.
        objective (`str`, *optional*, defaults to `"mdlm"`): the training objective: `"mdlm"` (masked diffusion),
            `"bd3lm"` (block diffusion) or `"repalign"` (masked diffusion, hidden states held near the parent's).
        block_size (`int`, *optional*): tokens per block of block diffusion; 32 by default, or where the curriculum
            ends.
        block_size_curriculum (`list[int]`, *optional*): block sizes to walk through in the first half of the steps,
            each dividing the next.
        clean_context (`str`, *optional*): how finished text of block diffusion attends to itself: `"block"`, the
            default, or `"causal"`.
        align_weight (`float`, *optional*): weight of representation alignment; 10 by default.
        align_positions (`str`, *optional*): where it compares: `"masked_shift"`, the default, `"unmasked"`, `"all"`.
        lora_r (`int`, *optional*, defaults to 0): rank of a LoRA adapter that is trained in place of the weights and
            merged into them at the end; 0 trains the weights.
        lora_alpha (`int`, *optional*): scale of the adapter; twice its rank by default.
        lora_target_modules (`list[str]`, *optional*): names of the layers that get one; every linear layer but the
            head by default.
        token_shift (`bool`, *optional*, defaults to `False`): read the prediction for a position one to its left, as
            the parent does.
        sliding_window (`str`, *optional*, defaults to `"keep"`): keep the parent's windows, made symmetric, or
            open them.
        mask_token_id (`int`, *optional*): an id that no text uses; chosen by the mask-token policy by default.
        allow_hybrid (`bool`, *optional*, defaults to `False`): convert a parent whose recurrent layers stay causal.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run Python code found in the parent's folder.
        download (`bool`, *optional*, defaults to `False`): fetch a Hub id that is not in the local cache.
        copy (`bool`, *optional*, defaults to `False`): copy weight files that could be shared with the parent.
        gates (`str`, *optional*, defaults to `"auto"`): `full` on the real weights in memory, `streamed` for those
            that do not fit (full windows on the architecture shrunk, a short identity on the real weights layer by
            layer), or whichever the memory allows.
        held_out (`float`, *optional*, defaults to 0.05): share of the data that is kept for evaluation.
        max_length (`int`, *optional*): most tokens in a row; the parent's context, but at most 1024, by default.
        epochs (`float`, *optional*, defaults to 3): passes over the data.
        max_steps (`int`, *optional*): optimizer steps, instead of `epochs`.
        batch_size (`int`, *optional*, defaults to 8): rows per forward pass.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1): forward passes per optimizer step.
        learning_rate (`float`, *optional*): peak learning rate; by default 1e-4 at hidden size 1024, inversely
            proportional to the hidden size; ten times that for an adapter.
        seed (`int`, *optional*, defaults to 0): decides the split, the order, the noise and dropout.
        save_steps (`int`, *optional*): optimizer steps between checkpoints; by time, at least a minute, by default.
        device (`str`, *optional*, defaults to `"auto"`): where to train.
    """

    source: str
    data: str | None = None
    objective: str = "mdlm"
    token_shift: bool = False
    sliding_window: str = "keep"
    mask_token_id: int | None = None
    allow_hybrid: bool = False
    trust_remote_code: bool = False
    download: bool = False
    copy: bool = False
    gates: str = "auto"
    held_out: float = 0.05
    max_length: int | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    seed: int = 0
    save_steps: int | None = None
    device: str = "auto"
    block_size: int | None = None
    block_size_curriculum: list[int] | None = None
    clean_context: str | None = None
    align_weight: float | None = None
    align_positions: str | None = None
    lora_r: int = 0
    lora_alpha: int | None = None
    lora_target_modules: list[str] | None = None

    def __post_init__(self):
        _one_of("--objective", self.objective, OBJECTIVES)
        _one_of("--sliding-window", self.sliding_window, SLIDING_WINDOWS)
        _one_of("--gates", self.gates, GATES)
        _one_of("--device", self.device, DEVICES)
        for flag, value, least in (
            ("--mask-token-id", self.mask_token_id, 0),
            ("--max-length", self.max_length, 2),
            ("--max-steps", self.max_steps, 1),
            ("--batch-size", self.batch_size, 1),
            ("--gradient-accumulation-steps", self.gradient_accumulation_steps, 1),
            ("--seed", self.seed, 0),
            ("--save-steps", self.save_steps, 1),
            ("--block-size", self.block_size, 1),
            ("--align-weight", self.align_weight, 0),
            ("--lora-r", self.lora_r, 0),
            ("--lora-alpha", self.lora_alpha, 1),
        ):
            if value is not None and value < least:
                raise BadInput(f"{flag} must be {least} or more, not {value}.")
        if not self.epochs > 0:
            raise BadInput(f"--epochs must be above 0, not {self.epochs}.")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise BadInput(f"--learning-rate must lie between 0 and 1, not {self.learning_rate}.")
        if not 0 <= self.held_out < 1:
            raise BadInput(f"--held-out must be at least 0 and below 1, not {self.held_out}.")
        self._check_objective()
        if self.objective == "bd3lm":
            self._choose_blocks()

    def _check_objective(self) -> None:
        for name, needed in (
            ("block_size", "bd3lm"),
            ("block_size_curriculum", "bd3lm"),
            ("clean_context", "bd3lm"),
            ("align_weight", "repalign"),
            ("align_positions", "repalign"),
        ):
            if vars(self)[name] is not None and self.objective != needed:
                raise BadInput(f"{_flag(name)} belongs to --objective {needed}, not {self.objective}.")
        for name in ("lora_alpha", "lora_target_modules"):
            if vars(self)[name] is not None and self.lora_r == 0:
                raise BadInput(f"{_flag(name)} needs --lora-r, the rank of the adapter.")
        for name in ("block_size_curriculum", "lora_r", "align_weight"):
            if vars(self)[name] and self.data is None and self.source:
                raise BadInput(f"{_flag(name)} is about training: pass --data too.")
        if self.clean_context is not None:
            _one_of("--clean-context", self.clean_context, CLEAN_CONTEXTS)
        if self.align_positions is not None:
            _one_of("--align-positions", self.align_positions, ALIGN_POSITIONS)

    def _choose_blocks(self) -> None:
        """The block size that everything else reads; checks what it must divide and what must divide it."""
        sizes = self.block_size_curriculum
        if sizes is not None:
            if not sizes or min(sizes) < 1:
                raise BadInput(f"--block-size-curriculum must be sizes of 1 or more, for example 1,4,32, not {sizes}.")
            for small, large in zip(sizes, sizes[1:], strict=False):
                if large <= small or large % small:
                    raise BadInput(
                        f"--block-size-curriculum must grow, each size dividing the next: {large} does not follow "
                        f"{small}."
                    )
            if self.block_size not in (None, sizes[-1]):
                raise BadInput(
                    f"--block-size {self.block_size} must be where --block-size-curriculum ends: {sizes[-1]}."
                )
        if self.block_size is None:
            object.__setattr__(self, "block_size", sizes[-1] if sizes else DEFAULT_BLOCK_SIZE)
        if self.max_length is not None and self.max_length % self.block_size:
            raise BadInput(f"--block-size {self.block_size} must divide --max-length {self.max_length}.")

    @property
    def model_fields(self) -> dict[str, Any]:
        """What the objective asks of the model: fields of `A2DConfig`."""
        fields = {"objective": "mdlm" if self.objective == "repalign" else self.objective}
        if self.objective == "bd3lm":
            fields |= {"block_size": self.block_size, "clean_context": self.clean_context or "block"}
        return fields

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)

    def row_length(self, context: int | None) -> int:
        """
        Most tokens in a row.

        Args:
            context (`int`, *optional*): the parent's longest sequence, where it has one.
        """
        if self.max_length is None:
            longest, block = min(context or LONGEST_DEFAULT_ROW, LONGEST_DEFAULT_ROW), self.block_size or 1
            if longest < block:
                raise BadInput(f"--block-size {block} is longer than a row of at most {longest} tokens.")
            return longest // block * block
        if context is not None and self.max_length > context:
            raise BadInput(f"--max-length {self.max_length} is longer than the model's context of {context} tokens.")
        return self.max_length

    def peak_learning_rate(self, hidden_size: int) -> float:
        """The learning rate to use for a model of this width."""
        if self.learning_rate is not None:
            return self.learning_rate
        scale = ADAPTER_RATE if self.lora_r else 1.0
        return min(max(ANCHOR_RATE * ANCHOR_WIDTH / hidden_size, LOWEST_RATE) * scale, HIGHEST_RATE)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise BadInput(f"{flag} must be {' or '.join(allowed)}, not {value}.")
