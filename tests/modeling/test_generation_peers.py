"""One test for each defect seen in other decoders of masked diffusion models, so that none comes back here."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from tests.modeling.analytic_models import ContextModel, TableModel, changes


def flat_table(length: int, row: list[float]) -> list[list[float]]:
    return [row] * length


def test_the_mask_token_is_never_revealed():
    # The mask is the argmax everywhere; a peer ends with 16 of 16 positions still masked.
    model = TableModel(5, table=flat_table(20, [0.1, 0.04, 0.03, 0.03, 0.8]))
    for sampling in ({}, {"temperature": 1.0, "seed": 0}, {"temperature": 1.0, "top_p": 0.5, "seed": 0}):
        out = model.diffusion_generate(torch.tensor([[1]]), max_new_tokens=16, **sampling)
        assert not (out == model.mask).any()


def test_the_mask_token_takes_no_share_of_top_p_and_top_k():
    # Were the mask (.8) counted, top_p .5 and top_k 1 would leave nothing, and top_k 2 only token 0.
    model = TableModel(5, table=flat_table(20, [0.1, 0.09, 0.005, 0.005, 0.8]))
    ids = torch.tensor([[1]])
    out = model.diffusion_generate(ids, max_new_tokens=16, temperature=1.0, top_k=2, num_return_sequences=20, seed=0)
    assert set(out[:, 1:].flatten().tolist()) == {0, 1}


def test_no_logits_processor_brings_the_mask_token_back():
    class Force(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, -1] = 1e4
            return scores

    model = TableModel(5, table=flat_table(8, [0.1, 0.6, 0.1, 0.1, 0.1]))
    out = model.diffusion_generate(
        torch.tensor([[0]]), max_new_tokens=4, logits_processor=LogitsProcessorList([Force()])
    )
    assert out.tolist() == [[0, 1, 1, 1, 1]]


def test_counts_are_per_row_not_the_batch_mean():
    # 8 masks and 2 masks in 2 steps: 4 and 1 per forward. By the mean (5) the second row would be done in one.
    model = ContextModel(20)
    ids = torch.full((2, 9), 3)
    ids[0, 1:], ids[1, 4:6] = model.mask, model.mask
    output = model.diffusion_generate(
        ids, max_new_tokens=0, steps=2, output_history=True, return_dict_in_generate=True
    )
    assert changes(output.history, model.mask) == [[4, 1], [4, 1]]


@pytest.mark.parametrize("selector", ["confidence", "margin", "entropy", "random", "threshold", "entropy_bound"])
def test_no_forward_commits_nothing(selector):
    # Rounding down m (1 - s/t) gives 0 in most of 512 steps for 10 tokens; here 10 forwards are the most.
    model = ContextModel(20)
    arguments = {"threshold": {"threshold": 1.0}, "entropy_bound": {"entropy_bound": 0.0}}.get(selector, {})
    output = model.diffusion_generate(
        torch.tensor([[3]]),
        max_new_tokens=10,
        steps=512,
        selector=selector,
        output_history=True,
        return_dict_in_generate=True,
        **arguments,
    )
    assert output.num_forwards <= 10 and min(row[0] for row in changes(output.history, model.mask)) >= 1


def test_an_eos_in_the_prompt_is_a_token_when_pad_is_eos():
    # A peer takes every EOS of the history for padding and hides it.
    model = ContextModel(20, defaults={"eos_token_id": 7, "pad_token_id": 7})
    seen = model.diffusion_generate(torch.tensor([[7, 3, 7, 4]]), max_new_tokens=6)
    assert model.calls[0].attention_mask is None and model.calls[0].input_ids[0, :4].tolist() == [7, 3, 7, 4]
    hidden = model.diffusion_generate(
        torch.tensor([[7, 3, 7, 4]]), attention_mask=torch.tensor([[0, 1, 0, 1]]), max_new_tokens=6
    )
    assert not torch.equal(seen[:, 4:], hidden[:, 4:])


def test_a_padded_row_equals_itself_alone_when_pad_is_eos():
    # A peer strips leading pads and with them the first generated token.
    model = ContextModel(20, defaults={"eos_token_id": 7, "pad_token_id": 7})
    alone = model.diffusion_generate(torch.tensor([[3, 7, 4]]), max_new_tokens=6)[0, 3:]
    ids, mask = torch.tensor([[7, 7, 3, 7, 4], [1, 2, 3, 4, 5]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    batch = model.diffusion_generate(ids, attention_mask=mask, max_new_tokens=6)
    assert batch[0, 5 : 5 + len(alone)].tolist() == alone.tolist()


def test_mdlm_stops_early():
    # EOS everywhere: a peer runs all 256 forwards.
    model = TableModel(5, table=flat_table(300, [0.1, 0.1, 0.1, 0.7, 0.0]))
    output = model.diffusion_generate(
        torch.tensor([[0]]), max_new_tokens=256, eos_token_id=3, block_size=32, return_dict_in_generate=True
    )
    assert output.num_forwards == 1 and output.sequences.tolist() == [[0, 3]] and output.stop_reason == ["eos"]


def test_mdlm_stops_early_on_the_whole_canvas_too():
    table = flat_table(64, [0.6, 0.4, 0.0, 0.0, 0.0])
    table[4] = [0.0, 0.0, 0.0, 1.0, 0.0]  # the surest position of all is an EOS at position 4
    output = TableModel(5, table=table).diffusion_generate(
        torch.tensor([[0]]), max_new_tokens=63, eos_token_id=3, return_dict_in_generate=True
    )
    assert output.num_forwards == 4 and output.sequences.tolist() == [[0, 0, 0, 0, 3]]


def test_finished_rows_leave_the_batch():
    class EndsByRow(TableModel):
        def scores(self, input_ids, valid):
            scores = super().scores(input_ids, valid).clone()
            for row, first in enumerate(input_ids[:, 0].tolist()):
                scores[row, first + 1, 3] = 50.0
            return scores

    model = EndsByRow(5, table=flat_table(16, [0.5, 0.3, 0.2, 0.0, 0.0]))
    output = model.diffusion_generate(
        torch.tensor([[0], [2], [4]]).clamp(max=2),
        max_new_tokens=8,
        block_size=1,
        eos_token_id=3,
        return_dict_in_generate=True,
    )
    assert [len(call.input_ids) for call in model.calls] == [3, 2, 2]
    assert output.tokens_per_forward.tolist() == [1.0, 1.0, 1.0]


def test_begin_suppress_changes_the_token_not_only_the_confidence():
    model = TableModel(5, table=flat_table(8, [0.1, 0.6, 0.2, 0.1, 0.0]))
    ids, mask = torch.tensor([[0, 0], [0, 1]]), torch.tensor([[0, 1], [1, 1]])
    out = model.diffusion_generate(ids, attention_mask=mask, max_new_tokens=3, begin_suppress_tokens=[1])
    assert out[:, 2:].tolist() == [[2, 1, 1], [2, 1, 1]]
    # The first mask of each row when infilling, also where a row before it is done and has left.
    ids = torch.tensor([[0, 0, 0, 0], [0, 4, 0, 4]])
    filled = model.diffusion_generate(ids, max_new_tokens=0, begin_suppress_tokens=[1])
    assert filled.tolist() == [[0, 0, 0, 0], [0, 2, 0, 1]]


@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize("selector", ["confidence", "random", "threshold", "entropy_bound"])
def test_no_masks_are_left_when_steps_are_fewer_than_tokens(steps, selector):
    # One peer's last step is never forced, another leaves 24 of 32 masks with threshold and few steps.
    model = ContextModel(30)
    output = model.diffusion_generate(
        torch.tensor([[3, 4]]), max_new_tokens=32, steps=steps, selector=selector, return_dict_in_generate=True
    )
    assert not (output.sequences == model.mask).any() and output.num_forwards <= steps


def test_the_attention_mask_is_not_ignored():
    model, mask = ContextModel(20), torch.tensor([[0, 0, 1, 1]])
    out = [
        model.diffusion_generate(torch.tensor([[*padding, 3, 4]]), attention_mask=mask, max_new_tokens=6)[:, 4:]
        for padding in ([1, 2], [5, 9])
    ]
    assert torch.equal(*out)
    # Beside a longer row, what stands behind this one's end is padding as well.
    both = torch.tensor([[0, 0, 3, 4], [5, 6, 3, 4]])
    together = model.diffusion_generate(
        both, attention_mask=torch.cat([mask, torch.ones_like(mask)]), max_new_tokens=6
    )
    assert torch.equal(together[:1, 4:], out[0])


def test_num_return_sequences_are_different_samples():
    model = ContextModel(20, sharpness=0.05)
    out = model.diffusion_generate(
        torch.tensor([[3]]), max_new_tokens=6, temperature=1.0, num_return_sequences=8, seed=0
    )
    assert out.shape == (8, 7) and len({tuple(row) for row in out.tolist()}) == 8


def test_the_seed_changes_the_text():
    model = ContextModel(20, sharpness=0.05)
    texts = [
        model.diffusion_generate(torch.tensor([[3]]), max_new_tokens=8, temperature=1.0, seed=seed) for seed in (0, 1)
    ]
    assert not torch.equal(*texts)


def test_temperature_changes_tokens_not_only_their_order():
    model = TableModel(5, table=flat_table(40, [0.4, 0.3, 0.2, 0.1, 0.0]))
    out = model.diffusion_generate(
        torch.tensor([[0]]), max_new_tokens=32, temperature=1.0, selector="random", seed=0, num_return_sequences=8
    )
    assert set(out[:, 1:].flatten().tolist()) == {0, 1, 2, 3}


def test_only_masked_rows_of_the_active_block_go_through_the_head():
    model = ContextModel(20)
    model.diffusion_generate(torch.tensor([[3, 4, 5]]), max_new_tokens=9, block_size=4, steps=6)
    assert [int(call.logits_mask.sum()) for call in model.calls] == [1, 4, 2, 4, 2, 1]


def test_drafts_and_history_never_reach_a_later_call():
    # Peers keep sampler state between calls; two calls in a row must not know of each other.
    model = ContextModel(20)
    first = model.diffusion_generate(torch.tensor([[3]]), max_new_tokens=8, steps=3)
    model.diffusion_generate(torch.tensor([[9, 9]]), max_new_tokens=5, steps=2)
    assert torch.equal(first, model.diffusion_generate(torch.tensor([[3]]), max_new_tokens=8, steps=3))
