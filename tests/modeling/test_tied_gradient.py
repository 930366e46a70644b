"""The gradient of a tied input embedding is added into the head's: the same numbers, without a matrix of its own."""

import copy

import pytest
import torch

from a2d_hf.modeling import A2DForMaskedDiffusion, output_head
from a2d_hf.modeling.masked_loss import _LinearCrossEntropy
from tests.conftest import tiny_model


MASK_ID = 120


def tied_model(dtype=torch.float64, family="gpt2"):
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model(family).to(dtype), mask_token_id=MASK_ID).eval()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return model


def batch():
    ids = torch.randint(3, 110, (3, 14), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(14) % 3 != 0, -100)
    return {
        "input_ids": ids.masked_fill(labels != -100, MASK_ID),
        "labels": labels,
        "loss_weights": torch.ones(ids.shape),
    }


def full_logits_gradients(model, inputs, passes=1):
    """Plain autograd over the logits of every position: torch's own dense gradient of both uses of the matrix."""
    model.zero_grad()
    for _ in range(passes):
        logits = model(input_ids=inputs["input_ids"]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="sum").backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "not reentrant", "reentrant"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])  # Gemma scales what it looks up
def test_gradients_are_those_of_full_logits(family, passes, checkpointing):
    model, inputs = tied_model(family=family), batch()
    expected = full_logits_gradients(model, inputs, passes)
    model.zero_grad()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    for _ in range(passes):
        model(**inputs).loss.backward()
    for name, weight in model.named_parameters():
        assert not weight.grad.is_sparse
        # Rotary angles are fp32, and a recomputed layer rounds them alike.
        torch.testing.assert_close(weight.grad, expected[name], rtol=0, atol=1e-10, msg=name)


def test_the_rows_are_added_in_place(monkeypatch):
    """The matrix that reaches the parameter is the one that the head has made in the forward pass."""
    model, made = tied_model(torch.float32), []
    backward = _LinearCrossEntropy.backward

    def spy(ctx, *args):
        found = backward(ctx, *args)
        made.append(ctx.tied.of_head_VD.data_ptr())
        return found

    monkeypatch.setattr(_LinearCrossEntropy, "backward", staticmethod(spy))
    model(**batch()).loss.backward()
    assert [model.get_input_embeddings().weight.grad.data_ptr()] == made


def test_a_backward_pass_without_the_loss_still_gives_a_dense_gradient():
    model, inputs = tied_model(), batch()
    model(**inputs, output_hidden_states=True).hidden_states[0].sum().backward()
    found = model.get_input_embeddings().weight.grad
    assert not found.is_sparse
    counts = torch.bincount(inputs["input_ids"].flatten(), minlength=found.shape[0]).double()
    torch.testing.assert_close(found, counts[:, None].expand(found.shape))
    assert not model.get_input_embeddings().sparse


def test_a_pass_over_embeddings_keeps_the_gradient_of_the_head():
    """Nothing is looked up, so nothing comes later that could pass it on."""
    model, inputs = tied_model(), batch()
    looked_up = model.get_input_embeddings()(inputs.pop("input_ids"))
    model(inputs_embeds=looked_up.detach(), **inputs).loss.backward()
    found = model.get_input_embeddings().weight.grad
    logits = model(inputs_embeds=looked_up.detach()).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="sum")
    (expected,) = torch.autograd.grad(loss, [model.get_input_embeddings().weight])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_frozen_untied_and_copied_models_are_left_alone():
    model, inputs = tied_model(), batch()
    model(**inputs).loss.backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin(**inputs).loss.backward()
    torch.testing.assert_close(twin.get_input_embeddings().weight.grad, model.get_input_embeddings().weight.grad)
    model.get_input_embeddings().weight.requires_grad_(False)
    assert not output_head.adds_into_the_head(model.get_input_embeddings(), model.get_output_embeddings())
    untied = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=MASK_ID)
    assert not output_head.adds_into_the_head(untied.get_input_embeddings(), untied.get_output_embeddings())
