"""The recipes: their YAML fits their own parser, and each trains a tiny model into a checkpoint that loads."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from a2d_hf import A2DForMaskedDiffusion


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))
ROWS = {
    "mdlm_sft": {"prompt": "question 1 2 3?", "completion": " answer: 3 2 1"},
    "mdlm_pt": {"text": "The quick brown fox jumps over the lazy dog. " * 8},
}
ROWS |= {f"{method}_{kind}": ROWS[f"mdlm_{kind}"] for method in ("bd3lm", "repalign") for kind in ("sft", "pt")}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch_lines(name: str) -> list[list[str]]:
    """The `accelerate launch` commands of a recipe's docstring, as words."""
    text = (load(name).__doc__ or "").replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip().startswith("accelerate launch")]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_tested_here(name: str):
    assert name in ROWS


@pytest.mark.parametrize("name", NAMES)
def test_launch_lines_name_files_that_are_there(name: str):
    lines = launch_lines(name)
    assert lines, "the docstring shows no launch line"
    for words in lines:
        for word in words:
            if word.startswith("recipes/"):
                assert (RECIPES.parent / word).is_file(), word


@pytest.mark.parametrize("name", NAMES)
def test_documented_arguments_are_known_to_the_parser(name: str):
    parser = load(name).make_parser()
    known = {flag for action in parser._actions for flag in action.option_strings} | {"--config", "--config_file"}
    documented = set(re.findall(r"--[a-z][\w-]*", load(name).__doc__))
    assert documented <= known, documented - known


@pytest.mark.parametrize("path", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_fits_its_recipe(path: Path, tmp_path: Path):
    (name,) = [name for name in NAMES if path.stem.endswith(name)]
    # On this machine there may be no GPU, and the training arguments check for it.
    words = ["--config", str(path), "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    script, training, model, _ = load(name).make_parser().parse_args_and_config(words)
    values = yaml.safe_load(path.read_text())
    assert model.model_name_or_path == values["model_name_or_path"]
    assert script.dataset_name == values["dataset_name"]
    assert training.learning_rate == values["learning_rate"] and training.max_length == values["max_length"]


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configuration(path: Path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes >= 1


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_a_checkpoint_that_loads(name: str, make_checkpoint, tmp_path: Path):
    parent = make_checkpoint("llama")
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(ROWS[name]) + "\n" for _ in range(8)))
    out = tmp_path / "out"
    words = f"""--model_name_or_path {parent} --dataset_name {data} --output_dir {out} --max_steps 2 --max_length 32
        --per_device_train_batch_size 2 --learning_rate 0.01 --report_to none --use_cpu true --disable_tqdm true"""
    recipe = load(name)
    recipe.main(*recipe.make_parser().parse_args_and_config(words.split()))
    trained = A2DForMaskedDiffusion.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(parent).state_dict()
    for key, value in trained.backbone.state_dict().items():
        assert not torch.equal(value[: len(before[key])], before[key]), f"{key} has not changed"


def test_pretraining_defaults_lose_no_text_and_add_no_eos(tmp_path: Path):
    parser = load("mdlm_pt").make_parser()
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    _, config, _, _ = parser.parse_args_and_config(words)
    assert config.insert_eos is False and config.truncation_mode == "chunk"
    _, config, _, _ = load("mdlm_pt").make_parser().parse_args_and_config([*words, "--truncation_mode", "keep_start"])
    assert config.truncation_mode == "keep_start", "the command line wins"
