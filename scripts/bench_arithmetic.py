"""What each token more per forward costs, and by which selector least: addition, digit by digit.

    python scripts/bench_arithmetic.py --models MODELS

`589743+411256=9900001`, which is 347985 + 652114 = 1000099: every number begins with its last digit, so that each
digit of the sum needs the carry of the one before it. Half of the columns add up to nine and pass on whatever carry
comes in: carries travel far, and a digit is hard as long as its neighbour is a mask. Everything is made here:
problems, a tokenizer of characters, for each seed an autoregressive parent, trained from nothing with TRL's
SFTTrainer, and its conversion, trained with MDLMTrainer. Both are kept in MODELS for the next run. Owns this one
experiment; writes a JSON file and a picture.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from a2d_hf import A2DForMaskedDiffusion, MDLMConfig, MDLMTrainer
from a2d_hf.accuracy_parallelism import aup, draw_panels
from a2d_hf.atomic_files import replaced_folder, write_json, write_text
from a2d_hf.console import Console
from a2d_hf.modeling.selectors_a2d import Candidates


ROOT = Path(__file__).resolve().parents[1]
NINES = 0.5  # share of the columns made to add up to nine
HELD_OUT_SEED = 1_000_000  # the same problems for every model; models are seeded by small numbers
ADAPTIVE = {
    "threshold": (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3),
    "entropy_bound": (0, 0.01, 0.05, 0.1, 0.2, 0.5, 1, 2),
}
COUNTED = ("confidence", "margin", "entropy", "random")
DRAWN = ("AR parent", *COUNTED, "left to right", *ADAPTIVE)  # the picture has eight colours

Operands = tuple[str, str]


# ------------------------------------------------------------------------------------------------------ the problems


def draw_problems(count: int, digits: int, seed: int, avoid: Collection[Operands] = ()) -> list[Operands]:
    """
    Different pairs of numbers of `digits` digits, zeros in front included; none of `avoid`, in either order.

    Args:
        count (`int`): how many.
        digits (`int`): of each number.
        seed (`int`): decides them.
        avoid (`Collection[tuple[str, str]]`, *optional*): pairs that others must not share.
    """
    generator, seen, pairs = random.Random(seed), {frozenset(pair) for pair in avoid}, []
    while len(pairs) < count:
        first = [generator.randrange(10) for _ in range(digits)]
        second = [9 - digit if generator.random() < NINES else generator.randrange(10) for digit in first]
        pair = ("".join(map(str, first)), "".join(map(str, second)))
        if frozenset(pair) not in seen:
            seen.add(frozenset(pair))
            pairs.append(pair)
    return pairs


def problem(first: str, second: str) -> dict[str, str]:
    """The row of a problem: three numbers that begin with their last digit, the sum one digit longer."""
    total = str(int(first) + int(second)).zfill(len(first) + 1)
    return {"prompt": f"{first[::-1]}+{second[::-1]}=", "completion": total[::-1]}


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of a problem."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


# -------------------------------------------------------------------------------------------------------- the models


def trained(folder: Path, settings: dict[str, Any], train: Callable[[], Any], console: Console) -> float:
    """Trains and saves into `folder` unless it holds the same already; CPU seconds that the training took."""
    note = folder / "training.json"
    if note.exists() and (known := json.loads(note.read_text(encoding="utf-8")))["settings"] == settings:
        return known["cpu_seconds"]
    console.step(f"training {folder.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    trainer = train()
    trainer.train()
    seconds = round(time.process_time() - started, 1)
    with replaced_folder(folder) as target:
        trainer.save_model(str(target))
        write_json(target / "training.json", {"settings": settings, "cpu_seconds": seconds})
    return seconds


def train_models(
    seed: int, rows: list[dict[str, str]], args: argparse.Namespace, console: Console
) -> tuple[Path, Path, float]:
    """Folders of the parent and of its conversion, and the CPU seconds of both trainings."""
    tokenizer, dataset = character_tokenizer(), datasets.Dataset.from_list(rows)
    length = len(rows[0]["prompt"]) + len(rows[0]["completion"])
    common = {
        "per_device_train_batch_size": args.batch,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 50,
        "weight_decay": 0.01,
        "adam_beta2": 0.98,
        "max_length": length + 1,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 100,
        "use_cpu": True,
        "bf16": False,
        "seed": seed,
    }
    settings = {
        name: getattr(args, name)
        for name in ("digits", "hidden", "layers", "rows", "batch", "learning_rate", "parent_steps")
    } | {"seed": seed, "nines": NINES}
    parent, conversion = args.models / f"parent-{seed}", args.models / f"mdlm-{seed}"

    def parent_trainer() -> SFTTrainer:
        set_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            max_position_embeddings=2 * length,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        told = SFTConfig(output_dir=str(parent), max_steps=args.parent_steps, gradient_checkpointing=False, **common)
        return SFTTrainer(
            AutoModelForCausalLM.from_config(config), told, train_dataset=dataset, processing_class=tokenizer
        )

    def conversion_trainer() -> MDLMTrainer:
        set_seed(seed)
        told = MDLMConfig(output_dir=str(conversion), max_steps=args.steps, insert_eos=False, **common)
        own = AutoTokenizer.from_pretrained(parent)  # gets its mask token from the conversion
        # Read where the parent was: it keeps what it knows about carries.
        model = A2DForMaskedDiffusion.from_pretrained(parent, tokenizer=own, token_shift=True)
        return MDLMTrainer(model, told, train_dataset=dataset, processing_class=own)

    seconds = trained(parent, settings, parent_trainer, console)
    seconds += trained(conversion, settings | {"steps": args.steps}, conversion_trainer, console)
    return parent, conversion, seconds


# --------------------------------------------------------------------------------------------------- the measurement


def leftmost(candidates: Candidates) -> torch.Tensor:
    """The order of writing: the first masks of each row, as many as `steps` asks for."""
    return candidates.mask_BL & (candidates.mask_BL.cumsum(-1) <= candidates.num_commits_B[:, None])


def sweep(tokens: int) -> dict[str, list[dict[str, Any]]]:
    """Arguments of `diffusion_generate` for each method, for an answer of so many tokens."""
    steps = sorted({-(-tokens // together) for together in range(1, tokens + 1)}, reverse=True)
    return {
        **{name: [{"selector": name, "steps": count} for count in steps] for name in COUNTED},
        "left to right": [{"selector": leftmost, "steps": count} for count in steps],
        **{name: [{"selector": name, name: value} for value in values] for name, values in ADAPTIVE.items()},
        "p2": [{"remasking": "p2", "steps": count} for count in (tokens, -(-tokens // 2))],
        "remdm_conf": [{"remasking": "remdm_conf", "steps": count} for count in (2 * tokens, tokens)],
    }


def measured(write: Callable[[], tuple[torch.Tensor, torch.Tensor]], answers: list[str], tokenizer) -> dict[str, Any]:
    """
    How many answers are right, and what they took.

    Args:
        write (`Callable`): returns the answers' ids of shape `(B, N)` and the forwards of each row, `(B,)`.
        answers (`list[str]`): the right ones.
        tokenizer: reads the ids.
    """
    started = time.process_time()
    ids_BN, forwards_B = write()
    seconds = time.process_time() - started
    found = tokenizer.batch_decode(ids_BN)
    return {
        "problems": len(answers),
        "right": sum(text == answer for text, answer in zip(found, answers, strict=True)),
        "forwards": int(forwards_B.sum()),
        "tokens_per_forward": float((ids_BN.shape[1] / forwards_B.double()).mean()),
        "cpu_seconds": seconds,
    }


@torch.no_grad()
def measure(parent_path: Path, path: Path, rows: list[dict[str, str]], seed: int, console: Console) -> dict[str, Any]:
    """For each method and setting what [`measured`] says, all problems in one call, greedy."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids_BP = torch.tensor(tokenizer([row["prompt"] for row in rows]).input_ids)
    answers = [row["completion"] for row in rows]
    tokens = len(answers[0])
    parent, model = AutoModelForCausalLM.from_pretrained(parent_path), A2DForMaskedDiffusion.from_pretrained(path)

    def by_parent() -> tuple[torch.Tensor, torch.Tensor]:
        sequences = parent.generate(
            ids_BP, attention_mask=torch.ones_like(ids_BP), min_new_tokens=tokens, max_new_tokens=tokens,
            do_sample=False,
        )  # fmt: skip
        return sequences[:, ids_BP.shape[1] :], torch.full((len(rows),), tokens)

    def by_diffusion(setting: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        output = model.diffusion_generate(
            ids_BP, max_new_tokens=tokens, temperature=0.0, suppress_tokens=[tokenizer.eos_token_id], seed=seed,
            return_dict_in_generate=True, **setting,
        )  # fmt: skip
        return output.sequences[:, ids_BP.shape[1] :], (tokens / output.tokens_per_forward).round()

    methods = sweep(tokens)
    found = {"AR parent": [{"setting": {}} | measured(by_parent, answers, tokenizer)]}
    with console.progress(f"seed {seed}", sum(map(len, methods.values())), "setting") as progress:
        for name, settings in methods.items():
            found[name] = []
            for setting in settings:
                told = {key: value for key, value in setting.items() if not callable(value)}
                point = measured(lambda setting=setting: by_diffusion(setting), answers, tokenizer)
                found[name].append({"setting": told} | point)
                progress.advance()
    return found


# ------------------------------------------------------------------------------------------------------- the summary


def pooled(points: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """
    One point of a curve from the same setting on several models: accuracy in percent over all problems of all models,
    with the standard error of that proportion.

    Args:
        points (`Sequence[dict]`): what [`measured`] returned for each model.
        tokens (`int`): tokens of an answer.
    """
    count, right = (sum(point[key] for point in points) for key in ("problems", "right"))
    share = right / count
    return {
        "setting": points[0]["setting"],
        "tokens_per_forward": round(sum(p["tokens_per_forward"] * p["problems"] for p in points) / count, 3),
        "forwards": round(sum(point["forwards"] for point in points) / count, 3),
        "accuracy": round(100 * share, 2),
        "standard_error": round(100 * (share * (1 - share) / count) ** 0.5, 2),
        "accuracy_of_each_model": [round(100 * point["right"] / point["problems"], 2) for point in points],
        "tokens_per_cpu_second": round(count * tokens / sum(point["cpu_seconds"] for point in points)),
    }


def summary(curves: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float | None]]:
    """
    For each method its AUP against the best accuracy of any, the parent's included, and the most tokens per forward
    that it reaches within one percentage point of the best accuracy that diffusion has (`None`: nowhere).
    """
    best = max(point["accuracy"] for points in curves.values() for point in points)
    own = max(point["accuracy"] for name, points in curves.items() if name != "AR parent" for point in points)
    return {
        name: {
            "aup": round(aup([(p["tokens_per_forward"], p["accuracy"]) for p in points], best), 1),
            "tokens_per_forward_within_one_point": max(
                (p["tokens_per_forward"] for p in points if p["accuracy"] >= own - 1), default=None
            ),
        }
        for name, points in curves.items()
    }


def picture(curves: dict[str, list[dict[str, Any]]]) -> str:
    """All curves, and their upper ends again: where accuracy has fallen by less than ten points."""
    lines = {name: [(p["tokens_per_forward"], p["accuracy"]) for p in curves[name]] for name in DRAWN}
    best = max(y for points in lines.values() for _, y in points)
    upper = {name: kept for name, points in lines.items() if (kept := [(x, y) for x, y in points if y > best - 10])}
    label = "right answers, %"
    return draw_panels(
        [
            ("Addition, digit by digit", "tokens per forward", label, lines),
            ("The upper ten points", "tokens per forward", label, upper),
        ]
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, default=ROOT / "runs" / "bench_arithmetic", help="where models are kept"
    )
    parser.add_argument("--digits", type=int, default=6, help="of each of the two numbers")
    parser.add_argument("--hidden", type=int, default=64, help="width of the models")
    parser.add_argument("--layers", type=int, default=2, help="of the models")
    parser.add_argument("--rows", type=int, default=20_000, help="problems to train on")
    parser.add_argument("--batch", type=int, default=96, help="problems of an optimizer step")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="of both trainings")
    parser.add_argument("--parent_steps", type=int, default=600, help="optimizer steps of each parent")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each conversion")
    parser.add_argument("--problems", type=int, default=500, help="held-out problems")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one parent and one conversion for each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "decoding_arithmetic_cpu.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "decoding_arithmetic.svg")
    return parser.parse_args()


def option_line(numbers: dict[str, Any]) -> str:
    """The options of a command that sets these."""
    said = (" ".join(map(str, value)) if isinstance(value, list) else value for value in numbers.values())
    return " ".join(f"--{name} {value}" for name, value in zip(numbers, said, strict=True))


def main() -> None:
    args, console = parse(), Console()
    torch.set_num_threads(1)  # so that CPU seconds are seconds, and the same on any machine's load
    held_out = draw_problems(args.problems, args.digits, HELD_OUT_SEED)
    by_model, training, measuring = [], 0.0, 0.0
    for seed in args.seeds:
        pairs = draw_problems(args.rows, args.digits, seed, avoid=held_out)
        parent, conversion, seconds = train_models(seed, [problem(*pair) for pair in pairs], args, console)
        training += seconds
        started = time.process_time()
        by_model.append(measure(parent, conversion, [problem(*pair) for pair in held_out], seed, console))
        measuring += time.process_time() - started
    tokens = args.digits + 1
    curves = {
        name: [pooled(points, tokens) for points in zip(*(found[name] for found in by_model), strict=True)]
        for name in by_model[0]
    }
    summaries = summary(curves)
    console.table(
        ["method", "setting", "tokens/forward", "accuracy", "±", "tokens/CPU s"],
        [
            [name, _said(p["setting"]), p["tokens_per_forward"], p["accuracy"], p["standard_error"],
             p["tokens_per_cpu_second"]]
            for name, points in curves.items()
            for p in points
        ],
    )  # fmt: skip
    console.table(
        ["method", "AUP", "tokens/forward within one point"],
        [[name, *row.values()] for name, row in summaries.items()],
    )
    numbers = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.picture, picture(curves))
    write_json(
        args.out,
        {
            "command": f"python scripts/bench_arithmetic.py {option_line(numbers)}",
            "setting": numbers | {"share_of_columns_that_add_up_to_nine": NINES},
            "cpu_minutes": {"training": round(training / 60, 1), "measuring": round(measuring / 60, 1)},
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "curves": curves,
            "summary": summaries,
        },
    )
    console.line(f"{training / 60:.1f} CPU minutes of training, {measuring / 60:.1f} of measuring")
    console.line(f"written: {args.out.name}, {args.picture.name}")


def _said(setting: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in setting.items() if key != "selector")


if __name__ == "__main__":
    sys.exit(main())
