"""LoRA on a diffusion model: what trains, what stays, what is saved, and which adapters cannot work."""

import datasets
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from a2d_hf.modeling import A2DForMaskedDiffusion
from a2d_hf.trainers import MDLMTrainer
from tests.conftest import tiny_model
from tests.trainers.helpers import config, diffusion_model, token_rows, trainer


TEXTS = datasets.Dataset.from_list([{"text": "the quick brown fox jumps over the lazy dog"}] * 12)


def test_lora_leaves_the_base_as_it_was(tmp_path):
    model = diffusion_model()
    base = {name: tensor.clone() for name, tensor in model.named_parameters()}
    run = trainer(tmp_path, model, token_rows(64), peft_config=LoraConfig(task_type="CAUSAL_LM"), max_steps=4)
    assert isinstance(run.model, PeftModel)
    adapters = {name: tensor.clone() for name, tensor in run.model.named_parameters() if tensor.requires_grad}
    run.train()
    for name, tensor in run.model.named_parameters():
        if name in adapters:
            assert not torch.equal(adapters[name], tensor), f"Parameter {name} has not changed."
    now = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".token_adapter", ""): tensor
        for name, tensor in run.model.named_parameters()
    }
    for name, tensor in base.items():
        assert torch.equal(now[name], tensor), f"Base parameter {name} has changed."


def test_lora_adapts_every_linear_layer_and_trains_the_mask_row(tmp_path):
    given = LoraConfig(task_type="CAUSAL_LM")
    run = trainer(tmp_path, peft_config=given)
    adapted = {name.split(".")[-4] for name, _ in run.model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert any("trainable_tokens_delta" in name and t.requires_grad for name, t in run.model.named_parameters())
    assert (
        given.target_modules is None and given.trainable_token_indices is None
    )  # the caller's object is the caller's


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])  # untied, tied, tied with Conv1D layers
def test_lora_survives_saving_loading_and_merging(family, make_checkpoint, tmp_path):
    converted = MDLMTrainer(str(make_checkpoint(family)), config(tmp_path), train_dataset=TEXTS)
    converted.save_model(str(tmp_path / "base"))
    run = MDLMTrainer(
        str(tmp_path / "base"),
        config(tmp_path, max_steps=5, learning_rate=1e-2),
        train_dataset=TEXTS,
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(A2DForMaskedDiffusion.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    x = torch.randint(3, 110, (2, 9))
    x[:, 4] = run.model.config.mask_token_id
    with torch.no_grad():
        expected = run.model.eval()(input_ids=x).logits
        got = loaded.eval()(input_ids=x).logits
        merged = loaded.merge_and_unload()(input_ids=x).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["checkpoint", "object"])
def test_an_adapter_of_a_model_converted_in_memory_finds_its_base(source, make_checkpoint, tmp_path):
    """Loaded onto the autoregressive parent it would silently do nothing."""
    folder = str(make_checkpoint("llama"))
    run = MDLMTrainer(
        folder if source == "checkpoint" else AutoModelForCausalLM.from_pretrained(folder),
        config(tmp_path, max_steps=5, learning_rate=1e-2),
        train_dataset=TEXTS,
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    x = torch.randint(3, 110, (2, 9))
    with torch.no_grad():
        expected = run.model.eval()(input_ids=x).logits
        torch.testing.assert_close(loaded.eval()(input_ids=x).logits, expected, rtol=0, atol=1e-6)


def test_lora_under_gradient_checkpointing_trains(tmp_path):
    run = trainer(
        tmp_path,
        rows=token_rows(64),
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
        max_steps=3,
        gradient_checkpointing=True,
    )
    adapters = {name: tensor.clone() for name, tensor in run.model.named_parameters() if tensor.requires_grad}
    run.train()
    assert all(not torch.equal(adapters[name], t) for name, t in run.model.named_parameters() if name in adapters)


def test_a_peft_model_of_a_diffusion_model_trains(tmp_path):
    peft_model = get_peft_model(diffusion_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    run = trainer(tmp_path, peft_model, max_steps=2)
    assert run.model is peft_model
    run.train()


@pytest.mark.parametrize("adapter", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused(adapter, tmp_path):
    with pytest.raises(ValueError, match=f"{adapter.__name__[:6].upper()}.*cannot work here.*use LoRA"):
        trainer(tmp_path, peft_config=adapter(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_an_adapter_around_a_causal_model_is_refused(tmp_path):
    peft_model = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="wrap the base with `A2DForMaskedDiffusion.from_causal_lm` first"):
        trainer(tmp_path, peft_model)


def test_two_adapters_are_refused(tmp_path):
    peft_model = get_peft_model(diffusion_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has an adapter already"):
        trainer(tmp_path, peft_model, peft_config=LoraConfig(task_type="CAUSAL_LM"))
