"""`a2d data preview`: the rows that a training would see, what of them is trained on, and what became of the rest."""

import json

import pytest

from a2d_hf import cli
from tests.hub_mirror import TEMPLATE


CHAT = {
    "messages": [
        {"role": "user", "content": "question 1"},
        {"role": "assistant", "content": "the dog"},
        {"role": "user", "content": "question 2"},
        {"role": "assistant", "content": "the fox"},
    ]
}


@pytest.fixture
def model(make_checkpoint, tokenizer):
    folder = make_checkpoint("llama")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="a.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def preview(capsys, *words):
    capsys.readouterr()
    code = cli.main(["data", "preview", *words])
    return code, *capsys.readouterr()


def test_every_turn_of_the_assistant_is_marked_and_nothing_else(model, write, capsys):
    code, out, _ = preview(capsys, write(CHAT), "--model", model, "--json")
    report = json.loads(out)
    assert code == 0 and report["form"] == "messages"
    (row,) = report["rows"]
    assert [s["text"].strip() for s in row["segments"] if s["trained"]] == ["the dog</s>", "the fox</s>"]
    whole = "".join(s["text"] for s in row["segments"])
    assert whole.index("question 1") < whole.index("the dog") < whole.index("question 2")


def test_targets_are_between_brackets_without_a_terminal(model, write, capsys):
    code, out, err = preview(capsys, write({"prompt": "the dog", "completion": " jumps"}), "--model", model)
    assert code == 0 and err == ""
    assert "  the dog⟦ jumps</s>⟧\n" in out and "\033" not in out


def test_targets_are_coloured_on_a_terminal(model, write, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    _, out, _ = preview(capsys, write({"prompt": "the dog", "completion": " jumps"}), "--model", model)
    assert "  the dog\033[32m jumps</s>\033[0m\n" in out and "⟦" not in out


def test_counts_are_those_of_the_rows(model, write, tokenizer, capsys):
    """Against the tokenizer: a short row, one whose answer is cut, one whose whole answer is lost."""
    prompt, long = "the lazy dog ", "jumps over the lazy dog " * 6
    rows = [
        {"prompt": prompt, "completion": "jumps"},
        {"prompt": prompt, "completion": long},
        {"prompt": long, "completion": "jumps"},
    ]
    ids = [tokenizer(row["prompt"] + row["completion"] + "</s>").input_ids for row in rows]
    asked = [len(tokenizer(row["prompt"]).input_ids) for row in rows]
    assert len(ids[1]) > 24 and asked[2] >= 24
    _, out, _ = preview(capsys, write(*rows), "--model", model, "--max-length", "24", "--json")
    counts = json.loads(out)["counts"]
    assert (counts["rows_given"], counts["rows"], counts["dropped_rows"]) == (3, 2, 1)
    assert counts["tokens"] == len(ids[0]) + 24
    assert counts["targets"] == len(ids[0]) - asked[0] + 24 - asked[1]
    assert counts["truncated_rows"] == 2 and counts["truncated_tokens"] == sum(len(i) - 24 for i in ids[1:])
    assert counts["rows_ending_with_eos"] == 1 and counts["longest_row"] == 24
    assert any("1 dropped because nothing in them is a target" in note for note in json.loads(out)["notes"])


def test_the_example_hides_targets_alone_and_the_seed_decides(model, write, capsys):
    path = write({"prompt": "question 1 2 3", "completion": " the dog jumps over the lazy fox" * 4})
    texts = []
    for seed in ("0", "0", "1"):
        _, out, _ = preview(capsys, path, "--model", model, "--json", "--seed", seed)
        report = json.loads(out)
        texts.append(report["masked_example"]["text"])
        assert texts[-1].startswith("question 1 2 3")
        assert 0.3 < texts[-1].count("▢") / report["counts"]["targets"] < 0.7
    assert texts[0] == texts[1] != texts[2]


def test_a_mixture_and_a_number_of_rows(model, write, capsys):
    a, b = write(*[{"text": f"the dog {i}"} for i in range(5)]), write({"text": "the fox"}, name="b.jsonl")
    _, out, _ = preview(capsys, f"{a}[train:2]+{b}", "--model", model, "--rows", "2", "--json")
    report = json.loads(out)
    assert report["counts"]["rows"] == 3 and len(report["rows"]) == 2 and report["source"] == "a.jsonl + b.jsonl"


def test_a_converted_run_decides_the_shift(model, write, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert cli.main(["convert", model, "--out", run, "--token-shift"]) == 0
    capsys.readouterr()
    _, out, _ = preview(capsys, write({"text": "the dog"}), "--model", run, "--json")
    first = json.loads(out)["rows"][0]["segments"][0]
    assert first == {"trained": False, "text": "<s>"}, "with the shift, BOS opens a row and is no target"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{gone}", "--model", "{model}"], "SRC {gone} does not exist."),
        (["{data}", "--model", "{gone}"], "--model {gone} does not exist."),
        (["{data}", "--model", "org/none"], "--model org/none has no tokenizer that can be loaded"),
        (["{data}", "--model", "{model}", "--rows", "0"], "--rows 0 must be at least 1."),
        (["{data}", "--model", "{model}", "--max-length", "1"], "--max-length 1 must be at least 2."),
        (["{data}", "--model", "{model}", "--max-length", "4096"], "is longer than the model's context"),
        (["{data}[lang:c]", "--model", "{model}"], "has no column lang (it has text)."),
        (["{chat}", "--model", "{plain}"], "the tokenizer has no chat template"),
    ],
)
def test_bad_input_is_one_sentence(words, said, model, make_checkpoint, write, tmp_path, capsys):
    names = {
        "gone": str(tmp_path / "gone.jsonl"),
        "data": write({"text": "the dog"}),
        "chat": write(CHAT, name="chat.jsonl"),
        "model": model,
        "plain": str(make_checkpoint("gpt2")),
    }
    code, out, err = preview(capsys, *(word.format(**names) for word in words))
    assert code == 2 and out == ""
    assert len(err.strip().splitlines()) == 1 and said.format(**names) in err
