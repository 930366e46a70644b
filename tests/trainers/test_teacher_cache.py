"""A teacher that is read from the disk, against full logits of the parent itself."""

import json

import pytest
import torch
from peft import LoraConfig

from a2d_hf.trainers import TeacherCache, precompute_teacher_logits
from tests.conftest import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.trainers.helpers import bd3lm_trainer, diffusion_model, first_batch, token_rows, trainer, weights
from tests.trainers.test_auxiliary_losses import perturbed, teacher_log_p
from tests.trainers.test_repalign_scripts import arguments, load, texts, write_rows  # noqa: F401


def write_cache(tmp_path, rows, top_k, **fields):
    folder = tmp_path / f"teacher-{top_k}"
    precompute_teacher_logits(diffusion_model(), rows, folder, top_k, **fields)
    return str(folder)


def prepared(tmp_path, rows):
    return trainer(tmp_path, rows=rows).train_dataset


def lumped_kl(log_p, log_q, top_k):
    """Of one position, by a plain loop over the vocabulary."""
    top = set(log_p.argsort(descending=True)[:top_k].tolist())
    kl, rest_p, rest_q = 0.0, 0.0, 0.0
    for v in range(len(log_p)):
        if v in top:
            kl = kl + log_p[v].exp() * (log_p[v] - log_q[v])
        else:
            rest_p, rest_q = rest_p + log_p[v].exp(), rest_q + log_q[v].exp()
    return kl + (rest_p * (rest_p / rest_q).log() if top_k < len(log_p) else 0.0)


def kl_part(tmp_path, rows, make=trainer, **fields):
    """Loss and gradients with the weight 3, less those without."""
    results = []
    for weight in (0.0, 3.0):
        given = fields if weight else {k: v for k, v in fields.items() if k not in ("teacher_logits_cache", "teacher")}
        run = make(tmp_path, diffusion_model(**OBJECTIVES[make]), rows, per_device_train_batch_size=8,
                   teacher_kl_weight=weight, **given)  # fmt: skip
        perturbed(run.model)
        run.model.train()
        loss = run.compute_loss(run.model, first_batch(run))
        results.append((loss, torch.autograd.grad(loss, list(run.model.parameters()))))
    difference = [a - b for a, b in zip(results[1][1], results[0][1], strict=True)]
    return run, results[1][0] - results[0][0], difference


OBJECTIVES = {trainer: {}, bd3lm_trainer: {"objective": "bd3lm", "block_size": 4}}


@pytest.mark.parametrize("top_k", [1, 5, VOCAB_SIZE])
def test_the_lumped_divergence_equals_brute_force(top_k, tmp_path):
    rows = token_rows(8, prompts=False)
    cache = write_cache(tmp_path, prepared(tmp_path, rows), top_k)
    run, loss, gradients = kl_part(tmp_path, rows, teacher_logits_cache=cache)
    assert run.auxiliary.teacher is None
    batch = first_batch(run)
    noise, log_p = run.draw_noise(batch, run.args.seed), teacher_log_p(tiny_model("llama"), batch)
    log_q = run.model(
        input_ids=noise.noised_ids_BL, attention_mask=batch["attention_mask"], attention_pattern="bidirectional"
    ).logits.log_softmax(-1)
    asked = noise.masked_BL.clone()
    asked[:, 0] = False
    kl = sum(lumped_kl(p, q, top_k) for p, q in zip(log_p[asked], log_q[asked], strict=True))
    expected = 3.0 * kl / (batch["labels"] != -100).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    theirs = torch.autograd.grad(expected, list(run.model.parameters()))
    for ours, gradient in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, gradient, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("make", OBJECTIVES)
def test_it_never_exceeds_the_full_divergence_and_reaches_it_with_the_whole_vocabulary(make, tmp_path):
    rows = token_rows(8, prompts=False)
    ready = prepared(tmp_path, rows)
    _, full, full_gradients = kl_part(tmp_path, rows, make)
    values = []
    for top_k in (1, 4, 16, 10_000):
        cache = write_cache(tmp_path, ready, top_k)
        _, value, gradients = kl_part(tmp_path, rows, make, teacher_logits_cache=cache)
        values.append(float(value.detach()))
    assert values == sorted(values) and values[0] < values[2] < float(full)
    assert values[-1] == pytest.approx(float(full), rel=1e-5)
    for ours, theirs in zip(gradients, full_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_teacher_targets_from_a_whole_cache_are_those_of_the_teacher(tmp_path):
    rows, losses = token_rows(8, prompts=False), []
    for cache in (None, write_cache(tmp_path, prepared(tmp_path, rows), VOCAB_SIZE)):
        model = diffusion_model(clean_context="causal", **OBJECTIVES[bd3lm_trainer])
        told = {"teacher_targets": True, "ar_loss_weight": 0.5, "teacher_logits_cache": cache}
        run = bd3lm_trainer(tmp_path, model, rows, per_device_train_batch_size=8, **told)
        assert (run.auxiliary.teacher is None) == (cache is not None)
        perturbed(run.model)
        run.model.train()
        losses.append(run.compute_loss(run.model, first_batch(run)))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_packed_rows_read_their_own_entries(tmp_path):
    rows = token_rows(24)
    cache = write_cache(tmp_path, prepared(tmp_path, rows), 8)
    run = trainer(tmp_path, rows=rows, packing=True, max_length=32, teacher_kl_weight=1.0, teacher_logits_cache=cache)
    order = run.get_train_dataloader().dataset
    packs = order.__getitems__([0, 1])
    losses = []
    for batch in (packs, [row for pack in packs for row in pack["documents"]]):
        run.model.train()
        losses.append(run.compute_loss(run.model, run.data_collator(batch)))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_eos_behind_a_row_has_no_teacher_in_the_cache(tmp_path):
    rows = token_rows(8).map(lambda row: {name: [*row[name], 2] for name in ("input_ids", "labels")})
    cache = write_cache(tmp_path, prepared(tmp_path, rows), 8)
    run = trainer(
        tmp_path, rows=rows, processing_class=tiny_tokenizer(), max_eos_tail=9, max_steps=2, teacher_kl_weight=1.0,
        teacher_logits_cache=cache, logging_steps=1,
    )  # fmt: skip
    assert first_batch(run)["tail_length"].max() > 0
    run.train()
    assert run.state.log_history[1]["teacher_kl"] > 0


def test_a_run_with_an_adapter_reads_the_bases_cache(tmp_path):
    rows = token_rows(8)
    cache = write_cache(tmp_path, prepared(tmp_path, rows), 8)
    run = trainer(
        tmp_path, rows=rows, peft_config=LoraConfig(task_type="CAUSAL_LM"), max_steps=2, learning_rate=1e-2,
        teacher_kl_weight=1.0, teacher_logits_cache=cache,
    )  # fmt: skip
    before = weights(run.model)
    run.train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())


def test_writing_goes_on_where_it_was(tmp_path):
    rows = prepared(tmp_path, token_rows(8))
    folder = tmp_path / "teacher"
    assert precompute_teacher_logits(diffusion_model(), rows, folder, 4) == (8, 0)
    files = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    lost = next(iter(files))
    lost.unlink()
    assert precompute_teacher_logits(diffusion_model(), rows, folder, 4) == (1, 7)
    assert lost.is_file() and not list(folder.rglob("*.writing"))
    assert all(path.read_bytes() == content for path, content in files.items() if path != lost)


def test_half_precision_still_sums_to_one(tmp_path):
    rows = prepared(tmp_path, token_rows(4))
    folder = write_cache(tmp_path, rows, 4, dtype=torch.bfloat16)
    ids, top, rest = TeacherCache.of_model(folder, diffusion_model()).read(rows[0]["input_ids"])
    assert ids.shape == top.shape == (len(rows[0]["input_ids"]) - 1, 4)
    torch.testing.assert_close(top.exp().sum(-1) + rest.exp(), torch.ones(len(rest)))


# ----------------------------------------------------------------------------------------------------------- bad input


def test_a_cache_of_another_model_is_refused(tmp_path):
    rows = token_rows(4)
    cache = write_cache(tmp_path, prepared(tmp_path, rows), 4)
    with pytest.raises(ValueError, match="`teacher_logits_cache` .* was written with another model"):
        trainer(tmp_path, diffusion_model(seed=1), rows, teacher_kl_weight=1.0, teacher_logits_cache=cache)


def test_a_cache_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no teacher_logits.json: write it with scripts/precompute_teacher_lo"):
        trainer(tmp_path, teacher_kl_weight=1.0, teacher_logits_cache=str(tmp_path))


def test_a_cache_begun_with_another_k_is_not_mixed(tmp_path):
    rows = prepared(tmp_path, token_rows(4))
    precompute_teacher_logits(diffusion_model(), rows, tmp_path / "t", 4)
    with pytest.raises(ValueError, match="was begun with another top_k"):
        precompute_teacher_logits(diffusion_model(), rows, tmp_path / "t", 5)


def test_a_row_that_is_not_there_is_named(tmp_path):
    cache = write_cache(tmp_path, prepared(tmp_path, token_rows(4)), 4)
    run = trainer(tmp_path, rows=token_rows(6, seed=5), teacher_kl_weight=1.0, teacher_logits_cache=cache)
    with pytest.raises(ValueError, match="Row [0-5] is not in `teacher_logits_cache`"):
        run.train()


@pytest.mark.parametrize("fields", [{}, {"teacher_kl_weight": 1.0, "teacher": "frozen_copy"}])
def test_a_cache_without_its_loss_is_refused(fields, tmp_path):
    with pytest.raises(ValueError, match="takes the teacher's place"):
        trainer(tmp_path, teacher_logits_cache="x", **fields)


# ---------------------------------------------------------------------------------------------------------- the script


def test_the_script_serves_a_recipe(make_checkpoint, texts, tmp_path):  # noqa: F811
    model, cache = make_checkpoint("llama"), ["--teacher_logits_cache", str(tmp_path / "teacher")]
    script, recipe = load("scripts/precompute_teacher_logits.py"), load("recipes/bd3lm_sft.py")
    told = arguments(model, texts, tmp_path / "out", *cache, "--top_k", "5")
    script.main(*script.make_parser().parse_args_and_config(told))
    assert len(list((tmp_path / "teacher").rglob("*.safetensors"))) == 8
    more = ["--teacher_kl_weight", "0.5", "--logging_steps", "1", "--packing", "true"]
    told = arguments(model, texts, tmp_path / "out", *cache, *more)
    recipe.main(*recipe.make_parser().parse_args_and_config(told))
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert all(entry["teacher_kl"] >= 0 for entry in state["log_history"] if "loss" in entry)


def test_the_script_needs_a_folder(tmp_path):
    script = load("scripts/precompute_teacher_logits.py")
    data = write_rows(tmp_path / "rows", [{"text": "the quick brown fox"}])
    with pytest.raises(ValueError, match="`--teacher_logits_cache` is missing"):
        script.main(*script.make_parser().parse_args_and_config(arguments("x", data, tmp_path / "out")))
