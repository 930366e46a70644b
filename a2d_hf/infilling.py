"""Filling the gaps of a text: how gaps are written, how long they are, and which of several lengths is best.

Owns the notation `[MASK:8]` and the search for a length. Decoding is the model's own, scores are likelihood.py's.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .data import explained_tokenizing
from .denoising_picture import Denoising, token_pieces
from .errors import BadInput
from .likelihood import Request, nelbo, unseen_behind


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .modeling.canvas_a2d import A2DGenerationOutput
    from .modeling.modeling_a2d import A2DForMaskedDiffusion


RANKINGS = ("likelihood", "confidence")
CANDIDATES = 64  # most combinations of lengths that are tried
_GAP = re.compile(r"\[MASK(?::(\d+)(?:-(\d+))?)?\]")


@dataclass
class Infilling:
    """
    A text whose gaps are filled.

    Attributes:
        text (`str`): all of it.
        spans (`list[str]`): what stands in each gap.
        lengths (`tuple[int, ...]`): tokens of each gap.
        scores (`dict[tuple[int, ...], float]`): of every combination of lengths that was tried, nats per token; the
            highest was taken. Empty where there was no choice.
        unseen (`dict[tuple[int, ...], str]`): combinations left out, and why.
        num_forwards (`int`): of all decoding, without the scoring.
        output ([`A2DGenerationOutput`]): the decoder's, for the lengths taken.
    """

    text: str
    spans: list[str]
    lengths: tuple[int, ...]
    scores: dict[tuple[int, ...], float]
    unseen: dict[tuple[int, ...], str]
    num_forwards: int
    output: "A2DGenerationOutput"
    _places: list[int] = field(default_factory=list, repr=False)

    def denoising(self, tokenizer: "PreTrainedTokenizerBase", mask_token_id: int) -> Denoising:
        """What a picture needs of it; needs `output_history=True` in the decoding parameters."""
        from .quickstart_samples import denoising_of

        filled = denoising_of(self.output, tokenizer, "", mask_token_id)
        row = [int(token) for token in self.output.sequences[0]]
        pieces = token_pieces(_Visible(tokenizer), row)
        given: dict[int, str] = {}
        number = 0
        for place, piece in enumerate(pieces):
            if place in self._places:
                number += 1
            else:
                given[number] = given.get(number, "") + piece
        return Denoising(
            prompt=given.pop(0, ""),
            pieces=[pieces[place] for place in self._places],
            steps=filled.steps,
            confidence=filled.confidence,
            num_steps=filled.num_steps,
            given=given,
        )


class _Visible:
    """A tokenizer that leaves special tokens out of what it decodes."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def parse_gaps(text: str) -> tuple[list[str], list[range]]:
    """
    Reads a text with gaps: `[MASK]` is one token, `[MASK:8]` eight, `[MASK:4-12]` four to twelve.

    Returns:
        `tuple`: the pieces around the gaps, one more than there are gaps; and the lengths that each gap may have.

    Example:

    ```python
    >>> parse_gaps("The [MASK:2-3] sat.")
    (['The ', ' sat.'], [range(2, 4)])
    ```
    """
    pieces, lengths, at = [], [], 0
    for gap in _GAP.finditer(text):
        shortest = int(gap[1] or 1)
        longest = int(gap[2] or shortest)
        if shortest < 1 or longest < shortest:
            raise BadInput(f"The gap {gap[0]} has no length: write for example [MASK:8], or [MASK:4-12].")
        pieces.append(text[at : gap.start()])
        lengths.append(range(shortest, longest + 1))
        at = gap.end()
    if not lengths:
        raise BadInput(f"The text {text[:60]!r} has no gap: write for example [MASK:8] where 8 tokens are missing.")
    return [*pieces, text[at:]], lengths


def infill(
    model: "A2DForMaskedDiffusion",
    tokenizer: "PreTrainedTokenizerBase",
    pieces: Sequence[str],
    lengths: int | Sequence[int] | Sequence[Sequence[int]],
    *,
    rank_by: str = "likelihood",
    mc_num: int = 32,
    **decoding: Any,
) -> Infilling:
    """
    Fills the gaps between pieces of text. Where a gap may have several lengths, every combination is filled, and the
    best taken:

    - `"likelihood"`: the highest -NELBO of the filled tokens given all the others ([`nelbo`]), per token;
    - `"confidence"`: the highest mean of log p over the filled tokens, p the probability of each when it was
      committed: no further pass.

    Both are means per token, so that lengths can be compared; the shorter wins a tie. EOS is not generated, unless
    `suppress_tokens` says otherwise.

    Args:
        model ([`A2DForMaskedDiffusion`]), tokenizer (`PreTrainedTokenizerBase`): what fills them.
        pieces (`Sequence[str]`): what stands around the gaps: `[prefix, suffix]`, or more for more gaps.
        lengths (`int` or `Sequence`): tokens of the gap, or those it may have; a sequence for each gap where there are
            more.
        rank_by (`str`, *optional*, defaults to `"likelihood"`): `"likelihood"` or `"confidence"`.
        mc_num (`int`, *optional*, defaults to 32): masks per candidate for the likelihood.
        decoding: any field of [`A2DGenerationConfig`].

    Returns:
        [`Infilling`]

    Raises:
        [`BadInput`]: nothing to fill, too many combinations, or a gap whose other side a block-diffusion model does
        not see.

    Example:

    ```python
    >>> infill(model, tokenizer, ["def add(a, b):\\n    return ", "\\n"], range(2, 6)).text
    ```
    """
    if rank_by not in RANKINGS:
        raise BadInput(f"`rank_by` must be one of {', '.join(RANKINGS)}, not {rank_by!r}.")
    choices = _choices(lengths, len(pieces) - 1)
    combinations = list(itertools.product(*choices))
    decoding = {"suppress_tokens": _ends(model), **decoding, "max_new_tokens": 0, "return_dict_in_generate": True}
    best, scores, unseen, forwards = None, {}, {}, 0
    for combination in sorted(combinations, key=sum):
        ids, places = _canvas(model, tokenizer, pieces, combination)
        blind = _blind(model, places, len(ids))
        if blind is not None:
            unseen[combination] = blind
            continue
        output = model.diffusion_generate(torch.tensor([ids], device=model.device), **decoding)
        forwards += output.num_forwards
        score = 0.0
        if len(combinations) > 1:
            score = scores[combination] = _score(model, output, places, rank_by, mc_num)
        if best is None or score > scores[best[0]]:
            best = combination, output, places
    if best is None:
        raise BadInput(next(iter(unseen.values())))
    combination, output, places = best
    row = [int(token) for token in output.sequences[0]]
    text = token_pieces(_Visible(tokenizer), row)
    ends = list(itertools.accumulate(combination))
    spans = [
        "".join(text[place] for place in places[end - length : end])
        for end, length in zip(ends, combination, strict=True)
    ]
    return Infilling("".join(text), spans, combination, scores, unseen, forwards, output, places)


def _choices(lengths: int | Sequence[Any], gaps: int) -> list[tuple[int, ...]]:
    """The lengths that each gap may have, checked."""
    if isinstance(lengths, int):
        lengths = [lengths]
    if gaps == 1 and all(isinstance(length, int) for length in lengths):
        lengths = [lengths]
    choices = [(each,) if isinstance(each, int) else tuple(each) for each in lengths]
    if gaps < 1 or len(choices) != gaps:
        raise BadInput(f"`lengths` must say how long each of the {max(gaps, 0)} gap(s) between `pieces` is.")
    if any(not each or any(not isinstance(length, int) or length < 1 for length in each) for each in choices):
        raise BadInput(f"`lengths` must be positive numbers of tokens, not {lengths!r}.")
    count = math.prod(map(len, choices))
    if count > CANDIDATES:
        raise BadInput(f"The gaps have {count} combinations of lengths; at most {CANDIDATES} are tried: narrow them.")
    return choices


def _canvas(
    model: "A2DForMaskedDiffusion", tokenizer: "PreTrainedTokenizerBase", pieces: Sequence[str], lengths: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The tokens of the text with masks in its gaps, and where they are."""
    mask_token_id = model.config.mask_token_id
    mask = tokenizer.convert_ids_to_tokens(mask_token_id)
    if any(mask in piece for piece in pieces):
        raise BadInput(f"The text holds the mask token {mask}: write a gap as [MASK:8] instead.")
    text = pieces[0] + "".join(mask * length + piece for length, piece in zip(lengths, pieces[1:], strict=True))
    with explained_tokenizing("The text cannot be tokenized"):
        ids = tokenizer(text).input_ids
    places = [place for place, token in enumerate(ids) if token == mask_token_id]
    if len(places) != sum(lengths):
        raise BadInput(
            f"The tokenizer does not keep its mask token {mask} as one token: is it the one that was saved with the "
            "checkpoint?"
        )
    return ids, places


def _ends(model: "A2DForMaskedDiffusion") -> list[int] | None:
    return model.generation_config.eos_token_ids or None


def _blind(model: "A2DForMaskedDiffusion", places: list[int], length: int) -> str | None:
    """Why a block-diffusion model cannot fill these gaps, or `None`."""
    if model.config.objective != "bd3lm":
        return None
    size = model.config.block_size
    found = unseen_behind(places, length, size)
    if found is None:
        return None
    return (
        f"The gap at token {found[0]} lies in another block than the text behind it, which starts at token {found[1]}:"
        f" this block-diffusion model (blocks of {size}) would not see that text. Make the gap shorter or move it "
        "inside one block, or use an MDLM model."
    )


def _score(
    model: "A2DForMaskedDiffusion", output: "A2DGenerationOutput", places: list[int], rank_by: str, mc_num: int
) -> float:
    if rank_by == "confidence":
        return float(output.confidences[0, places].double().log().mean())
    request = Request(tuple(output.sequences[0].tolist()), tuple(places))
    return nelbo(model, [request], mc_num=mc_num)[0].log_likelihood / len(places)
