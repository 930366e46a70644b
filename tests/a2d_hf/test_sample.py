"""`a2d sample` as a user meets it: every parameter reachable, every refusal one sentence, what a text cost told."""

import io
import json

import pytest
import torch

from a2d_hf.cli import main
from a2d_hf.converted_model import ConvertedModel
from a2d_hf.live_draft import LiveDraft
from a2d_hf.modeling import A2DForMaskedDiffusion, A2DGenerationConfig
from tests.conftest import CONTEXT, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A converted checkpoint of each objective that ends no text early."""
    folders = {}
    for name, fields in {"mdlm": {}, "bd3lm": {"objective": "bd3lm", "block_size": 8}}.items():
        tokenizer = tiny_tokenizer()
        model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), tokenizer, **fields)
        model.generation_config = A2DGenerationConfig(bos_token_id=1, pad_token_id=0)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture
def sample(checkpoints, capsys):
    """Runs the command: (exit code, stdout, stderr)."""

    def run(*arguments: str, model: str = "mdlm"):
        capsys.readouterr()
        code = main(["sample", str(checkpoints[model]), "--device", "cpu", *arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Fails where weights are read."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(ConvertedModel, "load", load)


def test_a_row_tells_the_text_its_cost_and_its_settings(sample):
    code, out, err = sample("-p", "The quick", "--max-new-tokens", "8", "--set", "steps=4", "--jsonl")
    row = json.loads(out)
    assert code == 0 and not err and row["stop_reason"] == "length"
    assert (row["num_forwards"], row["tokens_per_forward"], row["seed"]) == (4, 2.0, 0)
    settings = row["settings"]
    assert (settings["steps"], settings["max_new_tokens"], settings["selector"]) == (4, 8, "confidence")
    # Enough to write the same text again.
    again = [f"{name}={json.dumps(settings[name])}" for name in ("steps", "max_new_tokens")]
    flags = [part for each in again for part in ("--set", each)]
    assert json.loads(sample("-p", "The quick", *flags, "--jsonl")[1]) == row


def test_set_reaches_what_has_no_flag_of_its_own(sample, checkpoints):
    model, tokenizer = A2DForMaskedDiffusion.from_pretrained(checkpoints["mdlm"]), tiny_tokenizer()
    ids = tokenizer("The quick", return_tensors="pt").input_ids
    written = sorted(set(model.diffusion_generate(ids, max_new_tokens=6)[0, ids.shape[1] :].tolist()))
    others = model.diffusion_generate(ids, max_new_tokens=6, suppress_tokens=written)[0]
    arguments = ("-p", "The quick", "--max-new-tokens", "6", "--jsonl", "--set")
    row = json.loads(sample(*arguments, f"suppress_tokens={','.join(map(str, written))}")[1])
    assert row["text"] == tokenizer.decode(others, skip_special_tokens=True)
    stop = row["completion"].strip()[:2]
    both = (*arguments, f"suppress_tokens={written}", "--set", f"stop_strings={json.dumps([stop])}")
    stopped = json.loads(sample(*both)[1])
    assert stopped["stop_reason"] == "stopping_criteria" and stop in stopped["completion"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--set", "steps"], "--set steps is no FIELD=VALUE"),
        (["--set", "stepz=3"], "did you mean `steps`?"),
        (["--set", "steps=0"], "`steps` must be a positive integer"),
        (["--steps", "0"], "`steps` must be a positive integer"),
        (["--steps", "4", "--set", "steps=8"], "`steps` is given twice"),
        (["--seed", "-1"], "--seed must be an integer of at least 0"),
        (["--selector", "best"], "`selector` must be one of confidence, margin, entropy, random, threshold"),
        (["--selector", "maskgit_plus"], '`selector="confidence"` here'),
        (["--remasking", "random"], '`selector="random"` here'),
        (["--remasking", "best"], "`remasking` must be None or one of p2, remdm_cap"),
        (["--set", "alg=maskgit_plus"], '`selector="confidence"` here'),
        (["--cfg-scale", "2"], "is `guidance_scale`, one more than theirs here: --guidance-scale"),
        (["--gen_length", "8"], "is `max_new_tokens` here: --max-new-tokens"),
        (["--top-k", "8"], "write --set top_k=VALUE"),
        (["--threshold", "0.5", "--selector", "margin"], "`threshold` does nothing with"),
        (["--remasking", "p2", "--selector", "random"], "ranks by confidence"),
        (["--pipeline-depth", "4"], "`pipeline_depth=4` needs a selector"),
        (["--set", "remasking_eta=0.1"], "`remasking_eta` does nothing without"),
        (["--set", "self_speculation=causal", "--steps", "4"], "`steps` would do nothing"),
        (["--set", "self_speculation=causal", "--infill"], "leave it out to fill gaps"),
        (["--set", "stop_strings=.", "--infill"], "leave it out to fill gaps"),
        (["--set", "approximate_cache=dual"], "set `block_size`"),
        (["--set", "num_return_sequences=2"], "give the prompt again"),
        (["--negative-prompt", "dog"], "give --guidance-scale"),
        (["--infill", "--set", "max_new_tokens=3"], "leave out --max-new-tokens"),
    ],
)
def test_bad_input_is_one_sentence_before_the_model_is_loaded(sample, no_model, flags, words):
    code, out, err = sample("-p", "a [MASK:2]", *flags)
    assert code == 2 and not out and words in err
    assert err.count("a2d: error:") == 1 and err.count("\n") == 1


def test_a_cache_that_a_block_diffusion_model_does_not_need_is_refused_early(sample, no_model):
    code, _, err = sample("-p", "a", "--set", "approximate_cache=prefix", model="bd3lm")
    assert code == 2 and "has an exact cache" in err


def test_a_broken_generation_config_is_named(checkpoints, tmp_path, capsys, no_model):
    for file in checkpoints["mdlm"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"steps": 0}')
    assert main(["sample", str(tmp_path), "-p", "a"]) == 2
    err = capsys.readouterr().err
    assert "generation_config.json cannot be used: `steps` must be" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("prompt", "flags", "words"),
    [
        ("the lazy dog " * 100, [], f"the model's context {CONTEXT}: shorten it"),
        ("the", ["--max-new-tokens", "400"], f"context is {CONTEXT}: at most"),
        ("the", ["--max-new-tokens", "0"], "`max_new_tokens` is 0: raise it, or fill a gap with --infill"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_before_the_first_is_decoded(sample, prompt, flags, words):
    arguments = ["-p", "A model", "-p", prompt] if not flags else ["-p", prompt]
    code, out, err = sample(*arguments, *flags, "--jsonl")
    assert code == 2 and not out and words in err and err.count("\n") == 1


def test_a_mask_token_in_the_prompt_is_filled_where_nothing_is_appended(sample):
    mask = tiny_tokenizer().mask_token or "<|MASK|>"
    code, out, _ = sample("-p", f"The {mask} fox", "--max-new-tokens", "0", "--jsonl")
    row = json.loads(out)
    assert code == 0 and row["num_forwards"] == 1 and mask not in row["text"] and row["stop_reason"] == "filled"


def test_a_block_size_that_was_not_trained_is_warned_about(sample):
    from transformers.utils.logging import warning_once

    warning_once.cache_clear()
    arguments = ("-p", "The", "--max-new-tokens", "8", "--jsonl")
    code, out, err = sample(*arguments, "--block-size", "5", model="bd3lm")
    assert code == 0 and json.loads(out)["settings"]["block_size"] == 5
    assert err.count("\n") == 1 and "warning: This checkpoint was trained with blocks of 8 tokens" in err
    assert not sample(*arguments, "--block-size", "4", model="bd3lm")[2]


def test_steps_are_counted_where_no_draft_is_drawn(sample, monkeypatch):
    from a2d_hf import console

    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    code, out, err = sample("-p", "The", "-p", "A", "--max-new-tokens", "8", "--steps", "4", "--jsonl")
    lines = err.splitlines()
    assert code == 0 and len(out.splitlines()) == 2
    counts = [line.split(",")[0].strip() for line in lines]
    assert counts == [f"text {text} of 2: {step}/4 steps" for text in (1, 2) for step in (1, 2, 3, 4)]


def test_a_draft_shows_no_more_than_the_screen_holds(monkeypatch, capsys):
    class Letters:
        def decode(self, ids, **kwargs):
            return "".join(chr(97 + int(i) % 26) for i in ids)

    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "10")
    LiveDraft(Letters()).put_draft(torch.arange(1000))
    printed = capsys.readouterr().out
    shown = printed.split("\033[33m")[1].split("\033[0m")[0]
    assert shown.endswith("…") and shown.startswith("abc") and 100 < len(shown) <= 20 * 8
    assert printed.count("\033D") == 8


def test_in_a_terminal_a_draft_makes_room_for_itself(sample, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert sample("-p", "The quick", "--max-new-tokens", "4")[0] == 0
    printed = terminal.getvalue()
    assert printed.count("\033[33m") == 4 and printed.index("\033D") < printed.index("\0337")
