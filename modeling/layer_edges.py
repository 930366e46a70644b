"""Which inputs of a layer move which of its outputs, measured layer by layer.

Owns the replay of each layer, alone, inside a real forward pass. Judges nothing: the
reach gate compares what is found here with what should be. Not copied into checkpoints.

Shapes: L positions; [i, j] of an edge matrix says whether input j moves output i.
"""

import torch

from .attention_pattern import AttentionPattern
from .last_layer import decoder_layers
from .modeling_a2d import A2DForMaskedDiffusion


def layer_edges(
    model: A2DForMaskedDiffusion, ids_1L: torch.Tensor, pattern: AttentionPattern
) -> dict[str, torch.Tensor]:
    """Edges of each layer under a pattern: booleans `(L, L)`, [i, j] True where input j moves output i."""
    edges: dict[str, torch.Tensor] = {}
    differentiable = not (model.config._attn_implementation == "flex_attention" and ids_1L.device.type == "cpu")
    trace = _edges_by_gradient if differentiable else _edges_by_perturbation
    replaying = False

    def hook(name):
        def replay(module, args, kwargs, output):
            # Inside the forward pass, so that mask, positions and the pattern in force are those of the real call.
            nonlocal replaying
            if replaying:
                return
            replaying = True
            try:
                inputs = {k: v for k, v in kwargs.items() if k != "past_key_values"}
                edges[name] = trace(module, args, inputs, ids_1L.shape[1])
            finally:
                replaying = False

        return replay

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True) for name, module in decoder_layers(model.backbone)
    ]
    try:
        with torch.no_grad():
            model(input_ids=ids_1L, attention_pattern=pattern)
    finally:
        for handle in handles:
            handle.remove()
    return edges


def _call_layer(module: torch.nn.Module, args: tuple, kwargs: dict, hidden: torch.Tensor) -> torch.Tensor:
    output = module(hidden, *args[1:], **kwargs) if args else module(**{**kwargs, "hidden_states": hidden})
    return output if isinstance(output, torch.Tensor) else output[0]


def _by_position(states: torch.Tensor, length: int) -> torch.Tensor:
    """`(L, ...)` from `(1, L, D)`, or from states with further streams in front of or behind the positions."""
    return states.movedim(list(states.shape).index(length), 0).flatten(1)


def _edges_by_gradient(module: torch.nn.Module, args: tuple, kwargs: dict, length: int) -> torch.Tensor:
    hidden = args[0] if args else kwargs["hidden_states"]
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        leaf = hidden.detach().clone().requires_grad_(True)
        output_LX = _by_position(_call_layer(module, args, kwargs, leaf), length)
        weight_X = torch.randn(output_LX.shape[-1], generator=generator).to(output_LX)
        score_L = (output_LX * weight_X).sum(-1)
        rows = [torch.autograd.grad(score, leaf, retain_graph=True)[0] for score in score_L]
    return torch.stack([(_by_position(row, length) != 0).any(-1) for row in rows]).cpu()


def _edges_by_perturbation(module: torch.nn.Module, args: tuple, kwargs: dict, length: int) -> torch.Tensor:
    hidden = args[0] if args else kwargs["hidden_states"]
    base_LX = _by_position(_call_layer(module, args, kwargs, hidden), length)
    generator = torch.Generator().manual_seed(0)
    position_dim = list(hidden.shape).index(length)
    columns = []
    for j in range(length):
        moved = hidden.clone()
        column = moved.select(position_dim, j)
        column += torch.randn(column.shape, generator=generator).to(hidden) * hidden.std() * 10
        columns.append((_by_position(_call_layer(module, args, kwargs, moved), length) - base_LX).abs().amax(-1))
    change_LL = torch.stack(columns, dim=1).float().cpu()
    return change_LL > 1e-6 * float(base_LX.abs().max())
