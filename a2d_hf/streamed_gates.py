"""The gates for a model that does not fit into memory.

Owns how a conversion is proven at any size: the full-window gates on the same architecture shrunk, where every window
is crossed and every edge traced; and a short numeric identity on the real weights, brought in from the files layer by
layer. Reads the parent's folder and the conversion's; writes nothing.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from .errors import BadInput
from .layer_streaming import LayerStream, empty_parent
from .modeling.attention_interface import PatternInForce, pattern_in_force
from .modeling.attention_pattern import AttentionPattern
from .modeling.configuration_a2d import A2DConfig
from .modeling.gates import GateResult, identity_gate, longest_window, reach_gate
from .modeling.layer_edges import decoder_layers
from .modeling.mask_token import MaskToken, written_rows
from .modeling.modeling_a2d import A2DForMaskedDiffusion
from .modeling.parent_models import build_parent
from .shrinking import lost_structure, shrink_config
from .source import Source
from .weight_files import stored_tensors


PROBE_LENGTH = 24
PROBE_VOCABULARY = 256
# The parent; the conversion by the library's causal path, by this project's mask spelled out, and open.
PASSES = 4


def shrunk_gates(config: A2DConfig, parent_config: PreTrainedConfig, seed: int = 0) -> list[GateResult]:
    """
    Identity and reach on a small random model of the same architecture: every kind of layer, windows cut below the
    probe.

    Args:
        config ([`A2DConfig`]): the conversion's.
        parent_config (`PreTrainedConfig`): the parent's, full size; not changed.
        seed (`int`, *optional*, defaults to 0): draws weights and probes.

    Returns:
        `list[GateResult]`: identity, reach.
    """
    small = shrink_config(parent_config)
    lost = lost_structure(parent_config, small)
    parent = _random_parent(small, seed)
    fields = ("objective", "block_size", "token_shift", "clean_context", "sliding_window")
    model = A2DForMaskedDiffusion.from_causal_lm(
        copy.deepcopy(parent),
        mask_token_id=parent.get_input_embeddings().weight.shape[0] - 1,
        allow_hybrid=True,  # whether this parent may be one has been asked before
        **{name: value for name, value in config.to_dict().items() if name in fields},
    )
    if config.objective == "bd3lm":
        check_blocks(model)
    results = [identity_gate(model, parent, seed=seed), reach_gate(model, seed=seed)]
    for result in results:
        result.detail = {"mode": "shrunk", "lost_structure": lost, **result.detail}
        if lost:
            result.passed = False
            result.message = f"The architecture cannot be shrunk without losing {lost[0]}: pass --gates full."
    return results


@torch.no_grad()
def check_blocks(model: A2DForMaskedDiffusion) -> None:
    """One pass over a doubled sequence, which recurrent layers and some old position embeddings cannot read."""
    ids_1C = torch.zeros((1, 4), dtype=torch.long)
    try:
        model(input_ids=ids_1C, attention_pattern=AttentionPattern.bd3lm(1), logits_mask=ids_1C.bool())
    except ValueError as error:
        raise BadInput(f"--objective bd3lm cannot serve this model: {error}") from error


def _random_parent(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Weights wide enough for every edge to matter."""
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_parent(config).float().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


class StreamedPair:
    """
    The parent and its conversion, both run from their files, and what their logits say of each other.

    Args:
        source ([`Source`]): the parent.
        folder (`Path`): the conversion, weights written and `config.json` not necessarily.
        config ([`A2DConfig`]): the conversion's.
        parent_config (`PreTrainedConfig`): the parent's.
        mask_token ([`MaskToken`]): the rows that may differ.
        seed (`int`, *optional*, defaults to 0): draws the probe.

    Attributes:
        steps (`int`): how many times a layer runs in [`StreamedPair.compare`].
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        config: A2DConfig,
        parent_config: PreTrainedConfig,
        mask_token: MaskToken,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)
        written = set(written_rows(mask_token))
        rows = torch.randperm(mask_token.rows_before, generator=generator)[: PROBE_VOCABULARY + len(written)].tolist()
        self.vocabulary = sorted(row for row in rows if row not in written)[:PROBE_VOCABULARY]
        length = min(PROBE_LENGTH, config.max_position_embeddings or PROBE_LENGTH)
        self.ids_1L = torch.randint(0, len(self.vocabulary), (1, length), generator=generator)
        self.parent = empty_parent(copy.deepcopy(parent_config), torch.float32)
        backbone = empty_parent(copy.deepcopy(config.text_config), torch.float32)
        self.model = A2DForMaskedDiffusion(copy.deepcopy(config), backbone=backbone).eval()
        self.stored = stored_tensors(source.path, source.weights)
        self.written = stored_tensors(folder, source.weights)
        self.steps = PASSES * len(decoder_layers(self.parent))

    @torch.no_grad()
    def compare(self, advance: Callable[[int], None], tolerance: float = 0.0) -> GateResult:
        """
        The identity gate on the real weights.

        Args:
            advance (`Callable[[int], None]`): told `1` whenever a layer has run.
            tolerance (`float`, *optional*, defaults to 0.0): largest accepted difference of any logit.
        """
        streams = [
            LayerStream(self.parent, self.stored, self.vocabulary, advance),
            LayerStream(self.model.backbone, self.written, self.vocabulary, advance),
        ]
        try:
            expected = self.parent(input_ids=self.ids_1L, use_cache=False).logits
            native = self.model(input_ids=self.ids_1L, attention_pattern="causal").logits
            with pattern_in_force(PatternInForce(AttentionPattern.causal(), fast_path=self.model._none_means_open)):
                spelled_out = self.model.backbone(
                    input_ids=self.ids_1L, attention_mask=torch.ones_like(self.ids_1L), use_cache=False
                ).logits
            opened = self.model(input_ids=self.ids_1L, attention_pattern="bidirectional").logits
        finally:
            for stream in streams:
                stream.close()
        difference = float((native - expected).abs().max())
        explicit = float((spelled_out - expected).abs().max())
        finite = bool(torch.isfinite(expected).all()) and bool(torch.isfinite(opened).all())
        moved = float((opened - expected).abs().max())
        window, length = longest_window(self.model.backbone), self.ids_1L.shape[1]
        detail = {
            "mode": "streamed",
            "max_abs_diff": difference,
            "max_abs_diff_explicit_mask": explicit,
            "tolerance": tolerance,
            "probe_length": length,
            "probe_vocabulary": len(self.vocabulary),
            "longest_window": window,
            "window_crossed": window is None or length > window,
            "dtype": "float32",
            "device": "cpu",
            "finite": finite,
            "max_abs_change_open": moved,
        }
        largest = max(difference, explicit)
        # Not a number is not within any tolerance.
        if not (difference <= tolerance and explicit <= tolerance):
            message = f"the real weights differ from the parent's by {largest:.3g} on {length} tokens"
        elif not finite:
            message = "the real weights give logits that are not finite"
        elif moved == 0:
            message = "opening the attention changes nothing on the real weights"
        else:
            message = f"the real weights, streamed layer by layer, equal the parent on {length} tokens"
            message += f" (largest difference {largest:.1e})" if largest else " (largest difference 0)"
            return GateResult("identity", True, message, detail)
        return GateResult("identity", False, message, detail)


def streamed_identity(shrunk: GateResult, streamed: GateResult) -> GateResult:
    """The two halves of the identity gate as one."""
    detail: dict[str, Any] = {
        "mode": "shrunk+streamed",
        # The number that a reader of any manifest looks for: the larger of the two.
        "max_abs_diff": float(torch.tensor([half.detail["max_abs_diff"] for half in (shrunk, streamed)]).max()),
        "shrunk": shrunk.detail,
        "streamed": streamed.detail,
    }
    message = f"Shrunk: {shrunk.message} Full size: {streamed.message}."
    return GateResult("identity", shrunk.passed and streamed.passed, message, detail)
