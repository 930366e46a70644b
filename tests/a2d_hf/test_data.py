"""Data: every form is read, nothing is lost, and bad data is one sentence naming the row."""

import gzip
import json

import datasets
import pytest

from a2d_hf.conversion_settings import ConversionSettings
from a2d_hf.data import as_dataset, cut_text, hold_out, read_rows
from a2d_hf.errors import BadInput


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TEXTS = [{"text": f"the dog number {i} jumps"} for i in range(10)]


def test_jsonl_rows(tmp_path):
    rows = read_rows(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    assert rows.rows == TEXTS
    assert (rows.columns, rows.running_text) == (("text",), False)


def test_json_list_and_json_lines_under_json(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(TEXTS))
    write_jsonl(tmp_path / "lines.json", TEXTS)
    assert read_rows(tmp_path / "list.json").rows == read_rows(tmp_path / "lines.json").rows == TEXTS


def test_parquet_and_gzip(tmp_path):
    datasets.Dataset.from_list(TEXTS).to_parquet(tmp_path / "a.parquet")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in TEXTS))
    assert read_rows(tmp_path / "a.parquet").rows == read_rows(tmp_path / "a.jsonl.gz").rows == TEXTS


def test_the_hash_is_that_of_the_file(tmp_path):
    import hashlib

    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert read_rows(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"prompt": "p", "response": "c", "id": 3}, "p", "c"),
        ({"question": "p", "answer": "c"}, "p", "c"),
        ({"instruction": "p", "input": "", "output": "c"}, "p", "c"),
        ({"instruction": "p", "input": "x", "output": "c"}, "p\n\nx", "c"),
    ],
)
def test_prompt_forms(tmp_path, row, prompt, completion):
    rows = read_rows(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert rows.rows == [{"prompt": prompt, "completion": completion}]
    assert bool(rows.notes) == ("completion" not in row)


def test_messages(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert read_rows(write_jsonl(tmp_path / "a.jsonl", [row])).rows == [row]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.txt", "", "is empty"),
        ("a.jsonl", " \n\n", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.csv", "a,b", "unknown ending"),
        ("a.jsonl", '{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n{"txt": "y"}\n', 'line 2 has no text in "text"'),
        ("a.jsonl", '{"text": "x"}\n\n{"text": "  "}\n', 'line 3 has no text in "text"'),
        ("a.jsonl", '{"text": "x"}\n{"text": null}\n', 'line 2 has no text in "text"'),
        ("a.jsonl", '{"txt": "x"}\n', "line 1 has no text \\(it has txt\\)"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', "line 2 is not an object"),
        ("a.json", '[{"text": "x"}, "y"]', "row 2 is not an object"),
        (
            "a.jsonl",
            '{"prompt": "x", "completion": "y"}\n{"prompt": "x", "completion": ""}\n',
            'no text in "completion"',
        ),
        ("a.jsonl", '{"messages": []}', 'no text in "messages"'),
        ("a.parquet", "PAR1 no", "not a readable parquet"),
        ("a.txt.gz", "no gzip", "cannot be read"),
    ],
)
def test_bad_data_is_one_sentence(tmp_path, name, content, word):
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=word) as caught:
        read_rows(tmp_path / name)
    assert str(caught.value).startswith("--data ")
    assert "\n" not in str(caught.value)


def test_missing_folder_and_binary(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(BadInput, match="is a folder"):
        read_rows(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(BadInput, match="not UTF-8 text \\(byte 2\\)"):
        read_rows(tmp_path / "a.txt")


def test_an_unreadable_file(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(BadInput, match="cannot be read: .*Permission denied"):
        read_rows(path)


def test_a_hub_name_that_cannot_be_loaded(tmp_path):
    with pytest.raises(BadInput, match="neither a file nor a data set"):
        read_rows("no-such-organisation/no-such-set")


def test_cut_text_loses_nothing_and_fits(tokenizer):
    text = "".join(f"The dog {i} jumps over {'x' * (i % 7)}.\n" + ("\n" if i % 3 == 0 else "") for i in range(60))
    text += "no spaces" * 40 + "\n  indented\tlast line without an end"
    rows = cut_text(text, tokenizer, 32)
    assert "".join(rows) == text
    assert max(len(tokenizer(row).input_ids) for row in rows) <= 32
    # As few cuts as the ends of lines allow: no two neighbours would have fitted into one row.
    whole_lines = [row for row in rows if row.endswith("\n")]
    assert len(whole_lines) > len(rows) / 2


def test_cut_text_makes_room_for_special_tokens(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    rows = cut_text("the dog jumps over the fox\n" * 30, tokenizer, 16)
    assert "".join(rows) == "the dog jumps over the fox\n" * 30
    assert all(len(tokenizer(row).input_ids) <= 16 for row in rows)
    with pytest.raises(BadInput, match="leaves no room"):
        cut_text("text", tokenizer, 2)


def test_hold_out_takes_the_end_of_running_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("the dog jumps over the fox\n" * 100)
    rows = read_rows(tmp_path / "a.txt")
    dataset = as_dataset(rows, tokenizer, 32)
    train, held = hold_out(dataset, 0.1, rows.running_text, seed=0)
    assert list(train["text"]) + list(held["text"]) == list(dataset["text"])
    assert len(held) == round(len(dataset) * 0.1)


def test_hold_out_draws_rows_by_seed():
    dataset = datasets.Dataset.from_list([{"text": str(i)} for i in range(100)])
    first, again, other = (hold_out(dataset, 0.2, False, seed)[1]["text"][:] for seed in (0, 0, 1))
    assert first == again != other
    train, held = hold_out(dataset, 0.2, False, 0)
    assert sorted([*train["text"], *held["text"]], key=int) == [str(i) for i in range(100)]


def test_hold_out_nothing_and_too_little():
    dataset = datasets.Dataset.from_list([{"text": "a"}])
    assert hold_out(dataset, 0.0, False, 0) == (dataset, None)
    with pytest.raises(BadInput, match="too few to hold any out"):
        hold_out(dataset, 0.05, False, 0)


class TestPrepareData:
    """What happens to rows that are too long, by their form."""

    def prepare(self, tmp_path, rows, tokenizer, context=32, **settings):
        from a2d_hf.training_run import prepare_data

        path = write_jsonl(tmp_path / "a.jsonl", rows)
        chosen = ConversionSettings(source="", held_out=0.0, **settings)
        return prepare_data(read_rows(path), tokenizer, chosen, context)

    def test_long_text_is_cut_into_pieces_counted_and_said(self, tmp_path, tokenizer):
        text = "the dog jumps over the lazy fox " * 20
        data = self.prepare(tmp_path, [{"text": text}, {"text": "the dog"}], tokenizer)
        pieces = [row["input_ids"] for row in data.train]
        assert sum(pieces[:-1], []) == tokenizer(text).input_ids + [tokenizer.eos_token_id]
        assert data.facts["train"]["chunked_rows"] == 1
        assert data.facts["train"]["truncated_rows"] == 0
        assert "cut into pieces with nothing lost" in data.facts["notes"][0]

    def test_a_long_completion_is_bad_input(self, tmp_path, tokenizer):
        row = {"prompt": "the dog", "completion": " jumps over the lazy fox" * 20}
        with pytest.raises(
            BadInput, match="1 row\\(s\\) longer than the model's context of 32 tokens.*--max-length 32"
        ):
            self.prepare(tmp_path, [row], tokenizer)

    def test_a_long_completion_is_cut_off_where_that_was_asked_for(self, tmp_path, tokenizer):
        row = {"prompt": "the dog", "completion": " jumps over the lazy fox" * 20}
        data = self.prepare(tmp_path, [row], tokenizer, max_length=32)
        assert data.facts["train"]["truncated_rows"] == 1
        assert "losing" in data.facts["notes"][0]
        assert len(data.train[0]["input_ids"]) == 32

    def test_max_length_beyond_the_context_is_bad_input(self, tmp_path, tokenizer):
        with pytest.raises(BadInput, match="--max-length 64 is longer than the model's context"):
            self.prepare(tmp_path, TEXTS, tokenizer, max_length=64)

    def test_no_end_of_text_token_is_said(self, tmp_path, tokenizer):
        tokenizer.eos_token = None
        data = self.prepare(tmp_path, TEXTS, tokenizer)
        assert any("no end-of-text token" in note for note in data.facts["notes"])

    def test_text_that_the_tokenizer_cannot_take(self, tmp_path):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        letters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"A": 0}, unk_token="?")))
        with pytest.raises(BadInput, match="--data .*UNK"):
            self.prepare(tmp_path, TEXTS, letters)
        (tmp_path / "a.txt").write_text("B")
        with pytest.raises(BadInput, match="--data .* cannot be tokenized.*UNK"):
            as_dataset(read_rows(tmp_path / "a.txt"), letters, 32)

    def test_running_text_gets_no_end_of_text(self, tmp_path, tokenizer):
        from a2d_hf.training_run import prepare_data

        (tmp_path / "a.txt").write_text("the dog jumps over the fox\n" * 20)
        data = prepare_data(read_rows(tmp_path / "a.txt"), tokenizer, ConversionSettings(source="", held_out=0.0), 32)
        assert all(tokenizer.eos_token_id not in row["input_ids"] for row in data.train)
        assert (
            sum((row["input_ids"] for row in data.train), [])
            == tokenizer("the dog jumps over the fox\n" * 20).input_ids
        )
