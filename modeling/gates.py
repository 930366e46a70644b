"""The proofs that a conversion changed what it should and nothing else.

Owns the identity gate (with the causal pattern the model is its parent), the reach gate (with the open pattern every
layer sees what it should, and only that) and the mask-row gate. Reads models, never trains or saves them. Not copied
into checkpoints.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from .attention_interface import PatternInForce, pattern_in_force
from .attention_pattern import AttentionPattern
from .layer_edges import layer_edges
from .mask_token import MaskToken, embedding_matrices, is_near_zero, mean_of_trained_rows, written_rows
from .modeling_a2d import A2DForMaskedDiffusion
from .parent_models import recurrent_layers


# A probe must be longer than every window, but its reach is tested edge by edge, which costs its square.
_LONGEST_REACH_PROBE = 160
_SHORT_PROBE = 24


@dataclass
class GateResult:
    """
    The outcome of a gate.

    Attributes:
        name (`str`): `identity`, `reach` or `mask_row`.
        passed (`bool`): whether the conversion may go on.
        message (`str`): one sentence for a person.
        detail (`dict`): the numbers behind it, ready for JSON.
    """

    name: str
    passed: bool
    message: str
    detail: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "passed": self.passed, "message": self.message, "detail": _for_json(self.detail)}


def _for_json(value: Any) -> Any:
    """The same with `"nan"` and `"inf"` spelled out: JSON has no such numbers."""
    if isinstance(value, dict):
        return {name: _for_json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_for_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def longest_window(model: PreTrainedModel) -> int | None:
    """The longest sliding or chunked window of a model's layers, in tokens; `None` where there is none."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    windows = [w for w in windows if isinstance(w, int) and w > 0]
    return max(windows) if windows else None


def _probe_length(model: A2DForMaskedDiffusion, requested: int | None, most: int | None = None) -> int:
    window, context = longest_window(model.backbone), model.config.max_position_embeddings
    length = requested or max(_SHORT_PROBE, 2 * window + 8 if window is not None else 0)
    if most is not None and length > most:
        length = _SHORT_PROBE
    return min(length, context) if context else length


def _probe(model: A2DForMaskedDiffusion, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = model.mask_token.rows_before if model.mask_token is not None else model.config.vocab_size
    ids_1L = torch.randint(0, rows, (1, length), generator=generator)
    return ids_1L.to(model.device)


@contextlib.contextmanager
def _evaluating(*models: PreTrainedModel) -> Iterator[None]:
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


# ------------------------------------------------------------------------------------------------------------ identity


@torch.no_grad()
def identity_gate(
    model: A2DForMaskedDiffusion,
    parent: PreTrainedModel,
    *,
    probe_length: int | None = None,
    tolerance: float = 0.0,
    seed: int = 0,
) -> GateResult:
    """
    With the causal pattern the model's logits equal the parent's, on a probe longer than every window.

    Two paths are compared: the library's own causal path, and this project's mask with the causal rule spelled out.
    Where rows were grown the parent is grown by the same rows first (another matrix shape takes another kernel, whose
    rounding is not a difference of ours), and its original rows must be equal to the last bit.

    Args:
        model ([`A2DForMaskedDiffusion`]): the conversion.
        parent (`PreTrainedModel`): the autoregressive model, loaded anew; its embeddings are grown in place where the
            conversion's were.
        probe_length (`int`, *optional*): tokens of the probe; by default more than twice the longest window.
        tolerance (`float`, *optional*, defaults to `0.0`): largest accepted difference of any logit.
        seed (`int`, *optional*, defaults to `0`): draws the probe.

    Returns:
        [`GateResult`]
    """
    changed = _changed_tensors(model, parent)
    length = _probe_length(model, probe_length)
    window = longest_window(model.backbone)
    ids_1L = _probe(model, length, seed)
    _grow_like(parent, model)
    with _evaluating(model, parent):
        expected = parent(input_ids=ids_1L.to(parent.device), use_cache=False).logits.to(ids_1L.device)
        native = model(input_ids=ids_1L, attention_pattern="causal").logits
        with pattern_in_force(PatternInForce(AttentionPattern.causal(), fast_path=model._none_means_open)):
            spelled_out = model.backbone(
                input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L), use_cache=False
            ).logits
    difference = float((native - expected).abs().max())
    explicit = float((spelled_out - expected).abs().max())
    passed = not changed and difference <= tolerance and explicit <= tolerance
    detail = {
        "max_abs_diff": difference,
        "max_abs_diff_explicit_mask": explicit,
        "tolerance": tolerance,
        "probe_length": length,
        "longest_window": window,
        "window_crossed": window is None or length > window,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": ids_1L.device.type,
        "changed_tensors": changed,
    }
    if changed:
        message = f"{len(changed)} tensor(s) differ from the parent's, the first is {changed[0]}."
    elif passed:
        message = f"With the causal pattern the model equals its parent on {length} tokens (largest difference 0)."
        if difference or explicit:
            message = f"With the causal pattern the model is within {max(difference, explicit):.1e} of its parent."
    else:
        message = (
            f"With the causal pattern the model differs from its parent by {max(difference, explicit):.3g} on "
            f"{length} tokens; allowed is {tolerance:g}."
        )
    return GateResult("identity", passed, message, detail)


def _grow_like(parent: PreTrainedModel, model: A2DForMaskedDiffusion) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if parent.get_input_embeddings().weight.shape[0] == rows:
        for ours, theirs in zip(embedding_matrices(model), embedding_matrices(parent), strict=True):
            if model.mask_token is not None and model.mask_token.row_initialized:
                theirs[model.mask_token.id] = ours[model.mask_token.id]
        return
    before = parent.get_input_embeddings().weight.shape[0]
    parent.resize_token_embeddings(rows, mean_resizing=False)
    for ours, theirs in zip(embedding_matrices(model), embedding_matrices(parent), strict=True):
        theirs[before:] = ours[before:]


def _changed_tensors(model: A2DForMaskedDiffusion, parent: PreTrainedModel) -> list[str]:
    """Names of tensors whose bits differ, outside the rows that a conversion may write."""
    written = set(written_rows(model.mask_token)) if model.mask_token is not None else set()
    embeddings = {id(t) for t in embedding_matrices(model)}
    ours, changed = model.backbone.state_dict(keep_vars=True), []
    for name, theirs in parent.state_dict().items():
        tensor = ours.get(name)
        if tensor is None:
            changed.append(name)
            continue
        data, theirs = tensor.detach(), theirs.to(tensor.device)
        if id(tensor) in embeddings:
            kept = [row for row in range(theirs.shape[0]) if row not in written]
            data, theirs = data[kept], theirs[kept]
        if data.shape != theirs.shape or data.dtype != theirs.dtype or not torch.equal(data, theirs):
            changed.append(name)
    return changed


# --------------------------------------------------------------------------------------------------------------- reach


def reach_gate(model: A2DForMaskedDiffusion, *, seed: int = 0) -> GateResult:
    """
    With the open pattern every layer sees what it should and nothing else, each layer tested alone.

    What a layer should see follows from what it saw as a parent: its causal edges mirrored across the diagonal
    (windows kept) or every edge (windows open); inside the block-causal pattern, those of them that do not look into
    a later block. An edge from j to i is there when the gradient of the layer's output at i by its input at j is not
    exactly zero, which needs no threshold. (On CPU flex attention has no gradients: there a large change of the input
    at j is traced instead.) Only a recurrent layer may stay causal: the gate counts how many opened.

    Args:
        model ([`A2DForMaskedDiffusion`]): the conversion.
        seed (`int`, *optional*, defaults to `0`): draws the probe.

    Returns:
        [`GateResult`]
    """
    length = _probe_length(model, None, most=_LONGEST_REACH_PROBE)
    ids_1L = _probe(model, length, seed)
    block_size = max(2, length // 3)
    with _evaluating(model):
        causal = layer_edges(model, ids_1L, AttentionPattern.causal())
        opened = layer_edges(model, ids_1L, AttentionPattern.bidirectional())
        blocked = layer_edges(model, ids_1L, AttentionPattern.block_causal(block_size))
    names = list(causal)  # the layers that text goes through, in order
    if not names:
        return GateResult("reach", False, "No decoder layer was found, so nothing can be proven.", {})
    block_L = torch.arange(length) // block_size
    allowed_LL = block_L[None, :] <= block_L[:, None]
    lower_LL = torch.ones(length, length, dtype=torch.bool).tril()
    layer_types = getattr(model.config.text_config.get_text_config(), "layer_types", None)
    recurrent = recurrent_layers(model.backbone.config)
    if len(recurrent) != len(names):
        recurrent = [False] * len(names)
    diagonal_LL = torch.eye(length, dtype=torch.bool)
    layers, faults, open_count, windows_seen = [], [], 0, False
    for index, name in enumerate(names):
        own_LL = causal[name]
        windowed = bool((own_LL != lower_LL).any())
        windows_seen |= windowed
        # A layer that moves nothing between positions (feed-forward only, or with another layer's keys and values) has
        # nothing of its own to open.
        mixes = bool((own_LL & ~diagonal_LL).any())
        if not mixes:
            expected_LL = own_LL
        elif windowed and model.config.sliding_window == "keep":
            expected_LL = own_LL | own_LL.T
        else:
            expected_LL = torch.ones_like(own_LL)
        exact = bool((opened[name] == expected_LL).all())
        block_exact = bool((blocked[name] == (expected_LL & allowed_LL)).all())
        closed = bool((opened[name] == own_LL).all())
        open_count += exact and mixes
        kind = layer_types[index] if layer_types and len(layer_types) == len(names) else "layer"
        layers.append(
            {
                "layer": name,
                "type": kind,
                "windowed": windowed,
                "missing_edges": int((expected_LL & ~opened[name]).sum()),
                "extra_edges": int((opened[name] & ~expected_LL).sum()),
                "block_causal_exact": block_exact,
                "closed": closed,
            }
        )
        if not (exact and block_exact) and not (closed and recurrent[index]):
            faults.append(name)
    window = longest_window(model.backbone)
    detail = {
        "probe_length": length,
        "layers": len(names),
        "open_layers": open_count,
        "longest_window": window,
        "window_crossed": window is None or windows_seen,
        "sliding_window": model.config.sliding_window,
        "block_size": block_size,
        "by_layer": layers,
    }
    if not faults:
        message = f"Open attention reaches every position it should in {open_count} of {len(names)} layers."
        return GateResult("reach", open_count > 0, message, detail)
    first = next(layer for layer in layers if layer["layer"] == faults[0])
    what = (
        "stays causal"
        if first["closed"]
        else (
            f"misses {first['missing_edges']} and adds {first['extra_edges']} edges"
            if first["missing_edges"] or first["extra_edges"]
            else "leaks across or inside blocks"
        )
    )
    message = f"{len(faults)} of {len(names)} layers do not open as they should; the first, {faults[0]}, {what}."
    return GateResult("reach", False, message, detail)


# ------------------------------------------------------------------------------------------------------------ mask row


@torch.no_grad()
def mask_row_gate(model: A2DForMaskedDiffusion, matrices: Sequence[torch.Tensor] | None = None) -> GateResult:
    """
    The mask token is no token of the text, and its rows are trained, or the mean of the trained rows: never random,
    never near zero.

    Args:
        model ([`A2DForMaskedDiffusion`]): the conversion, straight after it was made.
        matrices (`Sequence[torch.Tensor]`, *optional*): its embedding matrices, the input one first, where they are
            not in the model but in its files; anything that has a shape and gives rows by slice.

    Returns:
        [`GateResult`]
    """
    choice: MaskToken | None = model.mask_token
    matrices = embedding_matrices(model) if matrices is None else matrices
    token_id = model.config.mask_token_id
    detail: dict[str, Any] = {"mask_token_id": token_id} | ({} if choice is None else choice.to_dict())
    rows = matrices[0].shape[0]
    used = {model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id}
    if token_id is None or not 0 <= token_id < rows:
        return GateResult("mask_row", False, f"The mask token {token_id} has no row among {rows}.", detail)
    if token_id in used and (choice is None or choice.strategy != "given"):
        return GateResult("mask_row", False, f"The mask token {token_id} is also a token of the text.", detail)
    if choice is not None and choice.row_initialized:
        for matrix in matrices:
            mean = mean_of_trained_rows(matrix, choice)
            if not all(torch.equal(matrix[row], mean) for row in written_rows(choice)):
                return GateResult("mask_row", False, "A new mask row is not the mean of the trained rows.", detail)
        return GateResult("mask_row", True, f"Mask token {token_id}: the mean of the trained rows.", detail)
    if is_near_zero(matrices[0], token_id):
        return GateResult("mask_row", False, f"The row of mask token {token_id} is near zero.", detail)
    return GateResult("mask_row", True, f"Mask token {token_id}: the parent's own trained row.", detail)
