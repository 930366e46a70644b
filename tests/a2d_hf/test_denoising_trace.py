"""The scrubbable picture, and the page that `a2d sample --trace` writes."""

import re
from types import SimpleNamespace

import pytest
import torch

from a2d_hf.cli import main
from a2d_hf.denoising_picture import Denoising
from a2d_hf.denoising_trace import scrubbable, trace_page
from a2d_hf.quickstart_samples import denoising_of


TEXT = Denoising("Once <b>", [" upon", " a", " time"], [2, 1, 3], [0.5, 0.9, 0.25], 3)


def test_every_pass_can_be_shown_by_pointer_and_by_key():
    html = str(scrubbable(TEXT, name="t"))
    # Before the first pass, and after each of the three.
    for number in range(4):
        assert f'id="t-{number}"' in html and f'for="t-{number}"' in html
        assert f"#t:has(#t-{number}:checked) {{ --now: {number} }}" in html
        assert f"#t:has([for=t-{number}]:hover) {{ --now: {number} !important }}" in html
    assert html.count("checked aria-label") == 1 and 'id="t-3" checked' in html


def test_a_token_knows_its_pass_and_its_probability():
    html = str(scrubbable(TEXT, name="t"))
    tokens = re.findall(r'--at:(\d+)" title="([^"]*)"><span>([^<]*)<', html)
    assert tokens == [
        ("2", "pass 2 of 3, probability 0.50", " upon"),
        ("1", "pass 1 of 3, probability 0.90", " a"),
        ("3", "pass 3 of 3, probability 0.25", " time"),
    ]


def test_the_space_before_the_first_word_is_kept_where_a_tokenizer_drops_it_at_the_start():
    output = SimpleNamespace(
        sequences=torch.tensor([[1, 4, 6]]),
        confidences=torch.tensor([[float("nan"), 0.5, 0.75]]),
        history=[torch.tensor([row]) for row in ([1, 9, 9], [1, 4, 6])],
    )
    words = SimpleNamespace(decode=lambda ids: " ".join(f"w{i}" for i in ids))
    assert denoising_of(output, words, "w1", 9).pieces == [" w4", " w6"]


def test_text_is_escaped_and_the_page_loads_nothing():
    page = trace_page([TEXT, TEXT], "RUN <x>")
    assert "Once <b>" not in page and "Once &lt;b&gt;" in page and "RUN &lt;x&gt;" in page
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    assert page.count('<div class="scrub"') == 2 and 'id="text1-3"' in page


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from a2d_hf.modeling import A2DForMaskedDiffusion
    from tests.conftest import tiny_model, tiny_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("trace"), tiny_tokenizer()
    A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_sample_writes_the_page(checkpoint, tmp_path, capsys):
    arguments = ["--max-new-tokens", "8", "--steps", "4", "--device", "cpu"]
    file = tmp_path / "trace.html"
    assert main(["sample", str(checkpoint), "-p", "The quick", "-p", "A", *arguments, "--trace", str(file)]) == 0
    page = file.read_text()
    assert page.count('<div class="scrub"') == 2 and "The quick" in page and "trace.html" in capsys.readouterr().out
    steps = [int(step) for step in re.findall(r"--at:(\d+)", page.split('id="text1"')[0])]
    assert sorted(set(steps)) == [1, 2, 3, 4] and len(steps) <= 8


def test_a_trace_that_cannot_be_written_is_refused_at_once(checkpoint, tmp_path, capsys):
    for wrong in (tmp_path, tmp_path / "no" / "trace.html"):
        assert main(["sample", str(checkpoint), "-p", "The", "--trace", str(wrong)]) == 2
        captured = capsys.readouterr()
        assert "--trace" in captured.err and not captured.out
