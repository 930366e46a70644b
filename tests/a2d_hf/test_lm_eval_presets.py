"""Presets: the published protocols as commands, done one after another, never twice, none lost to another's end."""

import json
import sys

import pytest

from a2d_hf import lm_eval_cli
from a2d_hf import lm_eval_presets as presets
from a2d_hf.lm_eval_cli import main
from a2d_hf.lm_eval_presets import PRESETS, Preset, PresetRun
from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion
from tests.conftest import VOCAB_SIZE, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("presets") / "model"
    A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=VOCAB_SIZE - 1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def preset(tmp_path, monkeypatch, checkpoint):
    """A preset of two choices and one text over local rows; `call(*flags)` gives (exit code, output)."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"query": f"question {i}", "choices": ["dog", "fox"], "gold": i % 2}) + "\n" for i in range(4)
        )
    )
    task = (
        "task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {rows}\ntest_split: test\n"
        "doc_to_text: '{{{{query}}}}'\ndoc_to_target: gold\n"
    )
    choice = "output_type: multiple_choice\ndoc_to_choice: choices\nmetric_list:\n  - metric: acc\n"
    text = "output_type: generate_until\ngeneration_kwargs:\n  until: []\nmetric_list:\n  - metric: exact_match\n"
    runs = tuple(
        PresetRun(name, name, 0, tokens, {"mc_num": 2}, {"theirs": 12.5}, runs_code=name == "coder",
                  task_file=task.format(name=name, rows=rows) + kind)
        for name, kind, tokens in [("first", choice, None), ("second", text, 4), ("coder", text, 4)]
    )  # fmt: skip
    monkeypatch.setitem(presets.PRESETS, "mine", Preset("a table", False, runs))
    monkeypatch.setattr(sys, "argv", ["a2d-lm-eval"])
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    from lm_eval import tasks

    real = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda **kwargs: real(**(kwargs | {"include_defaults": False})))
    return rows


@pytest.fixture
def call(capsys, checkpoint, tmp_path):
    def run(*flags, name="mine", out="out"):
        words = ["--preset", name, "--model_args", f"pretrained={checkpoint}", "--output_path", str(tmp_path / out)]
        capsys.readouterr()
        code = main([*words, "--batch_size", "4", *flags])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_runs_are_done_in_order_each_with_its_result_at_once(preset, call, tmp_path, monkeypatch):
    seen = []
    real = lm_eval_cli.run_harness

    def watch(argv):
        seen.append(sorted(file.parent.name for file in (tmp_path / "out").rglob("finished.json")))
        real(argv)

    monkeypatch.setattr(lm_eval_cli, "run_harness", watch)
    code, text = call("--limit", "3")
    assert code == 0 and seen == [[], ["first"]]
    assert "coder: skipped, it executes what the model writes: add --confirm_run_unsafe_code" in text
    record = json.loads((tmp_path / "out" / "first" / "finished.json").read_text())
    assert 0 <= record["results"]["first"]["acc,none"] <= 1 and "--limit 3" in record["command"]
    assert record["published"] == {"theirs": 12.5} and "theirs 12.5" in text
    results = json.loads((tmp_path / "out" / "first" / record["file"]).read_text())
    assert results["n-samples"]["first"]["effective"] == 3 and results["config"]["model_args"]["mc_num"] == 2
    info = json.loads(next((tmp_path / "out" / "second").rglob("results_*.json")).read_text())
    assert info["config"]["gen_kwargs"] == {"max_gen_toks": 4, "steps": 4, "temperature": 0.0}
    assert info["config"]["a2d"]["num_forwards"] == 4

    seen.clear()
    code, text = call("--limit", "3")
    assert code == 0 and seen == [] and "first: finished before" in text and "second: finished before" in text


def test_one_that_fails_costs_no_other_and_is_done_next_time(preset, call, tmp_path, monkeypatch):
    real = lm_eval_cli.run_harness
    ran = []

    def fail(argv):
        ran.append(argv[argv.index("--tasks") + 1])
        if ran == ["first"]:
            raise RuntimeError("no such\ndata")
        real(argv)

    monkeypatch.setattr(lm_eval_cli, "run_harness", fail)
    code, text = call()
    assert code == 1 and "first: no such data" in text and "not finished: first" in text
    assert call()[0] == 0 and ran == ["first", "second", "first"]


def test_an_interruption_keeps_what_is_finished(preset, call, tmp_path, monkeypatch):
    real = lm_eval_cli.run_harness
    ran = []

    def stop(argv):
        ran.append(argv[argv.index("--tasks") + 1])
        if ran == ["first", "second"]:
            raise KeyboardInterrupt
        real(argv)

    monkeypatch.setattr(lm_eval_cli, "run_harness", stop)
    assert call()[0] == 130
    assert call()[0] == 0 and ran == ["first", "second", "second"]


def test_results_of_another_model_or_other_arguments_are_not_taken_for_ours(preset, call, checkpoint):
    assert call("--limit", "2")[0] == 0
    code, text = call("--limit", "3")
    assert code == 2 and "holds the results of another model or of other arguments" in text
    (checkpoint / "note.txt").write_text("trained on")
    assert call("--limit", "2")[0] == 2
    (checkpoint / "note.txt").unlink()


def test_a_dry_run_lists_commands_that_can_be_typed(preset, call, tmp_path):
    code, text = call("--dry-run", "--limit", "2", name="tiny-a2d")
    assert code == 0 and not (tmp_path / "out").exists()
    commands = [line.strip() for line in text.splitlines() if line.startswith("  a2d-lm-eval ")]
    assert len(commands) == len(PRESETS["tiny-a2d"].runs)
    assert all("--limit 2" in command and "--apply_chat_template" in command for command in commands)
    gsm = [command for command in commands if "gsm8k" in command]
    assert ["--num_fewshot 5" in command for command in gsm] == [True, False], "both published settings are run"
    assert "max_gen_toks=256,steps=256,temperature=0.0" in gsm[0]
    assert "not comparable" in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--preset", "x", "--model_args", "pretrained=a", "--output_path", "b"], "choose from tiny-a2d, diffullama"),
        (["--preset", "diffullama", "--model_args", "pretrained=a"], "needs --output_path FOLDER"),
        (["--preset", "diffullama", "--output_path", "b"], "needs --model_args pretrained=CHECKPOINT"),
        (["--preset", "diffullama", "--tasks", "piqa"], "--tasks is decided by --preset diffullama"),
        (["--preset", "diffullama", "--num_fewshot=3"], "--num_fewshot is decided by --preset diffullama"),
        (["--dry_run", "--tasks", "piqa"], "give --preset too"),
    ],
)
def test_bad_input(capsys, flags, sentence):
    assert main(flags) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_every_task_of_a_preset_is_in_the_harness():
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    for name, one in PRESETS.items():
        missing = {run.task for run in one.runs if run.task_file is None} - known
        assert not missing, (name, missing)


def test_names_and_tables_are_whole():
    for one in PRESETS.values():
        assert len({run.name for run in one.runs}) == len(one.runs)
        assert all(run.published or run.note for run in one.runs)
