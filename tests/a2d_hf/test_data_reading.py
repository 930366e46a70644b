"""Mixtures on the command line: the rows of several sources, in one form, under one hash."""

import json
from collections import Counter

import pytest
from trl import DatasetMixtureConfig, ScriptArguments

from a2d_hf.data import read_rows
from a2d_hf.data_mixture import load_training_data
from a2d_hf.data_reading import read_data
from a2d_hf.errors import BadInput


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def texts(prefix, count, **more):
    return [{"text": f"{prefix} {i}"} | more for i in range(count)]


def test_one_file_is_read_as_ever(write):
    path = write("a+b[c].jsonl", texts("a", 3))
    assert read_data(path) == read_rows(path)


def test_rows_are_chosen_and_put_together(write):
    a = write("a.jsonl", [row | {"lang": ("python", "c")[i % 2]} for i, row in enumerate(texts("a", 8))])
    b = write("b.jsonl", texts("b", 2))
    rows = read_data(f"{a}[lang:python,train:3] + {b}")
    assert [row["text"] for row in rows.rows] == ["a 0", "a 2", "a 4", "b 0", "b 1"]
    assert rows.columns == ("text",) and not rows.running_text
    assert rows.name == "a.jsonl (lang python) + b.jsonl", "no folder of this machine goes into a manifest"
    assert "mixed 5 rows of a.jsonl (lang python) 3, b.jsonl 2" in rows.notes


def test_the_hash_depends_on_every_source_and_option(write):
    a, b = write("a.jsonl", texts("a", 4)), write("b.jsonl", texts("b", 4))
    forms = [
        "{a}+{b}",
        "{b}+{a}",
        "{a}[train:2]+{b}",
        "{a}[weight:1]+{b}[weight:1]",
        "{a}[text:a 1]+{b}",
        "{a}[train:2]",
    ]
    forms = [form.format(a=a, b=b) for form in forms]
    hashes = [read_data(form).sha256 for form in forms]
    assert len(set(hashes)) == len(forms)
    assert read_data(forms[0]).sha256 == hashes[0]
    weighted = [read_data(forms[3], seed=seed).sha256 for seed in (0, 1)]
    assert weighted[0] != weighted[1]
    write("b.jsonl", texts("c", 4))
    assert read_data(forms[0]).sha256 != hashes[0]


def test_a_weighted_mixture_is_that_of_the_recipes(write):
    a, b = write("a.jsonl", texts("a", 200)), write("b.jsonl", texts("b", 200))
    form = f"{a}[weight:3]+{b}[weight:1]"
    ours = [row["text"] for row in read_data(form, seed=7).rows]
    theirs = load_training_data(ScriptArguments(dataset_name=form), DatasetMixtureConfig(), seed=7).train
    assert ours == theirs["text"][:]
    share = Counter(text[0] for text in ours)["a"] / len(ours)
    assert len(set(ours)) == len(ours) and abs(share - 0.75) < 0.08


def test_pairs_go_among_conversations(write):
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "tools": "[]"}
    a, b = write("a.jsonl", [chat]), write("b.jsonl", [{"instruction": "add", "input": "1 2", "output": "3"}])
    first, second = read_data(f"{a}+{b}").rows
    assert first == chat
    assert [turn["role"] for turn in second["messages"]] == ["user", "assistant"]
    assert [turn["content"] for turn in second["messages"]] == ["add\n\n1 2", "3"]


def test_texts_are_one_after_the_other(write, tokenizer):
    from a2d_hf.data import as_dataset

    a, b = write("a.txt", "the dog jumps\n" * 9), write("b.txt", "the fox\n" * 9)
    rows = read_data(f"{a}+{b}")
    assert rows.running_text
    assert "".join(as_dataset(rows, tokenizer, 16)["text"]) == "the dog jumps\n" * 9 + "the fox\n" * 9


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("{a}[lang:python]", "a.jsonl has no column lang \\(it has text\\)"),
        ("{a}[text:z]", "a.jsonl has no row with text = z: nothing is left"),
        ("{a}[test:2]", "is for the recipes: here --held-out"),
        ("{a}+{t}", "t.txt is running text, the others have rows"),
        ("{t}[train:2]", "t.txt is running text, which has no rows to choose among"),
        ("{a}+{p}", "do not go together: .*a.jsonl has text; .*p.jsonl has prompt \\+ completion"),
        ("{a}[weight:2]+{p}", "p.jsonl has no `weight`"),
        ("{a}+{a}.gone.jsonl", "gone.jsonl does not exist"),
        ("{a}+", "an empty name is no data set"),
    ],
)
def test_bad_mixtures_are_one_sentence(write, form, said):
    names = {
        "a": write("a.jsonl", texts("a", 3)),
        "t": write("t.txt", "the dog"),
        "p": write("p.jsonl", [{"prompt": "a", "completion": "b"}]),
    }
    with pytest.raises(BadInput, match=said) as caught:
        read_data(form.format(**names))
    assert str(caught.value).startswith("--data") and "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["completion_mask", "assistant_masks", "labels"])
def test_what_is_trained_of_given_tokens_survives_reading(write, column):
    row = {"input_ids": [5, 6, 7], column: [0, 1, 1], "other": 1}
    assert read_data(write("a.jsonl", [row])).rows == [{"input_ids": [5, 6, 7], column: [0, 1, 1]}]


def test_turns_with_the_text_of_the_last_one(write):
    path = write("a.jsonl", [{"input": [{"role": "user", "content": "hi"}], "output": "ho", "license": "cc"}])
    expected = {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "ho"}],
    }
    assert read_data(path).rows == [expected]
    recipes = load_training_data(ScriptArguments(dataset_name=str(path)), DatasetMixtureConfig())
    assert list(recipes.train) == [expected]
