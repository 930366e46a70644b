"""Every published configuration, as it stands: two steps on tiny models and data under the real names."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig

from a2d_hf import A2DForMaskedDiffusion, cli
from a2d_hf.data_mixture import parse_mixture
from a2d_hf.shrinking import lost_structure
from tests.hub_mirror import DATASETS, MODELS, real_config, write_dataset, write_model
from tests.test_recipes import NAMES, RECIPES, load


CONFIGS = {path.stem: path for path in sorted((RECIPES / "configs").glob("*.yaml"))}
QLORA = "qwen3.5_27b_qlora_anchors_repalign_sft"
# Size alone: how long, how wide, where. Everything else is the YAML's.
SMALLER = """--max_steps 2 --max_length 64 --per_device_train_batch_size 2 --gradient_accumulation_steps 1
    --warmup_steps 0 --learning_rate 0.01 --logging_steps 1 --use_cpu true --bf16 false --report_to none
    --disable_tqdm true""".split()


def values_of(stem: str) -> dict:
    return yaml.safe_load(CONFIGS[stem].read_text())


def data_names(stem: str) -> list[str]:
    return [part.path for part in parse_mixture(values_of(stem)["dataset_name"])]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch):
    """A folder to run in, and a function that puts models and data sets of the Hub into it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def put(*names: str) -> None:
        for name in names:
            if not Path(name).exists():
                (write_model if name in MODELS else write_dataset)(Path(name), name)

    return put


def run(stem: str, *more: str):
    """Runs the recipe of a configuration on it; what the trainer was comes back."""
    (name,) = [name for name in NAMES if stem.endswith(name)]
    recipe = load(name)
    (kind,) = [value for key, value in vars(recipe).items() if key.endswith("Trainer")]
    made = []
    setattr(recipe, kind.__name__, lambda **arguments: made.append(kind(**arguments)) or made[0])
    recipe.main(*recipe.make_parser().parse_args_and_config(["--config", str(CONFIGS[stem]), *SMALLER, *more]))
    return made[0]


@pytest.mark.parametrize("stem", CONFIGS)
def test_the_stem_ends_with_the_recipe(stem: str):
    assert sum(stem.endswith(name) for name in NAMES) == 1


@pytest.mark.parametrize("name", MODELS)
def test_the_stand_in_has_the_structure_of_the_model(name: str, tmp_path: Path):
    write_model(tmp_path, name)
    small = AutoConfig.from_pretrained(tmp_path)
    assert small.model_type == MODELS[name][0] and lost_structure(real_config(name), small) == []


@pytest.mark.parametrize("stem", [stem for stem in CONFIGS if stem != QLORA])
def test_a_configuration_trains_as_it_stands(stem: str, hub):
    values = values_of(stem)
    hub(values["model_name_or_path"], *data_names(stem))
    before = A2DForMaskedDiffusion.from_pretrained(values["model_name_or_path"]).state_dict()
    trainer = run(stem)
    assert trainer.state.global_step == 2
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    out = Path(values["output_dir"])
    config = json.loads((out / "adapter_config.json" if values.get("use_peft") else out / "config.json").read_text())
    if values.get("use_peft"):
        assert sorted(config["target_modules"]) == sorted(values["lora_target_modules"])
        tensors = load_file(out / "adapter_model.safetensors")
        moved = {
            name.split(".lora_B")[0].rsplit(".", 1)[-1] for name, t in tensors.items() if "lora_B" in name and t.any()
        }
        assert moved == set(values["lora_target_modules"])
        return
    for key, value in values.get("model_init_kwargs", {}).items():
        assert config[key] == value
    assert config["objective"] == ("bd3lm" if "bd3lm" in stem else "mdlm")
    if "block_size" in values:
        assert config["block_size"] == values["block_size"]
    after = A2DForMaskedDiffusion.from_pretrained(out).state_dict()
    frozen = {name for name in after if torch.equal(after[name], before[name])}
    if "frozen_parameters" in values:
        assert frozen and all("embed_tokens" in name or "lm_head" in name for name in frozen)
    else:
        assert not frozen, frozen


def test_the_27b_configuration_trains_what_a2d_convert_made(hub):
    """The three commands of its comment, on a hybrid of the same kinds of layers."""
    pytest.importorskip("bitsandbytes", reason="QLoRA needs the `quantization` extra")
    hub("Qwen/Qwen3.5-27B-text", "HuggingFaceTB/smoltalk")
    told = CONFIGS[QLORA].read_text()
    assert "a2d convert Qwen/Qwen3.5-27B --out runs/qwen3.5-27b --allow-hybrid --token-shift\n" in told
    convert = ["convert", "Qwen/Qwen3.5-27B-text", "--out", "runs/qwen3.5-27b", "--token-shift"]
    assert cli.main(convert) == 1, "a hybrid needs the flag"
    assert cli.main([*convert, "--allow-hybrid"]) == 0
    layers = ["--align_layers", "2", "4", "--dtype", "float32"]
    script = load("../scripts/precompute_anchors")
    script.main(*script.make_parser().parse_args_and_config(["--config", str(CONFIGS[QLORA]), *SMALLER, *layers]))
    trainer = run(QLORA, *layers)
    assert trainer.model.base_model.model.is_loaded_in_4bit and trainer.anchors is not None
    assert trainer.model.base_model.model.config.token_shift
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(entry["align_loss"] > 0 for entry in losses)
    adapters = load_file(Path(values_of(QLORA)["output_dir"]) / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)


def test_every_data_set_of_the_configurations_has_a_stand_in():
    assert {name for stem in CONFIGS for name in data_names(stem)} == set(DATASETS)


def test_a_hybrid_text_model_converts_in_memory_where_that_is_allowed(hub, tmp_path: Path):
    hub("Qwen/Qwen3.5-27B-text", "trl-lib/Capybara")
    recipe = load("mdlm_sft")
    words = [
        "--model_name_or_path",
        "Qwen/Qwen3.5-27B-text",
        "--dataset_name",
        "trl-lib/Capybara",
        "--use_peft",
        "true",
    ]
    words += [*SMALLER, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="pass `allow_hybrid=True`"):
        recipe.main(*recipe.make_parser().parse_args_and_config(words))
    words += ["--model_init_kwargs", '{"allow_hybrid": true, "token_shift": true}']
    recipe.main(*recipe.make_parser().parse_args_and_config(words))
    adapters = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)


def test_a_multimodal_checkpoint_names_the_command_that_converts_it(tmp_path: Path):
    config = AutoConfig.for_model("qwen3_5")
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a2d convert"):
        A2DForMaskedDiffusion.from_pretrained(tmp_path, allow_hybrid=True, mask_token_id=5)
