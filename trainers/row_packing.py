"""Several rows in one sequence: which rows share one, and how a data loader reads them.

Owns the plan of the packs and the views of a dataset that serve them. A pack is `{"documents": [row, row, ...]}`; each
row in it keeps its own number, epoch, place and tail, so its noise is what it would be alone. Makes no tensors: the
collator does.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import torch
from torch.utils.data import Dataset, IterableDataset

from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion
from a2d_hf.modeling.parent_models import has_recurrence

from .block_ends import BlockEnds
from .epoch_order import ORDERS_KEPT, EOSTail, EpochOrder, StreamOrder


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """
    Packs items into bins: the longest first, each into the fullest bin that still has room for it (the strategy `bfd`
    of TRL; https://huggingface.co/papers/2404.10830).

    Args:
        lengths (`Sequence[int]`): length of each item, at most `capacity`.
        capacity (`int`): what a bin holds.

    Returns:
        `list[list[int]]`: the items of each bin, in ascending order, bins in the order of their first item.
    """
    bins: list[list[int]] = []
    bins_with_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where some bin has room for exactly r
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        length = int(lengths[item])
        if not 0 < length <= capacity:
            raise ValueError(f"Item {item} of length {length} does not fit into a bin of {capacity}.")
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # the lowest bit: the tightest fit
            bin = bins_with_room[room].pop()
            if not bins_with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, bin = capacity, len(bins)
            bins.append([])
        bins[bin].append(item)
        room -= length
        if room:
            bins_with_room.setdefault(room, []).append(bin)
            rooms |= 1 << room
    return sorted(sorted(bin) for bin in bins)


def row_lengths(dataset: Dataset | datasets.Dataset, tail: EOSTail | BlockEnds | None) -> np.ndarray:
    """How long each row of a dataset can become, the EOS tokens that may be added behind it included."""
    if isinstance(dataset, datasets.Dataset):
        lengths, last = [], []
        for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(10_000):
            labels = batch["labels"].combine_chunks()
            lengths.append(pyarrow.compute.list_value_length(batch["input_ids"]).to_numpy())
            last.append(labels.values.to_numpy()[labels.offsets.to_numpy()[1:] - 1])
        lengths, last = np.concatenate(lengths), np.concatenate(last)
    else:
        rows = [dataset[index] for index in range(len(dataset))]
        lengths = np.array([len(row["input_ids"]) for row in rows])
        last = np.array([row["labels"][-1] for row in rows])
    if tail is None:
        return lengths
    return np.array(
        [tail.longest_row(n) if end == tail.token_id else n for n, end in zip(lengths.tolist(), last, strict=True)]
    )


class PackedEpochOrder(EpochOrder):
    """
    Packs of the rows of a dataset, in the order of the current epoch. The same rows share a pack in every epoch; rows
    are placed one after the other in the order of the packs, so that any run of packs is stratified in time.

    Args:
        dataset, seed, shuffle, tail: as in [`EpochOrder`].
        capacity (`int`): most tokens in a pack, EOS tails included.
    """

    def __init__(
        self,
        dataset: Dataset | datasets.Dataset,
        seed: int,
        shuffle: bool,
        capacity: int,
        tail: EOSTail | BlockEnds | None = None,
    ):
        super().__init__(dataset, seed, shuffle, tail)
        packs = best_fit_decreasing(row_lengths(dataset, tail), capacity)
        # Flat, because every worker process has its copy.
        self._rows = torch.tensor([row for pack in packs for row in pack], dtype=torch.int64)
        self._counts = torch.tensor([len(pack) for pack in packs], dtype=torch.int64)
        self._firsts = self._counts.cumsum(0) - self._counts
        self._places: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def places_of(self, epoch: int) -> torch.Tensor:
        """Where the first row of the pack at each place stands among all rows of an epoch."""
        if epoch not in self._places:
            order = self.order_of(epoch)
            counts = self._counts if order is None else self._counts[order]
            self._places[epoch] = counts.cumsum(0) - counts
            while len(self._places) > ORDERS_KEPT:
                del self._places[next(iter(self._places))]
        return self._places[epoch]

    def items_at(self, wanted: list[tuple[int, int]]) -> list[dict[str, Any]]:
        rows, numbers = [], []
        for epoch, place in wanted:
            if place < len(self):
                order = self.order_of(epoch)
                pack = place if order is None else int(order[place])
                first, count = int(self._firsts[pack]), int(self._counts[pack])
                rows += [(epoch, index) for index in self._rows[first : first + count].tolist()]
                start = int(self.places_of(epoch)[place])
                numbers.append(range(start, start + count))
            else:
                numbers.append(range(place, place + 1))
        found, packs = iter(self.rows_at(rows)), []
        for (epoch, place), range_of_rows in zip(wanted, numbers, strict=True):
            blank = place >= len(self)
            packs.append(
                {
                    "documents": [
                        {**(self.blank_row() if blank else next(found)), "epoch": epoch, "place": row_place}
                        for row_place in range_of_rows
                    ]
                }
            )
        return packs


class PackedStream(IterableDataset):
    """
    Packs of consecutive rows of a stream: a pack is closed by the first row that has no room in it.

    Args:
        rows ([`StreamOrder`]): the rows, numbered and with their tails.
        capacity (`int`): most tokens in a pack.
    """

    def __init__(self, rows: StreamOrder, capacity: int):
        self.rows = rows
        self.capacity = capacity

    def __iter__(self) -> Iterator[dict[str, Any]]:
        pack, used = [], 0
        for row in self.rows:
            length = len(row["input_ids"])
            if pack and used + length > self.capacity:
                yield {"documents": pack}
                pack, used = [], 0
            pack.append(row)
            used += length
        if pack:
            yield {"documents": pack}


@torch.no_grad()
def check_packing(model: A2DForMaskedDiffusion) -> None:
    """
    Raises `ValueError` where a model cannot serve packed rows. Tried, not believed: the logits of short rows in one
    sequence must be those of each alone.
    """
    backbone = model.backbone
    name, advice = type(backbone).__name__, "train it with `packing=False`."
    if has_recurrence(backbone.config):
        raise ValueError(f"`packing`: {name} has recurrent layers, which read packed rows as one text: {advice}")
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        raise ValueError(f"`packing`: {name} takes no `position_ids`, so no row but the first starts at 0: {advice}")
    if backbone.config._attn_implementation.startswith("flash"):
        raise ValueError(
            '`packing`: flash attention cannot express documents: load the model with `attn_implementation="sdpa"` or '
            '`"flex_attention"`.'
        )
    device, training = next(model.parameters()).device, model.training
    ids_1L = torch.arange(12, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    documents_1L = torch.arange(12, device=device)[None] // 5
    model.eval()
    try:
        together = model(input_ids=ids_1L, document_ids=documents_1L, attention_pattern="bidirectional").logits
        alone = [
            model(input_ids=part_1T, attention_pattern="bidirectional").logits for part_1T in ids_1L.split(5, dim=1)
        ]
    finally:
        model.train(training)
    alone = torch.cat(alone, dim=1)
    difference, size = float((together - alone).abs().max()), float(alone.abs().max())
    if not difference <= 2e-2 * max(size, 1e-6):
        raise ValueError(
            f"`packing`: rows in one sequence of {name} move each other's logits by {difference:.3g}: {advice}"
        )
