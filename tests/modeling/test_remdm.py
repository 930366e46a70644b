"""ReMDM: its rates by hand, its process in distribution, and what it shares with every other way of decoding."""

import pytest
import torch

from a2d_hf.modeling.canvas_a2d import Canvas
from a2d_hf.modeling.remdm_a2d import ReMDM, ReMDMRates
from a2d_hf.modeling.selectors_a2d import Candidates
from tests.modeling.analytic_models import BEST, PROMPT, TABLE, ContextModel, JointModel, run, table_model
from tests.modeling.test_block_cache import assert_same, batch, block_model
from tests.modeling.test_generation_sampling import chi_square, random_joint


LOOP = [0.55, 0.05, 0.9]
SCHEDULES = ("remdm_cap", "remdm_rescale", "remdm_conf", "remdm_loop")


def rates(name: str, eta: float = 0.3, loop=LOOP) -> ReMDMRates:
    return ReMDMRates(name, eta, loop)


def times(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    grid = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    return grid[:-1], grid[1:]


# α 0, 1/4, 1/2, 3/4, 1; σ_max 1 (nothing stands), min(1, 2), 1, 1/3, 0.
@pytest.mark.parametrize(
    ("name", "eta", "expected"),
    [
        ("remdm_cap", 0.3, [0.3, 0.3, 0.3, 0.0]),
        ("remdm_cap", 0.9, [0.9, 0.9, 0.5, 0.0]),
        ("remdm_rescale", 0.5, [0.5, 0.5, 0.25, 0.0]),
        ("remdm_conf", 0.3, [1.0, 1.0, 0.5, 0.0]),
        # α 0, .5, .9, .9 until t_off = .1, and 1: σ_max at .9 is (1 - .9) / .9, and 0 in the last step.
        ("remdm_loop", 0.05, [0.0, 0.0, 0.05, 0.0]),
    ],
)
def test_rates_by_hand(name, eta, expected):
    found = rates(name, eta, [0.55, 0.1, 0.9]).sigma(*times(4))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_the_loop_stays_at_its_level():
    alpha = rates("remdm_loop").alpha(torch.tensor([1.0, 0.775, 0.55, 0.3, 0.0501, 0.05, 0.025, 0.0]).double())
    expected = torch.tensor([0.0, 0.45, 0.9, 0.9, 0.9, 0.9, 0.95, 1.0]).double()
    torch.testing.assert_close(alpha, expected)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_rates_are_probabilities_and_keep_the_share_that_stands(name, eta, steps):
    schedule, (time, later) = rates(name, eta), times(steps)
    sigma = schedule.sigma(time, later)
    fill = schedule.fill(time, later, sigma)
    alpha, after = schedule.alpha(time), schedule.alpha(later)
    bound = torch.where(alpha > 0, (1 - after) / alpha, torch.ones_like(alpha)).clamp(max=1)
    assert ((sigma >= 0) & (sigma <= bound + 1e-12)).all() and ((fill > -1e-9) & (fill <= 1 + 1e-9)).all()
    torch.testing.assert_close(alpha * (1 - sigma) + (1 - alpha) * fill, after)
    assert fill[-1] == 1.0


def process(name: str, eta: float, rows: int, masks: int, steps: int, confidence: float = 0.5):
    """Runs the process over an even model of two tokens; yields the share that stands before each forward."""
    canvas = Canvas(
        torch.zeros((rows, 1), dtype=torch.long),
        torch.ones((rows, 1), dtype=torch.bool),
        masks,
        None,
        steps,
        mask_token_id=2,
        eos_token_ids=[],
        pad_token_id=0,
        remasking=True,
        more_steps=True,
    )
    schedule = ReMDM(canvas, rates(name, eta), torch.Generator().manual_seed(3))
    shares, filled = [], 0
    while bool(canvas.alive_R.any()):
        alive = canvas.alive_R.nonzero()[:, 0]
        scope = schedule.scope()[alive]
        assert scope.any(-1).all(), "a forward pass fills at least one mask of each row"
        shares.append(1 - float(canvas.masked_RT.sum() / (rows * masks)))
        log_probs = torch.tensor([[confidence, 1 - confidence, 0.0]]).log().expand(int(scope.sum()), -1)
        tokens = torch.zeros_like(canvas.tokens_RT)[alive]
        candidates = Candidates(scope, tokens, log_probs, scope.sum(-1))
        again = schedule.put_back(candidates, scope, alive)
        canvas.commit(alive, scope, tokens, candidates.confidence_BL, again)
        schedule.advance()
        filled += int(scope.sum())
    return shares, filled


@pytest.mark.parametrize(("name", "eta"), [("remdm_cap", 0.4), ("remdm_rescale", 0.6), ("remdm_loop", 0.08)])
def test_the_share_that_stands_before_each_forward_is_that_of_the_schedule(name, eta):
    # 300 masks: no step is without a coin that falls, so that every step has its forward.
    shares, filled = process(name, eta, rows=60, masks=300, steps=12)
    expected = rates(name, eta).alpha(times(12)[0]).tolist()
    assert len(shares) == 12
    # Three standard errors of a share among 18,000 coins: .011.
    assert shares == pytest.approx(expected, abs=0.011)
    assert filled > 60 * 300 * 1.1, "tokens must have been put back and filled again"


def test_without_a_rate_nothing_is_put_back():
    assert process("remdm_cap", 0.0, rows=4, masks=50, steps=6)[1] == 200


def test_confidence_weighs_what_is_put_back():
    canvas = Canvas(
        torch.zeros((20000, 1), dtype=torch.long), torch.ones((20000, 1), dtype=torch.bool), 3, None, 4,
        mask_token_id=2, eos_token_ids=[], pad_token_id=0, remasking=True, more_steps=True,
    )  # fmt: skip
    schedule = ReMDM(canvas, rates("remdm_conf"), torch.Generator().manual_seed(0))
    everyone = torch.arange(20000)
    active = canvas.generated_RT
    standing = torch.tensor([False, True, True, False]).expand(20000, -1)
    confidence = torch.tensor([float("nan"), 0.9, 0.1, float("nan")]).expand(20000, -1)
    schedule.step_R[:] = 2  # α 1/2, σ_max 1/2; the mask is filled with probability 1/2, the last step is sure
    back = schedule._toss(everyone, active, standing, confidence) | schedule.later_RT
    weights = torch.tensor([-0.9, -0.1]).exp()
    expected = 0.5 * weights / weights.sum()
    torch.testing.assert_close(back.float().mean(0)[1:3], expected, atol=0.012, rtol=0)
    assert not back[:, [0, 3]].any()


# 3 degrees of freedom each for 6 positions: 18 altogether, 42.3 is exceeded with probability .001.
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_position_keeps_the_distribution_of_the_model(name):
    arguments = {} if name == "remdm_conf" else {"remasking_eta": 0.3}
    out = table_model().diffusion_generate(
        PROMPT, max_new_tokens=6, steps=9, remasking=name, temperature=1.0, seed=1, num_return_sequences=3000,
        **arguments,
    )  # fmt: skip
    statistic = 0.0
    for position in range(1, 7):
        counts = torch.bincount(out[:, position], minlength=5)[:4].double()
        statistic += chi_square(counts, torch.tensor(TABLE[position][:4], dtype=torch.float64))
    assert statistic < 42.3


def test_with_remasking_more_steps_still_lead_to_the_joint_distribution():
    joint = random_joint(3, 3)

    def distance(steps, **arguments):
        model = JointModel(4, joint=joint)
        out = model.diffusion_generate(
            torch.full((1, 3), model.mask), max_new_tokens=0, temperature=1.0, seed=2, num_return_sequences=4000,
            remasking="remdm_cap", steps=steps, **arguments,
        )  # fmt: skip
        counts = torch.bincount((out * torch.tensor([9, 3, 1])).sum(-1), minlength=27).double() / 4000
        return float((counts - joint.flatten()).abs().sum() / 2)

    # Tokens that are filled in one step are drawn independently; remasking draws more of them, and more steps fewer
    # at a time. (Of a model without errors remasking has nothing to mend.)
    found = [distance(steps, remasking_eta=0.05) for steps in (1, 6, 100)]
    assert found[0] > 0.4 and found[2] < 0.05 < found[1] < found[0] - 0.2


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("steps", [None, 3, 40])
def test_no_mask_is_left_in_the_steps_it_was_given(name, block_size, steps):
    model = ContextModel(13)
    ids = torch.tensor([[1, 2], [3, 4]])
    output = run(model, ids, max_new_tokens=12, steps=steps, block_size=block_size, remasking=name, seed=0)
    assert not (output.sequences == model.mask).any() and torch.equal(output.sequences[:, :2], ids)
    assert output.num_forwards <= (steps or 12) + (0 if block_size is None else 4)
    again = run(model, ids, max_new_tokens=12, steps=steps, block_size=block_size, remasking=name, seed=0)
    assert torch.equal(again.sequences, output.sequences)


@pytest.mark.parametrize("name", ["remdm_cap", "remdm_loop"])
@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
def test_the_cache_is_exact(name, shift, monkeypatch):
    # A pass scores what it fills: under token shift the first token of a block often comes later than its block.
    model = block_model("llama", token_shift=shift)
    arguments = {"max_new_tokens": 13, "steps": 30, "seed": 1, "remasking": name, "remasking_eta": 0.3}
    arguments |= {"temperature": 1.0, "eos_token_id": None}
    assert_same(model, monkeypatch, batch(1, 4, 5, 9), **arguments)
    cached = model.diffusion_generate(**batch(1, 4, 5, 9), guidance_scale=2.0, **arguments)
    plain = model.diffusion_generate(**batch(1, 4, 5, 9), guidance_scale=2.0, use_cache=False, **arguments)
    assert torch.equal(cached, plain)


def test_likeliest_tokens_at_temperature_zero_and_holes_in_the_prompt():
    output = run(table_model(), max_new_tokens=6, remasking="remdm_cap", remasking_eta=0.5, seed=4)
    assert output.sequences.tolist() == [[2, *BEST]] and output.stop_reason == ["length"]
    holes = run(table_model(), torch.tensor([[0, 4, 3, 4]]), max_new_tokens=0, remasking="remdm_loop", seed=0)
    assert holes.sequences.tolist() == [[0, 1, 3, 3]]


@pytest.mark.parametrize("remasking", ["p2", "remdm_cap"])
@pytest.mark.parametrize("block_size", [None, 4])
def test_an_eos_in_the_last_block_ends_the_row_there(remasking, block_size):
    # Position 4 gets token 2; the last block, positions 4 to 6, is shorter than the others.
    output = run(
        table_model(),
        max_new_tokens=6,
        remasking=remasking,
        block_size=block_size,
        eos_token_id=2,
        pad_token_id=0,
        seed=0,
    )
    assert output.sequences.tolist() == [[2, 1, 0, 3, 2]] and output.stop_reason == ["eos"]
    assert output.confidences.shape == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"remasking": "remdm"}, 'remasking="remdm_cap"'),
        ({"eta": 0.1}, "`remasking_eta`"),
        ({"remasking_eta": 0.1}, "`remasking_eta` does nothing without `remasking="),
        ({"remasking_eta": 0.1, "remasking": "remdm_conf"}, "`remasking_eta` does nothing"),
        ({"remasking_loop": LOOP, "remasking": "remdm_cap"}, "`remasking_loop` does nothing"),
        ({"remasking_loop": [0.05, 0.55, 0.9], "remasking": "remdm_loop"}, "`remasking_loop` must be"),
        ({"remasking_eta": 1.5, "remasking": "remdm_cap"}, "`remasking_eta` must be a number in"),
        ({"remasking": "remdm_cap", "selector": "threshold"}, "draws its positions itself"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(table_model(), max_new_tokens=3, **arguments)
