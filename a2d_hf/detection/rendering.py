"""The answer of `a2d detect` as a person reads it.

Owns words and layout; decides nothing.
"""

from ..console import Console
from .verdict import Detection


COLOURS = {"supported": "green", "hybrid": "yellow", "unsupported": "red"}
STRATEGIES = {
    "tokenizer": "the tokenizer's own",
    "free_row": "first free embedding row",
    "reserved": "a token that the vocabulary sets aside",
    "grow": "a new row; the embeddings grow",
    "undetermined": "decided at conversion, when the tokenizer is loaded",
}


def render(found: Detection, console: Console) -> None:
    """
    Prints an answer.

    Args:
        found ([`Detection`]): the answer.
        console ([`Console`]): where to.
    """
    verdict = console.style(found.verdict, COLOURS[found.verdict])
    console.line(f"{console.style(found.source, 'bold')}  {verdict}")
    if found.model_type:
        _row(console, "type", found.model_type + _qualifiers(found))
    for reason in found.reasons:
        _row(console, "reason", f"{console.style(reason.code, 'red')}  {reason.message}")
    if found.layers is not None and (found.layers.is_hybrid or found.layers.silent):
        _row(console, "layers", found.layers.sentence())
    if found.capabilities:
        _row(console, "built of", " ".join(found.capabilities))
    _row(console, "weights", _weights(found))
    if found.plan is not None:
        _row(console, "mask token", _mask_token(found))
        _plan(console, found)
    if found.text_only and found.verdict != "unsupported":
        _row(console, "note", "only the text model converts; images and sound are left behind")


def _row(console: Console, label: str, text: str) -> None:
    console.line(f"  {console.style(label.ljust(11), 'dim')} {text}")


def _qualifiers(found: Detection) -> str:
    notes = []
    if found.text_only:
        notes.append("text model of a multimodal one")
    if found.inferred and found.verdict != "unsupported":
        notes.append("inferred: not yet proven for this type; the gates check it at conversion")
    return f" ({'; '.join(notes)})" if notes else ""


def _weights(found: Detection) -> str:
    weights = found.weights
    if weights.present:
        files = f"{weights.shards} file{'s' if weights.shards != 1 else ''}"
        note = f" ({weights.note})" if weights.note else ""
        return f"{weights.format}, {files}, {_size(weights.bytes)}{note}"
    if weights.foreign or weights.broken:
        return f"{weights.format or 'none'}, not usable"
    return f"missing; to fetch them: {weights.download}" if weights.download else "missing"


def _mask_token(found: Detection) -> str:
    chosen = found.mask_token
    how = STRATEGIES[chosen.strategy]
    return how if chosen.id is None else f"{chosen.token} = {chosen.id} ({how})"


def _plan(console: Console, found: Detection) -> None:
    plan = found.plan
    count, memory = plan["parameters"], plan["memory_gb"]
    active = f", {_count(count['active'])} active per token" if count["active"] < count["total"] else ""
    _row(console, "parameters", f"{_count(count['total'])}{active} (from the {count['source']})")
    gpu = plan["gpu"]
    _row(console, "memory", "  ".join(f"{name} {memory[name]:g} GB" for name in ("full", "lora", "qlora", "decode")))
    for name in ("full", "activations"):
        _row(console, "", f"{name} = {plan['formula'][name]}")
    _row(console, "objective", f"{plan['objective']}: {plan['objective_reason']}")
    _row(console, "tokens", f"about {_count(plan['tokens'])} = {plan['formula']['tokens']}")
    if gpu is not None:
        hours, needed = gpu["hours"], gpu["gpus_for_memory"]
        _row(console, "hours", f"full {hours['full']:g}, lora {hours['lora']:g}, counted on one {gpu['name']}")
        _row(console, "", f"hours = {plan['formula']['hours']}")
        _row(console, "for memory", "  ".join(f"{name} {needed[name]} x {gpu['name']}" for name in needed))


def _count(number: float) -> str:
    """`7.62 B`, `1.2 M`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return str(int(number))


def _size(number: int) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number} bytes"
