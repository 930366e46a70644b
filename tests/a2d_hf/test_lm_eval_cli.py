"""`a2d-lm-eval` as a user meets it: what it registers, what it refuses in one sentence, whose answers it reuses."""

import errno
import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from a2d_hf import lm_eval_cli
from a2d_hf.errors import BadInput
from a2d_hf.lm_eval_cli import check_task_file, fingerprint, main, with_own_cache
from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion
from tests.conftest import REPOSITORY, VOCAB_SIZE, tiny_model, tiny_tokenizer


TASKS = REPOSITORY / "recipes" / "lm_eval_tasks"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval_cli") / "model"
    A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=VOCAB_SIZE - 1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder for A2D_EVAL_DATA with three questions of PIQA's form."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"query": f"question {i}", "choices": ["the dog", "a lazy fox"], "gold": i % 2} for i in range(3)]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("A2D_EVAL_DATA", str(folder))
    return folder


@pytest.fixture
def call(capsys, monkeypatch, checkpoint):
    """Runs the launcher on the local PIQA task: (exit code, the error sentences, all of stdout)."""
    monkeypatch.setattr(sys, "argv", ["a2d-lm-eval"])
    # Reading the harness' thousands of task files takes ten seconds each time; only ours are asked for here.
    from lm_eval import tasks

    real = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda **kwargs: real(**(kwargs | {"include_defaults": False})))
    monkeypatch.setattr(lm_eval_cli, "task_manager", lm_eval_cli.task_manager.__wrapped__)

    # Its log handler would outlive the stream that pytest gave it.
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)

    def run(*arguments, task="local_piqa", model_args="mc_num=2", include=TASKS):
        words = ["--model", "a2d", "--model_args", f"pretrained={checkpoint},{model_args}", "--tasks", task]
        capsys.readouterr()
        code = main([*words, "--include_path", str(include), "--batch_size", "4", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, [line for line in captured.err.splitlines() if line.startswith("a2d: error:")], captured.out

    return run


def in_a_new_process(program: str) -> str:
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == 0, run.stderr
    return run.stdout


# ----------------------------------------------------------------------------------------------------- registration


def test_built_in_models_stay_visible_beside_ours():
    program = (
        "from a2d_hf.lm_eval_cli import register; register(); register()\n"
        "from lm_eval.api.registry import get_model\n"
        "print(get_model('a2d').__name__, get_model('hf').__name__, get_model('dummy').__name__)"
    )
    assert in_a_new_process(program).split() == ["A2DLM", "HFLM", "DummyLM"]


def test_the_harness_alone_would_lose_them():
    """The trap that `register` is there for: a model registered first hides every built-in one."""
    program = (
        "from lm_eval.api.registry import get_model, model_registry\n"
        "model_registry.register('a2d', target='a2d_hf.lm_eval_model:A2DLM')\n"
        "try:\n    get_model('dummy')\nexcept Exception as error:\n    print('lost')\nelse:\n    print('there')"
    )
    assert in_a_new_process(program).strip() == "lost", "the harness has mended this: `register` may become simpler"


# -------------------------------------------------------------------------------------------------------- bad input


def test_an_unknown_task_is_answered_with_the_nearest(call):
    code, errors, _ = call(task="local_piqua")
    assert code == 2 and len(errors) == 1
    assert errors[0].startswith("a2d: error: --tasks local_piqua is not a task: the nearest are local_piqa,")
    code, errors, _ = call(task="zzzzzzzz")
    assert code == 2 and "`a2d-lm-eval ls tasks` lists them" in errors[0]


def test_a_missing_include_path_is_said(call, tmp_path):
    code, errors, _ = call(include=tmp_path / "nowhere")
    assert code == 2 and errors[0].endswith("nowhere is not a folder.")


def test_the_folder_of_the_data_must_be_named(call, monkeypatch):
    monkeypatch.delenv("A2D_EVAL_DATA", raising=False)
    code, errors, _ = call()
    assert code == 2 and len(errors) == 1 and "A2D_EVAL_DATA is not set: name the folder" in errors[0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "piqa.jsonl does not exist: A2D_EVAL_DATA must name the folder that holds it."),
        ("", "piqa.jsonl is empty: it should hold one JSON object per line."),
        ("\n\n", "piqa.jsonl is empty"),
        ('{"query": "a", "choices": ["b", "c"]}', "line 1 has no field 'gold': each row needs query, choices, gold."),
        ('{"query": null, "choices": ["b", "c"], "gold": 0}', "line 1 has no field 'query'"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 1: gold 2 is no index into its choices."),
        ('{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query"', "line 2 is not JSON"),
        ("[1, 2]", "line 1 has no field 'query'"),
    ],
)
def test_a_bad_data_file_is_one_sentence(call, data, content, sentence):
    (data / "piqa.jsonl").unlink()
    if content is not None:
        (data / "piqa.jsonl").write_text(content)
    code, errors, _ = call()
    assert code == 2 and len(errors) == 1 and sentence in errors[0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist"),
        ("", "is empty: it should describe a task"),
        ("# only words\n", "is empty"),
        ("- a\n- b\n", "names no task"),
        ("output_type: multiple_choice\n", "names no task: it needs the field `task`"),
        ("task: x\ntest_split: test\ndoc_to_text: a\n", "has no field `dataset_path`"),
        ("task: x\ndataset_path: json\ndoc_to_text: a\n", "has no field `test_split`"),
        ("task: x\ndataset_path: json\ntest_split: test\n", "has no field `doc_to_text`"),
        ("task: [", "is not YAML"),
    ],
)
def test_a_bad_task_file_is_one_sentence(call, tmp_path, content, sentence):
    file = tmp_path / "task.yaml"
    if content is not None:
        file.write_text(content)
    code, errors, _ = call(task=str(file))
    assert code == 2 and len(errors) == 1 and sentence in errors[0]


def test_a_row_without_a_field_that_the_task_reads_is_one_sentence(call, data, tmp_path):
    (tmp_path / "own").mkdir()
    text = (TASKS / "local_piqa.yaml").read_text().replace("local_piqa", "own_task").replace("{{query}}", "{{absent}}")
    (tmp_path / "own" / "own.yaml").write_text(text)
    shutil.copy(TASKS / "local_data.py", tmp_path / "own")
    code, errors, _ = call(task="own_task", include=tmp_path / "own")
    assert code == 2 and len(errors) == 1 and "no field that its task file reads: 'absent' is undefined" in errors[0]


def test_good_task_files_pass(tmp_path):
    for file in [*TASKS.glob("*.yaml")]:
        check_task_file(file)
    (tmp_path / "group.yaml").write_text("group: many\ntask: [a, b]\n")
    check_task_file(tmp_path / "group.yaml")
    (tmp_path / "child.yaml").write_text("include: parent.yaml\ntask: child\n")
    check_task_file(tmp_path / "child.yaml")


def test_every_local_task_names_the_fields_it_reads():
    for file in TASKS.glob("*.yaml"):
        text = file.read_text()
        fields = text.split("fields: [")[1].split("]")[0].split(", ")
        for field in fields:
            assert text.count(field) > 1, (file.name, field)


def test_a_bad_model_argument_is_one_sentence(call, data):
    code, errors, _ = call(model_args="likelihood=exact")
    assert code == 2 and "`likelihood` must be one of nelbo, token_by_token, causal" in errors[0]


def test_without_the_harness_the_way_to_get_it_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["--tasks", "piqa"]) == 2
    assert 'run `pip install "a2d_hf[lm_eval]"`' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- the cache


def cached(*words: str) -> str:
    argv = ["--use_cache", "answers", *words]
    return with_own_cache(argv, lm_eval_cli._known(argv))[1]


def test_the_cache_has_a_name_of_its_own_for_everything_that_decides_an_answer(checkpoint, tmp_path):
    base = ["--model", "a2d", "--model_args", f"pretrained={checkpoint},mc_num=2"]
    name = cached(*base)
    assert name == cached(*base) and name.startswith("answers-")
    assert name == cached(*base, "--limit", "3", "--batch_size", "7", "--tasks", "piqa"), "these change no answer"
    others = [
        ["--model", "hf", *base[2:]],
        ["--model", "a2d", "--model_args", f"pretrained={checkpoint},mc_num=3"],
        ["--model", "a2d", "--model_args", f"pretrained={tmp_path},mc_num=2"],
        [*base, "--apply_chat_template"],
        [*base, "--system_instruction", "be brief"],
    ]
    names = [name, *(cached(*words) for words in others)]
    assert len(set(names)) == len(names)


def test_a_checkpoint_that_was_trained_on_gets_another_cache(tmp_path):
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"one")
    base = ["--model", "a2d", "--model_args", f"pretrained={tmp_path / 'model'}"]
    before = cached(*base)
    assert fingerprint(str(weights)) != (weights.write_bytes(b"four"), fingerprint(str(weights)))[1]
    assert cached(*base) != before


def test_both_spellings_of_the_flag(checkpoint):
    for flag in (["-c", "x"], ["--use_cache=x"]):
        argv = [*flag, "--model", "a2d"]
        assert "x-" in with_own_cache(argv, lm_eval_cli._known(argv))[len(flag) - 1]
    argv = ["--model", "a2d"]
    assert with_own_cache(argv, lm_eval_cli._known(argv)) == argv


def test_a_second_run_reuses_its_answers_and_another_mc_num_does_not(call, data, tmp_path, monkeypatch):
    from a2d_hf.lm_eval_model import A2DLM

    asked = []
    real = A2DLM._loglikelihood_tokens
    monkeypatch.setattr(
        A2DLM, "_loglikelihood_tokens", lambda self, rows, **rest: asked.append(len(rows)) or real(self, rows, **rest)
    )

    def results(number: int, model_args: str) -> dict:
        out = tmp_path / f"out{number}"
        code, errors, _ = call("--use_cache", tmp_path / "answers", "--output_path", out, model_args=model_args)
        assert code == 0 and not errors
        (file,) = out.rglob("results_*.json")
        return json.loads(file.read_text())["results"]["local_piqa"]

    first, again = results(1, "mc_num=2"), results(2, "mc_num=2")
    assert asked == [6] and first == again
    results(3, "mc_num=3")
    assert asked == [6, 6]


# ------------------------------------------------------------------------------------- a full disk, an interruption


def test_results_that_could_not_be_saved_are_a_failure(call, data, tmp_path, monkeypatch):
    """The harness logs a warning and ends with 0, half a file left behind."""
    real = Path.write_text

    def full(self, text, *args, **kwargs):
        if not self.name.startswith("results_"):
            return real(self, text, *args, **kwargs)
        real(self, text[:100], *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_text", full)
        code, errors, _ = call("--output_path", tmp_path / "out")
    assert code == 1 and len(errors) == 1 and "could not be written" in errors[0] and "free some space" in errors[0]
    assert not list((tmp_path / "out").rglob("results_*"))
    assert call("--output_path", tmp_path / "out")[0] == 0
    assert call("--output_path", tmp_path / "name.json")[0] == 0, "the harness' other way to name a file"


def test_a_full_disk_under_the_cache_is_one_sentence(call, data, tmp_path, monkeypatch):
    from a2d_hf.lm_eval_model import A2DLM

    def full(self, *args, **kwargs):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(A2DLM, "_loglikelihood_tokens", full)
    code, errors, _ = call("--use_cache", tmp_path / "answers")
    assert code == 1 and len(errors) == 1 and "No space left to write" in errors[0]


def test_an_interrupted_run_goes_on_from_its_cache(call, data, tmp_path, monkeypatch):
    from a2d_hf import lm_eval_model

    monkeypatch.setattr(lm_eval_model, "ROWS_AT_ONCE", 1)  # one request at a time
    real, asked = lm_eval_model.likelihoods.nelbo, []

    def stopped(model, requests, **rest):
        asked.append(requests[0].input_ids)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(model, requests, **rest)

    monkeypatch.setattr(lm_eval_model.likelihoods, "nelbo", stopped)
    flags = ["--use_cache", tmp_path / "answers", "--output_path", tmp_path / "out"]
    code, errors, _ = call(*flags)
    assert code == 130 and "a second run goes on from the answers that are there" in errors[0]
    assert call(*flags)[0] == 0
    assert len(asked) == 4 + 3 and asked[3] in asked[4:] and len(set(asked)) == 6, "six questions, none done twice"


def test_a_task_file_is_the_harness_own_yaml():
    """`check_task_file` reads tags it does not know; what it reads is what the harness reads."""
    text = (TASKS / "local_piqa.yaml").read_text()
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(text)
    with pytest.raises(BadInput, match="does not exist"):
        check_task_file(Path("nowhere.yaml"))
