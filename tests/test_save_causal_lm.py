"""scripts/save_causal_lm.py: the parent comes back out of a conversion, with the weights of the conversion."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from a2d_hf import A2DForMaskedDiffusion
from scripts import save_causal_lm as script
from tests.conftest import tiny_model, tiny_tokenizer


@pytest.fixture(params=["llama", "gpt2"])
def conversion(request, tmp_path):
    """A folder of a converted model whose weights have moved since, and that model."""
    tokenizer = tiny_tokenizer()
    parent = tiny_model(request.param, vocab_size=len(tokenizer))
    model = A2DForMaskedDiffusion.from_causal_lm(parent, tokenizer=tokenizer)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(tmp_path / "converted")
    tokenizer.save_pretrained(tmp_path / "converted")
    return tmp_path / "converted", model.eval()


def test_it_is_an_ordinary_checkpoint_that_computes_what_the_causal_mode_does(conversion, tmp_path, capsys):
    folder, model = conversion
    assert script.main([str(folder), str(tmp_path / "new" / "parent")]) == 0
    assert f"{type(model.backbone).__name__} with" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "parent").eval()
    assert type(loaded) is type(model.backbone) and loaded.config.model_type != "a2d"
    rows = model.config.parent_vocab_size
    assert loaded.get_input_embeddings().weight.shape[0] == loaded.get_output_embeddings().weight.shape[0] == rows
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours = model(input_ids=ids, attention_pattern="causal").logits[..., :rows]
        theirs = loaded(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    kept = AutoTokenizer.from_pretrained(tmp_path / "new" / "parent")
    assert kept.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()


def test_it_can_be_converted_again(conversion, tmp_path):
    folder, model = conversion
    script.main([str(folder), str(tmp_path / "parent")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "parent")
    again = A2DForMaskedDiffusion.from_pretrained(tmp_path / "parent", tokenizer=tokenizer).eval()
    assert again.config.mask_token_id == model.config.mask_token_id == tokenizer.mask_token_id
    ids = torch.arange(5, 25)[None]
    rows = model.config.parent_vocab_size
    with torch.no_grad():
        first, second = (m(input_ids=ids, attention_pattern="causal").logits[..., :rows] for m in (model, again))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_neither_another_checkpoint_nor_a_folder_is_touched(conversion, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "parent")
    assert script.main([str(tmp_path / "parent"), str(tmp_path / "out")]) == 2
    assert "convert it first" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "there").mkdir()
    assert script.main([str(conversion[0]), str(tmp_path / "there")]) == 2
    assert "there is there already" in capsys.readouterr().err
    assert list((tmp_path / "there").iterdir()) == []
