"""Measuring during training: the numbers of `a2d eval`, and a training that does not notice."""

import pytest
import torch
from peft import LoraConfig

from a2d_hf import A2DEvalCallback
from a2d_hf.evaluate import diffusion_nelbo, masked_accuracy, usable_rows
from tests.trainers.helpers import bd3lm_trainer, diffusion_model, token_rows, trainer, weights


STEPS = {"max_steps": 5, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1}
HELD_OUT = token_rows(6, seed=1)


def measured(run):
    return {e["step"]: e for e in run.state.log_history if "heldout_nelbo" in e}


def test_the_training_does_not_notice(tmp_path):
    """Dropout draws from the same generators, so one number drawn by the callback would move every weight."""
    silent = trainer(tmp_path / "silent", diffusion_model("gpt2"), **STEPS)
    silent.train()
    run = trainer(tmp_path / "measured", diffusion_model("gpt2"), **STEPS)
    run.add_callback(A2DEvalCallback(run, HELD_OUT, every_n_steps=2))
    run.train()
    final = weights(silent.model)
    assert all(torch.equal(final[name], tensor) for name, tensor in run.model.state_dict().items())
    losses = [[e["loss"] for e in each.state.log_history if "loss" in e] for each in (silent, run)]
    assert losses[0] == losses[1]
    assert sorted(measured(run)) == [0, 2, 4, 5] and run.model.training


def test_modes_of_single_modules_stay(tmp_path):
    run = trainer(tmp_path, diffusion_model("gpt2"), **STEPS)
    run.model.train()
    frozen = next(module for module in run.model.modules() if isinstance(module, torch.nn.Dropout))
    frozen.eval()
    A2DEvalCallback(run, HELD_OUT).measure()
    assert run.model.training and not frozen.training


@pytest.mark.parametrize("make", [trainer, bd3lm_trainer])
def test_the_numbers_are_those_of_evaluate(make, tmp_path):
    run = make(tmp_path, **STEPS)
    run.add_callback(A2DEvalCallback(run, HELD_OUT, every_n_steps=100, mc_samples=3, ratios=(0.25,), seed=7))
    run.train()
    rows = usable_rows(HELD_OUT)
    expected = diffusion_nelbo(run.model, rows, mc_samples=3, seed=7)
    last = measured(run)[5]
    assert last["heldout_nelbo"] == pytest.approx(expected.nats_per_token, rel=1e-5)
    assert last["heldout_nelbo_stderr"] == pytest.approx(expected.standard_error, rel=1e-5)
    accuracy = masked_accuracy(run.model, rows, ratios=(0.25,), seed=7)[0]["accuracy"]
    assert last["heldout_masked_accuracy_25"] == pytest.approx(accuracy)
    assert measured(run)[0]["heldout_nelbo"] != last["heldout_nelbo"]


def test_an_adapter_is_part_of_the_model(tmp_path):
    run = trainer(tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM"), **STEPS | {"learning_rate": 0.3})
    run.add_callback(A2DEvalCallback(run, HELD_OUT))
    run.train()
    first, last = (measured(run)[step]["heldout_nelbo"] for step in (0, 5))
    with run.model.disable_adapter():
        without = diffusion_nelbo(run.model.get_base_model(), usable_rows(HELD_OUT), mc_samples=4).nats_per_token
    assert first == pytest.approx(without, rel=1e-5) and abs(last - first) > 1e-3


def test_rows_of_the_eval_dataset_are_the_default(tmp_path):
    run = bd3lm_trainer(tmp_path, eval_dataset=HELD_OUT, **STEPS)
    callback = A2DEvalCallback(run, max_rows=3)
    assert 1 <= len(callback.rows) <= 3


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "No rows to measure on"),
        ({"rows": HELD_OUT, "every_n_steps": 0}, "`every_n_steps` must be positive"),
        ({"rows": HELD_OUT, "ratios": (0.0,)}, "`ratios` must lie above 0"),
        ({"rows": [{"text": "a"}]}, "`rows` need `input_ids`"),
        ({"rows": [{"input_ids": [5]}]}, "cannot be measured on"),
    ],
)
def test_what_the_callback_refuses(fields, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        A2DEvalCallback(trainer(tmp_path, **STEPS), **fields)
