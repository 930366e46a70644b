"""`convert` and `resume`: a parent in, a run directory out, whatever happens on the way.

Owns the order of a run and what each of its stages leaves behind. A run is always in one of these stages, and the
manifest says which:

    started     nothing but the manifest; a resume begins at the beginning
    converted   the gates have passed and model/ holds the untrained conversion; a resume goes on from the last
                complete checkpoint of the training, or from model/ where there is none
    trained     model/ holds the trained one

A stage ends with one atomic manifest update after its files are complete, so a kill at any moment leaves a run that
`resume` continues to the same bytes. Training starts from the files in model/, never from the objects that were saved
there: that is what makes an unbroken run and a resumed one equal.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .console import Console, size
from .conversion_settings import ConversionSettings
from .data import Rows
from .data_reading import read_data
from .errors import A2DError, BadInput, GateFailed, Refused, SaveFailed
from .run_directory import RunDirectory
from .source import Source, inspect_source, locate, read_config


# Where a parent that is no plain checkpoint is brought into shape; removed when the surgery has read it.
STAGING = ".ingest"
# A few hundred rows say enough to see whether training works; `a2d eval` measures all of them.
QUICK_EVAL_TOKENS = 8192


def convert(
    source: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    console: Console | None = None,
    **settings: Any,
) -> RunDirectory:
    """
    Converts an autoregressive checkpoint into a diffusion model, proves it, and with `data` trains it.

    Args:
        source (`str` or `Path`): the parent: a folder, or a Hub id in the local cache.
        out (`str` or `Path`): the run directory to make; must be absent or empty.
        data (`str` or `Path`, *optional*): what to train on: a file or a Hub data set.
        console ([`~console.Console`], *optional*): where progress is shown.
        settings: further fields of [`ConversionSettings`]: `objective`, `token_shift`, `sliding_window`, `max_steps`,
            `epochs`, `batch_size`, `learning_rate`, `max_length`, `seed`, `trust_remote_code`, ...

    Returns:
        [`RunDirectory`]: the finished run; `run.model_path` is the checkpoint.

    Raises:
        [`BadInput`]: something that was passed cannot be used; nothing has been written.
        [`Refused`]: the model is of a kind that does not convert; nothing has been written.
        [`GateFailed`]: the conversion is not exact; nothing has been trained, and only the manifest says so.

    Example:

    ```python
    >>> from a2d_hf import convert

    >>> run = convert("Qwen/Qwen3-0.6B", "runs/qwen3", data="stories.txt", max_steps=1000)
    >>> run.manifest["results"]["nelbo_after"]
    ```
    """
    local = Path(source).expanduser()
    file = None if data is None else Path(data).expanduser()
    choices = ConversionSettings(
        source=str(local.resolve()) if local.exists() else str(source),
        data=None if data is None else str(file.resolve()) if file.exists() else str(data),
        **settings,
    )
    out = Path(out).expanduser()
    RunDirectory.check_free(out)
    run = RunDirectory.create(out, kind="conversion", stage="started", error=None, config=choices.to_dict())
    try:
        return _run(run, console or Console())
    except (BadInput, Refused):
        # Before the gates nothing but the manifest is there, and a run that cannot begin should leave no trace.
        if run.manifest["stage"] == "started" and "gates" not in run.manifest:
            run.discard()
        raise


def resume(path: str | Path, *, console: Console | None = None) -> RunDirectory:
    """
    Continues a run that was interrupted, killed, or failed for want of disk space; to the same weights as if nothing
    had happened. A run that is complete is left alone.

    Args:
        path (`str` or `Path`): the run directory.
        console ([`~console.Console`], *optional*): where progress is shown.

    Returns:
        [`RunDirectory`]
    """
    console = console or Console()
    run = RunDirectory.open(Path(path).expanduser())
    if run.manifest.get("kind") != "conversion":
        raise BadInput(f"RUN {path} is not a conversion: only those can be resumed.")
    if run.status == "completed":
        console.line(f"{run.path} is complete already.")
        return run
    run.take()
    run.update(status="running", error=None)
    run.event("run_resumed", stage=run.manifest["stage"])
    return _run(run, console)


def _run(run: RunDirectory, console: Console) -> RunDirectory:
    """Brings a run, taken by this process, from whatever stage it is in to its end."""
    try:
        _stages(run, console)
        run.finish("completed")
    except KeyboardInterrupt as stop:
        _note_end(run, "interrupted", None)
        message = f"interrupted; continue with `a2d resume {run.path}`."
        raise KeyboardInterrupt(str(stop) or message) from stop
    except A2DError as error:
        _note_end(run, "failed", str(error))
        raise
    except Exception as error:
        _note_end(run, "failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        run.release()
    return run


def _note_end(run: RunDirectory, status: str, error: str | None) -> None:
    try:
        run.finish(status, error)
    except SaveFailed:
        pass  # the disk is full: the run reads as interrupted, which it is, and the first error is the one to show


def _stages(run: RunDirectory, console: Console) -> None:
    settings = ConversionSettings(**run.manifest["config"])
    if run.manifest["stage"] == "started":
        _convert(run, settings, console)
    if settings.data is not None and run.manifest["stage"] == "converted":
        _train(run, settings, console)


# ------------------------------------------------------------------------------------------------------ stage: started


def _convert(run: RunDirectory, settings: ConversionSettings, console: Console) -> None:
    """Checks the input, as far as that goes without torch, which takes seconds to import; then operates."""
    console.step(f"Reading {settings.source}")
    capabilities = _detect(settings)
    source = inspect_source(settings.source)
    rows = None
    if settings.data is not None:
        rows = read_data(settings.data, seed=settings.seed)
        _same_data(run, rows.sha256)
    started = time.monotonic()
    provenance = _fingerprint(run, source, console)
    run.update(seconds={"hash": round(time.monotonic() - started, 2)})

    from .ingest import discard, prepared_source
    from .provenance import hardware, library_versions

    run.update(source=provenance, capabilities=capabilities)
    run.update(versions=library_versions(), hardware=hardware())
    # Weights that are not those of a plain text model in safetensors are normalised first, into a folder of the run's.
    staging = run.path / STAGING
    try:
        with _own_progress_only():
            source, ingest = prepared_source(source, staging, console, trust_remote_code=settings.trust_remote_code)
            run.update(ingest=ingest)
            _operate(run, settings, source, rows, console)
    finally:
        discard(staging)


def _operate(
    run: RunDirectory, settings: ConversionSettings, source: Source, rows: Rows | None, console: Console
) -> None:
    """Writes the conversion, proves it, and only then lets it appear as `model/`."""
    from . import surgery
    from .atomic_files import replaced_folder
    from .machine_memory import peak_memory
    from .provenance import checkpoint_manifest

    console.step(f"Writing {run.model_path}")
    with replaced_folder(run.model_path) as folder:
        operation = surgery.operate(source, settings, folder, console)
        if "pos.alibi" in run.manifest["capabilities"] and not operation.description.alibi_layers:
            raise Refused(
                f"{source.name} adds its ALiBi bias in a way that is not known here: opened, it would favour the keys "
                "furthest to the right instead of the nearest."
            )
        mask = operation.mask_token.to_dict()
        data = None
        if rows is not None:
            from .training_run import adapter_config, prepare_data

            adapter_config(settings, operation.description)  # names layers that are not there before a gate is run
            context = operation.description.config.max_position_embeddings
            data = prepare_data(rows, operation.tokenizer, settings, context)
        console.note(f"{source.config['model_type']}, {operation.parameters:,} parameters, {size(source.bytes)}")
        console.note(
            f"mask token {mask['token']} with id {mask['id']} ({mask['strategy'].replace('_', ' ')}), "
            f"{mask['rows_before']} to {mask['rows_after']} embedding rows"
        )
        console.note(_what_became(operation.weights) + f" ({operation.seconds:.1f} s)")
        for note in data.facts["notes"] if data else ():
            console.warn(note)
        results, skipped = _measure_parent(operation, data, console)

        console.step("Gates" + ("" if operation.mode == "full" else " (streamed from disk)"))
        started = time.monotonic()
        gates = surgery.prove(operation, settings.seed, lambda result: _show_gate(result, run, console), console)
        run.update(
            mask_token=mask,
            weights=operation.weights,
            gates=gates,
            parameters=operation.parameters,
            results=results,
            skipped=skipped,
            seconds=run.manifest["seconds"]
            | {"surgery": round(operation.seconds, 2), "gates": round(time.monotonic() - started, 2)},
            peak_memory={"surgery": operation.peak_memory, "gates": peak_memory()},
        )
        failed = [gate for gate in gates.values() if not gate["passed"]]
        if failed:
            message = f"The {failed[0]['name']} gate failed: {failed[0]['message']}"
            raise GateFailed(f"{message} Nothing was trained or saved.")
        operation.parent = None

        if operation.model is not None and data and data.held_out:
            results["nelbo_before"] = _nelbo("before", operation.model, data.held_out, settings, console)
        run.update(results=results, data=data.facts if data else None, training=None)
        if data:
            from .training_run import write_held_out

            write_held_out(run, data.held_out)
        surgery.finish_checkpoint(operation, checkpoint_manifest(run.manifest))
    run.update(stage="converted")
    run.event("model_saved", path="model", trained=False)


def _what_became(weights: dict[str, Any]) -> str:
    """What was done with the weight files, as people say it."""
    counts = Counter(weights["files"].values())
    files = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    return f"weight files: {files}; {weights.get('tensors_identical', 0)} of {weights['tensors']} tensors untouched"


def _measure_parent(operation: Any, data: Any, console: Console) -> tuple[dict[str, Any], dict[str, str]]:
    """What is measured before the gates, which grow the parent's embeddings to compare like with like; or why not."""
    from . import evaluate

    if not data or not data.held_out:
        return {}, {}
    if operation.parent is None:
        reason = "the weights are proven from disk, layer by layer: the whole model was never in memory"
        console.warn(f"NLL of the parent and NELBO before training are not measured: {reason}.")
        return {}, dict.fromkeys(("parent_nll", "nelbo_before"), reason)
    nll = evaluate.autoregressive_nll(operation.parent, evaluate.usable_rows(data.held_out, QUICK_EVAL_TOKENS))
    console.note(f"NLL of the parent on held-out text: {nll}")
    return {"parent_nll": nll.to_dict()}, {}


def _detect(settings: ConversionSettings) -> list[str]:
    """The capabilities that detect finds in the parent; refuses what does not convert."""
    from .detection import detect

    path, name = locate(settings.source, download=settings.download)
    read_config(path)
    found = detect(path)
    reasons = [reason for reason in found.reasons if reason.code != "code.remote" or not settings.trust_remote_code]
    if reasons:
        kind = BadInput if found.bad_input else Refused
        hint = " Read that code, then pass --trust-remote-code." if reasons[0].code == "code.remote" else ""
        raise kind(f"{name} does not convert: {reasons[0].message}{hint}")
    if found.verdict == "hybrid" and not settings.allow_hybrid:
        raise Refused(
            f"{name} is a hybrid, {found.layers.sentence()}: pass --allow-hybrid to convert it all the same."
        )
    return list(found.capabilities)


def _fingerprint(run: RunDirectory, source: Source, console: Console) -> dict[str, Any]:
    """The source's name and hash; a resumed run must find the bytes it began with."""
    with console.progress("hashing the parent", source.bytes, "byte") as bar:
        provenance = {
            "path": str(source.path),
            "name": source.name,
            "model_type": source.config["model_type"],
            "licence": source.licence,
            **source.fingerprint(bar.advance),
        }
    before = run.manifest.get("source")
    if before is not None and before["sha256"] != provenance["sha256"]:
        raise Refused(f"{source.path} has changed since this run began: restore it, or start a new run.")
    return provenance


def _same_data(run: RunDirectory, sha256: str) -> None:
    before = run.manifest.get("data")
    if before is not None and before["sha256"] != sha256:
        raise Refused("The data has changed since this run began: restore it, or start a new run.")


def _show_gate(result: Any, run: RunDirectory, console: Console) -> None:
    run.event("gate", **result.to_dict())
    show = console.passed if result.passed else console.failed
    show(f"{result.name:<9} {result.message}")


# ---------------------------------------------------------------------------------------------------- stage: converted


def _train(run: RunDirectory, settings: ConversionSettings, console: Console) -> None:
    """Trains what stands in `model/` and puts the trained model in its place."""
    manifest = json.loads((run.model_path / "a2d_manifest.json").read_text(encoding="utf-8"))
    if manifest["training"] is None:
        console.step(f"Training on {settings.data}")
        rows = read_data(settings.data, seed=settings.seed)
        _same_data(run, rows.sha256)
        with _own_progress_only():
            _train_on(rows, run, settings, console)
    else:
        # Killed between the exchange of the folders and the update of the run's manifest.
        run.update(training=manifest["training"], results=manifest["results"])
    run.update(stage="trained")
    run.event("model_saved", path="model", trained=True)


def _train_on(rows: Rows, run: RunDirectory, settings: ConversionSettings, console: Console) -> None:
    """Trains, measures and saves."""
    import torch

    from . import surgery, training_run
    from .ingest import stored_dtypes
    from .modeling.modeling_a2d import A2DForMaskedDiffusion
    from .provenance import checkpoint_manifest

    tokenizer = surgery.load_tokenizer(run.model_path, settings.trust_remote_code)
    model = A2DForMaskedDiffusion.from_pretrained(
        run.model_path, dtype=torch.float32, trust_remote_code=settings.trust_remote_code
    )
    dtypes = stored_dtypes(inspect_source(run.model_path), model.backbone)
    data = training_run.prepare_data(rows, tokenizer, settings, model.config.max_position_embeddings)
    facts = training_run.train(run, settings, model, tokenizer, data, console)
    # What is measured is what is stored: the parent's own precision.
    surgery.restore_dtypes(model, dtypes)
    model.float()
    results = run.manifest["results"]
    if data.held_out:
        results = results | {"nelbo_after": _nelbo("after", model, data.held_out, settings, console)}
    run.update(training=facts, results=results)
    console.step(f"Saving {run.model_path}")
    surgery.save_checkpoint(run.model_path, model, tokenizer, dtypes, checkpoint_manifest(run.manifest))


def _nelbo(
    when: str, model: Any, held_out: list[dict[str, list[int]]], settings: ConversionSettings, console: Console
) -> dict[str, Any]:
    """The NELBO on the first held-out rows, `before` or `after` training."""
    from . import evaluate

    rows = evaluate.usable_rows(held_out, QUICK_EVAL_TOKENS)
    with console.progress(f"NELBO {when} training", evaluate.MC_SAMPLES * len(rows), "sequence") as bar:
        found = evaluate.diffusion_nelbo(model, rows, seed=settings.seed, advance=bar.advance)
    console.note(f"NELBO {when} training: {found} (an upper bound)")
    return found.to_dict()


@contextmanager
def _own_progress_only() -> Iterator[None]:
    """Inside the block, our progress bars stand for those of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
