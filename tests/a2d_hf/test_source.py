"""The parent's folder: every way in which it can be incomplete is found before anything is loaded."""

import hashlib
import json
import shutil

import pytest
import torch

from a2d_hf.errors import BadInput
from a2d_hf.source import inspect_source, read_licence


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.fixture
def sharded(make_checkpoint, make_tiny_model):
    folder = make_checkpoint("llama", name="sharded")
    (folder / "model.safetensors").unlink()
    make_tiny_model("llama").save_pretrained(folder, max_shard_size="20kB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_a_good_folder_passes(make_checkpoint):
    source = inspect_source(make_checkpoint("llama"))
    assert source.weights == ["model.safetensors"]
    assert source.name == "ar-llama"
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= set(source.files)


def test_the_hash_covers_every_shard(sharded):
    source = inspect_source(sharded)
    before = source.fingerprint()
    assert set(source.weights) == set(index_of(sharded)["weight_map"].values())
    last = sharded / source.weights[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    after = inspect_source(sharded).fingerprint()
    assert after["sha256"] != before["sha256"]
    changed = [name for name in before["files"] if before["files"][name] != after["files"][name]]
    assert changed == [last.name]


def test_the_hash_is_the_documented_one(make_checkpoint):
    source = inspect_source(make_checkpoint("llama"))
    seen = []
    found = source.fingerprint(seen.append)
    lines = ""
    for name in sorted(source.files):
        lines += hashlib.sha256((source.path / name).read_bytes()).hexdigest() + "  " + name + "\n"
    assert found["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert sum(seen) == source.bytes


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json"])
def test_the_hash_covers_what_is_not_weights(make_checkpoint, file):
    folder = make_checkpoint("llama")
    before = inspect_source(folder).fingerprint()["sha256"]
    path = folder / file
    path.write_text(path.read_text() + " ")
    assert inspect_source(folder).fingerprint()["sha256"] != before


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "no config.json"),
        ("", "is empty"),
        ("{", "not JSON"),
        ("[1]", "no JSON object"),
        ("{}", "no `model_type`"),
        ('{"model_type": 3}', "no `model_type`"),
    ],
)
def test_bad_config(make_checkpoint, content, word):
    folder = make_checkpoint("llama")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(BadInput, match=word):
        inspect_source(folder)


def test_missing_path_and_file_instead_of_folder(tmp_path):
    with pytest.raises(BadInput, match="SRC .* does not exist"):
        inspect_source(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        inspect_source(tmp_path / "file")


def test_a_hub_id_that_is_not_cached_prints_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match="hf download some/model"):
        inspect_source("some/model")


def test_no_weights(make_checkpoint):
    folder = make_checkpoint("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="no weights"):
        inspect_source(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(make_checkpoint, keep):
    path = make_checkpoint("llama") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadInput, match="truncated"):
        inspect_source(path.parent)


def test_corrupt_header(make_checkpoint):
    path = make_checkpoint("llama") / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="corrupt"):
        inspect_source(path.parent)


def test_index_naming_an_absent_shard(sharded):
    (sharded / inspect_source(sharded).weights[1]).unlink()
    with pytest.raises(BadInput, match="names model-00002-of"):
        inspect_source(sharded)


def test_index_putting_a_tensor_into_the_wrong_shard(sharded):
    index = index_of(sharded)
    first, last = sorted(set(index["weight_map"].values()))[0], sorted(set(index["weight_map"].values()))[-1]
    tensor = next(name for name, shard in index["weight_map"].items() if shard == last)
    index["weight_map"][tensor] = first
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="does not hold it"):
        inspect_source(sharded)


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[]"])
def test_bad_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BadInput, match="not a weight index"):
        inspect_source(sharded)


def test_truncated_pickle(make_checkpoint):
    folder = make_checkpoint("llama")
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(100)}, folder / "pytorch_model.bin")
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match="truncated"):
        inspect_source(folder)


def test_no_tokenizer(make_checkpoint):
    with pytest.raises(BadInput, match="no tokenizer"):
        inspect_source(make_checkpoint("llama", with_tokenizer=False))


def test_symlinked_folders_are_followed(make_checkpoint, tmp_path):
    # Hub snapshots are made of symbolic links.
    folder = make_checkpoint("llama")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert inspect_source(snapshot).fingerprint()["sha256"] == inspect_source(folder).fingerprint()["sha256"]


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- x\n---\n# Model", "apache-2.0"),
        ('---\ntags: []\nlicense: "mit"  \n---\n', "mit"),
        ("# license: none\n", None),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
    ],
)
def test_licence_is_read_from_the_card(tmp_path, card, licence):
    (tmp_path / "README.md").write_text(card)
    assert read_licence(tmp_path) == licence


def test_a_copy_elsewhere_has_the_same_hash(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    shutil.copytree(folder, tmp_path / "copy")
    assert inspect_source(tmp_path / "copy").fingerprint() == inspect_source(folder).fingerprint()
