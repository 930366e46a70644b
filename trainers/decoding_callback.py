"""Texts that a model in training writes, so that a person sees it learn.

Owns when fixed prompts are decoded and where the texts go. Leaves the training as it was: the random state and the
mode of the model are what they were before.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

from .a2d_trainer import A2DTrainer
from .model_resolution import base_model


FILE = "decoded.jsonl"


class DecodePromptsCallback(TrainerCallback):
    """
    Decodes fixed prompts during training. Every text goes into `decoded.jsonl` of the output folder, one line each
    with `step`, `prompt`, `text` and `tokens_per_forward`; into TensorBoard and Weights & Biases where `report_to`
    names them; and the mean of `tokens_per_forward` is logged as `decoded_tokens_per_forward`.

    Example:

    ```python
    >>> trainer = MDLMTrainer(...)
    >>> trainer.add_callback(DecodePromptsCallback(trainer, ["Once upon a time"], every_n_steps=100))
    ```

    Args:
        trainer ([`A2DTrainer`]): whose model writes.
        prompts (`list[str]` or `list[list[dict]]`): texts, or conversations for the chat template.
        every_n_steps (`int`, *optional*, defaults to `100`): also decodes at the last step.
        generation_config ([`~transformers.GenerationConfig`], *optional*): how to decode.
        kwargs: fields of [`A2DGenerationConfig`] over those, for example `max_new_tokens`. `seed` is 0 by default, so
            that the same model writes the same text.
    """

    def __init__(
        self,
        trainer: A2DTrainer,
        prompts: list[str] | list[list[dict[str, str]]],
        every_n_steps: int = 100,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ):
        if not prompts:
            raise ValueError("`prompts` is empty: pass at least one.")
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be positive, not {every_n_steps}.")
        if trainer.processing_class is None:
            raise ValueError("Decoding texts needs a tokenizer: pass `processing_class` to the trainer.")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "Sharded models (FSDP, DeepSpeed) cannot decode while they train: leave the callback out."
            )
        self.trainer = trainer
        self.prompts = prompts
        self.every_n_steps = every_n_steps
        self.generation_config = generation_config
        self.kwargs = {"max_new_tokens": 64, "seed": 0} if generation_config is None else {}
        self.kwargs |= kwargs

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Steps that a resumed run takes again are written again.
        path = Path(args.output_dir) / FILE
        if state.is_world_process_zero and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
            unfinished = path.with_name(f".{FILE}.writing")
            unfinished.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(unfinished, path)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every_n_steps and state.global_step != state.max_steps:
            return
        # One process writes; `log` is every process's.
        found = self.decode() if state.is_world_process_zero else []
        if found:
            self._write(Path(args.output_dir) / FILE, state.global_step, found)
            self._show(state.global_step, found)
            mean = sum(row["tokens_per_forward"] for row in found) / len(found)
            should_log = control.should_log
            self.trainer.log({"decoded_tokens_per_forward": mean})
            control.should_log = should_log  # `log` takes it back, and the trainer's own loss would not be logged

    def decode(self) -> list[dict[str, Any]]:
        """What the model writes now: `prompt`, `text` and `tokens_per_forward` of each prompt."""
        model, tokenizer = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.processing_class
        found = []
        with torch.no_grad(), undisturbed(model), self.trainer.compute_loss_context_manager():
            for prompt in self.prompts:
                text = prompt
                if not isinstance(prompt, str):
                    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
                # A template has written the special tokens already.
                inputs = tokenizer(text, return_tensors="pt", add_special_tokens=isinstance(prompt, str))
                inputs = {name: inputs[name].to(self.trainer.args.device) for name in ("input_ids", "attention_mask")}
                output = model.diffusion_generate(
                    **inputs,
                    generation_config=self.generation_config,
                    tokenizer=tokenizer,
                    return_dict_in_generate=True,
                    **self.kwargs,
                )
                new_ids = output.sequences[0, inputs["input_ids"].shape[1] :]
                found.append(
                    {
                        "prompt": text,
                        "text": tokenizer.decode(new_ids, skip_special_tokens=True),
                        "tokens_per_forward": float(output.tokens_per_forward[0]),
                    }
                )
        return found

    def _write(self, path: Path, step: int, found: list[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            for row in found:
                file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")

    def _show(self, step: int, found: list[dict[str, Any]]) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for i, row in enumerate(found):
                    # Markdown: a quote, and each line of it a line.
                    shown = f"**{row['prompt']}**{row['text']}".replace("\n", "  \n")
                    callback.tb_writer.add_text(f"decoded/{i}", shown, step)
            if isinstance(callback, WandbCallback) and callback._wandb is not None and callback._wandb.run is not None:
                rows = [[step, row["prompt"], row["text"], row["tokens_per_forward"]] for row in found]
                columns = ["step", "prompt", "text", "tokens_per_forward"]
                table = callback._wandb.Table(columns=columns, data=rows)
                callback._wandb.log({"decoded": table, "train/global_step": step})


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module):
    """The model in evaluation mode; afterwards its modes and every random state are what they were."""
    modes = {module: module.training for module in model.modules()}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        base_model(model).eval()
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
