"""The loss in chunks, against full logits and autograd."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from a2d_hf.modeling import A2DForMaskedDiffusion
from a2d_hf.modeling.masked_loss import linear_cross_entropy
from tests.conftest import tiny_model


ROWS, VOCAB, HIDDEN = 37, 50, 16


def problem(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(HIDDEN, VOCAB, bias=bias, dtype=dtype)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator)
    return head, hidden, targets, weights


def transforms():
    return {
        "nothing": (None, lambda x: x),
        "scale": (lambda x: (x * 0.3, torch.full((), 0.3)), lambda x: x * 0.3),
        "cap": (
            lambda x: (torch.tanh(x / 2.0) * 2.0, 1 - torch.tanh(x / 2.0) ** 2),
            lambda x: torch.tanh(x / 2.0) * 2.0,
        ),
    }


@pytest.mark.parametrize("chunk_rows", [1, 5, 37, 100])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["nothing", "scale", "cap"])
def test_loss_and_gradients_equal_full_logits(chunk_rows, bias, kind):
    transform, plain = transforms()[kind]
    head, hidden, targets, weights = problem(torch.float32, bias)
    reference = copy.deepcopy(head)
    hidden_reference = hidden.detach().clone().requires_grad_(True)
    loss, nll, hit = linear_cross_entropy(hidden, head, targets, weights, transform, chunk_rows)
    (loss * 3.0).backward()
    logits = plain(reference(hidden_reference))
    nll_reference = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    ((nll_reference * weights).sum() * 3.0).backward()
    torch.testing.assert_close(nll, nll_reference.detach())
    torch.testing.assert_close(loss, (nll_reference * weights).sum())
    assert torch.equal(hit, logits.argmax(-1) == targets)
    torch.testing.assert_close(hidden.grad, hidden_reference.grad)
    for ours, theirs in zip(head.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    head, hidden, targets, weights = problem(torch.float32)
    head.requires_grad_(False)
    linear_cross_entropy(hidden, head, targets, weights)[0].backward()
    assert hidden.grad is not None and head.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_and_its_sums_are_fp32(dtype):
    head, hidden, targets, weights = problem(torch.float32, bias=False)
    half_head = copy.deepcopy(head).to(dtype)
    half_hidden = hidden.detach().to(dtype).requires_grad_(True)
    loss, nll, _ = linear_cross_entropy(half_hidden, half_head, targets, weights * 1e-4, chunk_rows=3)
    loss.backward()
    linear_cross_entropy(hidden, head, targets, weights * 1e-4)[0].backward()
    assert nll.dtype == torch.float32 and half_hidden.grad.dtype == dtype
    torch.testing.assert_close(half_head.weight.grad.float(), head.weight.grad, atol=2e-6, rtol=0.05)
    torch.testing.assert_close(half_hidden.grad.float(), hidden.grad, atol=2e-6, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_under_a_scaled_loss_gives_the_fp32_gradients(dtype):
    """fp16 training scales the loss up in backward, too late for gradients that the forward has taken in fp16."""
    head, hidden, targets, weights = problem(torch.float32, bias=False)
    reference, hidden_reference = copy.deepcopy(head), hidden.detach().clone().requires_grad_(True)
    weights = weights * 1e-6  # what is left of them in a large batch: below the smallest normal fp16 number
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with torch.autocast("cpu", dtype=dtype):
        loss, nll, _ = linear_cross_entropy(hidden, head, targets, weights, chunk_rows=5)
    scaler.scale(loss).backward()
    linear_cross_entropy(hidden_reference, reference, targets, weights)[0].backward()
    assert nll.dtype == torch.float32 and head.weight.grad.dtype == torch.float32
    tolerance = {"rtol": 0.05, "atol": 2e-8}
    torch.testing.assert_close(head.weight.grad / 2**16, reference.weight.grad, **tolerance)
    torch.testing.assert_close(hidden.grad / 2**16, hidden_reference.grad, **tolerance)


def test_a_double_model_has_a_double_loss():
    head, hidden, targets, weights = problem(torch.float64)
    loss, nll, _ = linear_cross_entropy(hidden, head, targets, weights, chunk_rows=5)
    exact = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    assert nll.dtype == torch.float64
    torch.testing.assert_close(loss, (exact * weights).sum(), rtol=1e-13, atol=0)


def test_a_graph_that_is_kept_can_be_read_twice():
    """Gradients are scaled in place where backward runs once, and copied where it may run again."""
    head, hidden, targets, weights = problem(torch.float32)
    loss = linear_cross_entropy(hidden, head, targets, weights, chunk_rows=5)[0] * 3.0
    leaves = [hidden, *head.parameters()]
    first = [gradient.clone() for gradient in torch.autograd.grad(loss, leaves, retain_graph=True)]
    for once, twice in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(once, twice)


def test_one_chunk_of_logits_is_all_that_is_held():
    """Logits, probabilities and their gradient share one tensor; nothing of [rows, vocabulary] is there with more."""
    head = torch.nn.Linear(16, 5000, bias=False)
    hidden, targets = torch.randn(400, 16, requires_grad=True), torch.randint(0, 5000, (400,))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, head, targets, torch.rand(400), chunk_rows=40)[0].backward()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(torch.tensor(changes).cumsum(0).tolist())
    chunk, head_bytes = 40 * 5000 * 4, head.weight.nbytes
    assert peak < head_bytes + 1.5 * chunk < 400 * 5000 * 4


def test_no_rows_give_a_loss_of_zero_with_a_gradient():
    head, hidden, _, _ = problem(torch.float32)
    loss, nll, _ = linear_cross_entropy(hidden[:0], head, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0 and nll.shape == (0,) and not head.weight.grad.any()


SCORED = {
    "gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8, "query_pre_attn_scalar": 8, "num_key_value_heads": 2},
    "granite": {"logits_scaling": 3.0, "num_key_value_heads": 2},
    "cohere": {"logit_scale": 0.25, "num_key_value_heads": 2},
    "gpt2": {},
}


@pytest.mark.parametrize("family", SCORED)
def test_what_a_parent_does_after_its_head_is_recognised(family):
    """Soft-caps and logit scales: the chunked loss equals that of the parent's own full logits, gradients too."""
    if family == "gpt2":
        parent = tiny_model("gpt2")
    else:
        config = AutoConfig.for_model(
            family, vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, **SCORED[family],
        )  # fmt: skip
        parent = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in parent.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
    model = A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=120).eval()
    again = copy.deepcopy(model)
    x = torch.randint(3, 110, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = x.masked_fill(torch.arange(9) % 2 == 0, -100)
    out = model(x, labels=labels)
    out.loss.backward()
    assert model.output_head.transform is not None
    logits = again(x).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
    loss.backward()
    torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=1e-5)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_an_unknown_head_falls_back_to_the_parents_own_logits():
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=120).eval()
    forward = model.backbone.forward

    def squared(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits + 0.1 * out.logits**2
        return out

    model.backbone.forward = squared
    x = torch.randint(3, 110, (1, 9))
    labels = x.masked_fill(torch.arange(9) % 2 == 0, -100)
    expected = torch.nn.functional.cross_entropy(model(x).logits[0], labels[0])
    torch.testing.assert_close(model(x, labels=labels).loss, expected)
    assert model.output_head.transform is None


def test_the_first_token_of_a_shifted_row_cannot_be_a_target():
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=120, token_shift=True)
    x = torch.randint(3, 110, (1, 9))
    with pytest.raises(ValueError, match="token_shift"):
        model(x, labels=x)
