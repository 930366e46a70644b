"""The mask-token policy on tiny and real tokenizers, and what a conversion writes."""

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

from a2d_hf.modeling import A2DForMaskedDiffusion
from a2d_hf.modeling.mask_token import MASK_TOKEN, add_mask_token, choose_mask_token
from tests.conftest import tiny_model, tiny_tokenizer


def test_the_tokenizers_own_mask_comes_first():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<blank>"})
    choice = choose_mask_token(tokenizer, 128)
    assert (choice.strategy, choice.id, choice.token) == ("tokenizer", tokenizer.mask_token_id, "<blank>")


@pytest.mark.parametrize("special", ["eos_token", "pad_token", "unk_token", "bos_token"])
def test_a_mask_that_is_also_a_token_of_the_text_is_not_taken(special):
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = getattr(tokenizer, special)
    assert choose_mask_token(tokenizer, 128).id != getattr(tokenizer, f"{special}_id")


def test_the_first_free_row_comes_next():
    tokenizer = tiny_tokenizer()
    highest = max(tokenizer.get_vocab().values())
    choice = choose_mask_token(tokenizer, highest + 5)
    assert (choice.strategy, choice.id, choice.rows_after) == ("free_row", highest + 1, highest + 5)


@pytest.mark.parametrize(
    "name",
    [
        "<|reserved_special_token_0|>",
        "<unused0>",
        "<|placeholder1|>",
        "[control_8]",
        "<extra_id_0>",
        "<|dummy_0|>",
        "<SPECIAL_12>",
        ">>UNUSED_0<<",
        "<｜place▁holder▁no▁0｜>",
    ],
)
def test_then_a_reserved_token(name):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True)])
    choice = choose_mask_token(tokenizer, max(tokenizer.get_vocab().values()) + 1)
    assert (choice.strategy, choice.token) == ("reserved", name)


@pytest.mark.parametrize("name", ["extra", "<p>", "[0]", "reserved", "<number_1>"])
def test_an_ordinary_word_is_not_a_reserved_token(name):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(name)])
    assert choose_mask_token(tokenizer, max(tokenizer.get_vocab().values()) + 1).strategy == "grow"


def test_else_the_matrix_grows_to_a_multiple_of_64():
    tokenizer = tiny_tokenizer()
    rows = max(tokenizer.get_vocab().values()) + 1
    choice = choose_mask_token(tokenizer, rows)
    assert (choice.strategy, choice.id) == ("grow", rows)
    assert choice.rows_after % 64 == 0 and rows < choice.rows_after <= rows + 64


def test_the_name_is_free():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([MASK_TOKEN])
    choice = choose_mask_token(tokenizer, 200)
    assert choice.token not in tokenizer.get_vocab()


def test_the_tokenizer_learns_the_id_and_keeps_it(tmp_path):
    tokenizer = tiny_tokenizer()
    choice = choose_mask_token(tokenizer, 200)
    add_mask_token(tokenizer, choice)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.mask_token_id == choice.id
    assert again(f"a{choice.token}b", add_special_tokens=False)["input_ids"].count(choice.id) == 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grow", [True, False])
def test_new_rows_are_the_mean_of_the_trained_rows_and_nothing_else_changes(tied, grow):
    tokenizer = tiny_tokenizer()
    rows = max(tokenizer.get_vocab().values()) + (1 if grow else 4)
    parent = tiny_model("llama", vocab_size=rows, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    model = A2DForMaskedDiffusion.from_causal_lm(parent, tokenizer)
    trained = max(i for t, i in tokenizer.get_vocab().items() if t != tokenizer.mask_token) + 1
    for name, tensor in model.backbone.state_dict().items():
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(tensor, before[name])
            continue
        written = {model.config.mask_token_id, *range(rows, tensor.shape[0])}
        kept = [row for row in range(rows) if row not in written]
        assert torch.equal(tensor[kept], before[name][kept])
        for row in written:
            torch.testing.assert_close(tensor[row], before[name][:trained].mean(0), atol=1e-6, rtol=1e-5)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert (model.config.vocab_size % 64 == 0) if grow else model.config.vocab_size == rows


def test_a_near_zero_row_of_the_tokenizers_own_mask_is_replaced():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<blank>"})
    parent = tiny_model("llama")
    with torch.no_grad():
        parent.get_input_embeddings().weight[tokenizer.mask_token_id] *= 1e-4
    model = A2DForMaskedDiffusion.from_causal_lm(parent, tokenizer)
    assert model.mask_token.row_initialized
    assert model.get_input_embeddings().weight[tokenizer.mask_token_id].norm() > 0.01


def test_a_trained_row_of_the_tokenizers_own_mask_is_kept():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<blank>"})
    parent = tiny_model("llama")
    before = parent.get_input_embeddings().weight.detach().clone()
    model = A2DForMaskedDiffusion.from_causal_lm(parent, tokenizer)
    assert not model.mask_token.row_initialized
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_without_a_tokenizer_an_id_is_needed():
    with pytest.raises(ValueError, match="tokenizer.*mask_token_id"):
        A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"))
    with pytest.raises(ValueError, match="mask_token_id"):
        A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=999)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "rows", "strategy", "token_id", "rows_after"),
    [
        ("qwen3", 151936, "free_row", 151669, 151936),
        ("gpt2", 50257, "grow", 50257, 50304),
        ("phi-3-mini", 32064, "free_row", 32011, 32064),
        ("pythia", 50304, "free_row", 50278, 50304),
        ("sdar_qwen3_with_mask", 151936, "tokenizer", 151669, 151936),
    ],
)
def test_real_tokenizers(real_data, name, rows, strategy, token_id, rows_after):
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / name)
    choice = choose_mask_token(tokenizer, rows)
    assert (choice.strategy, choice.id, choice.rows_after) == (strategy, token_id, rows_after)
    add_mask_token(tokenizer, choice)
    assert tokenizer.mask_token_id == token_id
