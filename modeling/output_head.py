"""The parent's output head: only the wanted rows pass it, and a loss runs it in chunks.

Owns the hook that gathers rows in front of the head, where the gradient of a tied embedding goes, and what is known of
the parent's code behind it (soft-caps and logit scales, recognised by comparison, never by family).

Shapes: B rows, L tokens, V vocabulary rows, D hidden size, N wanted rows.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .masked_loss import cross_entropy_rows, head_transforms, linear_cross_entropy, matching_transform, row_weights


@dataclass
class HeadRows:
    """
    Which rows of the flattened hidden states go through the head, what was caught on the way, and where the gradient
    of a head that is tied to the input embedding goes.
    """

    rows_N: torch.Tensor
    catch: bool = False
    caught_ND: torch.Tensor | None = None
    tied: "TiedGradient | None" = None


_HEAD_ROWS: ContextVar[HeadRows | None] = ContextVar("a2d_head_rows", default=None)


def _at_the_head(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """
    Forward pre-hook of the output head: keeps the wanted rows, so that the rest never meets the vocabulary.

    A hook, because what follows the head is the parent's own code and stays so. Where the rows are caught for a loss
    in chunks, only one goes on, to let the parent finish.
    """
    wanted = _HEAD_ROWS.get()
    if wanted is None:
        return None
    hidden_XD = inputs[0].reshape(-1, inputs[0].shape[-1])
    wanted.caught_ND = hidden_XD[wanted.rows_N]
    if not wanted.catch:
        return (wanted.caught_ND[None],)
    return (hidden_XD[None, :1].detach(),)


class TiedGradient:
    """Takes the gradient that a head has for the matrix it shares to where the rows that were read are added to it."""

    def __init__(self):
        self.of_head_VD: torch.Tensor | None = None


class _TiedMatrix(torch.autograd.Function):
    """The matrix as the lookup sees it: rows come back, and the gradient of the head with them in it goes on."""

    @staticmethod
    def forward(ctx, weight_VD, tied):
        ctx.tied = tied
        return weight_VD.view_as(weight_VD)

    @staticmethod
    def backward(ctx, grad_VD):
        total_VD, ctx.tied.of_head_VD = ctx.tied.of_head_VD, None
        if not grad_VD.is_sparse:  # something else than the lookup has read it too
            return grad_VD if total_VD is None else total_VD.add_(grad_VD), None
        if total_VD is None:  # a backward pass that the loss has no part in
            return grad_VD.to_dense(), None
        return total_VD.index_add_(0, grad_VD._indices()[0], grad_VD._values()), None


def adds_into_the_head(embedding: torch.nn.Module, head: torch.nn.Module) -> bool:
    """
    Whether the gradient of the input embedding may be the rows that were read, added in place into that of the head,
    which is as large as the matrix they share; torch makes another of that size and adds the two.
    """
    if not isinstance(embedding, torch.nn.Embedding) or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    weight = embedding.weight
    return (
        weight is head.weight
        and type(weight) is torch.nn.Parameter  # shards have sums of their own
        and weight.requires_grad
        and weight.dtype in (torch.float32, torch.float64)
        and not embedding.sparse
        and not embedding.scale_grad_by_freq
    )


@contextlib.contextmanager
def head_rows(head: torch.nn.Module, wanted: HeadRows | None, embedding: torch.nn.Module) -> Iterator[None]:
    """
    While entered, a forward pass in this context sends only the wanted rows through `head`; `None` means all. Where
    they are caught for a loss and `embedding` is tied to the head, its gradient takes no memory of its own.
    """
    if wanted is None:
        yield
        return
    handle = head.register_forward_pre_hook(_at_the_head)
    token = _HEAD_ROWS.set(wanted)
    weight = embedding.weight if wanted.catch and adds_into_the_head(embedding, head) else None
    try:
        if weight is not None:
            tied = TiedGradient()
            # As `torch.func.functional_call` does it: the module reads another tensor under the same name.
            embedding._parameters["weight"], embedding.sparse = _TiedMatrix.apply(weight, tied), True

            def note_lookup(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
                wanted.tied = tied if output.requires_grad else None  # a pass over `inputs_embeds` looks nothing up

            looked_up = embedding.register_forward_hook(note_lookup)
        yield
    finally:
        if weight is not None:
            embedding._parameters["weight"], embedding.sparse = weight, False
            looked_up.remove()
        _HEAD_ROWS.reset(token)
        handle.remove()


class OutputHead:
    """
    What a model knows of its parent's head.

    Args:
        parent (`PreTrainedModel`): the parent.
    """

    def __init__(self, parent: PreTrainedModel):
        # In a tuple, or torch would register the parent a second time wherever this object is an attribute.
        self._parent = (parent,)
        self._checked = False
        self.transform = None

    def runs_in_chunks(self, head: torch.nn.Module, tokens: torch.Tensor) -> bool:
        """
        Whether a loss may run the head itself: it is a plain linear layer, and what the parent does after it was
        recognised, on real hidden states, the first time a loss was asked for.

        Args:
            head (`torch.nn.Module`): the head as it is now, adapters and all.
            tokens (`torch.Tensor` of shape `(B, L)` or `(B, L, D)`): the input of the pass, for the first look.
        """
        if type(head) is not torch.nn.Linear or head.weight.is_meta:
            return False
        if not self._checked:
            (parent,) = self._parent
            probe = {"input_ids" if tokens.ndim == 2 else "inputs_embeds": tokens[:1, :2]}
            caught = []
            handle = head.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
            try:
                # Dropout of this look must not move the random state of a run, or a resumed one would not equal it.
                devices = [tokens.device] if tokens.is_cuda else []
                with torch.random.fork_rng(devices=devices), torch.no_grad():
                    scored = parent(**probe, use_cache=False).logits
                    raw = torch.nn.functional.linear(caught[0].to(head.weight.dtype), head.weight, head.bias)
            finally:
                handle.remove()
            self.transform = matching_transform(
                head_transforms(parent), raw.reshape(-1, raw.shape[-1]), scored.reshape(-1, scored.shape[-1])
            )
            self._checked = True
        return self.transform is not None

    def loss(
        self,
        head: torch.nn.Module,
        logits: torch.Tensor,
        wanted: HeadRows,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The loss of the wanted rows, after the pass that they were wanted in.

        Args:
            head (`torch.nn.Module`): the head.
            logits (`torch.Tensor` of shape `(1, N, V)`): what the parent returned, where the rows were not caught.
            wanted (`HeadRows`): the rows.
            targets_N (`torch.LongTensor` of shape `(N,)`): target ids.
            weights_N (`torch.Tensor` of shape `(N,)`, *optional*): what each row counts.
            num_items_in_batch (`int`, *optional*): see [`row_weights`].

        Returns:
            `tuple`: the loss; the cross-entropies in nats and the exact hits of the rows, detached.
        """
        targets_N = targets_N.to(wanted.rows_N.device)
        weights_N = row_weights(targets_N.shape[0], targets_N.device, weights_N, num_items_in_batch)
        if wanted.catch:
            return linear_cross_entropy(wanted.caught_ND, head, targets_N, weights_N, self.transform, tied=wanted.tied)
        nll_N, hit_N = cross_entropy_rows(logits[0], targets_N)
        return (nll_N * weights_N).sum(), nll_N.detach(), hit_N
