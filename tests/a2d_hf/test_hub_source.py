"""A Hub id as the parent: the local cache as huggingface_hub lays it out, and downloads up to its doorstep."""

import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from a2d_hf.cli import main
from a2d_hf.conversion import convert
from a2d_hf.errors import BadInput
from a2d_hf.hub_source import wanted_files
from tests.conftest import tiny_model, tiny_tokenizer


COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fill(cache: Path, parent: Path, keep=lambda name: True) -> Path:
    """Puts a folder into the cache as `some/model`: blobs, and a snapshot of links to them."""
    root = cache / "models--some--model"
    names = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", names):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(parent.iterdir())):
        if keep(file.name):
            shutil.copyfile(file, root / "blobs" / f"{number:064x}")
            (names / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return names


@pytest.fixture
def parent(tmp_path) -> Path:
    folder = tmp_path / "parent"
    tiny_model("llama").save_pretrained(folder, max_shard_size="20kB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_cached_id_converts_and_shares_the_blobs(cache, parent, tmp_path):
    names = fill(cache, parent)
    run = convert("some/model", tmp_path / "run")
    assert run.manifest["source"]["name"] == "some/model"
    files = run.manifest["weights"]["files"]
    assert "linked" in files.values()
    for name, what in files.items():
        if what == "linked":
            assert os.path.samefile(run.model_path / name, (names / name).resolve())
            assert "blobs" in str((names / name).resolve())


def test_what_is_not_there_comes_with_both_ways_to_get_it(cache, tmp_path):
    with pytest.raises(BadInput, match="pass --download, or run `hf download some/model --include .*safetensors"):
        convert("some/model", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_cache_with_a_config_only_says_so_too(cache, parent, tmp_path):
    fill(cache, parent, keep=lambda name: not name.endswith(".safetensors"))
    with pytest.raises(BadInput, match="not there.*pass --download or run `hf download some/model"):
        convert("some/model", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_download_fetches_what_is_needed_and_nothing_twice(cache, parent, tmp_path, monkeypatch):
    extra = ["pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx"]
    listed = [*(file.name for file in parent.iterdir()), *extra]
    asked = {}

    from_cache = huggingface_hub.snapshot_download

    def snapshot_download(repo_id, local_files_only=False, **kwargs):
        if local_files_only:
            return from_cache(repo_id, local_files_only=True)
        asked.update(kwargs, repo_id=repo_id)
        return str(fill(cache, parent))

    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, repo_id: listed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert main(["convert", "some/model", "--out", str(tmp_path / "run"), "--download"]) == 0
    assert asked["repo_id"] == "some/model"
    filtered = huggingface_hub.utils.filter_repo_objects(
        listed, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert set(filtered) == {file.name for file in parent.iterdir()}


def test_a_whole_cache_makes_no_request(cache, parent, tmp_path, monkeypatch):
    fill(cache, parent)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, repo_id: pytest.fail("asked the Hub"))
    assert convert("some/model", tmp_path / "run", download=True).status == "completed"


def test_pickles_only_where_there_is_nothing_else():
    assert "pytorch_model*.bin" in wanted_files(["config.json", "pytorch_model.bin"])
    assert "pytorch_model*.bin" not in wanted_files(["pytorch_model.bin", "model-00001-of-00002.safetensors"])


def failing(kind):
    error = kind.__new__(kind)
    error.args = ("It did not work",)
    return error


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (GatedRepoError, "is gated: accept its terms at https://huggingface.co/some/model"),
        (RepositoryNotFoundError, "is not on the Hub, or private"),
        (OfflineModeIsEnabled, "could not be downloaded: It did not work"),
        (OSError, "could not be downloaded"),
    ],
)
def test_a_download_that_fails_is_one_sentence(cache, tmp_path, monkeypatch, kind, words):
    def fail(self, repo_id):
        raise failing(kind)

    monkeypatch.setattr(HfApi, "list_repo_files", fail)
    with pytest.raises(BadInput, match=words) as caught:
        convert("some/model", tmp_path / "run", download=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
