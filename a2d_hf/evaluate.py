"""What a conversion cost and what it bought, measured on held-out text.

Owns the NELBO estimate of a masked diffusion model, the NLL of its autoregressive parent on the same tokens, and the
accuracy of single predictions by how much is masked. Reads models and rows, trains nothing, and is a pure function of
(model, rows, seed): masks are keyed by (seed, row, draw, position), so neither the batch size nor the order matters.
A model of block diffusion is asked as it was trained: `[x_t ; x_0]`, every block after clean ones.

Shapes: B sequences of one forward pass, L tokens, N positions that are scored.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .errors import BadInput
from .modeling.attention_pattern import AttentionPattern
from .modeling.modeling_a2d import A2DForMaskedDiffusion
from .trainers.diffusion_noise import random_bits


# What a draw is for; far from the trainer's own purposes, so that no draw of theirs is repeated here.
MASK_COUNT, MASK_PLACES, RATIO_PLACES, BLOCK_MASK_COUNT = 101, 102, 103, 104
BITS = 53
MC_SAMPLES = 8  # masks drawn per row unless told otherwise
LOGITS_AT_ONCE = 2**28  # numbers in the scores of one forward pass: 1 GiB in fp32
RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
# One scored text: its tokens, and the positions whose prediction counts.
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Estimate:
    """
    A mean per token with its uncertainty.

    Attributes:
        nats_per_token (`float`): the estimate.
        standard_error (`float`): of the mean over rows (texts and masks both vary); `None` from one row.
        tokens (`int`): tokens it averages over.
        rows (`int`): texts it averages over.
    """

    nats_per_token: float
    standard_error: float | None
    tokens: int
    rows: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.3f}"
        return f"{self.nats_per_token:.3f}{error} nats/token"


def scored_positions(row: Row) -> list[int]:
    """
    Positions of a row that count: those with a label, except the first, which has nothing before it for the parent to
    predict it from. Both sides of every comparison score exactly these.
    """
    return [i for i, label in enumerate(row["labels"]) if label != -100 and i > 0]


def usable_rows(rows: Sequence[Row], max_tokens: int | None = None) -> list[Row]:
    """
    Rows with anything to score, up to `max_tokens` scored tokens, in order.

    Raises:
        [`BadInput`]: there is none.
    """
    kept, tokens = [], 0
    for row in rows:
        count = len(scored_positions(row))
        if not count:
            continue
        if max_tokens is not None and kept and tokens + count > max_tokens:
            break
        kept.append({"input_ids": list(row["input_ids"]), "labels": list(row["labels"])})
        tokens += count
    if not kept:
        raise BadInput("The evaluation text has no row with two tokens or more: give longer text.")
    return kept


def estimate(totals: Sequence[float], counts: Sequence[int]) -> Estimate:
    """
    Mean per token of row totals, with the standard error of that ratio of means (rows are the independent units).

    Args:
        totals (`Sequence[float]`): sum of nats of each row.
        counts (`Sequence[int]`): tokens of each row.
    """
    rows, tokens = len(totals), sum(counts)
    mean = math.fsum(totals) / tokens
    error = None
    if rows > 1:
        squares = math.fsum((total - mean * count) ** 2 for total, count in zip(totals, counts, strict=True))
        error = math.sqrt(squares * rows / (rows - 1)) / tokens
    return Estimate(mean, error, tokens, rows)


def _masked_places(purpose: int, seed: int, row: int, draw: int, positions: Sequence[int], count: int) -> list[int]:
    """`count` of `positions`, every subset equally likely, a pure function of the keys."""
    bits_N = random_bits(purpose, seed, row, draw, torch.tensor(positions))
    order = torch.argsort(bits_N, stable=True)[:count]
    return sorted(positions[int(i)] for i in order)


def stratified_count(seed: int, row: int, draw: int, draws: int, total: int, block: int | None = None) -> int:
    """
    How many of `total` tokens, of a row or of one of its blocks, to mask in one of `draws` draws: uniform on
    {1, ..., total}, one draw from each of `draws` equal strata.
    """
    keys = (MASK_COUNT, seed, row, draw) if block is None else (BLOCK_MASK_COUNT, seed, row, draw, block)
    fraction = int(random_bits(*keys)) / 2.0**BITS
    return min(int((draw + fraction) / draws * total), total - 1) + 1


def blocks_of(places: Sequence[int], block_size: int | None) -> list[list[int]]:
    """Positions by the block they stand in, blocks counted from the row's start; all together where there is none."""
    if block_size is None:
        return [list(places)]
    return [list(group) for _, group in itertools.groupby(places, key=lambda place: place // block_size)]


def _block_size(model: A2DForMaskedDiffusion) -> int | None:
    return model.config.block_size if model.config.objective == "bd3lm" else None


def _draw(
    seed: int, row: int, draw: int, draws: int, places: Sequence[int], block_size: int | None
) -> tuple[list[int], list[float]]:
    """The masked positions of one draw, in order, and what the cross-entropy of each counts."""
    masked, weights = [], []
    for group in blocks_of(places, block_size):
        block = None if block_size is None else group[0] // block_size
        count = stratified_count(seed, row, draw, draws, len(group), block)
        masked += _masked_places(MASK_PLACES, seed, row, draw, group, count)
        weights += [len(group) / count] * count
    return masked, weights


def every_set_of_masks(group: Sequence[int]) -> list[tuple[tuple[int, ...], float]]:
    """Every subset with its weight in the bound: E over l of N/l is a sum of Beta(|S|, N - |S| + 1)."""
    total = len(group)
    found = []
    for size in range(1, total + 1):
        weight = math.exp(math.lgamma(size) + math.lgamma(total - size + 1) - math.lgamma(total + 1))
        found += [(places, weight) for places in itertools.combinations(group, size)]
    return found


def _every_draw(places: Sequence[int], block_size: int) -> list[tuple[list[int], list[float]]]:
    """Every set of masks of every block, one set of each block at a time, and what each cross-entropy counts."""
    sets_of_blocks = [every_set_of_masks(group) for group in blocks_of(places, block_size)]
    return [
        ([place for masked, _ in here for place in masked], [weight for masked, weight in here for _ in masked])
        for here in itertools.zip_longest(*sets_of_blocks, fillvalue=((), 0.0))
    ]


@torch.no_grad()
def _masked_forward(
    model: A2DForMaskedDiffusion, rows: Sequence[Row], jobs: Sequence[tuple[int, list[int]]]
) -> tuple[list[list[float]], list[list[bool]]]:
    """
    Cross-entropy and hit of every masked position of each job `(row, places)`.

    Returns:
        `tuple`: for each job, nats and hits in the order of its places.
    """
    length = max(len(rows[row]["input_ids"]) for row, _ in jobs)
    shape, block_size = (len(jobs), length), _block_size(model)
    ids_BL, mask_BL = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels_BL = torch.full(shape, -100, dtype=torch.long)
    for b, (row, places) in enumerate(jobs):
        ids = torch.tensor(rows[row]["input_ids"])
        ids_BL[b, : len(ids)], mask_BL[b, : len(ids)] = ids, 1
        labels_BL[b, places] = ids[places]
    clean_BL = ids_BL.clone()
    for b, (_, places) in enumerate(jobs):
        ids_BL[b, places] = model.config.mask_token_id
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}
    asked = {}
    if block_size is not None:
        inputs = {
            "input_ids": torch.cat([ids_BL, clean_BL], dim=1),
            "attention_mask": mask_BL.repeat(1, 2),
            "labels": torch.cat([labels_BL, torch.full_like(labels_BL, -100)], dim=1),
        }
        asked["attention_pattern"] = AttentionPattern.bd3lm(block_size, clean_context=model.config.clean_context)
    out = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, **asked)
    sizes = [len(places) for _, places in jobs]
    nats = [part.double().tolist() for part in out.token_nll.cpu().split(sizes)]
    hits = [part.tolist() for part in out.token_hit.cpu().split(sizes)]
    return nats, hits


def _batches(jobs: Sequence[Any], batch_size: int, rows: Sequence[Row], vocabulary: int) -> Iterator[Sequence[Any]]:
    """Jobs `batch_size` at a time, or fewer where their scores would not fit."""
    longest = max(len(row["input_ids"]) for row in rows)
    size = max(1, min(batch_size, LOGITS_AT_ONCE // (longest * vocabulary)))
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def diffusion_nelbo(
    model: A2DForMaskedDiffusion,
    rows: Sequence[Row],
    *,
    mc_samples: int = MC_SAMPLES,
    batch_size: int = 8,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Estimate:
    """The mean of [`row_nelbos`] per token, whose arguments it takes."""
    totals = row_nelbos(model, rows, mc_samples=mc_samples, batch_size=batch_size, seed=seed, advance=advance)
    return estimate(totals, [len(scored_positions(row)) for row in rows])


def row_nelbos(
    model: A2DForMaskedDiffusion,
    rows: Sequence[Row],
    *,
    mc_samples: int = MC_SAMPLES,
    batch_size: int = 8,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> list[float]:
    """
    Negative evidence lower bound of each row: an upper bound on the model's NLL, not a perplexity.

    For a row with N scored tokens the bound is N/l times the cross-entropy summed over l masked tokens, in expectation
    over l uniform on {1, ..., N} and over all subsets of that size: equation 6 of LLaDA
    (https://huggingface.co/papers/2502.09992), equal to MDLM's integral over t with weight 1/t and of lower variance.
    l is stratified over the draws of a row. For a model of block diffusion the same holds within each block, given the
    clean text before it (the bound of BD3LM, https://huggingface.co/papers/2503.09573): each block has an l of its
    own. Where going through every set of masks of a block takes no more than `mc_samples` passes (15 for blocks of 4,
    1 for blocks of one token), that is done instead, and the bound is exact. What fills up the last block in training
    is no part of the text.

    Args:
        model ([`A2DForMaskedDiffusion`]): the model.
        rows (`Sequence[Row]`): from [`usable_rows`].
        mc_samples (`int`, *optional*, defaults to 8): masks drawn per row.
        batch_size (`int`, *optional*, defaults to 8): most sequences per forward pass; does not change the result.
        seed (`int`, *optional*, defaults to 0): key of the masks.
        advance (`Callable[[int], None]`, *optional*): told how many sequences have just been scored.

    Returns:
        `list[float]`: nats of each row, all its scored tokens together.
    """
    positions, block_size = [scored_positions(row) for row in rows], _block_size(model)
    exact = block_size is not None and 2**block_size - 1 <= mc_samples
    if exact:
        jobs = [(index, *draw) for index, places in enumerate(positions) for draw in _every_draw(places, block_size)]
    else:
        jobs = [
            (index, *_draw(seed, index, draw, mc_samples, places, block_size))
            for index, places in enumerate(positions)
            for draw in range(mc_samples)
        ]
    found: list[list[float]] = [[] for _ in rows]
    done, told = 0, 0
    with _evaluating(model):
        for batch in _batches(jobs, batch_size, rows, model.config.vocab_size):
            nats, _ = _masked_forward(model, rows, [(index, places) for index, places, _ in batch])
            for (index, _, weights), values in zip(batch, nats, strict=True):
                found[index].append(math.fsum(w * value for w, value in zip(weights, values, strict=True)))
            if advance is not None:  # of the sequences that were announced, whether or not they were all needed
                done += len(batch)
                advance(done * mc_samples * len(rows) // len(jobs) - told)
                told = done * mc_samples * len(rows) // len(jobs)
    return [math.fsum(values) / (1 if exact else mc_samples) for values in found]


def masked_accuracy(
    model: A2DForMaskedDiffusion,
    rows: Sequence[Row],
    *,
    ratios: Sequence[float] = RATIOS,
    batch_size: int = 8,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> list[dict[str, float]]:
    """
    Share of masked tokens that one forward pass predicts exactly, by the share that is masked. A model of block
    diffusion predicts every block from the clean blocks before it.

    Returns:
        `list[dict]`: `ratio`, `accuracy` and `tokens`, one entry per ratio.
    """
    positions = [scored_positions(row) for row in rows]
    table = []
    with _evaluating(model):
        for draw, ratio in enumerate(ratios):
            jobs = [
                (index, _masked_places(RATIO_PLACES, seed, index, draw, places, max(1, round(ratio * len(places)))))
                for index, places in enumerate(positions)
            ]
            hits = total = 0
            for batch in _batches(jobs, batch_size, rows, model.config.vocab_size):
                _, found = _masked_forward(model, rows, batch)
                hits += sum(sum(row) for row in found)
                total += sum(len(row) for row in found)
                if advance is not None:
                    advance(len(batch))
            table.append({"ratio": ratio, "accuracy": hits / total, "tokens": total})
    return table


def autoregressive_nll(
    parent: PreTrainedModel,
    rows: Sequence[Row],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> Estimate:
    """The mean of [`row_nlls`] per token: exact for these texts, its standard error that of the choice of texts."""
    totals = row_nlls(parent, rows, batch_size=batch_size, advance=advance)
    return estimate(totals, [len(scored_positions(row)) for row in rows])


@torch.no_grad()
def row_nlls(
    parent: PreTrainedModel,
    rows: Sequence[Row],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> list[float]:
    """
    NLL of each row under an autoregressive model, on the same tokens, each predicted from those before it.

    Args:
        parent (`PreTrainedModel`): a causal language model.
        rows (`Sequence[Row]`): from [`usable_rows`].

    Returns:
        `list[float]`: nats of each row, all its scored tokens together.
    """
    totals = []
    with _evaluating(parent):
        for batch in _batches(rows, batch_size, rows, parent.get_input_embeddings().weight.shape[0]):
            length = max(len(row["input_ids"]) for row in batch)
            ids_BL = torch.zeros(len(batch), length, dtype=torch.long)
            mask_BL = torch.zeros_like(ids_BL)
            for b, row in enumerate(batch):
                ids_BL[b, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
                mask_BL[b, : len(row["input_ids"])] = 1
            logits_BLV = parent(
                input_ids=ids_BL.to(parent.device), attention_mask=mask_BL.to(parent.device), use_cache=False
            ).logits
            for b, row in enumerate(batch):
                places = torch.tensor(scored_positions(row))
                logits_NV = logits_BLV[b, (places - 1).to(logits_BLV.device)].float()
                targets_N = ids_BL[b, places].to(logits_NV.device)
                nll_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
                totals.append(math.fsum(nll_N.double().tolist()))
            if advance is not None:
                advance(len(batch))
    return totals


class _evaluating:
    """Eval mode inside the block, the former mode after it."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.mode = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *exc_info) -> None:
        self.model.train(self.mode)
