"""ReMDM: ancestral sampling of masked diffusion that may take back what it has written.

Owns the process of "Remasking Discrete Diffusion Models with Inference-Time Scaling"
(https://huggingface.co/papers/2503.00307): the share α of tokens that stand at each time, the rate σ at which they are
put back, and the coins. Knows nothing of models.

A block of n masks takes `steps` steps from time t = 1 to 0, t = 1 - i/steps, with α(t) = 1 - t. From t to s < t

    a committed token is put back with probability σ,
    a mask is filled with probability (α_s - (1 - σ) α_t) / (1 - α_t),

so that the share that stands is α_s whatever σ is, as long as σ <= σ_max = min(1, (1 - α_s) / α_t). What fills a mask
is drawn from the model's prediction. The schedules of the paper:

    remdm_cap       σ = min(η, σ_max)
    remdm_rescale   σ = η σ_max
    remdm_conf      σ_i = σ_max exp(-ψ_i) / sum over the block of exp(-ψ_j), ψ the probability of a token when it was
                    committed, infinite for masks
    remdm_loop      α rises to α_on while t > t_on, stays there with σ = min(η, σ_max) until t_off, then rises to 1
                    with σ = 0

The coins do not depend on the forward pass. So they are tossed before it: only the masks that are about to be filled
are scored, and a step that fills none costs no forward pass. Neither changes the distribution.

Shapes: R rows of the canvas, B of them that are not finished, T positions of the canvas.
"""

import torch

from .block_schedule_a2d import BlockSchedule
from .canvas_a2d import Canvas
from .selectors_a2d import Candidates, Selector, draw_uniform


class ReMDMRates:
    """
    α and σ of one schedule.

    Args:
        name (`str`): `"remdm_cap"`, `"remdm_rescale"`, `"remdm_conf"` or `"remdm_loop"`.
        eta (`float`): η, in [0, 1].
        loop (`list[float]`): t_on, t_off and α_on, for `"remdm_loop"`.
    """

    def __init__(self, name: str, eta: float, loop: list[float]):
        self.name, self.eta = name, eta
        self.t_on, self.t_off, self.alpha_on = loop

    def alpha(self, time: torch.Tensor) -> torch.Tensor:
        """The share of tokens that stand at each time."""
        if self.name != "remdm_loop":
            return 1.0 - time
        rising = (1.0 - time) * self.alpha_on / (1.0 - self.t_on)
        falling = 1.0 - time * (1.0 - self.alpha_on) / self.t_off
        level = torch.full_like(time, self.alpha_on)
        return torch.where(time > self.t_on, rising, torch.where(time > self.t_off, level, falling))

    def sigma(self, time: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
        """The rate from `time` to `later`; for `"remdm_conf"` what its weights are multiplied with."""
        alpha = self.alpha(time)
        # At α = 0 nothing stands that could be put back.
        bound = torch.where(alpha > 0, (1.0 - self.alpha(later)) / alpha.clamp(min=1e-12), 1.0).clamp(max=1.0)
        if self.name == "remdm_rescale":
            return self.eta * bound
        if self.name == "remdm_conf":
            return bound
        capped = bound.clamp(max=self.eta)
        if self.name == "remdm_cap":
            return capped
        return torch.where((time > self.t_off) & (time <= self.t_on), capped, 0.0)

    def fill(self, time: torch.Tensor, later: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The probability that a mask is filled between `time` and `later`."""
        alpha, after = self.alpha(time), self.alpha(later)
        # The last step is exact: every mask is filled, whatever rounding says.
        return torch.where(later <= 0, 1.0, (after - (1.0 - sigma) * alpha) / (1.0 - alpha).clamp(min=1e-12))


class ReMDM(BlockSchedule):
    """
    The schedule of a call with ReMDM remasking.

    Args:
        canvas ([`Canvas`]): the state of the call.
        rates ([`ReMDMRates`]): α and σ.
        generator (`torch.Generator`, *optional*): where the coins come from.
    """

    def __init__(self, canvas: Canvas, rates: ReMDMRates, generator: torch.Generator | None):
        super().__init__(canvas)
        self.rates, self.generator = rates, generator
        self.step_R = torch.zeros(canvas.tokens_RT.shape[0], dtype=torch.long, device=canvas.tokens_RT.device)
        # Tossed for the next forward pass: the masks it fills, and the tokens that are put back meanwhile.
        self.fill_RT = torch.zeros_like(canvas.generated_RT)
        self.later_RT = torch.zeros_like(canvas.generated_RT)
        self.advance()

    def scope(self) -> torch.Tensor:
        return self.fill_RT & self.canvas.alive_R[:, None]

    def num_commits(self) -> torch.Tensor:
        return self.fill_RT.sum(-1)

    def choose(self, select: Selector, candidates: Candidates, rows_B: torch.Tensor) -> torch.Tensor:
        return candidates.mask_BL

    def put_back(self, candidates: Candidates, chosen_BT: torch.Tensor, rows_B: torch.Tensor) -> torch.Tensor:
        canvas = self.canvas
        active_BT = canvas.generated_RT[rows_B] & (canvas.block_1T == canvas.active_block_R[rows_B, None])
        standing_BT = active_BT & (~canvas.masked_RT[rows_B] | chosen_BT)
        again_BT = self.later_RT[rows_B]
        confidence_BT = torch.where(chosen_BT, candidates.confidence_BL, canvas.confidence_RT[rows_B])
        return again_BT | self._toss(rows_B, active_BT, standing_BT & ~again_BT, confidence_BT)

    def advance(self) -> None:
        """Begins the blocks that rows have just come to."""
        canvas = self.canvas
        rows_B = (canvas.alive_R & ~self.fill_RT.any(-1)).nonzero()[:, 0]
        if rows_B.numel():
            self.step_R[rows_B] = 0
            active_BT = canvas.generated_RT[rows_B] & (canvas.block_1T == canvas.active_block_R[rows_B, None])
            self._toss(rows_B, active_BT, torch.zeros_like(active_BT), canvas.confidence_RT[rows_B])

    def _toss(
        self, rows_B: torch.Tensor, active_BT: torch.Tensor, standing_BT: torch.Tensor, confidence_BT: torch.Tensor
    ) -> torch.Tensor:
        """
        Goes on until a mask is to be filled, or the steps of the block are over.

        Returns:
            `torch.BoolTensor` of shape `(B, T)`: what was put back on the way, before the next forward pass.
        """
        steps_B = self.canvas.steps_of(self.canvas.active_block_R[rows_B], rows_B)
        fill_BT, later_BT, again_BT = (torch.zeros_like(active_BT) for _ in range(3))
        while bool((todo_B := ~fill_BT.any(-1) & (self.step_R[rows_B] < steps_B)).any()):
            time_B1 = 1.0 - (self.step_R[rows_B] / steps_B.double())[:, None]
            next_B1 = 1.0 - ((self.step_R[rows_B] + 1) / steps_B.double())[:, None]
            sigma_B1 = self.rates.sigma(time_B1, next_B1)
            sigma_BT = sigma_B1.expand(standing_BT.shape)
            if self.rates.name == "remdm_conf":
                weight_BT = (-confidence_BT.double()).exp().masked_fill(~standing_BT, 0.0)
                sigma_BT = sigma_B1 * weight_BT / weight_BT.sum(-1, keepdim=True).clamp(min=1e-12)
                sigma_B1 = torch.zeros_like(sigma_B1)  # a mask has the weight 0
            coin_BT = draw_uniform(tuple(active_BT.shape), active_BT.device, self.generator)
            filled_BT = active_BT & ~standing_BT & todo_B[:, None]
            filled_BT &= coin_BT < self.rates.fill(time_B1, next_B1, sigma_B1)
            taken_BT = standing_BT & todo_B[:, None] & (coin_BT < sigma_BT)
            # A step that fills a mask needs a forward pass, which still sees what the same step puts back.
            fill_BT |= filled_BT
            waits_BT = taken_BT & filled_BT.any(-1, keepdim=True)
            later_BT |= waits_BT
            again_BT |= taken_BT & ~waits_BT
            standing_BT = standing_BT & ~taken_BT
            self.step_R[rows_B] += todo_B
        self.fill_RT[rows_B], self.later_RT[rows_B] = fill_BT, later_BT
        return again_BT
