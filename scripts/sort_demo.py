"""What the AR parent does in five forwards, its conversion does in one: sorting six letters.

    python scripts/sort_demo.py SRC --out RUN

SRC is a checkpoint that was trained to sort six letters of a three-letter alphabet, one letter per forward (a
GPT-2 of 86 thousand parameters, context 11). All 729 inputs, with the first five sorted letters as the answer, are the
training set and the test: the sixth letter is decided by the other five. Writes eval/sort_demo.json and .html into
the run. Owns this one experiment.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any


FORWARDS = (5, 3, 2, 1)


def sort_page(found: dict[str, Any]) -> str:
    """The page: share of the inputs sorted right against forwards, the parent as a level."""
    from a2d_hf.report import Level, Section, Series, figure, line_chart, page, table

    parent, diffusion, inputs = found["parent"], found["diffusion"], found["inputs"]
    percent = [(each["forwards"], 100 * each["right"] / inputs) for each in diffusion]
    own = 100 * parent["right"] / inputs
    chart = line_chart(
        [Series("diffusion", sorted(percent), colour=0, marks=True)],
        levels=[Level(f"the parent, {parent['forwards']} forwards: {own:.1f} %", own, 1)],
        x_label="forward passes for five letters", y_label="% of inputs sorted right",
        alt=f"Accuracy against forward passes; the parent stands at {own:.1f} %.",
    )  # fmt: skip
    rows = [("AR parent", parent), *(("diffusion", each) for each in diffusion)]
    cells = [(name, str(each["forwards"]), f"{each['right']} of {inputs}") for name, each in rows]
    body = figure(chart, f"All {inputs} inputs.") + table(("Model", "forward passes", "sorted right"), cells)
    lead = "What the AR parent does in five forward passes, one letter each, its conversion does in fewer."
    return page("Sorting six letters", lead, [Section("Accuracy against forward passes", body)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="folder of the sorting checkpoint")
    parser.add_argument("--out", required=True, type=Path, help="run directory to make")
    parser.add_argument("--max-steps", type=int, default=1500)
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from a2d_hf import A2DForMaskedDiffusion, convert
    from a2d_hf.atomic_files import write_json
    from a2d_hf.report import write_page

    words = ["".join(letters) for letters in itertools.product("ABC", repeat=6)]
    answers = ["".join(sorted(word))[:5] for word in words]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "sort.jsonl"
        rows = [json.dumps({"prompt": w, "completion": a}) for w, a in zip(words, answers, strict=True)]
        data.write_text("\n".join(rows) + "\n")
        run = convert(
            args.source, args.out, data=data, max_steps=args.max_steps, batch_size=64, learning_rate=3e-3, held_out=0
        )

    tokenizer = AutoTokenizer.from_pretrained(run.model_path)
    ids = torch.tensor(tokenizer(words)["input_ids"])

    def right(sequences: torch.Tensor) -> int:
        texts = tokenizer.batch_decode(sequences[:, 6:])
        return sum(text.replace(" ", "") == answer for text, answer in zip(texts, answers, strict=True))

    parent = AutoModelForCausalLM.from_pretrained(args.source).eval()
    model = A2DForMaskedDiffusion.from_pretrained(run.model_path).eval()
    by_parent = parent.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    found = {"inputs": len(words), "parent": {"forwards": 5, "right": right(by_parent)}, "diffusion": []}
    for forwards in FORWARDS:
        out = model.diffusion_generate(
            ids, max_new_tokens=5, steps=forwards, temperature=0.0, return_dict_in_generate=True
        )
        assert out.num_forwards == forwards, out.num_forwards
        found["diffusion"].append({"forwards": forwards, "right": right(out.sequences)})

    rows = [("AR parent", found["parent"]), *(("diffusion", each) for each in found["diffusion"])]
    print(f"\n{'model':10} {'forwards':>8} {'sorted right':>13}")
    for name, each in rows:
        print(f"{name:10} {each['forwards']:8} {each['right']:6} of {len(words)}")
    run.eval_path.mkdir(exist_ok=True)
    write_json(run.eval_path / "sort_demo.json", found)
    write_page(run.eval_path / "sort_demo.html", sort_page(found))
    print(f"\nwritten to {run.eval_path}: sort_demo.json and sort_demo.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
