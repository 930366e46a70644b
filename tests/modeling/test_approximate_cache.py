"""The approximate caches of MDLM models: what exactly they keep, and that they say how far off they are."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from a2d_hf.modeling import A2DForMaskedDiffusion, A2DGenerationConfig
from a2d_hf.modeling.approximate_cache_a2d import ApproximateCache
from tests.conftest import tiny_model
from tests.modeling.test_block_cache import BLOCK, MASK, batch, block_model


KINDS = ("prefix", "dual")


def mdlm_model(family: str = "llama", **fields) -> A2DForMaskedDiffusion:
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model(family), mask_token_id=MASK, **fields)
    model.generation_config = A2DGenerationConfig(pad_token_id=0, bos_token_id=None)
    return model


class Recorder:
    """The canvas and the logits of every forward."""

    def __init__(self, monkeypatch):
        self.calls = []
        logits_of = ApproximateCache.logits_of

        def record(cache, model, rows, tokens, valid, scope, pattern):
            logits = logits_of(cache, model, rows, tokens, valid, scope, pattern)
            self.calls.append((rows.clone(), tokens.clone(), valid.clone(), scope.clone(), logits.clone()))
            return logits

        monkeypatch.setattr(ApproximateCache, "logits_of", record)


@torch.no_grad()
def by_hand(model, kind: str, first_T: torch.Tensor, now_T: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """
    Logits of the block [start, end) of one row: keys and values of a whole pass over `first_T`, those that are not
    kept cut out, and the rest of `now_T` run against what is left.
    """
    lead = int(model.config.token_shift)
    begin, stop = start - lead, end if kind == "dual" else now_T.shape[0]
    whole = model(first_T[None], use_cache=True, past_key_values=DynamicCache()).past_key_values
    left = DynamicCache()
    for index, layer in enumerate(whole.layers):
        kept = [torch.cat([x[:, :, :begin], x[:, :, stop:]], dim=2) for x in (layer.keys, layer.values)]
        left.update(*kept, index)
    place = torch.arange(now_T.shape[0])
    position = torch.cat([place[:begin], place[stop:], place[begin:stop]])[None]
    wanted = torch.zeros((1, stop - begin), dtype=torch.bool)
    wanted[:, lead : end - begin] = True
    return model(
        now_T[None, begin:stop], position_ids=position, past_key_values=left, use_cache=True, logits_mask=wanted
    ).logits


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text", "mixtral"])
def test_each_forward_is_the_published_one(family, kind, shift, monkeypatch):
    model, recorder = mdlm_model(family, token_shift=shift), Recorder(monkeypatch)
    model.diffusion_generate(
        **batch(9), max_new_tokens=15, steps=11, block_size=BLOCK, approximate_cache=kind, eos_token_id=None
    )
    first, refreshed = None, 0
    for _, (tokens_T,), _, (scope_T,), logits_NV in recorder.calls:
        start = int(scope_T.long().argmax()) // BLOCK * BLOCK
        inside_W = scope_T[start : start + BLOCK]
        if first is None or first[0] != start:
            first, refreshed = (start, tokens_T), refreshed + 1
            with torch.no_grad():
                expected = model(tokens_T[None], logits_mask=scope_T[None]).logits
        else:
            expected = by_hand(model, kind, first[1], tokens_T, start, start + BLOCK)[inside_W]
        torch.testing.assert_close(logits_NV, expected, atol=2e-5, rtol=1e-5)
    assert refreshed == 4 and len(recorder.calls) == 11


@pytest.mark.parametrize("kind", KINDS)
def test_the_deviation_that_is_reported_is_the_one_that_happened(kind, monkeypatch):
    model, recorder = mdlm_model(), Recorder(monkeypatch)
    arguments = {
        "max_new_tokens": 14, "steps": 9, "block_size": BLOCK, "eos_token_id": None, "approximate_cache": kind,
        "return_dict_in_generate": True,
    }  # fmt: skip
    inputs = batch(3, 9, 6)
    plain = model.diffusion_generate(**inputs, **arguments)
    recorder.calls.clear()
    output = model.diffusion_generate(**inputs, output_cache_deviation=True, **arguments)
    assert torch.equal(output.sequences, plain.sequences) and plain.cache_deviation is None
    apart, changed = [], []
    for _, tokens, valid, scope, logits in recorder.calls:
        with torch.no_grad():
            exact = model(tokens, attention_mask=valid.long(), logits_mask=scope).logits
        apart.append((logits - exact).abs())
        changed.append(logits.argmax(-1) != exact.argmax(-1))
    worst = max(float(x.max()) for x in apart)
    assert worst > 1e-3  # it is approximate
    assert output.cache_deviation["max_abs"] == pytest.approx(worst, rel=1e-3)
    # The first forwards of blocks are exact, and left out of the mean: they only make it smaller.
    everything = torch.cat(apart)
    assert output.cache_deviation["mean_abs"] > float(everything.mean()) > 0
    changes = int(torch.cat(changed).sum())
    assert changes <= output.cache_deviation["argmax_changed"] * everything.shape[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["left", "right", "anywhere"])
def test_a_row_in_a_batch_is_the_row_alone(kind, padding):
    # Rows enter their blocks at different times, so some refresh where others do not; and they end at EOS.
    model, inputs = mdlm_model("gpt2"), batch(1, 6, 9, 12, padding=padding)
    arguments = {"max_new_tokens": 17, "steps": 11, "block_size": BLOCK, "approximate_cache": kind}
    free = model.diffusion_generate(**inputs, eos_token_id=None, **arguments)
    texts = free[:, inputs["input_ids"].shape[1] :].tolist()
    # The token that comes latest: rows run on for a while, and one ends before the others.
    eos = max(set(sum(texts, [])), key=lambda token: min(t.index(token) for t in texts if token in t))
    output = model.diffusion_generate(**inputs, eos_token_id=eos, return_dict_in_generate=True, **arguments)
    assert "eos" in output.stop_reason and output.num_forwards > 11
    for row in range(4):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        alone = model.diffusion_generate(ids, eos_token_id=eos, **arguments)[0, ids.shape[1] :].tolist()
        found = output.sequences[row, inputs["input_ids"].shape[1] :].tolist()
        assert found[: len(alone)] == alone and set(found[len(alone) :]) <= {0}


@pytest.mark.parametrize("kind", KINDS)
def test_one_forward_per_block_is_exact(kind):
    model, inputs = mdlm_model(), batch(8)
    arguments = {"max_new_tokens": 16, "steps": 4, "block_size": BLOCK, "eos_token_id": None}
    exact = model.diffusion_generate(**inputs, **arguments)
    output = model.diffusion_generate(
        **inputs, approximate_cache=kind, output_cache_deviation=True, return_dict_in_generate=True, **arguments
    )
    assert torch.equal(output.sequences, exact) and output.cache_deviation is None and output.num_forwards == 4


def test_what_runs_in_each_forward():
    model, widths = mdlm_model(), []
    model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for kind, expected in (("prefix", [16, 8, 16, 4]), ("dual", [16, 4, 16, 4])):
        widths.clear()
        model.diffusion_generate(
            **batch(8), max_new_tokens=8, steps=4, block_size=BLOCK, approximate_cache=kind, eos_token_id=None
        )
        # Two tokens each: the look whether the parent reads position ids.
        assert [width for width in widths if width > 2] == expected


def test_a_parent_that_counts_tokens_instead_of_reading_positions_takes_prefix_only():
    model = block_model("falcon", objective="mdlm")
    arguments = {"max_new_tokens": 8, "steps": 6, "block_size": BLOCK, "eos_token_id": None}
    with pytest.raises(ValueError, match='use "prefix"'):
        model.diffusion_generate(**batch(8), approximate_cache="dual", **arguments)
    model.diffusion_generate(**batch(8), approximate_cache="prefix", **arguments)


def test_drafts_may_be_approximate_where_they_are_verified():
    model, inputs = mdlm_model(), batch(3, 9)
    arguments = {"max_new_tokens": 13, "self_speculation": "causal", "block_size": BLOCK, "eos_token_id": None}
    exact = model.diffusion_generate(**inputs, **arguments)
    for kind in KINDS:
        assert torch.equal(model.diffusion_generate(**inputs, approximate_cache=kind, **arguments), exact)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (block_model, {"approximate_cache": "dual"}, "BD3LM, has an exact cache"),
        (mdlm_model, {"approximate_cache": "dual"}, "set `block_size`"),
        (mdlm_model, {"approximate_cache": "exact"}, "must be None or one of prefix, dual, not 'exact'"),
    ],
    ids=["bd3lm", "no_block_size", "unknown"],
)
def test_what_makes_no_sense_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model().diffusion_generate(**batch(5), max_new_tokens=4, **arguments)
