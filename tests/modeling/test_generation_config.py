"""`A2DGenerationConfig` and the arguments of a call: every refusal by name, layers, saving and loading."""

import functools
import json

import pytest
import torch
from transformers import GenerationConfig

from a2d_hf.modeling.generation_config_a2d import A2DGenerationConfig
from a2d_hf.modeling.selectors_a2d import by_confidence
from tests.modeling.analytic_models import ContextModel, TableModel


PROMPT = torch.tensor([[1, 2]])


def combine(model=None, given=None, **arguments):
    model = A2DGenerationConfig() if model is None else model
    return A2DGenerationConfig.combine(model, given, arguments)[0]


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 2.5),
        ("steps", True),
        ("block_size", 0),
        ("block_size", -4),
        ("max_new_tokens", -1),
        ("max_length", 0),
        ("num_return_sequences", 0),
        ("threshold", 1.5),
        ("threshold", "high"),
        ("entropy_bound", -0.1),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -0.5),
        ("repetition_penalty", 0.0),
        ("do_sample", "yes"),
        ("return_dict_in_generate", 1),
        ("output_history", 1),
        ("suppress_tokens", 5),
        ("suppress_tokens", [1, -1]),
        ("begin_suppress_tokens", ["a"]),
        ("seed", -1),
        ("seed", 1.5),
        ("mask_token_id", -1),
        ("eos_token_id", "</s>"),
        ("pad_token_id", "<pad>"),
        ("selector", "best"),
        ("selector", 3),
        ("remasking", "sometimes"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(name, value):
    with pytest.raises(ValueError, match=f"`{name}"):
        A2DGenerationConfig(**{name: value})
    with pytest.raises(ValueError, match=f"`{name}"):
        ContextModel(9).diffusion_generate(PROMPT, **{name: value})


def test_an_unknown_selector_gets_the_list():
    with pytest.raises(
        ValueError, match="confidence, margin, entropy, random, threshold, entropy_bound or a function"
    ):
        A2DGenerationConfig(selector="best")


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        ({"remasking": "low_confidence"}, 'selector="confidence"'),
        ({"remasking": "random"}, 'selector="random"'),
        ({"remasking": "low_confidence_dynamic"}, 'selector="threshold"'),
        ({"alg": "maskgit_plus"}, 'selector="confidence"'),
        ({"alg": "topk_margin"}, 'selector="margin"'),
        ({"alg": "origin"}, 'selector="random"'),
        ({"alg": "p2"}, 'remasking="p2"'),
        ({"alg": "entropy"}, "`selector`"),
        ({"selector": "maskgit_plus"}, 'selector="confidence"'),
        ({"selector": "p2"}, 'remasking="p2"'),
        ({"gen_length": 64}, "`max_new_tokens`"),
        ({"block_length": 32}, "`block_size`"),
        ({"max_denoising_steps": 8}, "`steps`"),
        ({"mask_id": 3}, "`mask_token_id`"),
        ({"return_dict": True}, "`return_dict_in_generate`"),
        ({"eb_gamma": 0.1}, "`entropy_bound`"),
        ({"right_shift_logits": True}, "`config.token_shift`"),
    ],
)
def test_a_peers_name_gets_ours(arguments, ours):
    with pytest.raises(ValueError) as error:
        ContextModel(9).diffusion_generate(PROMPT, **arguments)
    assert ours in str(error.value) and next(iter(arguments)) in str(error.value)


def test_a_misspelt_parameter_gets_a_suggestion():
    with pytest.raises(ValueError, match="Unknown decoding parameter `temprature`; did you mean `temperature`?"):
        ContextModel(9).diffusion_generate(PROMPT, temprature=0.5)


@pytest.mark.parametrize(
    "arguments", [{"num_beams": 4}, {"no_repeat_ngram_size": 3}, {"min_new_tokens": 5}, {"output_scores": True}]
)
def test_autoregressive_parameters_that_would_do_nothing_are_refused(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}=.*has no meaning in diffusion decoding"):
        ContextModel(9).diffusion_generate(PROMPT, **arguments)


@pytest.mark.parametrize("name", ["assistant_model", "prefix_allowed_tokens_fn", "past_key_values", "synced_gpus"])
def test_autoregressive_arguments_are_refused_unless_empty(name):
    model = ContextModel(9)
    with pytest.raises(ValueError, match=f"`{name}` has no meaning"):
        model.generate(PROMPT, max_new_tokens=2, **{name: object()})
    assert model.generate(PROMPT, max_new_tokens=2, **{name: None}).shape == (1, 4)


def test_habits_of_callers_that_change_nothing_are_accepted():
    out = ContextModel(9).generate(
        input_ids=PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        token_type_ids=torch.zeros_like(PROMPT),
        max_new_tokens=3,
        num_beams=1,
        use_cache=True,
        do_sample=False,
        top_p=None,
        output_scores=False,
    )
    assert out.shape == (1, 5)


def test_p2_with_another_selector_is_refused():
    with pytest.raises(ValueError, match='`remasking="p2"` ranks by confidence'):
        A2DGenerationConfig(remasking="p2", selector="entropy")


def test_a_threshold_without_its_selector_is_refused():
    with pytest.raises(ValueError, match='`threshold` does nothing with `selector="confidence"`'):
        ContextModel(9).diffusion_generate(PROMPT, threshold=0.8)
    assert ContextModel(9, defaults={"threshold": 0.8}).diffusion_generate(PROMPT, max_new_tokens=1).shape == (1, 3)


def test_the_same_text_several_times_is_refused():
    with pytest.raises(ValueError, match="`num_return_sequences=2` would return the same text"):
        ContextModel(9).diffusion_generate(PROMPT, num_return_sequences=2)


# ------------------------------------------------------------------------------------------------------- bad prompts


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (PROMPT, {"max_new_tokens": 0}, "Nothing to generate: `max_new_tokens` comes to 0"),
        (PROMPT, {"max_length": 2}, "Nothing to generate"),
        (PROMPT, {"max_length": 1}, "`max_length=1` is shorter than the prompt of 2 tokens"),
        (PROMPT, {"attention_mask": torch.ones(1, 3)}, r"`attention_mask` must have the shape \(1, 2\)"),
        (PROMPT, {"attention_mask": torch.ones(1, 1, 2, 2)}, r"`attention_mask` must have the shape \(1, 2\)"),
        (PROMPT, {"input_ids": PROMPT}, "Pass the prompt once"),
        (None, {"attention_mask": torch.ones(1, 2)}, "`attention_mask` came without a prompt"),
        (torch.tensor([1, 2]), {}, r"`input_ids` must be a tensor of token ids with the shape \(rows, tokens\)"),
        ([[1, 2]], {}, "`input_ids` must be a tensor of token ids .* not list"),
        (torch.tensor([[1.0, 2.0]]), {}, "`input_ids` must be a tensor of token ids"),
        (torch.tensor([[1, 99]]), {}, "`input_ids` holds ids from 1 to 99, but the vocabulary has 9 rows"),
        (PROMPT, {"mask_token_id": 9}, "`mask_token_id` must be an id below the vocabulary's 9 rows"),
        (PROMPT, {"stop_strings": ["."]}, "`stop_strings` needs the tokenizer"),
    ],
)
def test_bad_prompts_and_lengths_are_refused_in_one_sentence(ids, arguments, message):
    model = ContextModel(9)
    with pytest.raises(ValueError, match=message):
        model.diffusion_generate(ids, **arguments)
    assert not model.calls, "refused before any work"


def test_a_prompt_longer_than_the_context_is_refused():
    model = ContextModel(9, fields={"max_position_embeddings": 4})
    with pytest.raises(ValueError, match="The prompt has 5 tokens, the model's context only 4"):
        model.diffusion_generate(torch.ones((1, 5), dtype=torch.long))


def test_padding_does_not_count_as_prompt():
    model = ContextModel(9, fields={"max_position_embeddings": 4})
    ids, mask = torch.ones((1, 9), dtype=torch.long), torch.tensor([[0] * 7 + [1] * 2])
    assert model.diffusion_generate(ids, attention_mask=mask, max_new_tokens=2).shape == (1, 11)


@pytest.mark.parametrize("arguments", [{"max_new_tokens": 3}, {"max_length": 5}])
def test_more_new_tokens_than_the_context_holds_are_refused_where_asked_for(arguments):
    model = ContextModel(9, fields={"max_position_embeddings": 4})
    with pytest.raises(ValueError, match="asks for 3 tokens after a prompt of 2, .* at most 2 fit"):
        model.diffusion_generate(PROMPT, **arguments)


def test_a_default_length_shrinks_to_the_context():
    model = ContextModel(9, fields={"max_position_embeddings": 4}, defaults={"max_new_tokens": 50})
    assert model.diffusion_generate(PROMPT).shape == (1, 4)


def test_a_model_without_a_mask_token_is_refused():
    with pytest.raises(ValueError, match="`mask_token_id` must be an id .* not None"):
        ContextModel(9, fields={"mask_token_id": None}).diffusion_generate(PROMPT)


def test_token_shift_cannot_fill_the_first_position():
    model = ContextModel(9, fields={"token_shift": True})
    with pytest.raises(ValueError, match="the first token of a row cannot be a mask"):
        model.diffusion_generate(torch.tensor([[8, 1]]), max_new_tokens=0)
    with pytest.raises(ValueError, match="the first token of a row cannot be a mask"):
        model.diffusion_generate(torch.tensor([[1, 8]]), attention_mask=torch.tensor([[0, 1]]), max_new_tokens=0)
    with pytest.raises(ValueError, match="an empty prompt needs a first token"):
        model.diffusion_generate(max_new_tokens=3)


@pytest.mark.parametrize("shift", [True, False])
def test_an_empty_prompt_starts_from_bos(shift):
    model = ContextModel(9, fields={"token_shift": shift}, defaults={"bos_token_id": 3})
    out = model.diffusion_generate(max_new_tokens=4)
    assert out.shape == (1, 5) and out[0, 0] == 3
    assert torch.equal(out, model.diffusion_generate(torch.tensor([[3]]), max_new_tokens=4))
    batch = model.diffusion_generate(
        torch.tensor([[0, 0], [1, 2]]), attention_mask=torch.tensor([[0, 0], [1, 1]]), max_new_tokens=4
    )
    assert torch.equal(batch[0, 1:], out[0])


def test_an_empty_prompt_without_bos_starts_from_masks():
    assert ContextModel(9).diffusion_generate(max_new_tokens=4).shape == (1, 4)
    assert ContextModel(9).diffusion_generate(torch.zeros((2, 0), dtype=torch.long), max_new_tokens=4).shape == (2, 4)


def test_pad_tokens_count_as_padding_without_an_attention_mask_unless_they_are_eos():
    padded = ContextModel(9, defaults={"pad_token_id": 0, "eos_token_id": 7})
    padded.diffusion_generate(torch.tensor([[0, 0, 1]]), max_new_tokens=2)
    assert padded.calls[0].input_ids.tolist() == [[1, 8, 8]]
    same = ContextModel(9, defaults={"pad_token_id": 7, "eos_token_id": 7})
    same.diffusion_generate(torch.tensor([[7, 7, 1]]), max_new_tokens=2)
    assert same.calls[0].input_ids.tolist() == [[7, 7, 1, 8, 8]]


def test_criteria_need_something_to_fill_up_with():
    with pytest.raises(ValueError, match="set `pad_token_id`"):
        ContextModel(9).diffusion_generate(PROMPT, max_new_tokens=2, stopping_criteria=[lambda ids, scores: None])


# ------------------------------------------------------------------------------------------------------------ layers


def test_arguments_win_over_the_given_config_over_the_models_over_the_defaults():
    model = A2DGenerationConfig(steps=1, block_size=1, threshold=0.1)
    config = combine(model, A2DGenerationConfig(steps=2, block_size=2), steps=3)
    assert (config.steps, config.block_size, config.threshold, config.entropy_bound) == (3, 2, 0.1, 0.1)


def test_a_plain_generation_config_will_do():
    given = GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.5, top_p=0.9)
    config = combine(None, given)
    assert (config.max_new_tokens, config.sampling_temperature, config.top_p) == (7, 0.5, 0.9)


def test_none_switches_an_optional_field_off_and_restores_a_required_one():
    model = A2DGenerationConfig(eos_token_id=2, steps=4, selector="random")
    config = combine(model, eos_token_id=None, steps=None, selector=None)
    assert (config.eos_token_id, config.steps, config.selector) == (None, None, "confidence")


def test_a_max_length_of_the_call_wins_over_max_new_tokens_of_the_model():
    assert combine(A2DGenerationConfig(max_new_tokens=9), max_length=5).max_new_tokens is None
    assert combine(A2DGenerationConfig(max_length=9), max_new_tokens=5).max_new_tokens == 5
    out = ContextModel(9, defaults={"max_new_tokens": 50}).diffusion_generate(PROMPT, max_length=6)
    assert out.shape == (1, 6)


@pytest.mark.parametrize(
    ("model", "arguments", "temperature"),
    [
        ({}, {}, 0.0),
        ({}, {"do_sample": True}, 1.0),
        ({}, {"do_sample": True, "temperature": 0.7}, 0.7),
        ({}, {"temperature": 0.7}, 0.7),
        ({"temperature": 0.7}, {"do_sample": False}, 0.0),
        ({"do_sample": False}, {"temperature": 0.7}, 0.7),
        ({"temperature": 0.0}, {"do_sample": True}, 1.0),
        ({"temperature": 0.7}, {"temperature": 0.0}, 0.0),
        ({"temperature": 0.7}, {"temperature": None}, 0.0),
    ],
)
def test_temperature_and_do_sample_together(model, arguments, temperature):
    assert combine(A2DGenerationConfig(**model), **arguments).sampling_temperature == temperature


def test_sampling_at_temperature_zero_is_a_contradiction():
    with pytest.raises(ValueError, match="`do_sample=True` needs a `temperature` above 0"):
        combine(None, do_sample=True, temperature=0.0)


def test_the_call_does_not_change_the_models_config():
    model = TableModel(5, table=[[0.2] * 5] * 9)
    before = model.generation_config.to_dict()
    given = A2DGenerationConfig(steps=2)
    model.diffusion_generate(PROMPT, given, max_new_tokens=4, selector="random", seed=0)
    assert model.generation_config.to_dict() == before and given.selector is None


# ------------------------------------------------------------------------------------------------------------ saving


def test_a_saved_config_comes_back_equal(tmp_path):
    config = A2DGenerationConfig(
        steps=8,
        block_size=4,
        selector="entropy_bound",
        entropy_bound=0.2,
        max_new_tokens=0,
        temperature=0.5,
        top_p=0.9,
        eos_token_id=[1, 2],
        pad_token_id=0,
        seed=3,
        mask_token_id=7,
    )
    config.save_pretrained(tmp_path)
    loaded = A2DGenerationConfig.from_pretrained(tmp_path)
    assert loaded == config and isinstance(loaded, A2DGenerationConfig)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["selector"] == "entropy_bound" and saved["max_new_tokens"] == 0 and None not in saved.values()


def test_an_autoregressive_file_gives_its_special_tokens_only(tmp_path):
    GenerationConfig(do_sample=True, temperature=0.6, top_k=20, eos_token_id=[5, 6], pad_token_id=5).save_pretrained(
        tmp_path
    )
    config = A2DGenerationConfig.from_pretrained(tmp_path)
    assert (config.eos_token_id, config.pad_token_id, config.temperature, config.top_k) == ([5, 6], 5, None, None)


def test_unknown_keys_of_a_newer_file_do_not_make_it_unreadable(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"selector": "margin", "from_the_future": 1}))
    assert A2DGenerationConfig.from_pretrained(tmp_path).selector == "margin"


def test_a_function_cannot_be_saved(tmp_path):
    config = A2DGenerationConfig(selector=functools.partial(by_confidence))
    assert "by_confidence" in repr(config)
    with pytest.raises(ValueError, match="`selector` is a function, which cannot be saved"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_documented_field_exists_and_the_reverse():
    from a2d_hf.modeling.generation_config_a2d import DIFFUSION_FIELDS, SHARED_FIELDS

    for name in (*DIFFUSION_FIELDS, *SHARED_FIELDS):
        assert name in A2DGenerationConfig.__doc__ and name in vars(A2DGenerationConfig())
