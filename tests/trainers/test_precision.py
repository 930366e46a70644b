"""Half precision: what is computed in it, what is kept in fp32, and that nothing small is lost."""

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from a2d_hf.trainers import BD3LMConfig, BD3LMTrainer, MDLMTrainer, RepAlignConfig, RepAlignTrainer
from tests.trainers.helpers import bd3lm_trainer, config, diffusion_model, first_batch, token_rows, trainer


TEXTS = datasets.Dataset.from_list([{"text": "the quick brown fox jumps over the lazy dog"}] * 12)


def dtypes(model, trained: bool = True) -> set[torch.dtype]:
    return {weight.dtype for weight in model.parameters() if weight.requires_grad == trained}


@pytest.mark.parametrize("source", ["checkpoint in bf16", "object in bf16", "asked for in bf16", "diffusion model"])
def test_bf16_training_keeps_masters_in_fp32(source, make_checkpoint, tmp_path):
    """An update far below the 8 bits of a bf16 weight arrives in every one of them."""
    folder = str(make_checkpoint("llama"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    fields = {"bf16": True, "max_steps": 1, "learning_rate": 1e-6, "lr_scheduler_type": "constant"}
    model = folder
    if source == "object in bf16":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    elif source == "asked for in bf16":
        fields["model_init_kwargs"] = {"dtype": "bfloat16"}
    elif source == "diffusion model":
        model = diffusion_model().to(torch.bfloat16)
    rows = token_rows(16) if source == "diffusion model" else TEXTS
    run = MDLMTrainer(model, config(tmp_path, **fields), train_dataset=rows)
    assert dtypes(run.model) == {torch.float32}
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    run.train()
    for name, weight in run.model.named_parameters():
        assert not torch.equal(before[name], weight), f"Parameter {name} has not changed."
        assert (before[name] - weight).abs().max() < 1e-5
    large = before["parent.lm_head.weight"].abs() > 0.05  # where bf16 would round the update away
    kept = (before["parent.lm_head.weight"] + 1e-6).bfloat16() == before["parent.lm_head.weight"].bfloat16()
    assert kept[large].all()


def test_bf16_training_computes_in_bf16(tmp_path):
    run = trainer(tmp_path, bf16=True, max_steps=1)
    seen = set()
    layer = run.model.backbone.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: seen.add((run.model.training, output.dtype)))
    run.train()
    run.evaluate(token_rows(4))
    assert {(True, torch.bfloat16), (False, torch.bfloat16)} <= seen
    assert dtypes(run.model) == {torch.float32}


def test_bf16_and_fp32_training_agree(tmp_path):
    """The loss is summed in fp32, so that a few thousand tokens do not drown in eight bits."""
    losses = []
    for bf16 in (False, True):
        run = trainer(tmp_path, bf16=bf16)
        with run.compute_loss_context_manager():
            loss = run.compute_loss(run.model, first_batch(run))
        assert loss.dtype == torch.float32
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_half_precision_without_masters_is_said(tmp_path, caplog):
    import logging

    logger = logging.getLogger("a2d_hf.trainers.model_resolution")
    logger.addHandler(caplog.handler)
    run = trainer(tmp_path, diffusion_model().to(torch.bfloat16))
    logger.removeHandler(caplog.handler)
    assert dtypes(run.model) == {torch.bfloat16}
    assert "are trained in half precision, where small updates are lost" in caplog.text


@pytest.mark.parametrize(("bf16", "frozen"), [(False, torch.float32), (True, torch.bfloat16)])
def test_a_frozen_base_is_loaded_in_the_precision_it_is_computed_in(bf16, frozen, make_checkpoint, tmp_path):
    run = MDLMTrainer(
        str(make_checkpoint("llama")),
        config(tmp_path, bf16=bf16, max_steps=2, learning_rate=1e-2),
        train_dataset=TEXTS,
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    assert dtypes(run.model, trained=False) == {frozen}
    assert dtypes(run.model) == {torch.float32}
    adapters = {name: weight.clone() for name, weight in run.model.named_parameters() if weight.requires_grad}
    run.train()
    assert all(not torch.equal(adapters[name], w) for name, w in run.model.named_parameters() if name in adapters)


@pytest.mark.parametrize("objective", ["bd3lm", "repalign"])
def test_every_objective_trains_in_bf16(objective, make_checkpoint, tmp_path):
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_length": 64, "use_cpu": True}
    kinds = {"bd3lm": (BD3LMTrainer, BD3LMConfig), "repalign": (RepAlignTrainer, RepAlignConfig)}
    kind, settings = kinds[objective]
    args = settings(output_dir=str(tmp_path / "run"), bf16=True, max_steps=2, **quiet)
    run = kind(str(make_checkpoint("llama")), args, train_dataset=TEXTS)
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    run.train()
    assert all(not torch.equal(before[name], weight) for name, weight in run.model.named_parameters())


def test_gradient_checkpointing_gives_block_diffusion_the_same_gradients(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        run = bd3lm_trainer(tmp_path, complementary_views=True)
        if checkpointing:
            run.model.gradient_checkpointing_enable()
        run.model.train()
        run.compute_loss(run.model, first_batch(run)).backward()
        gradients.append({name: weight.grad for name, weight in run.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", [None, LoraConfig(task_type="CAUSAL_LM")], ids=["full", "lora"])
def test_fp16_training_scales_its_gradients(adapter, make_checkpoint, tmp_path):
    run = MDLMTrainer(
        str(make_checkpoint("llama")),
        config(tmp_path, fp16=True, use_cpu=False, max_steps=4, learning_rate=1e-3),
        train_dataset=TEXTS,
        peft_config=adapter,
    )
    assert dtypes(run.model) == {torch.float32}
    before = {name: weight.clone() for name, weight in run.model.named_parameters() if weight.requires_grad}
    run.train()
    assert run.accelerator.scaler.get_scale() > 1
    assert all(not torch.equal(before[name], w) for name, w in run.model.named_parameters() if name in before)
