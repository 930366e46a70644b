"""`a2d quickstart`: the whole pipeline, shrunk to seconds; and that an interrupted one continues to the same bytes."""

import functools
import io
import json
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from a2d_hf import conversion, quickstart, quickstart_parent, quickstart_samples
from a2d_hf.console import Console
from a2d_hf.errors import BadInput
from a2d_hf.quickstart import QuickstartPlan, next_folder, run_quickstart
from a2d_hf.quickstart_parent import HELD_OUT, VOCABULARY, reference_text, train_tokenizer
from a2d_hf.quickstart_samples import denoising_of


MINUTES = 0.03  # 3 steps of the parent, 6 of the conversion


@pytest.fixture(scope="module")
def shrunk():
    """A model and an evaluation small enough for a test; everything else is as in the real thing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            quickstart_parent, "ParentSize", functools.partial(quickstart_parent.ParentSize, hidden_size=32, layers=2)
        )
        patch.setattr(conversion, "QUICK_EVAL_TOKENS", 512)
        patch.setattr(quickstart_samples, "NEW_TOKENS", 16)
        patch.setattr(quickstart_samples, "SAMPLE_STEPS", 8)

        def no_network(*args, **kwargs):
            raise AssertionError("the quickstart tried to reach the network")

        patch.setattr(socket.socket, "connect", no_network)
        yield patch


@pytest.fixture(scope="module")
def finished(shrunk, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    text = io.StringIO()
    code = run_quickstart(folder, minutes=MINUTES, console=Console(out=text, err=io.StringIO()))
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    return SimpleNamespace(folder=folder, code=code, text=text.getvalue(), manifest=manifest)


def test_it_ends_well_and_says_what_to_type_next(finished):
    assert finished.code == 0
    assert "a2d convert Qwen/Qwen3-0.6B" in finished.text.split("Next")[-1]


def test_it_leaves_what_it_promises_and_nothing_else(finished):
    assert {entry.name for entry in finished.folder.iterdir()} == {
        "python_reference.txt", "parent", "run", "quickstart.json", "report.html",
    }  # fmt: skip


def test_the_parent_is_an_ordinary_checkpoint(finished):
    config = json.loads((finished.folder / "parent" / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    model, report = AutoModelForCausalLM.from_pretrained(finished.folder / "parent", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(finished.folder / "parent").mask_token is None


def test_every_gate_passed_and_the_conversion_was_trained(finished):
    assert finished.manifest["status"] == "completed"
    assert {"identity", "reach"} <= set(finished.manifest["gates"])
    assert all(gate["passed"] for gate in finished.manifest["gates"].values())
    assert finished.manifest["training"]["steps"] == QuickstartPlan.of(MINUTES, 0).diffusion_steps


def test_training_moved_every_weight(finished):
    before = load_file(finished.folder / "parent" / "model.safetensors")
    after = load_file(finished.folder / "run" / "model" / "model.safetensors")
    assert set(before) == set(after)
    for name, value in before.items():
        assert not torch.equal(value, after[name][: len(value)]), f"{name} has not changed"


def test_parent_and_conversion_saw_the_same_rows(finished):
    facts = json.loads((finished.folder / "quickstart.json").read_text())["facts"]
    train = finished.manifest["data"]["train"]
    assert facts["parent"]["train_rows"] == train["rows"]


def test_the_report_shows_the_manifests_numbers(finished):
    html = (finished.folder / "report.html").read_text()
    for name in ("nelbo_before", "nelbo_after", "parent_nll"):
        assert f"{finished.manifest['results'][name]['nats_per_token']:.2f}" in html
    assert html.count("<svg") == 3
    assert "<script" not in html and not re.search(r"(?:src|href)=", html)


def test_the_terminal_shows_the_text_while_it_forms(finished):
    moments = re.findall(r"after (\d+) of 8 passes\n(.*)", finished.text)
    assert [int(step) for step, _ in moments[:3]] == [2, 4, 8]
    blanks = [line.count("░") for _, line in moments[:3]]
    assert blanks[0] > blanks[1] > blanks[2] == 0


def test_a_finished_folder_is_left_alone(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
    with pytest.raises(BadInput, match="finished quickstart"):
        run_quickstart(finished.folder, minutes=MINUTES)
    assert {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")} == before


def test_interrupted_it_continues_to_the_same_bytes(finished, shrunk, tmp_path: Path):
    folder, quiet = tmp_path / "out", Console(out=io.StringIO(), err=io.StringIO())

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt, match="the same command continues"):
            run_quickstart(folder, minutes=MINUTES, console=quiet)
    weights = folder / "parent" / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert run_quickstart(folder, minutes=MINUTES, console=quiet) == 0
    assert weights.stat().st_mtime_ns == stamp, "the parent was trained twice"
    for name in ("parent/model.safetensors", "run/model/model.safetensors"):
        assert (folder / name).read_bytes() == (finished.folder / name).read_bytes(), name


def test_continuing_with_other_choices_is_refused(tmp_path: Path):
    (tmp_path / "quickstart.json").write_text(
        json.dumps({"plan": {"seed": 0, "parent_steps": 7, "diffusion_steps": 9}, "facts": {}})
    )
    with pytest.raises(BadInput, match="other choices"):
        run_quickstart(tmp_path, minutes=1.0)


def test_a_broken_journal_is_named(tmp_path: Path):
    (tmp_path / "quickstart.json").write_text("{")
    with pytest.raises(BadInput, match="quickstart.json cannot be read"):
        run_quickstart(tmp_path)


def test_a_folder_with_other_things_is_refused_and_untouched(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        run_quickstart(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), 1e9])
def test_impossible_minutes_are_refused(tmp_path: Path, minutes: float):
    with pytest.raises(BadInput, match="--minutes"):
        run_quickstart(tmp_path / "out", minutes=minutes)
    assert not (tmp_path / "out").exists()


def test_minutes_scale_both_trainings():
    long, short = QuickstartPlan.of(10, 0), QuickstartPlan.of(5, 0)
    assert long.parent_steps == 2 * short.parent_steps and long.diffusion_steps == 2 * short.diffusion_steps


def test_the_next_free_folder(tmp_path: Path):
    root = tmp_path / "quickstart"
    assert next_folder(root) == root
    root.mkdir()
    assert next_folder(root) == root, "an unfinished one is continued"
    (root / "report.html").touch()
    assert next_folder(root) == tmp_path / "quickstart-2"


def test_no_paragraph_stands_in_the_text_twice():
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n[ \t]*\n", reference_text()) if p.strip()]
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_the_text_has_no_lines_that_only_draw():
    assert not [line for line in reference_text().splitlines() if set(line) and not re.search(r"[^\s*=~|+-]", line)]


def test_the_tokenizer_gives_back_what_it_read_and_begins_with_bos():
    text = reference_text()
    tokenizer = train_tokenizer(text)
    assert len(tokenizer) == VOCABULARY
    held_out = text[int(len(text) * (1 - HELD_OUT)) :]
    ids = tokenizer(held_out).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == held_out


def test_a_history_becomes_steps_and_confidences():
    mask = 9
    rows = [[1, mask, mask, mask], [1, mask, 5, mask], [1, 4, mask, mask], [1, 4, 6, 7]]
    nan = float("nan")
    output = SimpleNamespace(
        sequences=torch.tensor([rows[-1]]),
        confidences=torch.tensor([[nan, 0.5, 0.75, 0.25]]),
        history=[torch.tensor([row]) for row in rows],
    )
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(f"<{i}>" for i in ids))
    shown = denoising_of(output, tokenizer, "p", mask)
    assert shown.pieces == ["<4>", "<6>", "<7>"]
    assert shown.steps == [2, 3, 3], "a place that was masked again counts when it was filled for good"
    assert shown.confidence == [0.5, 0.75, 0.25]
    assert shown.num_steps == 3
