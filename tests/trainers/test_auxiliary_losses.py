"""Auxiliary losses against brute force: full logits of the parent itself, plain sums."""

import contextlib

import datasets
import pytest
import torch
from peft import LoraConfig

from a2d_hf.modeling import A2DForMaskedDiffusion, AttentionPattern
from tests.conftest import tiny_model, tiny_tokenizer
from tests.trainers.helpers import MASK_ID, bd3lm_trainer, diffusion_model, first_batch, token_rows, trainer, weights


def teacher_log_p(parent, batch):
    """log p(x_i = v | x_<i) at [:, i], from the parent; position 0 has none."""
    with torch.no_grad():
        logits = parent(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.cat([torch.full_like(logits[:, :1], torch.nan), logits[:, :-1].log_softmax(-1)], dim=1)


def perturbed(model, seed=9):
    """The model a few steps away from its parent."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


def one_batch_twice(make):
    """A trainer of `make(weight)` with an auxiliary loss, and the loss of its first batch less that without it."""
    losses = []
    for weight in (0.0, 2.0):
        run = make(weight)
        perturbed(run.model)
        run.model.train()
        losses.append(run.compute_loss(run.model, first_batch(run)))
    return run, losses[1] - losses[0]


@pytest.mark.parametrize("token_shift", [False, True])
def test_kl_of_mdlm_equals_brute_force(token_shift, tmp_path):
    """Loss and gradients with the weight 3, less those without, over the student's logits of every position."""
    results = []
    for weight in (0.0, 3.0):
        run = trainer(
            tmp_path,
            diffusion_model(token_shift=token_shift),
            token_rows(8, prompts=False),
            per_device_train_batch_size=8,
            teacher_kl_weight=weight,
        )
        perturbed(run.model)
        run.model.train()
        loss = run.compute_loss(run.model, first_batch(run))
        results.append((loss, torch.autograd.grad(loss, list(run.model.parameters()))))
    batch, parent = first_batch(run), tiny_model("llama")
    noise = run.draw_noise(batch, run.args.seed)
    log_p = teacher_log_p(parent, batch)
    logits = run.model(
        input_ids=noise.noised_ids_BL, attention_mask=batch["attention_mask"], attention_pattern="bidirectional"
    ).logits
    asked = noise.masked_BL.clone()
    assert token_shift or asked[:, 0].any()
    asked[:, 0] = False
    kl = (log_p[asked].exp() * (log_p[asked] - logits[asked].log_softmax(-1))).sum()
    expected = 3.0 * kl / (batch["labels"] != -100).sum()
    torch.testing.assert_close(results[1][0] - results[0][0], expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(expected, list(run.model.parameters()))
    for with_kl, without, theirs in zip(results[1][1], results[0][1], gradients, strict=True):
        torch.testing.assert_close(with_kl - without, theirs, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize(
    ("views", "repeats"),
    [({}, 1), ({"complementary_views": True, "time_epsilon": 0.05}, 1), ({"nested_views": 3}, 3)],
    ids=["one", "complementary", "nested"],
)
def test_kl_of_bd3lm_equals_brute_force(views, repeats, tmp_path):
    fields = {"mask_sampling": "count" if repeats > 1 else "bernoulli", "per_device_train_batch_size": 6, **views}
    run, difference = one_batch_twice(lambda weight: bd3lm_trainer(tmp_path, teacher_kl_weight=weight, **fields))
    batch, noise = first_batch(run), run.draw_noise(first_batch(run), run.args.seed)
    log_p, total = teacher_log_p(tiny_model("llama"), batch), 0.0
    for view in range(noise.views):
        ids = torch.cat([noise.noised_ids_BWL[:, view], batch["input_ids"]], dim=1)
        logits = run.model(
            input_ids=ids,
            attention_mask=batch["attention_mask"].repeat(1, 2),
            attention_pattern=AttentionPattern.bd3lm(4),
        ).logits[:, : batch["input_ids"].shape[1]]
        asked = noise.masked_BWL[:, view].clone()
        asked[:, 0] = False
        total = total + (log_p[asked].exp() * (log_p[asked] - logits[asked].log_softmax(-1))).sum()
    expected = 2.0 * total / repeats / (batch["labels"] != -100).sum()
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("token_shift", [False, True])
def test_teacher_targets_equal_brute_force(token_shift, packed, tmp_path):
    """Token by token: which learn from the parent's distribution, which from the token, and what each counts."""
    fields = {"packing": packed, "per_device_train_batch_size": 6, "nested_views": 3, "nested_orders": 2}
    fields |= {"token_shift": token_shift, "clean_context": "causal", "ar_loss_weight": 0.5}
    tokenizer = tiny_tokenizer()
    rows = [{"input_ids": [*range(20, 20 + n), tokenizer.eos_token_id]} for n in (9, 5, 6, 8, 10, 4)]
    rows = datasets.Dataset.from_list(rows)
    run = bd3lm_trainer(tmp_path, rows=rows, teacher_targets=True, processing_class=tokenizer, **fields)
    perturbed(run.model)
    run.model.train()
    batch, noise = first_batch(run), run.draw_noise(first_batch(run), run.args.seed)
    loss = run.compute_loss(run.model, batch)
    documents = batch.get("document_ids", torch.zeros_like(batch["input_ids"]))
    documents = documents.masked_fill(batch["attention_mask"] == 0, -1)
    more = {"document_ids": batch["document_ids"].repeat(1, 2)} if packed else {}
    length, total, kinds = documents.shape[1], 0.0, {"soft": 0, "hard": 0, "tail": 0}
    parent, clean_q = tiny_model("llama"), run.model.backbone
    for view in range(noise.views):
        log_q = (
            run.model(
                input_ids=torch.cat([noise.noised_ids_BWL[:, view], batch["input_ids"]], dim=1),
                attention_mask=batch["attention_mask"].repeat(1, 2),
                attention_pattern=AttentionPattern.bd3lm(4, clean_context="causal"),
                **more,
            )
            .logits[:, :length]
            .log_softmax(-1)
        )
        for b in range(documents.shape[0]):
            for document in [d for d in documents[b].unique().tolist() if d >= 0]:
                places = (documents[b] == document).nonzero()[:, 0].tolist()
                ids = batch["input_ids"][b, places]
                ends = len(places) - int(batch["tail_length"][document if packed else b])
                with torch.no_grad():
                    log_p = parent(ids[None]).logits[0].log_softmax(-1)
                own_q = clean_q(ids[None]).logits[0].log_softmax(-1)
                for i, place in enumerate(places):
                    if view == 0 and i and batch["labels"][b, place] != -100:  # the clean copy, once
                        kl = (log_p[i - 1].exp() * (log_p[i - 1] - own_q[i - 1])).sum()
                        total = total + 0.5 * (kl if i < ends else -own_q[i - 1, ids[i]])
                    if not noise.masked_BWL[b, view, place]:
                        continue
                    weight = noise.elbo_weight_BWL[b, view, place] / noise.views
                    behind = places[i + 1 : i // 4 * 4 + 4]
                    blind = all(noise.masked_BWL[b, view, j] for j in behind)
                    if blind and 0 < i < ends:
                        kinds["soft"] += 1
                        kl = (log_p[i - 1].exp() * (log_p[i - 1] - log_q[b, place])).sum()
                        total = total + weight * kl
                    else:
                        kinds["tail" if i >= ends else "hard"] += 1
                        total = total - weight * log_q[b, place, ids[i]]
    assert all(kinds.values())
    torch.testing.assert_close(loss, total / (batch["labels"] != -100).sum(), rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(loss, list(run.model.parameters()))
    expected = torch.autograd.grad(total / (batch["labels"] != -100).sum(), list(run.model.parameters()))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5)


@contextlib.contextmanager
def count_passes(module):
    passes = []
    handle = module.register_forward_hook(lambda *_: passes.append(1))
    yield passes
    handle.remove()


def parents_loss(parent, batch):
    logits = parent(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits[targets != -100], targets[targets != -100], reduction="sum")


def test_ar_loss_of_mdlm_is_the_parents_own(tmp_path):
    losses = []
    for weight in (0.0, 0.5):
        run = trainer(tmp_path, per_device_train_batch_size=8, ar_loss_weight=weight)
        run.model.train()
        losses.append(run.compute_loss(run.model, first_batch(run)))
    batch = first_batch(run)
    expected = 0.5 * parents_loss(tiny_model("llama"), batch) / (batch["labels"] != -100).sum()
    torch.testing.assert_close(losses[1] - losses[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("token_shift", [False, True])
def test_ar_loss_of_bd3lm_comes_from_the_clean_copy_of_the_same_pass(token_shift, tmp_path):
    results = []
    for weight in (0.0, 0.5):
        run = bd3lm_trainer(
            tmp_path,
            token_shift=token_shift,
            clean_context="causal",
            per_device_train_batch_size=8,
            ar_loss_weight=weight,
        )
        run.model.train()
        run.compute_loss(run.model, first_batch(run))  # takes its first look at the head
        batch = first_batch(run)
        with count_passes(run.model.backbone) as passes:
            loss = run.compute_loss(run.model, batch)
        results.append((loss, torch.autograd.grad(loss, list(run.model.parameters()))))
        assert len(passes) == 1
    expected = 0.5 * parents_loss(run.model.backbone, batch) / (batch["labels"] != -100).sum()
    torch.testing.assert_close(results[1][0] - results[0][0], expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(expected, [w for w in run.model.parameters()])
    for with_ar, without, theirs in zip(results[1][1], results[0][1], gradients, strict=True):
        torch.testing.assert_close(with_ar - without, theirs, rtol=1e-3, atol=5e-5)


def test_ar_loss_needs_a_causal_clean_copy(tmp_path):
    with pytest.raises(ValueError, match='`ar_loss_weight` needs `clean_context="causal"`'):
        bd3lm_trainer(tmp_path, ar_loss_weight=0.1)


@pytest.mark.parametrize("make", [trainer, bd3lm_trainer])
def test_auxiliary_losses_are_logged_apart_and_left_out_of_evaluation(make, tmp_path):
    model = diffusion_model(
        **({} if make is trainer else {"objective": "bd3lm", "block_size": 4, "clean_context": "causal"})
    )
    before = weights(model)
    run = make(
        tmp_path, model, max_steps=2, logging_steps=1, ar_loss_weight=0.1, teacher_kl_weight=0.1, learning_rate=1e-3
    )
    run.train()
    first = run.state.log_history[0]
    assert first["loss"] > first["nelbo"] > 0
    assert first["ar_nll"] > 0 and first["teacher_kl"] > 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    evaluated = run.evaluate(token_rows(6, seed=2))
    assert evaluated["eval_loss"] == pytest.approx(evaluated["eval_nelbo"], rel=1e-5)
    assert "eval_teacher_kl" not in evaluated


def test_router_loss_is_the_parents_own(tmp_path):
    losses = []
    for weight in (0.0, 2.0):
        fields = {"per_device_train_batch_size": 8, "router_aux_loss_weight": weight}
        run = trainer(tmp_path, diffusion_model("mixtral"), **fields)
        run.model.train()
        losses.append(run.compute_loss(run.model, first_batch(run)).item())
    batch = first_batch(run)
    noise = run.draw_noise(batch, run.args.seed)
    expected = run.model(
        input_ids=noise.noised_ids_BL,
        attention_mask=batch["attention_mask"],
        attention_pattern="bidirectional",
        output_router_logits=True,
    ).aux_loss.item()
    assert losses[1] - losses[0] == pytest.approx(2.0 * expected, rel=1e-4)
    with pytest.raises(ValueError, match="needs a mixture of experts"):
        trainer(tmp_path, router_aux_loss_weight=0.1, max_steps=1).train()


def lora_trainer(tmp_path, teacher, **fields):
    lora = LoraConfig(r=4, lora_dropout=0.0, init_lora_weights=False)
    return trainer(tmp_path, peft_config=lora, teacher_kl_weight=1.0, teacher=teacher, **fields)


def test_a_teacher_with_its_adapter_off_equals_a_frozen_copy(tmp_path):
    losses = [
        run.compute_loss(run.model.train(), first_batch(run)).item()
        for run in (lora_trainer(tmp_path, teacher) for teacher in ("adapters_off", "frozen_copy"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_teacher_with_its_adapter_off_is_the_parent(tmp_path):
    run = lora_trainer(tmp_path, "adapters_off")
    run.model.train()
    batch = first_batch(run)
    noise = run.draw_noise(batch, run.args.seed)
    log_p = teacher_log_p(tiny_model("llama"), batch)
    logits = run.model(
        input_ids=noise.noised_ids_BL, attention_mask=batch["attention_mask"], attention_pattern="bidirectional"
    ).logits
    asked = noise.masked_BL.clone()
    asked[:, 0] = False
    expected = (log_p[asked].exp() * (log_p[asked] - logits[asked].log_softmax(-1))).sum()
    run.compute_loss(run.model, batch)
    logged = run._metrics["train"].result(run.accelerator)["teacher_kl"] * int(asked.sum())
    assert logged == pytest.approx(expected.item(), rel=1e-4)
    assert run.model.training


def test_a_frozen_copy_does_not_follow_the_student(tmp_path):
    run = trainer(tmp_path, teacher_kl_weight=1.0, max_steps=3, learning_rate=1e-2)
    before = weights(run.auxiliary.teacher.model)
    run.train()
    after = weights(run.auxiliary.teacher.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(before["parent.lm_head.weight"], run.model.get_output_embeddings().weight)


@pytest.mark.parametrize("kind", [None, "adapters_off", "frozen_copy"])
def test_an_adapter_that_moved_its_base_has_no_parent_under_it(kind, tmp_path):
    """OLoRA takes a part of the weights out of the base; that the base has moved is looked at, not believed."""
    moved = LoraConfig(init_lora_weights="olora", target_modules=["q_proj"], r=4)
    with pytest.raises(ValueError, match='`init_lora_weights="olora"` has moved a part'):
        trainer(tmp_path, teacher_kl_weight=1.0, teacher=kind, peft_config=moved)
    run = trainer(tmp_path, peft_config=moved)
    own = diffusion_model().backbone.model.layers[0].self_attn.q_proj.weight
    assert (run.model.get_base_model().backbone.model.layers[0].self_attn.q_proj.weight - own).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["adapters_off", "frozen_copy"])
def test_a_trained_bias_is_refused_under_a_teacher(kind, tmp_path):
    with pytest.raises(ValueError, match='`bias="lora_only"` of this one trains the base'):
        trainer(tmp_path, teacher_kl_weight=1.0, teacher=kind, peft_config=LoraConfig(bias="lora_only"))


def test_no_adapter_no_teacher_without_it(tmp_path):
    with pytest.raises(ValueError, match='`teacher="adapters_off"` needs a model with an adapter'):
        trainer(tmp_path, teacher_kl_weight=1.0, teacher="adapters_off")


# ----------------------------------------------------------------------------------------------------------- annealing


@pytest.mark.parametrize("form", ["stochastic", "log_bias"])
def test_annealing_opens_with_the_optimizer_step_and_ends_exactly_open(form, tmp_path):
    patterns = []
    run = trainer(tmp_path, max_steps=6, attention_anneal_steps=4, attention_anneal_form=form)
    own = run.attention_pattern
    run.attention_pattern = lambda: patterns.append(own()) or patterns[-1]
    run.train()
    assert [pattern.alpha for pattern in patterns if pattern.kind == "annealed"] == [0.25, 0.5, 0.75]
    assert [pattern.kind for pattern in patterns[3:]] == ["bidirectional"] * 3
    assert {pattern.form for pattern in patterns[:3]} == {form}
    assert len({pattern.seed for pattern in patterns[:3]}) == 3
    run.model.eval()
    run.state.global_step = 0
    assert own() == AttentionPattern.bidirectional()


def test_annealing_is_keyed_by_the_step_alone(tmp_path):
    """Every batch of an accumulated step has one mask, and a resumed run the same one."""
    runs = [trainer(tmp_path, attention_anneal_steps=10) for _ in range(2)]
    for run in runs:
        run.model.train()
        run.state.global_step = 5
    assert runs[0].attention_pattern() == runs[0].attention_pattern() == runs[1].attention_pattern()
    runs[1].state.global_step = 6
    assert runs[0].attention_pattern() != runs[1].attention_pattern()


def test_half_open_attention_gives_another_loss_than_open(tmp_path):
    losses = []
    for steps in (0, 2):
        run = trainer(tmp_path, per_device_train_batch_size=8, attention_anneal_steps=steps)
        run.model.train()
        losses.append(run.compute_loss(run.model, first_batch(run)).item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_anneal_steps": -1}, "`attention_anneal_steps` must be 0 or more"),
        ({"attention_anneal_form": "sudden"}, "`attention_anneal_form` must be"),
        ({"teacher_kl_weight": -1.0}, "`teacher_kl_weight` must be 0 or more"),
        ({"teacher_kl_weight": 1.0, "loss_normalization": "sequence"}, "`teacher_kl_weight` is a sum over tokens"),
    ],
)
def test_bad_values_are_named(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **fields)


def test_a_mask_id_is_never_in_the_teachers_text(tmp_path):
    """The teacher reads the clean text: the same whatever is masked."""
    run = trainer(tmp_path, teacher_kl_weight=1.0, per_device_train_batch_size=8)
    seen = []
    run.auxiliary.teacher.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    run.model.train()
    run.compute_loss(run.model, first_batch(run))
    assert torch.equal(seen[0], first_batch(run)["input_ids"]) and not (seen[0] == MASK_ID).any()
    assert isinstance(run.auxiliary.teacher.model, A2DForMaskedDiffusion)
