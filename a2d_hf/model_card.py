"""The model card of a converted checkpoint, and the upload of a checkpoint with its card.

Owns the text of `README.md` in a checkpoint folder. Everything it says comes from the checkpoint's manifest: no claim
without a number behind it, and the parent's licence named or said to be unknown.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData

from .atomic_files import write_text
from .errors import BadInput


TAGS = ["a2d", "diffusion-language-model", "masked-diffusion"]
LOAD_SNIPPET = """```python
import a2d_hf  # or, without this package: pass trust_remote_code=True below
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.batch_decode(model.diffusion_generate(**inputs, max_new_tokens=64))[0])
```"""


def write_model_card(folder: Path, manifest: dict[str, Any]) -> None:
    """
    Writes `README.md` of a converted checkpoint.

    Args:
        folder (`Path`): the checkpoint.
        manifest (`dict`): its `a2d_manifest.json`.
    """
    write_text(folder / "README.md", model_card(manifest))


def model_card(manifest: dict[str, Any]) -> str:
    """The text of the card. See [`write_model_card`]."""
    source, config, training = manifest["source"], manifest["config"], manifest["training"]
    on_hub = "/" in source["name"]
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, config["objective"]],
        base_model=source["name"] if on_hub else None,
        license=source["licence"],
        ignore_metadata_errors=True,
    ).to_yaml()
    parts = [f"---\n{header}\n---", f"# {source['name']}, converted to a diffusion language model"]
    trained = (
        f"and trained for {training['steps']:,} steps" if training else "and not yet trained: it will not write text"
    )
    parts.append(
        f"This is [{source['name']}](https://huggingface.co/{source['name']})"
        if on_hub
        else f"This is `{source['name']}`"
    )
    kind, sight = "masked diffusion", "Every position sees every other"
    if config["objective"] == "bd3lm":
        kind = f"block diffusion with blocks of {config['block_size']} tokens"
        sight = "Every position sees its block and those before it"
    parts[-1] += (
        f", an autoregressive language model of type `{source['model_type']}`, converted to {kind} "
        f"(`{config['objective']}`) with a2d_hf {manifest['a2d_hf_version']}, {trained}. {sight}; text is written by "
        "filling in mask tokens, several at a time."
    )
    parts.append("## Use\n\n" + LOAD_SNIPPET.format(folder="THIS_FOLDER_OR_REPO", prompt="Once upon a time"))
    parts.append("## What was proven\n\n" + _gates(manifest["gates"]))
    if manifest["results"]:
        parts.append("## Numbers\n\n" + _numbers(manifest))
    parts.append("## Conversion\n\n" + _conversion(manifest))
    parts.append("## Licence\n\n" + _licence(source))
    parts.append("## Caveats\n\n" + _caveats(manifest))
    return "\n\n".join(parts) + "\n"


def _gates(gates: dict[str, Any]) -> str:
    rows = [f"| {name} | {'pass' if gate['passed'] else 'FAIL'} | {gate['message']} |" for name, gate in gates.items()]
    return "\n".join(["| gate | result | measured before training |", "|---|---|---|", *rows])


def _numbers(manifest: dict[str, Any]) -> str:
    labels = {
        "parent_nll": "NLL of the autoregressive parent",
        "nelbo_before": "NELBO before training (an upper bound on the NLL)",
        "nelbo_after": "NELBO after training (an upper bound on the NLL)",
    }
    rows = []
    for name, label in labels.items():
        value = manifest["results"].get(name)
        if value is not None:
            error = "" if value["standard_error"] is None else f" ± {value['standard_error']:.3f}"
            rows.append(f"| {label} | {value['nats_per_token']:.3f}{error} | {value['tokens']:,} |")
    head = ["| on held-out text | nats per token | tokens |", "|---|---|---|"]
    return "\n".join([*head, *rows])


def _conversion(manifest: dict[str, Any]) -> str:
    config, mask, data, training = (manifest[name] for name in ("config", "mask_token", "data", "training"))
    lines = [
        f"- parent's files: sha256 `{manifest['source']['sha256']}` over {len(manifest['source']['files'])} files",
        f"- objective `{config['objective']}`, token_shift `{config['token_shift']}`, "
        f"sliding_window `{config['sliding_window']}`",
        f"- mask token {mask['id']} (`{mask['token'] or 'no text of its own'}`, {mask['strategy']}); embedding rows "
        f"{mask['rows_before']} to {mask['rows_after']}",
    ]
    if data:
        lines.append(
            f"- data: `{data['name']}`, sha256 `{data['sha256']}`, {data['train']['rows']:,} rows trained on"
            + (f", {data['held_out']['rows']:,} held out" if data["held_out"] else "")
        )
    if training:
        lines.append(
            f"- training: {training['steps']:,} steps of {training['rows_per_step']} rows of at most "
            f"{training['max_length']} tokens, learning rate {training['learning_rate']:g}, seed {config['seed']}"
            + (f", LoRA of rank {training['adapter']['r']}, merged" if "adapter" in training else "")
        )
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    lines.append(f"- made with {versions}")
    return "\n".join(lines)


def _licence(source: dict[str, Any]) -> str:
    if source["licence"]:
        return f"The parent's licence, `{source['licence']}`, holds for these weights too."
    return (
        "The parent's folder does not state its licence. Its terms hold for these weights too: look them up before "
        "you pass them on."
    )


def _caveats(manifest: dict[str, Any]) -> str:
    lines = [
        "- A NELBO is an upper bound on the negative log-likelihood, not a perplexity: a parent's NLL of the same "
        "size means the parent is at least as good, not that both are equal.",
        "- What the parent got wrong or learned from its data, the conversion inherits.",
    ]
    if not manifest["training"]:
        lines.insert(0, "- Untrained: only attention and the mask token differ from the parent. Train it before use.")
    return "\n".join(lines)


def push_checkpoint(
    folder: Path, repo_id: str, *, private: bool | None = None, token: str | None = None, message: str | None = None
) -> str:
    """
    Uploads a converted checkpoint, card, code, tokenizer and all, to the Hugging Face Hub.

    Args:
        folder (`Path`): a converted checkpoint as `a2d convert` leaves it.
        repo_id (`str`): `user/name`.
        private (`bool`, *optional*): whether a new repository is private.
        token (`str`, *optional*): a Hub token; the logged-in user's by default.
        message (`str`, *optional*): of the commit.

    Returns:
        `str`: the address of the commit.
    """
    missing = [name for name in ("config.json", "a2d_manifest.json", "README.md") if not (folder / name).is_file()]
    if missing:
        raise BadInput(f"{folder} is not a checkpoint that `a2d convert` wrote: it has no {missing[0]}.")
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        folder_path=folder, repo_id=repo.repo_id, commit_message=message or "Converted with a2d_hf"
    )
    return str(commit.commit_url)
