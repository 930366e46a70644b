"""Each gate passes on every family, and each can fail: the sabotage tests."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from a2d_hf.modeling import A2DForMaskedDiffusion
from a2d_hf.modeling import attention_interface as interface
from a2d_hf.modeling.gates import identity_gate, longest_window, mask_row_gate, reach_gate
from tests.conftest import FAMILIES, WINDOW, tiny_model, tiny_tokenizer


MASK_ID = 120


def convert(family="llama", implementation="sdpa", tokenizer=None, **fields):
    parent = tiny_model(family, attn_implementation=implementation)
    if tokenizer is not None:
        return A2DForMaskedDiffusion.from_causal_lm(parent, tokenizer, **fields).eval()
    return A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=MASK_ID, **fields).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sliding_window", ["keep", "open"])
def test_all_gates_pass(family, implementation, sliding_window):
    model = convert(family, implementation, sliding_window=sliding_window)
    identity = identity_gate(model, tiny_model(family, attn_implementation=implementation))
    assert identity.passed, identity.message
    assert identity.detail["max_abs_diff"] == 0.0 and identity.detail["max_abs_diff_explicit_mask"] == 0.0
    assert identity.detail["window_crossed"]
    reach = reach_gate(model)
    assert reach.passed, reach.message
    assert reach.detail["open_layers"] == reach.detail["layers"] and reach.detail["window_crossed"]
    assert mask_row_gate(model).passed


def test_the_probe_is_longer_than_every_window():
    """A 16-token probe passes a broken window of 512 (undeemed/a2d's does)."""
    model = convert("mistral")
    assert longest_window(model.backbone) == WINDOW
    assert identity_gate(model, tiny_model("mistral")).detail["probe_length"] > WINDOW


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_grown_rows_are_compared_with_the_parent_grown_alike(family):
    tokenizer = tiny_tokenizer()
    rows = max(tokenizer.get_vocab().values()) + 1
    parent, again = tiny_model(family, vocab_size=rows), tiny_model(family, vocab_size=rows)
    model = A2DForMaskedDiffusion.from_causal_lm(parent, tokenizer)
    assert model.mask_token.strategy == "grow"
    identity = identity_gate(model, again)
    assert identity.passed, identity.message


def test_a_changed_weight_fails_identity():
    model = convert()
    with torch.no_grad():
        model.backbone.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-6
    gate = identity_gate(model, tiny_model("llama"))
    assert not gate.passed and "layers.0.mlp.up_proj.weight" in gate.message


def test_a_changed_embedding_row_fails_identity_but_the_mask_row_may_change():
    model = convert(tokenizer=tiny_tokenizer())
    assert identity_gate(model, tiny_model("llama")).passed
    with torch.no_grad():
        model.get_input_embeddings().weight[7, 0] += 1e-3
    gate = identity_gate(model, tiny_model("llama"))
    assert not gate.passed and "embed_tokens" in gate.message


def test_a_wrong_window_fails_identity():
    model = convert("mistral")
    model.backbone.config.sliding_window = WINDOW + 1
    gate = identity_gate(model, tiny_model("mistral"))
    assert not gate.passed and gate.detail["max_abs_diff"] > 0


def test_a_wrong_mask_rule_fails_identity(monkeypatch):
    """The library's path is right, the rule spelled out is not: the second comparison sees it."""
    model = convert()
    rule = interface.PatternInForce.rule
    monkeypatch.setattr(
        interface.PatternInForce, "rule", lambda self, own: lambda b, h, q, k: rule(self, own)(b, h, q, k) & (k != 2)
    )
    gate = identity_gate(model, tiny_model("llama"))
    assert not gate.passed and gate.detail["max_abs_diff"] == 0 and gate.detail["max_abs_diff_explicit_mask"] > 0


def test_a_patch_that_does_nothing_fails_reach(monkeypatch):
    """Identity passes for a no-op patch; this is why there are two gates."""
    model = convert()
    monkeypatch.setattr(A2DForMaskedDiffusion, "_pattern_in_force", lambda self, pattern, layout: None)
    assert identity_gate(model, tiny_model("llama")).passed
    gate = reach_gate(model)
    assert not gate.passed and "2 of 2 layers" in gate.message and "stays causal" in gate.message


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_half_patched_model_fails_reach(implementation):
    """One layer stays causal: the whole model still reaches everywhere through the others."""
    model = convert(implementation=implementation)
    attention = model.backbone.model.layers[1].self_attn
    forward = attention.forward

    def causal_forward(hidden_states, attention_mask=None, **kwargs):
        length = hidden_states.shape[1]
        future = torch.ones(length, length).triu(1).bool()
        return forward(hidden_states, attention_mask=torch.zeros(length, length).masked_fill(future, -1e9), **kwargs)

    attention.forward = causal_forward
    x = torch.randint(3, 100, (1, 10))
    moved = x.clone()
    moved[0, -1] += 1
    with torch.no_grad():
        assert (model(x).logits[0, 0] != model(moved).logits[0, 0]).any(), "the whole model hides the closed layer"
    gate = reach_gate(model)
    assert not gate.passed and "1 of 2 layers" in gate.message and "layers.1" in gate.message


def test_a_window_left_closed_fails_reach(monkeypatch):
    model = convert("mistral", sliding_window="open")
    build = A2DForMaskedDiffusion._pattern_in_force

    def keep_windows(self, pattern, layout):
        state = build(self, pattern, layout)
        return state and copy.copy(state).__class__(**{**vars(state), "windows": "keep"})

    monkeypatch.setattr(A2DForMaskedDiffusion, "_pattern_in_force", keep_windows)
    gate = reach_gate(model)
    assert not gate.passed and "misses" in gate.message


def test_a_window_opened_against_the_users_wish_fails_reach(monkeypatch):
    model = convert("mistral", sliding_window="keep")
    build = A2DForMaskedDiffusion._pattern_in_force

    def open_windows(self, pattern, layout):
        state = build(self, pattern, layout)
        return state and copy.copy(state).__class__(**{**vars(state), "windows": "open"})

    monkeypatch.setattr(A2DForMaskedDiffusion, "_pattern_in_force", open_windows)
    assert not reach_gate(model).passed


def test_a_leak_between_blocks_fails_reach(monkeypatch):
    from a2d_hf.modeling.attention_pattern import AttentionPattern

    edge = AttentionPattern.edge
    monkeypatch.setattr(
        AttentionPattern,
        "edge",
        lambda self, q, k: edge(self, q, k) | (k.position == 23) if self.kind == "block_causal" else edge(self, q, k),
    )
    gate = reach_gate(convert())
    assert not gate.passed and "blocks" in gate.message


def test_gpt_neo_is_the_trap_that_passes_identity_and_never_opens():
    from transformers import GPTNeoConfig

    config = GPTNeoConfig(
        vocab_size=128,
        hidden_size=32,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=4,
        max_position_embeddings=64,
        window_size=8,
    )
    torch.manual_seed(0)
    parent = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    model = A2DForMaskedDiffusion.from_causal_lm(copy.deepcopy(parent), mask_token_id=MASK_ID)
    identity, reach = identity_gate(model, parent), reach_gate(model)
    assert identity.detail["max_abs_diff"] == 0.0
    assert reach.passed and reach.detail["open_layers"] == 2 and reach.detail["window_crossed"]
    for module in model.backbone.modules():
        for handle in [*module._forward_pre_hooks]:
            del module._forward_pre_hooks[handle]  # without the stand-in for its own causal buffers
    assert identity_gate(model, parent).passed
    assert "stays causal" in reach_gate(model).message


@pytest.mark.parametrize("family", ["gpt_neo", "openai-gpt"])
def test_a_causal_buffer_opens_in_a_model_that_was_loaded(family: str, tmp_path):
    # While weights are loaded, such a buffer is on the meta device and holds nothing that could be recognised.
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
    kinds = {"attention_types": [[["global", "local"], 1]], "window_size": 8} if family == "gpt_neo" else {}
    parent = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_hidden_layers=2, **sizes, **kinds))
    parent.save_pretrained(tmp_path / "parent")
    model = A2DForMaskedDiffusion.from_pretrained(tmp_path / "parent", mask_token_id=MASK_ID).eval()
    model.save_pretrained(tmp_path / "converted")
    for loaded in (model, A2DForMaskedDiffusion.from_pretrained(tmp_path / "converted").eval()):
        assert reach_gate(loaded).passed
        assert identity_gate(loaded, copy.deepcopy(parent).eval()).passed


@pytest.mark.parametrize("tied", [True, False])
def test_a_mask_row_left_random_is_caught(tied):
    tokenizer = tiny_tokenizer()
    parent = tiny_model("llama", tie_word_embeddings=tied)
    model = A2DForMaskedDiffusion.from_causal_lm(parent, tokenizer)
    assert mask_row_gate(model).passed
    with torch.no_grad():
        model.get_output_embeddings().weight[model.config.mask_token_id].normal_()
    assert not mask_row_gate(model).passed


def test_a_near_zero_or_missing_mask_row_is_caught():
    model = convert()
    model.mask_token = None
    with torch.no_grad():
        model.get_input_embeddings().weight[MASK_ID] *= 1e-6
    assert "near zero" in mask_row_gate(model).message
    model.config.mask_token_id = 10_000
    assert not mask_row_gate(model).passed
    model.config.mask_token_id = model.config.eos_token_id
    assert "token of the text" in mask_row_gate(model).message


def test_gates_leave_the_model_as_it_was():
    model = convert().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identity_gate(model, tiny_model("llama"))
    reach_gate(model)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_results_are_ready_for_json():
    import json

    model = convert()
    for gate in (identity_gate(model, tiny_model("llama")), reach_gate(model), mask_row_gate(model)):
        assert json.loads(json.dumps(gate.to_dict()))["passed"] is True
