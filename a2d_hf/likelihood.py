"""How likely a text is under a masked diffusion model: what multiple-choice and perplexity tasks ask for.

Owns three answers to that question: the Monte-Carlo NELBO, the exact likelihood token by token, and that of the causal
mode; and how a long text is cut into windows. Reads a model, trains nothing. A result is a pure function of (model,
request, seed): masks are keyed by the text of the request, so neither its neighbours nor the batch size matter.

The decoder never writes the mask token, so its share of the probability is taken out here too.

Shapes: J passes run together, L tokens, N positions that are scored, V vocabulary rows.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .errors import BadInput
from .evaluate import LOGITS_AT_ONCE, every_set_of_masks
from .modeling.attention_pattern import AttentionPattern
from .modeling.modeling_a2d import A2DForMaskedDiffusion
from .trainers.diffusion_noise import random_bits


MASK_COUNT, MASK_PLACES = 111, 112  # what a draw is for; no draw of a trainer or of evaluate.py is repeated here
BITS = 53
MC_NUM = 128  # masks per request unless told otherwise: LLaDA's number
SCORED = "Nothing is scored: give at least one token whose likelihood is wanted."


@dataclass(frozen=True)
class Request:
    """
    A text and the positions in it whose likelihood given all the others is wanted.

    Attributes:
        input_ids (`tuple[int, ...]`): the text.
        scored (`tuple[int, ...]`): positions, rising.
    """

    input_ids: tuple[int, ...]
    scored: tuple[int, ...]

    def __post_init__(self):
        if not self.scored:
            raise BadInput(SCORED)

    @classmethod
    def continuation(cls, prompt: Sequence[int], target: Sequence[int]) -> "Request":
        """`target` given `prompt` before it."""
        return cls((*prompt, *target), tuple(range(len(prompt), len(prompt) + len(target))))

    @classmethod
    def infill(cls, prefix: Sequence[int], span: Sequence[int], suffix: Sequence[int]) -> "Request":
        """`span` given both sides of it."""
        return cls((*prefix, *span, *suffix), tuple(range(len(prefix), len(prefix) + len(span))))

    @property
    def key(self) -> int:
        """A 62-bit number made of the whole request."""
        text = repr((self.input_ids, self.scored)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 2


@dataclass(frozen=True)
class Likelihood:
    """
    Attributes:
        log_likelihood (`float`): nats, all scored tokens together. From [`nelbo`] a lower bound, or an estimate of it.
        num_tokens (`int`): scored tokens.
        is_greedy (`bool`, *optional*): whether each token is the likeliest where it is scored; `None` for a bound.
    """

    log_likelihood: float
    num_tokens: int
    is_greedy: bool | None = None


@dataclass(frozen=True)
class _Pass:
    """One row of a forward pass: what is masked, and what each scored position counts in the sum of its request."""

    request: int
    masked: tuple[int, ...]
    weights: dict[int, float]


# ------------------------------------------------------------------------------------------------------- what is asked


def nelbo(
    model: A2DForMaskedDiffusion,
    requests: Sequence[Request],
    *,
    mc_num: int = MC_NUM,
    seed: int = 0,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """
    Lower bounds on the log-likelihood: minus the negative evidence lower bound, estimated without bias.

    MDLM: with N scored tokens the bound is E[N/l sum of log p over l masked ones], l uniform on {1, ..., N} and every
    subset of that size equally likely (LLaDA, https://huggingface.co/papers/2502.09992, equation 6); l is stratified
    over the draws. BD3LM: the same within each block, given the clean blocks before it, summed over the blocks
    (https://huggingface.co/papers/2503.09573, equation 8); one pass scores all blocks at once. Where going through
    every subset takes no more than `mc_num` passes, that is done instead, and the bound is exact.

    Args:
        model ([`A2DForMaskedDiffusion`]): the model.
        requests (`Sequence[Request]`): what to score.
        mc_num (`int`, *optional*, defaults to 128): passes per request, at most.
        seed (`int`, *optional*, defaults to 0): key of the masks.
        batch_size (`int`, *optional*, defaults to 8): most rows per forward pass; does not change the result.
        advance (`Callable[[int], None]`, *optional*): told how many passes have just been made.

    Returns:
        `list[Likelihood]`: one for each request.
    """
    if mc_num < 1:
        raise BadInput(f"`mc_num` must be a positive integer, not {mc_num!r}.")
    passes = []
    for index, request in enumerate(requests):
        draws = [
            _subsets(group) if 2 ** len(group) - 1 <= mc_num else _draws(request.key, seed, mc_num, number, group)
            for number, group in _groups(model, request)
        ]
        passes += _together(index, draws)
    totals, _ = _score(model, requests, passes, batch_size, advance)
    return [
        Likelihood(math.fsum(values), len(request.scored)) for values, request in zip(totals, requests, strict=True)
    ]


def token_by_token(
    model: A2DForMaskedDiffusion,
    requests: Sequence[Request],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """
    Exact log-likelihoods of writing the scored tokens from left to right, one per forward pass: each given what stands
    before it, those still to come masked. That is the distribution that `diffusion_generate` samples from with
    `block_size=1` and `temperature=1`; for a BD3LM model with blocks of one token it is the only one, and one pass
    scores a whole text. N passes for MDLM, as many as a block is long for BD3LM.

    Args:
        model ([`A2DForMaskedDiffusion`]): the model.
        requests (`Sequence[Request]`): what to score.
        batch_size (`int`, *optional*, defaults to 8): most rows per forward pass; does not change the result.
        advance (`Callable[[int], None]`, *optional*): told how many passes have just been made.

    Returns:
        `list[Likelihood]`: with `is_greedy`.
    """
    passes = []
    for index, request in enumerate(requests):
        passes += _together(
            index,
            [[(group[at:], {group[at]: 1.0}) for at in range(len(group))] for _, group in _groups(model, request)],
        )
    totals, hits = _score(model, requests, passes, batch_size, advance)
    return [
        Likelihood(math.fsum(values), len(request.scored), all(found))
        for values, found, request in zip(totals, hits, requests, strict=True)
    ]


def causal(
    model: A2DForMaskedDiffusion,
    requests: Sequence[Request],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """
    Exact log-likelihoods under the causal mode: the parent's own next-token predictions, `attention_pattern="causal"`.

    Meaningful where the checkpoint keeps one: right after conversion, with adapters disabled, or trained with the
    autoregressive loss. One pass per request; nothing is masked.

    Args and returns: as [`token_by_token`].
    """
    for request in requests:
        _check_first(request, "The causal mode reads each token from the one before it")
    passes = [_Pass(index, (), dict.fromkeys(request.scored, 1.0)) for index, request in enumerate(requests)]
    totals, hits = _score(model, requests, passes, batch_size, advance, causally=True)
    return [
        Likelihood(math.fsum(values), len(request.scored), all(found))
        for values, found, request in zip(totals, hits, requests, strict=True)
    ]


def rolling_requests(
    input_ids: Sequence[int], max_length: int, *, context: int = 1, prefix_id: int | None = None
) -> list[Request]:
    """
    Cuts a long text into windows that score every token once; the sum over them is the text's log-likelihood, each
    token seeing at least `context` tokens before it where there are as many.

    Args:
        input_ids (`Sequence[int]`): the text.
        max_length (`int`): longest window in tokens, what is only read included.
        context (`int`, *optional*, defaults to 1): tokens of each further window that are read only.
        prefix_id (`int`, *optional*): stands before the text, for example BOS; never scored.

    Returns:
        `list[Request]`
    """
    if not 0 <= context < max_length:
        raise BadInput(f"`context` must lie in [0, max_length={max_length}), not {context}.")
    ids = list(input_ids) if prefix_id is None else [prefix_id, *input_ids]
    done = 0 if prefix_id is None else 1
    if len(ids) == done:
        raise BadInput(SCORED)
    if max_length <= done:
        raise BadInput(f"`max_length` {max_length} leaves no room behind the prefix: raise it.")
    requests = []
    while done < len(ids):
        read = min(done, context) if requests else done
        end = min(done - read + max_length, len(ids))
        requests.append(Request.continuation(ids[done - read : done], ids[done:end]))
        done = end
    return requests


# ---------------------------------------------------------------------------------------------------- what is computed


def _groups(model: A2DForMaskedDiffusion, request: Request) -> list[tuple[int, tuple[int, ...]]]:
    """Scored positions that are masked together, numbered: all of them, or those of each block."""
    if model.config.token_shift:
        _check_first(request, "This model reads each token from the one before it (`token_shift`)")
    if model.config.objective != "bd3lm":
        return [(0, request.scored)]
    size = model.config.block_size
    blind = unseen_behind(request.scored, len(request.input_ids), size)
    if blind is not None:
        raise BadInput(
            f"Token {blind[0]} is scored, but this block-diffusion model (blocks of {size}) does not see the text "
            f"behind it, which starts at token {blind[1]}, in another block: score both of them as a continuation, or "
            "use an MDLM model."
        )
    return [(number, tuple(group)) for number, group in itertools.groupby(request.scored, lambda place: place // size)]


def unseen_behind(open_places: Sequence[int], length: int, block_size: int) -> tuple[int, int] | None:
    """
    The first open position of a text whose next given token is in another block, and that token; `None` if there is
    none. A block-diffusion model would fill it as if nothing stood behind.

    Args:
        open_places (`Sequence[int]`): positions that are masked or scored.
        length (`int`): tokens of the text.
        block_size (`int`): of the model.
    """
    is_open, given, found = set(open_places), None, None
    for place in range(length - 1, -1, -1):
        if place not in is_open:
            given = place
        elif given is not None and given // block_size != place // block_size:
            found = (place, given)
    return found


def _check_first(request: Request, why: str) -> None:
    if request.scored[0] == 0:
        raise BadInput(f"{why}, so the first token of a text cannot be scored: put a BOS token before it.")


def _subsets(group: tuple[int, ...]) -> list[tuple[tuple[int, ...], dict[int, float]]]:
    """Every subset with its weights."""
    return [(places, dict.fromkeys(places, weight)) for places, weight in every_set_of_masks(group)]


def _draws(
    key: int, seed: int, draws: int, number: int, group: tuple[int, ...]
) -> list[tuple[tuple[int, ...], dict[int, float]]]:
    """Random subsets with their weights, sizes stratified: a pure function of the keys."""
    total = len(group)
    found = []
    for draw in range(draws):
        fraction = int(random_bits(MASK_COUNT, seed, key, number, draw)) / 2.0**BITS
        count = min(int((draw + fraction) / draws * total), total - 1) + 1
        order = torch.argsort(random_bits(MASK_PLACES, seed, key, draw, torch.tensor(group)), stable=True)
        places = tuple(sorted(group[i] for i in order[:count].tolist()))
        found.append((places, dict.fromkeys(places, total / count / draws)))
    return found


def _together(index: int, draws: list[list[tuple[tuple[int, ...], dict[int, float]]]]) -> list[_Pass]:
    """The draws of all groups of a request, the first of each in one pass, and so on: blocks never see each other."""
    passes = []
    for number in range(max(map(len, draws))):
        here = [group[number] for group in draws if number < len(group)]
        masked = tuple(place for places, _ in here for place in places)
        passes.append(_Pass(index, masked, {place: w for _, weights in here for place, w in weights.items()}))
    return passes


def _score(
    model: A2DForMaskedDiffusion,
    requests: Sequence[Request],
    passes: Sequence[_Pass],
    batch_size: int,
    advance: Callable[[int], None] | None,
    causally: bool = False,
) -> tuple[list[list[float]], list[list[bool]]]:
    """For each request: weight times log-probability, and whether it is the likeliest, of all that was scored."""
    totals: list[list[float]] = [[] for _ in requests]
    hits: list[list[bool]] = [[] for _ in requests]
    mode = model.training
    model.eval()
    try:
        for batch in _batches(requests, passes, batch_size, model.config.vocab_size):
            log_probs, found = _forward(model, requests, batch, causally)
            at = 0
            for each in batch:
                weights = list(each.weights.values())
                part = slice(at, at + len(weights))
                totals[each.request] += [w * value for w, value in zip(weights, log_probs[part], strict=True)]
                hits[each.request] += found[part]
                at = part.stop
            if advance is not None:
                advance(len(batch))
    finally:
        model.train(mode)
    return totals, hits


def _batches(
    requests: Sequence[Request], passes: Sequence[_Pass], batch_size: int, vocabulary: int
) -> Iterator[list[_Pass]]:
    """Passes of like length `batch_size` at a time, or fewer where their scores would not fit."""
    batch: list[_Pass] = []
    scored = 0
    for each in sorted(passes, key=lambda one: len(requests[one.request].input_ids)):
        full = len(batch) == batch_size or (scored + len(each.weights)) * vocabulary > LOGITS_AT_ONCE
        if batch and full:
            yield batch
            batch, scored = [], 0
        batch.append(each)
        scored += len(each.weights)
    if batch:
        yield batch


@torch.no_grad()
def _forward(
    model: A2DForMaskedDiffusion, requests: Sequence[Request], batch: Sequence[_Pass], causally: bool
) -> tuple[list[float], list[bool]]:
    """Log-probability, and whether it is the likeliest, of each scored token, in the order of the passes' weights."""
    length = max(len(requests[each.request].input_ids) for each in batch)
    clean_JL = torch.zeros((len(batch), length), dtype=torch.long)
    valid_JL = torch.zeros((len(batch), length), dtype=torch.bool)
    masked_JL, wanted_JL = valid_JL.clone(), valid_JL.clone()
    for row, each in enumerate(batch):
        ids = torch.tensor(requests[each.request].input_ids)
        clean_JL[row, : len(ids)], valid_JL[row, : len(ids)] = ids, True
        masked_JL[row, list(each.masked)], wanted_JL[row, list(each.weights)] = True, True
    targets_N = clean_JL[wanted_JL]
    ids_JL, pattern = clean_JL.masked_fill(masked_JL, model.config.mask_token_id), None
    if causally:
        pattern, wanted_JL = "causal", wanted_JL.roll(-1, dims=-1)
    elif model.config.objective == "bd3lm":
        # As in training: every noisy block beside the clean text that it follows on.
        pattern = AttentionPattern.bd3lm(model.config.block_size, clean_context=model.config.clean_context)
        ids_JL, valid_JL = torch.cat([ids_JL, clean_JL], dim=-1), valid_JL.repeat(1, 2)
        wanted_JL = torch.cat([wanted_JL, torch.zeros_like(wanted_JL)], dim=-1)
    logits_NV = model(
        input_ids=ids_JL.to(model.device),
        attention_mask=valid_JL.long().to(model.device),
        attention_pattern=pattern,
        logits_mask=wanted_JL.to(model.device),
    ).logits
    targets_N = targets_N.to(logits_NV.device)
    log_probs, hits = [], []
    for logits, targets in zip(logits_NV.split(256), targets_N.split(256), strict=True):
        logits = logits.float()
        if not causally:  # the parent knows no mask token: its numbers stay its own
            logits[:, model.config.mask_token_id] = float("-inf")
        log_probs += logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].double().tolist()
        hits += (logits.argmax(-1) == targets).tolist()
    return log_probs, hits
