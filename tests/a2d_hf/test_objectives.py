"""The other objectives and the adapter through `convert`: what a run measures, trains, records and leaves behind."""

import json

import pytest
import torch
from safetensors.torch import load_file

from a2d_hf import surgery
from a2d_hf.conversion import convert, resume
from a2d_hf.errors import BadInput
from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion
from a2d_hf.run_directory import read_events
from a2d_hf.trainers.a2d_trainer import A2DTrainer
from tests.a2d_hf.test_resume import at_call, files_of, inputs, run_in_a_fork  # noqa: F401 (a fixture)


SETTINGS = {"max_steps": 6, "batch_size": 2, "max_length": 32, "device": "cpu", "learning_rate": 1e-3, "save_steps": 2}
OBJECTIVES = {
    "bd3lm": {"objective": "bd3lm", "block_size": 4, "token_shift": True},
    "bd3lm curriculum": {"objective": "bd3lm", "block_size_curriculum": [1, 2, 4], "clean_context": "causal"},
    "repalign": {"objective": "repalign", "align_weight": 2.0, "align_positions": "all"},
    "lora": {"lora_r": 4, "learning_rate": 1e-2},
    "bd3lm lora": {"objective": "bd3lm", "block_size": 4, "lora_r": 2, "lora_target_modules": ["c_attn"]},
    "repalign lora": {"objective": "repalign", "lora_r": 2, "lora_alpha": 8},
}


@pytest.mark.parametrize("moment", ["in training", "when all is trained"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_killed_and_resumed_equals_unbroken(inputs, tmp_path, name, moment):  # noqa: F811
    parent, story = inputs
    chosen = SETTINGS | OBJECTIVES[name]
    unbroken = convert(parent, tmp_path / "unbroken", data=story, **chosen)

    def killed():
        with pytest.MonkeyPatch.context() as patch:
            if moment == "in training":
                patch.setattr(A2DTrainer, "training_step", at_call(5, A2DTrainer.training_step))
            else:  # the last checkpoint is there, the trained model is not
                patch.setattr(surgery, "save_checkpoint", at_call(1, surgery.save_checkpoint))
            convert(parent, tmp_path / "run", data=story, **chosen)

    assert run_in_a_fork(killed) == 9, "the child was not killed"
    run = resume(tmp_path / "run")
    begins = [e["step"] for e in read_events(run.path / "events.jsonl")[0] if e["event"] == "training_started"]
    assert begins == ([0, 4] if moment == "in training" else [0, 6])
    assert files_of(run.path) == files_of(unbroken.path)


def test_block_diffusion_with_blocks_of_one_and_token_shift_starts_at_the_parent(inputs, tmp_path):  # noqa: F811
    parent, story = inputs
    run = convert(parent, tmp_path / "run", data=story, objective="bd3lm", block_size=1, token_shift=True, **SETTINGS)
    results = run.manifest["results"]
    assert results["nelbo_before"]["nats_per_token"] == pytest.approx(
        results["parent_nll"]["nats_per_token"], rel=1e-3
    )  # the mask token's row is another than the parent's, and has its share of the softmax
    assert results["nelbo_after"]["nats_per_token"] != results["nelbo_before"]["nats_per_token"]


def test_a_block_diffusion_run_says_so_everywhere(inputs, tmp_path):  # noqa: F811
    parent, story = inputs
    run = convert(parent, tmp_path / "run", data=story, **SETTINGS | OBJECTIVES["bd3lm curriculum"])
    config = json.loads((run.model_path / "config.json").read_text())
    assert (config["objective"], config["block_size"], config["clean_context"]) == ("bd3lm", 4, "causal")
    assert run.manifest["config"]["block_size"] == 4
    assert run.manifest["training"]["block_size_curriculum"] == [1, 2, 4]
    events, _ = read_events(run.path / "events.jsonl")
    assert [e["block_size"] for e in events if e["event"] == "train_step"] == [1, 1, 2, 4, 4, 4]
    card = (run.model_path / "README.md").read_text()
    assert "block diffusion with blocks of 4 tokens" in card and "Every position sees its block" in card
    model = A2DForMaskedDiffusion.from_pretrained(run.model_path)
    assert model.diffusion_generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8).shape == (1, 11)


def test_alignment_is_trained_and_the_model_is_one_of_masked_diffusion(inputs, tmp_path):  # noqa: F811
    parent, story = inputs
    plain = convert(parent, tmp_path / "mdlm", data=story, **SETTINGS)
    run = convert(parent, tmp_path / "run", data=story, **SETTINGS | OBJECTIVES["repalign"])
    assert json.loads((run.model_path / "config.json").read_text())["objective"] == "mdlm"
    assert run.manifest["config"]["objective"] == "repalign"
    logged = [e for e in read_events(run.path / "events.jsonl")[0] if e["event"] == "train_step"]
    assert all(e["align_loss"] > 0 for e in logged)
    # The same noise and the same start, so the first objective is equal, but for dropout: alignment reads all of the
    # last layer, of which the plain loss computes a part; the weights go elsewhere.
    first = next(e for e in read_events(plain.path / "events.jsonl")[0] if e["event"] == "train_step")
    assert logged[0]["nelbo"] == pytest.approx(first["nelbo"], rel=0.02)
    assert files_of(run.path)["model/model.safetensors"] != files_of(plain.path)["model/model.safetensors"]


def test_an_adapter_ends_in_the_weights_and_leaves_the_rest_alone(inputs, tmp_path):  # noqa: F811
    parent, story = inputs
    run = convert(
        parent, tmp_path / "run", data=story, lora_r=4, lora_target_modules=["c_attn"], **SETTINGS | {"seed": 3}
    )
    before, after = load_file(parent / "model.safetensors"), load_file(run.model_path / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}  # no row was grown
    embeddings = {name for name in changed if name.endswith("wte.weight")}
    assert changed - embeddings == {f"transformer.h.{layer}.attn.c_attn.weight" for layer in (0, 1)}
    assert set(after) == set(before), "no adapter tensor is left"
    mask = run.manifest["mask_token"]["id"]
    for name in embeddings:  # of the embeddings, the mask row alone
        assert (before[name] != after[name]).any(-1).nonzero().flatten().tolist() == [mask]
    assert run.manifest["training"]["adapter"] == {"type": "LoRA, merged", "r": 4, "alpha": 8}
    assert "LoRA of rank 4, merged" in (run.model_path / "README.md").read_text()


def test_an_adapter_trains_the_mask_row(inputs, tmp_path):  # noqa: F811
    parent, story = inputs
    untrained = convert(parent, tmp_path / "untrained")
    run = convert(parent, tmp_path / "run", data=story, lora_r=4, **SETTINGS | {"learning_rate": 1e-2})
    mask, name = run.manifest["mask_token"]["id"], "transformer.wte.weight"
    old, new = (load_file(r.model_path / "model.safetensors")[name][mask] for r in (untrained, run))
    assert not torch.equal(old, new)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "bd3lm", "block_size": 64, "max_length": None}, None),
        ({"objective": "bd3lm", "block_size": 999, "max_length": None}, "--block-size 999 is longer than a row of"),
        ({"lora_r": 2, "lora_target_modules": ["q_proj"]}, "--lora-target-modules q_proj is no layer .* c_attn, c_fc"),
    ],
)
def test_what_the_model_cannot_serve_is_bad_input_and_leaves_nothing(inputs, tmp_path, settings, message):  # noqa: F811
    parent, story = inputs
    if message is None:  # 128 positions hold two blocks
        run = convert(parent, tmp_path / "run", data=story, **SETTINGS | settings)
        assert run.manifest["training"]["max_length"] == 128
        return
    with pytest.raises(BadInput, match=message):
        convert(parent, tmp_path / "run", data=story, **SETTINGS | settings)
    assert not (tmp_path / "run").exists()
