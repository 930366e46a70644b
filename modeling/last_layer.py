"""The last layer, computed only where something reads it.

What the last layer puts at a position goes to the output head of that position and nowhere else, so a loss over some
positions needs its queries, its output projection and its feed-forward part at those alone; its keys and values at
all. Owns the search for the parts of a parent's last layer that may leave rows out, by measurement, never by family,
and the hooks that leave them out.

Shapes: B rows, L tokens, D and E features, N rows of B * L that something reads, M the most of them in one row, H
heads, K keys.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Above this share of rows that are read, gathering them costs about what it saves.
MOST_ROWS_READ = 0.75
# Tokens of the text that the parts are measured on: some that are read, some that are not, in turns.
PROBE_LENGTH = 8


def decoder_layers(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """The repeated layers of a model, outermost ones only, in order; those of other towers included."""
    found: list[tuple[str, torch.nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found.append((name, module))
    if found:
        return found
    # Models from before that base class: the members of a list as long as the model is deep.
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return [(f"{name}.{index}", layer) for index, layer in enumerate(module)]
    return []


def shows_layers(config: PreTrainedConfig, output_hidden_states: bool | None, asked: dict[str, Any]) -> bool:
    """Whether a pass returns what the last layer made of every position, not only what goes into the head."""
    wanted = vars(config.get_text_config()) | asked
    names = ("output_hidden_states", "_output_attentions", "output_attentions", "output_router_logits")
    return bool(output_hidden_states) or any(wanted.get(name) for name in names)


@dataclass(eq=False)
class RowsRead:
    """
    The rows of one forward pass that something reads, in force inside the last layer.

    Attributes:
        layer (`torch.nn.Module`): the last layer.
        parts (`tuple[torch.nn.Module, ...]`): what runs on those rows alone.
        shape (`tuple[int, int]`): (B, L).
        rows_N (`torch.LongTensor` of shape `(N,)`): flat indices, ascending, each once.
        places_BM (`torch.LongTensor` of shape `(B, M)`): for each row its tokens that are read, filled up to M with
            others.
    """

    layer: torch.nn.Module
    parts: tuple[torch.nn.Module, ...]
    shape: tuple[int, int]
    rows_N: torch.Tensor
    places_BM: torch.Tensor

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """While entered, the parts of the last layer compute only the rows that are read; the others are zeros."""
        if _IN_FORCE.get() is self:  # a checkpointed layer enters again inside the pass
            yield
            return
        handles = []
        token = _IN_FORCE.set(self)
        try:
            for part in self.parts:
                handles.append(part.register_forward_pre_hook(self._take))
                handles.append(part.register_forward_hook(self._put_back))
            yield
        finally:
            _IN_FORCE.reset(token)
            for handle in handles:
                handle.remove()

    def _take(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        if _IN_FORCE.get() is not self:
            return None
        return (inputs[0].flatten(0, 1).index_select(0, self.rows_N)[None],)

    def _put_back(self, module: torch.nn.Module, inputs: tuple, output_1NE: torch.Tensor) -> torch.Tensor | None:
        if _IN_FORCE.get() is not self:
            return None
        rows, length = self.shape
        whole_XE = output_1NE.new_zeros((rows * length, *output_1NE.shape[2:]))
        return whole_XE.index_copy(0, self.rows_N, output_1NE[0]).unflatten(0, (rows, length))


_IN_FORCE: ContextVar[RowsRead | None] = ContextVar("a2d_rows_read", default=None)


def attend_from_rows_read(attend: Callable, module: torch.nn.Module, query_BHLD, key, value, mask, *args, **kwargs):
    """
    Calls a scaled-dot-product attention function with the queries that something reads; the others get zeros.

    Args:
        attend (`Callable`): the function, in the form that transformers registers.
        module (`torch.nn.Module`): the attention module that calls it; outside the last layer nothing changes.
    """
    read = _IN_FORCE.get()
    if (
        read is None
        or not any(module is part for part in read.layer.modules())
        or read.places_BM.shape[1] > MOST_ROWS_READ * read.shape[1]
        or (query_BHLD.shape[0], query_BHLD.shape[2]) != read.shape
        or kwargs.get("position_bias") is not None
    ):
        return attend(module, query_BHLD, key, value, mask, *args, **kwargs)
    b_B1 = torch.arange(read.shape[0], device=query_BHLD.device)[:, None]
    queries = query_BHLD[b_B1, :, read.places_BM].transpose(1, 2)
    if mask is not None:
        mask = mask.expand(read.shape[0], -1, -1, -1)[b_B1, :, read.places_BM].transpose(1, 2)
    attended_BMHE, weights = attend(module, queries, key, value, mask, *args, **kwargs)
    whole_BLHE = attended_BMHE.new_zeros((*read.shape, *attended_BMHE.shape[2:]))
    return whole_BLHE.index_put((b_B1, read.places_BM), attended_BMHE), weights


class LastLayer:
    """
    What a model knows of its parent's last layer.

    Args:
        parent (`PreTrainedModel`): the parent.
    """

    def __init__(self, parent: PreTrainedModel):
        # In a tuple, or torch would register the parent a second time wherever this object is an attribute.
        self._parent = (parent,)
        # Adapters change what is inside a layer, never the layers: found once, not at every pass.
        self._layers = tuple(layer for _, layer in decoder_layers(parent))
        self._checked = False
        self.layer: torch.nn.Module | None = None
        self.parts: tuple[torch.nn.Module, ...] = ()

    def rows_read(self, rows_N: torch.Tensor, tokens: torch.Tensor, open_attention: Callable) -> RowsRead | None:
        """
        The rows to compute for a loss over some positions, or `None` where all are to be computed.

        Args:
            rows_N (`torch.LongTensor` of shape `(N,)`): flat indices of the hidden states that go into the head.
            tokens (`torch.Tensor` of shape `(B, L)` or `(B, L, D)`): the input of the pass, for the first look.
            open_attention (`Callable`): a context in which every position sees every other, for the first look.
        """
        rows, length = tokens.shape[:2]
        if not 0 < rows_N.shape[0] <= MOST_ROWS_READ * rows * length or length < PROBE_LENGTH:
            return None
        if self._is_watched():
            return None
        if not self._checked:
            self._look(tokens[:1, :PROBE_LENGTH], open_attention)
        if not self.parts:
            return None
        read_BL = torch.zeros(rows * length, dtype=torch.bool, device=rows_N.device)
        read_BL = read_BL.index_fill(0, rows_N, True).view(rows, length)
        return RowsRead(self.layer, self.parts, (rows, length), read_BL.flatten().nonzero()[:, 0], _places(read_BL))

    def _is_watched(self) -> bool:
        """Whether somebody's hook would see the zeros: on the last layer, inside it, or behind it."""
        (parent,) = self._parent
        before = {module for layer in self._layers[:-1] for module in layer.modules()}
        before.add(parent.get_input_embeddings())
        return any(
            # transformers' own hooks record only where hidden states or the like are asked for
            hook.__module__ != "transformers.utils.output_capturing"
            for module in parent.modules()
            if module not in before
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )

    def _look(self, probe: torch.Tensor, open_attention: Callable) -> None:
        """Finds the parts that may leave rows out, by measurement inside a real pass, and tries them in another."""
        (parent,) = self._parent
        head = parent.get_output_embeddings()
        self._checked = True
        if not self._layers:
            return
        self.layer = self._layers[-1]
        inputs = {"input_ids" if probe.ndim == 2 else "inputs_embeds": probe}
        inputs["attention_mask"] = torch.ones(probe.shape[:2], dtype=torch.long, device=probe.device)
        read_L = torch.arange(PROBE_LENGTH, device=probe.device) % 2 == 1  # so each kind has the other on both sides
        found: list[torch.nn.Module] = []
        caught: list[torch.Tensor] = []

        def measure(module, args, kwargs, output):
            handle.remove()
            try:
                found.extend(_separable_parts(module, args, kwargs, read_L))
            except (RuntimeError, TypeError, ValueError, IndexError) as error:  # a layer that takes no garbage
                logger.info(f"The last layer is computed at every position: {error}")

        handle = self.layer.register_forward_hook(measure, with_kwargs=True)
        watch = head.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0].flatten(0, 1)))
        training = [module for module in parent.modules() if module.training]
        devices = [probe.device] if probe.is_cuda else []
        try:
            # Nothing of this look may move the random state of a run, or a resumed one would not equal it.
            with torch.random.fork_rng(devices=devices), torch.no_grad(), open_attention():
                parent.eval()
                parent(**inputs, use_cache=False)
                rows_N, places_BM = read_L.nonzero()[:, 0], _places(read_L[None])
                with RowsRead(self.layer, tuple(found), (1, PROBE_LENGTH), rows_N, places_BM).in_force():
                    parent(**inputs, use_cache=False)
        finally:
            handle.remove()
            watch.remove()
            for module in training:
                module.training = True
        # A head that is no module of its own, or reads other than one row per position, was not caught as needed.
        if [states.shape[0] for states in caught] == [PROBE_LENGTH] * 2 and caught[0].ndim == 2:
            if _close(caught[1][read_L], caught[0][read_L]):
                self.parts = tuple(found)


def _separable_parts(layer: torch.nn.Module, args: tuple, kwargs: dict, read_L: torch.Tensor) -> list[torch.nn.Module]:
    """
    The outermost parts of a layer that hold a matrix, treat each position by itself, and whose output at positions
    that are not read moves nothing where the layer is read. Both are tried with garbage at those positions.

    With random weights and hidden states, for what the layer's code does decides: a projection that starts at zero
    would hide today what it reads tomorrow.
    """
    length = read_L.shape[0]
    generator = torch.Generator().manual_seed(0)

    def garbage(like: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(like.shape, generator=generator) * scale).to(like)

    def spoil(states: torch.Tensor) -> torch.Tensor:
        read = read_L.view(1, -1, *[1] * (states.ndim - 2))
        return torch.where(read, states, garbage(states, 10.0) * states.abs().max())

    weights = {
        name: garbage(weight, weight.shape[-1] ** -0.5) if weight.ndim > 1 else 1 + garbage(weight, 0.1)
        for name, weight in layer.named_parameters()
        if weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # not the packed ones
    }
    hidden = garbage(args[0] if args else kwargs["hidden_states"])
    call = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

    def read_output() -> torch.Tensor | None:
        output = torch.func.functional_call(layer, weights, *call)
        output = output if isinstance(output, torch.Tensor) else output[0]
        return output[:, read_L] if output.shape[:2] == (1, length) else None

    plain = read_output()
    found: list[torch.nn.Module] = []
    if plain is None:
        return found

    def is_separable(part: torch.nn.Module) -> bool:
        by_itself = []

        def try_garbage(module, part_args, part_kwargs, output):
            tensors = (*part_args, output)
            if part_kwargs or len(tensors) != 2 or not all(isinstance(t, torch.Tensor) for t in tensors):
                return None
            if any(t.shape[:2] != (1, length) or not t.is_floating_point() for t in tensors):
                return None
            again = module.forward(spoil(part_args[0]))
            by_itself.append(_close(again[:, read_L], output[:, read_L]))
            return spoil(output)

        handle = part.register_forward_hook(try_garbage, with_kwargs=True)
        try:
            return _close(read_output(), plain) and by_itself == [True]
        finally:
            handle.remove()

    def search(module: torch.nn.Module) -> None:
        for part in module.children():
            if any(weight.ndim > 1 for weight in part.parameters()):
                if is_separable(part):
                    found.append(part)
                else:
                    search(part)

    search(layer)
    return found


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two results differ by no more than another order of summation may; what is not finite differs."""
    tolerance = 1e-5 if torch.finfo(theirs.dtype).eps < 1e-6 else 3e-2
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def _places(read_BL: torch.Tensor) -> torch.Tensor:
    """For each row its tokens that are read, filled up with others to the number of the fullest row."""
    most = int(read_BL.sum(dim=-1).max())
    return (~read_BL).int().argsort(dim=-1, stable=True)[:, :most]
