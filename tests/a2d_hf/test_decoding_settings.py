"""Decoding parameters as a person types them: read, checked before anything is loaded, listed, explained."""

import pytest

from a2d_hf.commands import sample_command
from a2d_hf.decoding_settings import (
    AUTO,
    DecodingSettings,
    explain_field,
    explain_flag,
    read_assignments,
    read_value,
    typed_fields,
    with_flags,
)
from a2d_hf.errors import BadInput
from a2d_hf.modeling import A2DGenerationConfig
from a2d_hf.modeling.decoding_names_a2d import REMASKING, SELECTORS
from a2d_hf.modeling.generation_config_a2d import DIFFUSION_FIELDS, SHARED_FIELDS


def settings(objective="mdlm", block_size=None, **own):
    checkpoint = {"objective": objective, "block_size": block_size, "mask_token_id": 9}
    return DecodingSettings(A2DGenerationConfig(**own), checkpoint)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "16", 16),
        ("temperature", ".5", 0.5),
        ("temperature", "1e-1", 0.1),
        ("use_cache", "off", False),
        ("use_cache", "True", True),
        ("remasking", "none", None),
        ("remasking", "p2", "p2"),
        ("stop_strings", "12", "12"),
        ("stop_strings", '["a", "b"]', ["a", "b"]),
        ("suppress_tokens", "5", [5]),
        ("suppress_tokens", "5, 6", [5, 6]),
        ("eos_token_id", "[1, 2]", [1, 2]),
        ("eos_token_id", "2", 2),
        ("remasking_loop", "0.6,0.1,0.9", [0.6, 0.1, 0.9]),
        ("eos_token_id", "1,2", [1, 2]),
        ("selector", "[1]", "[1]"),
        ("steps", "auto", AUTO),
        ("steps", "many", "many"),
    ],
)
def test_a_value_is_read_as_a_person_means_it(name, text, value):
    found = read_value(name, text)
    assert found == value and type(found) is type(value)


def test_every_field_can_be_typed_or_says_why_not():
    for name in {*DIFFUSION_FIELDS, *SHARED_FIELDS}.difference(typed_fields()):
        with pytest.raises(BadInput, match=f"`{name}` cannot be set here: "):
            settings().choose({name: 1})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "`steps` must be a positive integer, not 0"),
        ({"selector": "best"}, "`selector` must be one of confidence, margin"),
        ({"threshold": 0.5}, "`threshold` does nothing with"),
        ({"remasking": "p2", "selector": "margin"}, "ranks by confidence"),
        ({"pipeline_depth": 4}, "`pipeline_depth=4` needs a selector"),
        ({"self_speculation": "causal", "steps": 4}, "`steps` would do nothing"),
        ({"self_speculation": "causal", "guidance_scale": 2}, "does not go together with `guidance_scale`"),
        ({"approximate_cache": "dual"}, "set `block_size`"),
        ({"remasking": "random"}, 'is called `selector="random"` here'),
        ({"cfg_scale": 2}, "`guidance_scale`, one more than theirs"),
        ({"num_beams": 3}, "no meaning in diffusion decoding"),
        ({"alg": [1]}, "`alg` is called `selector` here"),
        ({"stop_strings": [1]}, "`stop_strings` must be a text or a list of texts"),
        ({"stop_strings": []}, "`stop_strings` must be a text or a list of texts"),
    ],
)
def test_what_is_refused_changes_nothing(changes, sentence):
    chosen = settings()
    chosen.choose({"temperature": 0.5})
    with pytest.raises(BadInput, match=sentence):
        chosen.choose(changes)
    assert chosen.chosen == {"temperature": 0.5}


def test_it_is_the_checkpoints_own_settings_that_a_choice_must_go_with():
    own = settings(selector="threshold")
    own.choose({"threshold": 0.5, "pipeline_depth": 4})
    with pytest.raises(BadInput, match="ranks by confidence"):
        own.choose({"remasking": "p2"})
    with pytest.raises(BadInput, match="BD3LM, has an exact cache"):
        settings("bd3lm", 8).choose({"approximate_cache": "prefix"})
    settings("mdlm", 8).choose({"approximate_cache": "prefix"})


def test_none_switches_off_what_the_checkpoint_sets_and_auto_gives_it_back():
    own = settings(remasking="p2")
    own.choose({"remasking": None, "top_k": None})
    assert own.chosen == {"remasking": None} and own.in_force().remasking is None
    own.choose({"remasking": AUTO})
    assert own.chosen == {} and own.in_force().remasking == "p2"


def test_what_is_shown_is_in_force():
    own = settings("bd3lm", 8, max_new_tokens=64)
    own.choose({"temperature": 0.7, "guidance_scale": 1})
    lines = own.lines()
    assert "  block_size               8, as trained" in lines and "  max_new_tokens           64" in lines
    assert [line for line in lines if line.startswith("*")] == [
        "* temperature              0.7   (checkpoint: 0: the likeliest token)"
    ]
    shown = " ".join(lines)
    assert all(name in shown for name in typed_fields() if name != "seed")
    assert own.record()["block_size"] == 8 and own.record()["temperature"] == 0.7


def test_assignments_and_flags():
    assert read_assignments(["steps=4", "stop-strings=a=b"]) == {"steps": 4, "stop_strings": "a=b"}
    assert with_flags(["steps=4"], {"top_k": 3, "selector": None}) == {"steps": 4, "top_k": 3}
    for texts in (["steps"], ["=4"], ["steps="], ["steps=1", "steps=2"], ["seed=3"]):
        with pytest.raises(BadInput, match="--set"):
            with_flags(texts, {})
    with pytest.raises(BadInput, match="`steps` is given twice"):
        with_flags(["steps=1"], {"steps": 2})


def test_every_field_explains_itself():
    for name in typed_fields():
        words = explain_field(name)
        assert name in words and len(words) > 20 and not set("`[*") & set(words.split(":")[-1].split("[")[0])
    assert explain_field("draft_steps") == "draft_steps (int, default 1): forwards per draft of self_speculation."


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--cfg-scale", "`cfg_scale` is `guidance_scale`, one more than theirs here: --guidance-scale"),
        ("--gen_length", "`gen_length` is `max_new_tokens` here: --max-new-tokens"),
        ("--alg", "`alg` is `selector` here: --set selector=VALUE"),
        ("--top-k", "write --set top_k=VALUE"),
        ("--max_new_tokens", "write --max-new-tokens"),
    ],
)
def test_an_unknown_flag_is_told_what_to_type(flag, words):
    assert words in explain_flag(flag, ["--guidance-scale", "--max-new-tokens"])
    assert explain_flag("--stpes", []) is None


def test_help_lists_the_names_there_are():
    assert sample_command.SELECTORS == ", ".join(SELECTORS) and sample_command.REMASKING == ", ".join(REMASKING)
