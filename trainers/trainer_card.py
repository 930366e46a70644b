"""The model card that lies beside every saved model.

Owns its text and the papers of the methods. Everything it says comes from the trainer's state: no number that was not
measured.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import accelerate
import datasets
import peft
import torch
import transformers
import trl
from accelerate.utils import is_peft_model
from huggingface_hub import ModelCardData

from .model_resolution import base_model


if TYPE_CHECKING:
    from .a2d_trainer import A2DTrainer


@dataclass(frozen=True)
class Paper:
    """
    Where a method comes from.

    Attributes:
        title (`str`): what to call it.
        id (`str`): its number on arXiv and on the Hub.
        citation (`str`): BibTeX.
    """

    title: str
    id: str
    citation: str


MDLM = Paper(
    "Simple and Effective Masked Diffusion Language Models",
    "2406.07524",
    """@inproceedings{sahoo2024simple,
  title     = {Simple and Effective Masked Diffusion Language Models},
  author    = {Sahoo, Subham Sekhar and Arriola, Marianne and Schiff, Yair and Gokaslan, Aaron and Marroquin, Edgar and
               Chiu, Justin T. and Rush, Alexander and Kuleshov, Volodymyr},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  url       = {https://arxiv.org/abs/2406.07524}
}""",
)
BD3LM = Paper(
    "Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models",
    "2503.09573",
    """@inproceedings{arriola2025block,
  title     = {Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models},
  author    = {Arriola, Marianne and Gokaslan, Aaron and Chiu, Justin T. and Yang, Zhihan and Qi, Zhixuan and
               Han, Jiaqi and Sahoo, Subham Sekhar and Kuleshov, Volodymyr},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2503.09573}
}""",
)
REPALIGN = Paper(
    "masked diffusion with representation alignment (Repr-Align)",
    "2605.06885",
    """@misc{arxiv2605.06885,
  howpublished = {arXiv:2605.06885},
  year         = {2026},
  url          = {https://arxiv.org/abs/2605.06885}
}""",
)

TAGS = ["a2d", "diffusion-language-model", "masked-diffusion", "generated_from_trainer"]
_USE = """```python
import a2d_hf
from transformers import AutoTokenizer

{load}
tokenizer = AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.batch_decode(model.diffusion_generate(**inputs, max_new_tokens=64))[0])
```"""


def trainer_card(
    trainer: "A2DTrainer",
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
) -> str:
    """
    The text of the card of a model in training.

    Args:
        trainer ([`A2DTrainer`]): its trainer.
        model_name (`str`, *optional*): what to call the model; by default after the output folder.
        dataset_name (`str` or `list[str]`, *optional*): what it was trained on.
        tags (`str` or `list[str]`, *optional*): further tags.
    """
    args, adapter = trainer.args, is_peft_model(trainer.model)
    config = base_model(trainer.model).config
    name = model_name or args.hub_model_id or str(args.output_dir).rstrip("/").rsplit("/", 1)[-1]
    parent = base_model(trainer.model).name_or_path
    on_hub = bool(parent) and parent.count("/") <= 1 and not os.path.exists(parent)
    header = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=parent if on_hub else None,
        datasets=dataset_name,
        model_name=name,
        tags=sorted({*TAGS, config.objective, *([tags] if isinstance(tags, str) else tags or [])}),
        ignore_metadata_errors=True,
    ).to_yaml()
    source = f"[{parent}](https://huggingface.co/{parent})" if on_hub else f"a `{config.text_config.model_type}` model"
    paper = trainer.paper
    load = 'model = AutoModel.from_pretrained("{folder}")'.replace("{folder}", "THIS_FOLDER_OR_REPO")
    use = _USE.format(folder="THIS_FOLDER_OR_REPO", load=load).replace("AutoTokenizer\n", "AutoModel, AutoTokenizer\n")
    if adapter:
        load = 'model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER_OR_REPO")'
        use = _USE.format(folder="THIS_FOLDER_OR_REPO", load=load).replace(
            "from transformers", "from peft import AutoPeftModelForCausalLM\nfrom transformers"
        )
    parts = [
        f"---\n{header}\n---",
        f"# {name}",
        f"A diffusion language model made of {source} and trained with `{type(trainer).__name__}` of a2d_hf, by "
        f"[{paper.title}](https://huggingface.co/papers/{paper.id}). Text is written by filling in mask tokens, "
        "several at a time.",
        f"## Use\n\n{use}",
        f"## Training\n\n{_training(trainer)}",
        f"## Versions\n\n{_versions()}",
        f"## Citation\n\n```bibtex\n{paper.citation}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _training(trainer: "A2DTrainer") -> str:
    args, state, config = trainer.args, trainer.state, base_model(trainer.model).config
    lines = [
        f"- step {state.global_step:,} of {state.max_steps:,}, {trainer.get_total_train_batch_size(args)} sequences "
        f"of at most {args.max_length} tokens a step{', packed' if args.packing else ''}",
        f"- {state.num_input_tokens_seen:,} tokens seen, learning rate {args.learning_rate:g}, seed {args.seed}",
        f"- objective `{config.objective}`, block size `{config.block_size}`, token_shift `{config.token_shift}`",
    ]
    measured = {}
    for entry in state.log_history:  # the last of each stands
        for key in ("nelbo", "eval_nelbo"):
            if key in entry:
                measured[key] = (entry[key], entry["step"])
    for key, label in (("nelbo", "in training"), ("eval_nelbo", "held out")):
        if key in measured:
            value, step = measured[key]
            lines.append(f"- NELBO {label}, at step {step:,}: {value:.4f} nats per token (an upper bound on the NLL)")
    if not measured:
        lines.append("- its NELBO has not been measured yet")
    return "\n".join(lines)


def _versions() -> str:
    modules = (transformers, torch, trl, peft, datasets, accelerate)
    return ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
