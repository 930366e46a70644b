"""scripts/write_parent_text.py: what it writes, that it can be stopped at any moment, and what it refuses."""

import json
from pathlib import Path

import pytest

from a2d_hf.conversion_settings import ConversionSettings
from a2d_hf.data import read_rows
from a2d_hf.journal import Journal
from a2d_hf.training_run import prepare_data
from scripts import write_parent_text as script
from tests.conftest import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(parent: Path, out: Path, *more: str) -> int:
    fast = ("--tokens", "120", "--length", "24", "--batch-size", "2")
    return script.main([str(parent), "--out", str(out), *fast, *more])


def test_rows_of_tokens_as_many_as_asked_for_and_the_same_again(parent, tmp_path, capsys):
    assert written(parent, tmp_path / "a.jsonl") == 0
    assert written(parent, tmp_path / "b.jsonl") == 0
    assert written(parent, tmp_path / "c.jsonl", "--seed", "1") == 0
    a, b, c = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == b != c
    rows = [json.loads(line)["input_ids"] for line in a.splitlines()]
    assert 120 <= sum(map(len, rows)) and max(map(len, rows)) == 24
    tokenizer = tiny_tokenizer()
    inside = {token for row in rows for token in row[1:-1]}
    assert {row[0] for row in rows} == {tokenizer.bos_token_id}
    assert not inside & set(tokenizer.all_special_ids) and max(inside) < len(tokenizer)
    assert not list(tmp_path.glob("*.part")) and "tokens in" in capsys.readouterr().out


def test_a_text_ends_with_what_ended_it_or_where_it_was_cut():
    """Token 1 begins texts, 2 ends them and is followed by padding, which is 1 again."""
    assert script.texts_of([1, 7, 8, 9, 1, 5, 6, 7], ends={1, 2}) == [[1, 7, 8, 9, 1], [1, 5, 6, 7]]
    assert script.texts_of([1, 7, 8, 2, 1, 1, 1], ends={1, 2}) == [[1, 7, 8, 2]]
    assert script.texts_of([1, 7, 2, 1, 1, 1], ends={1, 2}) == []


def test_what_was_written_is_data_of_a_conversion_to_the_token(parent, tmp_path):
    out = tmp_path / "new" / "own.jsonl"  # its folder is made
    written(parent, out)
    tokenizer, rows = tiny_tokenizer(), [json.loads(line) for line in out.read_text().splitlines()]
    settings = ConversionSettings(source=str(parent), held_out=0.0, max_length=24)
    prepared = prepare_data(read_rows(str(out)), tokenizer, settings, None).train
    assert sorted(prepared["input_ids"]) == sorted(row["input_ids"] for row in rows)
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] for row in prepared)


@pytest.mark.parametrize("cut", [0, 7])
def test_a_run_that_was_killed_goes_on_where_it_was(cut, parent, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    written(parent, whole)
    append, lines = Journal._append, []

    def killed(journal, line):
        if len(lines) == 2:
            raise KeyboardInterrupt
        lines.append(line)
        append(journal, line)

    monkeypatch.setattr(Journal, "_append", killed)
    assert written(parent, stopped) == 130
    assert not stopped.exists()
    part = Path(f"{stopped}.part")
    if cut:  # the power went while a line was being written
        part.write_bytes(part.read_bytes()[:-cut])
    sampled = []
    original = script.batches
    monkeypatch.setattr(Journal, "_append", append)
    monkeypatch.setattr(script, "batches", lambda *args: sampled.append(args[-1]) or original(*args))
    assert written(parent, stopped) == 0
    assert stopped.read_bytes() == whole.read_bytes()
    assert sampled == [0 if cut else 1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--length", "1"), "--length must lie between 3 and"),
        (("--tokens", "0"), "--tokens must be at least 1, not 0"),
        (("--temperature", "0"), "--temperature must be positive"),
        (("--start", "two words of it"), "name one"),
        (("--out", "x.txt"), "must end in .jsonl"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(more, message, parent, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert written(parent, tmp_path / "own.jsonl", *more) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_neither_another_run_nor_a_finished_file_is_overwritten(parent, tmp_path, capsys):
    out = tmp_path / "own.jsonl"
    assert written(parent, out) == 0
    before = out.read_bytes()
    assert written(parent, out) == 2 and out.read_bytes() == before
    Path(f"{tmp_path / 'new.jsonl'}.part").write_text('{"seed": 5}\n')
    assert written(parent, tmp_path / "new.jsonl") == 2
    assert "other settings" in capsys.readouterr().err
