"""The recipes and the anchor script of block diffusion and representation alignment, run in this process."""

import importlib.util
import json
from pathlib import Path

import pytest

from a2d_hf.trainers import last_complete_checkpoint


REPOSITORY = Path(__file__).resolve().parents[2]


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(model, data, out, *more):
    quiet = ["--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true", "--max_length", "64"]
    return [
        *("--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(out)),
        *("--max_steps", "2", "--per_device_train_batch_size", "2", *quiet, *more),
    ]


def write_rows(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    return write_rows(tmp_path / "texts", [{"text": f"the quick brown fox jumps {i} times"} for i in range(8)])


@pytest.mark.parametrize("name", ["bd3lm_sft", "bd3lm_pt", "repalign_sft", "repalign_pt"])
def test_a_recipe_reads_its_configuration(name, tmp_path):
    recipe = load(f"recipes/{name}.py")
    config = REPOSITORY / "recipes" / "configs" / f"qwen3_0.6b_{name}.yaml"
    told = recipe.make_parser().parse_args_and_config(
        ["--config", str(config), "--bf16", "false", "--use_cpu", "true"]
    )
    args = told[1]
    assert args.insert_eos == name.endswith("sft")
    if name.startswith("bd3lm"):
        assert args.block_size == 32 and args.max_length % 32 == 0
    else:
        assert args.frozen_parameters == ["embeddings", "head"]
    if name == "bd3lm_pt":
        assert args.block_size_curriculum == [1, 4, 32] and args.model_init_kwargs == {"token_shift": True}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("bd3lm_pt", ["--block_size_curriculum", "1", "8", "--block_size_curriculum_steps", "1"]),
        ("repalign_pt", ["--align_layers", "0", "-1", "--align_positions", "unmasked"]),
    ],
)
def test_a_recipe_trains_and_saves(name, more, make_checkpoint, texts, tmp_path):
    recipe, out = load(f"recipes/{name}.py"), tmp_path / "out"
    recipe.main(*recipe.make_parser().parse_args_and_config(arguments(make_checkpoint("llama"), texts, out, *more)))
    assert json.loads((out / "config.json").read_text())["objective"] == name.split("_")[0].replace("repalign", "mdlm")
    assert last_complete_checkpoint(str(out)).endswith("checkpoint-2")


def test_the_anchor_script_serves_the_recipe(make_checkpoint, texts, tmp_path):
    model, cache = make_checkpoint("llama"), ["--anchor_cache", str(tmp_path / "anchors"), "--align_layers", "1", "2"]
    script, recipe = load("scripts/precompute_anchors.py"), load("recipes/repalign_pt.py")
    told = arguments(model, texts, tmp_path / "out", *cache, "--insert_eos", "false", "--truncation_mode", "chunk")
    script.main(*script.make_parser().parse_args_and_config(told))
    assert len(list((tmp_path / "anchors").rglob("*.safetensors"))) == 8
    told = arguments(model, texts, tmp_path / "out", *cache, "--align_positions", "all", "--logging_steps", "1")
    recipe.main(*recipe.make_parser().parse_args_and_config(told))
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert all(entry["align_loss"] > 0 for entry in state["log_history"] if "loss" in entry)


def test_the_anchor_script_needs_a_folder(make_checkpoint, texts, tmp_path):
    script = load("scripts/precompute_anchors.py")
    with pytest.raises(ValueError, match="`--anchor_cache` is missing"):
        script.main(*script.make_parser().parse_args_and_config(arguments("x", texts, tmp_path / "out")))
