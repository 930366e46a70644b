"""A run killed at any moment is continued to the bytes of an unbroken one.

Each kill is a real SIGKILL of a real process, at a place chosen by patching the function that stands there: the child
is a fork of this process, so that it need not import torch again.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from a2d_hf import atomic_files, conversion, surgery
from a2d_hf.conversion import convert, resume
from a2d_hf.errors import BadInput, Refused
from a2d_hf.run_directory import RunDirectory, read_events
from a2d_hf.trainers import checkpointed_trainer
from a2d_hf.trainers.mdlm_trainer import MDLMTrainer


# Dropout makes the run depend on the saved random state, and two epochs on the saved place in the data.
SETTINGS = {"max_steps": 8, "batch_size": 2, "max_length": 32, "device": "cpu", "learning_rate": 1e-3, "save_steps": 2}
STORY = "The quick dog jumps over the lazy fox.\nA model reads from left to right, one word at a time.\n\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny parent with dropout, and a text of about six steps per epoch."""
    from tests.conftest import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("inputs")
    tiny_model("gpt2", attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1).save_pretrained(folder / "parent")
    tiny_tokenizer().save_pretrained(folder / "parent")
    (folder / "story.txt").write_text(STORY * 4)
    return folder / "parent", folder / "story.txt"


@pytest.fixture(scope="module")
def unbroken(inputs, tmp_path_factory) -> dict[str, bytes]:
    """The files of `model/` and `eval/` of a run that nothing happened to."""
    parent, story = inputs
    run = convert(parent, tmp_path_factory.mktemp("unbroken") / "run", data=story, **SETTINGS)
    assert run.manifest["training"]["epochs"] > 1
    return files_of(run.path)


def files_of(run: Path) -> dict[str, bytes]:
    """What a run's user keeps. Code copied into model/ is left out: it is the same text for every run."""
    found = [p for part in ("model", "eval") for p in (run / part).rglob("*") if p.is_file() and p.suffix != ".py"]
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(found)}


def kill_self(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, function: Callable, then: Callable = kill_self) -> Callable:
    """`function`, except that call `number` does `then` first."""
    calls = 0

    def counting(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            then(*args, **kwargs)
        return function(*args, **kwargs)

    return counting


def run_in_a_fork(action: Callable[[], None]) -> int:
    """The wait status of a forked child that runs `action`."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:  # whatever it is, the child must never come back into the test
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(3)
    return os.waitpid(child, 0)[1]


def half_a_checkpoint(folder, *args):
    """What a kill inside the writing of a checkpoint leaves: a torn weight file and no marker."""
    weights = Path(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    kill_self()


def after(function: Callable) -> Callable:
    """`function`, then a kill."""

    def call(*args, **kwargs):
        function(*args, **kwargs)
        kill_self()

    return call


def before_the_stage(stage: str) -> Callable:
    """A kill after the files of a stage are complete and before the manifest says so."""
    update = RunDirectory.update

    def call(run, **fields):
        if fields.get("stage") == stage:
            kill_self()
        update(run, **fields)

    return call


MOMENTS = {
    "before the parent is read": lambda p: p.setattr(conversion, "inspect_source", kill_self),
    "before the gates": lambda p: p.setattr(surgery, "mask_row_gate", kill_self),
    "between the gates": lambda p: p.setattr(surgery, "reach_gate", kill_self),
    "while the untrained model is written": lambda p: p.setattr(surgery, "write_model_card", kill_self),
    "after the untrained weights are written": lambda p: p.setattr(
        surgery, "write_weights", after(surgery.write_weights)
    ),
    "after the untrained model is written": lambda p: p.setattr(RunDirectory, "update", before_the_stage("converted")),
    "before the first checkpoint": lambda p: p.setattr(
        MDLMTrainer, "training_step", at_call(2, MDLMTrainer.training_step)
    ),
    "in the middle of an epoch": lambda p: p.setattr(
        MDLMTrainer, "training_step", at_call(6, MDLMTrainer.training_step)
    ),
    "inside the second checkpoint": lambda p: p.setattr(
        checkpointed_trainer, "mark_complete", at_call(2, checkpointed_trainer.mark_complete, half_a_checkpoint)
    ),
    "inside the last checkpoint": lambda p: p.setattr(
        checkpointed_trainer, "mark_complete", at_call(4, checkpointed_trainer.mark_complete, half_a_checkpoint)
    ),
    "while the trained model is measured": lambda p: p.setattr(conversion, "_nelbo", at_call(2, conversion._nelbo)),
    "while the trained model is written": lambda p: p.setattr(
        surgery, "write_model_card", at_call(2, surgery.write_model_card)
    ),
    # Renames of folders: model/ appears, then steps aside, then is replaced.
    "between the two renames of the exchange": lambda p: p.setattr(atomic_files.os, "rename", at_call(3, os.rename)),
    "after the trained model is written": lambda p: p.setattr(
        atomic_files, "_sync_folder", at_call_when_trained(atomic_files._sync_folder)
    ),
}


def at_call_when_trained(function: Callable) -> Callable:
    """Kills when model/ has just been exchanged and the old one is still there."""

    def call(folder):
        function(folder)
        if (Path(folder) / ".model.replaced").exists() and (Path(folder) / "model").exists():
            kill_self()

    return call


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_unbroken(inputs, unbroken, tmp_path, moment):
    parent, story = inputs

    def killed():
        with pytest.MonkeyPatch.context() as patch:
            MOMENTS[moment](patch)
            convert(parent, tmp_path / "run", data=story, **SETTINGS)

    status = run_in_a_fork(killed)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"the child was not killed: {status}"
    assert RunDirectory.open(tmp_path / "run").status == "interrupted"
    run = resume(tmp_path / "run")
    assert run.manifest["status"] == "completed"
    assert files_of(run.path) == unbroken
    events, _ = read_events(run.path / "events.jsonl")
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert "run_resumed" in [event["event"] for event in events]
    assert not [p.name for p in run.path.iterdir() if p.name.startswith(".")]


def test_an_incomplete_checkpoint_is_skipped(inputs, tmp_path):
    parent, story = inputs

    def killed():
        with pytest.MonkeyPatch.context() as patch:
            MOMENTS["inside the second checkpoint"](patch)
            convert(parent, tmp_path / "run", data=story, **SETTINGS)

    run_in_a_fork(killed)
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-4"}
    run = resume(tmp_path / "run")
    events, _ = read_events(run.path / "events.jsonl")
    begins = [event["step"] for event in events if event["event"] == "training_started"]
    assert begins == [0, 2]


def test_killed_twice(inputs, unbroken, tmp_path):
    parent, story = inputs

    def first():
        with pytest.MonkeyPatch.context() as patch:
            MOMENTS["in the middle of an epoch"](patch)
            convert(parent, tmp_path / "run", data=story, **SETTINGS)

    def second():
        with pytest.MonkeyPatch.context() as patch:
            MOMENTS["before the first checkpoint"](patch)
            resume(tmp_path / "run")

    for action in (first, second):
        assert os.WIFSIGNALED(run_in_a_fork(action))
    assert files_of(resume(tmp_path / "run").path) == unbroken


def test_ctrl_c_writes_a_checkpoint_and_resumes(inputs, unbroken, tmp_path, monkeypatch):
    parent, story = inputs

    def interrupt(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(MDLMTrainer, "training_step", at_call(3, MDLMTrainer.training_step, interrupt))
        with pytest.raises(KeyboardInterrupt, match="a2d resume"):
            convert(parent, tmp_path / "run", data=story, **SETTINGS | {"save_steps": 100})
    assert signal.getsignal(signal.SIGINT) is handler
    run = RunDirectory.open(tmp_path / "run")
    assert run.manifest["status"] == "interrupted"
    assert [p.name for p in run.checkpoints_path.iterdir()] == ["checkpoint-3"]
    assert files_of(resume(run.path).path) == unbroken


def test_a_second_ctrl_c_stops_at_once(inputs, tmp_path, monkeypatch):
    parent, story = inputs

    def twice(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MDLMTrainer, "training_step", at_call(3, MDLMTrainer.training_step, twice))
        with pytest.raises(KeyboardInterrupt):
            convert(parent, tmp_path / "run", data=story, **SETTINGS | {"save_steps": 100})
    run = RunDirectory.open(tmp_path / "run")
    assert run.manifest["status"] == "interrupted"
    assert not run.checkpoints_path.exists() or not list(run.checkpoints_path.iterdir())


def test_checkpoints_do_not_change_the_result(inputs, unbroken, tmp_path):
    parent, story = inputs
    run = convert(parent, tmp_path / "run", data=story, **SETTINGS | {"save_steps": 3})
    assert files_of(run.path) == unbroken


def test_resuming_a_complete_run_changes_nothing(inputs, tmp_path):
    parent, _ = inputs
    run = convert(parent, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
    assert resume(run.path).manifest["status"] == "completed"
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*")} == before


def interrupted_run(inputs, out, moment):
    parent, story = inputs

    def killed():
        with pytest.MonkeyPatch.context() as patch:
            MOMENTS[moment](patch)
            convert(parent, out, data=story, **SETTINGS)

    run_in_a_fork(killed)


def test_a_changed_parent_is_refused(inputs, tmp_path):
    import shutil

    parent, story = inputs
    shutil.copytree(parent, tmp_path / "parent")
    interrupted_run((tmp_path / "parent", story), tmp_path / "run", "between the gates")
    weights = bytearray((tmp_path / "parent" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "parent" / "model.safetensors").write_bytes(weights)
    with pytest.raises(Refused, match="has changed since this run began"):
        resume(tmp_path / "run")
    assert (tmp_path / "run" / "manifest.json").exists()


def test_changed_data_is_refused(inputs, tmp_path):
    parent, story = inputs
    mine = tmp_path / "story.txt"
    mine.write_text(story.read_text())
    interrupted_run((parent, mine), tmp_path / "run", "in the middle of an epoch")
    mine.write_text(story.read_text() + "One more line.\n")
    with pytest.raises(Refused, match="data has changed"):
        resume(tmp_path / "run")


def test_the_parent_may_be_gone_once_the_model_is_converted(inputs, unbroken, tmp_path):
    import shutil

    parent, story = inputs
    shutil.copytree(parent, tmp_path / "parent")
    interrupted_run((tmp_path / "parent", story), tmp_path / "run", "in the middle of an epoch")
    shutil.rmtree(tmp_path / "parent")
    assert files_of(resume(tmp_path / "run").path) == unbroken


def test_what_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        resume(tmp_path / "none")
    with pytest.raises(BadInput, match="no manifest.json"):
        resume(tmp_path)


def test_through_the_command_line(inputs, unbroken, tmp_path):
    """The same with the real command, killed from outside while it trains."""
    parent, story = inputs
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (SETTINGS | {"max_steps": 8}).items()]
    command = [
        sys.executable,
        "-m",
        "a2d_hf.cli",
        "convert",
        str(parent),
        "--out",
        str(tmp_path / "run"),
        "--data",
        str(story),
    ]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "run" / "events.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(event["event"] == "train_step" for event in read_events(log)[0]):
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    result = subprocess.run(
        [sys.executable, "-m", "a2d_hf.cli", "resume", str(tmp_path / "run"), "--json"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert files_of(tmp_path / "run") == unbroken
