"""Every low-precision format against a brute force that goes number by number, and against transformers' own code.

The brute forces are written from the formats' papers and know nothing of blocks of rows or of streams.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from a2d_hf import ingest_tensors
from a2d_hf.conversion import convert
from a2d_hf.detection import detect
from a2d_hf.errors import Refused
from a2d_hf.ingest_dequantize import dequantize_all
from a2d_hf.ingest_tensors import StoredTensor
from tests.conftest import tiny_model, tiny_tokenizer


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """Pieces of a few rows, so that every test crosses their edges."""
    monkeypatch.setattr(ingest_tensors, "PIECE_BYTES", 4 * 96)


def stored(tmp_path, **tensors):
    return {
        name: StoredTensor(name, tensor.dtype, tuple(tensor.shape), tmp_path, loaded=tensor)
        for name, tensor in tensors.items()
    }


def plain(tmp_path, settings=None, target=torch.float32, **tensors):
    """The one tensor that these stored ones stand for, and the scheme that was recognised."""
    done = dequantize_all(stored(tmp_path, **tensors), settings or {}, target)
    (plan,) = done.tensors.values()
    whole = torch.cat([piece.reshape(-1) for piece in plan.pieces()]).reshape(plan.shape)
    assert whole.dtype == plan.dtype == target
    return plan.name, whole, next(iter(done.schemes))


def e2m1(code: int) -> float:
    return E2M1[code & 7] * (-1 if code & 8 else 1)


def fp8(*shape):
    return torch.randn(*shape).mul(3).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(("rows", "columns"), [(8, 12), (10, 9), (3, 4)])
def test_fp8_by_blocks_with_blocks_cut_off_at_the_edge(rows, columns, tmp_path):
    weight, tall, wide = fp8(rows, columns), 4, 4
    scale = torch.rand(math.ceil(rows / tall), math.ceil(columns / wide)) + 0.1
    name, found, scheme = plain(
        tmp_path, {"weight_block_size": [tall, wide]}, **{"m.weight": weight, "m.weight_scale_inv": scale}
    )
    for i in range(rows):
        for j in range(columns):
            assert found[i, j] == weight[i, j].float() * scale[i // tall, j // wide]
    assert name == "m.weight" and scheme.startswith("fp8")


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1), (1, 8)])
def test_fp8_per_tensor_and_per_channel(shape, tmp_path):
    weight, scale = fp8(6, 8), torch.rand(shape) + 0.1
    _, found, _ = plain(tmp_path, **{"m.weight": weight, "m.weight_scale": scale, "m.input_scale": torch.ones(())})
    spread = scale.reshape(6, 1) if shape == (6,) else scale
    assert torch.equal(found, weight.float() * spread)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (3, 2, 2), (3, 6, 1), (3, 1, 8)])
def test_fp8_experts_in_one_tensor(shape, tmp_path):
    weight, scale = fp8(3, 6, 8), torch.rand(shape) + 0.1
    _, found, _ = plain(tmp_path, **{"experts.down_proj": weight, "experts.down_proj_scale_inv": scale})
    for e in range(3):
        for i in range(6):
            for j in range(8):
                grid = scale.reshape(3, 1, 1) if scale.ndim == 1 else scale
                factor = grid[e, i * grid.shape[1] // 6, j * grid.shape[2] // 8]
                assert found[e, i, j] == weight[e, i, j].float() * factor


def test_exponents_as_bytes_are_powers_of_two(tmp_path):
    weight, exponents = fp8(4, 64), torch.randint(120, 134, (4, 2), dtype=torch.uint8)
    _, found, _ = plain(tmp_path, **{"m.weight": weight, "m.weight_scale_inv": exponents})
    for i in range(4):
        for j in range(64):
            assert found[i, j].item() == weight[i, j].float().item() * 2.0 ** (int(exponents[i, j // 32]) - 127)


def test_packed_fp4_with_exponents(tmp_path):
    weight, exponents = torch.randint(-128, 128, (4, 32), dtype=torch.int8), torch.randint(120, 134, (4, 2))
    _, found, scheme = plain(tmp_path, **{"m.weight": weight, "m.scale": exponents.to(torch.uint8)})
    for i in range(4):
        for j in range(64):
            byte = int(weight[i, j // 2]) & 255
            code = byte >> 4 if j % 2 else byte & 15
            assert found[i, j].item() == e2m1(code) * 2.0 ** (int(exponents[i, j // 32]) - 127)
    assert scheme == "mxfp4"


def test_experts_of_gpt_oss(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(118, 132, (2, 6, 3), dtype=torch.uint8)
    name, found, scheme = plain(
        tmp_path, target=torch.bfloat16, **{"e.down_proj_blocks": blocks, "e.down_proj_scales": scales}
    )
    assert (name, scheme, tuple(found.shape)) == ("e.down_proj", "mxfp4", (2, 96, 6))
    for e in range(2):
        for row in range(6):
            for column in range(96):
                byte = int(blocks[e, row, column // 32, column % 32 // 2])
                code = byte >> 4 if column % 2 else byte & 15
                value = e2m1(code) * 2.0 ** (int(scales[e, row, column // 32]) - 127)
                assert found[e, column, row].item() == value
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize("whole", ["weight_scale_2", "weight_global_scale"])
def test_nvfp4(whole, tmp_path):
    codes, scale = torch.randint(0, 256, (4, 16), dtype=torch.uint8), torch.rand(4, 2).to(torch.float8_e4m3fn)
    factor = torch.tensor([0.37])
    name = "m.weight" if whole == "weight_scale_2" else "m.weight_packed"
    _, found, scheme = plain(tmp_path, **{name: codes, "m.weight_scale": scale, f"m.{whole}": factor})
    for i in range(4):
        for j in range(32):
            code = int(codes[i, j // 2]) >> 4 if j % 2 else int(codes[i, j // 2]) & 15
            own = scale[i, j // 16].float()
            own = own * factor if whole == "weight_scale_2" else own / factor
            assert found[i, j] == e2m1(code) * own
    assert scheme == "nvfp4"


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of unsigned integers as one stream of bits each, cut into 32-bit words; written with Python's integers."""
    words = []
    for row in values.tolist():
        stream = sum(value << (bits * place) for place, value in enumerate(row))
        count = math.ceil(len(row) * bits / 32)
        words.append([(stream >> (32 * place)) & 0xFFFFFFFF for place in range(count)])
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("form", ["symmetric", "zero points", "order"])
def test_packed_integers_of_any_width(bits, form, tmp_path):
    offset = 2 ** (bits - 1)
    codes = torch.randint(0, 2**bits, (8, 24))
    scale, zero, order = torch.rand(8, 3) + 0.1, torch.zeros(8, 3, dtype=torch.int64), torch.arange(24) // 8
    tensors = {"m.weight_packed": pack(codes, bits), "m.weight_scale": scale, "m.weight_shape": torch.tensor([8, 24])}
    if form == "zero points":
        zero = torch.randint(-offset, offset, (8, 3))
        tensors["m.weight_zero_point"] = pack((zero + offset).T, bits).T.contiguous()
    if form == "order":
        order = order[torch.randperm(24)]
        tensors["m.weight_g_idx"] = order.to(torch.int32)
    settings = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits}}}}
    name, found, _ = plain(tmp_path, settings, **tensors)
    for i in range(8):
        for j in range(24):
            value = codes[i, j] - offset - zero[i, order[j]]
            assert found[i, j] == value.float() * scale[i, order[j]]
    assert name == "m.weight"


def test_packed_formats_agree_with_compressed_tensors(tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weight = torch.randn(16, 64)
    for kind, bits in (("pack-quantized", 4), ("int-quantized", 8), ("float-quantized", 8)):
        number = "float" if kind.startswith("float") else "int"
        arguments = {"num_bits": bits, "type": number, "symmetric": True, "strategy": "channel"}
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        scale = weight.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1 if number == "int" else 448)
        compressor = BaseCompressor.get_value_from_registry(kind)
        packed = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        expected = compressor.decompress(packed, scheme)["weight"]
        settings = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits}}}}
        _, found, _ = plain(tmp_path, settings, **{f"m.{name}": tensor for name, tensor in packed.items()})
        assert torch.equal(found, expected), kind


def test_metal_agrees_with_transformers(tmp_path):
    from transformers.integrations.metal_quantization import _affine_dequantize_tensor, _affine_quantize_tensor

    packed, scales, biases = _affine_quantize_tensor(torch.randn(8, 64), 32, 4)
    settings = {"bits": 4, "group_size": 32}
    _, found, _ = plain(tmp_path, settings, **{"m.weight": packed, "m.scales": scales, "m.qbiases": biases})
    assert torch.equal(found, _affine_dequantize_tensor(packed, scales, biases, 32, 4))


def test_fp8_without_a_scale_is_refused(tmp_path):
    with pytest.raises(Refused, match="m.weight is stored in 8 bits without a scale"):
        dequantize_all(stored(tmp_path, **{"m.weight": fp8(4, 4)}), {}, torch.bfloat16)


def test_scales_that_do_not_divide_the_weight_are_refused(tmp_path):
    with pytest.raises(Refused, match="10 x 8 numbers, which 3 x 1 scales do not divide"):
        plain(tmp_path, **{"m.weight": fp8(10, 8), "m.weight_scale_inv": torch.ones(3, 1)})


# ------------------------------------------------------------------------------------ whole checkpoints, as a user has


def quantized_llama(folder, form):
    """A tiny bf16 llama in a published low-precision layout, and the plain weights that it stands for."""
    model = tiny_model("llama").bfloat16()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights, result = load_file(folder / "model.safetensors"), {}
    expected = dict(weights)
    for name, tensor in weights.items():
        if "_proj.weight" not in name:
            result[name] = tensor
            continue
        value, module = tensor.float(), name.removesuffix(".weight")
        if form == "blocks":
            tiles = value.reshape(value.shape[0] // 16, 16, value.shape[1] // 16, 16)
            scale = tiles.abs().amax((1, 3)) / 448
            codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            plain = (codes.float() * scale[:, None, :, None]).reshape(value.shape)
            codes, key = codes.reshape(value.shape), "weight_scale_inv"
        else:
            scale = value.abs().amax(-1, keepdim=True) / 448 if form == "channels" else value.abs().max() / 448
            codes, key = (value / scale).to(torch.float8_e4m3fn), "weight_scale"
            plain = codes.float() * scale
            if form == "modelopt":
                result |= {f"{module}.input_scale": torch.tensor(0.5)}
        result |= {name: codes, f"{module}.{key}": scale}
        expected[name] = plain.bfloat16()
    save_file(result, folder / "model.safetensors", metadata={"format": "pt"})
    group = {"weights": {"num_bits": 8, "type": "float"}, "targets": ["Linear"]}
    settings = {
        "blocks": {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"},
        "channels": {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"0": group}},
        "modelopt": {"quant_algo": "FP8", "producer": {"name": "modelopt"}, "config_groups": {"0": group}},
    }
    config = json.loads((folder / "config.json").read_text())
    if form == "modelopt file":
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    else:
        config["quantization_config"] = settings[form]
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("form", ["blocks", "channels", "modelopt", "modelopt file"])
def test_a_low_precision_checkpoint_converts_to_the_plain_weights_it_stands_for(form, tmp_path):
    expected = quantized_llama(tmp_path / "parent", form)
    found = detect(tmp_path / "parent")
    assert found.verdict == "supported" and "ingest.dequantize" in found.capabilities
    run = convert(tmp_path / "parent", tmp_path / "run")
    mask, written = run.manifest["mask_token"]["id"], load_file(run.model_path / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        same = tensor.dtype == torch.bfloat16 and tensor == expected[name]
        assert torch.all(same) or (~same).nonzero()[:, 0].unique().tolist() == [mask], name
    said = run.manifest["ingest"]["dequantized"]
    assert (said["tensors"], said["dtype"]) == (14, "bfloat16")
    assert "quantization_config" not in (run.model_path / "config.json").read_text()
    assert not (run.path / ".ingest").exists()


def test_blocks_agree_with_transformers_own_loading(tmp_path):
    from transformers import AutoModelForCausalLM

    expected = quantized_llama(tmp_path / "parent", "blocks")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "parent", dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
