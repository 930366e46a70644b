"""Representation alignment against brute force, its teachers against each other, and its anchor cache."""

import json
import math

import pytest
import torch
from peft import LoraConfig

from a2d_hf.trainers import AnchorCache, RepAlignConfig, RepAlignTrainer, precompute_anchors
from a2d_hf.trainers.row_cache import weights_sha256
from tests.conftest import tiny_model
from tests.trainers import reference_noise
from tests.trainers.helpers import (
    assert_refuses_to_resume,
    assert_resumes,
    diffusion_model,
    first_batch,
    token_rows,
    weights,
)


def repalign(tmp_path, model=None, rows=None, **fields):
    arguments = {name: fields.pop(name) for name in ("peft_config", "processing_class") if name in fields}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_length": 64, "use_cpu": True}
    run = RepAlignTrainer(
        diffusion_model() if model is None else model,
        RepAlignConfig(output_dir=str(tmp_path / "run"), **quiet | {"per_device_train_batch_size": 8} | fields),
        train_dataset=token_rows(16) if rows is None else rows,
        **arguments,
    )
    run.model.train()
    return run


def alignment(run, batch):
    """What the alignment adds to the loss of a batch, with its gradients."""
    results, weight = [], run.args.align_weight
    for value in (weight, 0.0):
        run.args.align_weight = value
        loss = run.compute_loss(run.model, batch)
        trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        results.append((loss, torch.autograd.grad(loss, trained, allow_unused=True)))
    run.args.align_weight = weight
    gradients = [a if b is None else a - b for a, b in zip(results[0][1], results[1][1], strict=True) if a is not None]
    return results[0][0] - results[1][0], gradients


def brute_force(run, batch, positions, layers, parent=None):
    """1 - mean cosine, row by row and position by position, from the hidden states of both sides."""
    parent = parent or tiny_model("llama")
    noise = run.draw_noise(batch, run.args.seed)
    cosines = []
    for b in range(batch["input_ids"].shape[0]):
        length = int(batch["attention_mask"][b].sum())
        ids, masked = batch["input_ids"][b, :length], noise.masked_BL[b, :length].tolist()
        with torch.no_grad():
            teacher = parent(ids[None], output_hidden_states=True).hidden_states
        noised = noise.noised_ids_BL[b, :length]
        student = run.model(
            input_ids=noised[None], attention_pattern="bidirectional", output_hidden_states=True
        ).hidden_states
        if positions == "masked_shift":
            chosen = [i - 1 for i in range(1, length) if masked[i]]
        else:
            chosen = [i for i in range(length) if positions == "all" or not masked[i]]
        for layer in layers:
            for i in chosen:
                s, t = student[layer][0, i], teacher[layer][0, i]
                cosines.append((s @ t) / (s.norm() * t.norm()))
    return 1.0 - torch.stack(cosines).mean()


@pytest.mark.parametrize("positions", ["masked_shift", "unmasked", "all"])
@pytest.mark.parametrize("layers", [None, [0, -1]])
def test_loss_and_gradients_equal_brute_force(positions, layers, tmp_path):
    run = repalign(tmp_path, align_weight=3.0, align_positions=positions, align_layers=layers)
    batch = first_batch(run)
    loss, gradients = alignment(run, batch)
    expected = 3.0 * brute_force(run, batch, positions, [0, 1, 2] if layers is None else [0, 2])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    theirs = torch.autograd.grad(expected, list(run.model.parameters()), allow_unused=True)
    for ours, their in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if their is None else their, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_a_student_that_reads_clean_text_causally_is_aligned(family, tmp_path):
    """The same point of the same layer on both sides: with nothing changed, every cosine is exactly 1."""
    run = repalign(tmp_path, diffusion_model(family), align_positions="all")
    run.model.eval()
    run.model.training = True  # dropout off, alignment on
    batch = first_batch(run)
    outputs = run.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        attention_pattern="causal",
        labels=torch.full_like(batch["labels"], -100),
        output_hidden_states=True,
    )
    noise = run.draw_noise(batch, run.args.seed)
    one = torch.ones(())
    assert run.auxiliary_loss(run.model, batch, noise, outputs, one, one).item() == pytest.approx(0.0, abs=1e-5)


def test_the_mean_is_over_the_global_batch(tmp_path):
    """8 rows at once equal 4 times 2 rows, though these have other numbers of masked tokens."""
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        run = repalign(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-2,
            optim="sgd",
        )
        run.train()
        results.append(weights(run.model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_weight_follows_its_schedule(schedule, tmp_path):
    run = repalign(tmp_path, align_weight=4.0, align_weight_schedule=schedule, max_steps=8)
    run.state.max_steps = 8
    found = []
    for step in range(9):
        run.state.global_step = step
        found.append(run.current_align_weight())
    expected = {
        "constant": [4.0] * 9,
        "linear": [4.0 * (1 - step / 8) for step in range(9)],
        "cosine": [2.0 * (1 + math.cos(math.pi * step / 8)) for step in range(9)],
    }
    assert found == pytest.approx(expected[schedule])


def test_sampled_layers_and_tokens_are_keyed_by_the_step(tmp_path):
    run = repalign(tmp_path, align_sample_layers=1, align_token_share=0.5, align_positions="all")
    other, batch = repalign(tmp_path, align_sample_layers=1), first_batch(run)
    masked, layers, chosen = torch.zeros_like(batch["labels"], dtype=torch.bool), set(), []
    for step in range(12):
        run.state.global_step = other.state.global_step = step
        assert run.current_align_layers() == other.current_align_layers()
        layers |= set(run.current_align_layers())
        chosen.append(run.aligned_positions(batch, masked))
        assert torch.equal(chosen[-1], run.aligned_positions(batch, masked))
    assert layers == {0, 1, 2}
    assert not torch.equal(chosen[0], chosen[1])
    share = torch.stack(chosen).float().sum() / (12 * batch["attention_mask"].sum())
    assert share.item() == pytest.approx(0.5, abs=0.08)
    b, i = 3, 2
    bits = reference_noise.bits(7, run.args.seed, 11, int(batch["row_id"][b]), i)
    assert bool(chosen[-1][b, i]) == (bits < 2**52)


def test_a_teacher_with_its_adapter_off_equals_a_frozen_copy(tmp_path):
    losses = []
    for teacher in ("adapters_off", "frozen_copy"):
        lora = LoraConfig(r=4, lora_dropout=0.0, init_lora_weights=False)
        run = repalign(tmp_path, peft_config=lora, teacher=teacher)
        losses.append(alignment(run, first_batch(run))[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    expected = 10.0 * brute_force(run, first_batch(run), "masked_shift", [0, 1, 2])
    torch.testing.assert_close(losses[0], expected, rtol=1e-4, atol=1e-5)


def test_training_brings_student_and_teacher_together(tmp_path):
    """On one batch, before and after; without the alignment the same training leads away from the teacher."""
    after = []
    for weight in (10.0, 0.0):
        run = repalign(tmp_path, max_steps=30, learning_rate=5e-3, align_positions="all", align_weight=weight)
        batch = first_batch(run)
        before = brute_force(run, batch, "all", [0, 1, 2]).item()
        run.train()
        after.append(brute_force(run, batch, "all", [0, 1, 2]).item())
    assert after[0] < 0.9 * before
    assert after[0] < 0.8 * after[1]


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    """Its teacher is the parent again, not the checkpoint, and it draws the same layers and tokens."""
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "align_positions": "unmasked"}
    fields |= {"align_sample_layers": 2, "align_token_share": 0.7, "learning_rate": 5e-3}
    assert_resumes(lambda: repalign(tmp_path, **fields), tmp_path)
    other = repalign(tmp_path, **fields | {"align_token_share": 0.5})
    assert_refuses_to_resume(other, tmp_path, "align_token_share 0.5 .was 0.7.")


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for checkpointing in (False, True):
        run = repalign(tmp_path)
        if checkpointing:
            run.model.gradient_checkpointing_enable()
        loss = run.compute_loss(run.model, first_batch(run))
        results.append((loss, torch.autograd.grad(loss, list(run.model.parameters()))))
    torch.testing.assert_close(results[0][0], results[1][0])
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["embeddings"], {"embed_tokens"}),
        (["head"], {"lm_head"}),
        (["MLP"], {"mlp"}),
        (["embeddings", "self_attn"], {"embed_tokens", "self_attn"}),
    ],
)
def test_frozen_parameters_stay_and_the_others_move(patterns, frozen, tmp_path):
    run = repalign(tmp_path, frozen_parameters=patterns, max_steps=2, learning_rate=1e-2)
    before = weights(run.model)
    run.train()
    for name, tensor in weights(run.model).items():
        assert torch.equal(before[name], tensor) == any(part in name for part in frozen), name


# ------------------------------------------------------------------------------------------------------------- anchors


def anchors(tmp_path, layers=(0, 1, 2), model=None, rows=None, **fields):
    run = repalign(tmp_path, model, rows, align_weight=0.0)
    folder = tmp_path / "anchors"
    fields = {"dtype": torch.float32, "batch_size": 3} | fields
    return folder, precompute_anchors(run.model, run.train_dataset, folder, layers, **fields)


@pytest.mark.parametrize("positions", ["masked_shift", "unmasked", "all"])
def test_anchors_equal_the_live_teacher(positions, tmp_path):
    folder, counts = anchors(tmp_path)
    assert counts == (16, 0)
    live = repalign(tmp_path, align_positions=positions)
    cached = repalign(tmp_path, align_positions=positions, anchor_cache=str(folder), align_layers=[0, 2])
    live.align_layers = [0, 2]
    assert cached.align_teacher is None
    batch = first_batch(live)
    torch.testing.assert_close(alignment(cached, batch)[0], alignment(live, batch)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(target_modules=["q_proj", "down_proj"]),
        LoraConfig(target_modules=["v_proj"], use_dora=True),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5]),
    ],
    ids=["lora", "dora", "modules_to_save", "tokens"],
)
def test_anchors_of_the_base_serve_an_adapter(adapter, tmp_path):
    """They are those of the adapter switched off; another base is refused as ever."""
    folder, _ = anchors(tmp_path)
    live = repalign(tmp_path, align_positions="all", peft_config=adapter)
    cached = repalign(tmp_path, align_positions="all", peft_config=adapter, anchor_cache=str(folder))
    assert cached.align_teacher is None
    batch = first_batch(live)
    torch.testing.assert_close(alignment(cached, batch)[0], alignment(live, batch)[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="was written with another model"):
        repalign(tmp_path, diffusion_model(seed=1), peft_config=adapter, anchor_cache=str(folder))


def test_writing_goes_on_where_it_stopped_and_leaves_no_half_file(tmp_path, monkeypatch):
    written = []
    own = AnchorCache.write_row

    def crash_at_sixth(self, *args):
        if len(written) == 5:
            return 1 / 0
        written.append(1)
        return own(self, *args)

    monkeypatch.setattr(AnchorCache, "write_row", crash_at_sixth)
    with pytest.raises(ZeroDivisionError):
        anchors(tmp_path)
    monkeypatch.setattr(AnchorCache, "write_row", own)
    folder, counts = anchors(tmp_path)
    assert counts == (11, 5)
    assert not list(folder.rglob("*.writing"))
    assert len(list(folder.rglob("*.safetensors"))) == 16


def test_the_key_is_over_model_revision_dtype_layers_and_ids(tmp_path):
    base = {"model_sha256": "a", "revision": None, "dtype": "float32", "layers": [0, 1]}
    keys = {AnchorCache(tmp_path, base).path([1, 2, 3]).name, AnchorCache(tmp_path, base).path([1, 2, 4]).name}
    for name, value in (("model_sha256", "b"), ("revision", "main"), ("dtype", "bfloat16"), ("layers", [0])):
        keys.add(AnchorCache(tmp_path, base | {name: value}).path([1, 2, 3]).name)
    assert len(keys) == 6
    assert all(len(key) == 64 + len(".safetensors") for key in keys)


def test_every_weight_counts_in_the_hash_of_a_model():
    model = tiny_model("llama")
    before = weights_sha256(model)
    assert before == weights_sha256(tiny_model("llama"))
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert weights_sha256(model) != before


def test_anchors_of_another_model_are_refused(tmp_path):
    folder, _ = anchors(tmp_path)
    with pytest.raises(ValueError, match="was written with another model"):
        repalign(tmp_path, diffusion_model(seed=1), anchor_cache=str(folder))
    with pytest.raises(ValueError, match="was begun with another model_sha256"):
        anchors(tmp_path, model=diffusion_model(seed=1))


def test_layers_that_were_not_computed_are_named(tmp_path):
    folder, _ = anchors(tmp_path, layers=[1])
    with pytest.raises(ValueError, match=r"holds the layers \[1\] and not \[0, 2\]"):
        repalign(tmp_path, anchor_cache=str(folder))


def test_a_row_without_anchors_is_an_error_unless_asked_for(tmp_path):
    folder, _ = anchors(tmp_path, rows=token_rows(16).select(range(12)))
    with pytest.raises(ValueError, match="has no anchors in"):
        repalign(tmp_path, anchor_cache=str(folder), max_steps=2).train()
    run = repalign(tmp_path, anchor_cache=str(folder), max_steps=2, logging_steps=2, anchor_strict=False)
    run.train()
    logged = run.state.log_history[0]
    assert logged["rows_without_anchors"] == pytest.approx(4 / 16)
    assert logged["align_loss"] > 0


def test_a_damaged_cache_is_found_out(tmp_path):
    folder, _ = anchors(tmp_path)
    files = sorted(folder.rglob("*.safetensors"))
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(ValueError, match="does not hold the row that its name stands for"):
        repalign(tmp_path, anchor_cache=str(folder), max_steps=2).train()
    assert json.loads((folder / "anchors.json").read_text())["layers"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"align_layers": [0, 3]}, r"`align_layers` \[3\] do not exist: the model has the hidden states 0 to 2"),
        ({"align_sample_layers": 4}, "`align_sample_layers` 4 exceeds the 3 layers"),
        ({"align_token_share": 0.0}, r"`align_token_share` must lie in \(0, 1\]"),
        ({"align_positions": "some"}, "`align_positions` must be"),
        ({"align_weight_schedule": "step"}, "`align_weight_schedule` must be"),
        ({"frozen_parameters": ["wings"]}, "`frozen_parameters` 'wings' is part of no parameter's name"),
        ({"frozen_parameters": ["parent"]}, "leaves nothing to train"),
        ({"anchor_cache": "nowhere"}, "`anchor_cache` nowhere holds no anchors.json"),
        ({"teacher": "adapters_off"}, "needs a model with an adapter"),
    ],
)
def test_bad_values_are_named(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        repalign(tmp_path, **fields)
