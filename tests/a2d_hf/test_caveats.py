"""Parents that convert with a caveat: hybrids only when asked, ALiBi with a warning."""

import json

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


def test_alibi_is_told_and_kept_in_the_manifest(tmp_path, capsys):
    """Its bias is a function of the key alone, which is a distance only while attention looks to the left."""
    folder = tmp_path / "bloom"
    AutoModelForCausalLM.from_config(tiny_config("bloom")[0]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert main(["convert", str(folder), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert "ALiBi" in said.out + said.err
    assert "ALiBi" in json.loads((tmp_path / "run" / "manifest.json").read_text())["caveats"][0]
