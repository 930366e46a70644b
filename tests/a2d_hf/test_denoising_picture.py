"""The denoising picture: what is drawn is when and how surely each token was filled in."""

from xml.etree import ElementTree

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from a2d_hf.denoising_picture import (
    CELL,
    SHADES,
    Denoising,
    denoising_grid,
    denoising_legend,
    denoising_snapshots,
    denoising_text,
    text_after,
    token_pieces,
)


@pytest.fixture
def denoising() -> Denoising:
    return Denoising(
        prompt="The ",
        pieces=["cat", " <b>", "\n", "sat"],
        steps=[2, 1, 4, 3],
        confidence=[0.5, 1.0, 0.0, 0.25],
        num_steps=4,
    )


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", ["plain words", "naïve café", "日本", "a🙂b", "🙂"])
def test_pieces_joined_are_the_text(byte_tokenizer: PreTrainedTokenizerFast, text: str):
    ids = byte_tokenizer(text).input_ids
    pieces = token_pieces(byte_tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text


def test_half_a_character_at_the_end_is_not_lost(byte_tokenizer: PreTrainedTokenizerFast):
    ids = byte_tokenizer("a🙂").input_ids[:-1]
    assert "".join(token_pieces(byte_tokenizer, ids)) == byte_tokenizer.decode(ids)


def test_text_after_a_step_shows_what_was_filled_by_then(denoising: Denoising):
    assert [text_after(denoising, step) for step in range(5)] == [
        "░░░░░░░\n░░░",
        "░░░ <b>\n░░░",
        "cat <b>\n░░░",
        "cat <b>\nsat",
        "cat <b>\nsat",
    ]


def cells(denoising: Denoising) -> list[ElementTree.Element]:
    """The cells of the steps that filled a position: those with a title."""
    svg = ElementTree.fromstring(str(denoising_grid(denoising)))
    return [rect for rect in svg.findall("rect") if rect.find("title") is not None]


def test_grid_puts_each_token_at_its_step_and_place(denoising: Denoising):
    places = [(float(c.get("x")), float(c.get("y"))) for c in cells(denoising)]
    left = places[0][0]
    assert places == [(left + i * CELL, (step - 1) * CELL) for i, step in enumerate(denoising.steps)]


def test_grid_is_stronger_where_the_model_was_surer(denoising: Denoising):
    opacity = {c: float(cell.get("opacity")) for c, cell in zip(denoising.confidence, cells(denoising), strict=True)}
    ordered = [opacity[c] for c in sorted(opacity)]
    assert ordered == sorted(ordered) and len(set(ordered)) == len(ordered)
    assert ordered[0] > 0.22, "a fresh cell never looks like an old one"


def test_colours_run_from_first_to_last_step():
    steps = list(range(1, 21))
    shown = cells(Denoising("", ["x"] * 20, steps, [1.0] * 20, 20))
    shades = [int(cell.get("class")[1:]) for cell in shown]
    assert shades[0] == 0 and shades[-1] == SHADES - 1 and shades == sorted(shades)


def test_one_step_is_drawn_too():
    assert len(cells(Denoising("", ["a", "b"], [1, 1], [0.9, 0.8], 1))) == 2


def test_text_is_escaped_everywhere(denoising: Denoising):
    denoising.prompt = "<i>"
    for html in (denoising_text(denoising, name="n"), denoising_grid(denoising), denoising_snapshots(denoising)):
        assert "<b>" not in html and "<i>" not in html


def test_later_tokens_appear_later(denoising: Denoising):
    html = denoising_text(denoising, name="n")
    times = [float(part.split('"')[0]) for part in html.split("--at:")[1:]]
    assert sorted(range(4), key=lambda i: times[i]) == sorted(range(4), key=lambda i: denoising.steps[i])


def test_control_and_label_belong_together(denoising: Denoising):
    html = denoising_text(denoising, name="again")
    assert 'id="again"' in html and 'for="again"' in html


def test_snapshots_start_blank_and_end_complete(denoising: Denoising):
    html = denoising_snapshots(denoising)
    assert "after 0 of 4 steps" in html and "after 4 of 4 steps" in html


def test_legend_has_every_colour():
    assert all(f'class="t{shade}"' in denoising_legend() for shade in range(SHADES))


@pytest.mark.parametrize(
    ("steps", "confidence", "message"),
    [([1], [0.5, 0.5], "one length"), ([0, 1], [0.5, 0.5], "between 1 and"), ([1, 3], [0.5, 0.5], "between 1 and")],
)
def test_impossible_histories_are_refused(steps, confidence, message):
    with pytest.raises(ValueError, match=message):
        Denoising("", ["a", "b"], steps, confidence, 2)
