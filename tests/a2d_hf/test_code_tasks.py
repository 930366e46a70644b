"""HumanEval, MBPP and infilling: prompts, programs, scores through `evaluate`, and a run that is never done twice."""

import gzip
import json

import pytest

from a2d_hf import code_tasks
from a2d_hf.cli import main
from a2d_hf.code_execution import Limits
from a2d_hf.code_tasks import Generations, cut, read_problems, score
from a2d_hf.errors import BadInput
from a2d_hf.local_metrics import load_metric
from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion
from tests.conftest import VOCAB_SIZE, tiny_model, tiny_tokenizer


def humaneval(number: int, **fields) -> dict:
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def add{number}(x):\n",
        "entry_point": f"add{number}",
        "canonical_solution": f"    return x + {number}\n",
        "test": f"def check(f):\n    assert f(1) == {1 + number}\n",
    } | fields


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code") / "model"
    A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=VOCAB_SIZE - 1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------------- problems


def test_right_solutions_pass_and_wrong_ones_do_not(tmp_path):
    file = write_rows(tmp_path / "h.jsonl", [humaneval(i) for i in range(3)])
    problems = read_problems("humaneval", file)
    completions = {
        "HumanEval/0": ["    return x\n", "    return x + 5\n"],
        "HumanEval/1": ["    return 1\n", "    return 1\n"],
        "HumanEval/2": ["    return x + 2\n", "    return 3\n"],
    }
    scores, results = score(problems, completions, [1, 2], Limits(seconds=5.0))
    assert scores == {"pass@1": pytest.approx((1 / 2 + 0 + 1) / 3), "pass@2": pytest.approx(2 / 3)}
    assert results["HumanEval/1"][0] == (False, "failed: AssertionError") and results["HumanEval/2"][1][0]


def test_mbpp_shows_three_examples_and_asks_the_test_problems(tmp_path):
    rows = [
        {"task_id": i, "text": f"Write {i}.", "code": f"def f():\n    return {i}", "test_list": [f"assert f() == {i}"]}
        for i in (1, 2, 3, 4, 11, 12, 600)
    ]
    problems = read_problems("mbpp", write_rows(tmp_path / "m.jsonl", rows))
    assert [problem.name for problem in problems] == ["11", "12"]
    assert problems[0].prompt.count("[DONE]") == 3 and problems[0].prompt.endswith("assert f() == 11\n[BEGIN]\n")
    assert "Write 1." not in problems[0].prompt
    scores, _ = score(problems, {"11": [rows[4]["code"]], "12": ["def f():\n    pass"]}, [1], Limits(seconds=5.0))
    assert scores == {"pass@1": 0.5}


def test_a_completion_ends_at_the_first_stop():
    assert cut("    return x\ndef next():\n#", code_tasks.HUMANEVAL_STOPS) == "    return x"
    assert cut("whole", ("[DONE]",)) == "whole"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is empty"),
        ("{", "line 1 is not JSON"),
        (json.dumps({"task_id": "a", "prompt": "b"}), "line 1 has no field 'test': humaneval needs it"),
        ("[]", "has no field 'task_id'"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, content, sentence):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(BadInput, match=sentence):
        read_problems("humaneval", tmp_path / "x.jsonl")


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["HumanEval.jsonl.gz", "human_eval-0.5.jsonl", "mbpp.jsonl"])
def test_the_published_solutions_pass(real_data, name):
    path = real_data / "eval" / name
    task = {"H": "humaneval", "h": "humaneval-infilling", "m": "mbpp"}[name[0]]
    problems = read_problems(task, path)
    assert len(problems) == (500 if task == "mbpp" else 164)
    with gzip.open(path, "rt") if name.endswith("gz") else open(path, encoding="utf-8") as file:
        rows = {str(row["task_id"]): row for row in map(json.loads, file)}
    key = "code" if task == "mbpp" else "canonical_solution"
    some = problems[:8]
    scores, results = score(some, {one.name: [rows[one.name][key]] for one in some}, [1], Limits())
    assert scores == {"pass@1": 1.0}, results


# ----------------------------------------------------------------------------------------------------------- metrics


def test_the_metric_runs_nothing_unless_allowed():
    metric = load_metric("code_eval")
    with pytest.raises(ValueError, match="pass `allow_code_execution=True`"):
        metric.compute(predictions=[["x = 1"]], references=["assert x == 1"])
    found = load_metric("code_eval").compute(
        predictions=[["x = 1", "x = 2"]], references=["assert x == 1"], k=[1, 2, 3], allow_code_execution=True
    )
    assert found["pass@1"] == 0.5 and found["pass@2"] == 1.0 and "pass@3" not in found


# ------------------------------------------------------------------------------------------------------- the command


def call(checkpoint, data, out, *flags, task="humaneval"):
    return main(
        ["eval-code", str(checkpoint), "--task", task, "--data", str(data), "--out", str(out), "--device", "cpu",
         "--max-new-tokens", "4", *flags]
    )  # fmt: skip


def test_what_is_written_is_kept_and_run_only_when_allowed(checkpoint, tmp_path, monkeypatch, capsys):
    data = write_rows(tmp_path / "h.jsonl", [humaneval(i) for i in range(3)])
    written = []
    real = code_tasks.write_program

    def watch(model, tokenizer, problem, options):
        written.append(problem.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        return real(model, tokenizer, problem, options)

    monkeypatch.setattr(code_tasks, "write_program", watch)
    assert call(checkpoint, data, tmp_path / "out") == 130
    with open(tmp_path / "out" / "generations.jsonl", "ab") as file:
        file.write(b'{"name": "HumanEval/2", "comp')  # torn by a kill
    assert call(checkpoint, data, tmp_path / "out") == 0
    assert written == ["HumanEval/0", "HumanEval/1", "HumanEval/2", "HumanEval/2"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["executed"] is False and report["pass_at_k"] is None
    assert "add --allow-code-execution" in capsys.readouterr().out

    assert call(checkpoint, data, tmp_path / "out", "--allow-code-execution", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert len(written) == 4 and report["pass_at_k"] == {"pass@1": 0.0} and len(report["results"]) == 3
    assert call(checkpoint, data, tmp_path / "out", "--seed", "1") == 2
    assert "was written with other settings or another model" in capsys.readouterr().err


def test_infilling_is_told_the_length_and_sees_what_stands_behind(checkpoint, tmp_path, monkeypatch):
    row = humaneval(1, suffix="    # the end\n")
    (problem,) = read_problems("humaneval-infilling", write_rows(tmp_path / "i.jsonl", [row]))
    assert problem.program("    return x + 1\n").endswith("return x + 1\n    # the end\n")
    model, tokenizer = A2DForMaskedDiffusion.from_pretrained(checkpoint), tiny_tokenizer()
    calls = []
    real = model.diffusion_generate
    monkeypatch.setattr(
        model, "diffusion_generate", lambda row, **rest: calls.append((row, rest)) or real(row, **rest)
    )
    code_tasks.write_program(model, tokenizer, problem, {"max_new_tokens": 2, "temperature": 0.0})
    ((ids, options),) = calls
    length = len(tokenizer(row["canonical_solution"]).input_ids)
    assert int((ids == VOCAB_SIZE - 1).sum()) == length and options["max_new_tokens"] == 0
    after = tokenizer(row["suffix"]).input_ids
    assert ids[0, -len(after) :].tolist() == after


def test_infilling_counts_what_is_exactly_the_text_that_was_taken_out(checkpoint, tmp_path, monkeypatch, capsys):
    rows = [humaneval(i) for i in range(4)]
    texts = {
        "HumanEval/0": "    return x + 0\n",
        "HumanEval/1": "    return x + 1 \n\n",  # white space at the end aside
        "HumanEval/2": "return x + 2\n",  # not at the beginning, where it means something
        "HumanEval/3": "    return 3 + x\n",
    }
    monkeypatch.setattr(code_tasks, "write_program", lambda model, tokenizer, problem, options: texts[problem.name])
    data, out = write_rows(tmp_path / "i.jsonl", rows), tmp_path / "out"
    assert call(checkpoint, data, out, task="humaneval-infilling") == 0
    report = json.loads((out / "report.json").read_text())
    assert report["exact_match"] == 0.5 and report["pass_at_k"] is None, "nothing was run for it"
    printed = capsys.readouterr().out
    assert "exact_match" in printed and "0.500" in printed and "add --allow-code-execution" in printed
    assert call(checkpoint, data, tmp_path / "other") == 0
    assert json.loads((tmp_path / "other" / "report.json").read_text())["exact_match"] is None


def test_a_prompt_is_never_cut(checkpoint, tmp_path, capsys):
    data = write_rows(tmp_path / "h.jsonl", [humaneval(0)])
    assert call(checkpoint, data, tmp_path / "out", "--max-new-tokens", "128") == 2
    assert "the model's context holds 128: lower --max-new-tokens" in capsys.readouterr().err


def test_generations_refuse_what_others_wrote(tmp_path):
    kept = Generations(tmp_path / "g.jsonl", {"seed": 0})
    kept.add("a", ["x\u2028y"])
    assert Generations(tmp_path / "g.jsonl", {"seed": 0}).done == {"a": ["x\u2028y"]}
    with pytest.raises(BadInput, match="give another --out"):
        Generations(tmp_path / "g.jsonl", {"seed": 1})


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--samples", "0"], "--samples must be above 0"),
        (["--samples", "3"], "would all be the same: give --temperature"),
        (["--limit", "0"], "--limit must be above 0"),
        (["--timeout", "0"], "--timeout must be above 0"),
        (["--data", "nowhere.jsonl"], "--data nowhere.jsonl cannot be read"),
    ],
)
def test_bad_flags(checkpoint, tmp_path, capsys, flags, sentence):
    data = write_rows(tmp_path / "h.jsonl", [humaneval(0)])
    assert call(checkpoint, data, tmp_path / "out", *flags) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()
