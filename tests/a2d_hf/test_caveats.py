"""Parents that convert under a condition: hybrids only when asked, ALiBi only as a distance."""

import pytest
from transformers import AutoModelForCausalLM

from a2d_hf.architecture_checks import tiny_config
from a2d_hf.cli import main
from tests.conftest import tiny_tokenizer


@pytest.fixture
def hybrid(tmp_path):
    folder = tmp_path / "hybrid"
    AutoModelForCausalLM.from_config(tiny_config("qwen3_next")[0]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_without_leave_it_is_refused_and_nothing_is_written(hybrid, tmp_path, capsys):
    assert main(["convert", str(hybrid), "--out", str(tmp_path / "run")]) == 1
    assert "--allow-hybrid" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_with_leave_it_converts_and_says_how_many_layers_open(hybrid, tmp_path, capsys):
    assert main(["convert", str(hybrid), "--out", str(tmp_path / "run"), "--allow-hybrid"]) == 0
    said = capsys.readouterr()
    assert "2 of 4 layers" in said.out + said.err
    assert (tmp_path / "run" / "model" / "config.json").exists()


def alibi_parent(folder):
    AutoModelForCausalLM.from_config(tiny_config("bloom")[0]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_alibi_converts_without_a_warning(tmp_path, capsys):
    """Its bias becomes a distance to both sides when attention opens."""
    assert main(["convert", alibi_parent(tmp_path / "bloom"), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert "ALiBi" not in said.out + said.err


def test_alibi_that_cannot_become_a_distance_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("a2d_hf.modeling.modeling_a2d.measure_by_distance", lambda backbone: 0)
    assert main(["convert", alibi_parent(tmp_path / "bloom"), "--out", str(tmp_path / "run")]) == 1
    assert "furthest to the right" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()
