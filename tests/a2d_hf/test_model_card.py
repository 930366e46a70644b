"""The model card says what the manifest says, and goes to the Hub with the checkpoint."""

import json
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from a2d_hf.cli import main
from a2d_hf.conversion import convert
from a2d_hf.errors import BadInput
from a2d_hf.model_card import model_card, push_checkpoint


@pytest.fixture
def manifest():
    return {
        "a2d_hf_version": "9.9",
        "source": {
            "name": "org/parent",
            "model_type": "llama",
            "licence": "mit",
            "sha256": "ab" * 32,
            "files": {"a": 1},
        },
        "config": {"objective": "mdlm", "token_shift": True, "sliding_window": "keep", "seed": 3},
        "mask_token": {"token": "<|MASK|>", "id": 7, "strategy": "grow", "rows_before": 5, "rows_after": 64},
        "gates": {"identity": {"passed": True, "message": "Equal."}},
        "data": None,
        "training": None,
        "results": {},
        "versions": {"torch": "2"},
    }


def header(card):
    return yaml.safe_load(card.split("---")[1])


def test_header_names_parent_licence_and_library(manifest):
    found = header(model_card(manifest))
    assert found["base_model"] == "org/parent" and found["license"] == "mit"
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-generation"
    assert "mdlm" in found["tags"]


def test_a_local_parent_is_no_base_model_and_an_unknown_licence_is_said(manifest):
    manifest["source"] |= {"name": "my: folder", "licence": None}
    card = model_card(manifest)
    assert "base_model" not in header(card) and "license" not in header(card)
    assert "does not state its licence" in card


def test_an_untrained_model_is_called_that(manifest):
    assert "not yet trained" in model_card(manifest)
    manifest["training"] = {"steps": 1500, "rows_per_step": 8, "max_length": 512, "learning_rate": 1e-4}
    assert "trained for 1,500 steps" in model_card(manifest) and "Untrained" not in model_card(manifest)


def test_a_failed_gate_is_shown_as_one(manifest):
    manifest["gates"]["reach"] = {"passed": False, "message": "Closed."}
    assert "| reach | FAIL | Closed. |" in model_card(manifest)


def test_numbers_come_with_their_error(manifest):
    value = {"nats_per_token": 3.5171, "standard_error": 0.0264, "tokens": 8177}
    manifest["results"] = {"nelbo_after": value}
    assert "3.517 ± 0.026 | 8,177" in model_card(manifest)


class Hub:
    """Stands in for `HfApi` and remembers what it was asked."""

    def __init__(self, **kwargs):
        self.calls = []
        Hub.last = self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append(("create_repo", repo_id, private))
        return SimpleNamespace(repo_id=f"user/{repo_id}")

    def upload_folder(self, *, folder_path, repo_id, commit_message):
        names = sorted(path.name for path in folder_path.iterdir())
        self.calls.append(("upload_folder", repo_id, names, (folder_path / "README.md").read_text()))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


def test_push_uploads_everything_with_the_card(make_checkpoint, tmp_path, monkeypatch):
    run = convert(make_checkpoint("llama"), tmp_path / "run")
    monkeypatch.setattr("a2d_hf.model_card.HfApi", Hub)
    address = push_checkpoint(run.model_path, "my-model", private=True)
    assert address.startswith("https://huggingface.co/user/my-model")
    (_, _, private), (_, repo, names, card) = Hub.last.calls
    assert private is True and repo == "user/my-model"
    needed = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "modeling_a2d.py",
        "a2d_manifest.json",
        "README.md",
    }
    assert needed <= set(names)
    assert "## What was proven" in card and "## Licence" in card


def test_what_convert_did_not_write_is_not_pushed(make_checkpoint, monkeypatch):
    monkeypatch.setattr("a2d_hf.model_card.HfApi", Hub)
    with pytest.raises(BadInput, match="a2d_manifest.json"):
        push_checkpoint(make_checkpoint("llama"), "my-model")


def test_push_from_the_command_line_takes_a_run(make_checkpoint, tmp_path, monkeypatch, capsys):
    run = convert(make_checkpoint("llama"), tmp_path / "run")
    monkeypatch.setattr("a2d_hf.model_card.HfApi", Hub)
    capsys.readouterr()
    assert main(["push", str(run.path), "my-model", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["model"] == str(run.model_path) and said["commit"] == "https://huggingface.co/user/my-model/commit/1"
    assert Hub.last.calls[0] == ("create_repo", "my-model", None)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (LocalTokenNotFoundError("Token is required"), 2, "hf auth login"),
        (OfflineModeIsEnabled("offline"), 2, "HF_HUB_OFFLINE"),
        (HFValidationError("Repo id must not be empty\nmore"), 2, "REPO 'my-model' is no name of a repository"),
        (HfHubHTTPError("forbidden", response=SimpleNamespace(status_code=403, headers={}, request=None)), 2, "write"),
        (HfHubHTTPError("down", response=SimpleNamespace(status_code=502, headers={}, request=None)), 1, "status 502"),
        (ConnectionError("no route to host"), 1, "could not be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(error, code, said, make_checkpoint, tmp_path, monkeypatch, capsys):
    def refuse(self, repo_id, **kwargs):
        raise error

    run = convert(make_checkpoint("llama"), tmp_path / "run")
    monkeypatch.setattr("a2d_hf.model_card.HfApi", Hub)
    monkeypatch.setattr(Hub, "create_repo", refuse)
    capsys.readouterr()
    assert main(["push", str(run.path), "my-model"]) == code
    printed = capsys.readouterr().err
    assert said in printed and "Traceback" not in printed and printed.strip().count("\n") == 0


def test_the_snippet_on_the_card_runs(make_checkpoint, tmp_path, capsys):
    run = convert(make_checkpoint("llama"), tmp_path / "run")
    card = (run.model_path / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER_OR_REPO", str(run.model_path))
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.startswith("Once")
