"""Several open blocks: the rule by hand and against a plain loop, and what must not change."""

import math

import pytest
import torch

from a2d_hf.modeling.pipelined_a2d import PipelinedBlocks
from tests.modeling.analytic_models import ContextModel, TableModel, changes, committed_by_step, run
from tests.modeling.test_block_cache import assert_same, batch, block_model
from tests.modeling.test_generation_models import BD3LM, diffusion_model, padded, prompts


def sure(*confidences: float) -> list[list[float]]:
    return [[p, 1 - p, 0.0] for p in confidences]


# A prompt of two tokens fills block 0; blocks of two tokens: (2, 3), (4, 5), (6, 7).
TABLE = sure(1.0, 1.0, 0.95, 0.6, 0.92, 0.7, 0.99, 0.8)
IDS = torch.tensor([[0, 0]])


def steps_of(**arguments) -> list[list[int]]:
    model = TableModel(3, table=TABLE)
    arguments = {"block_size": 2, "selector": "threshold", "threshold": 0.9} | arguments
    return committed_by_step(run(model, IDS, max_new_tokens=6, output_history=True, **arguments), mask=2)


def test_the_rule_by_hand():
    # Half of block 1 after the first forward: block 2 opens, half active, and commits only what is sure: 4. That
    # opens block 3, while 3 is forced in block 1; which makes block 2 fully active.
    assert steps_of(pipeline_depth=4, block_add_threshold=0.5) == [[2], [3, 4], [5, 6], [7]]
    assert steps_of() == [[2], [3], [4], [5], [6], [7]]


def test_the_depth_limits_the_open_blocks():
    assert steps_of(pipeline_depth=2, block_add_threshold=0.0) == [[2, 4], [3], [5, 6], [7]]
    assert steps_of(pipeline_depth=3, block_add_threshold=0.0) == [[2, 4, 6], [3], [5], [7]]


def test_a_block_is_forced_once_its_predecessor_is_done_enough():
    # From the start every block counts as fully active: each forward takes one of every open block.
    arguments = {"pipeline_depth": 3, "block_add_threshold": 0.0, "threshold": 1.0}
    assert steps_of(decoded_token_threshold=0.0, **arguments) == [[2, 4, 6], [3, 5, 7]]
    assert steps_of(decoded_token_threshold=0.5, **arguments) == [[2], [3, 4], [5, 6], [7]]
    assert steps_of(decoded_token_threshold=1.0, **arguments) == [[2], [3], [4], [5], [6], [7]]


def test_the_default_thresholds_are_those_of_d2f():
    # .7 of two tokens is both of them: the next block opens when the last is done.
    assert steps_of(pipeline_depth=4) == [[2], [3], [4], [5], [6], [7]]
    model = ContextModel(9)
    assert model.generation_config._get_default_generation_params()["decoded_token_threshold"] == 0.95


def test_an_entropy_bound_gives_half_active_blocks_no_free_token():
    # Entropies from 2 to 7: .199, .673, .279, .611, .056, .500.
    arguments = {"block_size": 2, "selector": "entropy_bound", "pipeline_depth": 4, "block_add_threshold": 0.5}

    def steps(bound):
        model = TableModel(3, table=TABLE)
        output = run(model, IDS, max_new_tokens=6, output_history=True, entropy_bound=bound, **arguments)
        return committed_by_step(output, mask=2)

    assert steps(0.3) == [[2, 3], [4, 5], [6, 7]]
    # 4 is not within .1 while its block is half active; 6 is, 7 would be only behind a free first token.
    assert steps(0.1) == [[2], [3], [4], [5, 6], [7]]


def reference(model, prompt, new, block, depth, add, full, threshold):
    """One row in plain Python: which positions each forward commits, and the text."""
    row, steps = list(prompt) + [model.mask] * new, []
    blocks = [range(start, min(start + block, len(row))) for start in range(0, len(row), block)]
    total = [sum(row[i] == model.mask for i in each) for each in blocks]

    def done(number):
        left = sum(row[i] == model.mask for i in blocks[number])
        return 1.0 if not total[number] else 1 - left / total[number]

    while model.mask in row:
        opened = [min(number for number in range(len(blocks)) if done(number) < 1)]
        for number in range(opened[0] + 1, len(blocks)):
            if done(number - 1) < add:
                break
            if done(number) < 1:
                opened.append(number)
        ids = torch.tensor([row])
        scores = model.scores(ids, torch.ones_like(ids, dtype=torch.bool))[0]
        scores[:, model.mask] = -torch.inf
        probability, token = scores.float().softmax(-1).max(-1)
        commit = []
        for number in opened[:depth]:
            here = [i for i in blocks[number] if row[i] == model.mask]
            taken = [i for i in here if float(probability[i]) >= threshold]
            if not taken and (number == opened[0] or done(number - 1) >= full):
                taken = [max(here, key=lambda i: float(probability[i]))]
            commit += taken
        for i in commit:
            row[i] = int(token[i])
        steps.append(sorted(commit))
    return row, steps


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prompt", [1, 3, 4, 6])
@pytest.mark.parametrize(("depth", "add", "full"), [(2, 0.7, 0.95), (8, 0.1, 0.95), (3, 0.5, 0.5), (4, 0.0, 1.0)])
def test_it_agrees_with_a_plain_loop(seed, prompt, depth, add, full):
    model = ContextModel(11, seed=seed, sharpness=0.3)
    ids = torch.randint(0, 10, (1, prompt), generator=torch.Generator().manual_seed(seed))
    output = run(
        model, ids, max_new_tokens=17, block_size=4, selector="threshold", threshold=0.5, pipeline_depth=depth,
        block_add_threshold=add, decoded_token_threshold=full, output_history=True,
    )  # fmt: skip
    row, steps = reference(model, ids[0].tolist(), 17, 4, depth, add, full, 0.5)
    assert committed_by_step(output, model.mask) == steps and output.sequences.tolist() == [row]
    assert output.tokens_per_forward[0] == pytest.approx(17 / len(steps))


@pytest.mark.parametrize("add", [0.3, 0.7])
def test_a_block_that_was_given_opens_nothing_behind_it_early(add):
    # Holes in blocks 0 and 2, block 1 given: block 2 waits for block 0.
    model = ContextModel(11, seed=1, sharpness=0.3)
    ids = torch.tensor([[3, 10, 10, 10, 1, 2, 3, 4, 10, 10, 5, 10]])
    output = run(
        model, ids, max_new_tokens=0, block_size=4, selector="threshold", threshold=0.5, pipeline_depth=4,
        block_add_threshold=add, output_history=True,
    )  # fmt: skip
    row, steps = reference(model, ids[0].tolist(), 0, 4, 4, add, 0.95, 0.5)
    assert committed_by_step(output, model.mask) == steps and output.sequences.tolist() == [row]
    assert max(steps[0]) < 4


@pytest.mark.parametrize("selector", ["threshold", "entropy_bound"])
@pytest.mark.parametrize("steps", [None, 4, 9])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_depth_one_is_plain_block_decoding(selector, steps, temperature, monkeypatch):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    arguments = {"max_new_tokens": 14, "block_size": 4, "selector": selector, "steps": steps, "seed": 0}
    arguments |= {"temperature": temperature, "output_history": True}
    plain = run(ContextModel(11, sharpness=0.3), ids, **arguments)
    monkeypatch.setattr(ContextModel, "_block_schedule", lambda self, c, canvas, g: PipelinedBlocks(canvas, 1, 0.7, 1))
    pipelined = run(ContextModel(11, sharpness=0.3), ids, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(plain.history, pipelined.history, strict=True))
    assert torch.equal(plain.sequences, pipelined.sequences)


@pytest.mark.parametrize("selector", ["threshold", "entropy_bound", lambda c: c.mask_BL & (c.confidence_BL > 0.4)])
def test_every_forward_commits_in_every_row_and_no_mask_is_left(selector):
    model = ContextModel(11, sharpness=0.3)
    output = run(
        model, torch.tensor([[1, 2], [3, 4], [5, 6]]), max_new_tokens=19, block_size=4, selector=selector,
        pipeline_depth=3, block_add_threshold=0.3, output_history=True,
    )  # fmt: skip
    assert not (output.sequences == model.mask).any()
    filled = torch.tensor(changes(output.history, model.mask))
    still_open = torch.stack([(step == model.mask).any(-1) for step in output.history[:-1]])
    assert (filled[still_open] >= 1).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("fields", [{}, BD3LM, BD3LM | {"clean_context": "causal"}], ids=["mdlm", "bd3lm", "causal"])
def test_a_row_in_a_batch_gets_what_it_gets_alone(family, fields):
    model, rows = diffusion_model(family, **fields), prompts(1, 3, 4, 5, 9)
    arguments = {"max_new_tokens": 13, "block_size": 4, "selector": "threshold", "threshold": 0.1}
    arguments |= {"pipeline_depth": 3, "block_add_threshold": 0.3, "eos_token_id": None}
    alone = [model.diffusion_generate(row[None], **arguments)[0, len(row) :].tolist() for row in rows]
    for side in ("left", "right"):
        assert model.diffusion_generate(**padded(rows, side), **arguments)[:, 9:].tolist() == alone


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt2"])
@pytest.mark.parametrize("block_size", [None, 2])
def test_the_cache_is_exact(family, shift, block_size, monkeypatch):
    model = block_model(family, token_shift=shift)
    output, _ = assert_same(
        model, monkeypatch, batch(1, 3, 4, 5, 9, 17), max_new_tokens=15, eos_token_id=None, selector="threshold",
        threshold=0.1, pipeline_depth=3, block_add_threshold=0.3, block_size=block_size,
    )  # fmt: skip
    assert not (output.sequences == model.config.mask_token_id).any()


def test_an_eos_in_a_later_block_ends_the_row_when_all_before_it_is_written():
    table = torch.tensor(sure(1.0, 1.0, 0.6, 0.6, 0.99, 0.95, 0.6, 0.6), dtype=torch.float64)
    table[4] = torch.tensor([0.01, 0.99, 0.0])  # token 1, EOS, is written before its block's predecessor is done
    output = run(
        TableModel(3, table=table), IDS, max_new_tokens=6, block_size=2, selector="threshold", pipeline_depth=3,
        block_add_threshold=0.0, eos_token_id=1, pad_token_id=0,
        attention_mask=torch.ones_like(IDS),
    )  # fmt: skip
    assert output.sequences.tolist() == [[0, 0, 0, 0, 1]] and output.stop_reason == ["eos"]
    assert output.num_forwards == 2 and math.isclose(float(output.tokens_per_forward[0]), 1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipeline_depth": 0}, "`pipeline_depth` must be a positive integer"),
        ({"pipeline_depth": 2}, "needs a selector that may commit nothing"),
        ({"pipeline_depth": 2, "selector": "margin"}, "needs a selector that may commit nothing"),
        ({"pipeline_depth": 2, "remasking": "p2"}, "`remasking` works on one block at a time"),
        ({"block_add_threshold": 0.5}, "does nothing with one open block"),
        ({"decoded_token_threshold": 2.0}, "`decoded_token_threshold` must be a number in"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(TableModel(3, table=TABLE), IDS, max_new_tokens=3, **arguments)
