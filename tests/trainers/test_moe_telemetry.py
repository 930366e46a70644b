"""What is counted of a mixture of experts, against counts of the routers' own logits; and the death of experts."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from a2d_hf.architecture_checks import tiny_parent
from a2d_hf.cli import main
from a2d_hf.modeling import A2DForMaskedDiffusion, AttentionPattern
from a2d_hf.trainers.moe_telemetry import MoETelemetry, find_routers
from tests.conftest import tiny_config, tiny_tokenizer
from tests.trainers.helpers import MASK_ID, diffusion_model, token_rows, trainer


NAMES = {"moe/expert_utilisation_min", "moe/dead_experts", "moe/router_entropy"}


def routed(tmp_path, model, **fields):
    """A trainer whose telemetry collects its warnings in a list."""
    run = trainer(tmp_path, model, token_rows(64, longest=30, prompts=False), per_device_train_batch_size=64, **fields)
    said = []
    run.auxiliary.moe.warn = said.append
    return run, said


def favour(model, expert: int, strength: float = 50.0) -> None:
    """Sabotage: every router sends every token to this expert, and to the first of the others."""
    with torch.no_grad():
        for router in find_routers(model.backbone):
            router.module.weight.zero_()
            router.module.weight[expert] = strength
            router.module.register_forward_pre_hook(lambda module, args: (torch.ones_like(args[0]),))


def test_counts_equal_those_of_the_routers_own_logits(tmp_path):
    run, _ = routed(tmp_path, diffusion_model("mixtral"))
    model, batch = run.model.train(), next(iter(run.get_train_dataloader()))
    assert not batch["attention_mask"].bool().all(), "the test is about padding too"
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    model(**inputs)
    found = run.auxiliary.moe.result(run)
    seen = []
    for router in find_routers(model.backbone):
        router.module.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        model(**inputs)
    real = batch["attention_mask"].flatten().bool()
    entropies = []
    for layer, logits in zip(run.auxiliary.moe.layers, seen, strict=True):
        chosen = logits[real].topk(2, dim=-1).indices
        counts = torch.stack([(chosen == expert).sum() for expert in range(4)])
        torch.testing.assert_close(torch.tensor(layer.utilisation), counts * 4 / counts.sum())
        p = logits[real].softmax(-1)
        entropies.append(float(-(p * p.log()).sum(-1).mean() / torch.tensor(4.0).log()))
        assert layer.router_entropy == pytest.approx(entropies[-1], rel=1e-5)
    assert found["moe/router_entropy"] == pytest.approx(sum(entropies) / 2, rel=1e-5)
    assert found["moe/expert_utilisation_min"] == min(min(layer.utilisation) for layer in run.auxiliary.moe.layers)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_logs_expert_use_and_counts_a_recomputed_layer_once(checkpointed, tmp_path):
    run, said = routed(
        tmp_path, diffusion_model("mixtral"), max_steps=2, logging_steps=2, gradient_checkpointing=checkpointed
    )
    counted = []
    telemetry = run.auxiliary.moe
    before = telemetry.result

    def result(trainer):
        counted.append({name: float(sums[:-2].sum()) for name, sums in telemetry._sums.items()})
        return before(trainer)

    telemetry.result = result
    run.train()
    tokens = sum(len(row["input_ids"]) for row in run.train_dataset)
    assert set(counted[0].values()) == {2.0 * 2 * tokens}  # two experts for each token, two epochs of one batch
    log = next(entry for entry in run.state.log_history if "loss" in entry)
    assert NAMES <= set(log) and log["moe/dead_experts"] == 0 and not said


def test_experts_that_die_are_warned_of_once(tmp_path):
    model = diffusion_model("mixtral")
    favour(model, 2)
    run, said = routed(tmp_path, model, max_steps=3, logging_steps=1, learning_rate=0.0)
    run.train()
    assert len(said) == 1 and "4 of 8 experts are dead at step 1" in said[0]
    log = next(entry for entry in run.state.log_history if "loss" in entry)
    assert log["moe/dead_experts"] == 4 and log["moe/expert_utilisation_min"] == 0
    assert run.auxiliary.moe.summary()["warnings"] == said


def test_a_dense_model_logs_nothing_of_it(tmp_path):
    run, _ = routed(tmp_path, diffusion_model("llama"), max_steps=1, logging_steps=1)
    run.train()
    assert not any(name.startswith("moe/") for entry in run.state.log_history for name in entry)
    assert run.auxiliary.moe.summary() is None


def test_too_few_tokens_are_no_verdict(tmp_path):
    run = trainer(tmp_path, diffusion_model("mixtral"), token_rows(4), max_steps=1, logging_steps=1)
    run.train()
    assert not any("moe/dead_experts" in entry for entry in run.state.log_history)


def test_a_teacher_and_evaluation_are_not_counted():
    model = diffusion_model("mixtral").train()
    telemetry, x = MoETelemetry(model), torch.randint(3, 100, (4, 16))
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    assert not telemetry._sums
    doubled = torch.cat([x, x], dim=1)
    model.train()(doubled, attention_pattern=AttentionPattern.bd3lm(4), attention_mask=torch.ones_like(doubled))
    assert all(float(sums[-1]) == doubled.numel() for sums in telemetry._sums.values())


KINDS = ("dbrx", "deepseek_v3", "gpt_oss", "jetmoe", "llama4_text", "qwen3_moe", "zaya")


@pytest.mark.parametrize("model_type", KINDS)
def test_routers_of_every_kind_are_found(model_type):
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_parent(model_type), mask_token_id=MASK_ID, allow_hybrid=True)
    telemetry, x = MoETelemetry(model.train()), torch.randint(3, 100, (8, 16))
    model(x)
    assert telemetry._names and set(telemetry._sums) == set(telemetry._names)
    for sums in telemetry._sums.values():
        assert float(sums[-1]) == x.numel() and float(sums[:-2].sum()) % x.numel() == 0


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_surgery_leaves_routers_and_experts_byte_for_byte(model_type):
    parent = tiny_parent(model_type)
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_parent(model_type), tokenizer=tiny_tokenizer())
    ours = model.backbone.state_dict()
    names = [name for name in ours if "expert" in name or "gate" in name or "router" in name]
    assert len(names) >= 3
    for name in names:
        assert torch.equal(ours[name].view(torch.uint8), parent.state_dict()[name].view(torch.uint8)), name


def test_convert_says_that_experts_died_and_keeps_it_in_the_manifest(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("a2d_hf.trainers.moe_telemetry.DEAD_BELOW", 3.0)  # nobody gets three even shares
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("mixtral")).save_pretrained(tmp_path / "parent")
    tiny_tokenizer().save_pretrained(tmp_path / "parent")
    (tmp_path / "text.txt").write_text("a line of text to train on, again and again\n" * 200)
    arguments = ["--data", str(tmp_path / "text.txt"), "--max-steps", "4", "--max-length", "32", "--batch-size", "16"]
    assert main(["convert", str(tmp_path / "parent"), "--out", str(tmp_path / "run"), *arguments]) == 0
    said = capsys.readouterr()
    assert "experts are dead" in said.out + said.err
    experts = json.loads((tmp_path / "run" / "manifest.json").read_text())["training"]["experts"]
    assert experts["warnings"] and len(experts["layers"]) == 2 and experts["layers"][0]["experts"] == 4
