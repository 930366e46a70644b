"""BD3LM training around its loss: models and rows, ends, curriculum, invariances, bad input."""

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from a2d_hf.modeling import A2DForMaskedDiffusion
from a2d_hf.trainers import BD3LMConfig, BD3LMTrainer
from tests.conftest import tiny_model, tiny_tokenizer
from tests.trainers.helpers import (
    assert_refuses_to_resume,
    assert_resumes,
    bd3lm_trainer,
    diffusion_model,
    first_batch,
    token_rows,
    weights,
)


def test_training_moves_the_weights_and_lowers_the_nelbo(tmp_path):
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6, 7, 8] * 4}] * 64)
    run = bd3lm_trainer(tmp_path, rows=rows, eval_dataset=rows, max_steps=40, learning_rate=5e-3)
    before, nelbo = weights(run.model), run.evaluate()["eval_nelbo"]
    run.train()
    moved = [name for name, tensor in weights(run.model).items() if not torch.equal(before[name], tensor)]
    assert len(moved) == len(before)
    assert run.evaluate()["eval_nelbo"] < 0.5 * nelbo


def test_a_plain_causal_model_is_wrapped_and_itself_trained(tmp_path):
    parent = tiny_model("llama")
    before = weights(parent)
    args = BD3LMConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True
    )
    args.max_length, args.model_init_kwargs = 64, {"mask_token_id": 120, "token_shift": True}
    run = BD3LMTrainer(parent, args, train_dataset=token_rows(8))
    assert run.model.backbone is parent
    config = run.model.config
    assert (config.objective, config.block_size, config.token_shift) == ("bd3lm", 32, True)
    run.train()
    assert not torch.equal(before["lm_head.weight"], parent.lm_head.weight)


def test_a_saved_model_keeps_its_block_size_and_a_wanted_one_wins(make_checkpoint, tmp_path):
    parent, saved = make_checkpoint("llama"), tmp_path / "saved"
    fields = {"report_to": "none", "use_cpu": True, "max_length": 64, "disable_tqdm": True}
    rows = datasets.Dataset.from_list([{"text": "the quick brown fox"}] * 4)
    first = BD3LMTrainer(
        str(parent),
        BD3LMConfig(str(tmp_path / "a"), block_size=8, clean_context="causal", **fields),
        train_dataset=rows,
    )
    first.save_model(str(saved))
    kept = BD3LMTrainer(str(saved), BD3LMConfig(str(tmp_path / "b"), **fields), train_dataset=rows)
    assert (kept.model.config.block_size, kept.model.config.clean_context) == (8, "causal")
    other = BD3LMTrainer(str(saved), BD3LMConfig(str(tmp_path / "c"), block_size=4, **fields), train_dataset=rows)
    assert other.model.config.block_size == 4


def text_trainer(tmp_path, **fields):
    rows = datasets.Dataset.from_list([{"prompt": "Q: 1 + 1? A:", "completion": " " + "a" * n} for n in range(1, 9)])
    model = diffusion_model(objective="bd3lm", block_size=8)
    return bd3lm_trainer(
        tmp_path, model, rows, processing_class=tiny_tokenizer(), per_device_train_batch_size=8, **fields
    )


def test_the_last_block_is_filled_with_eos_that_are_trained_and_not_reported(tmp_path):
    run = text_trainer(tmp_path)
    batch, eos = first_batch(run), run.processing_class.eos_token_id
    lengths = batch["attention_mask"].sum(-1)
    assert (lengths % 8 == 0).all() and len(set(batch["tail_length"].tolist())) > 1
    for b in range(8):
        end, tail = int(lengths[b]), int(batch["tail_length"][b])
        assert 0 <= tail < 8
        assert (batch["labels"][b, end - tail - 1 : end] == eos).all()
        assert batch["labels"][b, end - tail - 2] != eos
    run.model.train()
    outputs = run.compute_loss(run.model, batch, return_outputs=True)[1]
    noise = run.draw_noise(batch, run.args.seed)
    text = torch.arange(batch["labels"].shape[1]) < (lengths - batch["tail_length"])[:, None]
    counted = (text & (batch["labels"] != -100)).sum()
    weighted = outputs.token_nll * noise.elbo_weight_BWL[noise.masked_BWL]
    expected = weighted[text[:, None][noise.masked_BWL]].sum() / counted
    assert run._metrics["train"].result(run.accelerator)["nelbo"] == pytest.approx(expected.item(), rel=1e-5)
    assert noise.masked_BL[~text].any()


def test_nothing_is_filled_where_the_row_does_not_end_or_nobody_wants_it(tmp_path):
    assert (first_batch(text_trainer(tmp_path, fill_last_block=False))["tail_length"] == 0).all()
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 2]}])
    run = bd3lm_trainer(tmp_path, rows=rows, processing_class=tiny_tokenizer(), per_device_train_batch_size=2)
    batch = first_batch(run)
    tails = zip(batch["input_ids"][:, 2].tolist(), batch["tail_length"].tolist(), strict=True)
    assert sorted(tails) == [(2, 1), (7, 0)]


def test_prompts_are_never_masked(tmp_path):
    run = text_trainer(tmp_path, mask_sampling="bernoulli", time_epsilon=0.99)
    run.model.train()
    batch = first_batch(run)
    noise = run.draw_noise(batch, seed=0)
    assert noise.masked_BL.sum() > 0.9 * (batch["labels"] != -100).sum()
    assert not noise.masked_BL[batch["labels"] == -100].any()
    assert torch.equal(noise.noised_ids_BWL[:, 0][~noise.masked_BL], batch["input_ids"][~noise.masked_BL])


def test_the_curriculum_walks_through_its_sizes_and_evaluation_uses_the_last(tmp_path):
    sizes = []
    run = bd3lm_trainer(
        tmp_path,
        eval_dataset=token_rows(4, seed=1),
        max_steps=8,
        logging_steps=1,
        block_size_curriculum=[1, 2, 4],
        block_size_curriculum_steps=6,
    )
    before = run.evaluate()["eval_nelbo"]
    same = bd3lm_trainer(tmp_path, eval_dataset=token_rows(4, seed=1)).evaluate()["eval_nelbo"]
    assert before == same
    own = run.draw_noise
    run.draw_noise = lambda *args: sizes.append(own(*args)) or sizes[-1]
    run.train()
    assert [noise.block_size for noise in sizes] == [1, 1, 1, 2, 2, 2, 4, 4]
    logged = [entry["block_size"] for entry in run.state.log_history if "block_size" in entry]
    assert logged == [1, 1, 1, 2, 2, 2, 4, 4]


def test_with_token_shift_the_curriculum_starts_at_the_parent(tmp_path):
    rows, parent = token_rows(8, longest=20), tiny_model("llama", seed=3)
    model = diffusion_model(seed=3, objective="bd3lm", block_size=8, token_shift=True)
    run = bd3lm_trainer(
        tmp_path,
        model,
        rows,
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=8,
        block_size_curriculum=[1, 8],
    )
    run.train()
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = parent(ids[None]).logits[0, :-1][labels != -100]
        total += torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum").item()
        count += int((labels != -100).sum())
    assert run.state.log_history[0]["nelbo"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.real_data
def test_block_size_one_is_the_likelihood_of_a_real_parent(real_data, tmp_path):
    """stories260K before the first step: the NELBO of its text is its own negative log-likelihood, token by token."""
    folder = real_data / "models" / "stories260K"
    stories = (real_data / "corpora" / "tinystories_train.txt").read_text(encoding="utf-8")[:4000].split("\n\n")
    rows = datasets.Dataset.from_list([{"text": story} for story in stories if len(story) > 40])
    args = BD3LMConfig(
        output_dir=str(tmp_path), block_size=1, model_init_kwargs={"token_shift": True}, report_to="none",
        max_length=128, insert_eos=False, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    run = BD3LMTrainer(str(folder), args, train_dataset=rows, eval_dataset=rows)
    parent, total, count = AutoModelForCausalLM.from_pretrained(folder).eval(), 0.0, 0
    for row in run.eval_dataset:
        with torch.no_grad():
            log_p = parent(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        total -= sum(float(log_p[i - 1, token]) for i, token in enumerate(row["input_ids"]) if i)
        count += len(row["input_ids"]) - 1
    assert count > 500
    assert run.evaluate()["eval_nelbo"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    "views",
    [
        {},
        {"complementary_views": True},
        {"nested_views": 4, "nested_orders": 4, "teacher_targets": True},
    ],
)
def test_accumulation_changes_nothing(views, tmp_path):
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        run = bd3lm_trainer(
            tmp_path,
            rows=token_rows(16),
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            **views,
            learning_rate=1e-2,
            optim="sgd",
        )
        run.train()
        results.append(weights(run.model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_resumed_run_equals_an_unbroken_one_and_knows_its_curriculum(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    fields |= {"block_size_curriculum": [1, 4], "block_size_curriculum_steps": 3}
    assert_resumes(lambda: bd3lm_trainer(tmp_path, **fields), tmp_path)
    other = bd3lm_trainer(tmp_path, **fields | {"block_size_curriculum_steps": 2})
    assert_refuses_to_resume(other, tmp_path, "block_size_curriculum_steps 2 .was 3.")


def test_compute_metrics_gets_the_logits_of_the_noisy_half(tmp_path):
    seen = []
    run = bd3lm_trainer(tmp_path, eval_dataset=token_rows(4, seed=1), per_device_eval_batch_size=4)
    run.compute_metrics = lambda prediction: seen.append(prediction) or {}
    nelbo = run.evaluate()["eval_nelbo"]
    logits, labels = torch.tensor(seen[0].predictions), torch.tensor(seen[0].label_ids)
    batch = next(iter(run.get_eval_dataloader()))
    noise = run.draw_noise(batch, run.args.eval_noise_seed)
    assert torch.equal(labels != -100, noise.masked_BL)
    nll = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")
    expected = (nll * noise.elbo_weight_BWL[noise.masked_BWL]).sum() / (batch["labels"] != -100).sum()
    assert nelbo == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mask_sampling": "bernoulli", "complementary_views": True, "noise_schedule": "cosine"},
            "needs `noise_schedule='linear'`",
        ),
        ({"mask_sampling": "bernoulli", "complementary_views": True, "time_maximum": 1.0}, "symmetric about 1/2"),
        (
            {"mask_sampling": "bernoulli", "time_epsilon": 0.5, "time_maximum": 0.4},
            "0 < time_epsilon < time_maximum <= 1",
        ),
        ({"mask_sampling": "stratified"}, "must be 'count' or 'bernoulli', not 'stratified'"),
        ({"time_maximum": 0.9}, "`time_maximum` is about times"),
        ({"noise_schedule": "cosine"}, "`noise_schedule` is about times"),
        ({"teacher_targets": True, "teacher_kl_weight": 1.0}, "leave `teacher_kl_weight` out"),
        ({"nested_orders": 0}, "`nested_orders` must be at least 1, not 0"),
        ({"nested_orders": 5}, "`nested_orders` 5 exceeds the block size 4"),
        ({"nested_orders": 2, "complementary_views": True}, "choose one"),
        ({"nested_orders": 2, "mask_sampling": "bernoulli"}, "`nested_orders` counts the tokens"),
        ({"nested_views": 0}, "`nested_views` must be at least 1, not 0"),
        ({"nested_views": 5}, "`nested_views` 5 exceeds the block size 4"),
        ({"nested_views": 2, "complementary_views": True}, "choose one"),
        ({"nested_views": 2, "mask_sampling": "bernoulli"}, "set `mask_sampling='count'`"),
        ({"block_size_curriculum": [1, 3, 4]}, "each size dividing the next: 4 does not follow 3"),
        ({"block_size_curriculum": [4, 1]}, "1 does not follow 4"),
        ({"block_size_curriculum": [1, 8]}, "block_size 4, and this trainer trains 8"),
        ({"block_size_curriculum_steps": 5}, "needs a `block_size_curriculum`"),
        ({"max_length": 30}, "`block_size` 4 must divide `max_length` 30"),
        ({"noise_schedule": "sine"}, "`noise_schedule` must be one of"),
        ({"clean_context": "open"}, "`clean_context` must be"),
    ],
)
def test_bad_values_are_named(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        if "clean_context" in fields:
            BD3LMConfig(output_dir=str(tmp_path), use_cpu=True, **fields)
        else:
            bd3lm_trainer(tmp_path, **fields)


def test_a_model_of_another_objective_is_refused(tmp_path):
    with pytest.raises(ValueError, match="converted for objective 'mdlm', and this trainer trains 'bd3lm'"):
        bd3lm_trainer(tmp_path, diffusion_model())
    other = A2DForMaskedDiffusion.from_causal_lm(
        tiny_model("llama"), mask_token_id=120, objective="bd3lm", block_size=16
    )
    args = BD3LMConfig(output_dir=str(tmp_path), use_cpu=True, block_size=8)
    with pytest.raises(ValueError, match="block_size 16, and this trainer trains 8"):
        BD3LMTrainer(other, args)
