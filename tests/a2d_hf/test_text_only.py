"""The text model of a multimodal checkpoint converts alone, and computes exactly what its parent does on text.

The parents are tiny random multimodal models, built from shrunk default configurations of transformers.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, PreTrainedModel

from a2d_hf.console import Console
from a2d_hf.conversion import convert
from a2d_hf.errors import Refused
from a2d_hf.ingest import prepared_source
from a2d_hf.ingest_text_model import find_text_model, fit_sections, text_configs, whole_class
from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion
from a2d_hf.shrinking import shrink_config
from a2d_hf.source import inspect_source
from tests.conftest import tiny_tokenizer


# Each differs where it matters: tied head, nested prefix, chunks and experts, a type without a causal class of its own
# (twice, once with a switch that its class does not have), a hybrid.
TYPES = {
    "gemma3": "Gemma3ForCausalLM",
    "mistral3": "MistralForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "qwen3_vl": "Qwen3ForCausalLM",
    "qwen3_vl_moe": "Qwen3MoeForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen2_5_vl": "Qwen2ForCausalLM",
    "llava": "LlamaForCausalLM",
}


def tiny_config(kind: str):
    config = CONFIG_MAPPING[kind]()
    if "_vl" in kind:  # as the published checkpoints state it
        config.text_config.rope_parameters["mrope_section"] = [16, 24, 24]
    config = shrink_config(config)
    fit_sections(config.get_text_config(decoder=True))
    return config


def tiny_whole(kind: str) -> PreTrainedModel:
    config = tiny_config(kind)
    model = whole_class(config, kind)._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    return model


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def largest_difference(whole: PreTrainedModel, converted: A2DForMaskedDiffusion) -> float:
    ids = torch.randint(10, 100, (2, 40))  # below the mask token, across every window of 8
    with torch.no_grad():
        theirs = whole(input_ids=ids).logits
        ours = converted(input_ids=ids, attention_pattern="causal").logits
    assert theirs.std() > 0.01  # not a comparison of nothing with nothing
    return (theirs[..., :120] - ours[..., :120]).abs().max().item()


@pytest.mark.parametrize("kind", TYPES)
def test_the_conversion_computes_what_the_multimodal_parent_does(kind, tmp_path):
    whole = tiny_whole(kind)
    run = convert(saved(whole, tmp_path / kind), tmp_path / "run", allow_hybrid=True)
    converted = A2DForMaskedDiffusion.from_pretrained(run.model_path, dtype=torch.float32).eval()
    assert type(converted.backbone).__name__ == TYPES[kind]
    assert largest_difference(whole, converted) == 0.0
    assert sorted(path.name for path in run.path.iterdir()) == ["events.jsonl", "manifest.json", "model"]


def test_only_text_is_kept_and_what_is_left_behind_is_counted(tmp_path):
    folder = saved(tiny_whole("gemma3"), tmp_path / "parent")
    before = load_file(folder / "model.safetensors")
    run = convert(folder, tmp_path / "run")
    towers = {name: tensor for name, tensor in before.items() if "vision" in name or "projector" in name}
    said = run.manifest["ingest"]["text_only"]
    assert said["dropped_tensors"] == len(towers)
    assert said["dropped_bytes"] == sum(tensor.nbytes for tensor in towers.values())
    assert sum(said["dropped"].values()) == len(towers) and not any(".0." in name for name in said["dropped"])
    assert said["tensors"] + said["dropped_tensors"] == len(before)
    assert said["proof"] == {"max_abs_diff": 0.0, "tokens": 40}
    assert not any("vision" in name for name in load_file(run.model_path / "model.safetensors"))
    config = json.loads((run.model_path / "config.json").read_text())
    assert config["text_config"]["model_type"] == "gemma3_text"
    assert json.loads((run.model_path / "a2d_manifest.json").read_text())["ingest"] == run.manifest["ingest"]
    assert run.manifest["source"]["model_type"] == "gemma3"
    assert "model.safetensors" in run.manifest["source"]["files"]


@pytest.mark.parametrize("spelling", ["language_model.model.", "model.language_model."])
def test_both_spellings_of_the_text_prefix_are_read(spelling, tmp_path):
    whole = tiny_whole("mistral3")
    folder = saved(whole, tmp_path / "parent")
    head = "language_model.lm_head." if spelling.startswith("language") else "lm_head."
    weights = {
        name.replace("language_model.model.", spelling)
        .replace("model.language_model.", spelling)
        .replace("language_model.lm_head.", head): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    assert any(name.startswith(spelling) for name in weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    run = convert(folder, tmp_path / "run")
    converted = A2DForMaskedDiffusion.from_pretrained(run.model_path, dtype=torch.float32).eval()
    assert largest_difference(whole, converted) == 0.0


def test_a_text_tensor_without_a_source_is_refused(tmp_path):
    folder = saved(tiny_whole("mistral3"), tmp_path / "parent")
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match="lack 1 tensor.*model.layers.1.mlp.up_proj.weight") as caught:
        convert(folder, tmp_path / "run")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_text_part_that_no_causal_class_computes_is_refused(tmp_path):
    folder = saved(tiny_whole("glm4v"), tmp_path / "parent")
    with pytest.raises(Refused, match="glm4v_text"):
        prepared_source(inspect_source(folder), tmp_path / "staging", Console())
    assert not (tmp_path / "staging").exists()


def test_a_stand_in_that_computes_something_else_is_not_taken(monkeypatch):
    """The proof decides, not the name: with another epsilon in every candidate's norms, none is taken."""
    import a2d_hf.ingest_text_model as room

    def spoiled(text):
        found = text_configs(text)
        for candidate in found:
            candidate.rms_norm_eps = 0.1
        return found

    monkeypatch.setattr(room, "text_configs", spoiled)
    with pytest.raises(Refused, match="does not compute what its text part does"):
        find_text_model(tiny_config("qwen3_vl"), "it")


def test_from_python_a_multimodal_folder_is_refused_with_the_way_out(tmp_path):
    folder = saved(tiny_whole("gemma3"), tmp_path / "parent")
    with pytest.raises(ValueError, match="multimodal.*a2d convert"):
        A2DForMaskedDiffusion.from_pretrained(folder)
