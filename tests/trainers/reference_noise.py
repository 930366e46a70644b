"""The noise once more, in Python integers and floats: the independent side of the comparisons.

Written from the description of the algorithm (SplitMix64 over the keys, golden-ratio times), not from the tensor code.
"""

import math


WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
TIME_OFFSET, TOKEN_MASK, EPOCH_ORDER, EOS_TAIL = 1, 2, 3, 4


def mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


def bits(*keys: int) -> int:
    word = 0
    for key in keys:
        word = mix((word + (key + 1) * GOLDEN) & WORD)
    return word >> 11


def time(seed: int, epoch: int, place: int, minimum: float = 1e-3) -> float:
    fraction = (((bits(TIME_OFFSET, seed, epoch) << 11) + place * GOLDEN) & WORD) >> 11
    return minimum + (1 - minimum) * fraction / 2**53


def mask_share(t: float, schedule: str = "linear") -> float:
    return t if schedule == "linear" else math.sin(math.pi / 2 * t)


def weight(t: float, schedule: str = "linear", minimum: float = 1e-3) -> float:
    if schedule == "linear":
        return 1 / t
    # -alpha'(t) / (1 - alpha(t)) with alpha = 1 - cos(pi/2 (1 - t)), over the share of the integral that is covered.
    slope = math.pi / 2 * math.sin(math.pi / 2 * (1 - t))
    covered = (1 - math.cos(math.pi / 2 * (1 - minimum))) - (1 - math.cos(0.0))
    return slope / math.cos(math.pi / 2 * (1 - t)) * (1 - minimum) / covered


def is_masked(seed: int, epoch: int, row_id: int, position: int, share: float) -> bool:
    return bits(TOKEN_MASK, seed, epoch, row_id, position) < int(share * 2**53)


def order(seed: int, epoch: int, size: int) -> list[int]:
    return sorted(range(size), key=lambda row: bits(EPOCH_ORDER, seed, epoch, row))
