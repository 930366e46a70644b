"""MDLMTrainer as a whole: what it accepts, what it trains, what it says, what it refuses."""

import math

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

import a2d_hf.trainers.a2d_trainer as a2d_trainer
from a2d_hf.modeling import A2DForMaskedDiffusion
from a2d_hf.modeling.gates import GateResult
from a2d_hf.trainers import MDLMConfig, MDLMTrainer
from tests.conftest import tiny_model, tiny_tokenizer
from tests.trainers.helpers import MASK_ID, config, diffusion_model, first_batch, token_rows, trainer, weights


def assert_all_moved(before, model):
    for name, now in model.state_dict().items():
        assert not torch.equal(before[name], now), f"Parameter {name} has not changed."


TEXTS = datasets.Dataset.from_list([{"text": "the quick brown fox jumps over the lazy dog"}] * 12)


# ------------------------------------------------------------------------------------------------------ what it trains


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_every_parameter_moves(family, tmp_path):
    model = diffusion_model(family)
    before = weights(model)
    trainer(tmp_path, model, token_rows(64), max_steps=6, learning_rate=1e-2).train()
    assert_all_moved(before, model)


def test_the_loss_falls_to_the_entropy_of_the_data(tmp_path):
    """One sentence, over and over: nothing is left to be uncertain about."""
    run = trainer(
        tmp_path,
        rows=datasets.Dataset.from_list([{"text": "the quick brown fox jumps over the lazy dog"}] * 64),
        processing_class=tiny_tokenizer(),
        max_steps=120,
        learning_rate=1e-2,
        per_device_train_batch_size=32,
        max_eos_tail=0,
    )
    before = run.evaluate(run.train_dataset)["eval_nelbo"]
    run.train()
    after = run.evaluate(run.train_dataset)
    assert before > 3.0 and after["eval_nelbo"] < 0.3
    # All hidden, every position looks alike to a model with relative positions; where half is visible nothing is open.
    assert after["eval_nll_t_0.25_0.50"] < 0.05


# ----------------------------------------------------------------------------------------------------- what it accepts


def test_a_plain_model_is_wrapped_without_copying(tmp_path):
    plain = tiny_model("llama")
    storage = {name: tensor.data_ptr() for name, tensor in plain.named_parameters()}
    before = weights(plain)
    run = MDLMTrainer(plain, config(tmp_path, max_steps=3), train_dataset=TEXTS, processing_class=tiny_tokenizer())
    run.train()
    assert isinstance(run.model, A2DForMaskedDiffusion) and run.model.backbone is plain
    assert {name: tensor.data_ptr() for name, tensor in plain.named_parameters()} == storage
    assert_all_moved(before, plain)


def test_a_plain_model_gets_its_fields_from_model_init_kwargs(tmp_path):
    args = config(tmp_path, model_init_kwargs={"token_shift": True, "mask_token_id": MASK_ID})
    run = MDLMTrainer(tiny_model("llama"), args, train_dataset=token_rows(4))
    assert run.model.config.token_shift and run.model.config.mask_token_id == MASK_ID


def test_a_string_names_an_autoregressive_checkpoint(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    run = MDLMTrainer(str(folder), config(tmp_path, max_steps=2), train_dataset=TEXTS)
    run.train()
    assert run.model.dtype == torch.float32
    assert run.processing_class.mask_token_id == run.model.config.mask_token_id


def test_a_string_names_a_converted_checkpoint(make_checkpoint, tmp_path):
    first = MDLMTrainer(str(make_checkpoint("llama")), config(tmp_path, max_steps=2), train_dataset=TEXTS)
    first.train()
    first.save_model(str(tmp_path / "model"))
    second = MDLMTrainer(str(tmp_path / "model"), config(tmp_path, max_steps=1), train_dataset=TEXTS)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor)
    second.train()


def test_a_saved_model_is_read_by_the_parents_own_class(make_checkpoint, tmp_path):
    run = MDLMTrainer(str(make_checkpoint("llama")), config(tmp_path, max_steps=2), train_dataset=TEXTS)
    run.train()
    run.save_model(str(tmp_path / "model"))
    from transformers import LlamaForCausalLM

    parent = LlamaForCausalLM.from_pretrained(tmp_path / "model", config=run.model.config.text_config)
    for name, tensor in run.model.backbone.state_dict().items():
        assert torch.equal(parent.state_dict()[name], tensor)


def test_arguments_may_be_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = MDLMTrainer(diffusion_model(), train_dataset=token_rows(4))
    assert isinstance(run.args, MDLMConfig) and run.args.output_dir == "model-MDLM"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_trains(workers, tmp_path):
    stream = token_rows(10).to_iterable_dataset(num_shards=2)
    model = diffusion_model()
    before = weights(model)
    run = trainer(tmp_path, model, stream, max_steps=4, dataloader_num_workers=workers, learning_rate=1e-2)
    run.train()
    assert run.state.global_step == 4  # 32 rows: the stream of 10 was read again
    assert_all_moved(before, model)


def test_prepared_rows_are_taken_as_they_are(tmp_path):
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6]}] * 4)
    run = trainer(tmp_path, rows=rows, dataset_kwargs={"skip_prepare_dataset": True}, max_steps=1)
    assert run.train_dataset is rows
    run.train()


def test_rows_never_exceed_the_models_context(tmp_path):
    """`max_length` is 1024 by default; the tiny models end at 128."""
    rows = datasets.Dataset.from_list([{"input_ids": [5] * 300}] * 2)
    run = trainer(tmp_path, diffusion_model("gpt2"), rows, max_length=1024, max_steps=1)
    assert run.train_dataset["input_ids"][0] == [5] * 128
    assert run.dataset_reports["train"].truncated_tokens == 2 * 172
    run.train()


# --------------------------------------------------------------------------------------------------------------- gates


def test_the_reach_gate_runs_when_training_begins(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    assert run.gate_result is None
    run.train()
    assert run.gate_result.name == "reach" and run.gate_result.passed


def test_a_failed_gate_stops_before_anything_is_trained(tmp_path, monkeypatch):
    closed = GateResult("reach", False, "layer 1 sees no later token")
    monkeypatch.setattr(a2d_trainer, "reach_gate", lambda model: closed)
    model = diffusion_model()
    before = weights(model)
    with pytest.raises(RuntimeError, match="Training was not begun.*layer 1 sees no later token"):
        trainer(tmp_path, model, max_steps=1).train()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# -------------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("normalization", ["token", "sequence", "masked"])
def test_accumulation_changes_nothing(normalization, tmp_path):
    """8 rows at once, 8 times 1 row and 4 times 2 rows are the same steps, also in the short last step of an epoch."""
    final, losses = [], []
    for batch_size, accumulation in ((8, 1), (1, 8), (2, 4)):
        model = diffusion_model()
        run = trainer(
            tmp_path,
            model,
            token_rows(21),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=2,
            learning_rate=1e-2,
            optim="sgd",
            logging_steps=1,
            loss_normalization=normalization,
        )
        run.train()
        final.append(weights(model))
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    for other, other_losses in zip(final[1:], losses[1:], strict=True):
        assert other_losses == pytest.approx(losses[0], rel=1e-4)
        for name, tensor in final[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


def test_evaluation_between_steps_changes_no_step(tmp_path):
    """After an evaluation the model is still in evaluation mode when the next batches are counted."""
    final = []
    for fields in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        model = diffusion_model()
        args = config(tmp_path, max_steps=4, loss_normalization="masked", **fields)
        MDLMTrainer(model, args, train_dataset=token_rows(40), eval_dataset=token_rows(8)).train()
        final.append(weights(model))
    assert all(torch.equal(final[1][name], tensor) for name, tensor in final[0].items())


def test_order_and_noise_differ_from_epoch_to_epoch(tmp_path):
    run = trainer(tmp_path, num_train_epochs=2, per_device_train_batch_size=16)
    seen = []
    compute_loss = run.compute_loss

    def spy(model, inputs, *args, **kwargs):
        seen.append((inputs["epoch"].tolist(), inputs["row_id"].tolist(), run.draw_noise(inputs, 42).time_B.tolist()))
        return compute_loss(model, inputs, *args, **kwargs)

    run.compute_loss = spy
    run.train()
    assert [set(epochs) for epochs, _, _ in seen] == [{0}, {1}]
    assert sorted(seen[0][1]) == sorted(seen[1][1]) and seen[0][1] != seen[1][1]
    assert seen[0][2] != seen[1][2]


# ------------------------------------------------------------------------------------------------- evaluation, metrics


def test_evaluation_is_one_sum_over_one_sum(tmp_path):
    """An average of batch averages would depend on how rows of different length fall into batches."""
    results = []
    for batch_size in (1, 3, 8):
        args = config(tmp_path, per_device_eval_batch_size=batch_size)
        results.append(MDLMTrainer(diffusion_model(), args, eval_dataset=token_rows(11)).evaluate())
    for result in results[1:]:
        for name in ("eval_loss", "eval_nelbo", "eval_masked_accuracy"):
            assert result[name] == pytest.approx(results[0][name], rel=1e-5)
    assert results[0]["eval_loss"] == pytest.approx(results[0]["eval_nelbo"], rel=1e-6)


def test_several_evaluation_sets_are_told_apart(tmp_path):
    sets = {"a": token_rows(4, seed=1), "b": token_rows(4, seed=2)}
    run = MDLMTrainer(diffusion_model(), config(tmp_path), eval_dataset=sets)
    metrics = run.evaluate()
    assert metrics["eval_a_nelbo"] != metrics["eval_b_nelbo"]
    assert run.evaluate(sets)["eval_b_nelbo"] == metrics["eval_b_nelbo"]
    assert run.evaluate("a", metric_key_prefix="again")["again_nelbo"] == metrics["eval_a_nelbo"]


def test_compute_metrics_gets_full_logits_and_masked_labels(tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        hidden = prediction.label_ids != -100
        hits = prediction.predictions.argmax(-1)[hidden] == prediction.label_ids[hidden]
        return {"accuracy": float(hits.mean())}

    run = MDLMTrainer(diffusion_model(), config(tmp_path), eval_dataset=token_rows(6), compute_metrics=compute_metrics)
    metrics = run.evaluate()
    assert seen["shape"][0] == 6 and seen["shape"][2] == 128
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_masked_accuracy"])


def test_training_logs_what_the_loss_is_made_of(tmp_path):
    run = trainer(tmp_path, rows=token_rows(64), max_steps=4, logging_steps=2, per_device_train_batch_size=16)
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        bins = [entry[f"nll_t_{b}"] for b in ("0.00_0.25", "0.25_0.50", "0.50_0.75", "0.75_1.00")]
        assert all(math.isfinite(value) and value > 0 for value in bins)
        assert 0 <= entry["masked_accuracy"] <= 1 and entry["nelbo"] > 0
    assert logged[1]["num_tokens"] == sum(len(row["input_ids"]) for row in run.train_dataset)


def test_metrics_equal_plain_sums(tmp_path):
    run = trainer(tmp_path, per_device_train_batch_size=16)
    batch = first_batch(run)
    run.model.train()
    outputs = run.compute_loss(run.model, batch, return_outputs=True)[1]
    noise = run.draw_noise(batch, run.args.seed)
    metrics = run._metrics["train"].result(run.accelerator)
    weight_N = noise.elbo_weight_B[:, None].expand_as(noise.masked_BL)[noise.masked_BL]
    assert metrics["nelbo"] == pytest.approx(
        ((outputs.token_nll * weight_N).sum() / (batch["labels"] != -100).sum()).item(), rel=1e-5
    )
    early_N = (noise.time_B[:, None].expand_as(noise.masked_BL) < 0.25)[noise.masked_BL]
    assert metrics["nll_t_0.00_0.25"] == pytest.approx(outputs.token_nll[early_N].mean().item(), rel=1e-5)
    assert metrics["masked_accuracy"] == pytest.approx(outputs.token_hit.float().mean().item())


def test_the_reported_nelbo_leaves_the_tail_of_eos_out(tmp_path):
    rows = datasets.Dataset.from_list([{"text": "the quick brown fox"}] * 32)
    nelbo, loss = {}, {}
    for tail in (0, 40):
        run = trainer(
            tmp_path, rows=rows, processing_class=tiny_tokenizer(), max_eos_tail=tail, per_device_train_batch_size=32
        )
        with torch.no_grad():  # a model that is certain of EOS and knows nothing else: the tail costs it nothing
            head = run.model.get_output_embeddings()
            head.weight.zero_()
            head.bias = torch.nn.Parameter(torch.zeros(128))
            head.bias[2] = 30.0
        batch = first_batch(run)
        run.model.train()
        loss[tail] = run.compute_loss(run.model, batch).item()
        nelbo[tail] = run._metrics["train"].result(run.accelerator)["nelbo"]
        assert int(batch["tail_length"].max()) == tail or 30 <= int(batch["tail_length"].max()) <= 40
    assert nelbo[40] == pytest.approx(nelbo[0], rel=0.15)
    assert loss[40] < 0.5 * loss[0]


def test_the_tail_is_for_training_only(tmp_path):
    run = MDLMTrainer(
        diffusion_model(), config(tmp_path), train_dataset=TEXTS, eval_dataset=TEXTS, processing_class=tiny_tokenizer()
    )
    assert next(iter(run.get_train_dataloader()))["tail_length"].sum() > 0
    assert next(iter(run.get_eval_dataloader()))["tail_length"].sum() == 0


# ----------------------------------------------------------------------------------------------------------- bad input


class PoisonWeights(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    run = trainer(
        tmp_path, rows=token_rows(64), max_steps=8, save_strategy="steps", save_steps=2, callbacks=[PoisonWeights(3)]
    )
    with pytest.raises(FloatingPointError, match=r"nan in step 4, in the batch with rows \[.*checkpoint-2\."):
        run.train()
    kept = A2DForMaskedDiffusion.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert all(torch.isfinite(tensor).all() for tensor in kept.parameters())


def test_weights_that_are_not_numbers_are_never_saved(tmp_path):
    run = trainer(
        tmp_path, rows=token_rows(64), max_steps=8, save_strategy="steps", save_steps=2, callbacks=[PoisonWeights(4)]
    )
    with pytest.raises(
        FloatingPointError, match=r"not finite after step 4.*The last good checkpoint is .*checkpoint-2"
    ):
        run.train()
    assert not (tmp_path / "run" / "checkpoint-4").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"noise_schedule": "quadratic"}, "`noise_schedule` must be one of linear, cosine"),
        ({"loss_weighting": "flat"}, "`loss_weighting` must be 'elbo' or 'uniform'"),
        ({"loss_normalization": "batch"}, "`loss_normalization` must be 'token', 'sequence' or 'masked'"),
        ({"time_epsilon": 0.0}, "`time_epsilon` must lie between 0 and 1"),
        ({"max_eos_tail": -1}, "`max_eos_tail` must be 0 or more"),
        ({"max_length": 1}, "`max_length` must be at least 2"),
        ({"truncation_mode": "keep_end"}, "`truncation_mode` must be 'keep_start' or 'chunk'"),
        ({"remove_unused_columns": True}, "`remove_unused_columns` must be False"),
        ({"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy` must be 'random' or 'sequential'"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` must be 0"),
    ],
)
def test_bad_configuration_is_named(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


def test_a_model_of_another_objective_is_refused(tmp_path):
    with pytest.raises(ValueError, match="converted for objective 'bd3lm'.*trains 'mdlm'.*objective='mdlm'"):
        trainer(tmp_path, diffusion_model(objective="bd3lm", block_size=4))


def test_a_configuration_of_another_trainer_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`args` must be a MDLMConfig, not a TrainingArguments"):
        MDLMTrainer(diffusion_model(), TrainingArguments(str(tmp_path)), train_dataset=token_rows(4))


def test_a_stream_without_a_number_of_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`max_steps` must be set"):
        trainer(tmp_path, rows=token_rows(4).to_iterable_dataset())


def test_a_dataset_of_another_kind_is_refused(tmp_path):
    with pytest.raises(TypeError, match="The train dataset must be a `datasets.Dataset`.*not a `list`"):
        trainer(tmp_path, rows=[{"text": "the"}])


def test_an_unknown_eos_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`eos_token` '<end>' is not in the tokenizer's vocabulary"):
        trainer(tmp_path, rows=TEXTS, processing_class=tiny_tokenizer(), eos_token="<end>")


@pytest.mark.parametrize("step", ["train", "evaluate"])
def test_a_collator_that_drops_the_row_is_refused(step, tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.eval_dataset = run.train_dataset
    ours = run.data_collator
    run.data_collator = lambda rows: {name: t for name, t in ours(rows).items() if name not in ("place", "row_id")}
    with pytest.raises(ValueError, match="The batch has no row_id, place: `data_collator` must pass on"):
        getattr(run, step)()


def test_a_model_without_a_tokenizer_or_mask_id_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mask_token_id"):
        trainer(tmp_path, tiny_model("llama"))


def test_auto_model_objects_are_plain_models(make_checkpoint, tmp_path):
    folder = make_checkpoint("qwen3")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    run = MDLMTrainer(plain, config(tmp_path, max_steps=1), train_dataset=TEXTS)  # finds its tokenizer by itself
    run.train()
    assert run.model.backbone is plain
