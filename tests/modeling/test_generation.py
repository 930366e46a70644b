"""The decoding loop on models with a known posterior: schedule, infilling, stopping, layout, output."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from a2d_hf.modeling.canvas_a2d import Canvas
from tests.modeling.analytic_models import (
    BEST,
    PROMPT,
    TABLE,
    ContextModel,
    JointModel,
    TableModel,
    changes,
    committed_by_step,
    run,
    table_model,
)


SELECTORS = ("confidence", "margin", "entropy", "random", "threshold", "entropy_bound")

# ------------------------------------------------------------------------------------------------- order of commits


def test_default_returns_prompt_and_completion_as_a_tensor():
    ids = table_model().diffusion_generate(PROMPT, max_new_tokens=6)
    assert isinstance(ids, torch.Tensor) and ids.dtype == torch.long and ids.tolist() == [[2, *BEST]]


def test_confidence_commits_the_surest_first_one_per_forward_by_default():
    output = run(table_model(), max_new_tokens=6, output_history=True)
    assert committed_by_step(output) == [[6], [2], [4], [1], [3], [5]]
    assert output.num_forwards == 6 and output.tokens_per_forward.tolist() == [1.0]


def test_steps_share_the_masks_with_the_remainder_first():
    output = run(table_model(), max_new_tokens=6, steps=4, output_history=True)
    assert committed_by_step(output) == [[2, 6], [1, 4], [3], [5]]


def test_one_step_commits_everything():
    output = run(table_model(), max_new_tokens=6, steps=1)
    assert output.num_forwards == 1 and output.sequences.tolist() == [[2, *BEST]]


def test_blocks_are_finished_one_after_the_other_on_the_grid_from_position_0():
    # Blocks 0-2, 3-5, 6: the prompt shares the first one.
    output = run(table_model(), max_new_tokens=6, block_size=3, output_history=True)
    assert committed_by_step(output) == [[2], [1], [4], [3], [5], [6]]


def test_steps_are_shared_among_blocks_by_their_masks():
    output = run(table_model(), max_new_tokens=6, block_size=4, steps=4, output_history=True)
    # Blocks 1-3 and 4-6 with two steps each: 2 + 1.
    assert committed_by_step(output) == [[1, 2], [3], [4, 6], [5]]


def test_fewer_steps_than_blocks_take_one_forward_per_block():
    assert run(table_model(), max_new_tokens=6, block_size=2, steps=1).num_forwards == 4


@pytest.mark.parametrize("steps", [7, 1000])
def test_more_steps_than_masks_take_one_forward_per_mask(steps):
    output = run(table_model(), max_new_tokens=6, steps=steps, output_history=True)
    assert output.num_forwards == 6 and all(row == [1] for row in changes(output.history, 4))


def test_threshold_commits_what_is_sure_and_then_the_best():
    output = run(table_model(), max_new_tokens=6, selector="threshold", threshold=0.75, output_history=True)
    assert committed_by_step(output) == [[2, 4, 6], [1], [3], [5]]


def test_steps_cap_the_forwards_of_an_adaptive_selector():
    arguments = {"max_new_tokens": 6, "selector": "threshold", "threshold": 0.75, "output_history": True}
    # Two steps want three commits each; the first forward took three by itself.
    assert committed_by_step(run(table_model(), steps=2, **arguments)) == [[2, 4, 6], [1, 3, 5]]
    # Three steps want two each; ahead by one after the first forward, so one is enough in the second.
    assert committed_by_step(run(table_model(), steps=3, **arguments)) == [[2, 4, 6], [1], [3, 5]]


def test_entropy_bound_of_zero_commits_one_and_of_infinity_all():
    assert run(table_model(), max_new_tokens=6, selector="entropy_bound", entropy_bound=0.0).num_forwards == 6
    assert run(table_model(), max_new_tokens=6, selector="entropy_bound", entropy_bound=1e9).num_forwards == 1


def test_entropy_bound_is_taken_from_the_config():
    # Entropies at 6, 2, 4: .168, .428, .708. Without the largest: 0, .168, .596.
    output = run(table_model(), max_new_tokens=6, selector="entropy_bound", entropy_bound=0.5, output_history=True)
    assert committed_by_step(output)[0] == [2, 6]


def test_a_function_selects():
    def rightmost(candidates):
        last = candidates.mask_BL.long().cumsum(-1) == candidates.mask_BL.sum(-1, keepdim=True)
        return candidates.mask_BL & last

    output = run(table_model(), max_new_tokens=4, selector=rightmost, output_history=True)
    assert committed_by_step(output) == [[4], [3], [2], [1]]


def test_confidences_are_the_models_probabilities_and_nan_in_the_prompt():
    output = run(table_model(), max_new_tokens=6)
    assert output.confidences[0, 0].isnan()
    torch.testing.assert_close(output.confidences[0, 1:], torch.tensor([0.60, 0.90, 0.45, 0.80, 0.34, 0.97]))


def test_history_starts_masked_and_ends_with_the_sequences():
    output = run(table_model(), max_new_tokens=6, steps=3, output_history=True)
    assert len(output.history) == 4
    assert output.history[0].tolist() == [[2] + [4] * 6] and torch.equal(output.history[-1], output.sequences)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("steps", [None, 1, 2, 5, 64])
@pytest.mark.parametrize("block_size", [None, 1, 4])
def test_no_masks_are_left_over_and_no_forward_is_wasted(selector, steps, block_size):
    model = ContextModel(11)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    output = run(
        model, ids, max_new_tokens=9, selector=selector, steps=steps, block_size=block_size, output_history=True
    )
    assert not (output.sequences == model.mask).any()
    filled = torch.tensor(changes(output.history, model.mask))
    still_open = torch.stack([(step == model.mask).any(-1) for step in output.history[:-1]])
    assert (filled[still_open] >= 1).all() and output.num_forwards == len(model.calls) == len(filled)


# --------------------------------------------------------------------------------------------------------- infilling


def test_masks_anywhere_in_the_prompt_are_filled_and_the_rest_stays():
    ids = torch.tensor([[0, 4, 3, 4, 4, 0, 4]])
    output = run(table_model(), ids, max_new_tokens=0)
    assert output.sequences.tolist() == [[0, 1, 3, 3, 2, 0, 3]]
    assert output.stop_reason == ["filled"] and output.num_forwards == 4
    assert output.confidences[0].isnan().tolist() == [True, False, True, False, False, True, False]


def test_infilling_conditions_on_both_sides():
    joint = torch.zeros(2, 2, 2)
    joint[0, 0, 1], joint[1, 1, 0] = 0.5, 0.5
    model = JointModel(3, joint=joint)
    ids = torch.tensor([[2, 2, 1], [2, 2, 0], [1, 2, 2], [2, 0, 2]])
    assert model.diffusion_generate(ids, max_new_tokens=0).tolist() == [[0, 0, 1], [1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_masks_in_the_prompt_are_filled_while_text_is_appended():
    out = table_model().diffusion_generate(torch.tensor([[0, 4, 3]]), max_new_tokens=2)
    assert out.tolist() == [[0, 1, 3, 3, 2]]


def test_rows_with_nothing_to_fill_come_back_unchanged_and_cost_nothing():
    ids = torch.tensor([[0, 1, 2], [0, 4, 2]])
    model = table_model()
    output = run(model, ids, max_new_tokens=0)
    assert output.sequences.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert [len(call.input_ids) for call in model.calls] == [1] and output.tokens_per_forward.tolist() == [0.0, 1.0]


def test_eos_in_a_filled_hole_ends_nothing():
    out = table_model().diffusion_generate(torch.tensor([[0, 4, 2, 4]]), max_new_tokens=0, eos_token_id=1)
    assert out.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("selector", SELECTORS)
def test_infilling_works_with_every_selector_and_with_blocks(selector):
    model = ContextModel(9)
    ids = torch.tensor([[1, 8, 8, 2, 8, 3], [8, 8, 8, 8, 8, 1]])
    out = model.diffusion_generate(ids, max_new_tokens=0, selector=selector, block_size=2)
    assert not (out == 8).any() and torch.equal(out[ids != 8], ids[ids != 8])


# ---------------------------------------------------------------------------------------------------------- stopping


def test_eos_drops_what_follows_and_fills_it_with_pad():
    output = run(table_model(), max_new_tokens=6, steps=1, eos_token_id=3, pad_token_id=0)
    assert output.sequences.tolist() == [[2, 1, 0, 3]], "cut to the longest completion"
    assert output.stop_reason == ["eos"] and output.tokens_per_forward.tolist() == [3.0]


def test_completions_of_different_length_are_filled_with_pad():
    class EndsByRow(TableModel):
        def scores(self, input_ids, valid):
            scores = super().scores(input_ids, valid).clone()
            scores[input_ids[:, 0] == 0, 2, 3] = 50.0  # rows that start with 0 end at position 2
            return scores

    model = EndsByRow(5, table=TABLE)
    output = run(model, torch.tensor([[0], [1]]), max_new_tokens=5, eos_token_id=3, pad_token_id=2)
    assert output.sequences.tolist() == [[0, 1, 3, 2], [1, 1, 0, 3]]
    assert output.stop_reason == ["eos", "eos"]


def test_what_was_dropped_has_no_confidence_and_does_not_count():
    # Everything is committed in one forward; the second row keeps one token more.
    class EndsByRow(TableModel):
        def scores(self, input_ids, valid):
            scores = super().scores(input_ids, valid).clone()
            scores[input_ids[:, 0] == 0, 2, 3] = 50.0
            return scores

    output = run(
        EndsByRow(5, table=TABLE), torch.tensor([[0], [1]]), max_new_tokens=5, steps=1, eos_token_id=3, pad_token_id=2
    )
    assert output.confidences.isnan().tolist() == [[True, False, False, True], [True, False, False, False]]
    assert output.tokens_per_forward.tolist() == [2.0, 3.0] and output.num_forwards == 1


def test_the_only_stop_is_the_length_without_an_eos_token():
    output = run(table_model(), max_new_tokens=6, eos_token_id=None)
    assert output.stop_reason == ["length"] and output.sequences.shape == (1, 7)


@pytest.mark.parametrize("eos", [3, [3, 17], [0, 3]])
def test_one_or_several_eos_tokens(eos):
    output = run(table_model(), max_new_tokens=6, eos_token_id=eos, pad_token_id=1)
    assert output.sequences.shape[1] == (3 if eos == [0, 3] else 4)


class StopAfter(StoppingCriteria):
    """Stops each row at its n-th new token; records what it was shown."""

    def __init__(self, prompt: int, counts: list[int]):
        self.prompt, self.counts, self.seen = prompt, counts, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return torch.tensor([input_ids.shape[1] - self.prompt == count for count in self.counts])


def test_stopping_criteria_are_called_column_by_column_on_settled_tokens():
    criterion = StopAfter(1, [99])
    run(table_model(), max_new_tokens=6, stopping_criteria=StoppingCriteriaList([criterion]), pad_token_id=0)
    assert [ids.tolist()[0] for ids in criterion.seen] == [[2, *BEST[: n + 1]] for n in range(6)]


@pytest.mark.parametrize("block_size", [None, 1, 2])
def test_a_stopping_criterion_cuts_the_row_there_as_in_autoregressive_generation(block_size):
    output = run(
        table_model(),
        torch.tensor([[2], [3]]),
        max_new_tokens=6,
        block_size=block_size,
        stopping_criteria=StoppingCriteriaList([StopAfter(1, [2, 4])]),
        pad_token_id=0,
    )
    assert output.sequences.tolist() == [[2, 1, 0, 0, 0], [3, 1, 0, 3, 2]]
    assert output.stop_reason == ["stopping_criteria"] * 2


def test_a_stopping_criterion_ends_the_work_of_later_blocks():
    arguments = {"max_new_tokens": 6, "block_size": 1, "pad_token_id": 0}
    output = run(table_model(), stopping_criteria=StoppingCriteriaList([StopAfter(1, [2])]), **arguments)
    assert output.num_forwards == 2


# ------------------------------------------------------------------------------------------------------------ layout


def test_right_padding_keeps_the_columns_and_completions_start_behind_them():
    ids, mask = torch.tensor([[2, 9, 9], [1, 0, 3]]), torch.tensor([[1, 0, 0], [1, 1, 1]])
    ids = ids.clamp(max=3)
    out = table_model().diffusion_generate(ids, attention_mask=mask, max_new_tokens=2)
    # Row 0 is at positions 1 and 2, row 1 at 3 and 4.
    assert out.tolist() == [[2, 3, 3, 1, 0], [1, 0, 3, 3, 2]]


def test_holes_in_the_attention_mask_are_closed():
    model, ids = table_model(), torch.tensor([[2, 3, 1, 3]])
    out = model.diffusion_generate(ids, attention_mask=torch.tensor([[1, 0, 1, 0]]), max_new_tokens=2)
    assert out.tolist() == [[2, 3, 1, 3, 0, 3]] and model.calls[0].input_ids.tolist() == [[2, 1, 4, 4]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("selector", [name for name in SELECTORS if name != "random"])
@pytest.mark.parametrize("block_size", [None, 3])
def test_a_row_in_a_batch_gets_the_tokens_it_gets_alone(side, selector, block_size):
    model = ContextModel(23, defaults={"eos_token_id": 5, "pad_token_id": 0})
    lengths = [1, 2, 3, 4, 7]
    prompts = [torch.randint(1, 22, (length,)) for length in lengths]
    arguments = {"max_new_tokens": 8, "steps": 5, "selector": selector, "block_size": block_size}
    alone = [model.diffusion_generate(prompt[None], **arguments)[0, len(prompt) :] for prompt in prompts]
    ids = torch.full((5, 7), 17)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        columns = slice(7 - len(prompt), 7) if side == "left" else slice(0, len(prompt))
        ids[row, columns], mask[row, columns] = prompt, 1
    together = model.diffusion_generate(ids, attention_mask=mask, **arguments)
    assert torch.equal(together[:, :7], ids)
    for row in range(5):
        assert together[row, 7 : 7 + len(alone[row])].tolist() == alone[row].tolist()
        assert (together[row, 7 + len(alone[row]) :] == 0).all()


def test_the_canvas_gives_each_block_its_steps_row_by_row():
    ids, real = torch.zeros((3, 5), dtype=torch.long), torch.arange(5) < torch.tensor([[1], [4], [5]])
    canvas = Canvas(ids, real, 8, 4, 4, mask_token_id=9, eos_token_ids=[], pad_token_id=0)
    assert canvas.masks_RK.tolist() == [[3, 4, 1, 0], [0, 4, 4, 0], [0, 3, 4, 1]]
    assert canvas.steps_RK.tolist() == [[2, 2, 1, 0], [0, 2, 2, 0], [0, 2, 2, 1]]
    assert (canvas.steps_RK <= canvas.masks_RK).all()
