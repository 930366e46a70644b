"""The gates of a model that does not fit into memory: that they pass for what is right, and see what is wrong.

The independent side is the same model whole in memory.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from a2d_hf import layer_streaming, streamed_gates, surgery
from a2d_hf.conversion import convert
from a2d_hf.errors import BadInput, GateFailed
from a2d_hf.layer_streaming import LayerStream, check_complete, empty_parent
from a2d_hf.modeling.layer_edges import decoder_layers
from a2d_hf.source import find_weights
from a2d_hf.weight_files import stored_tensors
from tests.conftest import FAMILIES, tiny_model, tiny_tokenizer


def empty_and_stored(folder):
    """The model of a folder without its numbers, and its stored tensors."""
    stored = stored_tensors(folder, find_weights(folder)[0])
    return empty_parent(AutoConfig.from_pretrained(folder), torch.float32), stored


class TestLayerStream:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_computes_what_the_whole_model_computes(self, make_checkpoint, family):
        folder = make_checkpoint(family)
        whole = AutoModelForCausalLM.from_pretrained(folder)
        model, stored = empty_and_stored(folder)
        vocabulary = [3, 7, 20, 64, 127]
        LayerStream(model, stored, vocabulary, lambda count: None)
        ids = torch.randint(0, len(vocabulary), (1, 24))
        with torch.no_grad():
            found = model(ids, use_cache=False).logits
            expected = whole(torch.tensor(vocabulary)[ids], use_cache=False).logits[..., vocabulary]
        # A head of another height takes another kernel: rounding, not a difference of weights.
        assert torch.allclose(found, expected, atol=5e-6, rtol=0) and float(expected.abs().max()) > 0.1

    def test_one_layer_is_in_memory_at_a_time(self, make_checkpoint):
        model, stored = empty_and_stored(make_checkpoint("gemma3_text"))
        layers = decoder_layers(model)
        loaded = []

        def look(module, args):
            loaded.append([name for name, layer in layers if not any(p.is_meta for p in layer.parameters())])

        LayerStream(model, stored, [1, 2, 3], lambda count: None)
        for _, layer in layers:
            layer.register_forward_pre_hook(look)
        with torch.no_grad():
            model(torch.tensor([[0, 1, 2]]), use_cache=False)
        assert loaded == [[name] for name, _ in layers]
        assert all(p.is_meta for _, layer in layers for p in layer.parameters())

    def test_weights_that_layers_share_arrive(self, tmp_path):
        """Zamba's attention block is one set of weights in several layers."""
        from a2d_hf.architecture_checks import tiny_parent

        whole = tiny_parent("zamba")
        whole.save_pretrained(tmp_path)
        model, stored = empty_and_stored(tmp_path)
        check_complete(model, stored, tmp_path)
        vocabulary = list(range(40))
        LayerStream(model, stored, vocabulary, lambda count: None)
        ids = torch.randint(0, 40, (1, 24))
        with torch.no_grad():
            found, expected = model(ids, use_cache=False).logits, whole(ids, use_cache=False).logits[..., :40]
        assert torch.allclose(found, expected, atol=1e-4, rtol=0) and float(expected.abs().max()) > 0.1

    def test_a_missing_layer_is_said(self, make_checkpoint):
        model, stored = empty_and_stored(make_checkpoint("llama"))
        del stored["model.layers.1.mlp.up_proj.weight"]
        LayerStream(model, stored, [1, 2], lambda count: None)
        with pytest.raises(BadInput, match="layers.1.mlp.up_proj.weight is in no weight file"):
            model(torch.tensor([[0, 1]]), use_cache=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_conversion_equals_the_full_one(make_checkpoint, tmp_path, family):
    folder = make_checkpoint(family)
    full, streamed = (convert(folder, tmp_path / mode, gates=mode) for mode in ("full", "streamed"))
    for name in sorted(p.name for p in full.model_path.iterdir()):
        if name not in ("a2d_manifest.json", "README.md"):  # they tell how it was proven
            assert (full.model_path / name).read_bytes() == (streamed.model_path / name).read_bytes(), name
    modes = {name: gate["detail"].get("mode") for name, gate in streamed.manifest["gates"].items()}
    assert modes == {"mask_row": None, "identity": "shrunk+streamed", "reach": "shrunk"}
    assert full.manifest["gates"]["identity"]["detail"]["mode"] == "full"
    halves = streamed.manifest["gates"]["identity"]["detail"]
    assert halves["max_abs_diff"] == halves["streamed"]["max_abs_diff"] == 0.0
    assert halves["streamed"]["max_abs_change_open"] > 0
    assert halves["shrunk"]["window_crossed"] and streamed.manifest["seconds"].keys() == {"hash", "surgery", "gates"}


def test_grown_rows_are_streamed_too(make_checkpoint, tmp_path):
    run = convert(make_checkpoint("llama", vocab_size=120), tmp_path / "run", gates="streamed")
    assert run.manifest["mask_token"]["strategy"] == "grow"
    assert run.manifest["gates"]["identity"]["detail"]["streamed"]["max_abs_diff"] == 0.0


def test_auto_asks_the_memory(make_checkpoint, tmp_path, monkeypatch):
    folder = make_checkpoint("llama")
    size = 4 * sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    for available, mode in ((4 * size, "shrunk+streamed"), (4 * size + 16, "full")):
        monkeypatch.setattr(surgery, "available_memory", lambda available=available: available)
        run = convert(folder, tmp_path / mode)
        assert run.manifest["gates"]["identity"]["detail"]["mode"] == mode


def test_with_data_what_was_not_measured_is_said(make_checkpoint, tmp_path):
    (tmp_path / "story.txt").write_text("The quick dog jumps over the lazy fox.\n\n" * 12)
    settings = {"max_steps": 2, "batch_size": 2, "max_length": 16, "device": "cpu", "gates": "streamed"}
    run = convert(make_checkpoint("llama"), tmp_path / "run", data=tmp_path / "story.txt", **settings)
    assert run.manifest["stage"] == "trained" and run.manifest["training"]["steps"] == 2
    assert set(run.manifest["results"]) == {"nelbo_after"}
    assert set(run.manifest["skipped"]) == {"parent_nll", "nelbo_before"}


class TestSabotage:
    def test_a_layer_that_differs_in_the_real_weights(self, make_checkpoint, tmp_path, monkeypatch):
        """Behind the proof of the bytes, so that only the numbers can tell."""
        compare = streamed_gates.StreamedPair.compare

        def changed(pair, advance):
            name = "model.layers.1.mlp.up_proj.weight"
            file = pair.written[name].file
            stored = load_file(file)
            stored[name][0, 0] += 1e-3
            file.unlink()
            save_file(stored, file, metadata={"format": "pt"})
            return compare(pair, advance)

        monkeypatch.setattr(streamed_gates.StreamedPair, "compare", changed)
        with pytest.raises(GateFailed, match="identity gate failed.*real weights differ"):
            convert(make_checkpoint("llama"), tmp_path / "run", gates="streamed")
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["events.jsonl", "manifest.json"]
        gates = json.loads((tmp_path / "run" / "manifest.json").read_text())["gates"]
        assert gates["identity"]["passed"] is False and "reach" not in gates

    def test_attention_that_does_not_open(self, make_checkpoint, tmp_path, monkeypatch):
        from a2d_hf.modeling.attention_pattern import AttentionPattern

        monkeypatch.setattr(AttentionPattern, "bidirectional", AttentionPattern.causal)
        with pytest.raises(GateFailed, match="opening the attention changes nothing|reach gate failed"):
            convert(make_checkpoint("llama"), tmp_path / "run", gates="streamed")

    def test_weights_that_are_not_numbers(self, tmp_path):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
        model.save_pretrained(tmp_path / "parent")
        tiny_tokenizer().save_pretrained(tmp_path / "parent")
        with pytest.raises(GateFailed, match="identity gate failed"):
            convert(tmp_path / "parent", tmp_path / "run", gates="streamed")

    def test_a_loader_that_drops_a_tensor(self, make_checkpoint, monkeypatch):
        model, stored = empty_and_stored(make_checkpoint("mixtral"))
        check_complete(model, stored, "it")
        del stored[next(name for name in stored if "experts" in name)]
        with pytest.raises(BadInput):
            check_complete(model, stored, "it")


def test_an_architecture_that_shrinking_would_change_is_not_passed(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed_gates, "lost_structure", lambda full, small: ["sliding_window"])
    with pytest.raises(GateFailed, match="cannot be shrunk without losing sliding_window: pass --gates full"):
        convert(make_checkpoint("llama"), tmp_path / "run", gates="streamed")


def test_the_empty_model_takes_no_memory_for_its_weights():
    config = tiny_model("llama").config
    config.hidden_size, config.vocab_size, config.intermediate_size = 8192, 128_000, 65_536
    model = layer_streaming.empty_parent(config, torch.bfloat16)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
