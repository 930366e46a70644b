"""Exactness of the static block cache, against the dynamic one and none; how it compiles, and what it refuses."""

import dataclasses
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig

from a2d_hf.modeling import A2DForMaskedDiffusion, A2DGenerationConfig
from a2d_hf.modeling.block_cache_a2d import BlockCacheLayer
from a2d_hf.modeling.static_cache_a2d import StaticBlockCache, StaticBlockLayer
from tests.conftest import FAMILIES, VOCAB_SIZE, WINDOW, tiny_model
from tests.modeling.test_block_cache import BLOCK, CAUSAL, MASK, MORE_FAMILIES, Recorder, batch, block_model


STATIC = {"cache_implementation": "static"}
CONTEXTS = pytest.mark.parametrize("fields", [{}, CAUSAL], ids=["block", "causal"])
SHIFTS = pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])


def gemma2(**fields) -> A2DForMaskedDiffusion:
    """Windows in every other layer, soft-caps in the attention and behind the head."""
    config = AutoConfig.for_model(
        "gemma2", vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, query_pre_attn_scalar=8,
        sliding_window=WINDOW,
    )  # fmt: skip
    parent = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in parent.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    return wrap(parent, **fields)


def wrap(parent, **fields) -> A2DForMaskedDiffusion:
    model = A2DForMaskedDiffusion.from_causal_lm(
        parent, mask_token_id=MASK, **{"objective": "bd3lm", "block_size": BLOCK} | fields
    )
    model.generation_config = A2DGenerationConfig(eos_token_id=2, pad_token_id=0, bos_token_id=None)
    return model


def model_of(family: str, **fields) -> A2DForMaskedDiffusion:
    return gemma2(**fields) if family == "gemma2" else block_model(family, **fields)


def assert_three_alike(model, monkeypatch, inputs, tolerance: float = 1e-5, **arguments):
    """A static cache, a dynamic one and none: equal tokens, every logit alike, as many forwards."""
    recorder = Recorder(model, monkeypatch)
    static, logits, shapes = recorder.run(inputs, **STATIC, **arguments)
    for other in ({"cache_implementation": "dynamic"}, {"use_cache": False}):
        plain, plain_logits, _ = recorder.run(inputs, **other, **arguments)
        assert torch.equal(static.sequences, plain.sequences) and static.stop_reason == plain.stop_reason
        assert static.num_forwards == plain.num_forwards
        for found, expected in zip(logits, plain_logits, strict=True):
            assert found.shape == expected.shape
            assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))
    passes = 2 if arguments.get("guidance_scale") else 1
    assert static.num_forwards == passes * len(shapes) == passes * len(logits)
    return static, shapes


# ----------------------------------------------------------------------------------------------------------- exactness


@CONTEXTS
@SHIFTS
@pytest.mark.parametrize("family", ["gemma2", *FAMILIES, *MORE_FAMILIES])
def test_logits_and_tokens_equal_those_of_the_dynamic_cache_and_of_none(family, shift, fields, monkeypatch):
    model = model_of(family, token_shift=shift, **fields)
    # One pass each: the row that opens a block commits another, the others wait beside it with padding.
    inputs = batch(1, 3, 4, 5, 9, 17)
    _, shapes = assert_three_alike(model, monkeypatch, inputs, max_new_tokens=15, steps=9, eos_token_id=None)
    assert shapes[0] == (6, 16 + BLOCK) and set(shapes[1:]) == {(6, BLOCK), (6, 2 * BLOCK)}


@CONTEXTS
@SHIFTS
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_in_double_precision_only_the_order_of_sums_differs(family, shift, fields, monkeypatch):
    model = block_model(family, dtype=torch.float64, token_shift=shift, **fields)
    inputs = batch(5) if family == "gpt_neox" else batch(1, 4, 7, 9)  # rotary angles are fp32, the same in both
    assert_three_alike(model, monkeypatch, inputs, 1e-10, max_new_tokens=14, eos_token_id=None)


@CONTEXTS
@pytest.mark.parametrize("sliding_window", ["keep", "open"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gemma2"])
def test_windows_count_positions_and_not_slots(family, sliding_window, fields, monkeypatch):
    model = model_of(family, sliding_window=sliding_window, **fields)
    assert_three_alike(model, monkeypatch, batch(2, 19, 30), max_new_tokens=24, steps=13, eos_token_id=None)


@pytest.mark.parametrize("padding", ["left", "right", "anywhere"])
@pytest.mark.parametrize("lengths", [(0,), (1,), (3,), (4,), (5,), (0, 1, 3, 4, 5), (12, 1)])
@CONTEXTS
def test_any_prompt_length_and_padding(lengths, padding, fields, monkeypatch):
    inputs = batch(*lengths, padding=padding)
    # Learned positions: with rotations alone the masks of an empty prompt are an exact tie, which rounding decides.
    model = block_model("gpt2", **fields)
    assert_three_alike(model, monkeypatch, inputs, max_new_tokens=11, steps=5, eos_token_id=None)


@pytest.mark.parametrize(
    "arguments",
    [
        {"selector": "threshold", "threshold": 0.03},
        {"block_size": 2},
        {"block_size": 3},
        {"block_size": 6},
        {"remasking": "p2", "steps": 12},
        {"remasking": "remdm_cap", "remasking_eta": 0.3, "steps": 30, "seed": 5},
        {"temperature": 1.0, "seed": 3, "num_return_sequences": 2},
        {"guidance_scale": 2.0},
        {"guidance_scale": 2.0, "negative_prompt_ids": torch.arange(5, 36)[None]},
    ],
    ids=lambda arguments: "-".join(arguments),
)
@SHIFTS
@CONTEXTS
def test_any_way_of_decoding(arguments, shift, fields, monkeypatch):
    model = block_model("gpt2", token_shift=shift, **fields)
    assert_three_alike(model, monkeypatch, batch(1, 6, 9), max_new_tokens=18, eos_token_id=None, **arguments)


@pytest.mark.parametrize("block_size", [4, 2])
@SHIFTS
def test_several_blocks_at_once(block_size, shift, monkeypatch):
    arguments = {"pipeline_depth": 3, "selector": "threshold", "threshold": 0.03, "block_add_threshold": 0.25}
    inputs, model = batch(1, 6, 9), block_model("qwen3", token_shift=shift)
    _, shapes = assert_three_alike(
        model, monkeypatch, inputs, block_size=block_size, max_new_tokens=22, eos_token_id=None, **arguments
    )
    most = 3 * BLOCK if block_size == 4 else 2 * BLOCK  # three blocks of 2 lie in two of 4
    assert set(shapes[1:]) <= {(3, most), (3, 2 * most)}


@SHIFTS
@CONTEXTS
def test_gaps_far_apart_take_a_pass_of_its_own_shape(shift, fields, monkeypatch):
    inputs = batch(42, 35)
    for row, columns in ((0, [1, 2, 5, 38]), (1, [8, 12, 40])):  # the second row is padded by 7 columns
        inputs["input_ids"][row, columns] = MASK
    model = block_model(token_shift=shift, **fields)
    output, shapes = assert_three_alike(model, monkeypatch, inputs, max_new_tokens=0)
    assert not (output.sequences == MASK).any()
    wide = [columns for _, columns in shapes[1:] if columns > 2 * BLOCK]
    assert wide and len(shapes) > len(wide) + 1


@SHIFTS
@CONTEXTS
def test_finished_rows_stay_and_change_nothing(shift, fields, monkeypatch):
    model, inputs = block_model(token_shift=shift, **fields), batch(3, 9, 6)
    free = model.diffusion_generate(**inputs, max_new_tokens=16, steps=8, eos_token_id=None)
    eos = int(free[1, 9])  # ends the second row at once, and perhaps others later
    arguments = {"max_new_tokens": 16, "steps": 8, "eos_token_id": eos, "pad_token_id": eos}
    output, shapes = assert_three_alike(model, monkeypatch, inputs, **arguments)
    assert output.stop_reason[1] == "eos" and {rows for rows, _ in shapes} == {3}
    alone = model.diffusion_generate(inputs["input_ids"][:1, 6:], **STATIC, **arguments)[0, 3:].tolist()
    row = output.sequences[0, 9:].tolist()
    assert row[: len(alone)] == alone and set(row[len(alone) :]) <= {eos}


@SHIFTS
@CONTEXTS
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_a_row_in_a_batch_gets_what_it_gets_alone(family, shift, fields):
    model, lengths = block_model(family, token_shift=shift, **fields), (2, 7, 13)
    arguments = {"max_new_tokens": 13, "steps": 7, "eos_token_id": None, **STATIC}
    inputs = batch(*lengths)
    together = model.diffusion_generate(**inputs, **arguments)
    for row, length in enumerate(lengths):
        alone = model.diffusion_generate(inputs["input_ids"][row : row + 1, 13 - length :], **arguments)
        assert torch.equal(together[row, 13 - length :], alone[0])


# -------------------------------------------------------------------------------------- padding, and the room behind


@SHIFTS
@CONTEXTS
def test_nothing_real_sees_padding_or_an_empty_slot(shift, fields, monkeypatch):
    model, inputs = block_model("mixtral", token_shift=shift, **fields), batch(1, 6, 9)
    recorder, forward, spoiled = Recorder(model, monkeypatch), StaticBlockCache._forward, []
    arguments = {"max_new_tokens": 14, "steps": 8, "eos_token_id": None, **STATIC}
    _, expected, _ = recorder.run(inputs, **arguments)

    def spoil(self, parent, ids_BW, visible_BK, *args):
        slots = visible_BK.shape[1] - ids_BW.shape[1]
        real_BW, cached_BS = visible_BK[:, slots:], visible_BK[:, :slots]
        for layer in self.cache.layers:
            for states in (layer.keys, layer.values):
                states[..., :slots, :][(~cached_BS)[:, None].expand(states.shape[0], states.shape[1], -1)] = 1e3
                states[..., slots:, :] = 1e3
        spoiled.append(int((~real_BW).sum()))
        return forward(self, parent, torch.where(real_BW, ids_BW, ids_BW + 1).clamp(max=MASK), visible_BK, *args)

    monkeypatch.setattr(StaticBlockCache, "_forward", spoil)
    _, found, _ = recorder.run(inputs, **arguments)
    assert sum(spoiled[1:]) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_keys_stay_where_they_are(monkeypatch):
    model, places = block_model(), set()
    forward = StaticBlockCache._forward

    def look(self, *args):
        found = forward(self, *args)
        places.update((layer.keys.data_ptr(), layer.keys.shape) for layer in self.cache.layers)
        return found

    monkeypatch.setattr(StaticBlockCache, "_forward", look)
    model.diffusion_generate(**batch(9, 2), max_new_tokens=30, eos_token_id=None, **STATIC)
    assert len(places) == 2 and {shape[-2] for _, shape in places} == {128 + 2 * BLOCK}  # two layers
    places.clear()
    model.diffusion_generate(**batch(9), max_new_tokens=6, eos_token_id=None, max_cache_len=200, **STATIC)
    assert {shape[-2] for _, shape in places} == {256 + 2 * BLOCK}


def test_the_head_sees_the_open_block_and_no_clean_token():
    model, rows = block_model(token_shift=True), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: rows.append(out.shape[-2]))
    model.diffusion_generate(**batch(9), max_new_tokens=11, steps=6, eos_token_id=None, **STATIC)
    # The open block and, where there is a column before it, the one that scores its first token.
    assert rows == [BLOCK + 1, BLOCK] * 3


@pytest.mark.parametrize("break_it", ["slots", "padding", "keys"])
def test_the_comparison_notices(break_it, monkeypatch):
    if break_it == "slots":
        monkeypatch.setattr(StaticBlockLayer, "move", lambda self, *args: None)
    elif break_it == "padding":
        forward = StaticBlockCache._forward

        def all_visible(self, model, ids_BW, visible_BK, *args):
            visible_BK[:, visible_BK.shape[1] - ids_BW.shape[1] :] = True
            return forward(self, model, ids_BW, visible_BK, *args)

        monkeypatch.setattr(StaticBlockCache, "_forward", all_visible)
    else:
        update = BlockCacheLayer.update
        monkeypatch.setattr(StaticBlockLayer, "update", lambda self, k, v, *args: update(self, k * 1.001, v, *args))
    with pytest.raises(AssertionError):
        assert_three_alike(block_model(), monkeypatch, batch(1, 6, 9), max_new_tokens=14, steps=5, eos_token_id=None)


# ------------------------------------------------------------------------------------------------------------ compiled


class Graphs:
    """A backend that counts what it is given and runs it as it is."""

    def __init__(self):
        self.count = 0
        torch._dynamo.reset()

        def backend(graph, inputs):
            self.count += 1
            return graph.forward

        # Not dynamic, or a graph for any width would hide how many widths there are.
        self.config = CompileConfig(backend=backend, fullgraph=True, dynamic=False, mode=None)

    def run(self, model, *lengths, **arguments) -> torch.Tensor:
        arguments = {"eos_token_id": None} | arguments
        found = model.diffusion_generate(**batch(*lengths), **STATIC, compile_config=self.config, **arguments)
        expected = model.diffusion_generate(**batch(*lengths), **arguments)
        assert torch.equal(found, expected)
        return found


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        *((family, {}) for family in ("llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "mixtral", "deepseek_v3")),
        *((family, CAUSAL | {"token_shift": True}) for family in ("llama", "gemma3_text", "gpt_neox")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "block",
)
def test_two_graphs_whatever_the_number_of_blocks_and_rows_in_them(family, fields):
    model, graphs = model_of(family, **fields), Graphs()
    graphs.run(model, 9, 2, max_new_tokens=6)
    assert graphs.count == 2
    # Other lengths, more blocks, a last block that is cut off, rows that finish early: nothing is compiled again.
    graphs.run(model, 3, 17, max_new_tokens=34, steps=20)
    graphs.run(model, 2, 17, max_new_tokens=20, eos_token_id=[*range(4, 12)], pad_token_id=0)
    assert graphs.count == 2


def test_compiled_logits_are_those_of_the_dynamic_cache(monkeypatch):
    model = block_model("gemma3_text", token_shift=True)
    recorder, graphs, arguments = Recorder(model, monkeypatch), Graphs(), {"max_new_tokens": 26, "eos_token_id": None}
    model.backbone._forward_pre_hooks.clear()  # the recorder's, which appends to a list at each pass
    _, expected, _ = recorder.run(batch(2, 19), **arguments)
    _, found, _ = recorder.run(batch(2, 19), compile_config=graphs.config, **STATIC, **arguments)
    assert graphs.count == 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


def test_the_count_of_graphs_notices_a_shape_that_changes(monkeypatch):
    monkeypatch.setattr(StaticBlockCache, "_columns", _as_needed)
    model, graphs = block_model(), Graphs()
    with pytest.raises(AssertionError):
        graphs.run(model, 9, max_new_tokens=14)  # 23 tokens: the last block is cut off
        assert graphs.count == 2


def _as_needed(self, pending, active):
    self.is_constant, self.active = self.cache.get_seq_length() > 0, active
    return pending, active


def test_a_pass_of_its_own_shape_is_not_compiled_and_leaves_the_others_alone():
    inputs, graphs = batch(60), Graphs()
    inputs["input_ids"][0, [1, 2, 25, 26, 50, 57]] = MASK
    model, arguments = block_model(), {"max_new_tokens": 0, "compile_config": graphs.config}
    found = model.diffusion_generate(**inputs, **STATIC, **arguments)
    assert torch.equal(found, model.diffusion_generate(**inputs, max_new_tokens=0)) and graphs.count == 1


def test_layers_with_a_rule_that_is_not_causal_are_refused(monkeypatch):
    # Such a rule stays the parent's, which counts slots; and a graph would take it for one to open.
    monkeypatch.setattr("a2d_hf.modeling.attention_interface._sees_the_future", lambda own, kwargs: True)
    with pytest.raises(ValueError, match="whose own rule counts slots"):
        block_model("mistral").diffusion_generate(**batch(9), max_new_tokens=11, **STATIC)


def test_the_pattern_outside_a_compiled_pass_is_the_models_own():
    model, graphs = block_model(), Graphs()
    ids = batch(9)["input_ids"]
    before = model(ids).logits
    graphs.run(model, 9, max_new_tokens=11)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids, attention_pattern="causal").logits, model.backbone(ids).logits)


@pytest.mark.parametrize("arguments", [{}, {"disable_compile": True, "compile_config": CompileConfig()}])
def test_on_a_cpu_nothing_is_compiled_unless_it_is_asked_for(arguments, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.fail("something was compiled"))
    block_model().diffusion_generate(**batch(9), max_new_tokens=11, **STATIC, **arguments)


def test_alibi_is_decoded_uncompiled_and_says_so(monkeypatch):
    said = []
    monkeypatch.setattr("a2d_hf.modeling.static_cache_a2d.logger.warning_once", said.append)
    graphs = Graphs()
    graphs.run(block_model("falcon"), 9, 2, max_new_tokens=11)
    assert graphs.count == 0 and "not compiled" in said[0]


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor compiles C++ on a CPU, and there is no `c++` here")
def test_inductor_on_a_cpu_writes_the_same_tokens():
    torch._dynamo.reset()
    model, inputs = wrap(tiny_model("llama", num_hidden_layers=1)), batch(9, 2)
    arguments = {"max_new_tokens": 15, "steps": 8, "eos_token_id": None}
    config = CompileConfig(mode=None, fullgraph=True)
    found = model.diffusion_generate(**inputs, compile_config=config, **STATIC, **arguments)
    assert torch.equal(found, model.diffusion_generate(**inputs, **arguments))


@pytest.mark.gpu
@CONTEXTS
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt2"])
def test_cuda_compiles_by_itself_and_writes_the_same_tokens(family, fields, monkeypatch):
    torch._dynamo.reset()
    model, inputs = block_model(family, **fields).cuda(), batch(9, 2)
    inputs = {name: value.cuda() for name, value in inputs.items()}
    compiled, calls = type(model.backbone).get_compiled_call, []
    monkeypatch.setattr(
        type(model.backbone), "get_compiled_call", lambda self, config: calls.append(config) or compiled(self, config)
    )
    for new in (15, 30):
        arguments = {"max_new_tokens": new, "steps": 8, "eos_token_id": None}
        found = model.diffusion_generate(**inputs, **STATIC, **arguments)
        assert torch.equal(found, model.diffusion_generate(**inputs, **arguments))
    assert calls == [None, None]


# ----------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cache_implementation": "quantized"}, "`cache_implementation` must be None or one of dynamic, static"),
        ({"max_cache_len": 64}, "`max_cache_len` is about a static cache: set"),
        ({"compile_config": CompileConfig()}, "`compile_config` is about a static cache: set"),
        ({"compile_config": {}, **STATIC}, "`compile_config` must be a `transformers.CompileConfig`"),
        ({"max_cache_len": 0, **STATIC}, "`max_cache_len` must be a positive integer"),
        ({"disable_compile": "yes", **STATIC}, "`disable_compile` must be a boolean"),
        ({"use_cache": False, **STATIC}, "does nothing with `use_cache=False`"),
        ({"self_speculation": "causal", **STATIC}, "`self_speculation` does not go together with"),
        ({"approximate_cache": "dual", **STATIC}, "`approximate_cache` does not go together with"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_sentence(arguments, words):
    with pytest.raises(ValueError) as error:
        block_model().diffusion_generate(**batch(5), max_new_tokens=6, **arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_models_without_a_static_form_are_refused_by_name():
    mdlm = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=MASK, block_size=BLOCK)
    small = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2}
    bloom = AutoConfig.for_model("bloom", **small, n_layer=2, n_head=4)
    neo = AutoConfig.for_model(
        "gpt_neo", **small | {"num_layers": 2}, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    )  # fmt: skip
    cases = {
        "MDLM": mdlm,
        "no `position_ids`": wrap(AutoModelForCausalLM.from_config(bloom).eval()),
        "causal mask of its own": wrap(AutoModelForCausalLM.from_config(neo).eval()),
    }
    for words, model in cases.items():
        with pytest.raises(ValueError, match='`cache_implementation="static"` does not fit') as error:
            model.diffusion_generate(**batch(5), max_new_tokens=6, **STATIC)
        assert words in str(error.value)
    causal = block_model(**CAUSAL)
    with pytest.raises(ValueError, match="no cache is exact"):
        causal.diffusion_generate(**batch(5), max_new_tokens=6, pipeline_depth=2, selector="threshold", **STATIC)


def test_the_choice_is_saved_and_how_to_compile_is_not(tmp_path):
    model = block_model()
    given = CompileConfig(fullgraph=True)
    model.generation_config = A2DGenerationConfig(steps=6, max_cache_len=64, compile_config=given, **STATIC)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "static_cache_a2d.py").is_file()
    loaded = A2DGenerationConfig.from_pretrained(tmp_path)
    assert (loaded.cache_implementation, loaded.max_cache_len, loaded.compile_config) == ("static", 64, None)
    assert dataclasses.asdict(given) == dataclasses.asdict(CompileConfig(fullgraph=True))
    # Saved as the habit of a checkpoint, it gives way to a call that wants no cache.
    model.diffusion_generate(**batch(5), max_new_tokens=6, use_cache=False)
