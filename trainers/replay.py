"""Past rows, trained once more beside the new ones, with noise of their own.

Owns which row is replayed and the way it takes into a batch. There is no buffer to fill, save or restore: the last n
rows seen are a pure function of a place in the epochs' order, so each can be read again from the dataset, and a
resumed run replays what an unbroken one would have. Each new row brings one past row along, whatever batch, process or
accumulation it lands in. The loss on them is the trainer's.
"""

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from .diffusion_noise import REPLAY_NOISE, REPLAYED_ROWS, random_bits
from .epoch_order import EpochOrder


# Where a row carries the past row that comes with it, and a batch the batch of those.
REPLAY = "replay"


class ReplayedRows(Dataset):
    """
    The rows of training, each with one of the last rows seen before its own optimizer step, drawn evenly.

    A replayed row has the epoch and place of the row that brings it, which decide its time, and a `row_id` of this
    very occasion, which decides what is masked: noise that it never had before. In the first step there is nothing to
    replay, and a blank row comes along.

    Args:
        rows ([`EpochOrder`]): the rows, or packs of them.
        seed (`int`): key of the draws.
        size (`int`): how many of the last rows seen (packs, where rows are packed) are drawn from.
        step_rows (`int`): rows of an optimizer step, of all processes together.
        epoch_rows (`int`): rows that are seen in an epoch.
    """

    def __init__(self, rows: EpochOrder, seed: int, size: int, step_rows: int, epoch_rows: int):
        self.rows = rows
        self.seed = seed
        self.size = size
        self.step_rows = step_rows
        self.epoch_rows = epoch_rows

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the order of `epoch`."""
        self.rows.set_epoch(epoch)

    def past_place(self, epoch: int, place: int) -> tuple[int, int] | None:
        """The epoch and place that are replayed beside a place; `None` where nothing has been seen."""
        seen = epoch * self.epoch_rows + place // self.step_rows * self.step_rows
        if seen == 0 or place >= len(self.rows):
            return None
        back = 1 + int(random_bits(REPLAYED_ROWS, self.seed, epoch, place)) % min(self.size, seen)
        return divmod(seen - back, self.epoch_rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        epoch = self.rows.epoch
        past = [self.past_place(epoch, place) for place in places]
        items = self.rows.items_at([(epoch, place) for place in places])
        nothing = (epoch, len(self.rows))  # a place beyond the last row is blank
        replayed = self.rows.items_at([nothing if found is None else found for found in past])
        for place, item, again in zip(places, items, replayed, strict=True):
            first = item.get("documents", [item])[0]["place"]
            for k, row in enumerate(again.get("documents", [again])):
                row["epoch"], row["place"] = epoch, first + k
                if row["row_id"] >= 0:
                    row["row_id"] = int(random_bits(REPLAY_NOISE, self.seed, epoch, place, k))
            item[REPLAY] = again
        return items


class ReplayCollator:
    """
    Makes a batch of rows, and another of the past rows that come with them, which lies in it as `replay`.

    Args:
        collate (`Callable`): makes a batch of rows.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        past = [row[REPLAY] for row in rows if REPLAY in row]
        batch = self.collate([{name: value for name, value in row.items() if name != REPLAY} for row in rows])
        return batch | {REPLAY: self.collate(past)} if past else batch


def replay_seed(seed: int) -> int:
    """Seed of the noise of replayed rows: that of no training and no evaluation."""
    return int(random_bits(REPLAY_NOISE, seed))
