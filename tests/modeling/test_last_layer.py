"""The last layer computed only where it is read: nothing that a loss or a gradient can see may change."""

import copy
import logging

import pytest
import torch

import a2d_hf.modeling.last_layer as last_layer
from a2d_hf.modeling import A2DForMaskedDiffusion, AttentionPattern
from tests.conftest import FAMILIES, tiny_model


MASK_ID = 120
LENGTH = 24


def converted(family="llama", dtype=torch.float32, **fields) -> A2DForMaskedDiffusion:
    fields = {"objective": "bd3lm", "block_size": 4} | fields
    return A2DForMaskedDiffusion.from_causal_lm(tiny_model(family).to(dtype), mask_token_id=MASK_ID, **fields)


def doubled_batch(rows=3, seed=0, clean_rows=False) -> dict:
    """`[x_t ; x_0]` with labels on some noisy tokens, more of them in some rows; on a few clean ones too if asked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 110, (rows, LENGTH), generator=generator)
    share = torch.linspace(0.2, 0.7, rows)[:, None]
    masked = torch.rand(rows, LENGTH, generator=generator) < share
    masked[:, 0] = False
    on_clean = torch.rand(rows, LENGTH, generator=generator) < (0.1 if clean_rows else 0.0)
    on_clean[:, 0] = False
    return {
        "input_ids": torch.cat([ids.masked_fill(masked, MASK_ID), ids], dim=1),
        "labels": torch.cat([ids.masked_fill(~masked, -100), ids.masked_fill(~on_clean, -100)], dim=1),
        "loss_weights": torch.rand(rows, 2 * LENGTH, generator=generator) + 0.5,
        "attention_pattern": AttentionPattern.bd3lm(4),
    }


def loss_and_gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def rows_computed(model, batch, part) -> int:
    """How many rows a module was really given."""
    seen, forward = [], part.forward
    part.forward = lambda given: (seen.append(given.shape[0] * given.shape[1]), forward(given))[1]
    try:
        model(**batch)
    finally:
        del part.forward
    return seen[-1]


def whole(model, batch, monkeypatch):
    """The same pass with every row computed."""
    with monkeypatch.context() as patch:
        patch.setattr(last_layer, "MOST_ROWS_READ", 0.0)
        return loss_and_gradients(model, batch)


def assert_same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, msg=name, **tolerance)


# Families whose last layer takes every part: experts of the routed one are no matrix of one input.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("clean_rows", [False, True])
def test_loss_and_gradients_are_those_of_the_whole_layer(family, token_shift, clean_rows, monkeypatch):
    model, batch = converted(family, torch.float64, token_shift=token_shift), doubled_batch(clean_rows=clean_rows)
    ours = loss_and_gradients(model, batch)
    assert model.last_layer.parts
    assert_same(ours, whole(model, batch, monkeypatch), atol=1e-10, rtol=1e-10)


def test_a_mixture_of_experts_leaves_out_the_experts_of_unread_rows(monkeypatch):
    model, batch = converted("mixtral"), doubled_batch()
    ours = loss_and_gradients(model, batch)
    layer = model.backbone.model.layers[-1]
    assert any(part is layer.mlp for part in model.last_layer.parts)
    assert_same(ours, whole(model, batch, monkeypatch), atol=1e-6, rtol=1e-4)


def test_queries_projection_and_feed_forward_meet_only_the_rows_that_are_read():
    model, batch = converted(), doubled_batch()
    model(**batch)
    layer = model.backbone.model.layers[-1]
    labelled = int((batch["labels"] != -100).sum())
    for part in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
        assert rows_computed(model, batch, part) == labelled < batch["labels"].numel()
    for part in (layer.self_attn.k_proj, layer.self_attn.v_proj, model.backbone.model.layers[0].mlp):
        assert rows_computed(model, batch, part) == batch["labels"].numel()


def test_attention_scores_only_the_queries_that_are_read(monkeypatch):
    model, batch, queries = converted(), doubled_batch(rows=1), []
    attend = last_layer.attend_from_rows_read

    def watch(function, module, *args, **kwargs):
        def counted(module, query, *rest, **more):
            queries.append(query.shape[2])
            return function(module, query, *rest, **more)

        return attend(counted, module, *args, **kwargs)

    monkeypatch.setattr("a2d_hf.modeling.attention_interface.attend_from_rows_read", watch)
    model(**batch)
    assert queries[-2:] == [2 * LENGTH, int((batch["labels"] != -100).sum())]


def test_with_token_shift_the_clean_rows_that_open_a_block_are_kept():
    """Sabotage: were only labelled positions computed, the shifted reads of the clean half would meet zeros."""
    model, batch = converted(token_shift=True), doubled_batch(rows=1)
    labelled = (batch["labels"][0] != -100).nonzero()[:, 0]
    sources = {i - 1 if i % 4 else LENGTH + i - 1 for i in labelled.tolist()}
    assert any(source >= LENGTH for source in sources)
    model(**batch)
    assert rows_computed(model, batch, model.backbone.model.layers[-1].mlp) == len(sources)


@pytest.mark.parametrize("broken", ["k_proj", "v_proj"])
def test_leaving_out_keys_or_values_would_be_seen(broken, monkeypatch):
    """Sabotage: the measurement refuses keys and values, and forcing them in changes the loss."""
    model, batch = converted(), doubled_batch()
    expected = whole(model, batch, monkeypatch)
    model(**batch)
    attention = model.backbone.model.layers[-1].self_attn
    part = attention.get_submodule(broken)
    assert not any(part is found for found in model.last_layer.parts)
    model.last_layer.parts = (*model.last_layer.parts, part)
    assert (model(**batch).loss - expected[0]).abs() > 1e-4


def test_a_projection_that_starts_at_zero_hides_nothing():
    """With an output projection of zeros no key moves anything, yet: a layer's code decides, not its weights."""
    model = converted()
    attention = model.backbone.model.layers[-1].self_attn
    with torch.no_grad():
        attention.o_proj.weight.zero_()
    model(**doubled_batch())
    assert not any(part in (attention.k_proj, attention.v_proj) for part in model.last_layer.parts)
    assert any(part is attention.q_proj for part in model.last_layer.parts)


def test_a_part_that_mixes_positions_is_never_left_out(monkeypatch):
    class Mixing(torch.nn.Linear):
        def forward(self, states):
            return super().forward(states + states.mean(dim=1, keepdim=True))

    model, batch = converted(), doubled_batch()
    layer = model.backbone.model.layers[-1]
    mixing = Mixing(*reversed(layer.mlp.down_proj.weight.shape), bias=False)
    mixing.load_state_dict(layer.mlp.down_proj.state_dict())
    layer.mlp.down_proj = mixing
    ours = loss_and_gradients(model, batch)
    assert model.last_layer.parts == ()  # nor is what comes before it: through it, rows that nobody reads move others
    assert_same(ours, whole(model, batch, monkeypatch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same_rows(reentrant, monkeypatch):
    model, batch = converted("qwen3", torch.float64).train(), doubled_batch()
    expected = whole(model, batch, monkeypatch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    layer, seen = model.backbone.model.layers[-1], []
    model(**batch)
    forward = layer.mlp.forward
    layer.mlp.forward = lambda given: (seen.append(given.shape[0] * given.shape[1]), forward(given))[1]
    assert_same(loss_and_gradients(model, batch), expected, atol=1e-10, rtol=1e-10)
    assert seen == [int((batch["labels"] != -100).sum())] * 2  # in the pass, and again in backward


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions", "use_cache"])
def test_whoever_asks_for_the_last_layer_gets_all_of_it(asked):
    model, batch = converted(), doubled_batch()
    if asked == "use_cache":  # the doubled sequence takes no cache
        batch["attention_pattern"] = AttentionPattern.bidirectional()
    if asked == "output_attentions":
        model.set_attn_implementation("eager")
    part = model.backbone.model.layers[-1].mlp
    assert rows_computed(model, batch, part) < batch["labels"].numel()
    assert rows_computed(model, batch | {asked: True}, part) == batch["labels"].numel()


def test_a_hook_on_the_last_layer_sees_all_of_it():
    model, batch = converted(), doubled_batch()
    layer, states = model.backbone.model.layers[-1], []
    handle = model.backbone.model.norm.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    assert rows_computed(model, batch, layer.mlp) == batch["labels"].numel()
    handle.remove()
    assert rows_computed(model, batch, layer.mlp) < batch["labels"].numel()
    model.backbone.model.layers[0].register_forward_hook(lambda module, inputs, output: None)  # reads nothing of it
    assert rows_computed(model, batch, layer.mlp) < batch["labels"].numel()


def test_the_first_look_moves_neither_random_state_nor_mode():
    model, batch = converted("gpt2"), doubled_batch()
    model.train()
    model.backbone.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    model.last_layer.rows_read(torch.tensor([1, 2]), batch["input_ids"], model._open_attention)
    state = torch.get_rng_state()
    again = copy.deepcopy(model)
    again.last_layer = last_layer.LastLayer(again.backbone)
    again.last_layer.rows_read(torch.tensor([1, 2]), batch["input_ids"], again._open_attention)
    assert again.last_layer.parts and torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in again.named_modules()} == modes


def test_a_copied_model_leaves_out_rows_of_its_own_layer():
    model, batch = converted(), doubled_batch()
    model(**batch)
    other = copy.deepcopy(model)
    inside = {module for module in other.modules()}
    assert all(part in inside for part in other.last_layer.parts)
    assert rows_computed(other, batch, other.backbone.model.layers[-1].mlp) < batch["labels"].numel()


def test_a_layer_that_cannot_be_measured_is_computed_whole(caplog, monkeypatch):
    model, batch = converted(), doubled_batch()
    layer = model.backbone.model.layers[-1]
    forward = layer.mlp.forward

    def particular(states):
        if states.abs().max() > 50:
            raise ValueError("this layer takes no garbage")
        return forward(states)

    layer.mlp.forward = particular
    logging.getLogger("transformers").setLevel(logging.INFO)
    ours = loss_and_gradients(model, batch)
    assert model.last_layer.parts == ()
    assert_same(ours, whole(model, batch, monkeypatch), atol=0, rtol=0)
