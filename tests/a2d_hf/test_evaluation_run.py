"""The whole of `a2d eval` on a tiny run: what is in the report, what is measured twice, and what is not."""

import errno
import json
import math
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys

import pytest
import torch

from a2d_hf import evaluate, evaluation_subject, lm_eval_cli, task_scores
from a2d_hf.cli import main
from a2d_hf.evaluation_run import EvaluationSettings
from tests.conftest import REPOSITORY, tiny_model, tiny_tokenizer


STORY = "The quick dog jumps over the lazy fox.\nA model reads from left to right, one word at a time.\n\n"
TRAIN = ["--max-steps", "3", "--batch-size", "2", "--max-length", "32", "--device", "cpu", "--held-out", "0.3"]
QUICK = ["--mc-samples", "2", "--infill-spans", "3", "--samples", "1"]
TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two tiny finished runs of one parent: (folder with `run`, `other`, `parent`)."""
    folder = tmp_path_factory.mktemp("eval")
    tiny_model("llama").save_pretrained(folder / "parent")
    tiny_tokenizer().save_pretrained(folder / "parent")
    (folder / "story.txt").write_text(STORY * 12)
    for name, rate in (("run", "1e-3"), ("other", "1e-2")):
        out = ["--out", str(folder / name), "--data", str(folder / "story.txt"), "--learning-rate", rate]
        assert main(["convert", str(folder / "parent"), *out, *TRAIN]) == 0
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of the first run, unmeasured."""
    return shutil.copytree(made / "run", tmp_path / "run")


@pytest.fixture
def call(capsys):
    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def report_of(run):
    return json.loads((run / "eval" / "report.json").read_text())


def test_everything_is_in_the_report_and_the_same_seed_gives_the_same_bytes(call, run):
    code, out, err = call("eval", run, "--sweep", *QUICK)
    assert code == 0, err
    first, page = (run / "eval" / "report.json").read_bytes(), (run / "eval" / "report.html").read_text()
    report = report_of(run)
    assert report["parent"]["available"] and report["gap"]["tokens"] == report["nelbo"]["tokens"]
    assert [line["length"] for line in report["infilling"]] == [1, 4, 8] and report["infilling"][0]["parent"]
    assert len(report["samples"]) == 1 and report["samples"][0]["parent_text"]
    swept = report["throughput"]
    assert swept["aup"] >= 0 and swept["parent"]["tokens_per_forward"] == 1.0
    assert all(point["parent_nll"] > 0 for point in swept["points"])
    timings = json.loads((run / "eval" / "timings.json").read_text())
    assert len(timings["throughput"]) == len(swept["points"]) and "tokens_per_second" not in first.decode()
    assert str(run.parent) not in first.decode()
    for words in ("tokens/s", "the parent's generate", "gaps right"):
        assert words in out
    assert not re.search(r"<script|<link|@import|src=|url\(", page)
    for words in ("not a perplexity", "a2d eval", "--sweep", "mask_row", "Its training", "play again", "AUP"):
        assert words in page, words
    assert call("eval", run, "--sweep", *QUICK, "--fresh")[0] == 0
    assert (run / "eval" / "report.json").read_bytes() == first
    assert call("eval", run, "--sweep", *QUICK, "--seed", 1)[0] == 0
    assert (run / "eval" / "report.json").read_bytes() != first


def test_the_gap_to_the_parent_is_paired(run):
    """Against the definition, row by row."""
    assert main(["eval", str(run), *QUICK, "--no-html"]) == 0
    assert not (run / "eval" / "report.html").exists()
    report = report_of(run)
    difference = report["nelbo"]["nats_per_token"] - report["parent"]["nll"]["nats_per_token"]
    assert report["gap"]["nats_per_token"] == pytest.approx(difference)
    apart = (report["nelbo"]["standard_error"] ** 2 + report["parent"]["nll"]["standard_error"] ** 2) ** 0.5
    assert report["gap"]["standard_error"] != pytest.approx(apart)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(call, run, made, tmp_path, monkeypatch):
    unbroken = shutil.copytree(made / "run", tmp_path / "unbroken" / "run")
    assert call("eval", unbroken, *QUICK)[0] == 0

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(evaluation_subject, "fill_gaps", stop)
        code, _, err = call("eval", run, *QUICK)
    assert code == 130 and "goes on from there" in err and "Traceback" not in err
    assert not (run / "eval" / "report.json").exists()

    def again(*args, **kwargs):
        raise AssertionError("measured twice")

    with monkeypatch.context() as finished:
        finished.setattr(evaluate, "row_nelbos", again)
        finished.setattr(evaluate, "masked_accuracy", again)
        assert call("eval", run, *QUICK)[0] == 0
    assert (run / "eval" / "report.json").read_bytes() == (unbroken / "eval" / "report.json").read_bytes()
    # Nothing is left to measure: no model is loaded.
    monkeypatch.setattr("a2d_hf.converted_model.ConvertedModel.load", again)
    monkeypatch.setattr("a2d_hf.surgery.load_parent", again)
    code, out, _ = call("eval", run, *QUICK)
    assert code == 0 and "finished parts of an earlier call" in out


def test_another_model_is_measured_again(call, run):
    assert call("eval", run, *QUICK)[0] == 0
    before = report_of(run)["nelbo"]["nats_per_token"]
    from a2d_hf import A2DForMaskedDiffusion

    model = A2DForMaskedDiffusion.from_pretrained(run / "model")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(run / "model")
    assert call("eval", run, *QUICK)[0] == 0
    assert report_of(run)["nelbo"]["nats_per_token"] != before


def test_a_damaged_part_is_measured_again(call, run):
    assert call("eval", run, *QUICK)[0] == 0
    first = (run / "eval" / "report.json").read_bytes()
    for part in (run / "eval" / "parts").glob("nelbo-*.json"):
        part.write_text('{"resu')
    assert call("eval", run, *QUICK)[0] == 0 and (run / "eval" / "report.json").read_bytes() == first


def test_against_another_run_the_difference_is_paired(call, run, made):
    code, out, err = call("eval", run, "--against", made / "other", *QUICK)
    assert code == 0, err
    report = report_of(run)
    totals = {}
    for part in (run / "eval" / "parts").glob("nelbo-*.json"):
        kept = json.loads(part.read_text())
        totals[kept["key"]["model"]] = kept["result"]["report"]
    assert len(totals) == 2
    rows = [json.loads(line) for line in (run / "eval" / "held_out.jsonl").read_text().splitlines()]
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    one, two = totals.values()
    tokens = sum(counts)
    mean = sum(b - a for a, b in zip(one, two, strict=True)) / tokens
    residuals = [b - a - mean * n for a, b, n in zip(one, two, counts, strict=True)]
    error = (len(residuals) / (len(residuals) - 1) * sum(r * r for r in residuals)) ** 0.5 / tokens
    found = report["against"]["difference"]
    expected = report["against"]["nelbo"]["nats_per_token"] - report["nelbo"]["nats_per_token"]
    assert found["nats_per_token"] == pytest.approx(expected) and abs(expected) == pytest.approx(abs(mean))
    assert found["standard_error"] == pytest.approx(error)
    assert not report["against"]["notes"] and "paired" in out
    assert "run beside other" in (run / "eval" / "report.html").read_text()


def test_against_itself_the_difference_is_nothing(call, run):
    assert call("eval", run, "--against", run, "--sweep", *QUICK)[0] == 0
    assert report_of(run)["against"]["difference"]["nats_per_token"] == 0
    page, points = (run / "eval" / "report.html").read_text(), report_of(run)["throughput"]["points"]
    assert page.count("tokens/s, ") == 2 * len(points)


def test_against_a_model_with_another_tokenizer_is_refused(call, run, made, tmp_path):
    other = shutil.copytree(made / "other", tmp_path / "other")
    file = other / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[10], list(vocabulary)[11]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))
    code, _, err = call("eval", run, "--against", other, *QUICK)
    assert code == 2 and "other tokens" in err


def test_other_held_out_rows_are_said(call, run, made, tmp_path):
    other = shutil.copytree(made / "other", tmp_path / "other")
    lines = (other / "eval" / "held_out.jsonl").read_text().splitlines()
    (other / "eval" / "held_out.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert call("eval", run, "--against", other, *QUICK)[0] == 0
    assert "may have been trained on this text" in report_of(run)["against"]["notes"][0]


def test_a_full_disk_is_one_sentence_and_keeps_what_is_finished(call, run, monkeypatch):
    real, writes = os.replace, []

    def full(source, target):
        writes.append(target)
        if len(writes) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target)

    with monkeypatch.context() as disk:
        disk.setattr(os, "replace", full)
        code, _, err = call("eval", run, *QUICK)
    assert code == 1 and "No space left" in err and "Traceback" not in err
    assert len(list((run / "eval" / "parts").iterdir())) == 2  # no half-written one
    assert call("eval", run, *QUICK)[0] == 0


def test_a_file_that_may_grow_no_further_is_one_sentence(run):
    """The system's own refusal, in a process of its own: a part larger than the limit is not left behind half."""
    command = [sys.executable, "-m", "a2d_hf.cli", "eval", str(run), *QUICK, "--device", "cpu"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, cwd=REPOSITORY)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("a2d: error:") == 1 and "No space left to write" in done.stderr
    assert not (run / "eval" / "report.json").exists() and (run / "manifest.json").is_file()
    for file in (run / "eval").rglob("*.json*"):
        assert not file.name.startswith(".") and (file.suffix != ".json" or json.loads(file.read_text()))


def test_a_parent_that_is_gone_leaves_the_rest(call, run, tmp_path):
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["source"]["path"] = str(tmp_path / "gone")
    (run / "manifest.json").write_text(json.dumps(manifest))
    code, out, _ = call("eval", run, "--sweep", *QUICK)
    report = report_of(run)
    assert code == 0 and "unavailable" in out and report["gap"] is None and report["throughput"]["parent"] is None
    assert "could not be measured" in (run / "eval" / "report.html").read_text()


def test_tasks_run_on_both_sides_and_once(call, run, tmp_path, own_tasks, monkeypatch):
    rows = [{"q": f"the {w}", "choices": [" dog", " fox", " model"], "gold": i % 3} for i, w in enumerate("abcdef")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_choice.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    flags = ["--tasks", "tiny_choice", "--include-path", tmp_path / "tasks", "--mc-num", 4, *QUICK]
    code, out, err = call("eval", run, *flags)
    assert code == 0 and "tiny_choice" in out, err
    line = report_of(run)["tasks"][0]
    parent, tokenizer = tiny_model("llama"), tiny_tokenizer()
    right = []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            before, whole = tokenizer(row["q"]).input_ids, tokenizer(row["q"] + choice).input_ids
            logs = parent(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(before), len(whole))))
        right.append(scores.index(max(scores)) == row["gold"])
    assert line["metric"] == "acc" and line["parent_value"] == pytest.approx(statistics.mean(right))
    assert line["examples"] == 6 and line["value"] is not None and line["parent_stderr"] is not None
    first = (run / "eval" / "report.json").read_bytes()
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda *args, **kwargs: pytest.fail("asked twice"))
    assert call("eval", run, *flags)[0] == 0 and (run / "eval" / "report.json").read_bytes() == first


WRITTEN = """task: tiny_written
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: generate_until
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs:
  until: []
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: rouge
    aggregation: mean
    higher_is_better: true
    rouge_types: [rouge1]
metadata:
  version: 1.0
"""


@pytest.fixture
def own_tasks(monkeypatch):
    """Only the task files of `--include-path`: reading the harness' own takes ten seconds."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    def manager(include_path):
        return TaskManager(include_path=include_path, include_defaults=False)

    for place in (lm_eval_cli, task_scores):
        monkeypatch.setattr(place, "task_manager", manager)


@pytest.fixture
def written(tmp_path, own_tasks):
    """Flags for a task whose answers are written; what is right shares words with all that the tokenizer knows."""
    words = "the quick brown fox jumps over lazy dog a model reads from left to right one word at time"
    rows = [{"q": f"{word} fox", "a": words} for word in words.split()[:4]]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_written.yaml").write_text(WRITTEN.format(file=tmp_path / "rows.jsonl"))
    return ["--tasks", "tiny_written", "--include-path", tmp_path / "tasks", "--sweep", "--device", "cpu", *QUICK]


def test_a_written_task_is_swept_and_its_areas_are_the_definition(call, run, written):
    code, out, err = call("eval", run, *written)
    assert code == 0, err
    report, page = report_of(run), (run / "eval" / "report.html").read_text()
    (curve,) = report["task_curves"]
    (line,) = report["tasks"]
    assert (curve["task"], curve["metric"], curve["new_tokens"]) == ("tiny_written", "rouge1", 8)
    assert curve["parent_value"] == line["parent_value"] is not None
    steps = {p["setting"]["steps"]: p for p in curve["points"] if "steps" in p["setting"]}
    assert list(steps) == [8, 4, 2, 1]
    for count, point in steps.items():
        assert point["tokens_per_forward"] == pytest.approx(8 / count)
    assert steps[8]["value"] == line["value"], "one token per forward is what a task is written with anyway"
    best = 100 * max(point["value"] for point in curve["points"])
    for way, area in curve["aup"].items():
        points = sorted((p["tokens_per_forward"], 100 * p["value"]) for p in curve["points"] if way in p["setting"])
        kept = [(r, y) for r, y in points if y >= points[0][1] - 5]
        weigh = [y * min(math.exp(-3 * (1 - y / best)), 1) if best else 0.0 for _, y in kept]
        expected = kept[0][0] * kept[0][1]
        for i in range(1, len(kept)):
            expected += (kept[i][0] - kept[i - 1][0]) * (weigh[i] + weigh[i - 1]) / 2
        assert area == pytest.approx(expected), way
    assert "AUP of tiny_written: steps" in out and "the parent" in out
    assert "tiny_written, 4 examples: what writing more tokens per pass costs" in page


def test_tasks_by_pattern_and_by_file(call, run, written, tmp_path):
    file = tmp_path / "tasks" / "tiny_written.yaml"
    flags = [flag for flag in written if flag != "--sweep"]
    flags[1] = f"tiny_wr*,{file}"
    code, _, err = call("eval", run, *flags)
    assert code == 0, err
    first, second = report_of(run)["tasks"]
    assert first == second and first["task"] == "tiny_written"
    file.write_text(file.read_text().replace("max_gen_toks: 8", "max_gen_toks: 2"))
    assert call("eval", run, *flags)[0] == 0 and report_of(run)["tasks"][1]["new_tokens"] == 2


def test_without_a_sweep_no_task_is_written_twice(call, run, written):
    flags = [flag for flag in written if flag != "--sweep"]
    assert call("eval", run, *flags)[0] == 0
    assert report_of(run)["task_curves"] == [] and len(list((run / "eval" / "parts").glob("task-*"))) == 1


def test_an_interrupted_sweep_of_a_task_writes_no_setting_twice(call, run, written, monkeypatch):
    """Stopped in the fourth of eight; the parent's answers and the other settings are left."""
    import lm_eval

    real, asked = lm_eval.simple_evaluate, []

    def stopped(model, **rest):
        asked.append(dict(vars(model).get("decoding", {"parent": True})))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(model, **rest)

    monkeypatch.setattr(lm_eval, "simple_evaluate", stopped)
    code, _, err = call("eval", run, *written)
    assert code == 130 and "goes on from there" in err and not (run / "eval" / "report.json").exists()
    assert call("eval", run, *written)[0] == 0
    finished = [*asked[:3], *asked[4:]]
    assert len(finished) == 9 and all(finished.count(each) == 1 for each in finished) and asked[4] == asked[3]


def test_an_unknown_task_names_the_nearest_and_measures_nothing(call, run):
    pytest.importorskip("lm_eval")
    code, _, err = call("eval", run, "--tasks", "arc_eazy", *QUICK)
    assert code == 2 and "arc_easy" in err and not (run / "eval" / "parts").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"file": "nowhere.jsonl"}, "--tasks tiny_choice cannot be loaded"),
        ({"task: tiny_choice": "output: x"}, "--tasks tiny_choice is not a task"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_said_before_anything_is_measured(
    call, run, tmp_path, own_tasks, change, told
):
    text = TASK.format(file=change.pop("file", tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text('{"q": "a", "choices": ["b", "c"], "gold": 0}\n')
    for old, new in change.items():
        text = text.replace(old, new)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_choice.yaml").write_text(text)
    code, _, err = call("eval", run, "--tasks", "tiny_choice", "--include-path", tmp_path / "tasks", *QUICK)
    assert code == 2 and told in err and "Traceback" not in err and not (run / "eval" / "parts").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--samples", "-1"], "--samples must be 0 or more"),
        (["--limit", "5"], "belong to --tasks"),
        (["--against", "nowhere"], "--against nowhere"),
        (["--tasks", ","], "--tasks names no task"),
    ],
)
def test_bad_flags(call, run, flags, told):
    code, _, err = call("eval", run, *flags)
    assert code == 2 and told in err and not (run / "eval" / "report.json").exists()


def test_nothing_is_measured_for_zero(call, run):
    assert call("eval", run, "--mc-samples", 1, "--infill-spans", 0, "--samples", 0)[0] == 0
    assert report_of(run)["infilling"] == report_of(run)["samples"] == []


def test_the_flags_have_the_defaults_of_the_settings():
    from a2d_hf.cli import build_parser
    from a2d_hf.commands.eval_command import NOT_SETTINGS

    flags = vars(build_parser()[0].parse_args(["eval", "RUN"]))
    defaults = vars(EvaluationSettings()) | {"tasks": None}
    assert {name: value for name, value in flags.items() if name not in NOT_SETTINGS} == defaults


def test_block_diffusion_is_measured_where_it_sees_both_sides(call, made, tmp_path):
    flags = ["--objective", "bd3lm", "--block-size", "4", "--data", made / "story.txt"]
    assert call("convert", made / "parent", "--out", tmp_path / "run", *flags, *TRAIN)[0] == 0
    code, _, err = call("eval", tmp_path / "run", "--sweep", *QUICK)
    report = report_of(tmp_path / "run")
    assert code == 0, err
    # A gap of 4 fills its block: what stands behind it is out of sight.
    assert [line["spans"] for line in report["infilling"]] == [3, 0, 0] and report["throughput"]["aup"] is None
    assert "Not measured: gaps of 4, 8 tokens" in (tmp_path / "run" / "eval" / "report.html").read_text()
