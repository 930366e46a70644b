"""What a terminal gets, what a pipe gets, and what stays off stdout with --json."""

import io
import json

import pytest

from a2d_hf.console import Console, duration, size


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_only_on_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    pipe, terminal = io.StringIO(), Terminal()
    Console(out=pipe, err=pipe).passed("identity")
    Console(out=terminal, err=terminal).passed("identity")
    assert "\033" not in pipe.getvalue()
    assert "\033[32mpass\033[0m" in terminal.getvalue()


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    Console(out=terminal, err=terminal).failed("identity")
    assert "\033" not in terminal.getvalue()


def test_json_mode_keeps_stdout_to_the_document():
    out, err = io.StringIO(), io.StringIO()
    console = Console(json_output=True, out=out, err=err)
    console.step("Gates")
    console.passed("identity")
    console.warn("careful")
    console.table(["a"], [[1]])
    console.json({"x": 1})
    assert json.loads(out.getvalue()) == {"x": 1}
    assert "Gates" in err.getvalue() and "careful" in err.getvalue()


def test_table_aligns_numbers_to_the_right():
    out = io.StringIO()
    Console(out=out, err=out).table(["name", "value"], [["a", 1], ["long name", 12345], ["b", None]])
    assert out.getvalue().splitlines() == [
        "name       value",
        "a              1",
        "long name  12345",
        "b              -",
    ]


def test_progress_without_a_terminal_writes_lines_with_an_estimate(monkeypatch):
    clock = iter([0.0, 20.0, 21.0, 40.0])
    monkeypatch.setattr("a2d_hf.console.time.monotonic", lambda: next(clock))
    err = io.StringIO()
    with Console(out=io.StringIO(), err=err).progress("training", 100, done=50) as bar:
        bar.move_to(60, "loss 1.0")  # 10 steps in 20 seconds: 80 seconds for the 40 left
        bar.move_to(61)
        bar.move_to(70, "loss 0.9")
    lines = err.getvalue().splitlines()
    assert lines == [
        "  training: 60/100 steps, about 1m 20s left; loss 1.0",
        "  training: 70/100 steps, about 1m 00s left; loss 0.9",
    ]


def test_progress_on_a_terminal_draws_a_bar():
    err = Terminal()
    with Console(out=io.StringIO(), err=err).progress("training", 10) as bar:
        bar.advance(5, "loss 1.0")
    assert "training" in err.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (65, "1m 05s"), (7800, "2h 10m")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(12, "12 bytes"), (1_060_000, "1.1 MB"), (15e9, "15.0 GB"), (2e12, "2.0 TB")]
)
def test_size(number, text):
    assert size(number) == text
