"""A run that was stopped anywhere and resumed ends with the weights of one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

import a2d_hf.trainers.checkpointed_trainer as checkpointed_trainer
from a2d_hf.modeling import A2DForMaskedDiffusion
from a2d_hf.trainers import MDLMTrainer, last_complete_checkpoint
from a2d_hf.trainers.checkpoints import COMPLETE_MARKER
from tests.conftest import REPOSITORY
from tests.trainers import reference_noise
from tests.trainers.helpers import config, diffusion_model, token_rows, trainer, weights


# 21 rows, 4 at a time over 2 batches: 3 steps an epoch, the last of them short. Dropout makes the generators matter.
RUN = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
}


def build(folder: Path, rows=None, **fields) -> MDLMTrainer:
    return trainer(folder, diffusion_model("gpt2"), token_rows(21) if rows is None else rows, **RUN | fields)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def assert_same(run, final):
    now = run.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in final.items())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run = build(folder)
    run.train()
    assert run.state.global_step == 9
    return folder, weights(run.model), losses(run), run.state.num_input_tokens_seen


@pytest.mark.parametrize("step", [1, 3, 5])
def test_resume_equals_unbroken(unbroken, step, tmp_path):
    """In the middle of an epoch, at its end, and in the middle of another."""
    folder, final, expected_losses, tokens = unbroken
    shutil.copytree(folder / "run" / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    run = build(tmp_path)
    torch.manual_seed(99)
    run.train(resume_from_checkpoint=True)
    assert_same(run, final)
    assert losses(run) == expected_losses
    assert run.state.num_input_tokens_seen == tokens


def test_the_same_run_twice_is_the_same_run(unbroken, tmp_path):
    run = build(tmp_path, save_strategy="no")
    run.train()
    assert_same(run, unbroken[1])


def test_replay_needs_nothing_from_a_checkpoint(tmp_path):
    """What comes back is a function of the place in the epochs' order, also behind the epoch of the resume."""
    replay = {"replay_weight": 0.5, "replay_buffer_size": 17}
    whole = build(tmp_path / "whole", **replay)
    whole.train()
    resumed = build(tmp_path / "resumed", **replay)
    folder = tmp_path / "whole" / "run" / "checkpoint-4"
    resumed.train(resume_from_checkpoint=str(folder))
    assert_same(resumed, weights(whole.model))
    other = build(tmp_path / "other", **replay | {"replay_buffer_size": 5})
    with pytest.raises(ValueError, match="replay_buffer_size 5"):
        other.train(resume_from_checkpoint=str(folder))


def test_replay_cannot_begin_with_a_resume(unbroken, tmp_path):
    """Not even with the buffer's default size, which stands for nothing in a run without replay."""
    run = build(tmp_path, replay_weight=0.5)
    with pytest.raises(ValueError, match=r"replay_buffer_size 1024 \(was None\)"):
        run.train(resume_from_checkpoint=str(unbroken[0] / "run" / "checkpoint-8"))


def test_kill_minus_nine_inside_a_checkpoint(unbroken, tmp_path):
    """The checkpoint being written is skipped, the one before it continued, and the end is the same."""
    killed = subprocess.run(
        [sys.executable, "-m", "tests.trainers.run_training", str(tmp_path), json.dumps([RUN | {"kill_at": 5}])],
        cwd=REPOSITORY,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    folder = tmp_path / "0" / "run"
    assert (folder / "checkpoint-5" / "model.safetensors").exists()
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-4")
    run = build(tmp_path / "0")
    run.train(resume_from_checkpoint=True)
    assert_same(run, unbroken[1])
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-9")


def test_a_resumed_run_may_be_cut_into_other_batches(unbroken, tmp_path):
    """Two batches of 4 and eight of 1 are the same steps, so a resume may change between them."""
    folder, final, _, _ = unbroken
    run = build(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    run.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-8"))
    for name, tensor in run.model.state_dict().items():
        # Dropout is drawn per batch: only the order and the noise can be the same.
        assert (tensor - final[name]).abs().max() < 5e-3


def test_adapters_resume_exactly(tmp_path):
    final = None
    for name in ("unbroken", "resumed"):
        folder = tmp_path / name
        run = trainer(
            folder, diffusion_model("gpt2"), token_rows(21), peft_config=LoraConfig(task_type="CAUSAL_LM"), **RUN
        )
        if final is None:
            run.train()
            final = weights(run.model)
            shutil.copytree(folder / "run" / "checkpoint-4", tmp_path / "resumed" / "run" / "checkpoint-4")
        else:
            run.train(resume_from_checkpoint=True)
            assert_same(run, final)


def test_a_stream_resumes_exactly(tmp_path):
    """Also beyond its end, in the second pass."""
    fields = {"num_train_epochs": 1, "max_steps": 7}
    stream = token_rows(21).to_iterable_dataset()
    first = build(tmp_path / "a", stream, **fields)
    first.train()
    shutil.copytree(tmp_path / "a" / "run" / "checkpoint-4", tmp_path / "b" / "run" / "checkpoint-4")
    second = build(tmp_path / "b", stream, **fields)
    second.train(resume_from_checkpoint=True)
    assert_same(second, weights(first.model))


# ------------------------------------------------------------------------------------------------- loading and keeping


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    """Its names are the parent's: matched one by one they would all be missing, and the last weights would stay."""
    args = config(
        tmp_path,
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=3e-1,  # too high: the loss has its peak on the way
        lr_scheduler_type="constant",
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    run = MDLMTrainer(diffusion_model(), args, train_dataset=token_rows(48), eval_dataset=token_rows(8, seed=1))
    run.train()
    best = run.state.best_global_step
    assert best < 6
    saved = A2DForMaskedDiffusion.from_pretrained(tmp_path / "run" / f"checkpoint-{best}")
    assert_same(run, saved.state_dict())
    last = A2DForMaskedDiffusion.from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert not torch.equal(last.get_output_embeddings().weight, saved.get_output_embeddings().weight)


def test_old_checkpoints_are_deleted(tmp_path):
    build(tmp_path, save_total_limit=2).train()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-8", "checkpoint-9"]


def test_no_old_checkpoint_is_deleted_before_the_new_one_is_whole(tmp_path, monkeypatch):
    calls = []

    def crash_at_second(folder, key):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError("power cut")
        original(folder, key)

    original = checkpointed_trainer.mark_complete
    monkeypatch.setattr(checkpointed_trainer, "mark_complete", crash_at_second)
    run = build(tmp_path, save_total_limit=1)
    with pytest.raises(OSError, match="power cut"):
        run.train()
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")
    assert run.args.save_total_limit == 1


def test_leftovers_of_an_incomplete_checkpoint_do_not_survive_under_its_name(tmp_path):
    leftover = tmp_path / "run" / "checkpoint-1"
    leftover.mkdir(parents=True)
    (leftover / "rng_state_1.pth").write_bytes(b"of a second process that this run does not have")
    build(tmp_path, max_steps=1).train()
    assert last_complete_checkpoint(tmp_path / "run") == str(leftover)
    assert not (leftover / "rng_state_1.pth").exists()


# ----------------------------------------------------------------------------------------------------------- bad input


def test_nothing_to_resume_from_is_said(tmp_path):
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds no complete checkpoint \(1 incomplete\)"):
        build(tmp_path).train(resume_from_checkpoint=True)


def test_an_incomplete_checkpoint_is_refused(unbroken, tmp_path):
    shutil.copytree(unbroken[0] / "run" / "checkpoint-2", tmp_path / "half")
    (tmp_path / "half" / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="half is not a complete checkpoint"):
        build(tmp_path).train(resume_from_checkpoint=str(tmp_path / "half"))


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"seed": 7}, r"data_seed 7 \(was 42\), seed 7 \(was 42\)"),
        ({"rows": token_rows(20)}, r"train_rows 20 \(was 21\)"),
        ({"per_device_train_batch_size": 2}, r"rows_per_step 4 \(was 8\)"),
        ({"noise_schedule": "cosine"}, r"noise_schedule 'cosine' \(was 'linear'\)"),
    ],
)
def test_another_run_is_not_continued(unbroken, fields, told, tmp_path):
    run = build(tmp_path, **fields)
    with pytest.raises(ValueError, match=f"belongs to another run: {told}"):
        run.train(resume_from_checkpoint=str(unbroken[0] / "run" / "checkpoint-2"))


@pytest.mark.parametrize("schedule, is_refused", [("linear", False), ("cosine", True)])
def test_a_checkpoint_older_than_a_field_has_its_default(unbroken, schedule, is_refused, tmp_path):
    """The marker of a release that did not know `noise_schedule`: it trained with the only one there was."""
    folder = tmp_path / "old"
    shutil.copytree(unbroken[0] / "run" / "checkpoint-8", folder)
    marker = json.loads((folder / COMPLETE_MARKER).read_text())
    del marker["resume_key"]["noise_schedule"]
    (folder / COMPLETE_MARKER).write_text(json.dumps(marker))
    run = build(tmp_path, noise_schedule=schedule)
    if is_refused:
        with pytest.raises(ValueError, match=r"noise_schedule 'cosine' \(was 'linear'\)"):
            run.train(resume_from_checkpoint=str(folder))
        return
    run.train(resume_from_checkpoint=str(folder))
    assert_same(run, unbroken[1])


def test_going_on_with_other_data_can_be_asked_for(unbroken, tmp_path):
    run = build(tmp_path, rows=token_rows(30), ignore_data_skip=True)
    run.train(resume_from_checkpoint=str(unbroken[0] / "run" / "checkpoint-2"))
    assert run.state.global_step == 12


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_ctrl_c_between_checkpoints(unbroken, tmp_path):
    run = build(tmp_path, save_steps=2, callbacks=[StopAt(5)])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    resumed = build(tmp_path, save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, unbroken[1])


def test_final_weights_on_disk_are_those_in_memory(unbroken):
    folder, final, _, _ = unbroken
    saved = A2DForMaskedDiffusion.from_pretrained(folder / "run" / "checkpoint-9")
    assert all(torch.equal(final[name], tensor) for name, tensor in saved.state_dict().items())


# -------------------------------------------------------------------------------------------- finished, and broken off


@pytest.mark.parametrize("max_steps", [4, 6])
@pytest.mark.parametrize("save_strategy", ["steps", "epoch"])
def test_a_run_resumed_at_its_last_step_takes_no_other(max_steps, save_strategy, tmp_path):
    """In the middle of an epoch and at its end: the weights, the steps and the files stay what they are."""
    fields = {"max_steps": max_steps, "save_strategy": save_strategy}
    run = build(tmp_path, **fields)
    run.train()
    checkpoint = tmp_path / "run" / f"checkpoint-{max_steps}"
    before = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}
    resumed = build(tmp_path, **fields)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == max_steps
    assert_same(resumed, weights(run.model))
    assert losses(resumed) == losses(run)
    assert {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")} == before


def broken_head(run, step):
    """From that step on, the loss is no number."""
    compute_loss = run.compute_loss

    def broken(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        return loss * float("nan") if run.state.global_step + 1 == step else loss

    run.compute_loss = broken


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_batch(unbroken, tmp_path):
    run = build(tmp_path)
    broken_head(run, 3)
    with pytest.raises(FloatingPointError) as told:
        run.train()
    step_3 = reference_noise.order(42, 0, 21)[16:20]
    assert f"The loss became nan in step 3, in the batch with rows {step_3}." in str(told.value)
    assert f"The last good checkpoint is {tmp_path / 'run' / 'checkpoint-2'}." in str(told.value)
    resumed = build(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, unbroken[1])


class BreakTheWeightsAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))


def test_the_batch_is_not_blamed_for_weights_that_were_broken_before(tmp_path):
    run = build(tmp_path, save_strategy="no", callbacks=[BreakTheWeightsAfter(1)])
    with pytest.raises(FloatingPointError, match="in step 2, .*because the step before broke the weights"):
        run.train()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {},
            r"try `per_device_train_batch_size=2` with `gradient_accumulation_steps=4` \(the same training; now 4",
        ),
        ({}, r"then `gradient_checkpointing=True`, then a smaller `max_length`, then LoRA"),
        (
            {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
            "step 3: try a smaller `max_length`, then",
        ),
    ],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_out_of_memory_says_what_to_change(fields, told, error, tmp_path):
    run = build(tmp_path, **fields)
    compute_loss = run.compute_loss

    def full(*args, **kwargs):
        if run.state.global_step == 2:
            raise error
        return compute_loss(*args, **kwargs)

    run.compute_loss = full
    with pytest.raises(torch.OutOfMemoryError, match=told) as raised:
        run.train()
    assert str(raised.value).startswith("Out of memory in step 3") and "checkpoint-2." in str(raised.value)


def test_other_errors_stay_what_they_are(tmp_path):
    run = build(tmp_path)
    run.compute_loss = lambda *args, **kwargs: torch.ones(2) @ torch.ones(3)
    with pytest.raises(RuntimeError, match="size"):
        run.train()
