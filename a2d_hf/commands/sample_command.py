"""`a2d sample`: text from a converted model, drawn live where there is a terminal. Decoding is the model's own."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..console import Console
from ..conversion_settings import DEVICES
from ..data import explained_tokenizing
from ..errors import BadInput


SELECTORS = ("confidence", "margin", "entropy", "random", "threshold", "entropy_bound")
REMASKING = ("p2", "remdm_cap", "remdm_rescale", "remdm_conf", "remdm_loop")
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
    parser.add_argument("--selector", choices=SELECTORS, help="which positions a forward pass commits")
    parser.add_argument(
        "--threshold", type=float, metavar="P", help="probability to commit from, with --selector threshold"
    )
    parser.add_argument(
        "--entropy-bound", type=float, metavar="NATS", help="dependence to ignore: --selector entropy_bound"
    )
    parser.add_argument("--remasking", choices=REMASKING, help="take back what was written, and write it again")
    parser.add_argument(
        "--pipeline-depth", type=int, metavar="N", help="blocks open at once, with --threshold or --entropy-bound"
    )
    parser.add_argument(
        "--guidance-scale", type=float, metavar="S", help="lean on the prompt: above 1, two passes per step"
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what --guidance-scale moves away from")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token, above 0 samples")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to run")
    parser.add_argument("--trust-remote-code", action="store_true", help="for a parent that needs its own code")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a page that runs through the denoising (HTML)"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print a JSON list on stdout")
    shape.add_argument("--jsonl", action="store_true", help="print one JSON object per line, each when it is done")
    parser.set_defaults(run=run)


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
    options = {
        "max_new_tokens": args.max_new_tokens,
        "steps": args.steps,
        "block_size": args.block_size,
        "selector": args.selector or _selector_of(args),
        "threshold": args.threshold,
        "entropy_bound": args.entropy_bound,
        "remasking": args.remasking,
        "pipeline_depth": args.pipeline_depth,
        "guidance_scale": args.guidance_scale,
        "temperature": args.temperature,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if args.infill is not None:
        from ..infilling import parse_gaps

        for name, value in {
            "--max-new-tokens": args.max_new_tokens,
            "--negative-prompt": args.negative_prompt,
        }.items():
            if value is not None:
                raise BadInput(f"--infill appends nothing and keeps its prompt: leave out {name}.")
        for prompt in prompts:
            parse_gaps(prompt)
    elif args.length_by is not None:
        raise BadInput("--length-by is about gaps: give it with --infill.")
    if args.negative_prompt is not None and args.guidance_scale in (None, 1.0):
        raise BadInput("--negative-prompt does nothing without guidance: give --guidance-scale, for example 2.")
    if args.trace is not None and (args.trace.is_dir() or not args.trace.resolve().parent.is_dir()):
        raise BadInput(f"--trace {args.trace} is no file in a folder that exists: give one, for example trace.html.")
    as_json = args.json or args.jsonl
    console = Console(json_output=as_json)
    if found.manifest is not None and found.manifest["training"] is None:
        console.warn(f"{args.path} is converted but not trained: expect no sensible text.")

    from ..modeling.generation_config_a2d import A2DGenerationConfig

    try:
        A2DGenerationConfig(**options)
    except ValueError as error:
        raise BadInput(str(error)) from error
    model, tokenizer = found.load(args.device, args.trust_remote_code)
    live = not as_json and args.infill is None and console.out.isatty()
    if args.negative_prompt is not None:
        with explained_tokenizing("--negative-prompt cannot be tokenized"):
            options["negative_prompt_ids"] = tokenizer(args.negative_prompt, return_tensors="pt").input_ids
    if args.trace is not None:
        options["output_history"] = True
    samples, denoisings = [], []
    for number, prompt in enumerate(prompts):
        if args.infill is not None:
            result, denoising = _infill(model, tokenizer, prompt, options, args.seed + number, args.length_by, console)
        else:
            result, output = _sample(model, tokenizer, prompt, options, args.seed + number, live)
        if args.trace is not None:
            if args.infill is None:
                from ..quickstart_samples import denoising_of

                denoising = denoising_of(output, tokenizer, prompt, model.config.mask_token_id)
            denoisings.append(denoising)
        samples.append(result)
        if args.jsonl:
            print(json.dumps(result, ensure_ascii=False, allow_nan=False), file=console.out, flush=True)
        elif not args.json:
            _show(result, console, live)
    if args.trace is not None:
        from ..denoising_trace import trace_page
        from ..report import write_page

        write_page(args.trace, trace_page(denoisings, found.name))
        console.note(f"the denoising: {args.trace}")
    if args.json:
        console.json(samples)
    return 0


def _selector_of(args: argparse.Namespace) -> str | None:
    """The selector that a flag of its own asks for."""
    given = {"threshold": args.threshold, "entropy_bound": args.entropy_bound}
    return next((name for name, value in given.items() if value is not None), None)


def _sample(
    model: Any, tokenizer: Any, prompt: str, options: dict[str, Any], seed: int, live: bool
) -> tuple[dict[str, Any], Any]:
    """What is reported of one text, and the decoder's whole output."""
    from transformers import TextDiffusionStreamer

    with explained_tokenizing(f"The prompt {prompt!r} cannot be tokenized"):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    streamer = TextDiffusionStreamer(tokenizer, skip_special_tokens=True) if live else None
    try:
        output = model.diffusion_generate(
            **inputs, **options, seed=seed, streamer=streamer, return_dict_in_generate=True
        )
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
        "forwards": output.num_forwards,
        "tokens_per_forward": round(float(output.tokens_per_forward[0]), 4),
    }
    return result, output


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
        "forwards": found.num_forwards,
        "tokens_per_forward": round(float(found.output.tokens_per_forward[0]), 4),
    }
    history = found.output.history is not None
    return result, found.denoising(tokenizer, model.config.mask_token_id) if history else None


def _show(result: dict[str, Any], console: Console, live: bool) -> None:
    if not live:  # a terminal has seen the text being written
        console.line(result["text"])
    facts = f"{result['forwards']} forwards, {result['tokens_per_forward']:.2f} tokens per forward"
    if result.get("scores"):
        facts = f"lengths {', '.join(map(str, result['lengths']))}; {facts}"
    ends = {"eos": "the model ended", "length": "cut off at --max-new-tokens", "filled": "the gaps are filled"}
    console.line(console.style(f"[{facts}; {ends.get(result['stop_reason'], result['stop_reason'])}]", "dim"))
    console.line()
