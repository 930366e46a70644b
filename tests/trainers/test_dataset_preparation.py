"""Rows of every format: equal to SFTTrainer's where they should be, and counted where something is left out."""

import json
import os
import subprocess
import sys

import datasets
import pytest
from tokenizers.processors import TemplateProcessing
from trl import SFTConfig, SFTTrainer

from a2d_hf.trainers.dataset_preparation import prepare_dataset
from a2d_hf.trainers.row_tokenization import RowRules, common_prefix_length
from tests.conftest import REPOSITORY, tiny_model, tiny_tokenizer


BOS, EOS = 1, 2
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}assistant:\n{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}{{ m['role'] }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")

TEXTS = [
    {"text": "the quick brown fox"},
    {"text": "a model reads from left to right, one word at a time"},
    {"text": "x</s>"},
]
COMPLETIONS = [{"prompt": "question: ", "completion": "the lazy dog"}, {"prompt": "0 1", "completion": " 2 3 4</s>"}]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "one word"},
            {"role": "user", "content": "the quick"},
            {"role": "assistant", "content": "brown fox"},
            {"role": "user", "content": "and then"},
            {"role": "assistant", "content": "jumps over"},
        ]
    },
    {"messages": [{"role": "user", "content": "lazy"}, {"role": "assistant", "content": "dog"}]},
]
CHAT_COMPLETIONS = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in CHATS]
CONVERSATIONS = [
    {"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]} for row in CHATS
]
TOKENS = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10]}]
LABELLED = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}, {"input_ids": [9, 10], "labels": [9, -100]}]
COMPLETION_MASKED = [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}]
ASSISTANT_MASKED = [{"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 0, 1]}]


def chat_tokenizer(template=MARKED):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def prepare(rows, tokenizer=None, **rules):
    dataset = datasets.Dataset.from_list(rows)
    return prepare_dataset(dataset, tokenizer or chat_tokenizer(), RowRules(**rules))


def pairs(dataset):
    return [(row["input_ids"], row["labels"]) for row in dataset]


def sft_rows(rows, tokenizer, tmp_path, **fields):
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, gradient_checkpointing=False, report_to="none", **fields)
    trainer = SFTTrainer(
        tiny_model("llama"), args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    return pairs(trainer.train_dataset)


@pytest.mark.parametrize(
    "rows, fields",
    [
        (TEXTS, {}),
        (TEXTS, {"max_length": 6}),
        (COMPLETIONS, {}),
        (COMPLETIONS, {"completion_only_loss": False}),
        (COMPLETIONS, {"max_length": 12}),
        (CHATS, {"assistant_only_loss": True}),
        (CHATS, {"assistant_only_loss": False}),
        (CHAT_COMPLETIONS, {}),
        (CHAT_COMPLETIONS, {"assistant_only_loss": True}),
        (CONVERSATIONS, {"assistant_only_loss": False}),
        (TOKENS, {}),
        (LABELLED, {}),
        (COMPLETION_MASKED, {"completion_only_loss": True}),
        (ASSISTANT_MASKED, {}),
    ],
)
def test_rows_equal_those_of_sft_trainer(rows, fields, tmp_path):
    ours, _ = prepare(rows, **fields)
    assert pairs(ours) == sft_rows(rows, chat_tokenizer(), tmp_path, **fields)


def test_with_a_bos_only_its_label_differs_from_sft_trainer(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    ours, _ = prepare(TEXTS, tokenizer)
    theirs = sft_rows(TEXTS, tokenizer, tmp_path)
    for (input_ids, labels), (their_ids, their_labels) in zip(pairs(ours), theirs, strict=True):
        assert input_ids == their_ids and input_ids[0] == BOS
        assert labels == [-100, *their_labels[1:]]


def test_rows_are_numbered():
    ours, _ = prepare(TEXTS)
    assert ours["row_id"][:] == [0, 1, 2]
    assert set(ours.column_names) == {"input_ids", "labels", "row_id"}


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_all_assistant_turns_are_targets_and_nothing_else(template):
    tokenizer = chat_tokenizer(template)
    ours, _ = prepare(CHATS, tokenizer)
    told = [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in ours]
    assert told == ["brown fox</s>jumps over</s>", "dog</s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    # Only the last answer is shown: what stood before cannot be found in the whole.
    template = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }};{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="Row 0 of the train dataset.*assistant_only_loss=False"):
        prepare(CHATS, chat_tokenizer(template))


def test_tools_and_template_arguments_of_a_row_reach_the_template():
    template = "{{ tools[0].name }} {{ mood }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
    row = CHATS[1] | {"tools": '[{"name": "add"}]', "chat_template_kwargs": {"mood": "quick"}}
    tokenizer = chat_tokenizer(template)
    ours, _ = prepare([row], tokenizer, assistant_only_loss=False)
    assert tokenizer.decode(ours[0]["input_ids"]).startswith("add quick lazy")


def test_formatting_function_makes_text():
    rows = datasets.Dataset.from_list([{"q": "0 1", "a": "2"}])
    ours, _ = prepare_dataset(
        rows, tiny_tokenizer(), RowRules(), formatting_func=lambda row: f"question {row['q']} answer {row['a']}"
    )
    assert tiny_tokenizer().decode(ours[0]["input_ids"]) == "question 0 1 answer 2</s>"


def test_eos_is_left_out_on_request():
    with_eos, _ = prepare(TEXTS[:1])
    without, _ = prepare(TEXTS[:1], insert_eos=False)
    assert with_eos[0]["input_ids"] == without[0]["input_ids"] + [EOS]


def test_a_tokenizer_without_eos_still_serves():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    ours, _ = prepare(TEXTS[:1], tokenizer)
    assert ours[0]["input_ids"] == tokenizer(TEXTS[0]["text"])["input_ids"]


# --------------------------------------------------------------------------------------------------------- token shift


def test_token_shift_opens_rows_with_a_bos_that_is_no_target():
    plain, _ = prepare(TEXTS)
    shifted, _ = prepare(TEXTS, token_shift=True)
    for before, after in zip(plain, shifted, strict=True):
        assert after["input_ids"] == [BOS, *before["input_ids"]]
        assert after["labels"] == [-100, *before["labels"]]


def test_token_shift_adds_no_second_bos():
    ours, _ = prepare([{"input_ids": [BOS, 5, 6]}], token_shift=True)
    assert pairs(ours) == [([BOS, 5, 6], [-100, 5, 6])]


def test_token_shift_without_a_bos_never_targets_position_zero():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    ours, _ = prepare([{"input_ids": [5, 6, 7]}], tokenizer, token_shift=True)
    assert pairs(ours) == [([5, 6, 7], [-100, 6, 7])]


def test_preparing_twice_changes_nothing():
    once, _ = prepare(TEXTS, token_shift=True, max_length=8)
    twice, report = prepare_dataset(once, tiny_tokenizer(), RowRules(token_shift=True, max_length=8))
    assert pairs(twice) == pairs(once)
    assert report.truncated_rows == report.dropped_rows == 0


# ------------------------------------------------------------------------------------------------------------- lengths


def test_what_truncation_loses_is_counted():
    long = [{"input_ids": list(range(5, 5 + n))} for n in (3, 4, 9, 20)]
    ours, report = prepare(long, max_length=4)
    assert [len(row["input_ids"]) for row in ours] == [3, 4, 4, 4]
    assert (report.truncated_rows, report.truncated_tokens, report.dropped_rows) == (2, 21, 0)
    assert "2 cut at max_length, losing 21 tokens" in str(report)


def test_rows_without_a_target_are_dropped_and_counted():
    """A prompt as long as `max_length` leaves nothing to learn."""
    rows = [{"input_ids": [5] * 9, "labels": [-100] * 6 + [5] * 3}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    ours, report = prepare(rows, max_length=6)
    assert pairs(ours) == [([5, 6], [-100, 6])]
    assert ours["row_id"][:] == [0]
    assert (report.source_rows, report.rows, report.dropped_rows) == (2, 1, 1)
    assert "1 dropped because nothing in them is a target" in str(report)


def test_a_dataset_without_any_target_is_refused():
    with pytest.raises(ValueError, match="No row of the train dataset has a target"):
        prepare([{"input_ids": [5, 6], "labels": [-100, -100]}])


@pytest.mark.parametrize("length", [1, 4, 5, 8, 9, 23])
def test_chunks_lose_no_token(length):
    tokens = list(range(10, 10 + length))
    ours, report = prepare([{"input_ids": tokens}], max_length=4, truncation_mode="chunk", insert_eos=False)
    assert sum(ours["input_ids"][:], []) == tokens
    assert sum(ours["labels"][:], []) == tokens
    assert max(len(row["input_ids"]) for row in ours) <= 4
    assert (report.chunked_rows, report.truncated_tokens) == (int(length > 4), 0)


@pytest.mark.parametrize("bos", [True, False])
def test_chunks_under_token_shift_target_every_token_once(bos):
    tokenizer = tiny_tokenizer()
    if not bos:
        tokenizer.bos_token = None
    tokens = list(range(10, 31))
    ours, _ = prepare([{"input_ids": tokens}], tokenizer, max_length=5, truncation_mode="chunk", token_shift=True)
    targets = [label for row in ours for label in row["labels"] if label != -100]
    assert targets == (tokens if bos else tokens[1:])
    for row in ours:
        assert row["labels"][0] == -100 and len(row["input_ids"]) <= 5
        if bos:
            assert row["input_ids"][0] == BOS
    if not bos:  # a piece opens with the token before it, so that its first target has a neighbour to be read from
        assert [row["input_ids"][0] for row in ours][1:] == [row["input_ids"][-1] for row in ours][:-1]


def test_chunks_are_never_made_of_conversations():
    ours, report = prepare(CHATS, max_length=40, truncation_mode="chunk")
    assert report.chunked_rows == 0 and report.truncated_rows == 1
    assert len(ours) == 2


def test_no_limit_keeps_rows_as_they_are():
    ours, report = prepare([{"input_ids": list(range(5, 100))}], max_length=None)
    assert len(ours[0]["input_ids"]) == 95 and report.truncated_rows == 0


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "the"}, {"text": None}], "Row 1 of the train dataset has no text in column 'text'"),
        ([{"prompt": "the", "completion": None}], "Row 0 .* no text in column 'completion'"),
        ([{"story": "the"}], "has the columns story; it needs 'text'"),
        ([{"input_ids": [5, 6], "labels": [5]}], "Row 0 has 2 input_ids and 1 labels"),
        ([{"messages": []}], "Row 0 of the train dataset has no messages"),
    ],
)
def test_bad_rows_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        prepare(rows)


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="The train dataset is empty"):
        prepare_dataset(datasets.Dataset.from_dict({"text": []}), tiny_tokenizer(), RowRules())


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="pass `processing_class`"):
        prepare_dataset(datasets.Dataset.from_list(TEXTS), None, RowRules())


def test_conversations_without_a_template_are_refused():
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        prepare(CHATS, tiny_tokenizer())


def test_a_lazy_transform_is_refused():
    lazy = datasets.Dataset.from_list(TEXTS).with_transform(lambda rows: rows)
    with pytest.raises(ValueError, match="with_transform"):
        prepare_dataset(lazy, tiny_tokenizer(), RowRules())


# -------------------------------------------------------------------------------------------------- streams, processes


@pytest.mark.parametrize("rows, rules", [(TEXTS, {"max_length": 6}), (COMPLETIONS, {}), (CHATS, {}), (LABELLED, {})])
def test_a_stream_gives_the_same_rows(rows, rules):
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    streamed, report = prepare_dataset(stream, chat_tokenizer(), RowRules(**rules))
    assert report is None
    assert pairs(streamed) == pairs(prepare(rows, **rules)[0])


def test_several_processes_give_the_same_rows():
    dataset = datasets.Dataset.from_list(TEXTS * 2)
    several, report = prepare_dataset(dataset, tiny_tokenizer(), RowRules(max_length=6), num_proc=2)
    one, expected = prepare_dataset(dataset, tiny_tokenizer(), RowRules(max_length=6))
    assert pairs(several) == pairs(one) and report == expected


def test_a_second_preparation_comes_from_the_cache(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "the quick brown fox"}\n')
    fingerprints = []
    for _ in range(2):
        dataset = datasets.load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
        prepare_dataset(dataset, tiny_tokenizer(), RowRules())
        fingerprints.append(sorted(p.name for p in (tmp_path / "cache").rglob("cache-*.arrow")))
    assert fingerprints[0] and fingerprints[0] == fingerprints[1]


SECOND_TIME = """
import sys
from trl import DatasetMixtureConfig, ScriptArguments
from a2d_hf.data_mixture import load_training_data
from a2d_hf.trainers.dataset_preparation import prepare_dataset
from a2d_hf.trainers.row_tokenization import RowRules
from tests.trainers.test_dataset_preparation import chat_tokenizer
data = load_training_data(ScriptArguments(dataset_name=sys.argv[1]), DatasetMixtureConfig())
rows, _ = prepare_dataset(data.train, chat_tokenizer(), RowRules(max_length=64), num_proc=int(sys.argv[2]))
print(len(rows))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_another_process_finds_everything_in_the_cache(processes, tmp_path):
    """A mixture with a filter, pairs that become conversations, and the tokenizing: nothing is computed twice."""
    chats = [{"lang": "en"} | CHATS[i % 2] for i in range(4)] + [{"lang": "de"} | CHATS[0]]
    for name, rows in (("chats", chats), ("pairs", COMPLETIONS * 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = f"{tmp_path}/chats.jsonl[lang:en] + {tmp_path}/pairs.jsonl"
    written = []
    for seed in ("1", "2"):
        environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", SECOND_TIME, mixture, str(processes)]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and done.stdout.strip() == "8", done.stderr[-2000:]
        # What is read again leaves its file as it was; what is computed again would write it, or another.
        written.append({p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("cache-*.arrow")})
    assert len(written[0]) >= 4 and written[0] == written[1]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHATS[1]["messages"], "tools": '[{"name": "add"}]', "chat_template_kwargs": {"mood": "quick"}},
        CHAT_COMPLETIONS[1] | {"tools": '[{"name": "add"}]', "chat_template_kwargs": {"mood": "quick"}},
    ],
    ids=["messages", "completion"],
)
def test_tools_and_template_arguments_mean_what_they_mean_to_sft_trainer(row, tmp_path):
    template = (
        "{{ tools[0].name }} {{ mood }} {% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ours, _ = prepare([row], chat_tokenizer(template), assistant_only_loss=False)
    assert pairs(ours) == sft_rows([row], chat_tokenizer(template), tmp_path)


def test_common_prefix_length():
    assert common_prefix_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix_length([1], [1, 2]) == 1
    assert common_prefix_length([], [1]) == 0
