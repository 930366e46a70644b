"""What parallel decoding costs in quality, and what it gains in time, on small real models trained here.

    python scripts/bench_decoding_quality.py --stories STORIES --text TEXT --sort SORT

STORIES is a small story-telling checkpoint (stories260K), TEXT a file of such stories, SORT a checkpoint that sorts
six letters (see sort_demo.py). Four conversions are trained, some minutes each, and kept in `--models` for the next
run. Owns the training recipes and the four tables; writes one JSON file and one picture.

1. Each selector at several settings: tokens per forward against the share of letters sorted right (with AUP), and
   against the parent's own likelihood of the stories.
2. Verified self-speculation: how many of 200 texts equal the greedy text, and how much faster they come.
3. The approximate caches of an MDLM model: time against deviation.
"""

import argparse
import itertools
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from a2d_hf import A2DForMaskedDiffusion, BD3LMConfig, BD3LMTrainer, MDLMConfig, MDLMTrainer
from a2d_hf.accuracy_parallelism import aup, draw_panels
from a2d_hf.atomic_files import write_json, write_text
from a2d_hf.console import Console
from a2d_hf.data import cut_text


ROOT = Path(__file__).resolve().parents[1]
BLOCK, ROW = 8, 128
SETTINGS: dict[str, list[dict[str, Any]]] = {
    **{
        name: [{"selector": name, "share": share} for share in (1.0, 0.75, 0.5, 0.25)]
        for name in ("confidence", "margin", "entropy", "random")
    },
    "threshold": [{"selector": "threshold", "threshold": t} for t in (0.99, 0.9, 0.7, 0.5, 0.3)],
    "entropy_bound": [{"selector": "entropy_bound", "entropy_bound": b} for b in (0.01, 0.1, 0.3, 1.0, 3.0)],
}


def train(kind: str, args: argparse.Namespace, console: Console) -> Any:
    """The conversion of this kind, from `--models` where it is there already."""
    on_sort = kind == "sort-mdlm"
    source, steps = (args.sort, args.sort_steps) if on_sort else (args.stories, args.train_steps)
    folder = args.models / f"{kind}-{steps}"  # what other steps have made is another model
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        console.step(f"training {kind}")
        set_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(source)
        if on_sort:
            rows = [{"prompt": word, "completion": "".join(sorted(word))[:5]} for word in words()]
        else:
            pieces = cut_text(args.text.read_text(encoding="utf-8"), tokenizer, ROW)
            rows = [{"text": piece} for piece in pieces[: int(len(pieces) * 0.95)]]
        block = kind.startswith("stories-bd3lm")
        fields = {"objective": "bd3lm", "block_size": BLOCK, "clean_context": "causal"} if block else {}
        # A block's first token is read from the clean token before it: a draft starts where the parent stands.
        model = A2DForMaskedDiffusion.from_pretrained(source, tokenizer=tokenizer, token_shift=block, **fields)
        lora = kind.endswith("lora")
        shared = {
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": 81 if on_sort else 16,
            "learning_rate": 3e-3 if on_sort or lora else 2e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 20,
            "max_length": 11 if on_sort else ROW,
            "insert_eos": False,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
        }
        config, trainer = (MDLMConfig, MDLMTrainer)
        if block:
            config, trainer = BD3LMConfig, BD3LMTrainer
            shared["ar_loss_weight"] = 0.0 if lora else 1.0
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if lora else None
        run = trainer(
            model, config(**shared), train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=adapter,
        )  # fmt: skip
        run.train()
        run.save_model(str(folder))
        tokenizer.save_pretrained(folder)
    if (folder / "adapter_config.json").exists():
        base = A2DForMaskedDiffusion.from_pretrained(
            source, tokenizer=AutoTokenizer.from_pretrained(source), token_shift=True, objective="bd3lm",
            block_size=BLOCK, clean_context="causal",
        )  # fmt: skip
        return PeftModel.from_pretrained(base, folder).eval()
    return A2DForMaskedDiffusion.from_pretrained(folder).eval()


def words() -> list[str]:
    return ["".join(letters) for letters in itertools.product("ABC", repeat=6)]


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return function(), time.perf_counter() - started


def story_prompts(args: argparse.Namespace, tokenizer) -> torch.Tensor:
    """The first 16 tokens of pieces that no model was trained on."""
    pieces = cut_text(args.text.read_text(encoding="utf-8"), tokenizer, ROW)
    ids = [tokenizer(piece).input_ids[:16] for piece in pieces[int(len(pieces) * 0.95) :]]
    # Few held-out pieces make few prompts: later ones start inside a piece.
    for piece in pieces[int(len(pieces) * 0.95) :]:
        row = tokenizer(piece, add_special_tokens=False).input_ids
        ids += [[tokenizer.bos_token_id, *row[at : at + 15]] for at in range(20, len(row) - 15, 12)]
    ids = [row for row in ids if len(row) == 16]
    return torch.tensor(ids[: args.prompts])


def call_arguments(setting: dict[str, Any], new: int) -> dict[str, Any]:
    arguments = {name: value for name, value in setting.items() if name != "share"}
    return arguments | ({"steps": max(1, round(new * setting["share"]))} if "share" in setting else {})


def sort_curves(args: argparse.Namespace, console: Console) -> dict[str, list[dict[str, Any]]]:
    """Letters sorted right, all 729 words in one call, for each selector and setting."""
    model = train("sort-mdlm", args, console)
    tokenizer = AutoTokenizer.from_pretrained(args.sort)
    ids, answers = torch.tensor(tokenizer(words()).input_ids), ["".join(sorted(word))[:5] for word in words()]
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, settings in SETTINGS.items():
        for setting in settings:
            set_seed(0)
            output, seconds = timed(
                lambda setting=setting: model.diffusion_generate(
                    ids, max_new_tokens=5, return_dict_in_generate=True, **call_arguments(setting, 5)
                )
            )
            found = [text.replace(" ", "") for text in tokenizer.batch_decode(output.sequences[:, 6:])]
            right = sum(text == answer for text, answer in zip(found, answers, strict=True))
            curves.setdefault(name, []).append(
                {
                    "setting": call_arguments(setting, 5),
                    "tokens_per_forward": round(float(output.tokens_per_forward.mean()), 3),
                    "tokens_per_second": round(5 * len(answers) / seconds, 1),
                    "accuracy": round(100 * right / len(answers), 2),
                }
            )
    return curves


@torch.no_grad()
def parent_nll(parent, sequences: torch.Tensor, prompt: int) -> float:
    """Nats per generated token under the autoregressive parent."""
    log_probs = parent(sequences).logits[:, prompt - 1 : -1].float().log_softmax(-1)
    return float(-log_probs.gather(-1, sequences[:, prompt:, None]).mean())


def story_curves(args: argparse.Namespace, console: Console) -> dict[str, list[dict[str, Any]]]:
    """The parent's likelihood of greedy stories, for each selector and setting; the mask token never appears."""
    model, parent = train("stories-bd3lm", args, console), AutoModelForCausalLM.from_pretrained(args.stories).eval()
    ids = story_prompts(args, AutoTokenizer.from_pretrained(args.stories))[:32]
    kwargs = {"max_new_tokens": args.new, "eos_token_id": None}
    rows = {name: [call_arguments(setting, args.new) for setting in settings] for name, settings in SETTINGS.items()}
    rows["left to right (causal mode)"] = [{"self_speculation": "causal"}]
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, settings in rows.items():
        for setting in settings:
            set_seed(0)
            output, seconds = timed(
                lambda setting=setting: model.diffusion_generate(
                    ids, return_dict_in_generate=True, **kwargs, **setting
                )
            )
            text = output.sequences[:, ids.shape[1] :]
            curves.setdefault(name, []).append(
                {
                    "setting": setting,
                    "tokens_per_forward": round(float(output.tokens_per_forward.mean()), 3),
                    "tokens_per_second": round(text.numel() / seconds, 1),
                    "parent_nll": round(parent_nll(parent, output.sequences, ids.shape[1]), 3),
                    # Repetition pleases a parent too: how many of a text's tokens are different ones.
                    "distinct": round(sum(len(set(row)) for row in text.tolist()) / text.numel(), 3),
                }
            )
    return curves


def speculation(args: argparse.Namespace, console: Console) -> dict[str, dict[str, Any]]:
    """Texts that equal the greedy text of the causal mode, one prompt at a time, and the time of both."""
    result = {}
    tokenizer = AutoTokenizer.from_pretrained(args.stories)
    prompts = story_prompts(args, tokenizer)
    parent = AutoModelForCausalLM.from_pretrained(args.stories).eval()
    for kind, mode in (("stories-bd3lm", "causal"), ("stories-bd3lm-lora", "parent")):
        model = train(kind, args, console)
        greedy = model.backbone if mode == "causal" else parent
        mask = (model if mode == "causal" else model.get_base_model()).config.mask_token_id
        suppressed = [mask] if mask < greedy.config.vocab_size else None
        equal, tokens, forwards, ours_s, theirs_s = 0, 0, 0, 0.0, 0.0
        with console.progress(f"self-speculation, {mode}", len(prompts), "text") as progress:
            for ids in prompts.split(1):
                own, seconds = timed(
                    lambda ids=ids, greedy=greedy, suppressed=suppressed: greedy.generate(
                        ids, max_new_tokens=args.new, do_sample=False, eos_token_id=None, pad_token_id=0,
                        attention_mask=torch.ones_like(ids), suppress_tokens=suppressed,
                    )
                )  # fmt: skip
                theirs_s += seconds
                output, seconds = timed(
                    lambda ids=ids, model=model, mode=mode: model.generate(
                        input_ids=ids, max_new_tokens=args.new, eos_token_id=None, self_speculation=mode,
                        return_dict_in_generate=True,
                    )
                )  # fmt: skip
                ours_s += seconds
                equal += int(torch.equal(output.sequences, own))
                tokens, forwards = tokens + args.new, forwards + output.num_forwards
                progress.advance()
        result[mode] = {
            "texts": len(prompts),
            "equal": equal,
            "tokens_per_forward": round(tokens / forwards, 3),
            "tokens_per_second": round(tokens / ours_s, 1),
            "tokens_per_second_generate": round(tokens / theirs_s, 1),
            "speedup": round(theirs_s / ours_s, 2),
        }
    return result


def approximate(args: argparse.Namespace, console: Console) -> dict[str, dict[str, Any]]:
    """Time, deviation and the parent's likelihood of each cache, for one text of `--new` tokens after 64."""
    model, parent = train("stories-mdlm", args, console), AutoModelForCausalLM.from_pretrained(args.stories).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.stories)
    ids = tokenizer(args.text.read_text(encoding="utf-8")[-2000:], return_tensors="pt").input_ids[:, :256]
    kwargs = {
        "max_new_tokens": 2 * args.new, "steps": args.new, "block_size": 4 * BLOCK, "eos_token_id": None,
        "return_dict_in_generate": True,
    }  # fmt: skip
    result: dict[str, dict[str, Any]] = {}
    exact = None
    for name in (None, "prefix", "dual"):
        runs = [
            timed(lambda name=name: model.diffusion_generate(ids, approximate_cache=name, **kwargs)) for _ in range(3)
        ]
        output, seconds = runs[0][0], min(seconds for _, seconds in runs)
        measured = (
            name
            and model.diffusion_generate(
                ids, approximate_cache=name, output_cache_deviation=True, **kwargs
            ).cache_deviation
        )
        exact = exact or (output, seconds)
        same = (output.sequences == exact[0].sequences)[:, ids.shape[1] :].float().mean()
        result[name or "none (exact)"] = {
            "seconds": round(seconds, 3),
            "speedup": round(exact[1] / seconds, 2),
            "forwards": output.num_forwards,
            "same_tokens_as_exact": round(float(same), 3),
            "parent_nll": round(parent_nll(parent, output.sequences, ids.shape[1]), 3),
            "deviation": measured and {key: round(value, 4) for key, value in measured.items()},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True, help="folder of the story-telling checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="file of stories to train on")
    parser.add_argument("--sort", type=Path, required=True, help="folder of the sorting checkpoint")
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "bench_decoding", help="where models are kept")
    parser.add_argument("--train-steps", type=int, default=150, help="optimizer steps of each story model")
    parser.add_argument("--sort-steps", type=int, default=250, help="optimizer steps of the sorting model")
    parser.add_argument("--prompts", type=int, default=200, help="texts of self-speculation")
    parser.add_argument("--new", type=int, default=64, help="tokens to write")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "decoding_quality_cpu.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "decoding_quality.svg")
    args = parser.parse_args()
    console = Console()

    by_sort, by_story = sort_curves(args, console), story_curves(args, console)
    best = max(point["accuracy"] for points in by_sort.values() for point in points)
    areas = {
        name: round(aup([(p["tokens_per_forward"], p["accuracy"]) for p in points], best), 1)
        for name, points in by_sort.items()
    }
    by_speculation, by_cache = speculation(args, console), approximate(args, console)
    for title, curves, quality in (("sorting", by_sort, "accuracy"), ("stories", by_story, "parent_nll")):
        console.step(title)
        console.table(
            ["selector", "setting", "tokens/forward", "tokens/s", quality],
            [
                [name, _said(p["setting"]), p["tokens_per_forward"], p["tokens_per_second"], p[quality]]
                for name, points in curves.items()
                for p in points
            ],
        )
    console.step("AUP, sorting")
    console.table(["selector", "AUP"], [list(item) for item in sorted(areas.items(), key=lambda item: -item[1])])
    console.step("self-speculation")
    console.table(["verified by", *next(iter(by_speculation.values()))],
                  [[mode, *row.values()] for mode, row in by_speculation.items()])  # fmt: skip
    console.step("approximate caches")
    console.table(
        ["cache", *next(iter(by_cache.values()))], [[name, *map(str, row.values())] for name, row in by_cache.items()]
    )

    panels = [
        (title, "tokens per forward", label, {
            name: [(p["tokens_per_forward"], p[quality]) for p in points] for name, points in curves.items()
        })
        for title, label, curves, quality in (
            ("Sorting six letters", "sorted right, %", by_sort, "accuracy"),
            ("Stories", "nats per token under the parent", by_story, "parent_nll"),
        )
    ]  # fmt: skip
    points = {
        name: [(row["deviation"]["mean_abs"] if row["deviation"] else 0.0, row["speedup"])]
        for name, row in by_cache.items()
    }
    panels.append(("Approximate caches (MDLM)", "mean deviation of a logit", "speed-up", points))
    write_text(args.picture, draw_panels(panels))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    numbers = {name: value for name, value in vars(args).items() if isinstance(value, int)}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in numbers.items())
    write_json(
        args.out,
        {
            # Names of folders are the machine's own business.
            "command": f"python scripts/bench_decoding_quality.py --stories STORIES --text TEXT --sort SORT {options}",
            "setting": numbers,
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "sorting": by_sort,
            "sorting_aup": areas,
            "stories": by_story,
            "self_speculation": by_speculation,
            "approximate_caches": by_cache,
        },
    )
    console.line(f"written: {args.out.name}, {args.picture.name}")


def _said(setting: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in setting.items() if key != "selector")


if __name__ == "__main__":
    sys.exit(main())
