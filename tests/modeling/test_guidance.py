"""Classifier-free guidance and negative prompts against a plain loop over the formula."""

import pytest
import torch

from tests.modeling.analytic_models import PROMPT, ContextModel, run, table_model
from tests.modeling.test_generation_models import BD3LM, diffusion_model


def reference(model, prompt, negative, new, scale, block=None, shift=0):
    """One row, one token per forward, the surest first; two plain passes per step."""
    row, twin = list(prompt) + [model.mask] * new, list(negative) + [model.mask] * new
    for _ in range(new):
        first = min(i for i, token in enumerate(row) if token == model.mask)
        here = [i for i, t in enumerate(row) if t == model.mask and (block is None or i // block == first // block)]
        scores = []
        for each in (row, twin):
            ids = torch.tensor([each])
            scores.append(model.scores(ids, torch.ones_like(ids, dtype=torch.bool))[0].log_softmax(-1))
        offset = len(negative) - len(prompt)
        guided = {i: scores[1][i + offset] + scale * (scores[0][i] - scores[1][i + offset]) for i in here}
        for values in guided.values():
            values[model.mask] = -torch.inf
        best = max(here, key=lambda i: float(guided[i].softmax(-1).max()))
        row[best] = twin[best + offset] = int(guided[best].argmax())
    return row


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("keep", [[], [7]])
def test_guided_text_is_that_of_the_formula(scale, block, keep):
    model, prompt = ContextModel(13, sharpness=0.1), [5, 7, 2, 7, 9]
    masked = [token if token in keep else model.mask for token in prompt]
    arguments = {"guidance_scale": scale, "guidance_keep_tokens": keep or None, "block_size": block}
    output = run(model, torch.tensor([prompt]), max_new_tokens=8, **arguments)
    assert output.sequences.tolist() == [reference(model, prompt, masked, 8, scale, block)]
    assert output.num_forwards == 16 and output.tokens_per_forward.tolist() == [0.5]
    assert len(model.calls) == 8 and all(len(call.input_ids) == 2 for call in model.calls)


@pytest.mark.parametrize("scale", [0.0, 1.5, 3.0])
@pytest.mark.parametrize("negative", [[4], [8, 3, 6, 1], [1, 2, 3, 4, 5, 6, 7]])
def test_a_negative_prompt_stands_in_the_prompts_place(scale, negative):
    model, prompt = ContextModel(13, sharpness=0.1), [5, 7, 2, 9]
    out = model.diffusion_generate(
        torch.tensor([prompt]), max_new_tokens=6, guidance_scale=scale, negative_prompt_ids=torch.tensor([negative])
    )
    assert out.tolist() == [reference(model, prompt, negative, 6, scale)]
    if scale == 0:
        alone = model.diffusion_generate(torch.tensor([negative]), max_new_tokens=6)
        assert out[0, 4:].tolist() == alone[0, len(negative) :].tolist()


@pytest.mark.parametrize("scale", [None, 1, 1.0])
def test_a_scale_of_one_is_no_guidance(scale):
    model, ids = ContextModel(13), torch.tensor([[5, 7, 2]])
    output = run(model, ids, max_new_tokens=5, guidance_scale=scale)
    assert torch.equal(output.sequences, ContextModel(13).diffusion_generate(ids, max_new_tokens=5))
    assert output.num_forwards == 5 and all(len(call.input_ids) == 1 for call in model.calls)


def test_a_model_that_does_not_look_is_not_guided():
    plain = run(table_model(), max_new_tokens=6)
    guided = run(table_model(), max_new_tokens=6, guidance_scale=7.5)
    assert torch.equal(plain.sequences, guided.sequences)
    torch.testing.assert_close(plain.confidences, guided.confidences, equal_nan=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_guided_row_in_a_batch_gets_what_it_gets_alone(side):
    model, rows, negatives = ContextModel(13), [[5, 7, 2, 9], [3]], [[1, 2], [8, 8, 4]]
    arguments = {"max_new_tokens": 6, "guidance_scale": 2.0, "pad_token_id": 0}
    alone = [
        model.diffusion_generate(torch.tensor([row]), negative_prompt_ids=torch.tensor([twin]), **arguments)
        for row, twin in zip(rows, negatives, strict=True)
    ]

    def padded(lists):
        width = max(map(len, lists))
        ids, mask = torch.zeros((len(lists), width), dtype=torch.long), torch.zeros((len(lists), width)).long()
        for number, values in enumerate(lists):
            at = slice(width - len(values), width) if side == "left" else slice(0, len(values))
            ids[number, at], mask[number, at] = torch.tensor(values), 1
        return ids, mask

    ids, mask = padded(rows)
    twins, twin_mask = padded(negatives)
    out = model.diffusion_generate(
        ids, attention_mask=mask, negative_prompt_ids=twins, negative_prompt_attention_mask=twin_mask, **arguments
    )
    assert [out[i, 4:].tolist() for i in range(2)] == [
        each[0, len(row) :].tolist() for each, row in zip(alone, rows, strict=True)
    ]


def test_one_negative_prompt_serves_all_rows_and_all_samples():
    model, ids = ContextModel(13), torch.tensor([[5, 7], [3, 1]])
    out = model.diffusion_generate(
        ids, max_new_tokens=4, guidance_scale=2.0, negative_prompt_ids=torch.tensor([[4, 4, 4]]), temperature=1.0,
        num_return_sequences=3, seed=0,
    )  # fmt: skip
    assert out.shape == (6, 6)


@pytest.mark.parametrize("negative", [None, 1, 4, 6, 11])
@pytest.mark.parametrize("shift", [False, True])
def test_the_cache_is_exact_for_both_halves(negative, shift):
    model = diffusion_model(**BD3LM, token_shift=shift)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 120, (2, 6), generator=generator)
    arguments = {"max_new_tokens": 9, "guidance_scale": 2.5, "eos_token_id": None}
    if negative is not None:
        arguments["negative_prompt_ids"] = torch.randint(4, 120, (1, negative), generator=generator)
    cached = run(model, ids, **arguments)
    plain = run(model, ids, use_cache=False, **arguments)
    assert torch.equal(cached.sequences, plain.sequences) and cached.num_forwards == plain.num_forwards
    torch.testing.assert_close(cached.confidences, plain.confidences, equal_nan=True)
    alone = run(model, ids[:1], **arguments)
    assert torch.equal(alone.sequences[0], cached.sequences[0])


def test_a_block_models_negative_prompt_leaves_the_completion_in_its_blocks():
    model = diffusion_model(**BD3LM)
    ids, negative = torch.tensor([[9, 8, 7, 6, 5]]), torch.tensor([[30, 31, 32]])
    out = model.diffusion_generate(
        ids, max_new_tokens=7, guidance_scale=0.0, negative_prompt_ids=negative, eos_token_id=None
    )
    # 3 tokens before a completion that begins at place 1 of its block: two masks in front make it 5.
    filled = torch.tensor([[127, 127, 30, 31, 32] + [127] * 7])
    spans = []
    original = model._logits_of

    def recorded(tokens_BT, valid_BT, scope_BT, *rest):
        spans.append((tokens_BT[1].tolist(), scope_BT.nonzero().tolist()))
        return original(tokens_BT, valid_BT, scope_BT, *rest)

    model._logits_of = recorded
    assert torch.equal(
        out,
        model.diffusion_generate(
            ids, max_new_tokens=7, guidance_scale=0.0, negative_prompt_ids=negative, eos_token_id=None, use_cache=False
        ),
    )
    assert spans[0][0] == filled[0].tolist()
    assert [place for row, place in spans[0][1] if row == 0] == [place for row, place in spans[0][1] if row == 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"negative_prompt_ids": torch.tensor([[1]])}, "do nothing without guidance"),
        ({"guidance_keep_tokens": [1]}, "do nothing without guidance"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be a number of at least 0"),
        ({"guidance_scale": 2, "guidance_keep_tokens": ["a"]}, "`guidance_keep_tokens` must be a list of token ids"),
        ({"guidance_scale": 2, "negative_prompt_ids": torch.tensor([1])}, "`negative_prompt_ids` must be token ids"),
        ({"guidance_scale": 2, "negative_prompt_ids": torch.ones(3, 1).long()}, r"\(1, tokens\)"),
        ({"guidance_scale": 2, "negative_prompt_attention_mask": torch.ones(1, 1)}, "came without"),
        ({"cfg_scale": 1.0}, "`guidance_scale`, one more than theirs"),
        (
            {"guidance_scale": 2, "guidance_keep_tokens": [1], "negative_prompt_ids": torch.tensor([[1]])},
            "pass one",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(table_model(), PROMPT, max_new_tokens=3, **arguments)


def test_a_negative_prompt_cannot_replace_a_text_with_holes():
    with pytest.raises(ValueError, match="holds masks to fill"):
        run(
            table_model(),
            torch.tensor([[1, 4, 2]]),
            max_new_tokens=0,
            guidance_scale=2,
            negative_prompt_ids=PROMPT,
        )
