"""Brings a parent folder to what the surgery takes: a plain safetensors checkpoint of a causal text model.

Owns the decision what has to be done and the record of it. A folder that is plain already is left alone; one whose
configuration misstates its weights gets another config.json beside links to them; anything else (`.bin` files,
low-precision weights, a multimodal model) is streamed, tensor by tensor, into a folder of its own. Writes that folder
only, and leaves the source's name, licence and fingerprint as they are.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .atomic_files import explained_writes
from .console import Console, size
from .detection.quantization import read_quantization
from .errors import A2DError, BadInput, Refused, first_sentence
from .ingest_dequantize import EIGHT_BITS, Dequantized, dequantize_all
from .ingest_tensors import PlannedTensor, StoredTensor, dtype_name, stored_tensors, write_sharded
from .ingest_text_model import (
    LoadingNames,
    TextModel,
    build_empty,
    converted_tensor,
    find_text_model,
    is_multimodal,
    missing_tensors,
    names_in_text_model,
    unused_tensors,
)
from .source import TOKENIZER_EXTRAS, TOKENIZER_FILES, Source, find_weights
from .surgery import explained_loading


QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
PLAIN_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What a folder holds beside weights and configuration that a text model has a use for.
COPIED = (*TOKENIZER_FILES, *TOKENIZER_EXTRAS, "generation_config.json")


@dataclass(frozen=True)
class PreparedSource(Source):
    """
    A normalised folder that answers for the parent it was made from.

    Attributes:
        original ([`Source`]): the parent; name, licence and fingerprint are its.
    """

    original: Source | None = None

    def fingerprint(self, advance: Callable[[int], None] | None = None) -> dict[str, Any]:
        return self.original.fingerprint(advance)


@dataclass
class Plan:
    """
    What will be written, and what is known about it.

    Attributes:
        config (`dict`): config.json.
        restated (`bool`): whether that differs from the parent's.
        rewrite (`bool`): whether the weights have to be written anew; links to the parent's do otherwise.
        tensors (`list[PlannedTensor]`): what to write.
        record (`dict`): for the manifest.
        said (`list[str]`): one sentence per thing done.
    """

    config: dict[str, Any]
    restated: bool = False
    rewrite: bool = False
    tensors: list[PlannedTensor] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.said.append(text)


def prepared_source(
    source: Source, staging: Path, console: Console, *, trust_remote_code: bool = False
) -> tuple[Source, dict[str, Any]]:
    """
    The parent as a plain safetensors checkpoint of a causal text model.

    Args:
        source ([`Source`]): the parent, checked.
        staging (`Path`): a folder to make where the parent is not plain already; what stands there is removed first.
        console ([`Console`]): told everything that is done.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run Python code found in the parent's folder.

    Returns:
        `tuple[Source, dict]`: the source itself where it is plain, else one at `staging`; and the record of what was
        done, for the manifest (`actions` is empty where nothing was).

    Raises:
        [`Refused`]: its text model cannot be taken out, or its weights cannot be turned back into plain ones.
        [`BadInput`]: the files are at fault.
        [`SaveFailed`]: disk full.
    """
    discard(staging)
    with explained_loading(source.path):
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code, local_files_only=True)
        stored = stored_tensors(source)
    plan = _plan(source, config, stored)
    for text in plan.said:
        console.note(text)
    plan.record = {"actions": plan.said, **plan.record}
    if not plan.rewrite and not plan.restated:
        return source, plan.record
    try:
        with explained_writes(staging):
            staging.mkdir(parents=True)
            _write(source, plan, staging, console)
    except BaseException:
        discard(staging)
        raise
    return _at(staging, source, plan), plan.record


def stored_dtypes(source: Source, model: PreTrainedModel) -> dict[str, torch.dtype]:
    """
    The precision in which every parameter of a model is stored, by name; of several tensors that make one parameter,
    the widest.

    Args:
        source ([`Source`]): a plain checkpoint.
        model (`PreTrainedModel`): what it loads into.
    """
    names, found = LoadingNames(model), {}
    for name, tensor in stored_tensors(source).items():
        for target in names.targets(name):
            found[target] = torch.promote_types(found.get(target, tensor.dtype), tensor.dtype)
    for target, kept in (model.all_tied_weights_keys or {}).items():
        if target in found:
            found.setdefault(kept, found[target])
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def discard(staging: Path) -> None:
    """Removes what a preparation left, finished or not."""
    shutil.rmtree(staging, ignore_errors=True)


def _write(source: Source, plan: Plan, staging: Path, console: Console) -> None:
    if not plan.rewrite:
        for name in source.weights:
            os.symlink((source.path / name).resolve(), staging / name)
        for index in source.path.glob("*.index.json"):
            shutil.copyfile(index, staging / index.name)
    else:
        total = sum(tensor.nbytes for tensor in plan.tensors)
        with console.progress("preparing the weights", total, "byte") as bar:
            write_sharded(staging, plan.tensors, bar.advance)
    (staging / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
    for name in COPIED:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, staging / name)
    for code in source.path.glob("*.py"):
        shutil.copyfile(code, staging / code.name)


def _at(staging: Path, source: Source, plan: Plan) -> PreparedSource:
    weights, index = find_weights(staging)
    beside = [name for name in source.files if name not in source.weights and (staging / name).is_file()]
    extra = [index] if index and index not in beside else []
    return PreparedSource(
        staging, source.name, plan.config, weights, [*dict.fromkeys((*beside, *extra, *weights))], source.licence,
        original=source,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the plan


def _plan(source: Source, config: Any, stored: dict[str, StoredTensor]) -> Plan:
    plan = Plan(dict(source.config), rewrite=not source.weights[0].endswith(".safetensors"))
    plan.record["format"] = "pytorch" if plan.rewrite else "safetensors"
    if plan.rewrite:
        plan.say(f"{len(source.weights)} pickled file(s) rewritten as safetensors, read with weights_only")
    elif left := sorted(file.name for file in source.path.glob("pytorch_model*.bin")):
        plan.say(f"safetensors taken, {len(left)} .bin file(s) beside them left aside")

    dequantized = _dequantize(source, config, stored, plan)
    gone = dequantized.consumed | dequantized.runtime
    tensors = {
        name: PlannedTensor(name, tensor.dtype, tensor.shape, tensor.pieces)
        for name, tensor in stored.items()
        if name not in gone
    } | dequantized.tensors
    model: PreTrainedModel | None = None
    if is_multimodal(config):
        text, tensors = _take_text(source, config, tensors, plan)
        model, plan.rewrite = text.model, True
        plan.config = _text_config(text)
    elif type(config) in AutoModelForCausalLM._model_mapping:
        model = build_empty(AutoModelForCausalLM._model_mapping[type(config)], config)
    if model is not None:
        missing = missing_tensors(model, list(tensors))
        if missing and plan.rewrite:
            raise BadInput(
                f"The weights in {source.path} lack {len(missing)} tensor(s) that config.json asks for, the first is "
                f"{missing[0]}: this is not the whole model."
            )
        tensors = _set_unused_aside(model, tensors, plan)
        _settle_ties(model, tensors, plan)
    _settle_dtype(config, tensors, plan)
    plan.tensors = [tensors[name] for name in sorted(tensors)] if plan.rewrite else []
    return plan


def _dequantize(source: Source, config: Any, stored: dict[str, StoredTensor], plan: Plan) -> Dequantized:
    """Weights in low precision, planned as plain ones."""
    raw = plan.config
    text = config.get_text_config(decoder=True).to_dict() if is_multimodal(config) else raw
    found = read_quantization(raw, text, source.path)
    low = any(tensor.dtype in EIGHT_BITS for tensor in stored.values())
    if found is None and not low:
        return Dequantized()
    settings = found.settings if found is not None else {}
    target = _stated_dtype(config)
    target = target if target in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16
    done = dequantize_all(stored, settings, target)
    if found is not None and not done.tensors:
        plan.say("its configuration speaks of quantized weights, but they are plain: taken as they are")
    plan.config = {key: value for key, value in raw.items() if key not in QUANTIZATION_KEYS}
    forms = ", ".join(f"{count} {scheme}" for scheme, count in sorted(done.schemes.items()))
    if done.tensors:
        scales = f"; {len(done.runtime)} scales of activations dropped" if done.runtime else ""
        plan.say(f"{len(done.tensors)} weights turned back into {dtype_name(target)} ({forms}){scales}")
    plan.record["dequantized"] = {
        "method": found.method if found is not None else "fp8",
        "dtype": dtype_name(target),
        "schemes": dict(done.schemes),
        "tensors": len(done.tensors),
        "dropped_runtime_scales": patterns(done.runtime),
    }
    plan.restated, plan.rewrite = True, plan.rewrite or bool(done.tensors)
    return done


def _take_text(
    source: Source, config: Any, tensors: dict[str, PlannedTensor], plan: Plan
) -> tuple[TextModel, dict[str, PlannedTensor]]:
    """The text model of a multimodal one, and its tensors under its own names."""
    try:
        text, proof = find_text_model(config, source.name)
        renamed, converted = names_in_text_model(text, list(tensors))
    except A2DError:
        raise
    except Exception as error:  # a configuration that transformers cannot build a model from
        raise Refused(
            f"{source.name} is multimodal and its text model cannot be taken out alone: {first_sentence(error)}"
        ) from error
    dropped = {name: tensor for name, tensor in tensors.items() if name not in renamed}
    lost = sum(tensor.nbytes for tensor in dropped.values())
    plan.say(
        f"multimodal: only its text model converts, as {type(text.model).__name__}; {len(dropped)} tensors "
        f"({size(lost)}) of images or sound are left behind"
    )
    if "not_run" in proof:
        plan.say(f"not compared with the multimodal model in numbers: {proof['not_run']}")
    plan.record["text_only"] = {
        "from": type(text.whole).__name__,
        "class": type(text.model).__name__,
        "model_type": text.model.config.model_type,
        "tensors": len(renamed),
        "dropped_tensors": len(dropped),
        "dropped_bytes": lost,
        "dropped": patterns(dropped),
        "proof": proof,
    }
    taken = {
        new: _as_loaded(text, tensors[name], new) if name in converted else replace(tensors[name], name=new)
        for name, new in renamed.items()
    }
    return text, taken


def _as_loaded(text: TextModel, tensor: PlannedTensor, name: str) -> PlannedTensor:
    """A tensor that the multimodal class changes while loading (experts that it transposes); whole in memory."""

    def pieces() -> Iterator[torch.Tensor]:
        whole = torch.cat([piece.reshape(-1) for piece in tensor.pieces()]).reshape(tensor.shape)
        yield converted_tensor(text, tensor.name, whole)

    return PlannedTensor(name, tensor.dtype, tuple(text.model.state_dict()[name].shape), pieces)


def _text_config(text: TextModel) -> dict[str, Any]:
    config = text.model.config
    values = json.loads(config.to_json_string(use_diff=False))
    for key in (*QUANTIZATION_KEYS, "_name_or_path", "transformers_version"):
        values.pop(key, None)
    return values | {"architectures": [type(text.model).__name__], "model_type": config.model_type}


def _set_unused_aside(
    model: PreTrainedModel, tensors: dict[str, PlannedTensor], plan: Plan
) -> dict[str, PlannedTensor]:
    """Tensors that the parent's class does not load: buffers of old versions, value heads, layers that look ahead."""
    unused = unused_tensors(model, list(tensors))
    if unused:
        bytes_ = sum(tensors[name].nbytes for name in unused)
        kinds = list(patterns(unused))
        shown = ", ".join(kinds[:3]) + (f" and {len(kinds) - 3} more kinds" if len(kinds) > 3 else "")
        fate = "left out" if plan.rewrite else "not loaded"
        plan.say(f"{len(unused)} tensors ({size(bytes_)}) that {type(model).__name__} has no use for {fate}: {shown}")
        plan.record["unused"] = {"tensors": len(unused), "bytes": bytes_, "names": patterns(unused)}
    return {name: tensor for name, tensor in tensors.items() if name not in unused}


def _settle_ties(model: PreTrainedModel, tensors: dict[str, PlannedTensor], plan: Plan) -> None:
    """
    Weights that the configuration ties but the files hold twice. Equal: one is kept, as the parent's class saves it.
    Different: both are kept and the configuration says so, which is how transformers loads them.
    """
    for target, kept in (model.all_tied_weights_keys or {}).items():
        if target not in tensors or kept not in tensors:
            continue
        if _equal(tensors[target], tensors[kept]):
            plan.record.setdefault("tied_twice", {})[target] = "equal"
            if plan.rewrite:
                del tensors[target]
                plan.say(f"{target} is {kept} stored twice: kept once")
        else:
            plan.record.setdefault("tied_twice", {})[target] = "different"
            plan.say(f"{target} differs from {kept}, though config.json ties them: kept apart, as transformers does")
            plan.config = plan.config | {"tie_word_embeddings": False}
            plan.restated = True


def _equal(one: PlannedTensor, other: PlannedTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(torch.equal(a, b) for a, b in zip(one.pieces(), other.pieces(), strict=True))


def _stated_dtype(config: Any) -> torch.dtype | None:
    """The precision that a configuration states, for the text model where it says so apart."""
    text = config.get_text_config(decoder=True)
    return text.dtype if text.dtype is not None else config.dtype


def _settle_dtype(config: Any, tensors: dict[str, PlannedTensor], plan: Plan) -> None:
    """The precision of most stored numbers is the model's, whatever the configuration states."""
    held: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in PLAIN_FLOATS:
            held[tensor.dtype] += tensor.nbytes // tensor.dtype.itemsize
    if not held:
        return
    stated, most = _stated_dtype(config), held.most_common(1)[0][0]
    plan.record["dtype"] = {
        "stated": None if stated is None else dtype_name(stated),
        "stored": {dtype_name(dtype): count for dtype, count in held.most_common()},
        "used": dtype_name(most),
    }
    if len(held) > 1:
        parts = ", ".join(f"{count:,} in {dtype_name(dtype)}" for dtype, count in held.most_common())
        plan.say(f"numbers of several precisions, each kept as it is: {parts}")
    correct = {key: value for key, value in plan.config.items() if key not in ("dtype", "torch_dtype")}
    plan.config = correct | {"dtype": dtype_name(most)}
    if stated == most:
        return
    plan.restated = True
    if stated is None:
        plan.say(f"config.json states no precision: {dtype_name(most)}, as stored")
    else:
        plan.say(f"config.json states {dtype_name(stated)}, the weights are {dtype_name(most)}: what is stored wins")


def patterns(names: Iterable[str]) -> dict[str, int]:
    """Names with every number in them as `*`, and how many of each."""
    return dict(sorted(Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names).items()))
