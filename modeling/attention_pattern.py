"""Which positions see which: the one concept of attention in this project.

Owns the edge rules, as pure functions of the logical places of query and key. Knows nothing of masks, tensors of a
model, windows or padding: attention_interface.py composes those.

Shapes: an edge rule broadcasts; `q` and `k` are [.., Q, 1] and [.., 1, K] in a dense mask, scalars in a flex mask.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Place(NamedTuple):
    """Where a token stands: its logical position (0 at the start of its row or document) and which copy it is in."""

    position: torch.Tensor
    copy: torch.Tensor | None = None


KINDS = ("causal", "bidirectional", "annealed", "block_causal", "bd3lm", "open_tail")


@dataclass(frozen=True)
class AttentionPattern:
    """
    A rule that says which positions see which. Build one with the class methods below.

    Padding, document boundaries and the model's own sliding or chunked windows are composed with it when it is put in
    force, so a pattern never mentions them.

    Attributes:
        kind (`str`): one of `causal`, `bidirectional`, `annealed`, `block_causal`, `bd3lm`, `open_tail`.
        block_size (`int`, *optional*): tokens per block, for `block_causal` and `bd3lm`.
        alpha (`float`): opened share of future edges in [0, 1], for `annealed`.
        form (`str`): `stochastic` or `log_bias`, for `annealed`.
        seed (`int`): keys the open edges of a stochastic annealing; pass the optimizer step.
        clean_context (`str`): `block` or `causal`, for `bd3lm`: how the clean half attends to itself.
        views (`int`): noisy copies before the clean one, for `bd3lm`.
        noisy_length (`int`, *optional*): tokens of each noisy copy where it leaves out blocks, for `bd3lm`.
        tail (`int`): tokens at the end of a pass that see everything, for `open_tail`.
    """

    kind: str
    block_size: int | None = None
    alpha: float = 1.0
    form: str = "stochastic"
    seed: int = 0
    clean_context: str = "block"
    views: int = 1
    noisy_length: int | None = None
    tail: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"`attention_pattern` must be one of {', '.join(KINDS)}, not {self.kind!r}.")
        if self.kind in ("block_causal", "bd3lm") and (self.block_size is None or self.block_size < 1):
            raise ValueError(f"The {self.kind} pattern needs a positive `block_size`, not {self.block_size!r}.")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"`alpha` must lie in [0, 1], not {self.alpha!r}.")
        if self.form not in ("stochastic", "log_bias"):
            raise ValueError(f"`form` must be stochastic or log_bias, not {self.form!r}.")
        if self.clean_context not in ("block", "causal"):
            raise ValueError(f"`clean_context` must be block or causal, not {self.clean_context!r}.")
        if self.views < 1:
            raise ValueError(f"`views` must be at least 1, not {self.views!r}.")
        if self.noisy_length is not None and self.noisy_length < 1:
            raise ValueError(f"`noisy_length` must be at least 1, not {self.noisy_length!r}.")
        if self.tail < 0:
            raise ValueError(f"`tail` must be at least 0, not {self.tail!r}.")

    @classmethod
    def causal(cls) -> "AttentionPattern":
        """Every position sees itself and what stands before it: the parent's own pattern."""
        return cls("causal")

    @classmethod
    def bidirectional(cls) -> "AttentionPattern":
        """Every position sees every position."""
        return cls("bidirectional")

    @classmethod
    def annealed(cls, alpha: float, seed: int = 0, form: str = "stochastic") -> "AttentionPattern":
        """
        Causal at `alpha = 0`, bidirectional at `alpha = 1`.

        Args:
            alpha (`float`): how far attention has opened, in [0, 1].
            seed (`int`, *optional*, defaults to `0`): keys the open edges; one mask per optimizer step.
            form (`str`, *optional*, defaults to `"stochastic"`):
                `"stochastic"` opens each future edge with probability `alpha`, one mask for all rows, heads and
                layers (DiffuLLaMA, https://huggingface.co/papers/2410.17891, section 3.2); `"log_bias"` adds
                log(`alpha`) to the score of every future edge, so that its weight scales by exactly `alpha`.
        """
        return cls("annealed", alpha=alpha, seed=seed, form=form)

    @classmethod
    def block_causal(cls, block_size: int) -> "AttentionPattern":
        """Open inside a block of `block_size` tokens, causal from block to block, blocks counted from position 0."""
        return cls("block_causal", block_size=block_size)

    @classmethod
    def bd3lm(
        cls, block_size: int, clean_context: str = "block", views: int = 1, noisy_length: int | None = None
    ) -> "AttentionPattern":
        """
        The training pattern of block diffusion over `[x_t ; ... ; x_0]` (https://huggingface.co/papers/2503.09573,
        section 3.1): a noisy block sees itself and the clean blocks before it, the clean copy sees only itself.

        Args:
            block_size (`int`): tokens per block.
            clean_context (`str`, *optional*, defaults to `"block"`): `"block"` or `"causal"` inside the clean copy.
            views (`int`, *optional*, defaults to `1`): noisy copies that share the clean one; they never see each
                other.
            noisy_length (`int`, *optional*): tokens of each noisy copy, where they leave out blocks of the clean one
                in which nothing is hidden. The pass then needs `position_ids`, which say where each stands.
        """
        return cls("bd3lm", block_size=block_size, clean_context=clean_context, views=views, noisy_length=noisy_length)

    @classmethod
    def open_tail(cls, tail: int) -> "AttentionPattern":
        """
        Causal, but for the last `tail` tokens of the pass, which see each other and all before them: how a BD3LM model
        with a causal clean context reads finished text and denoises the block behind it in one pass.
        """
        return cls("open_tail", tail=tail)

    @classmethod
    def named(cls, name: str, block_size: int | None = None) -> "AttentionPattern":
        """`"causal"`, `"bidirectional"` or `"block_causal"`, the last with the block size of a model's config."""
        if name in ("causal", "bidirectional"):
            return cls(name)
        if name != "block_causal":
            raise ValueError(
                "`attention_pattern` must be bidirectional, causal, block_causal or an AttentionPattern, not "
                f"{name!r}."
            )
        if block_size is None:
            raise ValueError(
                '`attention_pattern="block_causal"` needs `config.block_size`; set it, or pass '
                "`AttentionPattern.block_causal(block_size)`."
            )
        return cls.block_causal(block_size)

    @property
    def copies(self) -> int:
        """How many copies of the sequence stand side by side in the input: 1, or `views + 1` for `bd3lm`."""
        return self.views + 1 if self.kind == "bd3lm" else 1

    @property
    def is_causal(self) -> bool:
        """Whether the pattern is the parent's own, so that the library's causal path serves it."""
        return self.kind == "causal" or (self.kind == "annealed" and self.alpha == 0.0)

    @property
    def is_open(self) -> bool:
        """Whether nothing is hidden, so that no mask is needed for it."""
        return self.kind == "bidirectional" or (self.kind == "annealed" and self.alpha == 1.0)

    @property
    def future_log_weight(self) -> float | None:
        """What is added to the scores of future edges, or `None` where the pattern is all yes or no."""
        if self.kind == "annealed" and self.form == "log_bias" and 0.0 < self.alpha < 1.0:
            return math.log(self.alpha)
        return None

    def edge(self, q: Place, k: Place) -> torch.Tensor:
        """
        Whether query `q` sees key `k`.

        Args:
            q (`Place`): places of the queries; integer tensors that broadcast against those of `k`.
            k (`Place`): places of the keys.

        Returns:
            `torch.Tensor`: booleans of the broadcast shape.
        """
        if self.kind == "bd3lm":
            return self._bd3lm_edge(q, k)
        past = k.position <= q.position
        if self.is_causal:
            return past
        if self.kind == "open_tail":
            return past | (q.copy == 1)  # nothing stands behind the tail, so that it is hidden from the rest
        if self.is_open or self.future_log_weight is not None:
            return past | True
        if self.kind == "block_causal":
            return k.position // self.block_size <= q.position // self.block_size
        return past | (_edge_hash(q.position, k.position, self.seed) < round(self.alpha * 2**32))

    def _bd3lm_edge(self, q: Place, k: Place) -> torch.Tensor:
        q_block, k_block = q.position // self.block_size, k.position // self.block_size
        clean = self.views
        noisy_self = (q.copy == k.copy) & (q.copy < clean) & (q_block == k_block)
        noisy_to_clean = (q.copy < clean) & (k.copy == clean) & (k_block < q_block)
        within = k.position <= q.position if self.clean_context == "causal" else k_block <= q_block
        clean_self = (q.copy == clean) & (k.copy == clean) & within
        return noisy_self | noisy_to_clean | clean_self


def _edge_hash(q: torch.Tensor, k: torch.Tensor, seed: int) -> torch.Tensor:
    """
    A uniform integer in [0, 2^32) for each edge, a function of (seed, q, k) alone.

    A counter hash instead of a generator: any device, any sequence length and any slice of the mask draw the same
    edges, so a resumed or differently batched run anneals along the same path.
    """
    # Two rounds of xor-shift-multiply mixing on 32-bit lanes kept in int64, where the products do not overflow.
    x = (q.long() * 0x9E3779B1 + k.long() * 0x85EBCA6B + ((seed * 0xC2B2AE35) & 0xFFFFFFFF)) & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x46685257):
        x = x ^ (x >> 16)
        x = (x * multiplier) & 0xFFFFFFFF
    return x ^ (x >> 15)
