"""How much of a gap a model fills exactly as the text had it, and how that falls with fewer forwards.

Owns which gaps are cut and what counts as right. Decoding is the models' own. A pure function of (model, rows, seed):
where a gap lies is keyed by (seed, row, length), so neither the batch size nor the other gaps matter.

The gap is told its length, and everything on both sides of it is given; an autoregressive parent is given the left
side only, which is all it can read.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .evaluate import Row, scored_positions
from .likelihood import unseen_behind
from .modeling.modeling_a2d import A2DForMaskedDiffusion
from .trainers.diffusion_noise import random_bits


GAP_PLACE = 105  # what a draw is for; see evaluate.py
LENGTHS = (1, 4, 8)
SPANS = 64  # gaps of each length unless told otherwise


@dataclass(frozen=True)
class Gap:
    """Positions `start` .. `start + length` of a row."""

    row: int
    start: int
    length: int

    @property
    def places(self) -> list[int]:
        return list(range(self.start, self.start + self.length))


def cut_gaps(
    rows: Sequence[Row],
    length: int,
    count: int,
    seed: int,
    *,
    never: Sequence[int] = (),
    block_size: int | None = None,
) -> list[Gap]:
    """
    One gap in each of the first rows that have room for it, every place equally likely.

    A gap holds scored tokens only, none of `never`, has at least one token on each side, and where `block_size` is
    given it does not end before its block does unless the text behind it is seen.

    Args:
        rows (`Sequence[Row]`): from [`usable_rows`].
        length (`int`): tokens of each gap.
        count (`int`): most gaps.
        seed (`int`): decides the places.
        never (`Sequence[int]`, *optional*): tokens that the decoder may not write: ends of text.
        block_size (`int`, *optional*): of a block-diffusion model.
    """
    gaps, forbidden = [], set(never)
    for index, row in enumerate(rows):
        if len(gaps) == count:
            break
        ids, scored = row["input_ids"], set(scored_positions(row))
        starts = [
            start
            for start in range(1, len(ids) - length)
            if all(place in scored and ids[place] not in forbidden for place in range(start, start + length))
            and (block_size is None or unseen_behind(range(start, start + length), len(ids), block_size) is None)
        ]
        if starts:
            draw = int(random_bits(GAP_PLACE, seed, index, length)) % len(starts)
            gaps.append(Gap(index, starts[draw], length))
    return gaps


def score_fills(gaps: Sequence[Gap], rows: Sequence[Row], fills: Sequence[Sequence[int]]) -> dict[str, Any]:
    """
    Shares of tokens and of whole gaps that are exactly the text's own, each with its standard error over gaps.

    Args:
        gaps (`Sequence[Gap]`): all of one length.
        rows (`Sequence[Row]`): the texts.
        fills (`Sequence[Sequence[int]]`): what was written into each gap.
    """
    shares = [
        sum(rows[gap.row]["input_ids"][place] == token for place, token in zip(gap.places, fill, strict=True))
        / gap.length
        for gap, fill in zip(gaps, fills, strict=True)
    ]
    exact = [float(share == 1.0) for share in shares]
    return {
        "token_accuracy": sum(shares) / len(shares),
        "token_accuracy_stderr": _standard_error(shares),
        "span_accuracy": sum(exact) / len(exact),
        "span_accuracy_stderr": _standard_error(exact),
        "spans": len(gaps),
    }


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def fill_gaps(
    model: A2DForMaskedDiffusion,
    rows: Sequence[Row],
    gaps: Sequence[Gap],
    *,
    steps: int | None = None,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> tuple[list[list[int]], float]:
    """
    What the model writes into the gaps, the likeliest token each time and never an end of text.

    Args:
        model ([`A2DForMaskedDiffusion`]): what fills them.
        rows (`Sequence[Row]`), gaps (`Sequence[Gap]`): texts and where they are cut.
        steps (`int`, *optional*): forward passes per gap; one per token by default.
        batch_size (`int`, *optional*, defaults to 8): gaps per call; does not change what is written.
        advance (`Callable[[int], None]`, *optional*): told how many gaps have just been filled.

    Returns:
        `tuple`: the tokens of each gap, and the mean number of tokens per forward.
    """
    fills: list[list[int]] = []
    parallel = 0.0
    for start in range(0, len(gaps), batch_size):
        batch = gaps[start : start + batch_size]
        ids_BL, mask_BL = _canvas([rows[gap.row]["input_ids"] for gap in batch])
        for b, gap in enumerate(batch):
            ids_BL[b, gap.places] = model.config.mask_token_id
        output = model.diffusion_generate(
            ids_BL.to(model.device),
            attention_mask=mask_BL.to(model.device),
            max_new_tokens=0,
            steps=steps,
            temperature=0.0,
            suppress_tokens=model.generation_config.eos_token_ids or None,
            return_dict_in_generate=True,
        )
        fills += [output.sequences[b, gap.places].tolist() for b, gap in enumerate(batch)]
        parallel += float(output.tokens_per_forward.double().sum())
        if advance is not None:
            advance(len(batch))
    return fills, parallel / len(gaps)


@torch.no_grad()
def continue_before_gaps(
    parent: PreTrainedModel,
    rows: Sequence[Row],
    gaps: Sequence[Gap],
    *,
    never: Sequence[int] = (),
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """
    What an autoregressive model writes in the place of each gap, given the text before it: its greedy continuation.

    Returns:
        `list[list[int]]`: as many tokens for each gap as it is long.
    """
    fills: list[list[int]] = []
    for start in range(0, len(gaps), batch_size):
        batch = gaps[start : start + batch_size]
        ids_BL, mask_BL = _canvas([rows[gap.row]["input_ids"][: gap.start] for gap in batch], left=True)
        written = parent.generate(
            ids_BL.to(parent.device),
            attention_mask=mask_BL.to(parent.device),
            max_new_tokens=batch[0].length,
            do_sample=False,
            repetition_penalty=1.0,
            suppress_tokens=list(never) or None,
            eos_token_id=None,
            pad_token_id=0,
        )
        fills += written[:, ids_BL.shape[1] :].tolist()
        if advance is not None:
            advance(len(batch))
    return fills


def _canvas(texts: Sequence[Sequence[int]], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of several lengths as one batch, padded behind, or before with `left`; and its attention mask."""
    length = max(map(len, texts))
    ids_BL = torch.zeros((len(texts), length), dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for b, text in enumerate(texts):
        place = slice(length - len(text), None) if left else slice(len(text))
        ids_BL[b, place], mask_BL[b, place] = torch.tensor(text), 1
    return ids_BL, mask_BL
