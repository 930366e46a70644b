"""The mask token, told from a tokenizer's files, is the one that a conversion really chooses."""

import json
from pathlib import Path

import pytest

from a2d_hf.detection.mask_token import choose_mask_token, plan_mask_token


def words(count: int, *more: str) -> dict[str, int]:
    return {name: i for i, name in enumerate([*(f"w{i}" for i in range(count)), *more])}


@pytest.mark.parametrize(
    ("vocabulary", "roles", "rows", "expected"),
    [
        (words(10, "<mask>"), {"mask_token": "<mask>"}, 16, ("tokenizer", 10, 16)),
        (words(10, "<mask>"), {"mask_token": "<mask>", "pad_token": "<mask>"}, 16, ("free_row", 11, 16)),
        (words(10, "<mask>"), {"mask_token": "<mask>"}, 10, ("tokenizer", 10, 64)),
        (words(10), {"eos_token": "w9"}, 16, ("free_row", 10, 16)),
        (words(10, "<unused1>", "<unused0>"), {}, 12, ("reserved", 10, 12)),
        (words(10, "<unused0>", "<unused1>"), {"pad_token": "<unused0>"}, 12, ("reserved", 11, 12)),
        (words(10, "<|reserved_special_token_0|>"), {}, 11, ("reserved", 10, 11)),
        (words(10), {}, 10, ("grow", 10, 64)),
        (words(64), {}, 64, ("grow", 64, 128)),
        (words(64), {}, 60, ("grow", 64, 128)),
    ],
)
def test_the_policy(vocabulary: dict, roles: dict, rows: int, expected: tuple):
    found = choose_mask_token(vocabulary, roles, rows)
    assert (found.strategy, found.id, found.rows) == expected


def test_the_new_token_has_a_name_that_is_free():
    assert choose_mask_token(words(3), {}, 8).token == "<|MASK|>"
    assert choose_mask_token(words(3, "<|MASK|>"), {}, 8).token == "<|MASK_1|>"


REAL = {
    "qwen3": (151936, "free_row", 151669, 151936),
    "gpt2": (50257, "grow", 50257, 50304),
    "phi-3-mini": (32064, "free_row", 32011, 32064),
    "pythia": (50432, "free_row", 50278, 50432),
    "sdar_qwen3_with_mask": (151936, "tokenizer", 151669, 151936),
}


@pytest.mark.real_data
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_from_their_files(real_data: Path, name: str):
    rows, *expected = REAL[name]
    found = plan_mask_token(real_data / "tokenizers" / name, rows)
    assert [found.strategy, found.id, found.rows] == expected


@pytest.mark.real_data
@pytest.mark.parametrize("name", REAL)
def test_the_files_tell_what_the_conversion_does(real_data: Path, name: str):
    from transformers import AutoTokenizer

    from a2d_hf.modeling.mask_token import choose_mask_token as choose_from_tokenizer

    folder, rows = real_data / "tokenizers" / name, REAL[name][0]
    if name == "sdar_qwen3_with_mask":  # its tokenizer_config names remote code, which the native class replaces
        from transformers import Qwen2Tokenizer

        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    chosen = choose_from_tokenizer(tokenizer, rows)
    planned = plan_mask_token(folder, rows)
    assert (planned.strategy, planned.id, planned.token, planned.rows) == (
        chosen.strategy, chosen.id, chosen.token, chosen.rows_after
    )  # fmt: skip


def test_both_policies_know_the_same_reserved_tokens():
    from a2d_hf.detection import mask_token as from_files
    from a2d_hf.modeling import mask_token as from_tokenizer

    assert (from_files.RESERVED, from_files.ROW_MULTIPLE) == (from_tokenizer.RESERVED, from_tokenizer.ROW_MULTIPLE)
    assert from_files.MASK_TOKEN == from_tokenizer.MASK_TOKEN


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.model": "a SentencePiece model"},
        {"tokenizer.json": "{"},
        {"tokenizer.json": "[]"},
        {"tokenizer.json": '{"model": {"vocab": {"a": "b"}}}'},
        {"tokenizer.json": '{"model": {"vocab": {"a": 0}}}', "tokenizer_config.json": '{"pad_token": "<new>"}'},
        {"tokenizer.json": '{"model": {"vocab": {"a": 0}}}', "tokenizer_config.json": '{"pad_token": 3}'},
        {"tokenizer.json": '{"model": {"vocab": {}}}'},
    ],
)
def test_undetermined_where_only_a_tokenizer_could_tell(tmp_path: Path, files: dict):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert plan_mask_token(tmp_path, 100).strategy == "undetermined"


def test_merges_are_skipped_and_a_token_called_merges_is_not(tmp_path: Path):
    vocabulary = {"merges": 0, 'say "merges": [': 1, "b": 2}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    whole = {"added_tokens": [{"id": 3, "content": "<x>"}], "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    found = plan_mask_token(tmp_path, 8)
    assert (found.strategy, found.id) == ("free_row", 4)


def test_a_unigram_vocabulary_is_a_list(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}))
    assert plan_mask_token(tmp_path, 8).id == 2
