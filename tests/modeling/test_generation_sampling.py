"""What a position gets: exact sampling, temperature, limits, seeds, logits processors, and P2 remasking."""

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import SequenceBiasLogitsProcessor

from a2d_hf.modeling.candidate_tokens_a2d import draw_tokens
from tests.modeling.analytic_models import (
    BEST,
    PROMPT,
    ContextModel,
    JointModel,
    TableModel,
    committed_by_step,
    run,
    table_model,
)


SELECTORS = ("confidence", "margin", "entropy", "random", "threshold", "entropy_bound")


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def random_joint(length: int, values: int) -> torch.Tensor:
    weights = torch.rand((values,) * length, generator=torch.Generator().manual_seed(5), dtype=torch.float64) ** 4
    return (weights + 0.01) / (weights + 0.01).sum()


def sample_counts(samples: int, **kwargs) -> torch.Tensor:
    joint = random_joint(3, 3)
    model = JointModel(4, joint=joint)
    ids = torch.full((1, 3), model.mask)
    out = model.diffusion_generate(
        ids, max_new_tokens=0, temperature=1.0, seed=11, num_return_sequences=samples, **kwargs
    )
    return torch.bincount((out * torch.tensor([9, 3, 1])).sum(-1), minlength=27)


# 26 degrees of freedom: 54.05 is exceeded with probability .001.
@pytest.mark.parametrize(
    "kwargs",
    [
        {"selector": "random"},
        {"selector": "confidence"},
        {"selector": "threshold", "threshold": 1.0},
        {"selector": "margin"},
        {"selector": "entropy"},
        {"selector": "random", "block_size": 1},
        {"selector": "entropy_bound", "entropy_bound": 0.0},
    ],
    ids=str,
)
def test_one_token_per_forward_samples_the_joint_distribution(kwargs):
    # Any order is exact that does not look at the drawn tokens: random, left to right, by entropy.
    counts = sample_counts(6000, **kwargs)
    statistic = chi_square(counts, random_joint(3, 3).flatten())
    if kwargs["selector"] in ("confidence", "threshold"):
        assert statistic > 54.05, "committing the surest drawn tokens first is biased, and this test must see it"
    else:
        assert statistic < 54.05


def test_all_tokens_in_one_forward_sample_the_marginals_instead():
    counts, joint = sample_counts(6000, selector="random", steps=1), random_joint(3, 3)
    marginals = torch.einsum("a,b,c->abc", joint.sum((1, 2)), joint.sum((0, 2)), joint.sum((0, 1)))
    assert chi_square(counts, marginals.flatten()) < 54.05 < chi_square(counts, joint.flatten())


def test_drawn_tokens_follow_their_probabilities_and_avoid_minus_infinity():
    probabilities = torch.tensor([0.5, 0.3, 0.0, 0.15, 0.04, 0.01])
    tokens = draw_tokens(probabilities.log().expand(20000, -1), torch.Generator().manual_seed(0))
    counts = torch.bincount(tokens, minlength=6)
    assert counts[2] == 0
    assert chi_square(counts[probabilities > 0].double(), probabilities[probabilities > 0].double()) < 18.47  # df 4


def test_temperature_zero_takes_the_likeliest_token():
    for _ in range(3):
        assert table_model().diffusion_generate(PROMPT, max_new_tokens=6, temperature=0.0).tolist() == [[2, *BEST]]


def test_temperature_sharpens_and_flattens():
    share = {}
    for temperature in (0.25, 1.0, 4.0):
        out = table_model().diffusion_generate(
            PROMPT, max_new_tokens=1, temperature=temperature, num_return_sequences=4000, seed=0
        )
        share[temperature] = float((out[:, 1] == 1).float().mean())
    expected = {t: 0.6 ** (1 / t) / sum(p ** (1 / t) for p in (0.1, 0.6, 0.2, 0.1)) for t in share}
    assert share == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [({"top_k": 2}, {1, 2}), ({"top_p": 0.7}, {1, 2}), ({"min_p": 0.3}, {1, 2}), ({"top_k": 1}, {1})],
)
def test_top_k_top_p_and_min_p_limit_what_is_drawn(limit, allowed):
    out = table_model().diffusion_generate(
        PROMPT, max_new_tokens=1, temperature=1.0, num_return_sequences=500, seed=0, **limit
    )
    assert set(out[:, 1].tolist()) == allowed


def test_selectors_see_the_models_probabilities_at_any_temperature():
    # At temperature .05 the warped probability of nearly every token is 1, and a threshold on it would commit all.
    output = run(
        table_model(),
        max_new_tokens=6,
        temperature=0.05,
        selector="threshold",
        threshold=0.75,
        seed=0,
        output_history=True,
    )
    assert committed_by_step(output)[0] == [2, 4, 6]


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    def texts(**source):
        return table_model().diffusion_generate(
            PROMPT, max_new_tokens=6, temperature=1.0, num_return_sequences=20, **source
        )

    assert torch.equal(texts(seed=1), texts(seed=1)) and not torch.equal(texts(seed=1), texts(seed=2))
    first, second = (texts(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(9)
    first = texts()
    torch.manual_seed(9)
    assert torch.equal(first, texts())


def test_a_seed_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    table_model().diffusion_generate(PROMPT, max_new_tokens=6, temperature=1.0, selector="random", seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_num_return_sequences_returns_that_many_rows_per_prompt_in_order():
    ids = torch.tensor([[0], [3]])
    out = table_model().diffusion_generate(ids, max_new_tokens=3, temperature=1.0, num_return_sequences=4, seed=0)
    assert out.shape == (8, 4) and out[:, 0].tolist() == [0] * 4 + [3] * 4
    assert len({tuple(row) for row in out[:4].tolist()}) > 1


# -------------------------------------------------------------------------------------------------- logits processors


def test_the_callers_logits_processors_are_applied():
    bias = SequenceBiasLogitsProcessor([[[3], 100.0]])
    out = table_model().diffusion_generate(PROMPT, max_new_tokens=6, logits_processor=LogitsProcessorList([bias]))
    assert out.tolist() == [[2] + [3] * 6]


def test_suppress_tokens_are_never_generated():
    out = table_model().diffusion_generate(PROMPT, max_new_tokens=6, suppress_tokens=[1, 3])
    assert out.tolist() == [[2, 2, 0, 0, 2, 0, 0]]


def test_repetition_penalty_counts_tokens_of_the_row_but_not_its_padding():
    model = TableModel(
        5, table=[[0.25, 0.25, 0.25, 0.25, 0.0], [0.4, 0.3, 0.2, 0.1, 0.0]], defaults={"eos_token_id": 3}
    )
    arguments = {"max_new_tokens": 1, "repetition_penalty": 5.0}
    assert model.diffusion_generate(torch.tensor([[0]]), **arguments).tolist() == [[0, 1]]
    padded = model.diffusion_generate(torch.tensor([[0, 1]]), attention_mask=torch.tensor([[0, 1]]), **arguments)
    assert padded.tolist() == [[0, 1, 0]], "the pad token 0 must not be punished, token 1 must"


def test_forbidding_every_token_is_an_error():
    with pytest.raises(ValueError, match="forbid the whole vocabulary"):
        table_model().diffusion_generate(PROMPT, max_new_tokens=2, suppress_tokens=[0, 1, 2, 3])


# -------------------------------------------------------------------------------------------------------- remasking


class SecondThoughts(TableModel):
    """Sure of token 1 at position 1 while all is masked; once position 2 is known, sure that it is token 0."""

    def scores(self, input_ids, valid):
        table = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.9, 0.0], [0.2, 0.8, 0.0], [0.3, 0.7, 0.0]]).double()
        scores = table.log()[: input_ids.shape[1]].repeat(input_ids.shape[0], 1, 1)
        known = input_ids[:, 1] != self.mask
        scores[known, 1] = torch.tensor([0.95, 0.05, 0.0]).double().log()
        return scores


def test_p2_takes_back_what_the_model_no_longer_believes():
    model = SecondThoughts(3)
    ids = torch.tensor([[0, 2, 2, 2]])
    assert run(model, ids, max_new_tokens=0, steps=3).sequences.tolist() == [[0, 1, 1, 1]]
    output = run(model, ids, max_new_tokens=0, steps=3, remasking="p2", output_history=True)
    # Forward 1 keeps position 1 (.9). Forward 2: its token's own probability is now .05, so positions 2 and 3 stand.
    # Forward 3 fills it again.
    assert [step.tolist()[0] for step in output.history] == [[0, 2, 2, 2], [0, 1, 2, 2], [0, 2, 1, 1], [0, 1, 1, 1]]


def test_p2_scores_a_committed_token_by_its_own_probability():
    # A peer scores it by that of a newly drawn token: .95 here, and position 1 would never be taken back.
    model = SecondThoughts(3)
    output = run(model, torch.tensor([[0, 2, 2, 2]]), max_new_tokens=0, steps=3, remasking="p2", output_history=True)
    assert output.history[2][0, 1] == model.mask


def test_an_eos_that_p2_takes_back_ends_nothing():
    class ThinksBetter(SecondThoughts):
        def scores(self, input_ids, valid):
            table = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.9, 0.0], [0.8, 0.2, 0.0], [0.7, 0.3, 0.0]]).double()
            scores = table.log()[: input_ids.shape[1]].repeat(input_ids.shape[0], 1, 1)
            known = (input_ids[:, 1:3] != self.mask).any(-1)
            scores[known, 1] = torch.tensor([0.95, 0.05, 0.0]).double().log()
            return scores

    output = run(
        ThinksBetter(3),
        torch.tensor([[0]]),
        max_new_tokens=3,
        steps=3,
        remasking="p2",
        eos_token_id=1,
        output_history=True,
    )
    assert output.history[1].tolist() == [[0, 1, 2, 2]], "the EOS stands after the first forward"
    assert output.sequences.tolist() == [[0, 0, 0, 0]] and output.stop_reason == ["length"]


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("steps", [None, 3, 7])
def test_p2_ends_with_no_mask_left_in_the_steps_it_was_given(block_size, steps):
    model = ContextModel(13)
    output = run(
        model, torch.tensor([[1, 2], [3, 4]]), max_new_tokens=12, steps=steps, block_size=block_size, remasking="p2"
    )
    assert not (output.sequences == model.mask).any()
    assert output.num_forwards <= (steps or 12) + (0 if block_size is None else 2)


def test_p2_does_not_touch_the_prompt():
    model, ids = ContextModel(13), torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(model.diffusion_generate(ids, max_new_tokens=8, steps=4, remasking="p2")[:, :4], ids)
