"""The quickstart's autoregressive parent: a text that every Python carries, a tokenizer and a small model of it.

Owns everything of the quickstart that comes before this project's own work. The parent is trained with plain
transformers and saved as an ordinary checkpoint: what follows knows nothing of how it was made. Reads the standard
library, writes only the folders it is asked to write.
"""

import hashlib
import pydoc_data.topics
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from .atomic_files import replaced_folder, write_text
from .console import Console, Progress


if TYPE_CHECKING:
    from datasets import Dataset

CONTEXT = 128  # tokens; about 300 characters of this text
HELD_OUT = 0.08  # share of the text that neither the parent nor its conversion is trained on
VOCABULARY = 1024
DRAWING = re.compile(r"\s*([*=~^_#-]{3,}\s*$|\+[-=+]{3,}|\|)")


@dataclass(frozen=True)
class ParentSize:
    """How big a parent to train and for how long. The defaults take about a minute on two cores."""

    hidden_size: int = 128
    layers: int = 4
    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 4e-3


def reference_text() -> str:
    """
    The Python language reference as `pydoc` carries it: its prose, grammar and examples, every paragraph once.

    Long topics repeat short ones (`compound` holds all of `if`, `for` and `with`); kept, they would put held-out
    paragraphs into the training part. Lines that only draw (underlines of headings, frames and rows of tables) are
    left out. Topics come in an order that is arbitrary and fixed: the end, which is held out, is like the rest.
    """
    seen: set[str] = set()
    unique: dict[str, str] = {}
    topics = pydoc_data.topics.topics
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        lines = [line.rstrip() for line in topics[name].splitlines() if not DRAWING.match(line)]
        kept = []
        for paragraph in re.split(r"\n\n+", "\n".join(lines)):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n"))
        if kept:
            unique[name] = "\n\n".join(kept)
    order = sorted(unique, key=lambda name: hashlib.sha256(name.encode()).hexdigest(), reverse=True)
    return "\n\n".join(unique[name] for name in order) + "\n"


def write_reference_text(path: Path) -> Path:
    """Writes [`reference_text`] and returns where."""
    write_text(path, reference_text())
    return path


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer that begins every text with `<s>`, as Llama's does.

    Args:
        text (`str`): what to learn the merges from; its held-out end is left out.

    Returns:
        `PreTrainedTokenizerFast`
    """
    lines = text.splitlines(keepends=True)
    lines = lines[: int(len(lines) * (1 - HELD_OUT))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


class _ShowProgress(TrainerCallback):
    def __init__(self, console: Console):
        self.console = console
        self.progress: Progress | None = None
        self.losses: list[tuple[int, float]] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.progress = self.console.progress("training the parent", state.max_steps)

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "loss" in logs:
            self.losses.append((state.global_step, float(logs["loss"])))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress.move_to(state.global_step, f"loss {self.losses[-1][1]:.3f}" if self.losses else "")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.progress.close()


def train_parent(
    target: Path,
    tokenizer: PreTrainedTokenizerFast,
    rows: "Dataset",
    size: ParentSize,
    *,
    seed: int,
    console: Console,
    scratch: Path,
) -> tuple[Qwen3ForCausalLM, list[tuple[int, float]]]:
    """
    Trains a small causal language model with [`~transformers.Trainer`] and saves it as an ordinary checkpoint.

    Args:
        target (`Path`): the checkpoint's folder, written at the end and at once.
        tokenizer (`PreTrainedTokenizerFast`): saved beside the weights.
        rows (`Dataset`): with `input_ids`.
        size ([`ParentSize`]): how big and for how long.
        seed (`int`): decides the weights and the order of the rows.
        console ([`Console`]): where progress is shown.
        scratch (`Path`): the trainer's working folder; nothing of use stays there.

    Returns:
        `tuple`: the model, and its training loss as (step, nats per token).
    """
    set_seed(seed)
    heads = size.hidden_size // 32
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.hidden_size * 3,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    watch = _ShowProgress(console)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(scratch),
            max_steps=size.steps,
            per_device_train_batch_size=size.batch_size,
            learning_rate=size.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=max(1, size.steps // 100),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
        ),
        train_dataset=rows.select_columns(["input_ids"]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        if watch.progress is not None:
            watch.progress.close()
    with replaced_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model.eval(), watch.losses
