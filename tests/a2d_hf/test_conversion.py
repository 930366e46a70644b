"""A whole conversion on a tiny model: what it leaves behind, and that the same input gives the same bytes."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from a2d_hf.conversion import convert
from a2d_hf.errors import BadInput, GateFailed, Refused, SaveFailed
from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion
from a2d_hf.run_directory import RunDirectory, read_events


STORY = "The quick dog jumps over the lazy fox.\nA model reads from left to right, one word at a time.\n\n"
QUICK = {"max_steps": 4, "batch_size": 2, "max_length": 32, "device": "cpu", "learning_rate": 1e-3}


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(STORY * 12)
    return path


def tree(folder):
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_surgery_leaves_a_whole_checkpoint(make_checkpoint, tmp_path):
    run = convert(make_checkpoint("llama"), tmp_path / "run")
    assert run.manifest["status"] == "completed"
    assert run.manifest["stage"] == "converted"
    assert all(gate["passed"] for gate in run.manifest["gates"].values())
    assert set(run.manifest["gates"]) == {"mask_row", "identity", "reach"}
    assert run.manifest["gates"]["identity"]["detail"]["max_abs_diff"] == 0.0
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "a2d_manifest.json",
            "README.md", "modeling_a2d.py"} <= {p.name for p in run.model_path.iterdir()}  # fmt: skip
    assert sorted(p.name for p in run.path.iterdir()) == ["events.jsonl", "manifest.json", "model"]


def test_the_manifest_says_everything(make_checkpoint, tmp_path, story):
    run = convert(make_checkpoint("llama"), tmp_path / "run", data=story, **QUICK)
    manifest = json.loads(run.manifest_path.read_text())
    assert manifest == run.manifest
    assert len(manifest["source"]["sha256"]) == 64 and "model.safetensors" in manifest["source"]["files"]
    assert manifest["capabilities"] and manifest["versions"]["transformers"] and manifest["hardware"]["cpus"]
    assert manifest["config"]["seed"] == 0 and manifest["config"]["max_steps"] == 4
    assert manifest["data"]["sha256"] and manifest["data"]["train"]["rows"] > 0
    assert manifest["data"]["train"]["truncated_rows"] == manifest["data"]["train"]["dropped_rows"] == 0
    assert manifest["training"]["steps"] == 4
    assert set(manifest["results"]) == {"parent_nll", "nelbo_before", "nelbo_after"}


def test_untrained_weights_are_the_parents_to_the_last_bit(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    run = convert(folder, tmp_path / "run")
    before, after = load_file(folder / "model.safetensors"), load_file(run.model_path / "model.safetensors")
    assert set(before) == set(after)
    mask = run.manifest["mask_token"]
    for name, tensor in before.items():
        kept = after[name][: tensor.shape[0]]
        differing = (kept != tensor).reshape(tensor.shape[0], -1).any(-1).nonzero().flatten().tolist()
        assert differing in ([], [mask["id"]]), name


def test_precision_is_kept_tensor_by_tensor(make_checkpoint, tmp_path, story):
    folder = make_checkpoint("llama")
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    for data in (None, story):
        run = convert(folder, tmp_path / f"run-{data is None}", data=data, **QUICK)
        saved = load_file(run.model_path / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
        assert json.loads((run.model_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_training_moves_every_parameter(make_checkpoint, tmp_path, story):
    folder = make_checkpoint("llama")
    plain = convert(folder, tmp_path / "plain")
    trained = convert(folder, tmp_path / "trained", data=story, **QUICK)
    before = load_file(plain.model_path / "model.safetensors")
    for name, tensor in load_file(trained.model_path / "model.safetensors").items():
        assert not torch.equal(tensor, before[name]), f"{name} has not changed"


def test_the_same_conversion_gives_the_same_bytes(make_checkpoint, tmp_path, story):
    folder = make_checkpoint("llama")
    first, second = (convert(folder, tmp_path / name, data=story, **QUICK) for name in ("a", "b"))
    assert tree(first.model_path) == tree(second.model_path)
    assert tree(first.eval_path) == tree(second.eval_path)


def test_another_seed_gives_other_weights(make_checkpoint, tmp_path, story):
    folder = make_checkpoint("llama")
    first, second = (convert(folder, tmp_path / str(seed), data=story, seed=seed, **QUICK) for seed in (0, 1))
    assert tree(first.model_path)["model.safetensors"] != tree(second.model_path)["model.safetensors"]


def test_manifest_in_the_checkpoint_has_no_path_and_no_time(make_checkpoint, tmp_path, story):
    run = convert(make_checkpoint("llama"), tmp_path / "run", data=story, **QUICK)
    text = (run.model_path / "a2d_manifest.json").read_text() + (run.model_path / "README.md").read_text()
    assert str(tmp_path) not in text
    assert run.manifest["created_at"][:10] not in text


def test_the_run_loads_with_auto_model_and_decodes(make_checkpoint, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    run = convert(make_checkpoint("llama"), tmp_path / "run", token_shift=True)
    model = AutoModel.from_pretrained(run.model_path)
    tokenizer = AutoTokenizer.from_pretrained(run.model_path)
    assert isinstance(model, A2DForMaskedDiffusion) and model.config.token_shift
    assert tokenizer.mask_token_id == model.config.mask_token_id == run.manifest["mask_token"]["id"]
    ids = model.diffusion_generate(**tokenizer("the dog", return_tensors="pt"), max_new_tokens=5)
    assert tokenizer.mask_token_id not in ids


def test_events_tell_the_story_in_order(make_checkpoint, tmp_path, story):
    run = convert(make_checkpoint("llama"), tmp_path / "run", data=story, save_steps=2, **QUICK)
    events, skipped = read_events(run.path / "events.jsonl")
    assert skipped == 0
    assert [event["seq"] for event in events] == list(range(len(events)))
    names = [event["event"] for event in events]
    assert names[0] == "run_started" and names[-1] == "run_completed"
    assert [e["name"] for e in events if e["event"] == "gate"] == ["mask_row", "identity", "reach"]
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [2, 4]
    steps = [e for e in events if e["event"] == "train_step"]
    assert [e["step"] for e in steps] == [1, 2, 3, 4] and all(e["loss"] > 0 and e["nelbo"] > 0 for e in steps)


def test_held_out_rows_are_kept_and_never_trained_on(make_checkpoint, tmp_path):
    rows = [{"text": f"the dog number {i}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = convert(make_checkpoint("llama"), tmp_path / "run", data=tmp_path / "rows.jsonl", held_out=0.2, **QUICK)
    kept = [json.loads(line) for line in run.held_out_path.read_text().splitlines()]
    assert len(kept) == run.manifest["data"]["held_out"]["rows"] == 4
    assert run.manifest["data"]["train"]["rows"] == 16


def test_nothing_held_out_where_nothing_is_wanted(make_checkpoint, tmp_path, story):
    run = convert(make_checkpoint("llama"), tmp_path / "run", data=story, held_out=0.0, **QUICK)
    assert run.manifest["results"] == {} and run.manifest["data"]["held_out"] is None


class TestFailedGate:
    """A sabotaged model must not get past its gate, and must leave nothing but the manifest that says so."""

    @pytest.fixture
    def run_path(self, make_checkpoint, tmp_path, story, monkeypatch):
        from a2d_hf import surgery

        operate = surgery.operate

        def sabotaged(*args):
            operation = operate(*args)
            with torch.no_grad():
                next(operation.model.backbone.model.layers[0].parameters()).add_(1e-3)
            return operation

        monkeypatch.setattr(surgery, "operate", sabotaged)
        with pytest.raises(GateFailed, match="identity gate failed") as caught:
            convert(make_checkpoint("llama"), tmp_path / "run", data=story, **QUICK)
        assert caught.value.exit_code == 1
        return tmp_path / "run"

    def test_nothing_was_trained_or_saved(self, run_path):
        assert sorted(p.name for p in run_path.iterdir()) == ["events.jsonl", "manifest.json"]
        assert "train_step" not in (run_path / "events.jsonl").read_text()

    def test_the_manifest_says_which_gate_and_why(self, run_path):
        manifest = RunDirectory.open(run_path).manifest
        assert manifest["status"] == "failed" and "identity" in manifest["error"]
        assert manifest["gates"]["identity"]["passed"] is False
        assert "reach" not in manifest["gates"]


class TestFullDisk:
    """A disk that fills up while something is saved: one sentence, the run says so, and nothing is half there."""

    def test_while_the_model_is_saved(self, make_checkpoint, tmp_path, monkeypatch):
        def full(self, *args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("a2d_hf.zero_copy.rewrite_file", full)
        with pytest.raises(SaveFailed, match="No space left to write .*model"):
            convert(make_checkpoint("llama"), tmp_path / "run")
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["events.jsonl", "manifest.json"]
        assert RunDirectory.open(tmp_path / "run").manifest["status"] == "failed"

    def test_while_a_checkpoint_is_saved_the_run_can_go_on(self, make_checkpoint, tmp_path, story, monkeypatch):
        from a2d_hf.conversion import resume
        from a2d_hf.trainers.mdlm_trainer import MDLMTrainer

        whole = convert(make_checkpoint("llama"), tmp_path / "whole", data=story, **QUICK)

        def full(self, *args):
            raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")

        with monkeypatch.context() as patch:
            patch.setattr(MDLMTrainer, "_save_checkpoint", full)
            with pytest.raises(SaveFailed, match="No space left to write .*checkpoints"):
                convert(tmp_path / "ar-llama", tmp_path / "run", data=story, **QUICK)
        assert RunDirectory.open(tmp_path / "run").manifest["status"] == "failed"
        again = resume(tmp_path / "run")
        assert tree(again.model_path) == tree(whole.model_path)

    def test_a_read_only_target(self, make_checkpoint, tmp_path, monkeypatch):
        # As root nothing is read-only: answer the first write as a read-only file system would.
        def read_only(*args, **kwargs):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr("pathlib.Path.mkdir", read_only)
        with pytest.raises(SaveFailed, match="cannot be written"):
            convert(make_checkpoint("llama"), tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestBadInput:
    """Bad input is one sentence, and nothing is written: not even the run directory."""

    @pytest.fixture
    def refused(self, tmp_path):
        def check(source, word, kind=BadInput, out=None, **settings):
            out = out or tmp_path / "never"
            with pytest.raises(kind, match=word) as caught:
                convert(source, out, **settings)
            assert "\n" not in str(caught.value)
            assert not (tmp_path / "never").exists()

        return check

    def test_missing_path(self, refused, tmp_path):
        refused(tmp_path / "none", "does not exist")

    def test_a_file(self, refused, tmp_path, story):
        refused(story, "is a file")

    @pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
    def test_bad_config(self, refused, make_checkpoint, content):
        folder = make_checkpoint("llama")
        (folder / "config.json").write_text(content)
        refused(folder, "config.json")

    def test_truncated_weights(self, refused, make_checkpoint):
        folder = make_checkpoint("llama")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        refused(folder, "truncated")

    def test_weights_of_another_shape(self, refused, make_checkpoint):
        folder = make_checkpoint("llama")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
        refused(folder, "cannot be loaded")

    def test_weights_that_lack_a_tensor(self, refused, make_checkpoint):
        folder = make_checkpoint("llama")
        weights = load_file(folder / "model.safetensors")
        weights.pop("model.norm.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        refused(folder, "lack 1 tensor.*model.norm.weight")

    def test_a_pickle_that_would_run_code(self, refused, make_checkpoint, tmp_path):
        folder = make_checkpoint("llama")
        (folder / "model.safetensors").unlink()
        torch.save({"a": Bomb(tmp_path / "bomb")}, folder / "pytorch_model.bin")
        refused(folder, "holds more than tensors")
        assert not (tmp_path / "bomb").exists()

    def test_no_tokenizer(self, refused, make_checkpoint):
        refused(make_checkpoint("llama", with_tokenizer=False), "no tokenizer")

    def test_a_broken_tokenizer(self, refused, make_checkpoint):
        folder = make_checkpoint("llama")
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        refused(folder, "tokenizer in .* cannot be loaded")

    def test_out_is_not_empty(self, refused, make_checkpoint, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
        refused(make_checkpoint("llama"), "not empty", out=tmp_path / "out")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]

    def test_folders_made_on_the_way_to_out_go_too(self, tmp_path):
        with pytest.raises(BadInput):
            convert(tmp_path / "none", tmp_path / "deep" / "er" / "out")
        assert not (tmp_path / "deep").exists()

    def test_an_empty_out_folder_stays(self, make_checkpoint, tmp_path):
        (tmp_path / "out").mkdir()
        with pytest.raises(BadInput):
            convert(tmp_path / "none", tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []

    def test_data_without_text(self, refused, make_checkpoint, tmp_path):
        (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"nothing": 1}\n')
        refused(make_checkpoint("llama"), "line 2 has no text", data=tmp_path / "bad.jsonl")

    def test_missing_data(self, refused, make_checkpoint, tmp_path):
        refused(make_checkpoint("llama"), "does not exist", data=tmp_path / "none.txt")

    def test_rows_longer_than_the_context(self, refused, make_checkpoint, tmp_path):
        row = {"prompt": "the dog", "completion": " jumps over the lazy fox" * 100}
        (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
        refused(make_checkpoint("llama"), "longer than the model's context of 128", data=tmp_path / "long.jsonl")

    def test_a_model_that_does_not_convert(self, refused, make_checkpoint):
        folder = make_checkpoint("llama")
        (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
        refused(folder, "does not convert", kind=Refused)

    def test_a_model_that_needs_remote_code(self, refused, make_checkpoint):
        folder = make_checkpoint("llama")
        config = {"model_type": "mine", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MForCausalLM"]}))
        refused(folder, "--trust-remote-code", kind=Refused)

    def test_a_mask_token_id_outside_the_vocabulary(self, refused, make_checkpoint):
        refused(make_checkpoint("llama"), "mask_token_id", mask_token_id=100_000)


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3_text", "mixtral"])
def test_other_families_convert_and_train(make_checkpoint, tmp_path, story, family):
    run = convert(make_checkpoint(family), tmp_path / "run", data=story, **QUICK)
    assert run.manifest["status"] == "completed" and run.manifest["training"]["steps"] == 4


def test_weights_as_a_pickle_of_tensors_convert(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    run = convert(folder, tmp_path / "run")
    assert run.manifest["source"]["files"].keys() >= {"pytorch_model.bin"}
    assert (run.model_path / "model.safetensors").is_file()
