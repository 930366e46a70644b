"""Noise: how much of a row is masked, which of its tokens, and what each masked token counts.

Owns the schedules, the time of a row and the random bits behind every draw. All of it is a pure function of (seed,
epoch, row, position): no generator, no state, so a row gets the same noise whatever the batch, the accumulation, the
number of processes, the side of the padding, the device or a resume. Imports torch only.

Shapes: B rows, L tokens; a name without suffix broadcasts.
"""

import torch


NOISE_SCHEDULES = ("linear", "cosine")

# What a draw is for. Part of its key, so that no two kinds of draw ever share bits.
TIME_OFFSET, TOKEN_MASK, EPOCH_ORDER, EOS_TAIL, OPEN_EDGES, ALIGNED_LAYERS, ALIGNED_TOKENS = 1, 2, 3, 4, 5, 6, 7
REPLAYED_ROWS, REPLAY_NOISE = 8, 9

_BITS = 53  # as many as a float64 holds exactly


def _signed(word: int) -> int:
    """A 64-bit word as the Python integer that torch.int64 holds for it."""
    return word - (1 << 64) if word >= 1 << 63 else word


# The golden ratio's fraction, 0.6180339887..., in 64-bit fixed point: the step of the low-discrepancy sequence, and
# the odd increment of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
_GOLDEN = _signed(0x9E3779B97F4A7C15)
# That of √2, 0.4142135623...: the step from block to block of a row.
_SILVER = _signed(0x6A09E667F3BCC909)
_MULTIPLIER_1, _MULTIPLIER_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift_right(word: torch.Tensor, bits: int) -> torch.Tensor:
    # `>>` of a signed integer copies the sign bit in; the mask takes it out again.
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mix(word: torch.Tensor) -> torch.Tensor:
    """The SplitMix64 finalizer: a bijection of 64-bit words in which every input bit reaches every output bit."""
    word = (word ^ _shift_right(word, 30)) * _MULTIPLIER_1
    word = (word ^ _shift_right(word, 27)) * _MULTIPLIER_2
    return word ^ _shift_right(word, 31)


def random_bits(purpose: int, *keys: int | torch.Tensor) -> torch.Tensor:
    """
    Uniform random integers in [0, 2^53), a pure function of the keys.

    Args:
        purpose (`int`): what the draw is for, for example `TOKEN_MASK`.
        keys (`int` or `torch.LongTensor`): for example seed, epoch, row and position; they broadcast.

    Returns:
        `torch.LongTensor` of the broadcast shape of the keys.
    """
    device = next((key.device for key in keys if isinstance(key, torch.Tensor)), torch.device("cpu"))
    word = torch.zeros((), dtype=torch.int64, device=device)
    for key in (purpose, *keys):
        # int64 arithmetic wraps around modulo 2^64 on every device.
        word = _mix(word + (key + 1) * torch.tensor(_GOLDEN, device=device))
    return _shift_right(word, 64 - _BITS)


def low_discrepancy_time(
    seed: int, epoch_B: torch.Tensor, place_B: torch.Tensor, minimum: float = 0.0
) -> torch.Tensor:
    """
    The time of each row: t = frac(u(seed, epoch) + n φ), n its place in the epoch's order, φ the golden ratio's
    fraction, stretched to [minimum, 1).

    Any run of consecutive places is stratified, whatever its length and wherever it starts, so a batch needs to know
    nothing of how the data is cut into batches.

    Args:
        seed (`int`): seed of the noise.
        epoch_B (`torch.LongTensor` of shape `(B,)`): epoch of each row.
        place_B (`torch.LongTensor` of shape `(B,)`): place of each row in the order of its epoch.
        minimum (`float`): smallest time.

    Returns:
        `torch.DoubleTensor` of shape `(B,)`.
    """
    if place_B.device.type == "mps":  # has no float64; B numbers cost nothing on the CPU
        epoch_B, place_B = epoch_B.cpu(), place_B.cpu()
    offset_B = random_bits(TIME_OFFSET, seed, epoch_B) << (64 - _BITS)
    fraction_B = _shift_right(offset_B + place_B * torch.tensor(_GOLDEN, device=place_B.device), 64 - _BITS)
    return minimum + (1.0 - minimum) * (fraction_B.double() * 2.0**-_BITS)


def block_time(
    seed: int,
    epoch_B: torch.Tensor,
    place_B: torch.Tensor,
    block_BL: torch.Tensor,
    minimum: float = 0.0,
    maximum: float = 1.0,
) -> torch.Tensor:
    """
    The time of each token's block: t = frac(u(seed, epoch) + n φ + b (√2 - 1)), stretched to [minimum, maximum).

    Consecutive rows are stratified, and so are the blocks of one row. Block 0 has the time that
    [`low_discrepancy_time`] gives the row: with one block per row the two are the same.

    Args:
        seed (`int`): seed of the noise.
        epoch_B, place_B (`torch.LongTensor` of shape `(B,)`, or `(B, L)` for packed rows): epoch of each row and its
            place in the order of it.
        block_BL (`torch.LongTensor` of shape `(B, L)`): number of each token's block, counted from its row's start.
        minimum, maximum (`float`): what the times are clipped to.

    Returns:
        `torch.DoubleTensor` of shape `(B, L)`.
    """
    if place_B.device.type == "mps":
        epoch_B, place_B, block_BL = epoch_B.cpu(), place_B.cpu(), block_BL.cpu()
    golden, silver = (torch.tensor(step, device=place_B.device) for step in (_GOLDEN, _SILVER))
    row_B = (random_bits(TIME_OFFSET, seed, epoch_B) << (64 - _BITS)) + place_B * golden
    fraction_BL = _shift_right(_by_token(row_B) + block_BL * silver, 64 - _BITS)
    return minimum + (maximum - minimum) * (fraction_BL.double() * 2.0**-_BITS)


def mask_probability(t: torch.Tensor, schedule: str) -> torch.Tensor:
    """
    1 - α(t): the probability that a token is masked at time t.

    `linear`: α = 1 - t. `cosine`: α = 1 - cos(π/2 (1 - t)) (MDLM, https://huggingface.co/papers/2406.07524).
    """
    if schedule == "linear":
        return t
    if schedule == "cosine":
        return torch.sin(torch.pi / 2 * t)
    raise ValueError(f"`noise_schedule` must be one of {', '.join(NOISE_SCHEDULES)}, not {schedule!r}.")


def elbo_weight(t: torch.Tensor, schedule: str) -> torch.Tensor:
    """
    w(t) = -α'(t) / (1 - α(t)): what a masked token's cross-entropy counts in the NELBO (MDLM, equation 10).

    Since E[m] = 1 - α(t), the expectation of w(t) m over t in [0, 1] is α(0) - α(1) = 1.
    """
    if schedule == "linear":
        return 1.0 / t
    if schedule == "cosine":
        return torch.pi / 2 / torch.tan(torch.pi / 2 * t)
    raise ValueError(f"`noise_schedule` must be one of {', '.join(NOISE_SCHEDULES)}, not {schedule!r}.")


def truncation_factor(minimum: float, schedule: str, maximum: float = 1.0) -> float:
    """
    What makes the expectation of w(t) m exactly 1 when t runs from `minimum` to `maximum` instead of from 0 to 1:
    (maximum - minimum) / (α(minimum) - α(maximum)). It is 1 for the linear schedule, 1.0006 for the cosine one from
    0.001.
    """
    ends = mask_probability(torch.tensor([minimum, maximum], dtype=torch.float64), schedule)
    return (maximum - minimum) / float(ends[1] - ends[0])


def position_in_row(attention_mask_BL: torch.Tensor, document_ids_BL: torch.Tensor | None = None) -> torch.Tensor:
    """
    The position of each token counted from its row's first one, so that padding on the left shifts no draw; from its
    document's first one where rows are packed.
    """
    position_BL = attention_mask_BL.long().cumsum(dim=-1) - 1
    if document_ids_BL is None:
        return position_BL
    opens_BL = torch.ones_like(document_ids_BL, dtype=torch.bool)
    opens_BL[:, 1:] = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    return position_BL - torch.where(opens_BL, position_BL, 0).cummax(dim=-1).values


def _by_token(values: torch.Tensor) -> torch.Tensor:
    return values if values.ndim == 2 else values[:, None]


def bernoulli_mask(
    seed: int,
    epoch_B: torch.Tensor,
    row_id_B: torch.Tensor,
    position_BL: torch.Tensor,
    probability_B: torch.Tensor,
) -> torch.Tensor:
    """
    Independent coin flips, one per token, each a pure function of (seed, epoch, row id, position).

    The comparison is between integers, so that every device decides alike.

    Args:
        seed (`int`): seed of the noise.
        epoch_B, row_id_B (`torch.LongTensor` of shape `(B,)`, or `(B, L)` for packed rows): which row of which epoch.
        position_BL (`torch.LongTensor` of shape `(B, L)`): position of each token in its row.
        probability_B (`torch.DoubleTensor` of shape `(B,)` or `(B, L)`): probability of `True`.

    Returns:
        `torch.BoolTensor` of shape `(B, L)`.
    """
    bits_BL = random_bits(TOKEN_MASK, seed, _by_token(epoch_B), _by_token(row_id_B), position_BL)
    return bits_BL < _by_token((probability_B * 2.0**_BITS).long().to(bits_BL.device))


def epoch_order(seed: int, epoch: int, size: int) -> torch.Tensor:
    """
    The order of an epoch: a permutation that is a pure function of (seed, epoch, size).

    Returns:
        `torch.LongTensor` of shape `(size,)`: the row at each place.
    """
    return torch.argsort(random_bits(EPOCH_ORDER, seed, epoch, torch.arange(size)), stable=True)


def eos_tail_length(seed: int, epoch: int, row_id_B: torch.Tensor, longest: int) -> torch.Tensor:
    """
    How many EOS tokens to add after each row: uniform on {0, ..., longest}, a pure function of (seed, epoch, row id).

    Returns:
        `torch.LongTensor` of shape `(B,)`.
    """
    return random_bits(EOS_TAIL, seed, epoch, row_id_B) % (longest + 1)
