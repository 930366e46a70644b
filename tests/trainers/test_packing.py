"""Packed rows train as the same rows unpacked: same noise, same loss, same gradients, whatever shares a sequence."""

import datasets
import pytest
import torch

from a2d_hf.modeling import A2DForMaskedDiffusion
from a2d_hf.trainers import (
    BD3LMConfig,
    BD3LMTrainer,
    DiffusionCollator,
    MDLMConfig,
    MDLMTrainer,
    RepAlignConfig,
    RepAlignTrainer,
    precompute_anchors,
)
from a2d_hf.trainers.row_packing import PackedEpochOrder, best_fit_decreasing
from tests.conftest import tiny_tokenizer
from tests.trainers.helpers import MASK_ID, diffusion_model, token_rows, trainer, weights


TRAINERS = {
    "mdlm": (MDLMTrainer, MDLMConfig, {}),
    "bd3lm": (BD3LMTrainer, BD3LMConfig, {"objective": "bd3lm", "block_size": 4}),
    "repalign": (RepAlignTrainer, RepAlignConfig, {}),
}


def build(tmp_path, objective="mdlm", rows=None, family="llama", tokenizer=None, token_shift=False, **fields):
    trainer_class, config_class, converted = TRAINERS[objective]
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_length": 32, "use_cpu": True}
    model = diffusion_model(family, token_shift=token_shift, **converted)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # drawn per batch: the one thing that depends on how rows are cut
    return trainer_class(
        model,
        config_class(output_dir=str(tmp_path / "run"), **quiet | fields),
        train_dataset=token_rows(24) if rows is None else rows,
        processing_class=tokenizer,
    )


def packed_and_alone(run) -> tuple[dict, dict]:
    """A packed batch of the trainer, and its rows with a sequence of their own each."""
    dataset = run.get_train_dataloader().dataset
    packs = dataset.__getitems__([0, 1, 2])
    assert max(len(pack["documents"]) for pack in packs) > 1
    collator = DiffusionCollator(0)
    return collator(packs), collator([row for pack in packs for row in pack["documents"]])


def loss_and_gradients(run, batch):
    run.model.train()
    run.model.zero_grad()
    loss = run.compute_loss(run.model, batch)
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in run.model.named_parameters()}


CASES = {
    "mdlm": ("mdlm", {}),
    "mdlm, shifted": ("mdlm", {"token_shift": True}),
    "mdlm, windows": ("mdlm", {"family": "gemma3_text"}),
    "mdlm, learned positions": ("mdlm", {"family": "gpt2"}),
    "mdlm, by sequence": ("mdlm", {"loss_normalization": "sequence"}),
    "mdlm, by masked": ("mdlm", {"loss_normalization": "masked", "loss_weighting": "uniform"}),
    "mdlm, EOS tails": ("mdlm", {"max_eos_tail": 9, "tokenizer": tiny_tokenizer()}),
    "mdlm, auxiliary losses": ("mdlm", {"ar_loss_weight": 0.5, "teacher_kl_weight": 0.7}),
    "mdlm, annealed": ("mdlm", {"attention_anneal_steps": 5}),
    "bd3lm": ("bd3lm", {}),
    "bd3lm, shifted": ("bd3lm", {"token_shift": True}),
    "bd3lm, EOS ends": ("bd3lm", {"tokenizer": tiny_tokenizer()}),
    "bd3lm, two views": ("bd3lm", {"mask_sampling": "bernoulli", "complementary_views": True, "time_epsilon": 0.05}),
    "bd3lm, nested views": ("bd3lm", {"nested_views": 3, "teacher_kl_weight": 0.7}),
    "bd3lm, coins": ("bd3lm", {"mask_sampling": "bernoulli"}),
    "repalign": ("repalign", {}),
    "repalign, all": ("repalign", {"align_positions": "all", "token_shift": True}),
    "repalign, unmasked": ("repalign", {"align_positions": "unmasked", "align_token_share": 0.5}),
}


def ending_rows(count):
    """Rows of which every second one ends with EOS, so that it gets more of them."""
    rows = token_rows(count)
    return rows.map(
        lambda row, i: {name: [*row[name], 2] if i % 2 else row[name] for name in ("input_ids", "labels")},
        with_indices=True,
    )


@pytest.mark.parametrize("name", CASES)
def test_packed_rows_have_the_loss_and_gradients_they_have_alone(name, tmp_path):
    objective, fields = CASES[name]
    run = build(tmp_path, objective, ending_rows(24), packing=True, **fields)
    packed, alone = packed_and_alone(run)
    assert packed["input_ids"].shape[0] == 3 < alone["input_ids"].shape[0]
    if "EOS" in name:
        assert packed["tail_length"].max() > 0
    loss, gradients = loss_and_gradients(run, packed)
    expected, expected_gradients = loss_and_gradients(run, alone)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], rtol=1e-4, atol=2e-5, msg=parameter)


def test_packed_rows_keep_their_noise(tmp_path):
    run = build(tmp_path, packing=True)
    packed, alone = packed_and_alone(run)
    for name in ("row_id", "epoch", "place"):
        assert torch.equal(packed[name], alone[name])
    together, single = run.draw_noise(packed, 5), run.draw_noise(alone, 5)
    in_packed, in_alone = packed["attention_mask"].bool(), alone["attention_mask"].bool()
    assert torch.equal(together.masked_BL[in_packed], single.masked_BL[in_alone])
    assert torch.equal(together.time_B, single.time_B)
    assert single.masked_BL.any()


@pytest.mark.parametrize("objective", TRAINERS)
def test_a_packed_epoch_of_one_step_is_an_unpacked_one(objective, tmp_path):
    """All rows in one step, through `train()`: the same weights, whatever shares a sequence and comes first."""
    final, told = [], []
    # Another order of the rows gives them other times, so both go through the rows as they stand.
    for packing in (False, True):
        run = build(
            tmp_path / str(packing),
            objective,
            packing=packing,
            per_device_train_batch_size=24,
            max_steps=1,
            learning_rate=1e-2,
            optim="sgd",
            logging_steps=1,
            train_sampling_strategy="sequential",
        )
        if packing:  # rows keep the place that they have unpacked
            original = PackedEpochOrder.__getitems__
            PackedEpochOrder.__getitems__ = places_of_the_dataset(original)
        try:
            run.train()
        finally:
            if packing:
                PackedEpochOrder.__getitems__ = original
        final.append(weights(run.model))
        told.append({k: run.state.log_history[0][k] for k in ("loss", "nelbo", "masked_accuracy", "num_tokens")})
    assert told[0] == pytest.approx(told[1], rel=1e-5)
    for name, tensor in final[0].items():
        torch.testing.assert_close(final[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def places_of_the_dataset(original):
    def getitems(self, places):
        packs = original(self, places)
        for pack in packs:
            for row in pack["documents"]:
                row["place"] = max(row["row_id"], 0)
        return packs

    return getitems


@pytest.mark.parametrize("objective", TRAINERS)
def test_accumulation_and_batch_size_change_nothing(objective, tmp_path):
    final = []
    for cut in (
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ):
        run = build(
            tmp_path / str(len(final)),
            objective,
            packing=True,
            num_train_epochs=2,
            learning_rate=1e-2,
            optim="sgd",
            **cut,
        )
        run.train()
        final.append(weights(run.model))
    for name, tensor in final[0].items():
        torch.testing.assert_close(final[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_anchors_serve_packed_rows(tmp_path):
    losses = []
    for anchors in (False, True):
        fields = {}
        if anchors:
            plain = build(tmp_path, "repalign")
            precompute_anchors(plain.model, plain.train_dataset, tmp_path / "anchors", [0, 1, 2], dtype=torch.float32)
            fields = {"anchor_cache": str(tmp_path / "anchors")}
        run = build(tmp_path, "repalign", packing=True, **fields)
        losses.append(loss_and_gradients(run, packed_and_alone(run)[0])[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ the plan


def test_best_fit_decreasing():
    assert best_fit_decreasing([5, 2, 3, 1], 5) == [[0], [1, 2], [3]]
    assert best_fit_decreasing([4, 3, 2, 1], 5) == [[0, 3], [1, 2]]
    lengths = torch.randint(1, 50, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = best_fit_decreasing(lengths, 64)
    assert sorted(item for bin in bins for item in bin) == list(range(300))
    assert all(sum(lengths[item] for item in bin) <= 64 for bin in bins)
    assert len(bins) <= sum(lengths) / 64 * 1.1
    with pytest.raises(ValueError, match="Item 1 of length 9 does not fit into a bin of 8"):
        best_fit_decreasing([3, 9], 8)


def test_every_row_is_in_one_pack_and_no_pack_outgrows_max_length_in_any_epoch(tmp_path):
    run = build(tmp_path, rows=ending_rows(40), packing=True, max_eos_tail=9, tokenizer=tiny_tokenizer())
    order = run.get_train_dataloader().dataset
    assert len(order) < 40
    seen = []
    for epoch in (0, 1):
        order.set_epoch(epoch)
        packs = order.__getitems__(list(range(len(order))))
        rows = [row for pack in packs for row in pack["documents"]]
        assert sorted(row["row_id"] for row in rows) == list(range(40))
        assert [row["place"] for row in rows] == list(range(40))
        assert all(sum(len(row["input_ids"]) for row in pack["documents"]) <= 32 for pack in packs)
        seen.append([row["row_id"] for row in rows])
    assert seen[0] != seen[1]


def test_places_beyond_the_end_are_blank(tmp_path):
    run = build(tmp_path, packing=True)
    order = run.get_train_dataloader().dataset
    found = order.__getitems__([len(order) - 1, len(order)])
    assert [row["row_id"] for row in found[1]["documents"]] == [-1]
    batch = DiffusionCollator(0)(found)
    assert batch["document_ids"][1].unique().tolist() == [len(found[0]["documents"])]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_packed_stream_trains(workers, tmp_path):
    stream = token_rows(40).to_iterable_dataset(num_shards=2)
    before = weights(diffusion_model())
    run = trainer(
        tmp_path, rows=stream, packing=True, max_length=32, max_steps=3, per_device_train_batch_size=2,
        dataloader_num_workers=workers, learning_rate=1e-2,
    )  # fmt: skip
    batch = next(iter(run.get_train_dataloader()))
    assert batch["row_id"].shape[0] > 2 and batch["input_ids"].shape[1] <= 32
    assert len(set(batch["row_id"].tolist())) == batch["row_id"].shape[0]
    run.train()
    assert not torch.equal(run.model.state_dict()["parent.lm_head.weight"], before["parent.lm_head.weight"])


def test_evaluation_is_not_packed(tmp_path):
    nelbo = [
        build(tmp_path, packing=packing).evaluate(token_rows(9, seed=3))["eval_nelbo"] for packing in (False, True)
    ]
    assert nelbo[0] == nelbo[1]


def test_bfd_split_cuts_long_rows_into_pieces(tmp_path):
    rows = datasets.Dataset.from_list([{"input_ids": list(range(3, 103))}, {"input_ids": [5, 6, 7]}])
    run = build(tmp_path, rows=rows, packing=True, packing_strategy="bfd_split")
    assert sum(map(len, run.train_dataset["input_ids"])) == 103
    assert len(run.get_train_dataloader().dataset) == 4


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"packing_strategy": "wrapped"}, "must be 'bfd' or 'bfd_split', not 'wrapped'"),
        ({"max_length": None}, "`packing` needs `max_length`"),
    ],
)
def test_what_packing_cannot_be_told(fields, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        MDLMConfig(output_dir=str(tmp_path), packing=True, **fields)


def test_a_family_without_position_ids_is_refused(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4))
    model = A2DForMaskedDiffusion.from_causal_lm(bloom, mask_token_id=MASK_ID)
    run = trainer(tmp_path, model, packing=True)
    with pytest.raises(ValueError, match="BloomForCausalLM takes no `position_ids`.*`packing=False`"):
        run.train()


def test_a_model_whose_documents_leak_is_refused(tmp_path, monkeypatch):
    run = trainer(tmp_path, diffusion_model(), packing=True)
    forward = A2DForMaskedDiffusion.forward
    monkeypatch.setattr(
        A2DForMaskedDiffusion,
        "forward",
        lambda self, *args, document_ids=None, **kwargs: forward(self, *args, **kwargs),
    )
    with pytest.raises(ValueError, match="rows in one sequence of LlamaForCausalLM move each other's logits"):
        run.train()


def test_an_unpacked_run_is_not_continued_packed(tmp_path):
    assert "packing" not in build(tmp_path).resume_key()  # checkpoints from before there was packing stay good
    assert build(tmp_path, packing=True).resume_key()["packing"] == "bfd"
