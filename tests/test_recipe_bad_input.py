"""What a recipe says of input that cannot be used: one sentence, exit code 2, and nothing that looks finished."""

import json
from pathlib import Path

import pytest
import torch

from a2d_hf.recipe_main import run_recipe
from a2d_hf.trainers.checkpointed_trainer import CheckpointedTrainer
from a2d_hf.trainers.checkpoints import list_checkpoints
from tests.test_recipes import load


PAIR = {"prompt": "the dog", "completion": " jumps"}
CHAT = {"messages": [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "jumps"}]}


@pytest.fixture
def start(make_checkpoint, tmp_path: Path, monkeypatch, capsys):
    """Starts a recipe as `python recipes/X.py` would; returns its exit code and the lines of its error."""

    def start(rows: list[dict], words: str = "", name: str = "mdlm_sft", option: str = "") -> tuple[int, list[str]]:
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = f"""--model_name_or_path {make_checkpoint("llama")} --dataset_name {data}{option} --max_steps 4
            --output_dir {tmp_path / "out"} --per_device_train_batch_size 2 --report_to none --use_cpu true
            --disable_tqdm true --max_length 32 --save_steps 2"""
        monkeypatch.setattr("sys.argv", [name, *common.split(), *words.split()])
        recipe = load(name)
        capsys.readouterr()
        code = run_recipe(recipe.main, recipe.make_parser())
        told = capsys.readouterr().err.splitlines()
        return code, [line for line in told if line.startswith("a2d: error:") or "Traceback" in line]

    return start


CASES = {
    "missing columns": ([{"words": "a", "n": 1}], "", "mdlm_sft", "", "has no text (it has words, n)"),
    "half a pair": ([{"prompt": "a", "answer": "b"}], "", "mdlm_sft", "", "has no text (it has prompt, answer)"),
    "empty after filtering": ([PAIR | {"lang": "c"}], "", "mdlm_sft", "[lang:python]", "no row with lang = python"),
    "no such column": ([PAIR], "", "mdlm_sft", "[lang:python]", "has no column lang (it has prompt, completion)"),
    "target longer": ([PAIR | {"prompt": "the dog " * 40}], "", "mdlm_sft", "", "1 dropped because nothing"),
    "no template": ([CHAT], "", "mdlm_sft", "", "the tokenizer has no chat template"),
    "no value": ([PAIR, {"prompt": "a", "completion": None}], "", "mdlm_sft", "", "no text in column 'completion'"),
    "no block": ([PAIR], "--block_size 0", "bd3lm_sft", "", "`block_size` must be positive, not 0"),
    "block size": ([PAIR], "--block_size 5", "bd3lm_sft", "", "`block_size` 5"),
    "no anchors": ([PAIR], "--anchor_cache nowhere", "repalign_sft", "", "nowhere holds no anchors.json"),
    "no checkpoint": ([PAIR], "--resume_from_checkpoint true", "mdlm_sft", "", "holds no complete checkpoint"),
    "no model": ([PAIR], "--model_name_or_path ./no-model", "mdlm_sft", "", "no-model"),
    "unknown argument": ([PAIR], "--learning_rato 1", "mdlm_sft", "", "--learning_rato"),
    "no configuration": ([PAIR], "--config nowhere.yaml", "mdlm_sft", "", "nowhere.yaml"),
    "bad value": ([PAIR], "--loss_weighting heavy", "mdlm_sft", "", "heavy"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence(case: str, start, tmp_path: Path):
    rows, words, name, option, said = CASES[case]
    code, told = start(rows, words, name, option)
    assert code == 2, told
    assert len(told) == 1 and said in told[0]
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_yaml_with_a_wrong_key_is_named(start, tmp_path: Path):
    (tmp_path / "a.yaml").write_text("learning_rat: 1.0\n")
    code, told = start([PAIR], f"--config {tmp_path / 'a.yaml'}")
    assert code == 2 and len(told) == 1 and "learning_rat" in told[0]


def test_anchors_of_another_model_are_refused(start, make_checkpoint, tmp_path: Path):
    other = make_checkpoint("llama", name="other", seed=1)
    folder = tmp_path / "anchors"
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(PAIR) + "\n")
    script = load("../scripts/precompute_anchors")
    words = f"""--model_name_or_path {other} --dataset_name {data} --anchor_cache {folder}
        --output_dir {tmp_path / "o"} --report_to none --use_cpu true --max_length 32"""
    script.main(*script.make_parser().parse_args_and_config(words.split()))
    code, told = start([PAIR] * 8, f"--anchor_cache {folder}", "repalign_sft")
    assert code == 2 and len(told) == 1 and "was written with another model" in told[0]


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(start, tmp_path: Path, monkeypatch):
    own = CheckpointedTrainer.training_step

    def breaking(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 3:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        return own(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(CheckpointedTrainer, "training_step", breaking)
    code, told = start([PAIR] * 8)
    assert code == 1 and len(told) == 1
    assert "The loss became nan in step 4, in the batch with rows [" in told[0] and "checkpoint-2" in told[0]
    assert [Path(path).name for path in list_checkpoints(str(tmp_path / "out"))] == ["checkpoint-2"]


def test_out_of_memory_names_the_settings(start, monkeypatch):
    def full(self, *args, **kwargs):
        self.model.train()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(CheckpointedTrainer, "training_step", full)
    code, told = start([PAIR] * 8)
    assert code == 1 and len(told) == 1
    assert "Out of memory in step 1: try `per_device_train_batch_size=1`" in told[0]


def test_a_checkpoint_of_another_run_is_refused(start, tmp_path: Path):
    assert start([PAIR] * 8) == (0, [])
    code, told = start([PAIR] * 8, "--resume_from_checkpoint true --seed 7 --max_steps 6")
    assert code == 2 and len(told) == 1 and "belongs to another run" in told[0] and "seed 7 (was 42)" in told[0]
    code, told = start([PAIR] * 8 + [PAIR | {"prompt": "other"}], "--resume_from_checkpoint true")
    assert code == 2 and len(told) == 1 and "belongs to another run" in told[0]
