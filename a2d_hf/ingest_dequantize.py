"""Stored low-precision weights back to plain ones, by the documented formula of each format.

Owns which tensors belong together (a weight and its scales) and what they stand for. Every format is one of two forms:

    value = (code - zero point) * scale + bias      each of them spread over blocks of the weight
    value = E2M1 code * 2^(E8M0 scale), transposed  gpt-oss's experts

Sources: DeepSeek-V3's `weight_scale_inv` (https://huggingface.co/papers/2412.19437), OCP Microscaling Formats 1.0
(E2M1, E8M0), compressed-tensors 0.15 and later, ModelOpt, transformers' Metal format. Arithmetic is fp32, rounded once
to the target type. Rows are decoded a piece at a time; touches no file but the source's.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

import torch

from .errors import Refused
from .ingest_tensors import PlannedTensor, StoredTensor


EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# What a quantized module stores beside its weight for the sake of activations and caches: of no use to plain weights.
RUNTIME_SCALE = re.compile(
    r"\.(activation_scale|qscale_act|input_scale|input_global_scale|input_zero_point|output_scale|[qkv]_scale|"
    r"[qkv]_zero_point|kv_scale)$"
)
SCALES_OF_WEIGHT = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")


@dataclass
class Dequantized:
    """
    Attributes:
        tensors (`dict[str, PlannedTensor]`): the plain tensors that replace quantized ones, by name.
        consumed (`set[str]`): stored tensors that these are made of.
        runtime (`set[str]`): scales of activations and caches, which plain weights do not need.
        schemes (`Counter`): how many tensors were stored in which form.
    """

    tensors: dict[str, PlannedTensor] = field(default_factory=dict)
    consumed: set[str] = field(default_factory=set)
    runtime: set[str] = field(default_factory=set)
    schemes: Counter = field(default_factory=Counter)


def dequantize_all(stored: dict[str, StoredTensor], settings: dict, target: torch.dtype) -> Dequantized:
    """
    Plans the plain form of every quantized tensor.

    Args:
        stored (`dict[str, StoredTensor]`): the checkpoint.
        settings (`dict`): its `quantization_config`; empty where the tensors alone say what they are.
        target (`torch.dtype`): precision of the plain weights.

    Raises:
        [`Refused`]: a quantized tensor without the scales that its format needs.
    """
    done = Dequantized()
    for name in stored:
        found = _recognise(name, stored, settings, target)
        if found is not None:
            scheme, plan, consumed = found
            done.tensors[plan.name] = plan
            done.consumed |= consumed
            done.schemes[scheme] += 1
        elif RUNTIME_SCALE.search(name):
            done.runtime.add(name)
    left = [
        name
        for name, tensor in stored.items()
        if name not in done.consumed | done.runtime and tensor.dtype in (*EIGHT_BITS, torch.float8_e8m0fnu)
    ]
    if left:
        raise Refused(
            f"{left[0]} is stored in 8 bits without a scale that could be found: convert the full-precision "
            "checkpoint instead."
        )
    return done


def _recognise(
    name: str, stored: dict[str, StoredTensor], settings: dict, target: torch.dtype
) -> tuple[str, PlannedTensor, set[str]] | None:
    """What a tensor is part of: the scheme, the plain tensor, and the stored ones it is made of; `None` if nothing."""
    tensor = stored[name]
    if name.endswith("_blocks") and (scales := stored.get(name.removesuffix("_blocks") + "_scales")) is not None:
        return "mxfp4", _experts_mxfp4(tensor, scales, target), {name, scales.name}
    module = name.rpartition(".")[0]
    beside = {key: stored.get(f"{module}.{key}") for key in _BESIDE}
    if name.endswith(".weight_packed"):
        return _packed(tensor, module, beside, settings, target)
    if tensor.dtype == torch.uint32 and beside["scales"] is not None and beside["qbiases"] is not None:
        bits = int(settings.get("bits", 4))
        columns = tensor.shape[-1] * (32 // bits)
        plan = _affine(
            name, tensor, (*tensor.shape[:-1], columns), lambda rows: _unsigned(rows, bits, columns),
            beside["scales"].read().float(), target, bias=beside["qbiases"].read().float(),
        )  # fmt: skip
        return f"metal {bits}-bit", plan, {name, beside["scales"].name, beside["qbiases"].name}
    scale = _scale_of(name, module, stored)
    if scale is None:
        return None
    if tensor.dtype in EIGHT_BITS:
        grid = _numbers(scale)
        plan = _affine(name, tensor, tensor.shape, torch.Tensor.float, grid, target, block=_block(settings))
        return f"fp8 {_strategy(grid, tensor.shape)}", plan, {name, scale.name}
    power_of_two = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
    if tensor.dtype == torch.uint8 and beside["weight_scale_2"] is not None:
        grid = scale.read().float() * beside["weight_scale_2"].read().float()
        plan = _affine(name, tensor, _twice(tensor), _unpack_e2m1, grid, target)
        return "nvfp4", plan, {name, scale.name, beside["weight_scale_2"].name}
    if tensor.dtype in (torch.int8, torch.uint8) and power_of_two:
        plan = _affine(name, tensor, _twice(tensor), _unpack_e2m1, _numbers(scale), target)
        return "mxfp4", plan, {name, scale.name}
    if tensor.dtype == torch.int8:
        zero = beside["weight_zero_point"]
        plan = _affine(
            name, tensor, tensor.shape, torch.Tensor.float, _numbers(scale), target,
            zero=None if zero is None else zero.read().float(), block=_block(settings),
        )  # fmt: skip
        return "int8", plan, {name, scale.name} | ({zero.name} if zero is not None else set())
    return None


_BESIDE = ("scales", "qbiases", "weight_scale", "weight_scale_2", "weight_zero_point", "weight_shape",
           "weight_g_idx", "weight_global_scale")  # fmt: skip


def _scale_of(name: str, module: str, stored: dict[str, StoredTensor]) -> StoredTensor | None:
    """The scale of a weight: beside it (`x.weight_scale`), or under its own name (`experts.down_proj_scale_inv`)."""
    candidates = [f"{name}_scale_inv", f"{name}_scale"]
    if name.endswith(".weight"):
        candidates += [f"{module}.{key}" for key in SCALES_OF_WEIGHT]
    return next((stored[candidate] for candidate in candidates if candidate in stored), None)


def _numbers(scale: StoredTensor) -> torch.Tensor:
    """A scale as fp32; bytes are E8M0 exponents."""
    values = scale.read()
    return (values.float() - 127.0).exp2() if values.dtype == torch.uint8 else values.float()


def _block(settings: dict) -> tuple[int, int] | None:
    """The block that the configuration states: a last block may then be cut off by the weight's edge."""
    block = settings.get("weight_block_size")
    for group in (settings.get("config_groups") or {}).values():
        block = block or ((group or {}).get("weights") or {}).get("block_structure")
    return tuple(block) if isinstance(block, list | tuple) and len(block) == 2 else None


def _strategy(grid: torch.Tensor, shape: tuple[int, ...]) -> str:
    if grid.numel() == prod(shape[:-2]):
        return "per tensor"
    return "per channel" if grid.numel() in (prod(shape[:-1]), prod(shape[:-2]) * shape[-1]) else "by blocks"


def _twice(tensor: StoredTensor) -> tuple[int, ...]:
    return (*tensor.shape[:-1], 2 * tensor.shape[-1])


def _packed(
    tensor: StoredTensor, module: str, beside: dict[str, StoredTensor | None], settings: dict, target: torch.dtype
) -> tuple[str, PlannedTensor, set[str]]:
    """compressed-tensors' packed formats: integers of any width in int32 words, or two E2M1 codes in a byte."""
    scale = beside["weight_scale"]
    if scale is None:
        raise Refused(f"{tensor.name} has no weight_scale beside it: convert the full-precision checkpoint instead.")
    consumed = {tensor.name} | {part.name for part in beside.values() if part is not None}
    name = f"{module}.weight"
    if tensor.dtype == torch.uint8:
        whole = beside["weight_global_scale"]
        grid = _numbers(scale) if whole is None else scale.read().float() / whole.read().float()
        scheme = "mxfp4" if whole is None else "nvfp4"
        return scheme, _affine(name, tensor, _twice(tensor), _unpack_e2m1, grid, target), consumed
    bits = _bits(settings, module)
    shape = beside["weight_shape"]
    if bits is None or shape is None:
        raise Refused(f"{tensor.name} is packed in a way that its configuration does not state: convert the original.")
    shape = tuple(int(size) for size in shape.read().flatten().tolist())
    offset, columns = 2 ** (bits - 1), shape[-1]
    grid, zero, order = scale.read().float(), beside["weight_zero_point"], beside["weight_g_idx"]
    if zero is not None:  # packed like the weight, along the rows
        words = zero.read()
        if words.dtype == torch.int32:
            zero = (_unsigned(words.T.contiguous(), bits, shape[0]).T - offset).reshape(grid.shape)
        else:
            zero = words.float()
    plan = _affine(
        name, tensor, shape, lambda rows: _unsigned(rows, bits, columns) - offset, grid, target, zero=zero,
        columns=None if order is None else order.read().long(),
    )  # fmt: skip
    return f"int{bits} packed", plan, consumed


def _bits(settings: dict, module: str) -> int | None:
    """The width that the configuration gives a module's weights; its groups name classes, or modules by a pattern."""
    groups = [group for group in (settings.get("config_groups") or {}).values() if (group or {}).get("weights")]
    for group in groups:
        for target in group.get("targets") or ():
            pattern = target.removeprefix("re:")
            if pattern == module or (target.startswith("re:") and re.match(pattern, module)):
                return group["weights"].get("num_bits")
    widths = {group["weights"].get("num_bits") for group in groups}
    return widths.pop() if len(widths) == 1 else None


def _unsigned(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """`count` integers of `bits` bits from every row of 32-bit words, least significant first, as fp32."""
    words = words.to(torch.int64) & 0xFFFFFFFF
    position = torch.arange(count) * bits
    first, shift = position // 32, position % 32
    low = words[:, first] >> shift
    second = (first + 1).clamp(max=words.shape[1] - 1)
    high = words[:, second] << (32 - shift)  # bits of a number that goes on in the next word
    return torch.where(shift + bits > 32, low | high, low).bitwise_and(2**bits - 1).float()


def _unpack_e2m1(rows: torch.Tensor) -> torch.Tensor:
    """Two 4-bit floats from every byte, the low half first, as fp32."""
    codes, table = rows.view(torch.uint8), torch.tensor(E2M1)
    return torch.stack((table[(codes & 15).long()], table[(codes >> 4).long()]), dim=-1).flatten(-2)


def _affine(
    name: str,
    tensor: StoredTensor,
    shape: tuple[int, ...],
    decode: Callable[[torch.Tensor], torch.Tensor],
    scale: torch.Tensor,
    target: torch.dtype,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    block: tuple[int, int] | None = None,
    columns: torch.Tensor | None = None,
) -> PlannedTensor:
    """
    The plan of `(code - zero) * scale + bias`.

    Args:
        name (`str`): of the plain tensor.
        tensor ([`StoredTensor`]): the codes.
        shape (`tuple`): of the plain tensor.
        decode (`Callable`): stored rows to codes, fp32.
        scale, zero, bias (`torch.Tensor`): one number, one per row, or a grid over the last two dimensions.
        target (`torch.dtype`): of the plain tensor.
        block (`tuple`, *optional*): rows and columns that share a scale, where the configuration says so.
        columns (`torch.Tensor`, *optional*): for every column, its column of the grid, where they are not in order.
    """
    height, width = (shape[-2] if len(shape) > 1 else 1), shape[-1]
    grids = [None if grid is None else _as_grid(grid, shape, name) for grid in (scale, zero, bias)]
    down, across = grids[0].shape[-2:]
    if block is not None and (-(-height // block[0]), -(-width // block[1])) == (down, across):
        tall, wide = block
    elif height % down == 0 and width % across == 0:
        tall, wide = height // down, width // across
    else:
        raise Refused(
            f"{name} has {height} x {width} numbers, which {down} x {across} scales do not divide: its "
            "configuration must state the size of a block."
        )
    spread = torch.arange(width) // wide if columns is None else columns

    def over(grid: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        matrix = (rows // height).clamp(max=grid.shape[0] - 1)
        line = grid[matrix, (rows % height) // tall] if grid.shape[-2] > 1 else grid[matrix, 0]
        return line[:, spread] if grid.shape[-1] > 1 else line

    def pieces() -> Iterator[torch.Tensor]:
        scales, zeros, biases = grids
        for start, stop in tensor.row_spans(width):
            rows = torch.arange(start, stop)
            values = decode(tensor.read_rows(start, stop))
            if zeros is not None:
                values = values - over(zeros, rows)
            values = values * over(scales, rows)
            if biases is not None:
                values = values + over(biases, rows)
            yield values.to(target)

    return PlannedTensor(name, target, tuple(shape), pieces)


def _as_grid(grid: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """A scale as `(matrices, rows of blocks, columns of blocks)`."""
    lead, height = prod(shape[:-2]), (shape[-2] if len(shape) > 1 else 1)
    if grid.numel() == 1:
        return grid.reshape(1, 1, 1)
    if grid.ndim >= 2 and prod(grid.shape[:-2]) in (1, lead) and grid.ndim <= max(len(shape), 2):
        if len(shape) < 3 or grid.ndim == len(shape):
            return grid.reshape(-1, *grid.shape[-2:])
    if grid.numel() == lead * height:
        return grid.reshape(lead, height, 1)
    if grid.numel() == lead:
        return grid.reshape(lead, 1, 1)
    raise Refused(f"{name} has the shape {list(shape)} and scales of the shape {list(grid.shape)}: they do not fit.")


def _experts_mxfp4(blocks: StoredTensor, scales: StoredTensor, target: torch.dtype) -> PlannedTensor:
    """gpt-oss's experts: blocks `(E, R, G, 16)` of two codes a byte, exponents `(E, R, G)`, become `(E, 32 G, R)`."""
    if len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape:
        raise Refused(f"{blocks.name} and {scales.name} do not fit each other: download the checkpoint again.")
    experts, rows, groups, _ = blocks.shape
    per_expert = rows * groups

    def pieces() -> Iterator[torch.Tensor]:
        for expert in range(experts):
            codes = _unpack_e2m1(blocks.read_rows(expert * per_expert, (expert + 1) * per_expert))
            exponents = scales.read_rows(expert * rows, (expert + 1) * rows).reshape(-1, 1).to(torch.int32) - 127
            yield torch.ldexp(codes, exponents).reshape(rows, -1).T.to(target)

    width = groups * blocks.shape[-1] * 2
    return PlannedTensor(blocks.name.removesuffix("_blocks"), target, (experts, width, rows), pieces)
