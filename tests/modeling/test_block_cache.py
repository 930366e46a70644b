"""Exactness of the block cache: every logit and token of cached decoding against decoding without a cache."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from a2d_hf.modeling import A2DForMaskedDiffusion, A2DGenerationConfig
from a2d_hf.modeling.attention_pattern import AttentionPattern
from a2d_hf.modeling.block_cache_a2d import BlockCache, BlockCacheLayer
from tests.conftest import FAMILIES, VOCAB_SIZE, tiny_model


MASK, BLOCK = VOCAB_SIZE - 1, 4
_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
# Beyond the families of conftest: latent attention with keys and values of unlike sizes, and experts of another make.
MORE_FAMILIES = {
    "deepseek_v3": _SMALL
    | {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    },
    "qwen3_moe": _SMALL
    | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "cohere": _SMALL | {"layer_norm_bias": False},
    # ALiBi: a bias that grows with the key's position, instead of rotations.
    "falcon": _SMALL | {"alibi": True, "new_decoder_architecture": False, "multi_query": False},
}  # fmt: skip
CAUSAL = {"clean_context": "causal"}


def block_model(family: str = "llama", dtype: torch.dtype = torch.float32, **fields) -> A2DForMaskedDiffusion:
    if family in FAMILIES:
        parent = tiny_model(family)
    else:
        parent = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **MORE_FAMILIES[family]))
        with torch.no_grad():
            for parameter in parent.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=0.15)
    model = A2DForMaskedDiffusion.from_causal_lm(
        parent.eval().to(dtype), mask_token_id=MASK, **{"objective": "bd3lm", "block_size": BLOCK} | fields
    )
    model.generation_config = A2DGenerationConfig(eos_token_id=2, pad_token_id=0, bos_token_id=None)
    return model


def batch(*lengths: int, padding: str = "left") -> dict[str, torch.Tensor]:
    """Random prompts of these lengths; `"anywhere"` scatters their tokens over the columns."""
    generator = torch.Generator().manual_seed(4)
    width = max(max(lengths) + (3 if padding == "anywhere" else 0), 1)
    ids, mask = torch.full((len(lengths), width), 2), torch.zeros((len(lengths), width), dtype=torch.long)
    for row, length in enumerate(lengths):
        columns = {
            "left": torch.arange(width - length, width),
            "right": torch.arange(length),
            "anywhere": torch.randperm(width, generator=generator)[:length].sort().values,
        }[padding]
        ids[row, columns] = torch.randint(4, MASK, (length,), generator=generator)
        mask[row, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}


class Recorder:
    """What the decoder scored in each forward, cached or not, and what went through the parent."""

    def __init__(self, model, monkeypatch):
        self.logits, self.shapes = [], []
        self.model = model
        plain, cached = A2DForMaskedDiffusion._logits_of, BlockCache.logits_of

        def record(function):
            def recorded(*args):
                self.logits.append(function(*args).clone())
                return self.logits[-1]

            return recorded

        monkeypatch.setattr(A2DForMaskedDiffusion, "_logits_of", record(plain))
        monkeypatch.setattr(BlockCache, "logits_of", record(cached))
        model.backbone.register_forward_pre_hook(
            lambda module, args, kwargs: self.shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )

    def run(self, inputs, **arguments):
        self.logits, self.shapes = [], []
        output = self.model.diffusion_generate(**inputs, **arguments, return_dict_in_generate=True)
        return output, self.logits, self.shapes


def assert_same(model, monkeypatch, inputs, tolerance: float = 1e-5, **arguments):
    """Tokens equal, every logit within `tolerance` (relative to the largest), the same forwards."""
    recorder = Recorder(model, monkeypatch)
    plain, plain_logits, plain_shapes = recorder.run(inputs, use_cache=False, **arguments)
    cached, logits, shapes = recorder.run(inputs, **arguments)
    assert torch.equal(cached.sequences, plain.sequences)
    assert cached.num_forwards == plain.num_forwards == len(shapes) == len(logits)
    assert cached.stop_reason == plain.stop_reason
    for found, expected in zip(logits, plain_logits, strict=True):
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))
    # Not the same computation twice: the cache must have spared something.
    assert sum(rows * columns for rows, columns in shapes) < sum(rows * columns for rows, columns in plain_shapes)
    return cached, shapes


@pytest.mark.parametrize("clean_context", ["block", "causal"])
@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_cached_logits_and_tokens_equal_those_without(family, shift, clean_context, monkeypatch):
    model = block_model(family, token_shift=shift, clean_context=clean_context)
    assert_same(model, monkeypatch, batch(1, 3, 4, 5, 9, 17), max_new_tokens=15, steps=9, eos_token_id=None)


@pytest.mark.parametrize("clean_context", ["block", "causal"])
@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_in_double_precision_only_the_order_of_sums_differs(family, shift, clean_context, monkeypatch):
    model = block_model(family, dtype=torch.float64, token_shift=shift, clean_context=clean_context)
    inputs = batch(1, 4, 7, 9)
    if family == "gpt_neox":  # its rotary angles are fp32, the same in both
        inputs = batch(5)
    assert_same(model, monkeypatch, inputs, tolerance=1e-10, max_new_tokens=14, eos_token_id=None)


@pytest.mark.parametrize("clean_context", ["block", "causal"])
@pytest.mark.parametrize("sliding_window", ["keep", "open"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_windows_look_back_as_far_as_without_a_cache(family, sliding_window, clean_context, monkeypatch):
    # 30 tokens of prompt and 24 new ones: every window of 8 is crossed many times, by rows in different blocks.
    model = block_model(family, sliding_window=sliding_window, clean_context=clean_context)
    assert_same(model, monkeypatch, batch(2, 19, 30), max_new_tokens=24, steps=13, eos_token_id=None)


@pytest.mark.parametrize("padding", ["left", "right", "anywhere"])
@pytest.mark.parametrize("lengths", [(0,), (1,), (3,), (4,), (5,), (0, 1, 3, 4, 5), (8, 8), (12, 1)])
@pytest.mark.parametrize("fields", [{}, CAUSAL], ids=["block", "causal"])
def test_any_prompt_length_and_padding(lengths, padding, fields, monkeypatch):
    inputs = batch(*lengths, padding=padding)
    # Learned positions: with rotations alone the masks of an empty prompt are an exact tie, which rounding decides.
    assert_same(block_model("gpt2", **fields), monkeypatch, inputs, max_new_tokens=11, steps=5, eos_token_id=None)


@pytest.mark.parametrize(
    "arguments",
    [
        {"selector": "threshold", "threshold": 0.03},
        {"selector": "entropy_bound", "entropy_bound": 9.0},
        {"block_size": 2},
        {"block_size": 3},
        {"remasking": "p2", "steps": 12},
        {"temperature": 1.0, "seed": 3, "num_return_sequences": 2},
        {"repetition_penalty": 1.5, "steps": 7},
    ],
    ids=lambda arguments: "-".join(arguments),
)
@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
@pytest.mark.parametrize("fields", [{}, CAUSAL], ids=["block", "causal"])
def test_any_way_of_decoding(arguments, shift, fields, monkeypatch):
    model = block_model("qwen3", token_shift=shift, **fields)
    assert_same(model, monkeypatch, batch(1, 6, 9), max_new_tokens=18, eos_token_id=None, **arguments)


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
@pytest.mark.parametrize("fields", [{}, CAUSAL], ids=["block", "causal"])
def test_infilling_commits_the_untouched_blocks_between(shift, fields, monkeypatch):
    inputs = batch(22, 15)
    for row, columns in ((0, [1, 2, 9, 16]), (1, [8, 12, 20])):  # the second row is padded by 7 columns
        inputs["input_ids"][row, columns] = MASK
    output, _ = assert_same(block_model(token_shift=shift, **fields), monkeypatch, inputs, max_new_tokens=0)
    assert not (output.sequences == MASK).any()


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
@pytest.mark.parametrize("fields", [{}, CAUSAL], ids=["block", "causal"])
def test_finished_rows_leave_the_cache(shift, fields, monkeypatch):
    model, inputs = block_model(token_shift=shift, **fields), batch(3, 9, 6)
    free = model.diffusion_generate(**inputs, max_new_tokens=16, steps=8, eos_token_id=None)
    eos = int(free[1, 9])  # ends the second row at once, and perhaps others later
    arguments = {"max_new_tokens": 16, "steps": 8, "eos_token_id": eos, "pad_token_id": eos}
    output, shapes = assert_same(model, monkeypatch, inputs, **arguments)
    assert output.stop_reason[1] == "eos" and shapes[0][0] == 3 and shapes[-1][0] < 3
    alone = model.diffusion_generate(inputs["input_ids"][:1, 6:], **arguments)[0, 3:].tolist()
    row = output.sequences[0, 9:].tolist()
    assert row[: len(alone)] == alone and set(row[len(alone) :]) <= {eos}


# ------------------------------------------------------------------------------------------------------ what it spares


@pytest.mark.parametrize("fields", [{}, CAUSAL], ids=["block", "causal"])
def test_the_prompt_is_read_once_and_a_commit_costs_no_forward_of_its_own(fields, monkeypatch):
    recorder = Recorder(block_model(**fields), monkeypatch)
    output, _, shapes = recorder.run(batch(9), max_new_tokens=11, steps=6, eos_token_id=None)
    # Prompt of 9: blocks 0 and 1 are clean, block 2 holds its last token. 3 + 4 + 4 masks in 2 + 2 + 2 steps.
    assert [columns for _, columns in shapes] == [12, 4, 8, 4, 8, 4] and output.num_forwards == 6


@pytest.mark.parametrize("fields", [{}, CAUSAL], ids=["block", "causal"])
def test_no_mask_is_built_where_everything_is_visible(fields, monkeypatch):
    model, masks = block_model(**fields), []
    model.backbone.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"] is not None), with_kwargs=True
    )
    model.diffusion_generate(**batch(9), max_new_tokens=11, eos_token_id=None)
    # 3 + 4 + 4 masks, one forward each: only the first of a block, which reads clean tokens too, needs one.
    assert masks == [True, False, False, *[True, False, False, False] * 2]


def test_only_masked_rows_meet_the_head():
    model, rows = block_model(), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: rows.append(out.shape[-2]))
    model.diffusion_generate(**batch(9), max_new_tokens=7, eos_token_id=None)
    assert rows == [3, 2, 1, 4, 3, 2, 1]


def test_the_cache_is_written_in_place():
    layer = BlockCacheLayer(capacity=8)
    first, second = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 2, 4)
    layer.update(first, first[..., :2])
    buffer = layer.keys
    layer.crop(-1)
    keys, values = layer.update(second, second[..., :2])
    assert layer.keys is buffer and layer.get_seq_length() == 6
    assert torch.equal(keys, torch.cat([first[:, :, :4], second], dim=2))
    assert torch.equal(values, keys[..., :2])
    keys, _ = layer.update(first, first[..., :2])  # more than there was room for
    assert torch.equal(keys, torch.cat([first[:, :, :4], second, first], dim=2))
    with pytest.raises(ValueError, match="negative integer"):
        layer.crop(3)


# --------------------------------------------------------------------------------------------- where it must stay away


def test_mdlm_models_are_decoded_without_a_cache(monkeypatch):
    monkeypatch.setattr(BlockCache, "__init__", lambda *args: pytest.fail("a cache was made"))
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=MASK, block_size=BLOCK)
    model.diffusion_generate(**batch(5), max_new_tokens=6, use_cache=True)


def test_a_model_with_a_recurrent_state_is_decoded_without_a_cache():
    config = AutoConfig.for_model(
        "lfm2", **_SMALL | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    )
    parent = AutoModelForCausalLM.from_config(config)
    model = A2DForMaskedDiffusion.from_causal_lm(
        parent.eval(), mask_token_id=MASK, objective="bd3lm", block_size=BLOCK, allow_hybrid=True
    )
    inputs = batch(5)
    plain = model.diffusion_generate(**inputs, max_new_tokens=6, use_cache=False)
    assert torch.equal(model.diffusion_generate(**inputs, max_new_tokens=6, use_cache=True), plain)
    assert not model._caches_blocks and block_model()._caches_blocks


def test_a_parent_without_position_ids_is_cached_alone_only():
    config = AutoConfig.for_model("bloom", vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4)
    parent = AutoModelForCausalLM.from_config(config).eval()
    model = A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=MASK, objective="bd3lm", block_size=4)
    model.generation_config = A2DGenerationConfig()
    widths = []
    parent.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for inputs, cached in ((batch(9), True), (batch(9, 3), False)):
        plain = model.diffusion_generate(**inputs, max_new_tokens=11, use_cache=False)
        widths.clear()
        assert torch.equal(model.diffusion_generate(**inputs, max_new_tokens=11), plain)
        assert (min(widths[1:]) == 4) == cached


def test_gradient_checkpointing_takes_the_cache_away():
    model, inputs = block_model(), batch(5, 9)
    plain = model.diffusion_generate(**inputs, max_new_tokens=9)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(model.diffusion_generate(**inputs, max_new_tokens=9), plain)


def test_a_parent_that_ignores_its_cache_is_an_error(monkeypatch):
    model = block_model()
    forward = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda past_key_values=None, **kwargs: forward(**kwargs))
    with pytest.raises(RuntimeError, match="did not write to the cache"):
        model.diffusion_generate(**batch(5), max_new_tokens=6)


def test_the_comparison_notices_keys_in_the_wrong_slots(monkeypatch):
    monkeypatch.setattr(BlockCacheLayer, "move", lambda self, *args: None)
    with pytest.raises(AssertionError):
        assert_same(block_model(), monkeypatch, batch(1, 6, 9), max_new_tokens=14, steps=5, eos_token_id=None)


def test_the_comparison_notices_cached_keys_that_are_off_by_little(monkeypatch):
    update = BlockCacheLayer.update

    def inexact(self, keys, values, *args):
        return update(self, keys * 1.001, values, *args)

    monkeypatch.setattr(BlockCacheLayer, "update", inexact)
    with pytest.raises(AssertionError):
        assert_same(block_model(), monkeypatch, batch(9), max_new_tokens=14, steps=5, eos_token_id=None)


def test_a_shifted_pass_with_a_cache_does_not_guess_its_first_token():
    model, ids = block_model(token_shift=True), batch(8)["input_ids"]
    pattern = AttentionPattern.block_causal(BLOCK)
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :4], attention_pattern=pattern, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="first token of a pass with a cache"):
            model(ids[:, 4:], attention_pattern=pattern, past_key_values=cache)
        rest = torch.tensor([[False, True, True, True]])
        found = model(ids[:, 4:], attention_pattern=pattern, past_key_values=cache, logits_mask=rest, use_cache=True)
    torch.testing.assert_close(found.logits, whole[0, 5:], atol=1e-5, rtol=1e-5)
