"""Whether a checkpoint's weights are stored in a form that can be trained.

Owns the rules about `quantization_config`: formats that transformers turns back into bf16 while loading are fine,
formats that have thrown the full weights away are refused with the name of the checkpoint to use instead. Reads the
config only (and ModelOpt's own, which stands beside it).
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config_reading import InvalidConfig
from .type_table import dequantizable_methods


# How people mark a quantized copy in its name; what stands before is the name of the original.
QUANTIZED_NAME = re.compile(
    r"[-_.]((gptq|awq|bnb|gguf|exl2|exl3|hqq|aqlm|eetq|quanto|mlx|nf4|int4|int8|w4a16|w8a8|w8a16|q4|q8|fp8|nvfp4)\b.*"
    r"|[48]-?bits?\b.*)$",
    re.IGNORECASE,
)
# ModelOpt's own file; its older checkpoints say nothing in config.json.
MODELOPT_FILE = "hf_quant_config.json"
MODELOPT_ALGORITHMS = ("FP8", "NVFP4")
# How compressed-tensors may store weights so that ingest_dequantize.py has the formula.
COMPRESSED_FORMATS = (
    None, "dense", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip
METHOD_NAMES = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "aqlm": "AQLM", "hqq": "HQQ"}


@dataclass(frozen=True)
class Quantization:
    """
    How weights are stored.

    Attributes:
        method (`str`): transformers' name of the method, `mlx` or `unknown`.
        dequantizable (`bool`): whether loading can give bf16 weights back.
        bits (`int`, *optional*): of a weight, where the config says.
        settings (`dict`): the quantization config itself.
    """

    method: str
    dequantizable: bool
    bits: int | None
    settings: dict[str, Any] = field(default_factory=dict, compare=False)

    def refusal(self, original: str | None) -> str:
        """Why it is refused and what to use instead; `original` is the full-precision checkpoint, where known."""
        shown = METHOD_NAMES.get(self.method, self.method)
        label = "quantized weights" if self.method == "unknown" else f"{shown} weights"
        bits = f" ({self.bits} bits)" if self.bits else ""
        instead = original or "the full-precision checkpoint that this one was quantized from"
        return f"it holds {label}{bits}, which cannot be turned back into the trained ones: convert {instead} instead."


def original_name(folder: Path | None, names: list[str | None]) -> str | None:
    """
    What to call the full-precision checkpoint behind a quantized copy.

    Args:
        folder (`Path`, *optional*): the copy's folder; its model card may name the original.
        names (`list`): what the copy is called, best first.

    Returns:
        `str`, *optional*: the Hub id that the model card gives, or the copy's own name without the mark of its format
        (without the owner: whoever quantized a model is seldom who trained it).
    """
    card = folder / "README.md" if folder is not None else None
    if card is not None and card.is_file():
        with open(card, encoding="utf-8", errors="replace") as file:
            head = file.read(8192)
        if found := re.search(r"^base_model:\s*(?:\n\s*-\s*)?[\"']?([\w.\-]+/[\w.\-]+)", head, re.MULTILINE):
            return found[1]
    for name in names:
        last = (name or "").rstrip("/").rpartition("/")[2]
        short = QUANTIZED_NAME.sub("", last)
        if short and short != last:
            return f"the full-precision {short}"
    return None


def read_quantization(config: dict[str, Any], text: dict[str, Any], folder: Path | None = None) -> Quantization | None:
    """
    How the weights of a checkpoint are stored; `None` where they are plain.

    Args:
        config (`dict`): the whole config.
        text (`dict`): the part that describes the text model.
        folder (`Path`, *optional*): where the config is; ModelOpt may have left its own beside it.

    Raises:
        [`InvalidConfig`]: a quantization config that is no object.
    """
    for holder in (config, text):
        for key in ("quantization_config", "compression_config", "quantization"):
            settings = holder.get(key)
            if settings is None or settings == {}:
                continue
            if not isinstance(settings, dict):
                raise InvalidConfig(f"`{key}` is not an object.")
            return _read(settings, key)
    return _modelopt_file(folder)


def _modelopt_file(folder: Path | None) -> Quantization | None:
    file = folder / MODELOPT_FILE if folder is not None else None
    if file is None or not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))["quantization"]
        return _read({"quant_method": "modelopt", "quant_algo": settings["quant_algo"]}, "quantization_config")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidConfig(
            f"`{MODELOPT_FILE}` beside it cannot be read: it must hold `quantization.quant_algo`."
        ) from error


def _read(settings: dict[str, Any], key: str) -> Quantization:
    method = settings.get("quant_method")
    producer = settings.get("producer")
    if method is None and isinstance(producer, dict) and producer.get("name") == "modelopt":
        method = "modelopt"
    bits = settings.get("bits", settings.get("w_bit"))
    bits = bits if type(bits) is int and 0 < bits <= 16 else None
    if method is None:
        if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
            method = "bitsandbytes"
        elif key == "compression_config" or "config_groups" in settings:
            method = "compressed-tensors"
        elif bits and "group_size" in settings:
            method = "mlx"
        else:
            method = "unknown"
    method = str(method)[:40]
    if method == "bitsandbytes":
        bits = 8 if settings.get("load_in_8bit") else 4 if settings.get("load_in_4bit") else bits
    return Quantization(method, _can_undo(method, settings), bits, settings)


def _can_undo(method: str, settings: dict[str, Any]) -> bool:
    """Whether [`a2d_hf.ingest`] has the formula that turns the stored weights back into plain ones."""
    if method == "modelopt":
        return settings.get("quant_algo") in MODELOPT_ALGORITHMS
    if method != "compressed-tensors":
        return method in dequantizable_methods()
    groups = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    formats = [settings.get("format"), *(group.get("format") for group in groups if isinstance(group, dict))]
    sparse = settings.get("sparsity_config")
    plain = not isinstance(sparse, dict) or sparse.get("format") in (None, "dense")
    # Weights may also be stored rotated: undoing that needs the transform itself.
    return plain and not settings.get("transform_config") and all(kind in COMPRESSED_FORMATS for kind in formats)
