"""Mixtures of data sets: the compact form, what is kept of each, and how rows of several come together."""

import json
from collections import Counter
from pathlib import Path

import pytest
from trl import DatasetMixtureConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig

from a2d_hf.data_mixture import Part, load_training_data, parse_mixture
from a2d_hf.data_reading import read_data
from a2d_hf.errors import BadInput


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, rows: list[dict]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def load(name: str | None, streaming: bool = False, **mixture):
    return load_training_data(
        ScriptArguments(dataset_name=name, dataset_streaming=streaming), DatasetMixtureConfig(**mixture)
    )


def test_compact_form_is_read():
    assert parse_mixture("org/a + org/b[name:x, lang:python,train:10_000,test:5,split:code]") == [
        Part("org/a"),
        Part("org/b", name="x", split="code", train=10_000, test=5, where={"lang": "python"}),
    ]


def test_weights_are_for_all_or_none():
    assert [part.weight for part in parse_mixture("a[weight:3]+b[weight:1]")] == [3.0, 1.0]
    with pytest.raises(BadInput, match="b has no `weight`"):
        parse_mixture("a[weight:3]+b")


def test_a_plus_in_the_name_of_a_file_is_no_mixture(write):
    one, other = write("c++[x].jsonl", [{"text": "a"}]), write("d.jsonl", [{"text": "b"}])
    assert parse_mixture(str(one)) == [Part(str(one))]
    assert parse_mixture(f"{one}+{other}") == [Part(str(one)), Part(str(other))]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a++b", "an empty name is no data set"),
        ("a[lang]", "not of the form key:value"),
        ("a[train:many]", "must be a number of rows, not many"),
        ("a[weight:0]", "must be a positive number, not 0"),
        ("a[lang:x", "is no data set"),
    ],
)
def test_what_cannot_be_read_gets_a_sentence(text: str, said: str):
    with pytest.raises(BadInput, match=said.replace("[", r"\[")):
        parse_mixture(text)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_filtered_counted_and_set_aside(write, streaming: bool):
    rows = [{"text": f"row {i}", "lang": ("python", "c")[i % 2], "n": i} for i in range(20)]
    path = write("a.jsonl", rows)
    data = load(f"{path}[lang:python,train:4,test:3]", streaming)
    train, test = list(data.train), list(data.test)
    assert len(train) == 4 and len(test) == 3
    texts = [row["text"] for row in train + test]
    assert len(set(texts)) == 7 and set(texts) <= {row["text"] for row in rows if row["lang"] == "python"}
    assert all(set(row) == {"text"} for row in train + test)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_star_in_the_value_stands_for_any_text(write, streaming: bool):
    answers = ["```python\nx\n```", "python", "```c\nx\n```", "Python", "a.b", "axb"]
    path = write("a.jsonl", [{"instruction": "do", "output": answer} for answer in answers])

    def kept(option: str) -> list[str]:
        return [row["completion"] for row in load(f"{path}[{option}]", streaming).train]

    assert kept("output:*python*") == answers[:2]
    assert kept("output:python") == ["python"]
    assert kept("output:*.*") == ["a.b"], "nothing but the star is special"
    assert read_data(f"{path}[output:*python*]").rows == [
        {"prompt": "do", "completion": answer} for answer in answers[:2]
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_turns_and_the_text_of_the_answer_are_a_prompt_and_its_completion(write, streaming: bool):
    """The form of nvidia/Llama-Nemotron-Post-Training-Dataset."""
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    facts = {"category": "math", "reasoning": "on", "used_in_training": ["Ultra"], "system_prompt": "think"}
    path = write("a.jsonl", [{"input": turns, "output": "d", **facts}])
    expected = {"prompt": turns, "completion": [{"role": "assistant", "content": "d"}]}
    assert list(load(str(path), streaming).train) == [expected]
    assert read_data(str(path)).rows == [expected]
    chats = write("b.jsonl", [{"messages": turns[:2]}])
    assert {"messages": [*turns, {"role": "assistant", "content": "d"}]} in load(f"{path}+{chats}", streaming).train


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_decide_where_rows_come_from_and_none_comes_twice(write, streaming: bool):
    a, b = (write(f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(400)]) for name in "ab")
    texts = [row["text"] for row in load(f"{a}[weight:3]+{b}[weight:1]", streaming).train]
    assert len(texts) == len(set(texts))
    share = Counter(text[0] for text in texts)["a"] / len(texts)
    assert abs(share - 0.75) < 0.06
    assert max(Counter(text[0] for text in texts).values()) == 400, "it ends where one source is used up"


@pytest.mark.parametrize("column", ["instruction", "output"])
def test_an_empty_cell_is_named(column, write):
    rows = [{"instruction": "add 1 2", "output": "3"}, {"instruction": "add 2 2", "output": "4"} | {column: None}]
    with pytest.raises(BadInput, match=f"nothing in its column '{column}'"):
        list(load(str(write("pairs.jsonl", rows))).train)


@pytest.mark.parametrize("streaming", [False, True])
def test_without_weights_every_row_comes_once(write, streaming: bool):
    a, b = write("a.jsonl", [{"text": f"a {i}"} for i in range(5)]), write("b.jsonl", [{"text": "b"}])
    texts = [row["text"] for row in load(f"{a}+{b}", streaming).train]
    assert sorted(texts) == sorted([*(f"a {i}" for i in range(5)), "b"])
    if streaming:
        assert texts[:2] == ["a 0", "b"], "streams alternate, one is not read after the other"


def test_pairs_and_conversations_mix_as_conversations(write):
    chats = write(
        "chats.jsonl", [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    )
    alpaca = write("alpaca.jsonl", [{"instruction": "add", "input": "1 2", "output": "3", "text": "add 1 2 3"}])
    found = [row["messages"] for row in load(f"{chats}+{alpaca}").train]
    assert [[turn["content"] for turn in turns] for turns in found] == [["hi", "ho"], ["add\n\n1 2", "3"]]
    assert [turn["role"] for turn in found[1]] == ["user", "assistant"]


def test_instruction_and_answer_win_over_the_text_made_of_both(write):
    path = write("alpaca.jsonl", [{"instruction": "add", "input": "", "output": "3", "text": "add 3"}])
    assert list(load(str(path)).train) == [{"prompt": "add", "completion": "3"}]


def test_forms_that_do_not_go_together_are_refused(write):
    text, pair = write("t.jsonl", [{"text": "a"}]), write("p.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(BadInput, match="do not go together.*completion \\+ prompt; text"):
        load(f"{text}+{pair}")


@pytest.mark.parametrize(
    ("rows", "option", "said"),
    [
        ([{"words": "a"}], "", "has no text \\(it has words\\)"),
        ([{"text": "a"}], "[lang:python]", "has no column lang \\(it has text\\)"),
        ([{"text": "a"}], "[split:code]", "has no split code: it has train"),
        ([{"text": "a"}], "[test:5]", "has 1 rows, too few to set 5 aside"),
    ],
)
def test_bad_data_is_named(write, rows: list[dict], option: str, said: str):
    with pytest.raises(BadInput, match=said):
        load(f"{write('a.jsonl', rows)}{option}")


def test_trls_own_list_of_data_sets_is_read(write):
    a, b = write("a.jsonl", [{"text": "a"}] * 30), write("b.jsonl", [{"text": "b"}] * 30)
    entries = [DatasetConfig(path="json", data_files=str(p), fraction=f) for p, f in ((a, 0.5), (b, 0.5))]
    data = load(None, datasets=entries, test_split_size=0.1)
    assert {row["text"] for row in data.train} == {"a", "b"} and len(data.test) > 0


def test_no_data_at_all_is_bad_input():
    with pytest.raises(BadInput, match="--dataset_name is missing"):
        load(None)
