"""What `forward` returns: alignment, token shift, masked rows through the head, losses."""

import pytest
import torch

from a2d_hf.modeling import A2DForMaskedDiffusion, AttentionPattern
from tests.conftest import FAMILIES, tiny_model


MASK_ID = 120
every_family = pytest.mark.parametrize("family", FAMILIES)


def convert(family: str = "llama", **fields) -> A2DForMaskedDiffusion:
    return A2DForMaskedDiffusion.from_causal_lm(tiny_model(family), mask_token_id=MASK_ID, **fields).eval()


@pytest.fixture
def x():
    return torch.randint(3, 110, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def wanted():
    return torch.rand(3, 17, generator=torch.Generator().manual_seed(2)) < 0.4


@every_family
@pytest.mark.parametrize("token_shift", [False, True])
def test_masked_rows_equal_the_rows_of_the_full_logits(family, token_shift, x, wanted):
    model = convert(family, token_shift=token_shift)
    with torch.no_grad():
        full = model(x).logits
        rows = model(x, logits_mask=wanted).logits
    assert rows.shape == (int(wanted.sum()), full.shape[-1])
    torch.testing.assert_close(rows, full[wanted], atol=1e-5, rtol=1e-5)


def test_only_the_wanted_rows_meet_the_vocabulary(x, wanted):
    model, seen = convert(), []
    labels = x.masked_fill(~wanted, -100)
    model(x, labels=labels)  # the first loss looks once at what follows the head
    model.get_output_embeddings().register_forward_hook(lambda m, i, o: seen.append(o.shape[:-1].numel()))
    model(x, logits_mask=wanted)
    assert seen == [int(wanted.sum())]
    model(x, labels=labels)
    assert seen[1:] == [1], "the loss runs the head in chunks of its own; the parent only finishes one row"


def test_a_batch_without_any_wanted_row_gives_none(x):
    model = convert()
    assert model(x, logits_mask=torch.zeros_like(x, dtype=torch.bool)).logits.shape == (0, 128)
    out = model(x, labels=torch.full_like(x, -100))
    assert out.loss.item() == 0.0
    out.loss.backward()


@every_family
def test_token_shift_reads_the_position_before(family, x):
    plain, shifted = convert(family), convert(family, token_shift=True)
    with torch.no_grad():
        expected, found = plain(x).logits, shifted(x).logits
    assert torch.equal(found[:, 1:], expected[:, :-1])
    assert (found[:, 0] == 0).all(), "nothing stands before position 0, so it must be uniform"


def test_causal_pattern_returns_raw_next_token_logits_shifted_or_not(x):
    plain, shifted = convert(), convert(token_shift=True)
    with torch.no_grad():
        raw = plain.backbone(x).logits
        assert torch.equal(plain(x, attention_pattern="causal").logits, raw)
        assert torch.equal(shifted(x, attention_pattern="causal").logits, raw)


def test_shift_does_not_cross_padding_or_documents(x):
    model = convert(token_shift=True)
    row = x[:1]
    mask = torch.ones_like(row)
    mask[:, :4] = 0
    documents = torch.tensor([[0] * 8 + [1] * 9])
    with torch.no_grad():
        assert (model(row, attention_mask=mask).logits[0, 4] == 0).all()
        assert (model(row, document_ids=documents).logits[0, 8] == 0).all()


def test_a_shifted_block_opens_from_the_clean_copy(x):
    """Block size 1 with token shift and clean context is the parent's own next-token prediction, before training."""
    model, row = convert(token_shift=True, objective="bd3lm", block_size=1), x[:1]
    noisy = torch.full_like(row, MASK_ID)
    with torch.no_grad():
        parent = torch.log_softmax(model.backbone(row).logits, -1)
        doubled = model(torch.cat([noisy, row], 1), attention_pattern=AttentionPattern.bd3lm(1)).logits
    length = row.shape[1]
    found = torch.log_softmax(doubled[:, :length], -1)
    torch.testing.assert_close(found[:, 1:], parent[:, :-1], atol=1e-5, rtol=1e-5)


def test_shifted_blocks_read_noise_inside_and_clean_at_their_start(x):
    model, row = convert(token_shift=True, objective="bd3lm", block_size=4), x[:1, :16]
    plain = convert(objective="bd3lm", block_size=4)
    noisy = torch.where(torch.arange(16) % 3 == 0, MASK_ID, row)
    doubled = torch.cat([noisy, row], 1)
    pattern = AttentionPattern.bd3lm(4)
    with torch.no_grad():
        raw = plain(doubled, attention_pattern=pattern).logits[0]
        found = model(doubled, attention_pattern=pattern).logits[0]
    for i in range(1, 16):
        source = 16 + i - 1 if i % 4 == 0 else i - 1
        assert torch.equal(found[i], raw[source])


@pytest.mark.parametrize("token_shift", [False, True])
def test_loss_is_the_weighted_sum_of_cross_entropies(token_shift, x, wanted):
    model = convert(token_shift=token_shift)
    wanted[:, 0] = False
    weights = torch.rand(x.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        out = model(x, labels=x.masked_fill(~wanted, -100), loss_weights=weights)
        log_p = torch.log_softmax(model(x).logits, -1)
    expected = sum(
        -weights[b, i] * log_p[b, i, x[b, i]] for b in range(x.shape[0]) for i in range(x.shape[1]) if wanted[b, i]
    )
    torch.testing.assert_close(out.loss, expected, atol=1e-4, rtol=1e-5)
    assert out.logits is None and out.token_nll.shape == (int(wanted.sum()),)


def test_loss_without_weights_is_the_mean_or_over_the_given_count(x, wanted):
    model, labels = convert(), x.masked_fill(~wanted, -100)
    with torch.no_grad():
        mean = model(x, labels=labels).loss
        over = model(x, labels=labels, num_items_in_batch=10).loss
    torch.testing.assert_close(over * 10, mean * wanted.sum())


def test_gradients_of_masked_rows_equal_those_of_full_logits(x, wanted):
    by_rows, by_all = convert(), convert()
    labels = x.masked_fill(~wanted, -100)
    by_rows(x, labels=labels, loss_weights=torch.ones(x.shape)).loss.backward()
    logits = by_all(x).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for (name, a), (_, b) in zip(by_rows.named_parameters(), by_all.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)


@every_family
def test_hidden_states_are_returned_when_asked(family, x):
    """dLLM's patched forwards return None, which makes representation alignment impossible."""
    model = convert(family)
    out = model(x, output_hidden_states=True)
    assert len(out.hidden_states) == model.backbone.config.num_hidden_layers + 1
    assert all(state.shape[:2] == x.shape for state in out.hidden_states)


def test_objective_decides_the_default_pattern(x):
    mdlm, bd3lm = convert(), convert(objective="bd3lm", block_size=4)
    with torch.no_grad():
        assert torch.equal(mdlm(x).logits, mdlm(x, attention_pattern="bidirectional").logits)
        assert torch.equal(bd3lm(x).logits, bd3lm(x, attention_pattern=AttentionPattern.block_causal(4)).logits)
        assert not torch.equal(mdlm(x).logits, bd3lm(x).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(3, 5)}, "attention_mask"),
        ({"attention_mask": torch.ones(3, 1, 17, 17)}, "attention_mask"),
        ({"position_ids": torch.arange(4)[None]}, "position_ids"),
        ({"document_ids": torch.arange(4)[None]}, "document_ids"),
        ({"attention_pattern": "block_causal"}, "block_size"),
        ({"attention_pattern": "diagonal"}, "attention_pattern"),
        ({"attention_pattern": AttentionPattern.bd3lm(4)}, "divisible by 2"),
        ({"labels": torch.zeros(3, 4, dtype=torch.long)}, "labels"),
        ({"labels": torch.zeros(3, 17, dtype=torch.long), "logits_mask": torch.ones(3, 17).bool()}, "not both"),
        ({"inputs_embeds": torch.zeros(3, 17, 32)}, "exactly one"),
    ],
)
def test_bad_arguments_are_named(arguments, message, x):
    with pytest.raises(ValueError, match=message):
        convert()(x, **arguments)


def test_inputs_embeds_equal_input_ids(x):
    model = convert()
    with torch.no_grad():
        embeds = model.get_input_embeddings()(x)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(x).logits)


def test_resizing_keeps_config_and_ties():
    model = convert("qwen3")
    model.resize_token_embeddings(192, mean_resizing=False)
    assert model.config.vocab_size == model.backbone.config.vocab_size == 192
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model(torch.tensor([[190, 5]])).logits.shape[-1] == 192


def test_wrapping_copies_nothing():
    parent = tiny_model("llama")
    model = A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=MASK_ID)
    assert model.backbone is parent
    assert model.get_input_embeddings().weight.data_ptr() == parent.get_input_embeddings().weight.data_ptr()
