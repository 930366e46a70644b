"""Bad input: one sentence, exit code 2 (or 1 where the model itself is refused), no traceback, nothing written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from a2d_hf.cli import main
from a2d_hf.detection import detect
from a2d_hf.errors import BadInput

from .conftest import codes, llama, write_safetensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a Llama config and nothing else."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(llama()))
    return path


def everything_in(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("src", ["./nowhere", "/no/such/place", "a/b/c", "", "x\0y", "--odd", "~nobody/x", "a" * 5000])
def test_what_is_not_there_is_bad_input(src: str):
    with pytest.raises(BadInput, match="SRC"):
        detect(src)


def test_a_file_is_not_a_folder(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(BadInput, match="is a file"):
        detect(file)


def test_a_config_file_alone_is_enough(tmp_path: Path):
    file = tmp_path / "anything.json"
    file.write_text(json.dumps(llama()))
    assert detect(file).verdict == "supported"


def test_a_folder_without_config_is_bad_input(tmp_path: Path):
    with pytest.raises(BadInput, match="no config.json"):
        detect(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(BadInput, match="no config.json"):
        detect(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"{", "not JSON"),
        (b"[1, 2]", "a list instead of an object"),
        (b"null", "null instead of an object"),
        (b'"llama"', "text instead of an object"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
        (b"{}", "no `model_type`"),
        (b'{"model_type": null}', "no `model_type`"),
        (b'{"model_type": 7}', "`model_type` is a number"),
        (b'{"model_type": ["llama"]}', "`model_type` is a list"),
        (b'{"model_type": "llama", "hidden_size": "big"}', "`hidden_size` is text"),
        (b'{"model_type": "llama", "num_hidden_layers": -3}', "`num_hidden_layers` is -3"),
        (b'{"model_type": "llama", "num_hidden_layers": 1e300}', "`num_hidden_layers`"),
        (b'{"model_type": "llama", "vocab_size": NaN}', "`vocab_size`"),
        (b'{"model_type": "llama", "vocab_size": null}', "`vocab_size` is missing"),
        (b'{"model_type": "llama", "num_attention_heads": true}', "`num_attention_heads`"),
        (b'{"model_type": "llama", "num_key_value_heads": 7}', "not a multiple"),
        (b'{"model_type": "llama", "architectures": [1]}', "`architectures`"),
        (b'{"model_type": "llama", "quantization_config": "gptq"}', "`quantization_config`"),
        (b'{"model_type": "gemma2", "layer_types": ["full_attention"]}', "`layer_types` has 1 entries"),
        (b'{"model_type": "gemma2", "num_hidden_layers": 1, "layer_types": ["psychic"]}', "psychic"),
        (b'{"model_type": "llava", "text_config": []}', "`text_config` is not an object"),
        (b'{"model_type": "gpt_neo", "attention_types": [[["global"], 100000000000]]}', "attention_types"),
    ],
)
def test_a_config_that_describes_nothing_is_invalid_with_the_field_named(content: bytes, words: str, verdict_of):
    found = verdict_of(content)
    assert (found.verdict, codes(found), found.exit_code) == ("unsupported", ["config.invalid"], 2)
    assert re.search(words, found.reasons[0].message)


def test_a_byte_order_mark_is_no_fault(verdict_of):
    assert verdict_of(b"\xef\xbb\xbf" + json.dumps(llama()).encode()).verdict == "supported"


def test_whole_weights_are_counted(folder: Path):
    write_safetensors(folder / "model.safetensors", {"a": ("F32", [10, 4]), "b": ("BF16", [6])})
    found = detect(folder)
    size = (folder / "model.safetensors").stat().st_size
    assert found.verdict == "supported"
    assert found.weights.to_dict() | {"note": None} == {
        "present": True, "format": "safetensors", "shards": 1, "bytes": size, "download": None, "note": None
    }  # fmt: skip
    assert found.plan["parameters"] == {"total": 46, "active": 46, "source": "weights"}


def test_shards_are_found_through_the_index(folder: Path):
    for name in ("one", "two"):
        write_safetensors(folder / f"{name}.safetensors", {name: ("F32", [3])})
    index = {"weight_map": {"one": "one.safetensors", "two": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = detect(folder).weights
    assert (weights.present, weights.shards, weights.parameters) == (True, 2, 6)


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_a_truncated_shard_is_bad_input(folder: Path, cut: int):
    write_safetensors(folder / "model.safetensors", {"a": ("F32", [4])}, cut=cut)
    found = detect(folder)
    assert (found.exit_code, codes(found), found.weights.present) == (2, ["weights.format"], False)
    assert "model.safetensors is" in found.reasons[0].message


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 100, b"\x10" + b"\x00" * 7 + b"not json at all!"])
def test_a_corrupt_shard_is_bad_input(folder: Path, content: bytes):
    (folder / "model.safetensors").write_bytes(content)
    found = detect(folder)
    assert (found.exit_code, codes(found)) == (2, ["weights.format"])


def test_an_index_that_names_an_absent_file_is_bad_input(folder: Path):
    write_safetensors(folder / "a.safetensors", {"a": ("F32", [4])})
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = detect(folder)
    assert (found.exit_code, codes(found)) == (2, ["weights.format"])
    assert "names b.safetensors, which is not there" in found.reasons[0].message


BROKEN = ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}')


@pytest.mark.parametrize("index", BROKEN)
def test_a_broken_index_is_bad_input(folder: Path, index: str):
    (folder / "model.safetensors.index.json").write_text(index)
    assert detect(folder).exit_code == 2


def test_an_index_cannot_point_outside_its_folder(folder: Path):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    assert "outside its folder" in detect(folder).reasons[0].message


def test_shards_without_their_index_are_bad_input(folder: Path):
    write_safetensors(folder / "model-00001-of-00002.safetensors", {"a": ("F32", [4])})
    assert "not model.safetensors.index.json" in detect(folder).reasons[0].message


def test_an_index_alone_leaves_the_verdict_and_says_what_to_fetch(folder: Path):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    found = detect(folder)
    assert (found.verdict, found.exit_code, found.weights.present) == ("supported", 0, False)
    assert found.weights.download


def test_pickled_weights_load_with_weights_only(folder: Path):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    found = detect(folder)
    assert (found.verdict, found.weights.format) == ("supported", "pytorch")
    assert "weights_only" in found.weights.note and "ingest.pickle" in found.capabilities


def test_a_truncated_pickle_archive_is_bad_input(folder: Path):
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and then nothing")
    assert detect(folder).exit_code == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model-Q4_K_M.gguf", "gguf"), ("model.onnx", "onnx"), ("onnx/model.onnx", "onnx"),
        ("tf_model.h5", "tensorflow"), ("flax_model.msgpack", "flax"),
        ("consolidated.safetensors", "consolidated"), ("adapter_model.safetensors", "adapter"),
        ("openvino_model.bin", "openvino"),
    ],
)  # fmt: skip
def test_weights_of_another_format_alone_are_refused(folder: Path, name: str, kind: str):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"anything")
    found = detect(folder)
    assert (found.exit_code, codes(found), found.weights.format) == (1, ["weights.format"], kind)


def test_other_formats_beside_safetensors_do_no_harm(folder: Path):
    write_safetensors(folder / "model.safetensors", {"a": ("F32", [4])})
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert detect(folder).verdict == "supported"


def test_a_folder_of_gguf_files_alone_is_refused_for_its_format(tmp_path: Path):
    (tmp_path / "model-Q8_0.gguf").write_bytes(b"GGUF")
    found = detect(tmp_path)
    assert (found.exit_code, codes(found)) == (1, ["weights.format"])


@pytest.mark.parametrize("tensors", [{"w": ("F8_E4M3", [4, 4])}, {"layers.0.q_proj.qweight": ("I32", [4])}])
def test_quantized_tensors_that_the_config_does_not_mention_are_refused(folder: Path, tensors: dict):
    write_safetensors(folder / "model.safetensors", tensors)
    assert codes(detect(folder)) == ["weights.quantized"]


def test_missing_weights_do_not_change_the_verdict(folder: Path):
    found = detect(folder)
    assert (found.verdict, found.exit_code, found.weights.present) == ("supported", 0, False)
    assert found.weights.download == f"hf download OWNER/NAME --local-dir {folder}"
    (folder / "config.json").write_text(json.dumps(llama(_name_or_path="owner/name")))
    assert detect(folder).weights.download == f"hf download owner/name --local-dir {folder}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache."""
    from huggingface_hub import constants

    path = tmp_path / "hub"
    path.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    return path


def put_in_cache(cache: Path, repo_id: str, files: dict[str, str]) -> Path:
    """A snapshot as huggingface_hub lays it out: links into `blobs`, the revision in `refs/main`."""
    base = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = base / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("c0ffee")
    (base / "blobs").mkdir()
    for name, content in files.items():
        (base / "blobs" / name).write_text(content)
        os.symlink(Path("../../blobs") / name, snapshot / name)
    return snapshot


def test_a_hub_id_that_is_not_in_the_cache_names_the_exact_command(cache: Path):
    with pytest.raises(BadInput, match=r"hf download Qwen/Qwen3-0\.6B$"):
        detect("Qwen/Qwen3-0.6B")


def test_a_hub_id_is_found_in_the_cache(cache: Path):
    put_in_cache(cache, "owner/name", {"config.json": json.dumps(llama())})
    found = detect("owner/name")
    assert (found.verdict, found.weights.present) == ("supported", False)
    assert found.weights.download == "hf download owner/name"


def test_weights_in_the_cache_are_seen_through_their_links(cache: Path):
    snapshot = put_in_cache(cache, "owner/name", {"config.json": json.dumps(llama())})
    blob = cache / "models--owner--name" / "blobs" / "weights"
    write_safetensors(blob, {"a": ("F32", [4])})
    os.symlink(Path("../../blobs/weights"), snapshot / "model.safetensors")
    assert detect("owner/name").weights.present
    blob.unlink()  # the link dangles: the download was cleaned away
    assert detect("owner/name").weights.download == "hf download owner/name"


def test_a_path_into_the_cache_knows_its_hub_id(cache: Path):
    snapshot = put_in_cache(cache, "owner/some--name", {"config.json": json.dumps(llama())})
    assert detect(snapshot).weights.download == "hf download owner/some--name"


def test_detection_writes_nothing(folder: Path):
    before = everything_in(folder)
    detect(folder, gpu="h100")
    assert everything_in(folder) == before


def test_the_command_prints_one_sentence_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "config.json").write_text("{")
    assert main(["detect", str(tmp_path)]) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.count("\n") == 1 and streams.err.startswith("a2d: error: ")
    assert main(["detect", str(tmp_path / "nothing" / "here")]) == 2
    assert main(["detect", str(tmp_path), "--gpu", "abacus"]) == 2
    assert "h100" in capsys.readouterr().err


def test_with_json_even_bad_input_is_an_object_on_stdout(cache: Path, capsys: pytest.CaptureFixture):
    assert main(["detect", "owner/name", "--json"]) == 2
    streams = capsys.readouterr()
    answer = json.loads(streams.out)
    assert (answer["verdict"], answer["reasons"][0]["code"]) == ("unsupported", "config.invalid")
    assert answer["weights"]["download"] == "hf download owner/name"
    assert streams.err.startswith("a2d: error: ")


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({}, 0, "supported"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, 1, "weights.quantized"),
        ({"model_type": "jamba", "architectures": None, "num_hidden_layers": 8}, 0, "1 of 8 layers open"),
        ({"model_type": "bert", "architectures": None}, 1, "paradigm.encoder"),
    ],
)
def test_the_command_tells_a_person_and_the_shell(folder: Path, capsys, changes: dict, code: int, words: str):
    (folder / "config.json").write_text(json.dumps(llama(**changes)))
    assert main(["detect", str(folder), "--gpu", "h100"]) == code
    out = capsys.readouterr().out
    assert words in out and "\033[" not in out


def test_detection_imports_neither_torch_nor_transformers(folder: Path):
    script = (
        "import sys\n"
        "from a2d_hf import detect\n"
        f"found = detect({str(folder)!r}, gpu='h100')\n"
        "from a2d_hf.cli import main\n"
        f"assert main(['detect', {str(folder)!r}, '--json']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "supported"
