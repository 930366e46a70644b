"""`a2d sample`: text from a converted model, drawn live where there is a terminal. Decoding is the model's own."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..console import Console, Progress
from ..conversion_settings import DEVICES
from ..data import explained_tokenizing
from ..decoding_settings import DecodingSettings, explain_flag, said_by, with_flags
from ..errors import BadInput


# For `--help`, which imports no library; the names themselves are in modeling/decoding_names_a2d.py, and so is the
# refusal of any other, which knows what other projects call them.
SELECTORS = "confidence, margin, entropy, random, threshold, entropy_bound"
REMASKING = "p2, remdm_cap, remdm_rescale, remdm_conf, remdm_loop"
SET_HELP = "any other field of A2DGenerationConfig, for example --set top_k=20; repeatable (docs/decoding.md)"
RANKINGS = ("likelihood", "confidence")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser of `a2d`."""
    parser = subparsers.add_parser(
        "sample",
        help="write text with a converted model",
        description="Continues each prompt by diffusion. Prompts come from -p (repeatable), --prompt-file (one per "
        "line), or standard input. With --infill they are texts with gaps, which are filled and nothing appended: "
        "[MASK] for one token, [MASK:8] for eight, [MASK:4-12] for the best length from four to twelve.",
    )
    parser.add_argument("path", metavar="RUN", help="run directory, or folder of a converted checkpoint")
    parser.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with one prompt per line")
    parser.add_argument(
        "--infill",
        action="append",
        nargs="?",
        const=None,
        metavar="TEXT",
        help='fill the gaps of TEXT, for example --infill "The [MASK:4] sat."; without TEXT, of the prompts',
    )
    parser.add_argument(
        "--length-by",
        choices=RANKINGS,
        help="how --infill ranks lengths: likelihood of the filled text (the default), or confidence while filling",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="most tokens to write (default: 128, or what fits)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="forward passes for all of them (default: one per token)"
    )
    parser.add_argument("--block-size", type=int, metavar="N", help="finish this many positions before the next ones")
    parser.add_argument("--selector", metavar="NAME", help=f"which positions a forward pass commits: {SELECTORS}")
    parser.add_argument(
        "--threshold", type=float, metavar="P", help="probability to commit from, with --selector threshold"
    )
    parser.add_argument(
        "--entropy-bound", type=float, metavar="NATS", help="dependence to ignore: --selector entropy_bound"
    )
    parser.add_argument(
        "--remasking", metavar="NAME", help=f"take back what was written, and write it again: {REMASKING}"
    )
    parser.add_argument(
        "--pipeline-depth", type=int, metavar="N", help="blocks open at once, with --threshold or --entropy-bound"
    )
    parser.add_argument(
        "--guidance-scale", type=float, metavar="S", help="lean on the prompt: above 1, two passes per step"
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what --guidance-scale moves away from")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token, above 0 samples")
    parser.add_argument("--set", action="append", metavar="FIELD=VALUE", help=SET_HELP)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first text; each further one adds 1")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to run")
    parser.add_argument("--trust-remote-code", action="store_true", help="for a parent that needs its own code")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a page that runs through the denoising (HTML)"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print a JSON list on stdout")
    shape.add_argument("--jsonl", action="store_true", help="print one JSON object per line, each when it is done")
    parser.set_defaults(run=run, explain_flag=explain_flag)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of a call, from the one place where they were given."""
    if args.prompt and args.prompt_file:
        raise BadInput("-p and --prompt-file exclude each other: give one of them.")
    texts = [text for text in args.infill or [] if text is not None]
    if texts and (args.prompt or args.prompt_file):
        raise BadInput("--infill has its text already: leave out -p and --prompt-file, or the text behind --infill.")
    if args.prompt or texts:
        return args.prompt or texts
    if args.prompt_file:
        try:
            text = args.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--prompt-file {args.prompt_file} cannot be read: {error}.") from error
        name = f"--prompt-file {args.prompt_file}"
    else:
        if sys.stdin is None or sys.stdin.isatty():
            raise BadInput('No prompt: give -p "text", --prompt-file FILE, or pipe text in.')
        text, name = sys.stdin.read(), "Standard input"
        if text.strip():
            return [text.rstrip("\n")]
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise BadInput(f'{name} holds no prompt: give -p "text", or a file with one prompt per line.')
    return prompts


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ..converted_model import find_converted

    found = find_converted(args.path)
    prompts = read_prompts(args)
    settings = DecodingSettings.of_checkpoint(found.path)
    settings.choose(with_flags(args.set, _flags(args)))
    _check(args, prompts, settings)
    as_json = args.json or args.jsonl
    console = Console(json_output=as_json)
    if found.manifest is not None and found.manifest["training"] is None:
        console.warn(f"{args.path} is converted but not trained: expect no sensible text.")
    model, tokenizer = found.load(args.device, args.trust_remote_code)
    options = dict(settings.chosen)
    record = settings.record()
    if args.negative_prompt is not None:
        with explained_tokenizing("--negative-prompt cannot be tokenized"):
            options["negative_prompt_ids"] = tokenizer(args.negative_prompt, return_tensors="pt").input_ids
        record["negative_prompt"] = args.negative_prompt
    if args.trace is not None:
        options["output_history"] = True
    # All of them before the first is decoded: a prompt that is refused costs nothing then.
    encoded = [] if args.infill is not None else [_encode(model, tokenizer, text, settings) for text in prompts]
    samples, denoisings = [], []
    with said_by(console):
        for number, prompt in enumerate(prompts):
            seed = args.seed + number
            if args.infill is not None:
                result, denoising = _infill(model, tokenizer, prompt, options, seed, args.length_by, console)
            else:
                title = f"text {number + 1} of {len(prompts)}"
                result, denoising = _sample(
                    model, tokenizer, prompt, encoded[number], options, seed, settings, title, console
                )
            result["settings"] = record
            samples.append(result)
            if denoising is not None:
                denoisings.append(denoising)
            if args.jsonl:
                print(json.dumps(result, ensure_ascii=False, allow_nan=False), file=console.out, flush=True)
            elif not args.json:
                _show(result, console, live=args.infill is None and console.out.isatty())
    if args.trace is not None:
        from ..denoising_trace import trace_page
        from ..report import write_page

        write_page(args.trace, trace_page(denoisings, found.name))
        console.note(f"the denoising: {args.trace}")
    if args.json:
        console.json(samples)
    return 0


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say that are fields of [`A2DGenerationConfig`] by themselves."""
    names = ("max_new_tokens", "steps", "block_size", "selector", "threshold", "entropy_bound", "remasking")
    flags = {name: vars(args)[name] for name in (*names, "pipeline_depth", "guidance_scale", "temperature")}
    if args.selector is None:  # a flag of its own asks for the selector, too
        flags["selector"] = next((name for name in ("threshold", "entropy_bound") if flags[name] is not None), None)
    return flags


def _check(args: argparse.Namespace, prompts: list[str], settings: DecodingSettings) -> None:
    """Refuses what does not go together, before anything is loaded."""
    if args.seed < 0:
        raise BadInput(f"--seed must be an integer of at least 0, not {args.seed}.")
    if args.infill is not None:
        from ..infilling import parse_gaps

        for flag, given in {
            "--max-new-tokens": settings.chosen.get("max_new_tokens"),
            "--negative-prompt": args.negative_prompt,
        }.items():
            if given is not None:
                raise BadInput(f"--infill appends nothing and keeps its prompt: leave out {flag}.")
        for name in ("self_speculation", "stop_strings"):
            if vars(settings.in_force())[name] is not None:
                raise BadInput(f"`{name}` is about continuing a text: leave it out to fill gaps with --infill.")
        for prompt in prompts:
            parse_gaps(prompt)
    elif args.length_by is not None:
        raise BadInput("--length-by is about gaps: give it with --infill.")
    if args.negative_prompt is not None and settings.in_force().guidance_scale in (None, 1):
        raise BadInput("--negative-prompt does nothing without guidance: give --guidance-scale, for example 2.")
    if args.trace is not None and (args.trace.is_dir() or not args.trace.resolve().parent.is_dir()):
        raise BadInput(f"--trace {args.trace} is no file in a folder that exists: give one, for example trace.html.")


def _encode(model: Any, tokenizer: Any, prompt: str, settings: DecodingSettings) -> Any:
    """The prompt as the model takes it, if it takes it."""
    from ..modeling.decoding_call_a2d import count_new_tokens

    with explained_tokenizing(f"The prompt {prompt!r} cannot be tokenized"):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    ids, context = inputs["input_ids"], model.config.max_position_embeddings
    start = prompt if len(prompt) <= 40 else f"{prompt[:40]}..."
    if context is not None and ids.shape[1] > context:
        raise BadInput(f"The prompt {start!r} has {ids.shape[1]} tokens, the model's context {context}: shorten it.")
    try:
        new = count_new_tokens(
            settings.in_force(), set(settings.chosen), ids, inputs.get("attention_mask", ids), model.config
        )
    except ValueError as error:  # names the field and what fits
        raise BadInput(str(error)) from error
    if new == 0 and not bool((ids == model.config.mask_token_id).any()):
        full = settings.in_force().max_new_tokens != 0
        why = f"the prompt {start!r} fills the model's context of {context}" if full else "`max_new_tokens` is 0"
        raise BadInput(
            f"Nothing to write, {why}: "
            + ("shorten it." if full else 'raise it, or fill a gap with --infill "The [MASK:4] sat."')
        )
    return inputs


class _Count:
    """A streamer that shows nothing but how far a text is."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def put(self, value: Any) -> None:
        """Text that is done; seen when all of it is."""

    def put_draft(self, value: Any, **kwargs: Any) -> None:
        """One more step of the decoding."""
        self.progress.advance()

    def end(self) -> None:
        """The bar is the caller's."""


def _sample(
    model: Any,
    tokenizer: Any,
    prompt: str,
    inputs: Any,
    options: dict[str, Any],
    seed: int,
    settings: DecodingSettings,
    title: str,
    console: Console,
) -> tuple[dict[str, Any], Any]:
    """What is reported of one text, and its picture if there is a history."""
    call = {**inputs, **options, "seed": seed, "tokenizer": tokenizer, "return_dict_in_generate": True}
    try:
        if not console.json_output and console.out.isatty():
            from ..live_draft import LiveDraft

            output = model.diffusion_generate(**call, streamer=LiveDraft(tokenizer, skip_special_tokens=True))
        else:
            config = settings.in_force()
            most = config.steps or config.max_new_tokens or config.max_length
            with console.progress(title, most, "step") as progress:
                output = model.diffusion_generate(**call, streamer=_Count(progress))
    except ValueError as error:  # the decoder names the argument and the fix; here it is a flag
        raise BadInput(str(error)) from error
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    # Decoded with the prompt and cut off again: alone, a tokenizer may drop the space before the first word.
    whole = tokenizer.decode(output.sequences[0], skip_special_tokens=True)
    start = tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    result = {
        "prompt": prompt,
        "completion": whole[len(start) :]
        if whole.startswith(start)
        else tokenizer.decode(new, skip_special_tokens=True),
        "text": whole,
        "seed": seed,
        "stop_reason": output.stop_reason[0],
        "num_forwards": output.num_forwards,
        "tokens_per_forward": round(float(output.tokens_per_forward[0]), 4),
    }
    if output.history is None:
        return result, None
    from ..quickstart_samples import denoising_of

    return result, denoising_of(output, tokenizer, prompt, model.config.mask_token_id)


def _infill(
    model: Any, tokenizer: Any, text: str, options: dict[str, Any], seed: int, length_by: str | None, console: Console
) -> tuple[dict[str, Any], Any]:
    """What is reported of a text whose gaps are filled, and its picture if there is a history."""
    from ..infilling import infill, parse_gaps

    pieces, lengths = parse_gaps(text)
    try:
        found = infill(model, tokenizer, pieces, lengths, rank_by=length_by or RANKINGS[0], seed=seed, **options)
    except ValueError as error:  # the decoder names the argument and the fix; here it is a flag
        raise BadInput(str(error)) from error
    for lengths_left_out, why in found.unseen.items():
        console.warn(f"length {' and '.join(map(str, lengths_left_out))} was not tried: {why}")
    result = {
        "prompt": text,
        "spans": found.spans,
        "lengths": list(found.lengths),
        "scores": [{"lengths": list(each), "nats_per_token": round(s, 4)} for each, s in found.scores.items()],
        "text": found.text,
        "seed": seed,
        "stop_reason": found.output.stop_reason[0],
        "num_forwards": found.num_forwards,
        "tokens_per_forward": round(float(found.output.tokens_per_forward[0]), 4),
    }
    history = found.output.history is not None
    return result, found.denoising(tokenizer, model.config.mask_token_id) if history else None


def _show(result: dict[str, Any], console: Console, live: bool) -> None:
    if not live:  # a terminal has seen the text being written
        console.line(result["text"])
    facts = f"{result['num_forwards']} forwards, {result['tokens_per_forward']:.2f} tokens per forward"
    if result.get("scores"):
        facts = f"lengths {', '.join(map(str, result['lengths']))}; {facts}"
    ends = {
        "eos": "the model ended",
        "stopping_criteria": "a stop string ended it",
        "length": "cut off at --max-new-tokens",
        "filled": "the gaps are filled",
    }
    console.line(console.style(f"[{facts}; {ends[result['stop_reason']]}]", "dim"))
    console.line()
