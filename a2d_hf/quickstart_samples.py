"""The quickstart's samples: texts written by the conversion, shown while they form, and the parent's beside them.

Owns which prompts and how they are decoded, and what of a generation the pictures need. Writes to the console only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from .console import Console
from .denoising_picture import Denoising, text_after, token_pieces
from .live_draft import LiveDraft
from .modeling.modeling_a2d import A2DForMaskedDiffusion


NEW_TOKENS, SAMPLE_STEPS = 64, 32
LINE = 90  # characters of a sample per line of the terminal
SAMPLE_TEMPERATURE, REPETITION_PENALTY = 0.7, 1.2
PROMPTS = ("The value of the expression", "When a function is called", "A class definition")
# What stands around a gap, and how many tokens the gap has: only a model that reads both ways can fill it.
GAP = ("If the object does not have", 6, " is raised.")


@dataclass
class Sample:
    """
    One text by the conversion, and where there is a counterpart the parent's.

    Attributes:
        denoising ([`Denoising`]): how it came to be.
        suffix (`str`): what was given behind the gap; empty for a continuation.
        parent_text (`str`): what the parent writes after the same prompt; empty for a gap.
        num_forwards (`int`): of the conversion.
        new_tokens (`int`): generated in these forwards.
    """

    denoising: Denoising
    suffix: str
    parent_text: str
    num_forwards: int
    new_tokens: int


def make_samples(parent_path: Path, model_path: Path, seed: int, console: Console) -> list[Sample]:
    """
    Continues `PROMPTS` with both models, and fills `GAP`, showing the conversion at work.

    Args:
        parent_path (`Path`): the autoregressive checkpoint.
        model_path (`Path`): the converted one.
        seed (`int`): of the sampling.
        console ([`Console`]): where the texts are shown.

    Returns:
        `list[Sample]`: the gap comes last.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = A2DForMaskedDiffusion.from_pretrained(model_path).eval()
    parent = AutoModelForCausalLM.from_pretrained(parent_path).eval()
    samples = []
    for number, prompt in enumerate(PROMPTS):
        sample = _continue_text(model, tokenizer, prompt, seed + number, console)
        sample.parent_text = _parent_text(parent, tokenizer, prompt, seed + number)
        samples.append(sample)
    samples.append(_fill_gap(model, tokenizer, console))
    return samples


def _continue_text(
    model: A2DForMaskedDiffusion, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int, console: Console
) -> Sample:
    """A continuation, shown while it is made: drafts on a terminal, a few moments of it elsewhere."""
    inputs = tokenizer(prompt, return_tensors="pt")
    return _denoise(
        model,
        tokenizer,
        inputs.input_ids,
        prompt,
        "",
        console,
        max_new_tokens=NEW_TOKENS,
        steps=SAMPLE_STEPS,
        temperature=SAMPLE_TEMPERATURE,
        repetition_penalty=REPETITION_PENALTY,
        seed=seed,
    )


def _fill_gap(model: A2DForMaskedDiffusion, tokenizer: PreTrainedTokenizerBase, console: Console) -> Sample:
    before, gap, after = GAP
    ids = tokenizer(before).input_ids
    ids = ids + [model.config.mask_token_id] * gap + tokenizer(after, add_special_tokens=False).input_ids
    return _denoise(model, tokenizer, torch.tensor([ids]), before, after, console, max_new_tokens=0, temperature=0.0)


def _denoise(
    model: A2DForMaskedDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Any,
    prompt: str,
    suffix: str,
    console: Console,
    **choices: Any,
) -> Sample:
    live = console.out.isatty() and not console.json_output and not suffix
    console.line()
    output = model.diffusion_generate(
        input_ids,
        streamer=LiveDraft(tokenizer, sleep_time=0.04, skip_special_tokens=True) if live else None,
        output_history=True,
        return_dict_in_generate=True,
        **choices,
    )
    denoising = denoising_of(output, tokenizer, prompt, model.config.mask_token_id)
    if not live:
        _print_moments(denoising, suffix, console)
    console.note(console.style(f"{len(denoising.pieces)} tokens in {output.num_forwards} passes", "dim"))
    return Sample(denoising, suffix, "", output.num_forwards, len(denoising.pieces))


def denoising_of(output: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, mask_token_id: int) -> Denoising:
    """
    What a picture needs of a generation with one row.

    Args:
        output ([`A2DGenerationOutput`]): made with `output_history=True`.
        tokenizer (`PreTrainedTokenizerBase`): turns ids into text.
        prompt (`str`): what was given.
        mask_token_id (`int`): marks what is open in the history.

    Returns:
        [`Denoising`]
    """
    final = output.sequences[0]
    places = (~output.confidences[0].isnan()).nonzero()[:, 0].tolist()
    # The last time that a place went from open to filled: with remasking it may have been filled before.
    steps = [
        max(i for i in range(1, len(output.history)) if _is_open(output.history[i - 1][0], place, mask_token_id))
        for place in places
    ]
    # Read behind the prompt: alone, a tokenizer may drop the space before the first word.
    pieces = token_pieces(tokenizer, [int(token) for token in final])
    return Denoising(
        prompt=prompt,
        pieces=[pieces[place] for place in places],
        steps=steps,
        confidence=[float(output.confidences[0, place]) for place in places],
        num_steps=len(output.history) - 1,
    )


def _is_open(row: Any, place: int, mask_token_id: int) -> bool:
    return int(row[place]) == mask_token_id


def _print_moments(denoising: Denoising, suffix: str, console: Console) -> None:
    """The text at a few moments, one under the other, line breaks shown as ↵ so that they can be compared."""
    for step in sorted({denoising.num_steps // 4, denoising.num_steps // 2, denoising.num_steps} - {0}):
        text = f"{denoising.prompt}{text_after(denoising, step)}{suffix}".replace("\n", "↵")
        console.note(f"after {step} of {denoising.num_steps} passes")
        for start in range(0, len(text), LINE):
            console.line(f"      {text[start : start + LINE]}")


def _parent_text(parent: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int) -> str:
    set_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        ids = parent.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=SAMPLE_TEMPERATURE,
            repetition_penalty=REPETITION_PENALTY,
        )
    return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
