"""ALiBi under open attention is a distance, and under the causal pattern the parent's own bias, bit for bit."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, MptConfig

from a2d_hf.architecture_checks import causal_types, tiny_parent
from a2d_hf.detection.type_table import entry_of
from a2d_hf.modeling import A2DForMaskedDiffusion, AttentionPattern


LENGTH, BLOCK, HEAD_DIM, MASK_ID = 24, 6, 8, 120
FAMILIES = ("bloom", "mpt", "falcon")
every_family = pytest.mark.parametrize("family", FAMILIES)


def config_of(family: str, layers: int, heads: int):
    width, vocab = heads * HEAD_DIM, 128
    if family == "bloom":
        return BloomConfig(vocab_size=vocab, hidden_size=width, n_layer=layers, n_head=heads)
    if family == "mpt":
        return MptConfig(vocab_size=vocab, d_model=width, n_layers=layers, n_heads=heads, max_seq_len=64)
    return FalconConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        alibi=True,
        multi_query=False,
        new_decoder_architecture=False,
    )


def parent_of(family: str, layers: int = 2, heads: int = 4, **kwargs):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, layers, heads), **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def convert(family: str, layers: int = 2, heads: int = 4, **fields):
    parent = parent_of(family, layers, heads)
    return A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=MASK_ID, **fields).eval()


def ids(rows: int = 1, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 110, (rows, length), generator=torch.Generator().manual_seed(seed))


def paper_slopes(heads: int) -> torch.Tensor:
    """https://huggingface.co/papers/2108.12409, footnote to section 3: for 2^n heads a geometric sequence, otherwise
    that of the next smaller power, filled up from every second of the next larger one."""
    if heads & (heads - 1) == 0:
        return torch.tensor([2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)])
    below = 2 ** (heads.bit_length() - 1)
    return torch.cat([paper_slopes(below), paper_slopes(2 * below)[::2][: heads - below]])


def attention_weights(model, x: torch.Tensor, **arguments) -> torch.Tensor:
    """`(B, H, L, L)` of a one-layer model whose scores are the bias alone: with a one-hot value for each key, what
    comes out of the attention is the weights themselves."""
    heads = model.config.text_config.num_attention_heads
    names = dict(model.backbone.named_modules())
    fused = next(module for name, module in names.items() if name.endswith(("query_key_value", "Wqkv")))
    after = next(module for name, module in names.items() if name.endswith(("self_attention.dense", "out_proj")))
    by_head = not any(name.endswith("Wqkv") for name in names)
    length, weights = x.shape[1], []

    def one_hot_values(module, args, output, first):
        values_BLD = torch.zeros(*output.shape[:2], heads, HEAD_DIM)
        for j in range(first, min(first + HEAD_DIM, length)):
            values_BLD[:, j, :, j - first] = 1.0
        zero = torch.zeros_like(values_BLD)
        if by_head:
            return torch.stack([zero, zero, values_BLD], dim=3).flatten(2)
        return torch.cat([zero.flatten(2), zero.flatten(2), values_BLD.flatten(2)], dim=-1)

    for first in range(0, length, HEAD_DIM):
        out = {}
        hooks = (
            fused.register_forward_hook(lambda m, a, o, first=first: one_hot_values(m, a, o, first)),
            after.register_forward_pre_hook(lambda m, a, out=out: out.__setitem__("in", a[0])),
        )
        with torch.no_grad():
            model(x, **arguments)
        for hook in hooks:
            hook.remove()
        weights.append(out["in"].view(*x.shape, heads, HEAD_DIM).transpose(1, 2))
    return torch.cat(weights, dim=-1)[..., :length]


def by_hand(family: str, heads: int, position: torch.Tensor, visible: torch.Tensor, extra=0.0) -> torch.Tensor:
    """Falcon divides its bias, like the scores, by the square root of the head size."""
    scale = HEAD_DIM**-0.5 if family == "falcon" else 1.0
    distance = (position[:, None] - position[None, :]).abs()
    scores = -scale * paper_slopes(heads)[:, None, None] * distance + extra
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


@every_family
@pytest.mark.parametrize("heads", [4, 6])
def test_open_attention_weighs_by_distance_to_both_sides(family, heads):
    found = attention_weights(convert(family, 1, heads), ids(2))
    position = torch.arange(LENGTH)
    expected = by_hand(family, heads, position, torch.ones(LENGTH, LENGTH, dtype=torch.bool))
    tolerance = 2e-3 if (family, heads) == ("falcon", 6) else 1e-6  # Falcon rounds its slopes to bfloat16
    torch.testing.assert_close(found, expected.expand(2, -1, -1, -1), atol=tolerance, rtol=0)
    middle = LENGTH // 2
    torch.testing.assert_close(found[..., middle, middle + 3], found[..., middle, middle - 3])


@every_family
def test_blocks_and_the_doubled_sequence_weigh_by_distance(family):
    model, position = convert(family, 1), torch.arange(LENGTH)
    block = position // BLOCK
    found = attention_weights(model, ids(), attention_pattern=AttentionPattern.block_causal(BLOCK))
    torch.testing.assert_close(
        found[0], by_hand(family, 4, position, block[None, :] <= block[:, None]), atol=1e-6, rtol=0
    )
    found = attention_weights(model, ids(1, 2 * LENGTH), attention_pattern=AttentionPattern.bd3lm(BLOCK))
    twice, blocks = position.repeat(2), block.repeat(2)
    clean = torch.arange(2 * LENGTH) >= LENGTH
    noisy_self = ~clean[:, None] & ~clean[None, :] & (blocks[:, None] == blocks[None, :])
    to_clean = ~clean[:, None] & clean[None, :] & (blocks[None, :] < blocks[:, None])
    clean_self = clean[:, None] & clean[None, :] & (blocks[None, :] <= blocks[:, None])
    expected = by_hand(family, 4, twice, noisy_self | to_clean | clean_self)
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)


@every_family
@pytest.mark.parametrize("token_shift", [False, True])
def test_the_doubled_sequence_is_one_pass_per_block(family, token_shift):
    """Each noisy block alone behind its clean text, where columns are positions: the same logits, in every layer."""
    model, clean, noisy = convert(family, token_shift=token_shift), ids(2), ids(2)
    noisy[:, ::3] = MASK_ID
    with torch.no_grad():
        twice = model(torch.cat([noisy, clean], 1), attention_pattern=AttentionPattern.bd3lm(BLOCK)).logits
        for start in range(0, LENGTH, BLOCK):
            here = slice(start, start + BLOCK)
            alone = model(
                torch.cat([clean[:, :start], noisy[:, here]], 1),
                attention_pattern=AttentionPattern.block_causal(BLOCK),
            ).logits
            torch.testing.assert_close(twice[:, here], alone[:, here], atol=2e-5, rtol=1e-4)


@every_family
def test_a_causal_clean_copy_weighs_by_distance(family):
    model, position = convert(family, 1), torch.arange(LENGTH)
    block, clean = (position // BLOCK).repeat(2), torch.arange(2 * LENGTH) >= LENGTH
    pattern = AttentionPattern.bd3lm(BLOCK, clean_context="causal")
    found = attention_weights(model, ids(1, 2 * LENGTH), attention_pattern=pattern)
    twice = position.repeat(2)
    visible = ~clean[:, None] & ~clean[None, :] & (block[:, None] == block[None, :])
    visible |= ~clean[:, None] & clean[None, :] & (block[None, :] < block[:, None])
    visible |= clean[:, None] & clean[None, :] & (twice[None, :] <= twice[:, None])
    torch.testing.assert_close(found[0], by_hand(family, 4, twice, visible), atol=1e-6, rtol=0)


@every_family
def test_documents_weigh_by_the_distance_inside_them(family):
    document = torch.tensor([0] * 10 + [1] * (LENGTH - 10))
    found = attention_weights(convert(family, 1), ids(), document_ids=document[None])
    expected = by_hand(family, 4, torch.arange(LENGTH), document[:, None] == document[None, :])
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)


@every_family
def test_log_bias_annealing_weighs_on_top_of_the_distance(family):
    pattern, position = AttentionPattern.annealed(0.2, form="log_bias"), torch.arange(LENGTH)
    found = attention_weights(convert(family, 1), ids(), attention_pattern=pattern)
    future = (position[None, :] > position[:, None]) * torch.tensor(0.2).log()
    expected = by_hand(family, 4, position, torch.ones(LENGTH, LENGTH, dtype=torch.bool), future)
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)


@every_family
def test_positions_given_by_the_caller_are_the_ones_measured(family):
    given = torch.cat([torch.arange(10), torch.arange(20, 20 + LENGTH - 10)])
    mask = torch.ones(1, LENGTH, dtype=torch.long)  # without a mask, a jump would mark another document
    for pattern in ("bidirectional", "causal"):
        found = attention_weights(
            convert(family, 1), ids(), position_ids=given[None], attention_mask=mask, attention_pattern=pattern
        )
        visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
        expected = by_hand(family, 4, given, visible.tril() if pattern == "causal" else visible)
        torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)


@every_family
@pytest.mark.parametrize("padding", [0, 5])
def test_the_causal_pattern_is_the_parents_bias_to_the_last_bit(family, padding):
    parent, model, x = parent_of(family), convert(family), ids(2)
    mask = torch.ones_like(x)
    mask[1, :padding] = 0
    with torch.no_grad():
        expected = parent(x, attention_mask=mask).logits
        found = model(x, attention_mask=mask, attention_pattern="causal").logits
    assert torch.equal(found[mask.bool()], expected[mask.bool()])


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pattern", ["bidirectional", AttentionPattern.block_causal(BLOCK)])
def test_padding_moves_nothing(family, side, pattern):
    model, x = convert(family), ids(2)
    padding = torch.full((2, 5), 9)
    parts = [padding, x] if side == "left" else [x, padding]
    masks = [padding * 0, torch.ones_like(x)] if side == "left" else [torch.ones_like(x), padding * 0]
    real = slice(5, None) if side == "left" else slice(0, LENGTH)
    with torch.no_grad():
        padded = model(torch.cat(parts, 1), attention_mask=torch.cat(masks, 1), attention_pattern=pattern).logits
        alone = model(x, attention_pattern=pattern).logits
    torch.testing.assert_close(padded[:, real], alone, atol=2e-5, rtol=1e-4)


@every_family
def test_block_decoding_gives_the_same_text_with_and_without_a_cache_and_in_a_batch(family):
    model = convert(family, objective="bd3lm", block_size=BLOCK)
    long, short = ids(1, 11), ids(1, 4, seed=1)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 7, dtype=torch.long), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :7] = 0
    arguments = {"max_new_tokens": 13, "steps": 20, "eos_token_id": 125}
    cached = [model.diffusion_generate(p, use_cache=True, **arguments)[0, p.shape[1] :] for p in (long, short)]
    plain = [model.diffusion_generate(p, use_cache=False, **arguments)[0, p.shape[1] :] for p in (long, short)]
    together = model.diffusion_generate(batch, attention_mask=mask, **arguments)[:, 11:]
    for row in range(2):
        assert torch.equal(cached[row], plain[row]) and torch.equal(cached[row], together[row])


@every_family
def test_a_recomputed_layer_gives_the_gradients_of_the_distance(family):
    model, x = convert(family), ids()

    def gradients():
        model.zero_grad()
        model(x, labels=x).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for first, second in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(first, second)


def test_rows_that_one_bias_cannot_serve_are_refused():
    """MPT has one bias for all rows: a hole in one row only would be measured wrongly in another."""
    model, x = convert("mpt"), ids(2)
    mask = torch.ones_like(x)
    mask[1, 8:12] = 0
    with pytest.raises(ValueError, match="one at a time"):
        model(x, attention_mask=mask)
    with torch.no_grad():
        alone = model(torch.cat([x[1:, :8], x[1:, 12:]], 1)).logits
        found = model(x[1:], attention_mask=mask[1:]).logits[:, mask[1].bool()]
    torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-4)


def test_a_bias_that_the_library_adds_twice_is_refused():
    parent = parent_of("falcon", attn_implementation="eager")
    model = A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=MASK_ID).eval()
    with torch.no_grad():
        assert torch.equal(model(ids(), attention_pattern="causal").logits, parent(ids()).logits)
    with pytest.raises(ValueError, match="twice"):
        model(ids())
    with pytest.raises(ValueError, match="twice"):
        convert("falcon")(ids(), output_attentions=True)


ALIBI_TYPES = [name for name in causal_types() if entry_of(name).positions == "alibi"]


@pytest.mark.parametrize("model_type", ALIBI_TYPES)
def test_every_type_with_alibi_is_measured_by_distance(model_type):
    """A family that hands its bias on in another way would go unhooked, and is caught here."""
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_parent(model_type), mask_token_id=MASK_ID)
    assert model.alibi_layers == model.config.text_config.num_hidden_layers
