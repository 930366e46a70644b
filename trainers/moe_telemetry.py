"""What a mixture of experts does while it is trained: who is used, who is not, how sure the routers are.

Owns the hooks on the routers and the running counts of the training passes. Works on any family: transformers' models
declare which of their modules give `router_logits`. Changes nothing in the model; says so when experts die.

Shapes: T tokens of a pass, K experts chosen for each, E experts of a layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging
from transformers.utils.output_capturing import OutputRecorder

from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion


logger = logging.get_logger(__name__)

# An expert that gets less than this share of its even share is dead ...
DEAD_BELOW = 0.01
# ... once an even share would have been this many choices: fewer can miss an expert by chance.
ENOUGH_CHOICES = 100


@dataclass(frozen=True)
class ExpertUse:
    """
    What the experts of one layer did between two logs.

    Attributes:
        layer (`str`): the router's name in the parent.
        utilisation (`list[float]`): how often each expert was chosen, as a multiple of an even share: 1 is balanced.
        router_entropy (`float`): mean entropy of the router's distribution over the experts, divided by the largest
            possible: 0 is always sure, 1 undecided.
    """

    layer: str
    utilisation: list[float]
    router_entropy: float

    @property
    def dead(self) -> list[int]:
        """Experts with less than `DEAD_BELOW` of an even share."""
        return [expert for expert, share in enumerate(self.utilisation) if share < DEAD_BELOW]

    def to_dict(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "experts": len(self.utilisation),
            "utilisation_min": round(min(self.utilisation), 4),
            "utilisation_max": round(max(self.utilisation), 4),
            "dead": self.dead,
            "router_entropy": round(self.router_entropy, 4),
        }


class MoETelemetry:
    """
    Counts the choices of every router in the training passes of a model; without routers it does nothing.

    Passes without gradient (a teacher's, evaluation), layers recomputed in backward and padding are not counted.

    Args:
        model ([`A2DForMaskedDiffusion`]): the model that is trained.
        warn (`Callable`, *optional*): told in one sentence when experts die; a warning in the log by default.

    Attributes:
        layers (`list[ExpertUse]`): what was last logged, layer by layer.
        warnings (`list[str]`): what was warned of.
    """

    def __init__(self, model: A2DForMaskedDiffusion, warn: Callable[[str], None] = logger.warning):
        self.warn = warn
        self.layers: list[ExpertUse] = []
        self.warnings: list[str] = []
        self._dead: set[tuple[str, int]] = set()
        self._valid_T: torch.Tensor | None = None
        # For each router: how often each expert was chosen, the sum of entropies, tokens.
        self._sums: dict[str, torch.Tensor] = {}
        routers = find_routers(model.backbone)
        self._names = [router.name for router in routers]
        for router in routers:
            router.module.register_forward_hook(self._counter(router))
        if routers:
            model.register_forward_pre_hook(self._note_padding, with_kwargs=True)

    def _note_padding(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask_BL = kwargs.get("attention_mask")
        self._valid_T = None if mask_BL is None else mask_BL.flatten().bool()

    def _counter(self, router: "Router") -> Callable:
        @torch.no_grad()
        def count(output: tuple | torch.Tensor) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            scores_TE = outputs[router.index].flatten(0, -2).float()
            tokens, classes = scores_TE.shape
            whole = [t for t in outputs if isinstance(t, torch.Tensor) and not t.is_floating_point()]
            chosen_TK = next((t for t in whole if t.ndim == 2 and t.shape[0] == tokens), None)
            if chosen_TK is None:  # a router that keeps its choice to itself chooses the largest
                chosen_TK = scores_TE.topk(router.top_k, dim=-1).indices
            if self._valid_T is not None and self._valid_T.shape[0] == tokens:
                valid_T = self._valid_T.to(scores_TE.device)
                scores_TE, chosen_TK = scores_TE[valid_T], chosen_TK[valid_T]
            entropy_T = torch.special.entr(_probabilities(scores_TE)).sum(-1) / math.log(classes)
            sums = torch.cat(
                [
                    torch.bincount(chosen_TK.flatten(), minlength=classes)[: router.experts],
                    torch.stack([entropy_T.sum(), entropy_T.new_tensor(entropy_T.shape[0])]),
                ]
            ).to(torch.float32 if scores_TE.device.type == "mps" else torch.float64)
            self._sums[router.name] = self._sums[router.name] + sums if router.name in self._sums else sums

        def hook(module: torch.nn.Module, args: tuple, output: tuple | torch.Tensor) -> None:
            recomputed = torch._C._current_graph_task_id() != -1
            if module.training and torch.is_grad_enabled() and not recomputed:
                count(output)

        return hook

    def result(self, trainer: Trainer) -> dict[str, float]:
        """
        Reads the counts of every process and clears them; all processes must call it together. Nothing comes until an
        even share is `ENOUGH_CHOICES`: the counts go on until then.

        Args:
            trainer (`Trainer`): whose processes and step these are.

        Returns:
            `dict[str, float]`: `moe/expert_utilisation_min` (choices of the least used expert of all layers, as a
            multiple of an even share), `moe/dead_experts` (experts of all layers with less than 1% of one) and
            `moe/router_entropy` (mean over layers).
        """
        if not self._names or len(self._sums) < len(self._names):
            return {}
        sizes = [self._sums[name].shape[0] for name in self._names]
        flat = torch.cat([self._sums[name].to(trainer.accelerator.device) for name in self._names])
        sums = trainer.accelerator.reduce(flat, reduction="sum").cpu().split(sizes)
        if min(float(s[:-2].sum()) / (s.shape[0] - 2) for s in sums) < ENOUGH_CHOICES:
            return {}
        self._sums = {}
        self.layers = [
            ExpertUse(name, (s[:-2] * (s.shape[0] - 2) / s[:-2].sum()).tolist(), float(s[-2] / s[-1]))
            for name, s in zip(self._names, sums, strict=True)
        ]
        self._tell(trainer.state.global_step)
        return {
            "moe/expert_utilisation_min": min(min(layer.utilisation) for layer in self.layers),
            "moe/dead_experts": sum(len(layer.dead) for layer in self.layers),
            "moe/router_entropy": sum(layer.router_entropy for layer in self.layers) / len(self.layers),
        }

    def _tell(self, step: int) -> None:
        dead = {(layer.layer, expert) for layer in self.layers for expert in layer.dead}
        if new := sorted(dead - self._dead):
            experts = sum(len(layer.utilisation) for layer in self.layers)
            name, expert = new[0]
            sentence = (
                f"{len(dead)} of {experts} experts are dead at step {step}, chosen for less than {DEAD_BELOW:.0%} of "
                f"an even share of the tokens ({len(new)} of them newly, the first is expert {expert} of {name}): "
                "`router_aux_loss_weight` keeps experts in use, and a lower learning rate spares the router."
            )
            self.warnings.append(sentence)
            self.warn(sentence)
        self._dead |= dead

    def summary(self) -> dict[str, Any] | None:
        """The last log layer by layer and what was warned of, ready for JSON; `None` where nothing was counted."""
        if not self.layers:
            return None
        return {"layers": [layer.to_dict() for layer in self.layers], "warnings": self.warnings}


def _probabilities(scores_TE: torch.Tensor) -> torch.Tensor:
    """Most routers give logits; one that gives probabilities is taken at its word."""
    given = bool((scores_TE >= 0).all()) and bool(((scores_TE.sum(-1) - 1).abs() < 1e-3).all())
    return scores_TE if given else scores_TE.softmax(-1)


@dataclass(frozen=True)
class Router:
    """
    A router of the parent.

    Attributes:
        name (`str`): its name in the parent.
        module (`torch.nn.Module`): itself.
        index (`int`): which of its outputs are the logits.
        top_k (`int`, *optional*): experts chosen for each token.
        experts (`int`, *optional*): how many there are, where a router has further classes (a "skip").
    """

    name: str
    module: torch.nn.Module
    index: int
    top_k: int | None
    experts: int | None


def find_routers(backbone: PreTrainedModel) -> list[Router]:
    """The modules whose output transformers records as `router_logits`, innermost ones only, in order."""
    recorders: list[OutputRecorder] = []
    for module in backbone.modules():
        if isinstance(module, PreTrainedModel):
            found = (module._can_record_outputs or {}).get("router_logits", [])
            recorders += found if isinstance(found, list) else [found]
    targets = [r if isinstance(r, OutputRecorder) else OutputRecorder(r) for r in recorders]
    routers: list[Router] = []
    for name, module in backbone.named_modules():
        target = next((t for t in targets if t.target_class is type(module)), None)
        if target is not None and (target.layer_name is None or target.layer_name in name):
            own, holder = vars(module), vars(backbone.get_submodule(name.rpartition(".")[0]))
            top_k = own.get("top_k", holder.get("top_k"))
            routers.append(Router(name, module, target.index, top_k, own.get("num_experts")))
    return [r for r in routers if not any(other.name.startswith(f"{r.name}.") for other in routers)]
