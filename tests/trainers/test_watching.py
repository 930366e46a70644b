"""What a person sees of a training: metrics, decoded prompts, the best model, the model card."""

import json
import shutil
import types

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

import a2d_hf.trainers.measured_trainer as measured_trainer
from a2d_hf.modeling import A2DForMaskedDiffusion
from a2d_hf.trainers import DecodePromptsCallback, MDLMConfig, MDLMTrainer
from a2d_hf.trainers.hardware import peak_flops
from tests.conftest import tiny_tokenizer
from tests.trainers.helpers import bd3lm_trainer, config, diffusion_model, token_rows, trainer, weights


def training_logs(run):
    return [entry for entry in run.state.log_history if "loss" in entry]


# ------------------------------------------------------------------------------------------------------------- metrics


def test_the_gradient_is_compared_with_the_parameters(tmp_path):
    run = trainer(tmp_path, max_steps=1, logging_steps=1, learning_rate=0.0, per_device_train_batch_size=16)
    run.train()
    run.model.zero_grad()
    run.model.train()
    run.state.global_step = 0
    run.compute_loss(run.model, next(iter(run.get_train_dataloader()))).backward()
    pairs = [(w.detach().flatten(), w.grad.flatten()) for w in run.model.parameters()]
    size = torch.cat([weight for weight, _ in pairs]).norm()
    slope = torch.cat([gradient for _, gradient in pairs]).norm()
    assert training_logs(run)[0]["grad_to_param_ratio"] == pytest.approx(float(slope / size), rel=1e-4)


def test_only_what_is_trained_counts_as_a_parameter(tmp_path):
    run = trainer(tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM"), max_steps=1, logging_steps=1)
    run.train()
    entry = training_logs(run)[0]
    size = torch.cat([w.detach().flatten() for w in run.model.parameters() if w.requires_grad]).norm()
    assert entry["grad_to_param_ratio"] == pytest.approx(entry["grad_norm"] / float(size), rel=1e-4)


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_speed_is_tokens_over_time_and_work_over_peak(objective, tmp_path, monkeypatch):
    """A clock that goes two seconds a look, and a device of 1 MFLOP/s."""
    looks = iter(range(0, 1000, 2))
    monkeypatch.setattr(measured_trainer.time, "perf_counter", lambda: float(next(looks)))
    monkeypatch.setattr(measured_trainer, "device_peak_flops", lambda device: 1e6)
    # Two steps over the same rows: a canvas reads each token once; blocks of 4 read twice what stands in one with a
    # target, and once the first block, which is a prompt.
    rows = datasets.Dataset.from_list([{"input_ids": [*range(5, 15)], "labels": [-100] * 5 + [*range(10, 15)]}] * 16)
    make, read = (trainer, 10 * 8) if objective == "mdlm" else (bd3lm_trainer, (10 + 6) * 8)
    run = make(tmp_path, rows=rows, max_steps=2, logging_steps=1, bf16=True)
    run.train()
    first, second = training_logs(run)
    tokens = second["num_tokens"] - first["num_tokens"]
    assert tokens == 10 * 8
    assert second["tokens_per_second"] == tokens / 2.0
    embeddings = run.model.get_input_embeddings().weight.numel()
    parameters = sum(weight.numel() for weight in run.model.parameters()) - embeddings
    assert second["mfu"] == pytest.approx(6 * parameters * read / (2.0 * 1e6))


def test_a_cpu_has_no_peak_and_says_nothing_of_it(tmp_path):
    run = trainer(tmp_path, max_steps=1, logging_steps=1)
    run.train()
    entry = training_logs(run)[0]
    assert entry["tokens_per_second"] > 0 and "mfu" not in entry and "peak_memory_gib" not in entry


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA H200", 989e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Something A1000", None),
    ],
)
def test_peaks_go_by_the_whole_name(name, peak):
    assert peak_flops(name) == peak


# ----------------------------------------------------------------------------------------------------- decoded prompts

DECODING = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
}
PROMPTS = ["the quick brown", "a model reads"]


def decoding_run(folder, callback=True, **fields):
    run = trainer(folder, diffusion_model("gpt2"), processing_class=tiny_tokenizer(), **DECODING | fields)
    if callback:
        told = {"every_n_steps": 2, "max_new_tokens": 8, "do_sample": True, "temperature": 1.0}
        told["suppress_tokens"] = [tiny_tokenizer().eos_token_id]  # a model this small may end where it begins
        run.add_callback(DecodePromptsCallback(run, PROMPTS, **told))
    return run


def lines(folder):
    return [json.loads(line) for line in (folder / "run" / "decoded.jsonl").read_text().splitlines()]


def test_prompts_are_decoded_and_the_training_does_not_notice(tmp_path):
    """Dropout draws from the same generators, so one number drawn by the callback would move every weight."""
    silent = decoding_run(tmp_path / "silent", callback=False)
    silent.train()
    decoded = decoding_run(tmp_path / "decoded")
    decoded.train()
    final = weights(silent.model)
    assert all(torch.equal(final[name], tensor) for name, tensor in decoded.model.state_dict().items())
    found = lines(tmp_path / "decoded")
    assert [(row["step"], row["prompt"]) for row in found] == [(s, p) for s in (2, 4, 6) for p in PROMPTS]
    assert all(row["text"] and row["tokens_per_forward"] > 0 for row in found)
    logged = [e["decoded_tokens_per_forward"] for e in decoded.state.log_history if "decoded_tokens_per_forward" in e]
    assert logged[-1] == pytest.approx(sum(row["tokens_per_forward"] for row in found[-2:]) / 2)
    assert decoded.model.training


def test_a_resumed_run_writes_the_lines_of_an_unbroken_one(tmp_path):
    unbroken = decoding_run(tmp_path / "a")
    unbroken.train()
    shutil.copytree(tmp_path / "a" / "run", tmp_path / "b" / "run")
    shutil.rmtree(tmp_path / "b" / "run" / "checkpoint-6")
    resumed = decoding_run(tmp_path / "b")
    resumed.train(resume_from_checkpoint=True)
    final = weights(unbroken.model)
    assert all(torch.equal(final[name], tensor) for name, tensor in resumed.model.state_dict().items())
    assert lines(tmp_path / "b") == lines(tmp_path / "a")


def test_texts_reach_tensorboard_and_wandb(tmp_path, monkeypatch):
    from transformers.integrations import TensorBoardCallback, WandbCallback

    seen = []
    run = decoding_run(tmp_path, max_steps=2, save_strategy="no")
    board, bias = TensorBoardCallback.__new__(TensorBoardCallback), WandbCallback.__new__(WandbCallback)
    board.tb_writer = types.SimpleNamespace(add_text=lambda *args: seen.append(args))
    bias._wandb = types.SimpleNamespace(
        run=object(), Table=lambda columns, data: (columns, data), log=lambda what: seen.append(what)
    )
    run.callback_handler.callbacks += [board, bias]
    callback = next(c for c in run.callback_handler.callbacks if isinstance(c, DecodePromptsCallback))
    callback._show(7, [{"prompt": "a\nb", "text": "c", "tokens_per_forward": 2.0}])
    assert seen[0] == ("decoded/0", "**a  \nb**c", 7)
    assert seen[1]["decoded"][1] == [[7, "a\nb", "c", 2.0]]


@pytest.mark.parametrize(
    ("fields", "told"),
    [({"prompts": []}, "`prompts` is empty"), ({"prompts": ["a"], "every_n_steps": 0}, "must be positive, not 0")],
)
def test_what_the_callback_refuses(fields, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        DecodePromptsCallback(decoding_run(tmp_path, callback=False), **fields)


def test_decoding_needs_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        DecodePromptsCallback(trainer(tmp_path), ["a"])


# ------------------------------------------------------------------------------------------------------ the best model

BEST = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "learning_rate": 1e-1,  # too high: the NELBO has its low on the way
    "lr_scheduler_type": "constant",
    "metric_for_best_model": "eval_nelbo",
}


@pytest.mark.parametrize("adapter", [False, True])
def test_the_model_of_the_lowest_nelbo_is_loaded_at_the_end(adapter, tmp_path):
    peft_config = LoraConfig(task_type="CAUSAL_LM") if adapter else None
    run = MDLMTrainer(
        diffusion_model(),
        config(tmp_path, **BEST | ({"learning_rate": 3e-1} if adapter else {})),
        train_dataset=token_rows(48),
        eval_dataset=token_rows(8, seed=1),
        peft_config=peft_config,
    )
    run.train()
    measured = {e["step"]: e["eval_nelbo"] for e in run.state.log_history if "eval_nelbo" in e}
    best = min(measured, key=measured.get)
    assert run.state.best_global_step == best and best < 6 and not run.args.greater_is_better
    assert run.evaluate()["eval_nelbo"] == pytest.approx(measured[best], rel=1e-5)
    assert measured[6] != pytest.approx(measured[best], rel=1e-2)
    if adapter:
        name = "adapter_model.safetensors"
        saved = load_file(tmp_path / "run" / f"checkpoint-{best}" / name)
        run.save_model(str(tmp_path / "kept"))
        kept = load_file(tmp_path / "kept" / name)
        assert saved.keys() == kept.keys() and all(torch.equal(saved[key], kept[key]) for key in saved)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("nelbo", False), ("eval_nll_t_0.00_0.25", False), ("loss", False), ("masked_accuracy", True)],
)
def test_which_way_is_better(metric, greater, tmp_path):
    args = MDLMConfig(output_dir=str(tmp_path), metric_for_best_model=metric, use_cpu=True)
    assert args.greater_is_better is greater
    told = MDLMConfig(output_dir=str(tmp_path), metric_for_best_model=metric, greater_is_better=True, use_cpu=True)
    assert told.greater_is_better is True


# ------------------------------------------------------------------------------------------------------ the model card


def test_every_saved_model_has_a_card_with_its_numbers(tmp_path):
    run = MDLMTrainer(
        diffusion_model(),
        config(tmp_path, **BEST | {"load_best_model_at_end": False, "max_steps": 2, "logging_steps": 1}),
        train_dataset=token_rows(48),
        eval_dataset=token_rows(8, seed=1),
    )
    run.train()
    run.save_model(str(tmp_path / "model"))
    card = ModelCard.load(tmp_path / "run" / "checkpoint-2" / "README.md")
    assert card.data.library_name == "transformers"
    assert {"a2d", "mdlm", "diffusion-language-model"} <= set(card.data.tags)
    assert "step 2 of 2, 8 sequences of at most 64 tokens" in card.text
    measured = [e["eval_nelbo"] for e in run.state.log_history if "eval_nelbo" in e]
    assert f"NELBO held out, at step 2: {measured[1]:.4f} nats" in (tmp_path / "model" / "README.md").read_text()
    assert "sahoo2024simple" in card.text and "papers/2406.07524" in card.text
    first = (tmp_path / "run" / "checkpoint-1" / "README.md").read_text()
    assert f"NELBO held out, at step 1: {measured[0]:.4f} nats" in first
    assert isinstance(AutoModel.from_pretrained(tmp_path / "model"), A2DForMaskedDiffusion)


def test_the_card_of_an_adapter_says_how_to_load_it(tmp_path):
    run = trainer(tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM"), max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "model"))
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.library_name == "peft" and "AutoPeftModelForCausalLM" in card.text
    assert isinstance(run.model, PeftModel)


def test_a_card_of_block_diffusion_cites_its_paper(tmp_path):
    run = bd3lm_trainer(tmp_path)
    (tmp_path / "run").mkdir(exist_ok=True)
    run.create_model_card(model_name="mine", dataset_name="trl-lib/Capybara", tags="extra")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "arriola2025block" in card.text and "its NELBO has not been measured yet" in card.text
    assert card.data.datasets == "trl-lib/Capybara" and "extra" in card.data.tags
