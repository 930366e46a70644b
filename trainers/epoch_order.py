"""The order in which rows are seen, and where each stands in it.

Owns the views of a prepared dataset that a data loader reads: they give every row its `row_id`, its `epoch` and its
`place` in the epoch's order (which decide its noise), and its tail of EOS tokens. The dataset itself is not touched.
The order is a pure function of (seed, epoch, size), so no sampler state needs saving, and any number of processes,
any accumulation and any resume walk through the same one.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from .diffusion_noise import eos_tail_length, epoch_order


# Of how many epochs an order is remembered: a batch reads one, and what it replays perhaps the ones before.
ORDERS_KEPT = 4


def add_eos_tail(row: dict[str, Any], length: int, token_id: int, max_length: int | None) -> None:
    """
    Puts EOS tokens behind a row, in place, and notes how many as `tail_length`.

    Args:
        row (`dict[str, Any]`): a prepared row.
        length (`int`): tokens to add; fewer where the row would outgrow `max_length`, none where it does not end.
        token_id (`int`): the EOS token.
        max_length (`int`, *optional*): most tokens in a row.
    """
    if row["labels"][-1] != token_id:
        length = 0  # cut short, or never meant to stop
    elif max_length is not None:
        length = min(length, max(max_length - len(row["labels"]), 0))
    row["input_ids"] = list(row["input_ids"]) + [token_id] * length
    row["labels"] = list(row["labels"]) + [token_id] * length
    row["tail_length"] = length


@dataclass(frozen=True)
class EOSTail:
    """
    A random number of EOS tokens after each row that ends with one, so that a model learns to fill what lies behind
    its answer. They are targets, and left out of the reported NELBO.

    Attributes:
        token_id (`int`): the EOS token.
        longest (`int`): most tokens added to a row.
        max_length (`int`, *optional*): no row grows beyond this.
        seed (`int`): key of the lengths.
    """

    token_id: int
    longest: int
    max_length: int | None
    seed: int

    def longest_row(self, length: int) -> int:
        """How long a row of `length` tokens can become."""
        return (
            length + self.longest
            if self.max_length is None
            else max(length, min(length + self.longest, self.max_length))
        )

    def extend(self, rows: list[dict[str, Any]], epoch: int) -> None:
        """Adds the tails to `rows`, in place, and notes each as `tail_length`."""
        row_ids = torch.tensor([row["row_id"] for row in rows], dtype=torch.int64)
        for row, length in zip(rows, eos_tail_length(self.seed, epoch, row_ids, self.longest).tolist(), strict=True):
            add_eos_tail(row, length, self.token_id, self.max_length)


class OrderedRows(Dataset):
    """
    The rows of a dataset in their own order, always in epoch 0. What evaluation reads.

    Places beyond the last row are blank rows without a target: they fill up the last batch of a distributed epoch,
    where repeating real rows (what accelerate does otherwise) would count them twice.

    Args:
        dataset (`datasets.Dataset` or `torch.utils.data.Dataset`): rows with `input_ids` and `labels`, and `row_id`
            where they have an identity of their own; otherwise their index is it.
        tail ([`EOSTail`], *optional*): EOS tokens to add.
    """

    def __init__(self, dataset: Dataset | datasets.Dataset, tail: EOSTail | None = None):
        self.dataset = dataset
        self.tail = tail

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def epoch(self) -> int:
        """The epoch that is read now."""
        return 0

    def order_of(self, epoch: int) -> torch.Tensor | None:
        """The row at each place of an epoch (`None`: the dataset's own order)."""
        return None

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        epoch = self.epoch
        return self.items_at([(epoch, place) for place in places])

    def items_at(self, wanted: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """What stands at each of some (epoch, place), whatever the epoch that is read now."""
        size, orders = len(self), {epoch: self.order_of(epoch) for epoch, _ in wanted}
        found = iter(
            self.rows_at(
                [
                    (epoch, place if orders[epoch] is None else int(orders[epoch][place]))
                    for epoch, place in wanted
                    if place < size
                ]
            )
        )
        return [
            {**(next(found) if place < size else self.blank_row()), "epoch": epoch, "place": place}
            for epoch, place in wanted
        ]

    def rows_at(self, wanted: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """Rows by epoch and index, each with its `row_id` and, where there are tails, the one it has in that epoch."""
        indices = [index for _, index in wanted]
        if isinstance(self.dataset, datasets.Dataset):
            found = self.dataset.__getitems__(indices) if indices else []
        else:
            found = [dict(self.dataset[index]) for index in indices]
        for row, index in zip(found, indices, strict=True):
            row.setdefault("row_id", index)
        if self.tail is not None:
            for epoch in {epoch for epoch, _ in wanted}:
                self.tail.extend([row for row, (e, _) in zip(found, wanted, strict=True) if e == epoch], epoch)
        return found

    def blank_row(self) -> dict[str, Any]:
        """A row of one token that is no target."""
        return {"input_ids": list(self.dataset[0]["input_ids"][:1]), "labels": [-100], "row_id": -1}


class EpochOrder(OrderedRows):
    """
    The rows of a dataset in the order of the current epoch. What training reads, through a sequential sampler.

    accelerate passes the epoch on to `set_epoch` of the dataset under any stack of samplers, also after a resume; a
    sampler of ours it would lose between `skip_first_batches` and the shards of several processes.

    Args:
        dataset, tail: as in [`OrderedRows`].
        seed (`int`): key of the order.
        shuffle (`bool`): whether to permute; else the dataset's own order, every epoch.
    """

    def __init__(self, dataset: Dataset | datasets.Dataset, seed: int, shuffle: bool, tail: EOSTail | None = None):
        super().__init__(dataset, tail)
        self.seed = seed
        self.shuffle = shuffle
        # In shared memory: persistent workers keep their copy of this object from epoch to epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._orders: dict[int, torch.Tensor] = {}

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the order of `epoch`."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def order_of(self, epoch: int) -> torch.Tensor | None:
        if not self.shuffle:
            return None
        if epoch not in self._orders:
            self._orders[epoch] = epoch_order(self.seed, epoch, len(self))
            while len(self._orders) > ORDERS_KEPT:
                del self._orders[next(iter(self._orders))]
        return self._orders[epoch]


class StreamOrder(IterableDataset):
    """
    The rows of a stream in the order they come, numbered as they come.

    Args:
        dataset (`datasets.IterableDataset` or any iterable of rows): rows with `input_ids` and `labels`.
        repeat (`bool`): whether to start again when the stream ends, in a new epoch. Training does: one endless pass
            is what makes skipping to the middle of it exact.
        tail ([`EOSTail`], *optional*): EOS tokens to add.
    """

    def __init__(self, dataset: datasets.IterableDataset | IterableDataset, repeat: bool, tail: EOSTail | None = None):
        self.dataset = dataset
        self.repeat = repeat
        self.tail = tail

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for epoch in itertools.count():
            if isinstance(self.dataset, datasets.IterableDataset):
                self.dataset.set_epoch(epoch)
            place = first
            for row in self.dataset:
                # The number in the stream is the identity too: a stream has no other.
                row = {**row, "row_id": place}
                if self.tail is not None:
                    self.tail.extend([row], epoch)
                yield {**row, "epoch": epoch, "place": place}
                place += step
            if not self.repeat or place == first:
                return


class PaddedSequence(Sampler[int]):
    """
    Places 0, 1, 2, ... up to the next multiple of what all processes take at once.

    Args:
        size (`int`): rows.
        multiple (`int`): rows of one batch of every process together.
    """

    def __init__(self, size: int, multiple: int = 1):
        self.length = -(-size // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))
