"""What the AR parent does in five forwards, its conversion does in one: sorting six letters.

    python scripts/sort_demo.py SRC --out RUN

SRC is a checkpoint that was trained to sort six letters of a three-letter alphabet, one letter per forward (a
GPT-2 of 86 thousand parameters, context 11). All 729 inputs, with the first five sorted letters as the answer, are the
training set and the test: the sixth letter is decided by the other five. Owns this one experiment.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path


FORWARDS = (5, 3, 2, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="folder of the sorting checkpoint")
    parser.add_argument("--out", required=True, type=Path, help="run directory to make")
    parser.add_argument("--max-steps", type=int, default=1500)
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from a2d_hf import A2DForMaskedDiffusion, convert

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
    print(f"\n{'model':10} {'forwards':>8} {'sorted right':>13}")
    print(f"{'AR parent':10} {5:8} {right(by_parent):6} of {len(words)}")
    for forwards in FORWARDS:
        out = model.diffusion_generate(
            ids, max_new_tokens=5, steps=forwards, temperature=0.0, return_dict_in_generate=True
        )
        assert out.num_forwards == forwards, out.num_forwards
        print(f"{'diffusion':10} {forwards:8} {right(out.sequences):6} of {len(words)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
