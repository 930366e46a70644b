"""Verified self-speculation: the text of the causal mode, token for token, or draw for draw, in fewer forwards."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from a2d_hf.modeling import A2DForMaskedDiffusion, A2DGenerationConfig
from a2d_hf.modeling.self_speculation_a2d import SelfSpeculation
from tests.conftest import FAMILIES, VOCAB_SIZE, tiny_model
from tests.modeling.analytic_models import AnalyticModel
from tests.modeling.test_block_cache import BLOCK, MASK, MORE_FAMILIES, batch, block_model


NEW = 19


@torch.no_grad()
def causal_greedy(model, prompt: list[int], new: int, eos: int | None = None) -> list[int]:
    """The independent side: one token at a time, the whole row again each time, `attention_pattern="causal"`."""
    ids = list(prompt)
    for _ in range(new):
        logits_V = model(torch.tensor([ids]), attention_pattern="causal").logits[0, -1]
        logits_V[MASK] = float("-inf")
        ids.append(int(logits_V.argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


def rows_of(inputs) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def assert_causal_text(model, inputs, **arguments):
    output = model.diffusion_generate(
        **inputs, max_new_tokens=NEW, self_speculation="causal", return_dict_in_generate=True, **arguments
    )
    columns = inputs["input_ids"].shape[1]
    for row, prompt in enumerate(rows_of(inputs)):
        assert output.sequences[row, columns:].tolist() == causal_greedy(model, prompt, NEW)
    return output


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
@pytest.mark.parametrize("clean_context", ["causal", "block"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_the_text_is_that_of_the_causal_mode(family, clean_context, shift):
    if (family, clean_context) == ("falcon", "causal") and shift:
        pytest.skip("one of two is enough")
    model = block_model(family, clean_context=clean_context, token_shift=shift)
    # Rows of every length around a block: windows of 8 are crossed, and rows stand in different blocks.
    assert_causal_text(model, batch(1, 3, 4, 5, 12), eos_token_id=None)


@pytest.mark.parametrize(
    "arguments",
    [{"use_cache": False}, {"draft_steps": 3}, {"block_size": 2}, {"block_size": 8}, {"num_return_sequences": 1}],
    ids=str,
)
@pytest.mark.parametrize("fields", [{"clean_context": "causal"}, {"objective": "mdlm"}], ids=str)
def test_any_way_of_drafting(arguments, fields):
    parent = tiny_model("qwen3")
    model = A2DForMaskedDiffusion.from_causal_lm(
        parent, mask_token_id=MASK, **{"objective": "bd3lm", "block_size": BLOCK} | fields
    )
    assert_causal_text(model, batch(1, 6, 9, padding="anywhere"), eos_token_id=None, **arguments)


def test_a_parent_without_position_ids_is_verified_one_row_with_a_cache_and_many_without():
    config = AutoConfig.for_model("bloom", vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4)
    parent = AutoModelForCausalLM.from_config(config).eval()
    model = A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=MASK, objective="bd3lm", block_size=4)
    for inputs in (batch(7), batch(7, 3)):
        assert_causal_text(model, inputs, eos_token_id=None)


def agree(model: A2DForMaskedDiffusion, monkeypatch, right: int) -> None:
    """Makes every draft right in its first `right` tokens and wrong in the next: what is accepted is then known."""
    draft = SelfSpeculation._draft

    def known(self, rows_B, scope_BT):
        tokens_BT, scores_NV = draft(self, rows_B, scope_BT)
        for b, scope_T in enumerate(scope_BT):
            first, size = int(scope_T.long().argmax()), int(scope_T.sum())
            true = causal_greedy(model, self.canvas.tokens_RT[rows_B[b], :first].tolist(), size)
            if right < size:
                true[right] = (true[right] + 1) % MASK
            tokens_BT[b, first : first + size] = torch.tensor(true)
        return tokens_BT, scores_NV

    monkeypatch.setattr(SelfSpeculation, "_draft", known)


@pytest.mark.parametrize("clean_context", ["causal", "block"])
@pytest.mark.parametrize("right", [0, 1, 2, 4])
def test_the_longest_agreeing_prefix_and_one_token_more_are_taken(right, clean_context, monkeypatch):
    model = block_model(clean_context=clean_context)
    agree(model, monkeypatch, right)
    output = assert_causal_text(model, batch(4, 9), eos_token_id=None)
    forwards = []
    for prompt in (4, 9):
        at, pairs = prompt, 0
        while at < prompt + NEW:
            draft = min((at // BLOCK + 1) * BLOCK, prompt + NEW) - at
            at, pairs = min(at + min(right, draft) + 1, prompt + NEW), pairs + 1
        forwards.append(2 * pairs)
    assert output.tokens_per_forward.tolist() == pytest.approx([NEW / n for n in forwards])
    assert output.num_forwards == max(forwards)


def test_what_the_causal_mode_has_read_is_read_once(monkeypatch):
    model = block_model(clean_context="causal")
    agree(model, monkeypatch, BLOCK)
    widths = []
    model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: widths.extend([kwargs["input_ids"].shape[1]] * ("past_key_values" in kwargs)),
        with_kwargs=True,
    )
    output = model.diffusion_generate(
        **batch(8), max_new_tokens=15, eos_token_id=None, self_speculation="causal", return_dict_in_generate=True
    )
    # A draft of block 2 behind 8 prompt tokens, which are cached; its verification reads the last of them again, then
    # the four drafted ones, and adds the first token of block 3. That one's draft opens the block; verified are the
    # token before and the three drafted. So on: no token of the prompt, and no finished block, is read again.
    assert widths == [12, 5, 4, 4, 4, 4, 3, 3] and output.num_forwards == 8


def test_rows_end_at_eos_leave_and_equal_their_run_alone():
    model, inputs = block_model(clean_context="causal"), batch(3, 9, 6)
    eos = causal_greedy(model, rows_of(inputs)[1], 3)[2]
    arguments = {"max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": eos, "self_speculation": "causal"}
    output = model.diffusion_generate(**inputs, return_dict_in_generate=True, **arguments)
    assert output.stop_reason[1] == "eos"
    for row, prompt in enumerate(rows_of(inputs)):
        text = causal_greedy(model, prompt, NEW, eos)
        found = output.sequences[row, 9:].tolist()
        assert found[: len(text)] == text and set(found[len(text) :]) <= {eos}


def test_with_the_adapters_off_it_is_the_parents_own_generate():
    parent = tiny_model("llama")
    inputs = batch(1, 5, 12)
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    own = parent.generate(**inputs, suppress_tokens=[MASK], **kwargs)
    model = A2DForMaskedDiffusion.from_causal_lm(
        parent, mask_token_id=MASK, objective="bd3lm", block_size=BLOCK, clean_context="causal"
    )
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    adapted.eval()
    speculated = adapted.generate(**inputs, self_speculation="parent", max_new_tokens=NEW, eos_token_id=None)
    assert torch.equal(speculated, own)
    # The adapter does something, is on again, and its own causal mode writes something else.
    own_mode = adapted.generate(**inputs, self_speculation="causal", max_new_tokens=NEW, eos_token_id=None)
    assert not torch.equal(own_mode, own)
    assert own_mode[2, 12:].tolist() == causal_greedy(model, rows_of(inputs)[2], NEW)


def test_a_repetition_penalty_sees_what_the_causal_mode_would_see():
    model, inputs = block_model(), batch(9)
    own = model.backbone.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, repetition_penalty=1.7, eos_token_id=None,
        suppress_tokens=[MASK], pad_token_id=0,
    )  # fmt: skip
    arguments = {"max_new_tokens": NEW, "self_speculation": "causal", "eos_token_id": None}
    assert torch.equal(model.diffusion_generate(**inputs, repetition_penalty=1.7, **arguments), own)
    assert not torch.equal(model.diffusion_generate(**inputs, **arguments), own)


# ------------------------------------------------------------------------------------------------------- by chance


class TwoModes(AnalyticModel):
    """Diffusion proposes by one table, the causal mode by another that looks at the token before."""

    def __call__(self, input_ids, attention_mask=None, attention_pattern=None, logits_mask=None):
        generator = torch.Generator().manual_seed(7)
        draft = torch.randn(8, self.vocab_size, generator=generator, dtype=torch.float64)
        follows = 1.5 * torch.randn(self.vocab_size, self.vocab_size, generator=generator, dtype=torch.float64)
        causal = attention_pattern is not None and attention_pattern.is_causal
        scores = follows[input_ids] if causal else draft[: input_ids.shape[1]].expand(input_ids.shape[0], -1, -1)
        return SimpleNamespace(logits=scores[logits_mask])

    def joint(self, start: int, length: int, temperature: float) -> torch.Tensor:
        """The exact probabilities of all texts of `length` tokens, in lexicographic order."""
        generator = torch.Generator().manual_seed(7)
        torch.randn(8, self.vocab_size, generator=generator, dtype=torch.float64)
        follows = 1.5 * torch.randn(self.vocab_size, self.vocab_size, generator=generator, dtype=torch.float64)
        follows[:, self.mask] = float("-inf")
        p = (follows / temperature).softmax(-1)
        return torch.tensor([
            torch.stack([p[a, b] for a, b in itertools.pairwise((start, *text))]).prod()
            for text in itertools.product(range(self.mask), repeat=length)
        ])  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("block_size", [4, 2])
def test_sampled_texts_have_the_causal_modes_distribution(temperature, block_size):
    model, draws, length = TwoModes(4), 40_000, 3
    output = model.diffusion_generate(
        torch.full((draws, 1), 2), max_new_tokens=length, temperature=temperature, seed=11, block_size=block_size,
        self_speculation="causal", return_dict_in_generate=True,
    )  # fmt: skip
    values = output.sequences[:, 1:]
    found = torch.bincount((values * torch.tensor([9, 3, 1])).sum(-1), minlength=27).double()
    expected = model.joint(2, length, temperature) * draws
    assert float(expected.min()) > 5
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert chi_square < 54.1  # 26 degrees of freedom, p = 0.001
    # Some drafts stand and some fall: with neither, the rule would not have been tested.
    assert 0.5 < float(output.tokens_per_forward.mean()) < 1.5


@pytest.mark.parametrize("sabotage", ["always", "rest"])
def test_the_chi_square_notices_a_wrong_rule(sabotage, monkeypatch):
    accept = SelfSpeculation._accept_by_chance

    def wrong(self, scores_NV, draft_NV, drafted_N, token_N, in_draft_N):
        stands_N, replaced_N = accept(self, scores_NV, draft_NV, drafted_N, token_N, in_draft_N)
        return (in_draft_N, replaced_N) if sabotage == "always" else (stands_N, token_N)

    monkeypatch.setattr(SelfSpeculation, "_accept_by_chance", wrong)
    with pytest.raises(AssertionError, match="< 54.1"):
        test_sampled_texts_have_the_causal_modes_distribution(1.0, 4)


def test_top_k_cuts_both_distributions():
    model = TwoModes(4)
    output = model.diffusion_generate(
        torch.full((500, 1), 2), max_new_tokens=3, temperature=1.0, top_k=1, seed=1, self_speculation="causal"
    )
    assert len({tuple(row) for row in output.tolist()}) == 1
    greedy = model.diffusion_generate(torch.tensor([[2]]), max_new_tokens=3, self_speculation="causal")
    assert output[0].tolist() == greedy[0].tolist()


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"self_speculation": "yes"}, "`self_speculation` must be None or one of causal, parent, not 'yes'"),
        ({"self_speculation": "parent"}, "no adapter on the model"),
        ({"self_speculation": "causal", "steps": 4}, "`steps` would do nothing"),
        ({"self_speculation": "causal", "selector": "margin"}, "`selector` would do nothing"),
        ({"self_speculation": "causal", "draft_steps": 2, "temperature": 1.0}, "set `draft_steps=1`"),
        ({"self_speculation": "causal", "draft_steps": 0}, "`draft_steps` must be a positive integer"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        block_model().diffusion_generate(**batch(5), max_new_tokens=4, **arguments)


def test_masks_in_the_prompt_and_empty_prompts_are_refused():
    inputs = batch(5)
    inputs["input_ids"][0, 2] = MASK
    with pytest.raises(ValueError, match="continues a text"):
        block_model().diffusion_generate(**inputs, max_new_tokens=4, self_speculation="causal")
    with pytest.raises(ValueError, match="needs a first token"):
        block_model().diffusion_generate(max_new_tokens=4, self_speculation="causal")


def test_a_checkpoint_without_a_causal_mode_is_told(caplog, monkeypatch):
    messages = []
    logger = "a2d_hf.modeling.self_speculation_a2d.logger.warning_once"
    monkeypatch.setattr(logger, messages.append)
    block_model(clean_context="causal").diffusion_generate(**batch(5), max_new_tokens=4, self_speculation="causal")
    assert not messages
    block_model().diffusion_generate(**batch(5), max_new_tokens=4, self_speculation="causal")
    assert "was not trained to keep a causal mode" in messages[0]


def test_it_is_saved_with_the_model(tmp_path):
    A2DGenerationConfig(self_speculation="causal").save_pretrained(tmp_path)
    assert A2DGenerationConfig.from_pretrained(tmp_path).self_speculation == "causal"


@pytest.mark.parametrize(
    "changed", [{"bias": "all"}, {"init_lora_weights": "olora"}], ids=lambda fields: next(iter(fields))
)
def test_an_adapter_that_moved_its_base_is_no_parent(changed):
    model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=MASK, clean_context="causal")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=4, **changed)).eval()
    with pytest.raises(ValueError, match=f"`{next(iter(changed))}=.*the parent is not there to verify"):
        adapted.generate(**batch(3), self_speculation="parent", max_new_tokens=2)
