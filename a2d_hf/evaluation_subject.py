"""What is measured on one converted model, and what on the AR parent beside it, each as a part that is kept.

Owns which measurements there are and the settings of each. The arithmetic is evaluate.py's, infilling_accuracy.py's,
throughput.py's and task_scores.py's; keeping is evaluation_parts.py's. Holds one model in memory at a time, and loads
none where every part is there already.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from . import evaluate, throughput
from .console import Console
from .converted_model import ConvertedModel
from .evaluation_parts import Parts, digest, folder_fingerprint
from .infilling_accuracy import LENGTHS, Gap, continue_before_gaps, cut_gaps, fill_gaps
from .modeling.configuration_a2d import A2DConfig
from .quickstart_samples import denoising_of


PROMPT_TOKENS, NEW_TOKENS, SWEEP_PROMPTS = 16, 64, 8
TEMPERATURE = 0.7  # of the samples, on both sides; everything that is scored is greedy
CURVE_LENGTH = 16  # tokens of the gaps whose accuracy is followed from one token per forward to all in one


class OneModel:
    """The model in use: asking for another lets go of it first."""

    def __init__(self):
        self.name, self.value = None, None

    def get(self, name: str, load: Callable[[], Any]) -> Any:
        if self.name != name:
            self.name = self.value = None
            gc.collect()
            self.value = load()
            self.name = name
        return self.value


@dataclass
class Text:
    """
    The rows that everything is measured on, the same for every model.

    Attributes:
        rows (`list[dict]`): from [`~evaluate.usable_rows`].
        prompt (`int`): how many tokens of a row stand as the prompt of samples and of the sweep: what the rows give
            without a label, or a quarter of the middle one, 16 at most.
    """

    rows: list[dict[str, list[int]]]

    def __post_init__(self):
        given = [next(i for i, label in enumerate(row["labels"] + [0]) if label != -100) for row in self.rows]
        middle = sorted(len(row["input_ids"]) for row in self.rows)[len(self.rows) // 2]
        self.prompt = min(given) if min(given) > 1 else max(1, min(PROMPT_TOKENS, middle // 4))

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.rows)

    @property
    def counts(self) -> list[int]:
        return [len(evaluate.scored_positions(row)) for row in self.rows]

    def prompts(self, count: int) -> torch.Tensor:
        """The first tokens of the first rows that go on behind them, of shape `(count or fewer, prompt)`."""
        rows = [row["input_ids"] for row in self.rows if len(row["input_ids"]) > self.prompt]
        return torch.tensor([ids[: self.prompt] for ids in rows[:count]])


class Subject:
    """
    A converted model under measurement.

    Args:
        found ([`ConvertedModel`]): where it is.
        label (`str`): its name in the report, and in the progress bars.
        text ([`Text`]), parts ([`Parts`]), models ([`OneModel`]), console ([`Console`]): shared by all subjects.
        settings ([`EvaluationSettings`]): of the command.
    """

    def __init__(self, found: ConvertedModel, label: str, text: Text, parts: Parts, models: OneModel, settings: Any,
                 console: Console):  # fmt: skip
        self.found, self.label, self.text, self.parts = found, label, text, parts
        self.models, self.settings, self.console = models, settings, console
        self.config = A2DConfig.from_pretrained(found.path, trust_remote_code=settings.trust_remote_code)
        self.fingerprint = folder_fingerprint(found.path)

    def load(self) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model and its tokenizer."""
        return self.models.get(
            self.fingerprint, lambda: self.found.load(self.settings.device, self.settings.trust_remote_code)
        )

    @property
    def new_tokens(self) -> int:
        """How many tokens samples and the sweep write: what the context has room for, 64 at most."""
        context = self.config.max_position_embeddings
        return NEW_TOKENS if context is None else max(1, min(NEW_TOKENS, context - self.text.prompt))

    def _part(self, name: str, decides: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return self.parts.get(name, decides | {"model": self.fingerprint, "rows": self.text.fingerprint}, measure)

    # ------------------------------------------------------------------------------------------------ held-out text

    def row_nelbos(self) -> list[float]:
        """The bound of every row, in nats."""
        mc_samples, rows = self.settings.mc_samples, self.text.rows

        def measure() -> dict[str, Any]:
            model, _ = self.load()
            with self.console.progress(f"NELBO of {self.label}", mc_samples * len(rows), "sequence") as bar:
                return {
                    "report": evaluate.row_nelbos(
                        model, rows, mc_samples=mc_samples, batch_size=self.settings.batch_size,
                        seed=self.settings.seed, advance=bar.advance,
                    )
                }  # fmt: skip

        return self._part("nelbo", {"mc_samples": mc_samples}, measure)["report"]

    def masked_accuracy(self) -> list[dict[str, Any]]:
        """Accuracy of one forward by the share that is masked."""
        rows = self.text.rows

        def measure() -> dict[str, Any]:
            model, _ = self.load()
            total = len(evaluate.RATIOS) * len(rows)
            with self.console.progress(f"masked accuracy of {self.label}", total, "sequence") as bar:
                return {
                    "report": evaluate.masked_accuracy(
                        model, rows, batch_size=self.settings.batch_size, seed=self.settings.seed, advance=bar.advance
                    )
                }

        return self._part("masked-accuracy", {"ratios": evaluate.RATIOS}, measure)["report"]

    # --------------------------------------------------------------------------------------------------- infilling

    def infilling(self) -> list[dict[str, Any]]:
        """Gaps of each length with what was written into them: `length`, `never`, `gaps`, `fills`."""
        spans = self.settings.infill_spans
        return self._part(
            "infilling", {"lengths": LENGTHS, "spans": spans}, lambda: self._fill([(n, None) for n in LENGTHS])
        )["report"]

    def infilling_curve(self) -> list[dict[str, Any]]:
        """The same gaps filled with fewer and fewer forwards, from one token each time to all at once."""
        spans = self.settings.infill_spans or 1
        steps = [CURVE_LENGTH // 2**i for i in range(CURVE_LENGTH.bit_length())]
        decides = {"length": CURVE_LENGTH, "steps": steps, "spans": spans}
        return self._part("infilling-curve", decides, lambda: self._fill([(CURVE_LENGTH, count) for count in steps]))[
            "report"
        ]

    def _fill(self, wanted: Sequence[tuple[int, int | None]]) -> dict[str, Any]:
        model, _ = self.load()
        never = list(model.generation_config.eos_token_ids or [])
        block_size = self.config.block_size if self.config.objective == "bd3lm" else None
        spans, found = self.settings.infill_spans or 1, []
        with self.console.progress(f"infilling by {self.label}", spans * len(wanted), "gap") as bar:
            for number, (length, steps) in enumerate(wanted):
                gaps = cut_gaps(self.text.rows, length, spans, self.settings.seed, never=never, block_size=block_size)
                fills, parallel = [], None
                if gaps:
                    fills, parallel = fill_gaps(
                        model, self.text.rows, gaps, steps=steps, batch_size=self.settings.batch_size,
                        advance=bar.advance,
                    )  # fmt: skip
                bar.move_to(spans * (number + 1))
                found.append(
                    {
                        "length": length,
                        "steps": steps or length,
                        "tokens_per_forward": parallel,
                        "never": never,
                        "gaps": [asdict(gap) for gap in gaps],
                        "fills": fills,
                    }
                )
        return {"report": found}

    # ----------------------------------------------------------------------------------------- samples, speed, tasks

    def samples(self) -> list[dict[str, Any]]:
        """Continuations of held-out prompts with how they came to be."""
        count = min(self.settings.samples, len(self.text.rows))
        new, steps = self.new_tokens, max(1, self.new_tokens // 2)

        def measure() -> dict[str, Any]:
            model, tokenizer = self.load()
            found = []
            with self.console.progress(f"samples of {self.label}", count, "text") as bar:
                for number, ids in enumerate(self.text.prompts(count)):
                    output = model.diffusion_generate(
                        ids[None].to(model.device), max_new_tokens=new, steps=steps, temperature=TEMPERATURE,
                        seed=self.settings.seed + number, output_history=True, return_dict_in_generate=True,
                    )  # fmt: skip
                    prompt = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
                    drawn = asdict(denoising_of(output, tokenizer, prompt, model.config.mask_token_id))
                    drawn["confidence"] = [round(value, 4) for value in drawn["confidence"]]
                    found.append({"num_forwards": int(output.num_forwards), "denoising": drawn})
                    bar.advance()
            return {"report": found}

        decides = {"samples": count, "new_tokens": new, "steps": steps, "temperature": TEMPERATURE}
        return self._part("samples", decides, measure)["report"]

    def sweep(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Texts at every setting, and this machine's times."""
        new = self.new_tokens
        settings = throughput.settings(new)

        def measure() -> dict[str, Any]:
            model, _ = self.load()
            with self.console.progress(f"throughput of {self.label}", len(settings), "setting") as bar:
                points, times = throughput.sweep(model, self.text.prompts(SWEEP_PROMPTS), new, bar.advance)
            return {"report": points, "timing": times, "never": list(model.generation_config.eos_token_ids or [])}

        found = self._part("throughput", {"settings": settings, "new_tokens": new}, measure)
        self.never = found["never"]
        return found["report"], found["timing"]

    def task(self, name: str) -> list[dict[str, Any]]:
        """The numbers of one lm-eval task."""
        return self._asked(name, {})["lines"]

    def task_curve(self, name: str, new_tokens: int) -> list[dict[str, Any]]:
        """The same task, its answers of up to `new_tokens` tokens written at every setting of the sweep."""
        return [
            {"name": throughput.setting_name(setting), "setting": setting, **self._asked(name, setting)}
            for setting in throughput.settings(new_tokens)
        ]

    def _asked(self, name: str, decoding: dict[str, Any]) -> dict[str, Any]:
        from . import task_scores

        settings, suffix = self.settings, f", {throughput.setting_name(decoding)}" if decoding else ""

        def measure() -> dict[str, Any]:
            model, tokenizer = self.load()
            self.console.step(f"{name}: {self.label}{suffix}")
            answers = task_scores.diffusion_answers(
                model, tokenizer, likelihood=settings.likelihood, mc_num=settings.mc_num, seed=settings.seed,
                batch_size=settings.batch_size, **decoding,
            )  # fmt: skip
            lines = task_scores.score(answers, name, **settings.protocol)
            return {"report": {"lines": lines, "tokens_per_forward": answers.tokens_per_forward}}

        decides = {"likelihood": settings.likelihood, "mc_num": settings.mc_num, "protocol": settings.protocol_key}
        # A task has a text of its own.
        decides |= {"model": self.fingerprint, "decoding": decoding, **_task_key(name)}
        return self.parts.get(f"task-{Path(name).stem}", decides, measure)["report"]


def _task_key(name: str) -> dict[str, Any]:
    """What decides a task: its name, and where that is a file, what is in it."""
    path = Path(name)
    return {"task": name, "file": path.read_text(encoding="utf-8") if path.suffix in (".yaml", ".yml") else None}


class Parent:
    """
    The AR parent under measurement.

    Args:
        path (`Path`): its folder.
        name (`str`): its name in the report.
        sha256 (`str`): of its files.
        text, parts, models, settings, console: as for [`Subject`].
    """

    def __init__(self, path: Path, name: str, sha256: str, text: Text, parts: Parts, models: OneModel, settings: Any,
                 console: Console):  # fmt: skip
        self.path, self.name, self.sha256, self.text, self.parts = path, name, sha256, text, parts
        self.models, self.settings, self.console = models, settings, console

    def load(self) -> Any:
        """The model."""
        from .surgery import load_parent

        return self.models.get(
            self.sha256,
            lambda: load_parent(self.path, self.settings.trust_remote_code, dtype="auto").to(self.settings.device),
        )

    def _part(self, name: str, decides: dict[str, Any], measure: Callable[[], Any], label: str, total: int, unit: str):
        def timed() -> dict[str, Any]:
            model = self.load()
            with self.console.progress(f"{label} of the parent", total, unit) as bar:
                return measure(model, bar)

        decides = decides | {"model": self.sha256, "rows": self.text.fingerprint}
        return self.parts.get(f"parent-{name}", decides, timed)

    def row_nlls(self) -> list[float]:
        """The NLL of every row, in nats."""
        rows, batch_size = self.text.rows, self.settings.batch_size
        return self._part(
            "nll", {},
            lambda model, bar: {
                "report": evaluate.row_nlls(model, rows, batch_size=batch_size, advance=bar.advance)
            },
            "NLL", len(rows), "row",
        )["report"]  # fmt: skip

    def infilling(self, asked: list[dict[str, Any]]) -> list[list[list[int]]]:
        """What the parent writes where the gaps are, for each entry of [`Subject.infilling`]."""
        places = [[Gap(**gap) for gap in entry["gaps"]] for entry in asked]

        def measure(model: Any, bar: Any) -> dict[str, Any]:
            return {
                "report": [
                    continue_before_gaps(
                        model, self.text.rows, gaps, never=entry["never"], batch_size=self.settings.batch_size,
                        advance=bar.advance,
                    )
                    for entry, gaps in zip(asked, places, strict=True)
                ]
            }  # fmt: skip

        decides = {"gaps": digest([entry["gaps"] for entry in asked])}
        return self._part("infilling", decides, measure, "infilling", sum(map(len, places)), "gap")["report"]

    def samples(self, count: int, new: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Continuations of the same prompts at the same temperature."""
        prompts = self.text.prompts(count)

        def measure(model: Any, bar: Any) -> dict[str, Any]:
            texts = []
            for number, ids in enumerate(prompts.to(model.device)):
                set_seed(self.settings.seed + number)
                written = model.generate(
                    ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=new, do_sample=True,
                    temperature=TEMPERATURE, pad_token_id=0,
                )  # fmt: skip
                texts.append(tokenizer.decode(written[0, len(ids) :].tolist(), skip_special_tokens=True))
                bar.advance()
            return {"report": texts}

        decides = {"samples": len(prompts), "new_tokens": new, "temperature": TEMPERATURE}
        return self._part("samples", decides, measure, "samples", len(prompts), "text")["report"]

    def speed(self, new: int, never: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its own greedy texts, and this machine's time."""
        prompts = self.text.prompts(SWEEP_PROMPTS)

        def measure(model: Any, bar: Any) -> dict[str, Any]:
            point, times = throughput.parent_speed(model, prompts, new, never)
            point |= throughput.judge(model, point.pop("sequences"), self.text.prompt)
            return {"report": point, "timing": times}

        found = self._part("throughput", {"new_tokens": new, "never": never}, measure, "throughput", 1, "setting")
        return found["report"], found["timing"]

    def judged(self, points: list[dict[str, Any]]) -> list[dict[str, float]]:
        """The parent's NLL of the texts of a sweep."""

        def measure(model: Any, bar: Any) -> dict[str, Any]:
            return {"report": [throughput.judge(model, point["sequences"], self.text.prompt) for point in points]}

        decides = {"sequences": digest([point["sequences"] for point in points])}
        return self._part("judged", decides, measure, "opinion", len(points), "text")["report"]

    def task(self, name: str) -> list[dict[str, Any]]:
        """The numbers of one lm-eval task."""
        from . import task_scores
        from .surgery import load_tokenizer

        def measure() -> dict[str, Any]:
            model = self.load()
            self.console.step(f"{name}: the parent {self.name}")
            tokenizer = load_tokenizer(self.path, self.settings.trust_remote_code)
            answers = task_scores.parent_answers(model, tokenizer, batch_size=self.settings.batch_size)
            return {"report": task_scores.score(answers, name, **self.settings.protocol)}

        decides = {"protocol": self.settings.protocol_key, "model": self.sha256, **_task_key(name)}
        return self.parts.get(f"parent-task-{Path(name).stem}", decides, measure)["report"]
