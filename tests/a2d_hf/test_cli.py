"""The command line as a user meets it: exit codes, one sentence per error, clean stdout with --json."""

import io
import json
import subprocess
import sys

import pytest

from a2d_hf.cli import main


STORY = "The quick dog jumps over the lazy fox.\nA model reads from left to right, one word at a time.\n\n"
TRAIN = ["--max-steps", "3", "--batch-size", "2", "--max-length", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny finished run: (run directory, parent, text)."""
    from tests.conftest import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(folder / "parent")
    tiny_tokenizer().save_pretrained(folder / "parent")
    (folder / "story.txt").write_text(STORY * 12)
    data = ["--data", str(folder / "story.txt"), "--held-out", "0.3"]
    assert main(["convert", str(folder / "parent"), "--out", str(folder / "runs" / "run"), *data, *TRAIN]) == 0
    return folder / "runs" / "run", folder / "parent", folder / "story.txt"


@pytest.fixture
def call(capsys):
    """Runs a command: (exit code, stdout, stderr)."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def error_sentence(err):
    """The one error line; fails where there are more, or a traceback."""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("a2d: error:")]
    assert len(lines) == 1, err
    return lines[0]


COMMANDS = ("detect", "convert", "sample", "chat", "eval", "eval-code", "runs", "resume", "push", "quickstart")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help(call, command):
    code, out, err = call(*command, "--help")
    assert code == 0 and out.startswith("usage: a2d") and not err
    assert "None" not in out and "==SUPPRESS==" not in out


def test_help_lists_every_command(call):
    out = call("--help")[1]
    assert all(f"    {name}" in out for name in COMMANDS)


def test_unknown_flag_names_the_nearest(call, tmp_path):
    code, out, err = call("convert", tmp_path, "--out", tmp_path / "r", "--max-step", "3")
    assert (code, out) == (2, "")
    assert "--max-step" in error_sentence(err) and "did you mean --max-steps?" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["transmogrify"],
        ["convert"],
        ["convert", "x"],
        ["convert", "x", "--out", "y", "--max-steps", "many"],
        ["convert", "x", "--out", "y", "--epochs", "1", "--max-steps", "2"],
        ["sample"],
        ["eval"],
        ["resume"],
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(call, arguments):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "--help" in error_sentence(err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective", "dream"], "mdlm"),
        (["--block-size", "4"], "--block-size belongs to --objective bd3lm"),
        (["--objective", "bd3lm", "--block-size", "5"], "--block-size 5 must divide --max-length 32"),
        (["--objective", "bd3lm", "--block-size-curriculum", "1,x"], "'1,x' is not a list of sizes such as 1,4,32"),
        (["--objective", "bd3lm", "--block-size-curriculum", "4,1"], "1 does not follow 4"),
        (
            ["--lora-r", "2", "--lora-target-modules", "nothing"],
            "nothing is no layer of this model, which has down",
        ),
    ],
)
def test_a_bad_objective_is_one_sentence_and_leaves_nothing(call, trained, tmp_path, flags, message):
    _, parent, story = trained
    code, _, err = call("convert", parent, "--out", tmp_path / "run", "--data", story, *TRAIN, *flags)
    assert code == 2 and message in error_sentence(err)
    assert not (tmp_path / "run").exists()


def test_block_diffusion_from_the_command_line(call, trained, tmp_path):
    """Converted, trained and measured: with blocks of one token and the shift it begins at its parent."""
    _, parent, story = trained
    flags = ["--objective", "bd3lm", "--block-size", "1", "--token-shift", "--held-out", "0.3", "--json"]
    code, out, _ = call("convert", parent, "--out", tmp_path / "run", "--data", story, *TRAIN, *flags)
    results = json.loads(out)["results"]
    assert code == 0
    # Equal but for the mask token's own share of the softmax, whose row the conversion wrote.
    before, parent_nll = (results[name]["nats_per_token"] for name in ("nelbo_before", "parent_nll"))
    assert before == pytest.approx(parent_nll, rel=1e-3)
    code, out, _ = call("eval", tmp_path / "run", "--json")
    report = json.loads(out)
    assert code == 0 and (report["objective"], report["block_size"]) == ("bd3lm", 1)
    assert report["nelbo"]["nats_per_token"] == pytest.approx(results["nelbo_after"]["nats_per_token"], rel=1e-6)
    code, out, _ = call("sample", tmp_path / "run", "-p", "the dog", "--max-new-tokens", "3", "--json")
    assert code == 0


def test_missing_source(call, tmp_path):
    code, _, err = call("convert", tmp_path / "none", "--out", tmp_path / "run")
    assert code == 2 and "does not exist" in error_sentence(err)
    assert not (tmp_path / "run").exists()


def test_a_refused_model_exits_with_1_and_writes_nothing(call, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    code, _, err = call("convert", tmp_path / "bert", "--out", tmp_path / "run")
    assert code == 1 and "does not convert" in error_sentence(err)
    assert not (tmp_path / "run").exists()


def test_a_failed_gate_exits_with_1(call, trained, tmp_path, monkeypatch):
    from a2d_hf import surgery
    from a2d_hf.modeling.gates import GateResult

    monkeypatch.setattr(
        surgery, "reach_gate", lambda model, seed: GateResult("reach", False, "1 of 2 layers stays causal.")
    )
    code, out, err = call("convert", trained[1], "--out", tmp_path / "run")
    assert code == 1 and "reach gate failed" in error_sentence(err)
    assert "FAIL  reach" in out
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["events.jsonl", "manifest.json"]


def test_convert_json_is_the_manifest_alone(call, trained, tmp_path):
    code, out, err = call("convert", trained[1], "--out", tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert "identity" in err


def test_convert_shows_gates_and_numbers(trained, call, tmp_path):
    code, out, _ = call("convert", trained[1], "--out", tmp_path / "run", "--data", trained[2], *TRAIN)
    assert code == 0
    assert "pass  identity" in out and "largest difference 0" in out
    assert "conversion after training, NELBO" in out and "\033" not in out
    assert "{'loss'" not in out, "the trainer's own printing must not reach the user"


def test_interrupt_exits_with_130_and_says_how_to_go_on(call, trained, tmp_path, monkeypatch):
    from a2d_hf import surgery

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(surgery, "prove", interrupt)
    code, _, err = call("convert", trained[1], "--out", tmp_path / "run")
    assert code == 130
    assert f"a2d resume {tmp_path / 'run'}" in error_sentence(err)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "interrupted"


def test_resume_of_a_complete_run(call, trained):
    code, out, _ = call("resume", trained[0])
    assert code == 0 and "complete already" in out
    code, out, _ = call("resume", trained[0], "--json")
    assert code == 0 and json.loads(out)["status"] == "completed"


def test_runs_lists_runs(call, trained):
    code, out, _ = call("runs", trained[0].parent)
    assert code == 0 and "completed" in out and "parent" in out
    code, out, _ = call("runs", trained[0].parent, "--json")
    assert [row["status"] for row in json.loads(out)] == ["completed"]


def test_runs_of_nothing_and_of_no_folder(call, tmp_path):
    assert call("runs", tmp_path)[:2] == (0, f"No runs in {tmp_path}.\n")
    code, _, err = call("runs", tmp_path / "none")
    assert code == 2 and "not a folder" in error_sentence(err)


class TestSample:
    def test_text_begins_with_the_prompt(self, call, trained):
        code, out, _ = call("sample", trained[0], "-p", "the dog", "--max-new-tokens", "6")
        assert code == 0 and out.startswith("the dog")
        assert "6 forwards" in out or "the model ended" in out

    def test_json_has_one_object_per_prompt(self, call, trained):
        code, out, _ = call("sample", trained[0], "-p", "the dog", "-p", "a fox", "--json", "--max-new-tokens", "4")
        found = json.loads(out)
        assert code == 0 and [row["prompt"] for row in found] == ["the dog", "a fox"]
        assert all(row["text"] == row["prompt"] + row["completion"] for row in found)

    def test_the_same_seed_gives_the_same_text(self, call, trained):
        arguments = ("sample", trained[0], "-p", "the dog", "--temperature", "1", "--json")
        first, again = call(*arguments)[1], call(*arguments)[1]
        assert first == again != call(*arguments, "--seed", "5")[1]

    def test_fewer_steps_mean_fewer_forwards(self, call, trained):
        arguments = ("--max-new-tokens", "8", "--steps", "2", "--json")
        found = json.loads(call("sample", trained[0], "-p", "the dog", *arguments)[1])[0]
        assert found["num_forwards"] <= 2

    def test_prompts_from_a_file(self, call, trained, tmp_path):
        (tmp_path / "prompts").write_text("the dog\n\na fox\n")
        found = json.loads(
            call("sample", trained[0], "--prompt-file", tmp_path / "prompts", "--json", "--max-new-tokens", 2)[1]
        )
        assert [row["prompt"] for row in found] == ["the dog", "a fox"]

    def test_a_prompt_from_standard_input(self, call, trained, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO("the dog\njumps\n"))
        found = json.loads(call("sample", trained[0], "--json", "--max-new-tokens", 2)[1])
        assert [row["prompt"] for row in found] == ["the dog\njumps"]

    def test_a_plain_model_folder_will_do(self, call, trained):
        assert call("sample", trained[0] / "model", "-p", "the dog", "--max-new-tokens", 2)[0] == 0

    def test_live_drafts_only_on_a_terminal(self, trained, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        terminal = Terminal()
        monkeypatch.setattr("sys.stdout", terminal)
        assert main(["sample", str(trained[0]), "-p", "the dog", "--max-new-tokens", "4"]) == 0
        assert "\0337" in terminal.getvalue() and "\033[33m" in terminal.getvalue()

    @pytest.mark.parametrize(
        ("flags", "word"),
        [
            (["-p", "x", "--temperature", "-1"], "temperature"),
            (["-p", "x", "--threshold", "2"], "threshold"),
            (["-p", "x", "--max-new-tokens", "100000"], "max_new_tokens"),
            (["-p", "x", "--steps", "0"], "steps"),
            (["-p", "x", "--prompt-file", "y"], "exclude each other"),
            (["--prompt-file", "/no/such/file"], "cannot be read"),
        ],
    )
    def test_bad_flags(self, call, trained, flags, word):
        code, out, err = call("sample", trained[0], *flags)
        assert (code, out) == (2, "") and word in error_sentence(err)

    def test_an_empty_standard_input(self, call, trained, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
        code, _, err = call("sample", trained[0])
        assert code == 2 and "no prompt" in error_sentence(err)

    def test_an_autoregressive_checkpoint_is_told_apart(self, call, trained):
        code, _, err = call("sample", trained[1], "-p", "x")
        assert code == 2 and "a2d convert" in error_sentence(err)

    def test_an_untrained_model_is_announced(self, call, trained, tmp_path):
        assert call("convert", trained[1], "--out", tmp_path / "run")[0] == 0
        code, _, err = call("sample", tmp_path / "run", "-p", "x", "--max-new-tokens", "2")
        assert code == 0 and "not trained" in err

    def test_a_run_without_a_model_is_told_to_resume(self, call, trained, tmp_path):
        from a2d_hf.run_directory import RunDirectory

        RunDirectory.create(tmp_path / "run", kind="conversion").release()
        code, _, err = call("sample", tmp_path / "run", "-p", "x")
        assert code == 1 and "a2d resume" in error_sentence(err)


class TestEval:
    def test_report_and_table(self, call, trained):
        code, out, _ = call("eval", trained[0], "--mc-samples", 2)
        assert code == 0 and "NELBO (upper bound)" in out and "parent parent, NLL" in out
        report = json.loads((trained[0] / "eval" / "report.json").read_text())
        assert report["nelbo"]["tokens"] == report["parent"]["nll"]["tokens"] > 0
        assert report["nelbo"]["standard_error"] > 0
        assert [row["ratio"] for row in report["masked_accuracy"]] == [0.1, 0.3, 0.5, 0.7, 0.9]

    def test_the_same_seed_gives_the_same_report_bytes(self, call, trained):
        call("eval", trained[0], "--mc-samples", 2)
        first = (trained[0] / "eval" / "report.json").read_bytes()
        call("eval", trained[0], "--mc-samples", 2, "--fresh")
        assert (trained[0] / "eval" / "report.json").read_bytes() == first
        call("eval", trained[0], "--mc-samples", 2, "--seed", 1)
        assert (trained[0] / "eval" / "report.json").read_bytes() != first

    def test_json_is_the_report(self, call, trained):
        out = call("eval", trained[0], "--mc-samples", 1, "--json")[1]
        assert json.loads(out) == json.loads((trained[0] / "eval" / "report.json").read_text())

    def test_the_quick_numbers_of_the_run_are_those_of_eval(self, call, trained):
        # Both measure the held-out rows with the same masks, and here they all fit into the quick budget.
        report = json.loads(call("eval", trained[0], "--json")[1])
        results = json.loads((trained[0] / "manifest.json").read_text())["results"]
        assert report["nelbo"] == pytest.approx(results["nelbo_after"])
        assert report["parent"]["nll"] == pytest.approx(results["parent_nll"])

    def test_other_text(self, call, trained, tmp_path):
        (tmp_path / "other.txt").write_text("A fox jumps over a dog.\n" * 5)
        report = json.loads(call("eval", trained[0], "--data", tmp_path / "other.txt", "--json")[1])
        assert report["text"]["name"] == "other.txt" and report["nelbo"]["tokens"] > 0

    def test_a_plain_folder_needs_text_and_a_parent(self, call, trained, tmp_path):
        code, _, err = call("eval", trained[0] / "model")
        assert code == 2 and "--data" in error_sentence(err)
        arguments = (
            "eval",
            trained[0] / "model",
            "--data",
            trained[2],
            "--json",
            "--mc-samples",
            1,
            "--max-tokens",
            50,
        )
        assert json.loads(call(*arguments)[1])["parent"]["available"] is False
        assert json.loads(call(*arguments, "--parent", trained[1])[1])["parent"]["available"] is True

    def test_another_parent_is_unavailable_with_the_reason(self, call, trained, tmp_path):
        import shutil

        shutil.copytree(trained[1], tmp_path / "other")
        (tmp_path / "other" / "generation_config.json").write_text("{}")
        out = call("eval", trained[0], "--parent", tmp_path / "other", "--json", "--mc-samples", 1)[1]
        assert "another hash" in json.loads(out)["parent"]["reason"]

    def test_a_parent_that_is_gone_is_unavailable_with_the_reason(self, call, trained, tmp_path):
        import shutil

        shutil.copytree(trained[0], tmp_path / "run")
        manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
        manifest["source"]["path"] = str(tmp_path / "gone")
        (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
        code, out, _ = call("eval", tmp_path / "run", "--mc-samples", 1)
        assert code == 0 and "unavailable" in out and "does not exist" in out

    def test_bad_flags(self, call, trained):
        code, _, err = call("eval", trained[0], "--mc-samples", 0)
        assert code == 2 and "--mc-samples" in error_sentence(err)


@pytest.mark.parametrize("arguments", [["convert"], ["eval"], ["sample", "-p", "the dog", "--max-new-tokens", "3"]])
def test_stdout_of_the_real_process_is_json_alone(trained, tmp_path, arguments):
    """In a process of its own, where libraries print what they like."""
    name, *flags = arguments
    target = [str(trained[1]), "--out", str(tmp_path / "run")] if name == "convert" else [str(trained[0])]
    result = subprocess.run(
        [sys.executable, "-m", "a2d_hf.cli", name, *target, *flags, "--json"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    json.loads(result.stdout)
