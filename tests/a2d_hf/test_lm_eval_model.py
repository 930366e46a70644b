"""The harness' model `a2d`: its numbers against HFLM's and against likelihood.py, and what must not change them."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model

from a2d_hf import likelihood as likelihoods
from a2d_hf import lm_eval_model
from a2d_hf.errors import BadInput
from a2d_hf.lm_eval_model import A2DLM, DECODING_FIELDS
from a2d_hf.modeling.modeling_a2d import A2DForMaskedDiffusion
from tests.conftest import VOCAB_SIZE, tiny_model, tiny_tokenizer


MASK = VOCAB_SIZE - 1  # behind the tokenizer's last id: the row that HFLM would cut off
CHANCE_ROWS, CHOICES = 150, 4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of one parent and three conversions of it."""
    folder = tmp_path_factory.mktemp("lm_eval")
    parent = tiny_model("llama")
    parent.save_pretrained(folder / "parent")
    for name, fields in {
        "mdlm": {},
        "block-1": {"objective": "bd3lm", "block_size": 1},
        "block-4": {"objective": "bd3lm", "block_size": 4},
    }.items():
        A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), mask_token_id=MASK, **fields).save_pretrained(
            folder / name
        )
    for place in folder.iterdir():
        tiny_tokenizer().save_pretrained(place)
    return folder


def load(folder: Path, **kwargs) -> A2DLM:
    return A2DLM(str(folder), device="cpu", **({"batch_size": 4} | kwargs))


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


PAIRS = [
    ("The quick brown", " fox"),
    ("A model reads from left to right,", " one word at a time"),
    ("The quick brown", " dog jumps"),
    ("", "over the lazy dog"),
    ("question", "?"),
]
TEXTS = ["The quick brown fox jumps over the lazy dog.", "A model reads. " * 30]


def pairs(lm, cases=PAIRS):
    return lm.loglikelihood(instances("loglikelihood", cases), disable_tqdm=True)


# ------------------------------------------------------------------------------------------------------ likelihoods


def test_causal_is_the_harness_own_model_bit_for_bit(checkpoints):
    ours = load(checkpoints / "mdlm", likelihood="causal")
    theirs = HFLM(str(checkpoints / "parent"), device="cpu", batch_size=4)
    assert pairs(ours) == pairs(theirs)
    rolling = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert ours.loglikelihood_rolling(rolling) == theirs.loglikelihood_rolling(rolling)


def test_nelbo_is_that_of_likelihood_py(checkpoints):
    lm = load(checkpoints / "mdlm", mc_num=5, mc_seed=3, check_greedy=False)
    encode = lm.tokenizer
    wanted = [
        likelihoods.Request.continuation(
            encode(context).input_ids or [lm.prefix_token_id], encode(continuation).input_ids
        )
        for context, continuation in PAIRS
    ]
    expected = likelihoods.nelbo(lm.a2d, wanted, mc_num=5, seed=3)
    for (value, greedy), one in zip(pairs(lm), expected, strict=True):
        assert value == pytest.approx(one.log_likelihood, rel=1e-6) and greedy is False


@pytest.mark.parametrize("name", ["mdlm", "block-4"])
def test_nelbo_depends_on_neither_batch_size_nor_order(checkpoints, name):
    alone = pairs(load(checkpoints / name, mc_num=6, batch_size=1))
    together = pairs(load(checkpoints / name, mc_num=6, batch_size=7), PAIRS[::-1])[::-1]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], rel=1e-6)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    other = pairs(load(checkpoints / name, mc_num=6, mc_seed=1))
    # Texts of few tokens are enumerated; the longest is not, and its masks are other ones.
    assert other[1][0] != pytest.approx(alone[1][0], rel=1e-6)


@torch.no_grad()
def test_token_by_token_of_blocks_of_one_is_the_chain_rule(checkpoints):
    lm = load(checkpoints / "block-1", likelihood="token_by_token")
    for (context, continuation), (value, greedy) in zip(PAIRS, pairs(lm), strict=True):
        before = lm.tokenizer(context).input_ids or [lm.prefix_token_id]
        after = lm.tokenizer(continuation).input_ids
        total, best = 0.0, True
        for at, token in enumerate(after):  # blocks of one: nothing behind is seen, so nothing has to be there
            row = torch.tensor([[*before, *after[:at], MASK]])
            logits = lm.a2d(row, attention_pattern="causal").logits[0, -1, :MASK].double()
            total += float(logits.log_softmax(-1)[token])
            best = best and int(logits.argmax()) == token
        assert value == pytest.approx(total, rel=1e-5) and greedy == best


@pytest.mark.parametrize("kind", ["nelbo", "token_by_token"])
def test_rolling_scores_every_token_once(checkpoints, monkeypatch, kind):
    lm = load(checkpoints / "mdlm", likelihood=kind, mc_num=2, max_length=16)
    monkeypatch.setattr(lm.a2d, "diffusion_generate", lambda *args, **kwargs: pytest.fail("nothing is decoded here"))
    found = lm.loglikelihood_rolling(
        instances("loglikelihood_rolling", [(text,) for text in [*TEXTS, ""]]), disable_tqdm=True
    )
    for text, total in zip(TEXTS, found, strict=False):
        row = [lm.prefix_token_id, *lm.tokenizer(text).input_ids]
        windows = [likelihoods.Request.continuation(row[:1], row[1:16])]
        for start in range(16, len(row), 15):  # 15 new tokens behind one that is only read: 16, the whole context
            windows.append(likelihoods.Request.continuation(row[start - 1 : start], row[start : start + 15]))
        score = likelihoods.token_by_token if kind == "token_by_token" else likelihoods.nelbo
        options = {} if kind == "token_by_token" else {"mc_num": 2}
        expected = math.fsum(one.log_likelihood for one in score(lm.a2d, windows, **options))
        assert len(windows) > 1 and total == pytest.approx(expected, rel=1e-6)
    assert found[2] == 0.0


def test_a_match_is_what_decoding_writes(checkpoints):
    lm = load(checkpoints / "mdlm", mc_num=1)
    before = lm.tokenizer("The quick brown").input_ids
    written = lm.a2d.diffusion_generate(torch.tensor([before]), max_new_tokens=3, steps=3, temperature=0.0)
    tokens = written[0].tolist()[-3:] if written.shape[1] > 3 else written[0].tolist()
    other = [*tokens[:-1], (tokens[-1] + 1) % 100]
    found = lm._loglikelihood_tokens([(None, before, tokens), (None, before, other)], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_a_context_that_does_not_fit_loses_its_beginning(checkpoints):
    lm = load(checkpoints / "mdlm", mc_num=3, max_length=8, check_greedy=False)
    before, after = list(range(4, 24)), [30, 31, 32]
    cut, whole = lm._loglikelihood_tokens([(None, before[-5:], after), (None, before, after)], disable_tqdm=True)
    assert cut == whole
    with pytest.raises(BadInput, match="A continuation of 9 tokens does not fit the model's context of 8"):
        lm._loglikelihood_tokens([(None, before, list(range(9)))], disable_tqdm=True)


@pytest.mark.parametrize("kind", ["nelbo", "token_by_token", "causal"])
def test_an_answer_longer_than_the_context_is_one_sentence(checkpoints, kind):
    lm = load(checkpoints / "mdlm", likelihood=kind, mc_num=1, max_length=8)
    sentence = "A continuation of 9 tokens does not fit the model's context of 8: give the model argument `max_length`"
    with pytest.raises(BadInput, match=sentence):
        lm._loglikelihood_tokens([(None, [5, 6], [7]), (None, [5, 6], list(range(9)))], disable_tqdm=True)


# ------------------------------------------------------------------------------------------- progress and interruption


class Bar:
    """What a progress bar is told."""

    def __init__(self, **told):
        self.told, self.updates = told, []

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    def update(self, count):
        self.updates.append(count)


@pytest.mark.parametrize("kind", ["nelbo", "token_by_token"])
def test_the_bar_knows_the_whole_and_comes_to_its_end(checkpoints, monkeypatch, kind):
    """In tokens that the forwards read, counted here at the model itself, for requests too long to enumerate."""
    bars = []
    monkeypatch.setattr(lm_eval_model, "tqdm", lambda **told: bars.append(Bar(**told)) or bars[-1])
    monkeypatch.setattr(lm_eval_model, "ROWS_AT_ONCE", 8)
    lm = load(checkpoints / "mdlm", likelihood=kind, mc_num=6, batch_size=1, check_greedy=False)
    requests = [(None, list(range(4, 4 + n)), list(range(20, 20 + n))) for n in (3, 9, 5, 7)]
    read = []
    hook = lm.a2d.register_forward_pre_hook(
        lambda module, args, given: read.append(int(given["attention_mask"].sum())), with_kwargs=True
    )
    lm._loglikelihood_tokens(requests)
    hook.remove()
    (bar,) = bars
    assert bar.told["total"] == sum(bar.updates) == sum(read) and len(bar.updates) > 1
    assert bar.updates == sorted(bar.updates, reverse=True), "the longest first: an estimate errs on the long side"
    assert not bar.told["disable"]
    lm.check_greedy = True
    lm._loglikelihood_tokens(requests)
    decoded = sum(2 * n * n for n in (3, 9, 5, 7)) if kind == "nelbo" else 0  # n forwards of 2n tokens
    assert bars[1].told["total"] == sum(bars[1].updates) == sum(read) + decoded


@pytest.mark.parametrize("kind", ["nelbo", "token_by_token"])
def test_an_interrupted_run_has_cached_what_it_had_finished(checkpoints, monkeypatch, kind):
    monkeypatch.setattr(lm_eval_model, "ROWS_AT_ONCE", 1)  # one request at a time
    lm = load(checkpoints / "mdlm", likelihood=kind, mc_num=3)
    cached, real, calls = [], getattr(likelihoods, kind), []
    monkeypatch.setattr(
        lm, "cache_hook", type("Hook", (), {"add_partial": lambda self, *parts: cached.append(parts)})()
    )

    def stopped(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    whole = pairs(load(checkpoints / "mdlm", likelihood=kind, mc_num=3))
    monkeypatch.setattr(likelihoods, kind, stopped)
    with pytest.raises(KeyboardInterrupt):
        pairs(lm)
    expected = dict(zip(PAIRS, whole, strict=True))
    assert len(cached) == 2
    for _, request, (value, greedy) in cached:
        assert (value, greedy) == (pytest.approx(expected[request][0], rel=1e-6), expected[request][1])


# ------------------------------------------------------------------------------------------------------- generation


def written(lm: A2DLM, **gen_kwargs) -> list[str]:
    requests = [(text, {"until": [], "max_gen_toks": 8} | gen_kwargs) for text in ("The quick", "A model reads from")]
    return lm.generate_until(instances("generate_until", requests), disable_tqdm=True)


def test_model_args_are_the_defaults_and_gen_kwargs_win(checkpoints):
    forwards = {}
    for name, defaults, asked in [
        ("none", {}, {}),
        ("defaults", {"steps": 2}, {}),
        ("both", {"steps": 2}, {"steps": 4}),
    ]:
        lm = load(checkpoints / "mdlm", **defaults)
        written(lm, **asked)
        forwards[name] = lm.num_forwards
        assert lm.num_new_tokens > 0
    assert forwards == {"none": 8, "defaults": 2, "both": 4}


def test_tokens_per_forward_is_the_mean_of_the_decoders_own_counts(checkpoints, monkeypatch):
    lm = load(checkpoints / "mdlm", batch_size=1, steps=2)
    counts, real = [], lm.a2d.diffusion_generate

    def counting(*args, **kwargs):
        output = real(*args, **kwargs)
        counts.extend(output.tokens_per_forward.tolist())
        return output

    monkeypatch.setattr(lm.a2d, "diffusion_generate", counting)
    assert lm.tokens_per_forward is None
    written(lm)
    assert len(counts) == 2 and lm.tokens_per_forward == pytest.approx(sum(counts) / 2)
    together = load(checkpoints / "mdlm", batch_size=2, steps=2)
    written(together)
    assert together.tokens_per_forward == pytest.approx(lm.tokens_per_forward), "not the tokens of a batch"
    assert together.get_model_info()["a2d"]["tokens_per_forward"] == together.tokens_per_forward


def test_answers_that_do_not_fit_are_one_sentence(checkpoints):
    lm = load(checkpoints / "mdlm", max_length=16)
    with pytest.raises(
        BadInput, match="answers of up to 16 tokens do not fit the model's context of 16: give a lower"
    ):
        written(lm, max_gen_toks=16)


def test_every_argument_of_the_decoder_arrives(checkpoints, monkeypatch):
    lm = load(checkpoints / "mdlm", selector="threshold", threshold=0.3)
    calls = []
    real = lm.a2d.diffusion_generate
    monkeypatch.setattr(
        lm.a2d, "diffusion_generate", lambda *args, **kwargs: calls.append(kwargs) or real(*args, **kwargs)
    )
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "block_size": 4, "seed": 9, "do_sample": True, "steps": 8}
    written(lm, **given, until=["\n"])
    assert len(calls) == 1
    expected = given | {"selector": "threshold", "threshold": 0.3, "max_new_tokens": 8}
    assert {name: calls[0][name] for name in expected if name != "do_sample"} == {
        name: value for name, value in expected.items() if name != "do_sample"
    }
    assert "\n" in calls[0]["stop_strings"] and calls[0]["tokenizer"] is lm.tokenizer
    assert written(lm, do_sample=False) == written(lm, temperature=0.0), "the harness' two words for greedy"


def test_every_field_of_the_decoder_is_a_model_argument(checkpoints):
    values = dict.fromkeys(DECODING_FIELDS)
    assert {"steps", "block_size", "selector", "temperature", "remasking", "guidance_scale", "use_cache"} <= set(
        values
    )
    lm = load(checkpoints / "mdlm", **values)
    assert lm.decoding == values


def test_texts_end_at_the_stop_string_and_what_is_written_is_the_decoders(checkpoints):
    lm = load(checkpoints / "mdlm")
    whole = written(lm)
    ids = lm.tokenizer(["The quick"], return_tensors="pt").input_ids
    direct = lm.a2d.diffusion_generate(ids, max_new_tokens=8, temperature=0.0)[0, ids.shape[1] :]
    assert whole[0] == lm.tokenizer.decode(direct, skip_special_tokens=True)
    stop = whole[0].strip()[2]
    assert stop not in written(lm, until=[stop])[0]


def test_the_chat_template_stands_around_the_question(checkpoints, tmp_path):
    lm = load(checkpoints / "mdlm", mc_num=1)
    lm.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
        "{% endif %}"
    )
    results = evaluate(lm, synthetic(tmp_path, rows=3), apply_chat_template=True)
    prompt = results["samples"]["synthetic"][0]["arguments"][0][0]
    assert prompt.startswith("<user>question 0") and prompt.endswith("<assistant>")


# ---------------------------------------------------------------------------------------------------------- loading


def test_an_adapter_is_loaded_and_the_mask_token_keeps_its_row(checkpoints, tmp_path):
    base = A2DForMaskedDiffusion.from_pretrained(checkpoints / "mdlm")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    lm = load(checkpoints / "mdlm", peft=str(tmp_path / "adapter"), mc_num=3)
    assert isinstance(lm.model, PeftModel) and isinstance(lm.a2d, A2DForMaskedDiffusion)
    assert len(lm.tokenizer) < MASK and lm.a2d.get_input_embeddings().num_embeddings == VOCAB_SIZE
    request = likelihoods.Request.continuation(*(lm.tokenizer(text).input_ids for text in PAIRS[0]))
    expected = likelihoods.nelbo(adapted.get_base_model(), [request], mc_num=3)[0].log_likelihood
    assert pairs(lm)[0][0] == pytest.approx(expected, rel=1e-6)
    assert pairs(lm)[0][0] != pytest.approx(pairs(load(checkpoints / "mdlm", mc_num=3))[0][0], rel=1e-3)
    assert written(lm)


def test_four_bits_on_a_cpu(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parent = tiny_model("llama", hidden_size=64, intermediate_size=128, num_key_value_heads=4)
    A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=MASK).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lm = load(tmp_path, load_in_4bit=True, mc_num=3)
    layers = [module for module in lm.a2d.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14, "seven in each of two layers; the head stays whole"
    rough, exact = pairs(lm), pairs(load(tmp_path, mc_num=3))
    assert rough[1][0] != exact[1][0] and rough[1][0] == pytest.approx(exact[1][0], rel=0.2)


def test_an_autoregressive_checkpoint_is_converted_in_memory(tmp_path):
    # As many rows as the tokenizer has ids: the mask token gets a new one, and the parent's all stay as they are.
    tiny_model("llama", vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lm = load(tmp_path, likelihood="causal")
    assert lm.a2d.config.vocab_size > lm.a2d.config.parent_vocab_size == len(tiny_tokenizer())
    assert pairs(lm) == pairs(HFLM(str(tmp_path), device="cpu", batch_size=4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"likelihood": "exact"}, "`likelihood` must be one of nelbo, token_by_token, causal, not 'exact'"),
        ({"mc_num": 0}, "`mc_num` must be a positive integer, not 0"),
        ({"gguf_file": "x.gguf"}, "`gguf_file` is for other models"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "choose one"),
    ],
)
def test_bad_arguments_are_one_sentence(checkpoints, given, message):
    with pytest.raises(BadInput, match=message):
        load(checkpoints / "mdlm", **given)


def test_the_report_says_how_it_was_measured(checkpoints):
    lm = load(checkpoints / "block-4", mc_num=2, steps=3)
    info = lm.get_model_info()["a2d"]
    assert info["objective"] == "bd3lm" and info["block_size"] == 4 and info["mc_num"] == 2
    assert info["decoding"] == {"steps": 3} and info["likelihood"] == "nelbo"


# ------------------------------------------------------------------------------------------------------------ tasks


def synthetic(folder: Path, rows: int = CHANCE_ROWS) -> Path:
    """A folder with a multiple-choice task whose right answers are drawn at random."""
    draw = random.Random(0)
    words = "quick brown fox jumps over lazy dog model reads left right word time blanks once".split()
    lines = [
        {"query": f"question {i} " + " ".join(draw.choices(words, k=4)),
         "choices": [" ".join(draw.choices(words, k=3)) for _ in range(CHOICES)], "gold": draw.randrange(CHOICES)}
        for i in range(rows)
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "synthetic.yaml").write_text(
        "task: synthetic\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{folder / 'rows.jsonl'}\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{{{query}}}}'\n"
        "doc_to_target: gold\ndoc_to_choice: choices\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    return folder


def evaluate(lm, folder: Path, task: str = "synthetic", **kwargs) -> dict:
    return simple_evaluate(
        lm,
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **kwargs,
    )


def check_chance(results: dict, task: str) -> None:
    """Accuracy within three standard errors of guessing, where each question has its own number of choices."""
    samples = results["samples"][task]
    chances = [1 / len(sample["arguments"]) for sample in samples]
    error = math.sqrt(math.fsum(p * (1 - p) for p in chances)) / len(chances)
    for metric in ("acc", "acc_norm"):
        found = math.fsum(sample[metric] for sample in samples) / len(samples)
        assert abs(found - sum(chances) / len(chances)) <= 3 * error, (task, metric, found)


@pytest.mark.parametrize("kind", ["nelbo", "token_by_token", "causal"])
def test_a_random_model_scores_chance(checkpoints, tmp_path, kind):
    lm = load(checkpoints / "mdlm", likelihood=kind, mc_num=2, batch_size=32, check_greedy=False)
    check_chance(evaluate(lm, synthetic(tmp_path)), "synthetic")


def test_the_check_of_chance_sees_a_leak(checkpoints, tmp_path):
    """A task that is answered by its shortest choice is not at chance: what the check above is there to see."""
    folder = synthetic(tmp_path)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["choices"][row["gold"]] = "dog"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lm = load(checkpoints / "mdlm", mc_num=2, batch_size=32, check_greedy=False)
    with pytest.raises(AssertionError, match="acc"):
        check_chance(evaluate(lm, folder), "synthetic")


TASKS = Path(__file__).resolve().parents[2] / "recipes" / "lm_eval_tasks"


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["arc_easy", "copa", "openbook_qa", "piqa"])
def test_a_random_model_scores_chance_on_real_questions_with_shuffled_labels(real_data, tmp_path, monkeypatch, name):
    draw = random.Random(0)
    with open(real_data / "eval" / f"{name}.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        row["gold"] = draw.randrange(len(row["choices"]))
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("A2D_EVAL_DATA", str(tmp_path))
    folder = tmp_path / "model"
    long = {"vocab_size": 513, "max_position_embeddings": 1024, "hidden_size": 16, "num_attention_heads": 2}
    parent = tiny_model("llama", **long, num_key_value_heads=1, intermediate_size=32, num_hidden_layers=1)
    model = A2DForMaskedDiffusion.from_causal_lm(parent, mask_token_id=512)
    model.save_pretrained(folder)
    tokenizer = real_data / "models" / "stories260K"
    lm = load(folder, tokenizer=str(tokenizer), mc_num=1, batch_size=64, check_greedy=False)
    check_chance(evaluate(lm, TASKS, f"local_{name}", limit=200), f"local_{name}")


# -------------------------------------------------------------------------------------------------------- processes


def test_two_processes_give_the_numbers_of_one(checkpoints, tmp_path):
    folder = synthetic(tmp_path / "task", rows=9)
    arguments = [
        "--model", "a2d", "--model_args", f"pretrained={checkpoints / 'mdlm'},mc_num=4", "--tasks",
        "synthetic", "--include_path", str(folder), "--batch_size", "2", "--log_samples",
    ]  # fmt: skip
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launch = [sys.executable, "-m"]
        if processes > 1:
            launch += ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
        command = [*launch, "a2d_hf.lm_eval_cli", *arguments, "--output_path", str(out)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-2000:]
        (samples,) = out.rglob("samples_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        found[processes] = {row["doc_id"]: (row["acc"], row["filtered_resps"]) for row in rows}
        if processes > 1:
            assert "on rank 1" in run.stderr, "the second process did not share the work"
    assert len(found[1]) == 9 and found[1] == found[2]
