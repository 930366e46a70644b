"""Weight files of a conversion: shared with the parent's folder, rewritten only where the mask token's rows stand.

The independent side is safetensors' own reader and writer, and the conversion in memory by `from_pretrained`.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from a2d_hf import weight_files, zero_copy
from a2d_hf.conversion import convert, resume
from a2d_hf.errors import BadInput, GateFailed
from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion
from tests.conftest import FAMILIES, tiny_model, tiny_tokenizer


def sharded(folder: Path, family: str = "llama", dtype=torch.float32, **overrides) -> Path:
    """A parent in several files, as large ones come."""
    tiny_model(family, **overrides).to(dtype).save_pretrained(folder, max_shard_size="20kB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def snapshot(folder: Path, hub: Path) -> Path:
    """The same folder as the Hub's cache keeps it: names that are links into a folder of blobs."""
    blobs, names = hub / "blobs", hub / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    names.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / f"{number:064x}")
        (names / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return names


class TestSharing:
    def test_files_without_a_new_row_are_the_parents_own(self, tmp_path):
        parent = sharded(tmp_path / "parent")
        run = convert(parent, tmp_path / "run")
        became = run.manifest["weights"]["files"]
        assert set(became) == {file.name for file in parent.glob("*.safetensors")}
        assert set(became.values()) == {"linked", "rewritten"}
        for name, what in became.items():
            assert os.path.samefile(parent / name, run.model_path / name) == (what == "linked"), name
        assert (run.model_path / "model.safetensors.index.json").read_bytes() == (
            parent / "model.safetensors.index.json"
        ).read_bytes()

    def test_the_manifest_counts_what_is_there(self, tmp_path):
        parent = sharded(tmp_path / "parent")
        run = convert(parent, tmp_path / "run")
        before, after, weights = tensors(parent), tensors(run.model_path), run.manifest["weights"]
        mask = run.manifest["mask_token"]["id"]
        differing = {
            name: (after[name] != tensor).any(-1).nonzero().flatten().tolist()
            for name, tensor in before.items()
            if not torch.equal(after[name], tensor)
        }
        assert differing == weights["tensors_written"]
        assert differing == {"model.embed_tokens.weight": [mask], "lm_head.weight": [mask]}
        assert weights["tensors"] == len(before) == len(after)
        assert weights["tensors_identical"] == len(before) - len(differing)
        travels = json.loads((run.model_path / "a2d_manifest.json").read_text())["weights"]
        assert travels == {name: value for name, value in weights.items() if name != "files"}

    def test_links_of_a_hub_snapshot_are_followed_to_the_blobs(self, tmp_path):
        names = snapshot(sharded(tmp_path / "parent"), tmp_path / "hub")
        run = convert(names, tmp_path / "run")
        linked = [name for name, what in run.manifest["weights"]["files"].items() if what == "linked"]
        assert linked
        for name in linked:
            assert not (run.model_path / name).is_symlink()
            assert os.path.samefile(run.model_path / name, (names / name).resolve())
        shutil.rmtree(tmp_path / "hub")
        AutoModel.from_pretrained(run.model_path)

    def test_copy_shares_nothing(self, tmp_path):
        parent = sharded(tmp_path / "parent")
        linked, copied = convert(parent, tmp_path / "a"), convert(parent, tmp_path / "b", copy=True)
        assert set(copied.manifest["weights"]["files"].values()) == {"copied", "rewritten"}
        for file in parent.glob("*.safetensors"):
            assert not os.path.samefile(file, copied.model_path / file.name)
        for file in linked.model_path.iterdir():
            assert file.read_bytes() == (copied.model_path / file.name).read_bytes(), file.name

    @pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
    def test_where_no_link_can_be_made_a_copy_is(self, tmp_path, monkeypatch, code):
        def no_link(*args, **kwargs):
            raise OSError(code, os.strerror(code))

        parent = sharded(tmp_path / "parent")
        monkeypatch.setattr(weight_files.os, "link", no_link)
        run = convert(parent, tmp_path / "run")
        assert set(run.manifest["weights"]["files"].values()) == {"copied", "rewritten"}

    def test_a_trained_mask_row_leaves_every_file_alone(self, tmp_path):
        parent = sharded(tmp_path / "parent")
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"mask_token": "the"})
        tokenizer.save_pretrained(parent)
        run = convert(parent, tmp_path / "run")
        assert run.manifest["mask_token"]["strategy"] == "tokenizer"
        assert set(run.manifest["weights"]["files"].values()) == {"linked"}
        assert run.manifest["weights"]["tensors_written"] == {}


class TestSameAsInMemory:
    """The folder equals what loading the parent, converting in memory and saving gives."""

    @pytest.mark.parametrize("rows", [128, 120], ids=["free row", "grown"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_tensor_and_the_configuration(self, tmp_path, family, rows):
        parent = tmp_path / "parent"
        tiny_model(family, vocab_size=rows).to(torch.bfloat16).save_pretrained(parent)
        tiny_tokenizer().save_pretrained(parent)
        run = convert(parent, tmp_path / "run")
        assert run.manifest["mask_token"]["strategy"] == ("free_row" if rows == 128 else "grow")
        model = A2DForMaskedDiffusion.from_pretrained(parent, dtype="auto")
        model.save_pretrained(tmp_path / "memory")
        expected, found = tensors(tmp_path / "memory"), tensors(run.model_path)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]) and tensor.dtype == found[name].dtype, name
        for name in ("config.json", "generation_config.json"):
            folders = (run.model_path, tmp_path / "memory")
            mine, theirs = (json.loads((folder / name).read_text()) for folder in folders)
            mine.get("text_config", {}).pop("_name_or_path", None)
            theirs.get("text_config", {}).pop("_name_or_path", None)
            assert mine == theirs, name

    def test_the_new_rows_are_the_mean(self, tmp_path):
        parent = sharded(tmp_path / "parent", vocab_size=120, dtype=torch.bfloat16)
        run = convert(parent, tmp_path / "run")
        before, after = tensors(parent), tensors(run.model_path)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            mean = torch.tensor(before[name].double().numpy().mean(axis=0)).float().bfloat16()
            assert after[name].shape[0] == 128
            assert torch.equal(after[name][:120], before[name])
            assert all(torch.equal(row, mean) for row in after[name][120:])
        index = json.loads((run.model_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in after.values())
        for name, file in index["weight_map"].items():
            with safe_open(run.model_path / file, "pt") as opened:
                assert name in opened.keys()

    @pytest.mark.parametrize("family", ["llama", "mixtral"])
    def test_loads_everywhere(self, tmp_path, family):
        parent = sharded(tmp_path / "parent", family)
        run = convert(parent, tmp_path / "run")
        ids = torch.arange(4, 20)[None]
        expected = AutoModelForCausalLM.from_pretrained(parent)(ids).logits
        from transformers import AutoConfig

        text_config = AutoConfig.from_pretrained(run.model_path).text_config
        own_class = AutoModelForCausalLM.from_pretrained(run.model_path, config=text_config)
        assert torch.equal(own_class(ids).logits[..., :120], expected[..., :120])
        for loader in (AutoModel, A2DForMaskedDiffusion):
            loaded = loader.from_pretrained(run.model_path)
            logits = loaded(ids, attention_pattern="causal").logits
            assert torch.equal(logits[..., :120], expected[..., :120])
        tokenizer = AutoTokenizer.from_pretrained(run.model_path)
        assert tokenizer.mask_token_id == loaded.config.mask_token_id

    def test_a_head_stored_beside_the_embedding_it_is_tied_to(self, tmp_path):
        parent = tmp_path / "parent"
        tiny_model("qwen2").save_pretrained(parent)
        tiny_tokenizer().save_pretrained(parent)
        stored = load_file(parent / "model.safetensors")
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
        save_file(stored, parent / "model.safetensors", metadata={"format": "pt"})
        run = convert(parent, tmp_path / "run")
        assert set(run.manifest["weights"]["tensors_written"]) == {"model.embed_tokens.weight", "lm_head.weight"}
        after = tensors(run.model_path)
        assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])


class TestTheParentIsNeverWrittenTo:
    @pytest.fixture
    def pair(self, tmp_path):
        parent = sharded(tmp_path / "parent")
        before = {file.name: file.read_bytes() for file in parent.iterdir()}
        return parent, before

    def check(self, pair):
        parent, before = pair
        assert {file.name: file.read_bytes() for file in parent.iterdir()} == before

    def test_by_training(self, pair, tmp_path):
        (tmp_path / "story.txt").write_text("The quick dog jumps over the lazy fox.\n\n" * 12)
        settings = {"max_steps": 2, "batch_size": 2, "max_length": 16, "device": "cpu"}
        run = convert(pair[0], tmp_path / "run", data=tmp_path / "story.txt", **settings)
        assert run.manifest["stage"] == "trained"
        self.check(pair)

    def test_by_saving_over_the_checkpoint(self, pair, tmp_path):
        run = convert(pair[0], tmp_path / "run")
        model = A2DForMaskedDiffusion.from_pretrained(run.model_path)
        torch.nn.init.ones_(model.backbone.model.norm.weight)
        model.save_pretrained(run.model_path, max_shard_size="20kB")
        self.check(pair)

    def test_nor_are_its_permissions_changed(self, pair, tmp_path):
        modes = {}
        for number, file in enumerate(pair[0].glob("*.safetensors")):
            file.chmod(0o600 if number % 2 else 0o440)
            modes[file] = file.stat().st_mode
        convert(pair[0], tmp_path / "run")
        assert {file: file.stat().st_mode for file in modes} == modes


class TestProof:
    """What is in the files is compared with the parent's, so a surgery that goes wrong is seen."""

    def test_a_flipped_bit_in_a_rewritten_file(self, tmp_path, monkeypatch):
        rewrite = zero_copy.rewrite_file

        def flipping(source, target, *args):
            rewrite(source, target, *args)
            data = bytearray(target.read_bytes())
            data[-1] ^= 1
            target.write_bytes(data)

        monkeypatch.setattr(zero_copy, "rewrite_file", flipping)
        with pytest.raises(GateFailed, match="2 tensor.* differ from the parent's"):
            convert(sharded(tmp_path / "parent"), tmp_path / "run")
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["events.jsonl", "manifest.json"]

    def test_a_wrong_copy(self, tmp_path, monkeypatch):
        share = zero_copy.share_file

        def wrong(source, target, copy, advance):
            done = share(source, target, True, advance)
            data = bytearray(target.read_bytes())
            data[-1] ^= 1
            target.write_bytes(data)
            return done

        monkeypatch.setattr(zero_copy, "share_file", wrong)
        with pytest.raises(GateFailed, match="differ from the parent's"):
            convert(sharded(tmp_path / "parent"), tmp_path / "run")

    @pytest.mark.parametrize("gates", ["full", "streamed"])
    def test_a_wrong_mask_row(self, tmp_path, monkeypatch, gates):
        mean = zero_copy.mean_of_trained_rows
        monkeypatch.setattr(zero_copy, "mean_of_trained_rows", lambda *args: mean(*args) * 1.5)
        with pytest.raises(GateFailed, match="mask_row gate failed"):
            convert(sharded(tmp_path / "parent"), tmp_path / "run", gates=gates)

    def test_a_tensor_of_another_shape_is_named_before_anything_is_written(self, tmp_path):
        parent = sharded(tmp_path / "parent")
        config = json.loads((parent / "config.json").read_text())
        (parent / "config.json").write_text(json.dumps(config | {"intermediate_size": 72}))
        with pytest.raises(BadInput, match="has the shape .* config.json asks for"):
            convert(parent, tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestStoredTensor:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
    def test_reads_what_safetensors_reads(self, tmp_path, dtype, monkeypatch):
        monkeypatch.setattr(weight_files, "PIECE", 7)  # reads come in pieces that end inside a row
        values = {
            "matrix": (torch.randn(13, 5) * 3).to(dtype),
            "vector": (torch.randn(6) * 3).to(dtype),
            "number": torch.tensor(1).to(dtype),
            "nothing": torch.zeros(0, 4).to(dtype),
        }
        save_file(values, tmp_path / "x.safetensors")
        stored = weight_files.stored_tensors(tmp_path, ["x.safetensors"])
        for name, value in values.items():
            assert stored[name].shape == tuple(value.shape) and torch.equal(stored[name][...], value), name
        assert torch.equal(stored["matrix"][3:9], values["matrix"][3:9])
        assert torch.equal(stored["matrix"][12], values["matrix"][12])
        assert torch.equal(stored["matrix"].rows([7, 0]), values["matrix"][[7, 0]])

    def test_rewriting_keeps_metadata_order_and_every_other_byte(self, tmp_path, monkeypatch):
        monkeypatch.setattr(weight_files, "PIECE", 7)
        values = {name: torch.randn(9, 4).bfloat16() for name in "bca"}
        save_file(values, tmp_path / "x.safetensors", metadata={"format": "pt", "note": "ü"})
        row = torch.arange(4).bfloat16()
        change = weight_files.NewRows(row, [2, 9, 10], 11)
        weight_files.rewrite_file(
            tmp_path / "x.safetensors", tmp_path / "y.safetensors", {"c": change}, lambda n: None
        )
        after = load_file(tmp_path / "y.safetensors")
        expected = torch.cat([values["c"], torch.zeros(2, 4).bfloat16()])
        expected[[2, 9, 10]] = row
        assert torch.equal(after["c"], expected)
        assert torch.equal(after["a"], values["a"]) and torch.equal(after["b"], values["b"])
        with safe_open(tmp_path / "y.safetensors", "pt") as opened:
            assert opened.metadata() == {"format": "pt", "note": "ü"}

    def test_without_growth_only_the_rows_bytes_change(self, tmp_path):
        values = {name: torch.randn(9, 4) for name in "ab"}
        save_file(values, tmp_path / "x.safetensors")
        change = weight_files.NewRows(torch.full((4,), 7.0), [5], 9)
        weight_files.rewrite_file(
            tmp_path / "x.safetensors", tmp_path / "y.safetensors", {"b": change}, lambda n: None
        )
        one, other = ((tmp_path / name).read_bytes() for name in ("x.safetensors", "y.safetensors"))
        where = [index for index, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]]
        assert len(one) == len(other) and where[-1] - where[0] < 16


def test_a_run_killed_inside_the_surgery_resumes(tmp_path, monkeypatch):
    parent = sharded(tmp_path / "parent")
    whole = convert(parent, tmp_path / "whole")

    def cut(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zero_copy, "prove_bytes", cut)
        with pytest.raises(KeyboardInterrupt):
            convert(parent, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    run = resume(tmp_path / "run")
    assert {p.name: p.read_bytes() for p in run.model_path.iterdir()} == {
        p.name: p.read_bytes() for p in whole.model_path.iterdir()
    }
