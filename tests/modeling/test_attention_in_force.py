"""Patterns in force on real transformers models: every family, sdpa and eager, without per-family code."""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from a2d_hf.modeling import A2DForMaskedDiffusion, AttentionPattern
from a2d_hf.modeling.attention_interface import PatternInForce, pattern_in_force
from tests.conftest import FAMILIES, WINDOW, tiny_config, tiny_model


LENGTH = 24
MASK_ID = 120
IMPLEMENTATIONS = ("sdpa", "eager")
everywhere = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def convert(family: str, implementation: str = "sdpa", *, overrides: dict | None = None, **fields):
    parent = tiny_model(family, attn_implementation=implementation, **(overrides or {}))
    return A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=MASK_ID, **fields).eval()


def ids(rows: int = 1, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 110, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def influence(forward, x_1L: torch.Tensor) -> torch.Tensor:
    """[i, j]: does another token at j change the logits at i?"""
    base = forward(x_1L)
    columns = []
    for j in range(x_1L.shape[1]):
        moved = x_1L.clone()
        moved[0, j] = (moved[0, j] + 31) % 100 + 3
        columns.append((forward(moved) - base).abs().amax(-1)[0] > 1e-6)
    return torch.stack(columns, dim=1)


@everywhere
@every_family
def test_open_attention_reaches_every_position(family, implementation):
    model = convert(family, implementation, sliding_window="open")
    assert influence(lambda x: model(x).logits, ids()).all()


@everywhere
@every_family
def test_block_causal_never_leaks_backward_and_is_full_inside(family, implementation):
    model = convert(family, implementation, sliding_window="open")
    pattern = AttentionPattern.block_causal(4)
    found = influence(lambda x: model(x, attention_pattern=pattern).logits, ids())
    block = torch.arange(LENGTH) // 4
    assert torch.equal(found, block[None, :] <= block[:, None])


@everywhere
@every_family
def test_the_causal_rule_spelled_out_equals_the_librarys_own(family, implementation):
    model, x = convert(family, implementation), ids(2)
    with torch.no_grad():
        native = model.backbone(x).logits
        with pattern_in_force(PatternInForce(AttentionPattern.causal())):
            ours = model.backbone(x, attention_mask=torch.ones_like(x)).logits
    assert torch.equal(native, ours)


@everywhere
def test_kept_windows_are_symmetric_and_of_the_same_size(implementation):
    model = convert("mistral", implementation, overrides={"num_hidden_layers": 1})
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]).abs()
    assert torch.equal(influence(lambda x: model(x).logits, ids()), distance < WINDOW)


@everywhere
def test_kept_windows_meet_blocks(implementation):
    model = convert("mistral", implementation, overrides={"num_hidden_layers": 1})
    position = torch.arange(LENGTH)
    inside = (position[:, None] - position[None, :]).abs() < WINDOW
    allowed = position[None, :] // 6 <= position[:, None] // 6
    found = influence(lambda x: model(x, attention_pattern=AttentionPattern.block_causal(6)).logits, ids())
    assert torch.equal(found, inside & allowed)


@everywhere
@every_family
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pattern", [None, "causal", AttentionPattern.block_causal(4)])
def test_padding_moves_nothing(family, implementation, side, pattern):
    model, x = convert(family, implementation), ids()
    padding, ones = torch.zeros(1, 5, dtype=torch.long), torch.ones_like(x)
    parts = (padding, x) if side == "left" else (x, padding)
    masks = (padding, ones) if side == "left" else (ones, padding)
    real = slice(5, None) if side == "left" else slice(0, LENGTH)
    with torch.no_grad():
        alone = model(x, attention_pattern=pattern).logits
        padded = model(torch.cat(parts, 1), attention_mask=torch.cat(masks, 1), attention_pattern=pattern).logits
    torch.testing.assert_close(padded[:, real], alone, atol=2e-5, rtol=1e-4)


@everywhere
@every_family
def test_packed_documents_equal_documents_alone(family, implementation):
    model, first, second = convert(family, implementation), ids(1, 10), ids(1, 14, seed=1)
    document_ids = torch.tensor([[7] * 10 + [9] * 14])
    with torch.no_grad():
        packed = model(torch.cat([first, second], 1), document_ids=document_ids).logits
        alone = torch.cat([model(first).logits, model(second).logits], 1)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-4)


def test_documents_are_read_from_positions_that_start_again():
    model, first, second = convert("llama"), ids(1, 10), ids(1, 14, seed=1)
    position_ids = torch.cat([torch.arange(10), torch.arange(14)])[None]
    with torch.no_grad():
        packed = model(torch.cat([first, second], 1), position_ids=position_ids).logits
        marked = model(torch.cat([first, second], 1), document_ids=torch.tensor([[0] * 10 + [1] * 14])).logits
    assert torch.equal(packed, marked)


@everywhere
@every_family
def test_the_doubled_sequence_equals_one_pass_per_block(family, implementation):
    model, x, block = convert(family, implementation), ids(), 6
    noisy = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.5, MASK_ID, x)
    with torch.no_grad():
        doubled = model(torch.cat([noisy, x], 1), attention_pattern=AttentionPattern.bd3lm(block)).logits[:, :LENGTH]
        for start in range(0, LENGTH, block):
            prefix = torch.cat([x[:, :start], noisy[:, start : start + block]], 1)
            alone = model(prefix, attention_pattern=AttentionPattern.block_causal(block)).logits[:, start:]
            torch.testing.assert_close(doubled[:, start : start + block], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("clean_context", ["block", "causal"])
def test_noise_never_reaches_the_clean_copy_or_another_view(clean_context):
    model = convert("llama")
    pattern = AttentionPattern.bd3lm(4, clean_context, views=2)
    found = influence(lambda x: model(x, attention_pattern=pattern).logits, ids(1, 36))
    copy = torch.arange(36) // 12
    assert not found[copy == 2][:, copy < 2].any()
    assert not found[copy == 0][:, copy == 1].any() and not found[copy == 1][:, copy == 0].any()


@everywhere
def test_log_bias_annealing_scales_future_weights_by_alpha(implementation):
    """One layer, one head, equal scores: the attention weights can be counted by hand."""
    model = convert("llama", implementation, overrides={"num_hidden_layers": 1})
    attention = model.backbone.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.zero_()
    seen = {}
    attention.v_proj.register_forward_hook(lambda m, i, o: seen.__setitem__("v", o))
    attention.o_proj.register_forward_pre_hook(lambda m, i: seen.__setitem__("out", i[0]))
    alpha, length = 0.25, 6
    with torch.no_grad():
        model(ids(1, length), attention_pattern=AttentionPattern.annealed(alpha, form="log_bias"))
    weight = torch.where(torch.ones(length, length).tril() > 0, 1.0, alpha)
    weight = weight / weight.sum(-1, keepdim=True)
    value = seen["v"][0].view(length, 2, 8).repeat_interleave(2, dim=1).flatten(1)
    torch.testing.assert_close(seen["out"][0], weight @ value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["stochastic", "log_bias"])
def test_annealing_ends_at_the_parent_and_at_the_open_model(form):
    model, x = convert("gemma3_text"), ids()
    with torch.no_grad():
        start = model(x, attention_pattern=AttentionPattern.annealed(0.0, form=form)).logits
        end = model(x, attention_pattern=AttentionPattern.annealed(1.0, form=form)).logits
        assert torch.equal(start, model(x, attention_pattern="causal").logits)
        assert torch.equal(end, model(x).logits)


@every_family
@pytest.mark.parametrize("sliding_window", ["keep", "open"])
def test_block_decoding_with_a_cache_equals_without(family, sliding_window):
    model, x, block = convert(family, sliding_window=sliding_window), ids(2), 6
    pattern = AttentionPattern.block_causal(block)
    with torch.no_grad():
        whole = model(x, attention_pattern=pattern).logits
        cache = None
        for start in range(0, LENGTH, block):
            out = model(x[:, start : start + block], attention_pattern=pattern, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            torch.testing.assert_close(out.logits, whole[:, start : start + block], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_flex_attention_agrees_with_sdpa(family):
    model, x = convert(family), ids()
    other = convert(family, "flex_attention")
    pattern = AttentionPattern.block_causal(6)
    with torch.no_grad():
        expected = model(x, attention_pattern=pattern).logits
        found = other(x, attention_pattern=pattern).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_flash_attention_refuses_what_it_cannot_express():
    """The mask function alone: no flash kernel runs on a CPU."""
    from transformers import AttentionMaskInterface

    mask = AttentionMaskInterface()["flash_attention_2"]
    from transformers.masking_utils import causal_mask_function

    arguments = {"batch_size": 1, "q_length": 4, "kv_length": 4, "mask_function": causal_mask_function}
    with pattern_in_force(PatternInForce(AttentionPattern.block_causal(2))):
        with pytest.raises(ValueError, match="flash_attention_2.*block_causal"):
            mask(**arguments)


def test_other_models_in_the_process_notice_nothing():
    before = tiny_model("llama")
    x = ids()
    with torch.no_grad():
        expected = before(x).logits
        model = convert("llama")
        assert not torch.equal(model(x).logits, expected)
        assert torch.equal(before(x).logits, expected)


def test_patterns_of_two_threads_do_not_meet():
    model, x = convert("llama"), ids()
    patterns = ["bidirectional", "causal", AttentionPattern.block_causal(4)]
    with torch.no_grad():
        expected = [model(x, attention_pattern=p).logits for p in patterns]
    wrong = []

    def work(index):
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal(model(x, attention_pattern=patterns[index]).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_mask_is_built_where_everything_is_visible():
    """The fast kernels take no mask: an all-true one would exclude them (dLLM passes a dense one always)."""
    model, x = convert("llama"), ids()
    masks = []
    layer = model.backbone.model.layers[0]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        model(x)
        model(x, attention_mask=torch.ones_like(x))
        model(x, attention_pattern=AttentionPattern.block_causal(LENGTH))
        model(x, attention_pattern=AttentionPattern.block_causal(4))
    assert [mask is None for mask in masks] == [True, True, True, False]


def gradients(model, x, checkpointing: bool) -> dict[str, torch.Tensor]:
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.zero_grad()
    labels = torch.where(torch.arange(x.shape[1]) % 2 == 0, x, -100)
    model(x, labels=labels, attention_pattern="bidirectional").loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@everywhere
@every_family
def test_gradient_checkpointing_recomputes_under_the_same_pattern(family, implementation):
    dropout = {"attention_dropout": 0.0}
    if family == "gpt2":
        dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    elif family == "opt":
        dropout = {"dropout": 0.0, "attention_dropout": 0.0}
    elif family == "gpt_neox":
        dropout = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    plain = gradients(convert(family, implementation, overrides=dropout), ids(2), checkpointing=False)
    again = gradients(convert(family, implementation, overrides=dropout), ids(2), checkpointing=True)
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], atol=1e-6, rtol=1e-5)


def test_recomputing_without_the_pattern_is_an_error_not_a_wrong_gradient():
    """What an activation-checkpointing wrapper from outside does: it calls the layer again in backward."""
    model, x = convert("llama").train(), ids()
    layer = model.backbone.model.layers[0]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
        inner, *args, use_reentrant=False, **kwargs
    )
    loss = model(x, labels=x).loss
    with pytest.raises(RuntimeError, match="gradient_checkpointing"):
        loss.backward()


def test_the_call_leaves_the_shared_config_alone():
    """`is_causal=` as a call argument mutates the config in transformers; a context variable does not."""
    model, x = convert("llama"), ids()
    before = model.backbone.config.to_dict()
    model(x)
    assert model.backbone.config.to_dict() == before


def test_two_copies_of_the_module_do_not_silence_each_other(monkeypatch):
    """A `trust_remote_code` checkpoint brings its own copy of the attention code into the same process."""
    import importlib.util
    import sys

    from transformers import AttentionInterface, AttentionMaskInterface

    import a2d_hf.modeling.attention_interface as first

    first.install()
    # The copy must leave the registries with this test: a compiled pass later on would look for its module in vain.
    for registry in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(registry, "_global_mapping", dict(registry._global_mapping))
    spec = importlib.util.spec_from_file_location("a2d_hf.modeling.attention_interface_copy", first.__file__)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    try:
        spec.loader.exec_module(copy)
        copy.install()
        backbone, x = tiny_model("llama"), ids()
        ones = torch.ones_like(x)
        with torch.no_grad():
            with first.pattern_in_force(first.PatternInForce(AttentionPattern.bidirectional())):
                by_first = backbone(x, attention_mask=ones).logits
            with copy.pattern_in_force(copy.PatternInForce(AttentionPattern.bidirectional())):
                by_copy = backbone(x, attention_mask=ones).logits
            plain = backbone(x).logits
        assert torch.equal(by_first, by_copy) and not torch.equal(by_first, plain)
        # Nor does one take a layer that the other recomputes for one whose pattern is gone.
        model = A2DForMaskedDiffusion.from_causal_lm(backbone, mask_token_id=1).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(x, attention_mask=ones, labels=x).loss.backward()
    finally:
        del sys.modules[spec.name]


def test_sdpa_and_eager_are_the_parents_own_choice():
    config = tiny_config("llama")
    parent = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=MASK_ID)
    assert model.config._attn_implementation == "eager"
    assert model.backbone.config._attn_implementation == "eager"
