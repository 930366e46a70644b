"""Each kind of attention that a parent may have is opened right, or refused: by name, on a small type that has it.

The kind itself is asserted to have survived the shrinking; what every layer sees is then traced edge by edge.
"""

import pytest
import torch

from a2d_hf.architecture_checks import tiny_parent
from a2d_hf.modeling import A2DForMaskedDiffusion, AttentionPattern
from a2d_hf.modeling.gates import identity_gate, reach_gate


MASK_ID = 120
# The kind, a type that has it, and the sign of it in the parent.
KINDS = {
    "sliding windows": ("mistral", lambda m: m.config.sliding_window == 8),
    "chunks": ("llama4_text", lambda m: m.config.attention_chunk_size == 8),
    "attention sinks": ("gpt_oss", lambda m: any("sinks" in name for name, _ in m.named_parameters())),
    "soft-caps": ("gemma2", lambda m: m.config.attn_logit_softcapping is not None),
    "alibi": ("bloom", lambda m: m.config.model_type == "bloom"),
    "latent attention": ("deepseek_v3", lambda m: m.config.kv_lora_rank is not None),
    "shared key-value layers": ("gemma3n_text", lambda m: m.config.num_kv_shared_layers > 0),
    "indexed attention": ("deepseek_v32", lambda m: any("indexer" in name for name, _ in m.named_modules())),
    "learned positions": ("gpt2", lambda m: hasattr(m.transformer, "wpe")),
    "a causal buffer": ("gpt_neo", lambda m: hasattr(m.transformer.h[0].attn.attention, "bias")),
}


def convert(model_type: str, **fields):
    parent = tiny_parent(model_type)
    return A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=MASK_ID, allow_hybrid=True, **fields).eval()


@pytest.mark.parametrize("sliding_window", ["keep", "open"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_opens_as_it_should_and_the_parent_stays_in_it(kind, sliding_window):
    model_type, has_it = KINDS[kind]
    model = convert(model_type, sliding_window=sliding_window)
    assert has_it(model.backbone), f"{model_type} lost its {kind}"
    assert identity_gate(model, tiny_parent(model_type)).passed
    reach = reach_gate(model)
    assert reach.passed, reach.message
    assert reach.detail["window_crossed"]
    assert all(layer["block_causal_exact"] for layer in reach.detail["by_layer"])


@pytest.mark.parametrize("model_type", ["deepseek_v4"])
def test_attention_over_compressed_tokens_is_refused_by_the_gate(model_type):
    """Its compressed branch counts what is past by position, not by mask, and stays closed."""
    reach = reach_gate(convert(model_type))
    assert not reach.passed and "do not open as they should" in reach.message


@pytest.mark.parametrize("pattern", ["bidirectional", AttentionPattern.block_causal(6)])
@pytest.mark.parametrize("kind", ["sliding windows", "chunks"])
def test_padding_on_the_left_moves_no_window_and_no_chunk(kind, pattern):
    """The library counts chunks from behind the padding; so do the logical positions, and once is enough."""
    model = convert(KINDS[kind][0])
    x = torch.randint(3, 100, (1, 24), generator=torch.Generator().manual_seed(0))
    pads = torch.zeros(1, 5, dtype=torch.long)
    mask = torch.cat([pads, torch.ones_like(x)], 1)
    with torch.no_grad():
        alone = model(x, attention_pattern=pattern).logits
        padded = model(torch.cat([pads, x], 1), attention_mask=mask, attention_pattern=pattern).logits
    torch.testing.assert_close(padded[:, 5:], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["bamba", "qwen3_next", "recurrent_gemma", "lfm2_moe"])
def test_a_hybrid_never_lets_a_later_block_back_and_takes_no_block_cache(model_type):
    """The recurrent state reads on from left to right: no earlier block learns of a later one, in any layer."""
    model, block = convert(model_type), torch.arange(24) // 6
    x = torch.randint(3, 100, (1, 24), generator=torch.Generator().manual_seed(0))
    pattern = AttentionPattern.block_causal(6)
    with torch.no_grad():
        base = model(x, attention_pattern=pattern).logits
        for j in (6, 13, 20):
            moved = x.clone()
            moved[0, j] = (moved[0, j] + 31) % 97 + 3
            change = (model(moved, attention_pattern=pattern).logits - base).abs().amax(-1)[0]
            assert not change[block < block[j]].any() and change[j] > 0
    assert not model._caches_blocks


def test_a_parent_of_several_parts_keeps_the_attention_of_each():
    """A wrapper that hands its own choice down makes the text model of GOT-OCR2 eager: another kernel, other bits."""
    parent, before = tiny_parent("got_ocr2"), tiny_parent("got_ocr2").config.get_text_config()._attn_implementation
    model = A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=MASK_ID).eval()
    assert before == "sdpa" and model.backbone.config.get_text_config()._attn_implementation == before
    assert identity_gate(model, tiny_parent("got_ocr2")).passed
