"""Muon for the matrices of the layers, AdamW for everything else.

Owns which weights Muon gets, and one optimizer made of two of torch's. `torch.optim.Muon` orthogonalises the update of
a matrix (https://kellerjordan.github.io/posts/muon/); it takes nothing but matrices, and is not meant for the tables
of embeddings and output head.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.pytorch_utils import Conv1D

from .model_resolution import base_model


WHOLE_WEIGHTS = (DistributedType.NO, *(kind for kind in DistributedType if kind.value.startswith("MULTI_")))


class MuonAdamW(torch.optim.Optimizer):
    """
    Two optimizers that step together.

    Args:
        matrices (`list[dict]`): parameter groups of `torch.optim.Muon`.
        others (`list[dict]`): parameter groups of `torch.optim.AdamW`.
        adamw (`dict`): what else AdamW is told.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], **adamw: Any):
        # Updates of the size that AdamW's have, so that one range of learning rates serves both (Moonlight,
        # https://huggingface.co/papers/2502.16982, section 2.2).
        self.parts = (torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(others, **adamw))
        super().__init__([{"params": group["params"]} for part in self.parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # The very dictionaries of the parts: a scheduler that sets a learning rate here sets it there.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.parts[0].state_dict(), "adamw": self.parts[1].state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if set(state_dict) != {"muon", "adamw"}:
            raise ValueError("This is not the state of Muon with AdamW.")
        for part, name in zip(self.parts, ("muon", "adamw"), strict=True):
            part.load_state_dict(state_dict[name])
        self._share_groups()


def matrices_of(model: nn.Module) -> set[str]:
    """
    Names of the weights that Muon gets: those of linear layers that are trained, the output head excepted.

    Args:
        model (`nn.Module`): the model, with or without adapter.

    Returns:
        `set[str]`: names as in `model.named_parameters()`.
    """
    head = base_model(model).get_output_embeddings()
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    return {name for name, p in model.named_parameters() if name in linear and p.requires_grad and p.ndim == 2}


class MuonAdamWFactory:
    """What transformers calls with the model when it wants the optimizer."""

    def __call__(self, model: PreTrainedModel, args: TrainingArguments, muon_learning_rate: float) -> MuonAdamW:
        kind = AcceleratorState().distributed_type
        if kind not in WHOLE_WEIGHTS:
            raise ValueError(
                f"`muon_learning_rate` needs whole matrices, which {kind.value} cuts into shards: leave it out."
            )
        chosen = matrices_of(model)
        if not chosen:
            raise ValueError("`muon_learning_rate` needs matrices that are trained, and this model has none.")
        matrices, decayed, plain = [], [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (matrices if name in chosen else decayed if parameter.ndim > 1 else plain).append(parameter)
        return MuonAdamW(
            [{"params": matrices, "lr": muon_learning_rate, "weight_decay": args.weight_decay}],
            [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )


def muon_of(args: Any) -> tuple[type, dict[str, Any]] | None:
    """
    What `Trainer(optimizer_cls_and_kwargs=...)` takes where `muon_learning_rate` is set.

    Args:
        args ([`A2DTrainingConfig`]): the training arguments.

    Returns:
        `tuple` of a factory and its arguments, or `None`.
    """
    if args.muon_learning_rate is None:
        return None
    return MuonAdamWFactory, {"args": args, "muon_learning_rate": args.muon_learning_rate}
