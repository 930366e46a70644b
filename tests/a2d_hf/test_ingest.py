"""Parents as people really have them: pickled, sharded, misdescribed, with tensors too many or too few."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from a2d_hf import ingest, ingest_tensors
from a2d_hf.cli import main
from a2d_hf.console import Console
from a2d_hf.conversion import convert, resume
from a2d_hf.ingest import prepared_source
from a2d_hf.source import inspect_source
from tests.conftest import tiny_model


SAFETENSORS = "model.safetensors"


def weights_of(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def restate(folder, **fields):
    """Changes config.json; `None` takes a field away."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewrite(folder, weights):
    save_file(weights, folder / SAFETENSORS, metadata={"format": "pt"})


def pickled(folder, shards=1, **how):
    """Turns a checkpoint into `.bin` files as `torch.save` wrote them: tied weights twice, in one storage."""
    weights = load_file(folder / SAFETENSORS)
    (folder / SAFETENSORS).unlink()
    if json.loads((folder / "config.json").read_text())["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin", **how)
        return weights
    placed = {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {key: weights[key] for key in sorted(weights)[number::shards]}
        placed |= dict.fromkeys(part, name)
        torch.save(part, folder / name, **how)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return weights


def prepare(folder, tmp_path):
    return prepared_source(inspect_source(folder), tmp_path / "staging", Console())


def assert_same_but_for_the_mask(run, expected):
    written, mask = weights_of(run.model_path), run.manifest["mask_token"]["id"]
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype, name
        differing = (tensor != expected[name]).reshape(tensor.shape[0], -1).any(-1).nonzero().flatten().tolist()
        assert differing in ([], [mask]), name


def test_a_plain_checkpoint_is_returned_as_it_is(make_checkpoint, tmp_path):
    source = inspect_source(make_checkpoint("llama"))
    found, record = prepared_source(source, tmp_path / "staging", Console())
    assert found is source and record["actions"] == [] and not (tmp_path / "staging").exists()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_pickled_weights_become_safetensors(family, shards, make_checkpoint, tmp_path):
    folder = make_checkpoint(family)
    expected = load_file(folder / SAFETENSORS)
    pickled(folder, shards)
    run = convert(folder, tmp_path / "run")
    assert_same_but_for_the_mask(run, expected)
    assert run.manifest["ingest"]["format"] == "pytorch"
    assert any(name.startswith("pytorch_model") for name in run.manifest["source"]["files"])
    assert sorted(path.name for path in run.path.iterdir()) == ["events.jsonl", "manifest.json", "model"]


@pytest.mark.parametrize("how", ["old", "transposed"])
def test_pickles_that_cannot_be_read_in_parts_are_loaded(how, make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    expected = load_file(folder / SAFETENSORS)
    if how == "old":
        pickled(folder, _use_new_zipfile_serialization=False)
    else:
        pickled(folder)
        torch.save({k: v.T.contiguous().T for k, v in expected.items()}, folder / "pytorch_model.bin")
    found, _ = prepare(folder, tmp_path)
    written = weights_of(found.path)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_what_is_staged_is_sharded_and_loads_into_the_parents_class(make_checkpoint, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint("qwen2")
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    pickled(folder)
    write = ingest_tensors.write_sharded
    monkeypatch.setattr(ingest, "write_sharded", lambda *given: write(*given, shard_bytes=20_000))
    found, _ = prepare(folder, tmp_path)
    assert len(found.weights) > 2 and "model.safetensors.index.json" in found.files
    model, report = AutoModelForCausalLM.from_pretrained(found.path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_the_fingerprint_stays_that_of_the_parents_own_files(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    pickled(folder)
    source = inspect_source(folder)
    found, _ = prepared_source(source, tmp_path / "staging", Console())
    assert found.fingerprint() == source.fingerprint()
    assert (found.name, found.licence) == (source.name, source.licence) and found.path != source.path


@pytest.mark.parametrize("stated", [None, "float32"])
def test_what_is_stored_wins_over_what_the_configuration_states(stated, make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    expected = {name: tensor.bfloat16() for name, tensor in load_file(folder / SAFETENSORS).items()}
    rewrite(folder, expected)
    restate(folder, dtype=stated)
    run = convert(folder, tmp_path / "run")
    assert_same_but_for_the_mask(run, expected)
    assert run.manifest["ingest"]["dtype"]["used"] == "bfloat16"
    assert any("bfloat16" in action for action in run.manifest["ingest"]["actions"])
    assert json.loads((run.model_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_nothing_is_rounded_by_a_configuration_that_states_too_little(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    restate(folder, dtype="bfloat16")
    run = convert(folder, tmp_path / "run")
    assert_same_but_for_the_mask(run, load_file(folder / SAFETENSORS))


def test_a_misdescribed_checkpoint_is_linked_not_copied(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    restate(folder, dtype="float16")
    found, _ = prepare(folder, tmp_path)
    assert (found.path / SAFETENSORS).is_symlink()
    assert (found.path / SAFETENSORS).resolve() == (folder / SAFETENSORS).resolve()


def test_mixed_precisions_are_kept_and_said(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    pickled(folder)
    weights = {
        name: tensor if "norm" in name else tensor.bfloat16()
        for name, tensor in torch.load(folder / "pytorch_model.bin").items()
    }
    torch.save(weights, folder / "pytorch_model.bin")
    restate(folder, dtype="bfloat16")
    found, record = prepare(folder, tmp_path)
    assert {name: tensor.dtype for name, tensor in weights_of(found.path).items()} == {
        name: tensor.dtype for name, tensor in weights.items()
    }
    assert set(record["dtype"]["stored"]) == {"bfloat16", "float32"}
    assert any("several precisions" in action for action in record["actions"])


def test_a_checkpoint_of_mixed_precision_converts_to_the_bit(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    weights = {
        name: tensor + 0.001 if "norm" in name else tensor.bfloat16()
        for name, tensor in load_file(folder / SAFETENSORS).items()
    }
    rewrite(folder, weights)
    restate(folder, dtype="bfloat16")
    assert_same_but_for_the_mask(convert(folder, tmp_path / "run"), weights)


def test_tied_weights_stored_twice_and_equal_are_kept_once(make_checkpoint, tmp_path):
    folder = make_checkpoint("qwen2")
    pickled(folder)
    found, record = prepare(folder, tmp_path)
    assert record["tied_twice"] == {"lm_head.weight": "equal"}
    assert "lm_head.weight" not in weights_of(found.path)


def test_tied_weights_that_differ_are_kept_apart_as_transformers_does(make_checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion

    folder = make_checkpoint("qwen2")
    weights = load_file(folder / SAFETENSORS)
    rewrite(folder, weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 0.5})
    parent = AutoModelForCausalLM.from_pretrained(folder).eval()
    run = convert(folder, tmp_path / "run")
    assert run.manifest["ingest"]["tied_twice"] == {"lm_head.weight": "different"}
    model = A2DForMaskedDiffusion.from_pretrained(run.model_path).eval()
    assert model.config.tie_word_embeddings is False
    ids = torch.randint(4, 100, (1, 20))
    with torch.no_grad():
        ours = model(input_ids=ids, attention_pattern="causal").logits
        assert torch.equal(ours[..., :120], parent(input_ids=ids).logits[..., :120])


@pytest.mark.parametrize("form", ["pickle", "safetensors"])
def test_tensors_too_many_are_counted_and_named(form, make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    extra |= {"v_head.summary.weight": torch.ones(1, 32), "model.layers.2.mtp.weight": torch.ones(3)}
    expected = load_file(folder / SAFETENSORS)
    rewrite(folder, expected | extra)
    if form == "pickle":
        pickled(folder)
    run = convert(folder, tmp_path / "run")
    # Plain files are shared with the parent's folder as they are; what is written anew has no use for them.
    assert_same_but_for_the_mask(run, expected if form == "pickle" else expected | extra)
    assert run.manifest["ingest"]["unused"] == {
        "tensors": 4,
        "bytes": sum(tensor.nbytes for tensor in extra.values()),
        "names": {
            "model.layers.*.mtp.weight": 1,
            "model.layers.*.self_attn.rotary_emb.inv_freq": 2,
            "v_head.summary.weight": 1,
        },
    }


def test_safetensors_are_taken_where_both_are_there(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    torch.save({"model.embed_tokens.weight": torch.ones(1)}, folder / "pytorch_model.bin")
    found, record = prepare(folder, tmp_path)
    assert found.weights == [SAFETENSORS] and "left aside" in record["actions"][0]


def test_a_tensor_too_few_is_bad_input_from_the_command_line(make_checkpoint, tmp_path, capsys):
    folder = make_checkpoint("llama")
    weights = pickled(folder)
    del weights["model.norm.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    assert main(["convert", str(folder), "--out", str(tmp_path / "run")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and "model.norm.weight" in errors[0]
    assert not (tmp_path / "run").exists()


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("form", ["archive", "plain pickle"])
def test_a_pickle_that_holds_code_is_refused_and_not_run(form, make_checkpoint, tmp_path, capsys):
    folder = make_checkpoint("llama")
    weights = pickled(folder)
    if form == "archive":
        torch.save(weights | {"x": Harmful()}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Harmful()}))
    assert main(["convert", str(folder), "--out", str(tmp_path / "run")]) == 2
    output = capsys.readouterr()
    assert "run" not in output.out.split() and "could run code" in output.err
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_no_staging(make_checkpoint, tmp_path, monkeypatch):
    from a2d_hf.errors import SaveFailed

    folder = make_checkpoint("llama")
    pickled(folder)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ingest, "write_sharded", full)
    with pytest.raises(SaveFailed, match="No space left"):
        convert(folder, tmp_path / "run")
    assert not (tmp_path / "run" / ".ingest").exists()
    monkeypatch.undo()
    assert resume(tmp_path / "run").status == "completed"


def test_what_a_kill_left_is_cleaned_up_by_resume(make_checkpoint, tmp_path, monkeypatch):
    folder = make_checkpoint("llama")
    expected = pickled(folder)
    discard = ingest.discard
    monkeypatch.setattr(ingest, "discard", lambda _: None)  # a kill runs no clean-up
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "write_sharded", lambda folder, *_: (folder / "half").touch() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(folder, tmp_path / "run")
    assert (tmp_path / "run" / ".ingest" / "half").exists()
    monkeypatch.setattr(ingest, "discard", discard)
    run = resume(tmp_path / "run")
    assert_same_but_for_the_mask(run, expected)
    assert sorted(path.name for path in run.path.iterdir()) == ["events.jsonl", "manifest.json", "model"]


def test_staging_holds_a_piece_of_a_tensor_at_a_time(tmp_path, monkeypatch):
    """No read is longer than a piece, and the pieces are the tensor; counted where bytes enter the process."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "parent")
    pickled(tmp_path / "parent")
    monkeypatch.setattr(ingest_tensors, "PIECE_BYTES", 1024)
    longest, read = [], ingest_tensors.StoredTensor.read_rows

    def counting(self, start, stop):
        assert self.loaded is None
        result = read(self, start, stop)
        longest.append(result.nbytes)
        return result

    monkeypatch.setattr(ingest_tensors.StoredTensor, "read_rows", counting)
    shutil.copyfile("pyproject.toml", tmp_path / "parent" / "tokenizer.json")  # any: only its presence is asked for
    found, _ = prepare(tmp_path / "parent", tmp_path)
    assert max(longest) <= 1024 and len(longest) > 20
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in weights_of(found.path).items())
