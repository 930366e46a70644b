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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .console import Console, size
from .conversion_settings import ConversionSettings
from .data import Rows, read_rows
from .errors import A2DError, BadInput, GateFailed, Refused, SaveFailed
from .run_directory import RunDirectory
from .source import Source, inspect_source, locate, read_config


# A few hundred rows say enough to see whether training works; `a2d eval` measures all of them.
QUICK_EVAL_TOKENS = 8192
# What a conversion does to a capability that nobody would guess; told, and kept in the manifest.
CAVEATS = {
    "pos.alibi": "ALiBi scores a key by where it stands, not by its distance: once attention is open, each position "
    "favours the keys furthest to the right until training corrects it.",
}


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
        rows = read_rows(settings.data)
        _same_data(run, rows.sha256)
    provenance = _fingerprint(run, source, console)

    from .provenance import hardware, library_versions

    caveats = [CAVEATS[tag] for tag in capabilities if tag in CAVEATS]
    for caveat in caveats:
        console.warn(caveat)
    run.update(source=provenance, capabilities=capabilities, caveats=caveats)
    run.update(versions=library_versions(), hardware=hardware())
    with _own_progress_only():
        _operate(run, settings, source, rows, console)


def _operate(
    run: RunDirectory, settings: ConversionSettings, source: Source, rows: Rows | None, console: Console
) -> None:
    """Converts in memory, proves it, saves `model/`."""
    from . import evaluate, surgery
    from .provenance import checkpoint_manifest

    operation = surgery.operate(source, settings)
    mask = operation.model.mask_token.to_dict()
    data = None
    if rows is not None:
        from .training_run import adapter_config, prepare_data

        adapter_config(settings, operation.model)  # names layers that are not there before anything is written
        data = prepare_data(rows, operation.tokenizer, settings, operation.model.config.max_position_embeddings)
    parameters = sum(parameter.numel() for parameter in operation.parent.parameters())
    console.note(f"{source.config['model_type']}, {parameters:,} parameters, {size(source.bytes)}")
    console.note(
        f"mask token {mask['token']} with id {mask['id']} ({mask['strategy'].replace('_', ' ')}), "
        f"{mask['rows_before']} to {mask['rows_after']} embedding rows"
    )
    for note in data.facts["notes"] if data else ():
        console.warn(note)
    results: dict[str, Any] = {}
    if data and data.held_out:
        # Before the gates: the identity gate grows the parent's embeddings to compare like with like.
        nll = evaluate.autoregressive_nll(operation.parent, evaluate.usable_rows(data.held_out, QUICK_EVAL_TOKENS))
        console.note(f"NLL of the parent on held-out text: {nll}")
        results["parent_nll"] = nll.to_dict()

    console.step("Gates")
    gates = surgery.prove(operation, settings.seed, lambda result: _show_gate(result, run, console))
    run.update(mask_token=mask, gates=gates, parameters=parameters, results=results)
    failed = [gate for gate in gates.values() if not gate["passed"]]
    if failed:
        raise GateFailed(f"The {failed[0]['name']} gate failed: {failed[0]['message']} Nothing was trained or saved.")
    del operation.parent

    if data and data.held_out:
        results["nelbo_before"] = _nelbo("before", operation.model, data.held_out, settings, console)
    run.update(results=results, data=data.facts if data else None, training=None)
    console.step(f"Saving {run.model_path}")
    if data:
        from .training_run import write_held_out

        write_held_out(run, data.held_out)
    surgery.save_checkpoint(
        run.model_path, operation.model, operation.tokenizer, operation.dtypes, checkpoint_manifest(run.manifest)
    )
    run.update(stage="converted")
    run.event("model_saved", path="model", trained=False)


def _detect(settings: ConversionSettings) -> list[str]:
    """The capabilities that detect finds in the parent; refuses what does not convert."""
    from .detection import detect

    path, name = locate(settings.source)
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
    if found.text_only:
        raise Refused(f"{name} is multimodal: this version does not take its text model out of it.")
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
        rows = read_rows(settings.data)
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
    from . import surgery, training_run
    from .modeling.modeling_a2d import A2DForMaskedDiffusion
    from .provenance import checkpoint_manifest

    tokenizer = surgery.load_tokenizer(run.model_path, settings.trust_remote_code)
    model = A2DForMaskedDiffusion.from_pretrained(
        run.model_path, dtype="auto", trust_remote_code=settings.trust_remote_code
    )
    dtypes = surgery.parameter_dtypes(model)
    model.float()
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
