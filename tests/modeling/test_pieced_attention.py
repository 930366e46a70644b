"""Attention in pieces against one call of it, and where it is used."""

import pytest
import torch

from a2d_hf.modeling import A2DForMaskedDiffusion, AttentionPattern, pieced_attention
from a2d_hf.modeling.pieced_attention import pieces_of
from tests.conftest import tiny_model


LENGTH, BLOCK, MASK_ID = 64, 4, 120
FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox")


def doubled(views: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 110, (rows, (views + 1) * LENGTH), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model, x, pattern, **inputs):
    labels = x.clone()
    labels[:, ::3] = -100
    model.zero_grad(set_to_none=True)
    loss = model(x, labels=labels, attention_pattern=pattern, **inputs).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls that were cut, with pieces small enough for the rows of these tests."""
    made, attend, cut = [], pieced_attention.attend_in_pieces, pieces_of

    def counted(function, pieces, *args, **kwargs):
        made.append(len(pieces))
        return attend(function, pieces, *args, **kwargs)

    monkeypatch.setattr("a2d_hf.modeling.attention_interface.attend_in_pieces", counted)
    monkeypatch.setattr(
        "a2d_hf.modeling.attention_interface.pieces_of", lambda mask, copies: cut(mask, copies, fewest=8)
    )
    return made


@pytest.mark.parametrize("views", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_one_call(family, views, calls, monkeypatch):
    model = A2DForMaskedDiffusion.from_causal_lm(
        tiny_model(family), mask_token_id=MASK_ID, objective="bd3lm", block_size=BLOCK, sliding_window="open"
    ).double()
    x, pattern = doubled(views), AttentionPattern.bd3lm(BLOCK, clean_context="causal", views=views)
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[0, -10:] = 0
    padding = padding.repeat(1, views + 1)
    in_pieces = loss_and_gradients(model, x, pattern, attention_mask=padding)
    assert calls and min(calls) > 1
    before = len(calls)
    monkeypatch.setattr("a2d_hf.modeling.attention_interface.pieces_of", lambda mask, copies: None)
    whole = loss_and_gradients(model, x, pattern, attention_mask=padding)
    assert len(calls) == before
    torch.testing.assert_close(in_pieces[0], whole[0], rtol=1e-10, atol=1e-10)
    for found, expected in zip(in_pieces[1], whole[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_packed_documents_and_recomputed_layers(calls, monkeypatch):
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=MASK_ID).double().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    x, pattern = doubled(1), AttentionPattern.bd3lm(BLOCK)
    documents = {"document_ids": (torch.arange(LENGTH) // 24).repeat(2, 2), "attention_mask": torch.ones_like(x)}
    in_pieces = loss_and_gradients(model, x, pattern, **documents)
    assert calls
    monkeypatch.setattr("a2d_hf.modeling.attention_interface.pieces_of", lambda mask, copies: None)
    whole = loss_and_gradients(model, x, pattern, **documents)
    torch.testing.assert_close(in_pieces[0], whole[0], rtol=1e-10, atol=1e-10)
    for found, expected in zip(in_pieces[1], whole[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_other_patterns_are_left_whole(calls):
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=MASK_ID)
    for pattern in (AttentionPattern.bidirectional(), AttentionPattern.causal(), AttentionPattern.block_causal(BLOCK)):
        model(doubled(1), attention_pattern=pattern)
    assert calls == []


def test_a_piece_sees_what_its_queries_see_and_no_key_that_none_does():
    queries, keys = 96, 80
    mask = torch.rand((2, 1, queries, keys), generator=torch.Generator().manual_seed(1)) < 0.02
    mask[:, :, 24:48] = False  # a piece of padding only
    pieces = pieces_of(mask, copies=1, fewest=8)
    assert [piece.queries for piece in pieces] == [slice(i, i + 24) for i in range(0, queries, 24)]
    for piece in pieces:
        part = mask[:, :, piece.queries]
        assert torch.equal(piece.mask, part[..., piece.keys_S])
        assert piece.mask.sum() == part.sum()
        assert piece.mask.flatten(0, 2).any(dim=0).all() or not part.any()


@pytest.mark.parametrize(
    "mask",
    [
        None,
        torch.ones(1, 1, 512, 512, dtype=torch.bool),
        torch.zeros(1, 1, 512, 512),
        torch.zeros(1, 1, 255, 255, dtype=torch.bool),
    ],
    ids=["none", "open", "numbers", "short"],
)
def test_what_is_not_worth_cutting_is_not_cut(mask):
    assert pieces_of(mask, copies=2) is None
