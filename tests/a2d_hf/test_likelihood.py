"""Likelihoods against brute force on a vocabulary of five tokens, and everything that must not change them."""

import itertools
import math

import pytest
import torch

from a2d_hf.errors import BadInput
from a2d_hf.likelihood import Request, causal, nelbo, rolling_requests, token_by_token, unseen_behind
from a2d_hf.modeling.attention_pattern import AttentionPattern
from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion
from tests.conftest import tiny_model


MASK = 5  # tokens 0..4 and the mask token
KINDS = {
    "mdlm": {},
    "mdlm-shift": {"token_shift": True},
    "blocks-of-2": {"objective": "bd3lm", "block_size": 2},
    "blocks-of-2-shift": {"objective": "bd3lm", "block_size": 2, "token_shift": True},
    "blocks-of-3": {"objective": "bd3lm", "block_size": 3},
    "blocks-of-1": {"objective": "bd3lm", "block_size": 1},
    "causal-context": {"objective": "bd3lm", "block_size": 2, "clean_context": "causal"},
}


def small_model(**fields) -> A2DForMaskedDiffusion:
    parent = tiny_model("llama", vocab_size=MASK + 1, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=MASK, **fields).eval()


@torch.no_grad()
def log_prob(model, ids: list[int], hidden: set[int], place: int) -> float:
    """One token given all that is not hidden, by one plain pass: for BD3LM over nothing behind its block."""
    row = [MASK if i in hidden else token for i, token in enumerate(ids)]
    pattern = None
    if model.config.objective == "bd3lm":
        size = model.config.block_size
        row, pattern = row[: (place // size + 1) * size], AttentionPattern.block_causal(size)
    if model.config.clean_context == "causal":
        row, pattern = row + list(ids[: len(row)]), AttentionPattern.bd3lm(size, clean_context="causal")
    logits = model(torch.tensor([row]), attention_pattern=pattern).logits[0, place].double()
    return float(logits[:MASK].log_softmax(-1)[ids[place]])


def blocks_of(model, request: Request) -> list[list[int]]:
    if model.config.objective != "bd3lm":
        return [list(request.scored)]
    blocks: dict[int, list[int]] = {}
    for place in request.scored:
        blocks.setdefault(place // model.config.block_size, []).append(place)
    return list(blocks.values())


def order_average(model, request: Request) -> float:
    """The bound as the mean over all orders of revealing: no times, no weights, no subsets."""
    total = 0.0
    for block in blocks_of(model, request):
        orders = list(itertools.permutations(block))
        total += sum(
            log_prob(model, list(request.input_ids), set(order[at:]), order[at])
            for order in orders
            for at in range(len(order))
        ) / len(orders)
    return total


REQUEST = Request.continuation([0, 3, 4], [2, 1, 1, 4])


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_the_bound_is_the_mean_over_all_orders(fields):
    model = small_model(**fields)
    found = nelbo(model, [REQUEST], mc_num=15)[0]
    assert found.num_tokens == 4
    assert found.log_likelihood == pytest.approx(order_average(model, REQUEST), rel=1e-5)


@pytest.mark.parametrize("fields", [{}, {"objective": "bd3lm", "block_size": 4}], ids=["mdlm", "bd3lm"])
def test_the_estimate_is_unbiased(fields):
    model = small_model(**fields)
    request = Request.continuation([0, 3, 4], [2, 1, 1, 4, 0])  # blocks 0-3, 4-7: one scored token, then four
    exact = order_average(model, request)
    found = torch.tensor([nelbo(model, [request], mc_num=2, seed=seed)[0].log_likelihood for seed in range(400)])
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean()) - exact) < 4 * error and 0 < error < 0.02 * abs(exact)


def test_the_error_shrinks_with_the_root_of_the_number_of_masks():
    model = small_model()
    request = Request.continuation([0, 3, 4], [2, 1, 1, 4, 0, 3])  # 63 subsets: none of these is enumerated

    def spread(masks: int) -> float:
        seeds = range(150)
        found = [nelbo(model, [request], mc_num=masks, seed=seed, batch_size=64)[0].log_likelihood for seed in seeds]
        return float(torch.tensor(found).std())

    few, many = spread(6), spread(54)
    # Nine times the masks, a third of the error: sizes are stratified in both, and their masks are independent.
    assert few / many == pytest.approx(3.0, rel=0.25)


def test_fewer_passes_than_subsets_still_mean_at_most_that_many_passes():
    passes = []
    nelbo(small_model(), [REQUEST], mc_num=14, advance=passes.append)
    assert sum(passes) == 14
    passes.clear()
    nelbo(small_model(objective="bd3lm", block_size=2), [REQUEST], mc_num=128, advance=passes.append)
    assert sum(passes) == 3, "two tokens have three subsets, and all blocks share a pass"


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_token_by_token_is_the_chain_rule_from_left_to_right(fields):
    model = small_model(**fields)
    expected = sum(
        log_prob(model, list(REQUEST.input_ids), set(block[at:]), block[at])
        for block in blocks_of(model, REQUEST)
        for at in range(len(block))
    )
    assert token_by_token(model, [REQUEST])[0].log_likelihood == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_token_by_token_probabilities_of_all_texts_sum_to_one(fields):
    model = small_model(**fields)
    requests = [Request.continuation([0, 3], target) for target in itertools.product(range(MASK), repeat=3)]
    found = token_by_token(model, requests, batch_size=64)
    assert math.fsum(math.exp(each.log_likelihood) for each in found) == pytest.approx(1.0, abs=1e-5)
    greedy = [request for request, each in zip(requests, found, strict=True) if each.is_greedy]
    decoded = model.diffusion_generate(torch.tensor([[0, 3]]), max_new_tokens=3, block_size=1, eos_token_id=None)
    if fields.get("block_size") in (None, 1):  # other sizes would change the attention of the trained blocks
        assert [list(request.input_ids) for request in greedy] == decoded.tolist()
    assert len(greedy) == 1


def test_one_block_per_token_makes_bound_and_likelihood_one():
    model = small_model(objective="bd3lm", block_size=1)
    passes = []
    bound = nelbo(model, [REQUEST], advance=passes.append)[0].log_likelihood
    assert sum(passes) == 1 and bound == pytest.approx(token_by_token(model, [REQUEST])[0].log_likelihood, rel=1e-6)


def test_with_token_shift_blocks_of_one_are_the_causal_mode():
    model = small_model(objective="bd3lm", block_size=1, token_shift=True)
    exact, parent = token_by_token(model, [REQUEST])[0], causal(model, [REQUEST])[0]
    # Only the share of the mask token is between them.
    with torch.no_grad():
        logits = model.backbone(torch.tensor([REQUEST.input_ids])).logits[0].double()
    share = sum(float(logits[i - 1].log_softmax(-1)[:MASK].logsumexp(-1)) for i in REQUEST.scored)
    assert exact.log_likelihood == pytest.approx(parent.log_likelihood - share, rel=1e-5)


def test_the_causal_mode_is_the_parent():
    model = small_model()
    requests = [REQUEST, Request.continuation([1], [0]), Request.infill([0, 1], [2], [3, 3])]
    for found, request in zip(causal(model, requests), requests, strict=True):
        with torch.no_grad():
            log_probs = model.backbone(torch.tensor([request.input_ids])).logits[0].double().log_softmax(-1)
        rows = [(log_probs[i - 1], request.input_ids[i]) for i in request.scored]
        assert found.log_likelihood == pytest.approx(sum(float(row[token]) for row, token in rows), rel=1e-5)
        assert found.is_greedy == all(int(row.argmax()) == token for row, token in rows)
    ids = model.backbone.generate(torch.tensor([[0, 3]]), max_new_tokens=4, do_sample=False, eos_token_id=None)[0]
    assert causal(model, [Request.continuation(ids[:2].tolist(), ids[2:].tolist())])[0].is_greedy


@pytest.mark.parametrize("score", [lambda m, r, **k: nelbo(m, r, mc_num=3, **k), token_by_token, causal])
@pytest.mark.parametrize("fields", [{}, {"objective": "bd3lm", "block_size": 3}], ids=["mdlm", "bd3lm"])
def test_a_result_depends_on_its_request_alone(score, fields):
    model = small_model(**fields)
    generator = torch.Generator().manual_seed(2)
    requests = []
    for before, after in [(1, 4), (9, 2), (3, 7), (5, 5)]:
        ids = torch.randint(0, MASK, (before + after,), generator=generator).tolist()
        requests.append(Request.continuation(ids[:before], ids[before:]))
    alone = [score(model, [request])[0].log_likelihood for request in requests]
    for batch_size in (1, 3, 16):
        together = score(model, requests[::-1], batch_size=batch_size)[::-1]
        assert [each.log_likelihood for each in together] == pytest.approx(alone, rel=1e-5)
    assert not model.training


def test_the_seed_changes_the_masks_and_the_mode_of_the_model_comes_back():
    model = small_model().train()
    first, again, other = (nelbo(model, [REQUEST], mc_num=2, seed=seed)[0].log_likelihood for seed in (0, 0, 1))
    assert first == again != other and model.training


def test_scores_that_would_not_fit_are_made_in_smaller_batches(monkeypatch):
    model, sizes = small_model(), []
    whole = token_by_token(model, [REQUEST] * 3)
    monkeypatch.setattr("a2d_hf.likelihood.LOGITS_AT_ONCE", 2 * (MASK + 1))
    parts = token_by_token(model, [REQUEST] * 3, advance=sizes.append)
    assert [each.log_likelihood for each in parts] == pytest.approx([each.log_likelihood for each in whole])
    assert max(sizes) == 2 and sum(sizes) == 12


# ------------------------------------------------------------------------------------------------------- both sides


@pytest.mark.parametrize("fields", [{}, {"objective": "bd3lm", "block_size": 4}], ids=["mdlm", "bd3lm"])
def test_a_span_is_scored_given_both_sides(fields):
    model = small_model(**fields)
    request = Request.infill([0, 3, 1, 2, 4], [2, 1], [4])
    assert nelbo(model, [request])[0].log_likelihood == pytest.approx(order_average(model, request), rel=1e-5)
    other = Request.infill([0, 3, 1, 2, 4], [2, 1], [0])
    assert nelbo(model, [other])[0].log_likelihood != pytest.approx(order_average(model, request), rel=1e-3)


@pytest.mark.parametrize("score", [nelbo, token_by_token])
def test_a_span_whose_other_side_a_block_model_cannot_see_is_refused(score):
    with pytest.raises(BadInput, match="Token 2 is scored, but .* starts at token 4, in another block"):
        score(small_model(objective="bd3lm", block_size=4), [Request.infill([0, 3], [1, 2], [4])])


@pytest.mark.parametrize(
    ("places", "length", "found"),
    [([2, 3], 5, (2, 4)), ([2, 3], 4, None), ([5, 6], 8, None), ([3, 4], 8, (3, 5)), ([1, 2, 3, 4], 5, None)],
)
def test_what_a_block_model_cannot_see(places, length, found):
    assert unseen_behind(places, length, 4) == found


# ------------------------------------------------------------------------------------------------------- long texts


@pytest.mark.parametrize(("length", "longest", "context"), [(11, 4, 1), (11, 4, 3), (3, 8, 1), (9, 4, 0), (4, 4, 2)])
@pytest.mark.parametrize("prefix", [None, 0])
def test_windows_score_every_token_once_with_context(length, longest, context, prefix):
    ids = [1 + i for i in range(length)]
    requests = rolling_requests(ids, longest, context=context, prefix_id=prefix)
    assert [request.input_ids[place] for request in requests for place in request.scored] == ids
    for number, request in enumerate(requests):
        assert len(request.input_ids) <= longest
        read = request.input_ids[: request.scored[0]]
        if number == 0:
            assert read == (() if prefix is None else (0,))
        else:
            first = request.input_ids[request.scored[0]]
            assert len(read) == context and list(read) == ids[first - 1 - context : first - 1]


def test_one_window_is_the_whole_text_and_many_cost_context():
    model = small_model()
    ids = torch.randint(0, MASK, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = causal(model, [Request.continuation([0], ids)])[0].log_likelihood
    one, many = (
        math.fsum(each.log_likelihood for each in causal(model, rolling_requests(ids, longest, prefix_id=0)))
        for longest in (13, 4)
    )
    assert one == pytest.approx(whole, rel=1e-6) and many != pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Request.continuation([1], []), "Nothing is scored"),
        (lambda: nelbo(small_model(), [REQUEST], mc_num=0), "`mc_num` must be a positive integer"),
        (lambda: causal(small_model(), [Request.continuation([], [1])]), "put a BOS token before it"),
        (lambda: nelbo(small_model(token_shift=True), [Request.continuation([], [1])]), "put a BOS token before it"),
        (lambda: rolling_requests([1, 2], 4, context=4), "`context` must lie in"),
        (lambda: rolling_requests([], 4), "Nothing is scored"),
        (lambda: rolling_requests([1], 1, context=0, prefix_id=0), "leaves no room"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_sentence(call, message):
    with pytest.raises(BadInput, match=message):
        call()
