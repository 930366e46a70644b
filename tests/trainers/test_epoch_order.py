"""What a data loader reads: the order of an epoch, the numbers of its rows, blank rows, tails of EOS, streams."""

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from a2d_hf.trainers.diffusion_collator import DiffusionCollator
from a2d_hf.trainers.epoch_order import EOSTail, EpochOrder, OrderedRows, PaddedSequence, StreamOrder
from tests.trainers import reference_noise


EOS = 2


def rows(count, with_ids=False):
    table = [{"input_ids": [10 + i, 50, EOS], "labels": [-100, 50, EOS]} for i in range(count)]
    if with_ids:
        table = [row | {"row_id": 1000 + i} for i, row in enumerate(table)]
    return datasets.Dataset.from_list(table)


def test_each_epoch_is_its_own_permutation():
    order = EpochOrder(rows(20), seed=3, shuffle=True)
    for epoch in (0, 1, 5):
        order.set_epoch(epoch)
        seen = [order[place] for place in range(20)]
        assert [row["row_id"] for row in seen] == reference_noise.order(3, epoch, 20)
        assert [row["place"] for row in seen] == list(range(20))
        assert {row["epoch"] for row in seen} == {epoch}


def test_without_shuffling_rows_keep_their_order():
    order = EpochOrder(rows(6), seed=3, shuffle=False)
    order.set_epoch(2)
    assert [row["row_id"] for row in order.__getitems__(list(range(6)))] == list(range(6))


def test_a_row_keeps_the_identity_it_came_with():
    order = EpochOrder(rows(5, with_ids=True), seed=0, shuffle=True)
    assert [order[place]["row_id"] - 1000 for place in range(5)] == reference_noise.order(0, 0, 5)


def test_evaluation_stays_in_epoch_zero():
    assert {row["epoch"] for row in OrderedRows(rows(4)).__getitems__([0, 1, 2, 3])} == {0}
    assert not hasattr(OrderedRows(rows(4)), "set_epoch")


def test_places_beyond_the_end_are_blank():
    found = EpochOrder(rows(3), seed=0, shuffle=True).__getitems__([1, 2, 3, 4])
    assert [row["row_id"] for row in found[2:]] == [-1, -1]
    assert [row["labels"] for row in found[2:]] == [[-100], [-100]]


@pytest.mark.parametrize("size, multiple, expected", [(21, 8, 24), (24, 8, 24), (5, 1, 5), (1, 6, 6)])
def test_padded_sequence_fills_the_last_batch_of_all_processes(size, multiple, expected):
    sampler = PaddedSequence(size, multiple)
    assert len(sampler) == expected and list(sampler) == list(range(expected))


@pytest.mark.parametrize("persistent", [False, True])
def test_worker_processes_follow_the_epoch(persistent):
    order = EpochOrder(rows(12), seed=1, shuffle=True)
    loader = DataLoader(
        order,
        batch_size=4,
        sampler=PaddedSequence(12),
        collate_fn=DiffusionCollator(0),
        num_workers=2,
        persistent_workers=persistent,
    )
    for epoch in (0, 1):
        order.set_epoch(epoch)
        seen = torch.cat([batch["row_id"] for batch in loader])
        assert seen.tolist() == reference_noise.order(1, epoch, 12)


def tail(longest=8, max_length=None):
    return EOSTail(token_id=EOS, longest=longest, max_length=max_length, seed=9)


def test_tail_is_the_reference_number_of_eos_and_counted():
    order = EpochOrder(rows(6), seed=9, shuffle=True, tail=tail())
    order.set_epoch(2)
    for row in order.__getitems__(list(range(6))):
        length = reference_noise.bits(reference_noise.EOS_TAIL, 9, 2, row["row_id"]) % 9
        assert row["tail_length"] == length
        assert row["input_ids"][3:] == [EOS] * length and row["labels"][3:] == [EOS] * length


def test_tail_is_no_longer_than_the_room_behind_the_row():
    found = EpochOrder(rows(30), seed=9, shuffle=False, tail=tail(longest=50, max_length=7)).__getitems__(
        list(range(30))
    )
    assert max(len(row["input_ids"]) for row in found) == 7


def test_a_row_that_does_not_end_gets_no_tail():
    cut = datasets.Dataset.from_list(
        [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [5, 2], "labels": [5, -100]}]
    )
    assert [row["tail_length"] for row in EpochOrder(cut, 0, False, tail()).__getitems__([0, 1])] == [0, 0]


def stream(rows_per_shard, shards=1):
    def generate(shards):
        for shard in shards:
            for i in range(rows_per_shard):
                yield {"input_ids": [shard, i], "labels": [shard, i]}

    return datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": list(range(shards))})


def test_a_stream_counts_its_rows_and_starts_again():
    seen = []
    for row in StreamOrder(stream(4), repeat=True):
        seen.append((row["epoch"], row["place"], row["row_id"]))
        if len(seen) == 10:
            break
    assert seen == [(n // 4, n % 4, n % 4) for n in range(10)]


def test_a_stream_for_evaluation_ends():
    assert len(list(StreamOrder(stream(4), repeat=False))) == 4


def test_an_empty_stream_ends():
    assert list(StreamOrder(stream(0), repeat=True)) == []


def test_workers_of_a_stream_give_every_row_a_number_of_its_own():
    loader = DataLoader(StreamOrder(stream(3, shards=2), repeat=False), batch_size=None, num_workers=2)
    seen = [(row["row_id"], tuple(row["input_ids"])) for row in loader]
    assert len({number for number, _ in seen}) == len({ids for _, ids in seen}) == len(seen) == 6


def test_collator_pads_on_the_right_and_padding_is_no_target():
    batch = DiffusionCollator(pad_token_id=7)(
        [
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "row_id": 4, "epoch": 1, "place": 9},
            {"input_ids": [5], "labels": [5], "row_id": 6, "epoch": 1, "place": 10, "tail_length": 1},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 7, 7]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [5, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["row_id"].tolist() == [4, 6] and batch["place"].tolist() == [9, 10]
    assert batch["epoch"].tolist() == [1, 1] and batch["tail_length"].tolist() == [0, 1]


def test_collator_pads_to_a_multiple():
    batch = DiffusionCollator(0, pad_to_multiple_of=8)([{"input_ids": [1] * 9, "labels": [1] * 9, "row_id": 0}])
    assert batch["input_ids"].shape == (1, 16)
    assert batch["attention_mask"].sum() == 9
