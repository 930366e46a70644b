"""What a diffusion loss is made of, summed where it is computed and read when something is logged.

Owns the running sums of one mode (training or evaluation). They stay on the device: nothing here waits for it until
`result` is asked for.

Shapes: B rows, L tokens, N masked tokens in row-major order.
"""

import torch
from accelerate import Accelerator


TIME_BINS = 4

# Sums that are kept beside those of the time bins.
_NAMES = ("nelbo", "nelbo_tokens", "hits", "masked", "loss", "items")


class DiffusionMetrics:
    """Running sums of a diffusion loss; `update` adds a batch, `result` reads and clears them."""

    def __init__(self):
        self._sums: torch.Tensor | None = None
        self._means: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        """
        Adds to a mean beside those of the objective, for example that of an auxiliary loss.

        Args:
            name (`str`): what it is logged as. Every process must add the same names.
            total (`torch.Tensor` of shape `()`): a sum over this batch.
            count (`torch.Tensor` of shape `()`): what it will be divided by.
        """
        dtype = torch.float32 if total.device.type == "mps" else torch.float64
        pair = torch.stack([total.to(dtype), torch.as_tensor(count, device=total.device).to(dtype)])
        self._means[name] = self._means[name] + pair if name in self._means else pair

    @torch.no_grad()
    def update(
        self,
        *,
        token_nll_N: torch.Tensor,
        token_hit_N: torch.Tensor,
        masked_BL: torch.Tensor,
        counted_BL: torch.Tensor,
        elbo_weight_B: torch.Tensor,
        time_B: torch.Tensor,
        loss: torch.Tensor,
        items: torch.Tensor,
    ) -> None:
        """
        Adds a batch.

        Args:
            token_nll_N (`torch.Tensor` of shape `(N,)`): cross-entropy of each masked token, in nats.
            token_hit_N (`torch.BoolTensor` of shape `(N,)`): whether it was predicted exactly.
            masked_BL (`torch.BoolTensor` of shape `(B, L)`): where those N tokens are.
            counted_BL (`torch.BoolTensor` of shape `(B, L)`): tokens that may be masked and belong to the text (not to
                a tail of EOS): the NELBO is per one of these.
            elbo_weight_B (`torch.Tensor` of shape `(B,)`): w(t) of each row.
            time_B (`torch.Tensor` of shape `(B,)`): t of each row, in [0, 1].
            loss (`torch.Tensor` of shape `()`): the objective's sum over this batch, before it is divided.
            items (`torch.Tensor` of shape `()`): what this batch adds to the divisor.
        """
        device = token_nll_N.device
        # One number per masked token; MPS has no float64, and float32 sums of a few hundred batches are good enough.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        counted_N = counted_BL[masked_BL].to(dtype)
        weight_N = elbo_weight_B.to(dtype)[:, None].expand(masked_BL.shape)[masked_BL]
        bin_B = (time_B * TIME_BINS).long().clamp(max=TIME_BINS - 1).to(device)
        bin_N = bin_B[:, None].expand(masked_BL.shape)[masked_BL]
        nll_N = token_nll_N.to(dtype) * counted_N
        bins = torch.zeros((2, TIME_BINS), dtype=dtype, device=device)
        bins[0].index_add_(0, bin_N, nll_N)
        bins[1].index_add_(0, bin_N, counted_N)
        values = (
            (weight_N * nll_N).sum(),
            counted_BL.sum(),
            (token_hit_N.to(dtype) * counted_N).sum(),
            counted_N.sum(),
            loss,
            items,
        )
        sums = torch.cat([torch.stack([value.to(device=device, dtype=dtype) for value in values]), bins.flatten()])
        self._sums = sums if self._sums is None else self._sums + sums

    def result(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Reads the sums of every process and clears them. All processes must call it together.

        Returns:
            `dict[str, float]`: `nelbo` (nats per token), `masked_accuracy`, `nll_t_0.00_0.25` and so on (mean
            cross-entropy of tokens masked at such a time) and `loss`; an entry with nothing to divide by is left out.
        """
        device = accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        empty = torch.zeros(len(_NAMES) + 2 * TIME_BINS, dtype=dtype, device=device)
        sums = accelerator.reduce(empty if self._sums is None else self._sums.to(device), reduction="sum")
        self._sums = None
        values = sums.tolist()
        total = dict(zip(_NAMES, values, strict=False))
        bins = values[len(_NAMES) :]
        fractions = {
            "loss": (total["loss"], total["items"]),
            "nelbo": (total["nelbo"], total["nelbo_tokens"]),
            "masked_accuracy": (total["hits"], total["masked"]),
        }
        for b in range(TIME_BINS):
            name = f"nll_t_{b / TIME_BINS:.2f}_{(b + 1) / TIME_BINS:.2f}"
            fractions[name] = (bins[b], bins[TIME_BINS + b])
        for name in sorted(self._means):
            fractions[name] = tuple(accelerator.reduce(self._means[name].to(device), reduction="sum").tolist())
        self._means = {}
        return {name: above / below for name, (above, below) in fractions.items() if below > 0}
