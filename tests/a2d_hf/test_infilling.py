"""Gaps: how they are written, filled, chosen in length, and shown; and `a2d sample --infill`."""

import io
import itertools
import json
import re

import pytest

from a2d_hf.cli import main
from a2d_hf.denoising_picture import text_after
from a2d_hf.errors import BadInput
from a2d_hf.infilling import infill, parse_gaps
from a2d_hf.likelihood import Request, nelbo
from a2d_hf.modeling import A2DForMaskedDiffusion, A2DGenerationConfig
from tests.conftest import tiny_model, tiny_tokenizer


def model_and_tokenizer(**fields):
    tokenizer = tiny_tokenizer()
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), tokenizer, **fields).eval()
    model.generation_config = A2DGenerationConfig(eos_token_id=2, pad_token_id=0)
    return model, tokenizer


@pytest.fixture(scope="module")
def pair():
    return model_and_tokenizer()


@pytest.mark.parametrize(
    ("text", "pieces", "lengths"),
    [
        ("a [MASK:8] b", ["a ", " b"], [[8]]),
        ("[MASK]b", ["", "b"], [[1]]),
        ("a[MASK:2-4] b [MASK:3]", ["a", " b ", ""], [[2, 3, 4], [3]]),
    ],
)
def test_how_gaps_are_written(text, pieces, lengths):
    found = parse_gaps(text)
    assert found[0] == pieces and [list(each) for each in found[1]] == lengths


@pytest.mark.parametrize("text", ["no gap", "a [MASK:0] b", "a [MASK:4-2] b", "a [mask:3]"])
def test_what_is_no_gap_is_refused(text):
    with pytest.raises(BadInput, match="gap"):
        parse_gaps(text)


def test_filled_text_keeps_what_was_given(pair):
    found = infill(*pair, ["The quick ", " fox ", " dog."], [3, 2])
    assert re.fullmatch(r"The quick .* fox .* dog\.", found.text, re.S)
    assert found.text == f"The quick {found.spans[0]} fox {found.spans[1]} dog."
    assert found.lengths == (3, 2) and found.scores == {} and found.num_forwards == 5


def test_it_is_what_the_decoder_makes_of_the_same_canvas(pair):
    model, tokenizer = pair
    mask = tokenizer.mask_token
    ids = tokenizer(f"The quick {mask * 4} fox", return_tensors="pt").input_ids
    row = model.diffusion_generate(ids, max_new_tokens=0, suppress_tokens=[2])[0]
    assert infill(*pair, ["The quick ", " fox"], 4).text == tokenizer.decode(row, skip_special_tokens=True)


def test_an_end_is_not_written_into_a_gap(pair):
    model, tokenizer = pair
    likeliest = A2DGenerationConfig(eos_token_id=list(range(4, 40)), pad_token_id=0)
    before, model.generation_config = model.generation_config, likeliest
    try:
        filled = infill(model, tokenizer, ["The quick ", " fox"], 6).output.sequences[0]
        given = set(tokenizer("The quick  fox").input_ids)
        assert not [token for token in filled.tolist() if 4 <= token < 40 and token not in given]
    finally:
        model.generation_config = before


@pytest.mark.parametrize("rank_by", ["likelihood", "confidence"])
def test_the_best_length_is_that_of_the_highest_score(pair, rank_by):
    model, tokenizer = pair
    found = infill(*pair, ["The quick ", " the lazy dog."], [2, 3, 4, 5], rank_by=rank_by)
    assert set(found.scores) == {(2,), (3,), (4,), (5,)} and found.num_forwards == 14
    assert found.lengths == max(found.scores, key=found.scores.get)
    for length in (2, 5):
        alone = infill(*pair, ["The quick ", " the lazy dog."], length)
        row, places = alone.output.sequences[0], alone.output.confidences[0].isfinite().nonzero()[:, 0].tolist()
        if rank_by == "confidence":
            expected = float(alone.output.confidences[0, places].log().mean())
        else:
            expected = (
                nelbo(model, [Request(tuple(row.tolist()), tuple(places))], mc_num=32)[0].log_likelihood / length
            )
        assert found.scores[(length,)] == pytest.approx(expected, rel=1e-5)


def test_several_gaps_try_every_combination(pair):
    found = infill(*pair, ["The ", " fox ", "."], [range(1, 3), [2, 4, 5]], rank_by="confidence")
    assert set(found.scores) == set(itertools.product((1, 2), (2, 4, 5)))


@pytest.mark.parametrize("selector", ["confidence", "margin", "entropy", "random", "threshold", "entropy_bound"])
def test_every_selector_fills_gaps(pair, selector):
    found = infill(*pair, ["The ", " fox ", "."], [3, 4], selector=selector, seed=0)
    assert pair[1].mask_token not in found.text and found.output.stop_reason == ["filled"]


def test_a_block_model_fills_inside_a_block_and_refuses_what_it_cannot_see():
    model, tokenizer = model_and_tokenizer(objective="bd3lm", block_size=8)
    whole = tokenizer("The quick").input_ids
    room = 8 - len(whole) % 8 - 1
    found = infill(model, tokenizer, ["The quick", " fox"], range(1, room + 3), rank_by="confidence")
    assert {length for (length,) in found.scores} == set(range(1, room + 1))
    assert {length for (length,) in found.unseen} == {room + 1, room + 2}
    with pytest.raises(BadInput, match="lies in another block than the text behind it"):
        infill(model, tokenizer, ["The quick", " fox"], room + 2)
    assert infill(model, tokenizer, ["The quick", ""], room + 9).text.startswith("The quick"), "nothing stands behind"


@pytest.mark.parametrize(
    ("pieces", "lengths", "arguments", "message"),
    [
        (["a", "b"], [[1], [2]], {}, "`lengths` must say how long each of the 1 gap"),
        (["a"], 3, {}, "gap"),
        (["a", "b"], 0, {}, "positive numbers"),
        (["a", "b", "c"], [range(1, 10), range(1, 10)], {}, "81 combinations"),
        (["a", "b"], 3, {"rank_by": "luck"}, "`rank_by` must be one of"),
        (["a <|mask|>", "b"], 3, {}, "holds the mask token"),
    ],
)
def test_bad_input(pair, pieces, lengths, arguments, message):
    pieces = [piece.replace("<|mask|>", pair[1].mask_token) for piece in pieces]
    with pytest.raises(BadInput, match=message):
        infill(*pair, pieces, lengths, **arguments)


def test_the_picture_has_the_given_text_between_the_gaps(pair):
    found = infill(*pair, ["The ", " fox ", " dog."], [2, 3], output_history=True)
    picture = found.denoising(pair[1], pair[0].config.mask_token_id)
    assert picture.prompt + text_after(picture, picture.num_steps) == found.text
    assert picture.prompt == "The " and picture.given == {2: " fox ", 5: " dog."} and len(picture.pieces) == 5
    assert sorted(picture.steps) == [1, 2, 3, 4, 5]
    half = text_after(picture, 2)
    assert " fox " in half and "░" in half


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, (model, tokenizer) = tmp_path_factory.mktemp("infill"), model_and_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sample(capsys, checkpoint, *arguments):
    code = main(["sample", str(checkpoint), "--device", "cpu", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_fills_gaps_and_draws_them(checkpoint, tmp_path, capsys):
    trace = tmp_path / "trace.html"
    code, out, err = sample(capsys, checkpoint, "--infill", "The [MASK:3] fox [MASK:2] dog.", "--trace", trace)
    assert code == 0 and re.match(r"The .* fox .* dog\.", out, re.S) and "the gaps are filled" in out
    page = trace.read_text()
    assert '<span class="prompt"> fox </span>' in page and '<span class="prompt"> dog.</span>' in page
    assert sorted(map(int, re.findall(r"--at:(\d+)", page))) == [1, 2, 3, 4, 5]


def test_texts_from_a_file_and_from_standard_input_with_a_line_of_json_each(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "texts").write_text("The [MASK:2] fox\nA [MASK:1-3] dog\n")
    code, out, _ = sample(capsys, checkpoint, "--infill", "--prompt-file", tmp_path / "texts", "--jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["prompt"] for row in rows] == ["The [MASK:2] fox", "A [MASK:1-3] dog"]
    assert [len(row["scores"]) for row in rows] == [0, 3] and all(len(row["spans"]) == 1 for row in rows)
    best = max(rows[1]["scores"], key=lambda each: each["nats_per_token"])
    assert best["lengths"] == rows[1]["lengths"]
    monkeypatch.setattr("sys.stdin", io.StringIO("The [MASK:2] fox"))
    code, out, _ = sample(capsys, checkpoint, "--infill", "--json")
    assert code == 0 and json.loads(out)[0]["text"] == rows[0]["text"]


def test_every_way_of_decoding_has_its_flag(checkpoint, capsys):
    for flags in (
        ["--entropy-bound", "0.5"],
        ["--remasking", "remdm_cap", "--temperature", "1"],
        ["--threshold", "0.9", "--pipeline-depth", "2", "--block-size", "4"],
        ["--guidance-scale", "2", "--negative-prompt", "the dog"],
    ):
        code, out, err = sample(capsys, checkpoint, "-p", "The quick", "--max-new-tokens", "8", "--jsonl", *flags)
        row = json.loads(out)
        assert code == 0, err
        assert row["num_forwards"] == 16 if "--guidance-scale" in flags else row["num_forwards"] <= 8


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--infill", "no gap"], "[MASK:8]"),
        (["--infill", "a [MASK:2]", "-p", "b"], "leave out -p"),
        (["--infill", "a [MASK:2]", "--max-new-tokens", "3"], "--max-new-tokens"),
        (["-p", "a", "--length-by", "confidence"], "--infill"),
        (["-p", "a", "--negative-prompt", "b"], "--guidance-scale"),
        (["-p", "a", "--pipeline-depth", "2"], "pipeline_depth"),
    ],
)
def test_bad_flags(checkpoint, capsys, flags, word):
    code, out, err = sample(capsys, checkpoint, *flags)
    assert code == 2 and not out and word in err and "Traceback" not in err
