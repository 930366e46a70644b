"""The accelerate configurations, launched: the processes and the kind that they promise, and a model at the end.

ZeRO needs DeepSpeed and a GPU: those are read here and not run.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from a2d_hf import A2DForMaskedDiffusion
from tests.conftest import REPOSITORY
from tests.test_recipes import ROWS


CONFIGS = Path("recipes/accelerate_configs")
# What of a configuration is left out on a machine without its GPUs.
HERE = ["--mixed_precision", "no", "--main_process_port", "0"]
TWO = [*HERE, "--num_processes", "2"]
LAUNCHES = {
    "cpu": ([], {"distributed_type": "NO", "processes": 1, "world_size": 1, "backend": None}),
    "single_gpu": (HERE[:2], {"distributed_type": "NO", "processes": 1, "world_size": 1, "backend": None}),
    "cpu_ddp": (HERE[2:], {"distributed_type": "MULTI_CPU", "processes": 2, "world_size": 2, "backend": "gloo"}),
    "multi_gpu": (TWO, {"distributed_type": "MULTI_CPU", "processes": 2, "world_size": 2, "backend": "gloo"}),
    "fsdp2": (TWO, {"distributed_type": "FSDP", "processes": 2, "world_size": 2, "backend": "gloo"}),
}
ZERO = {"zero2": 2, "zero3": 3, "zero3_cpu_offload": 3, "zero3_nvme_offload": 3}


def launch(config: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    return subprocess.run([*command, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def arguments(parent: Path, data: Path, out: Path) -> list[str]:
    words = f"""--model_name_or_path {parent} --dataset_name {data} --output_dir {out} --max_steps 3 --max_length 64
        --per_device_train_batch_size 2 --learning_rate 0.01 --warmup_steps 0 --logging_steps 1 --report_to none
        --use_cpu true --disable_tqdm true --save_only_model true"""
    return words.split()


@pytest.fixture
def inputs(make_checkpoint, tmp_path: Path) -> tuple[Path, Path, Path]:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text((json.dumps(ROWS["mdlm_sft"]) + "\n") * 16)
    return make_checkpoint("llama"), data, tmp_path / "out"


def test_every_configuration_is_launched_or_named_as_not_run():
    assert {path.stem for path in (REPOSITORY / CONFIGS).glob("*.yaml")} == {*LAUNCHES, *ZERO}


@pytest.mark.parametrize("config", LAUNCHES)
def test_a_configuration_is_launched(config: str, inputs, tmp_path: Path):
    more, expected = LAUNCHES[config]
    recipe = ["-m", "tests.launched_recipe", str(tmp_path / "told"), "recipes/mdlm_sft.py"]
    done = launch(config, *more, *recipe, *arguments(*inputs))
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(path.read_text()) for path in sorted((tmp_path / "told").iterdir())]
    assert len(told) == expected["processes"]
    for one in told:
        assert {name: one[name] for name in expected} == expected
        assert one["still"] == [] and one["steps"] == 3 and len(one["losses"]) == 3
        assert one["losses"] == told[0]["losses"]
        assert one["sharded"] == (one["parameters"] if config == "fsdp2" else 0)
    parent, _, out = inputs
    before = load_file(parent / "model.safetensors")
    for folder in (out, out / "checkpoint-3"):
        after = A2DForMaskedDiffusion.from_pretrained(folder).backbone.state_dict()
        assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
        assert all((after[name] != before[name]).any() for name in before), "the checkpoint is not what was trained"


def test_cpu_ddp_is_launched_as_it_is_documented(inputs, tmp_path: Path):
    """Without this file's wrapper: the recipe itself, the configuration as it stands."""
    done = launch("cpu_ddp", "recipes/mdlm_sft.py", *arguments(*inputs))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (inputs[-1] / "checkpoint-3" / "config.json").is_file()


@pytest.mark.parametrize("config", ["cpu", "cpu_ddp"])
def test_bad_input_is_a_sentence_and_a_failure(config: str, inputs, tmp_path: Path):
    parent, _, out = inputs
    quiet = ["--quiet"] if config == "cpu" else []
    done = launch(config, *quiet, "recipes/mdlm_sft.py", *arguments(parent, tmp_path / "nowhere.jsonl", out))
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("a2d: error:")]
    assert told and all("nowhere.jsonl cannot be loaded" in line for line in told)
    assert "recipe_main.py" not in done.stderr, "our own traceback"
    if config == "cpu":
        assert "Traceback" not in done.stderr
    assert not out.exists() or not any(out.rglob("*.safetensors"))


def test_without_accelerate_the_exit_code_is_the_recipes_own(inputs, tmp_path: Path):
    parent, _, out = inputs
    command = [sys.executable, "recipes/mdlm_sft.py", *arguments(parent, tmp_path / "nowhere.jsonl", out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("config", ZERO)
def test_zero_is_read_and_not_run_here(config: str):
    read = load_config_from_file(str(REPOSITORY / CONFIGS / f"{config}.yaml"))
    assert read.distributed_type == "DEEPSPEED" and read.deepspeed_config["zero_stage"] == ZERO[config]
    offloaded = {"zero3_cpu_offload": "cpu", "zero3_nvme_offload": "nvme"}.get(config, "none")
    assert read.deepspeed_config["offload_optimizer_device"] == offloaded
    assert read.deepspeed_config["offload_param_device"] == offloaded
