"""What a person sees in the terminal: lines, tables, progress with an estimate, colours only on a terminal.

Owns stdout and stderr of the command line. With `--json`, stdout carries one JSON document and nothing else; every
line meant for a person goes to stderr instead. Imports only the standard library until a bar is drawn.
"""

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO


COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
LINE_EVERY_S = 15.0  # how often a bar writes a line where there is no terminal to redraw on


class Console:
    """
    The terminal, as commands use it.

    Args:
        json_output (`bool`, *optional*, defaults to `False`):
            Whether stdout is reserved for one JSON document; lines for people then go to stderr.
        out (`TextIO`, *optional*): where results go; defaults to `sys.stdout`.
        err (`TextIO`, *optional*): where progress, warnings and errors go; defaults to `sys.stderr`.
    """

    def __init__(self, json_output: bool = False, out: TextIO | None = None, err: TextIO | None = None):
        self.json_output = json_output
        self.out = out if out is not None else sys.stdout
        self.err = err if err is not None else sys.stderr
        self.lines = self.err if json_output else self.out

    def style(self, text: str, colour: str, stream: TextIO | None = None) -> str:
        """`text` in a colour of `COLOURS` where the stream is a terminal and NO_COLOR is not set, else unchanged."""
        stream = stream if stream is not None else self.lines
        if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            return text
        return f"\033[{COLOURS[colour]}m{text}\033[0m"

    def line(self, text: str = "") -> None:
        """One line for a person."""
        print(text, file=self.lines, flush=True)

    def step(self, title: str) -> None:
        """The name of the piece of work that begins."""
        self.line(self.style(title, "bold"))

    def passed(self, text: str) -> None:
        """A finished check, with its numbers."""
        self.line(f"  {self.style('pass', 'green')}  {text}")

    def failed(self, text: str) -> None:
        """A failed check, with its numbers."""
        self.line(f"  {self.style('FAIL', 'red')}  {text}")

    def note(self, text: str) -> None:
        """A detail of the step."""
        self.line(f"  {text}")

    def warn(self, text: str) -> None:
        """Something the user should know and may want to change."""
        print(f"  {self.style('warning:', 'yellow', self.err)} {text}", file=self.err, flush=True)

    def error(self, text: str) -> None:
        """The one sentence of an error."""
        print(f"{self.style('a2d: error:', 'red', self.err)} {text}", file=self.err, flush=True)

    def json(self, value: Any) -> None:
        """The machine-readable result, alone on stdout."""
        print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False), file=self.out, flush=True)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table with aligned columns: numbers to the right, text to the left."""
        cells = [[_cell(value) for value in row] for row in rows]
        widths = [
            max(len(header), *(len(row[i]) for row in cells)) if cells else len(header)
            for i, header in enumerate(headers)
        ]
        numeric = [all(_is_number(row[i]) for row in cells) for i in range(len(headers))]

        def join(values: Sequence[str]) -> str:
            parts = [v.rjust(w) if right else v.ljust(w) for v, w, right in zip(values, widths, numeric, strict=True)]
            return "  ".join(parts).rstrip()

        self.line(self.style(join(list(headers)), "bold"))
        for row in cells:
            self.line(join(row))

    def progress(self, label: str, total: int, unit: str = "step", done: int = 0) -> "Progress":
        """
        A progress bar with an estimate of the time left, on stderr; without a terminal, a line every 15 seconds.

        Args:
            label (`str`): what is going on.
            total (`int`): how many units make the whole.
            unit (`str`, *optional*, defaults to `"step"`): what is counted.
            done (`int`, *optional*, defaults to 0): units finished before this process began; not part of the rate.
        """
        return Progress(self.err, label, total, unit, done)


class Progress:
    """A running count towards a known total; use as a context manager. See [`Console.progress`]."""

    def __init__(self, stream: TextIO, label: str, total: int, unit: str, done: int):
        self.stream, self.label, self.total, self.unit = stream, label, total, unit
        self.done = self.start_at = done
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, initial=done, desc=f"  {label}", unit=unit, file=stream, leave=False, dynamic_ncols=True,
                smoothing=0.1,
            )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def advance(self, units: int = 1, note: str = "") -> None:
        """Counts `units` more; `note` stands behind the bar."""
        self.move_to(self.done + units, note)

    def move_to(self, done: int, note: str = "") -> None:
        """Sets the count."""
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.done)
            self.done = done
            return
        self.done = done
        now = time.monotonic()
        if now - self.last_line >= LINE_EVERY_S and done > self.start_at:
            self.last_line = now
            left = (now - self.started) / (done - self.start_at) * max(self.total - done, 0)
            text = f"  {self.label}: {done}/{self.total} {self.unit}s, about {duration(left)} left"
            print(f"{text}; {note}" if note else text, file=self.stream, flush=True)

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def duration(seconds: float) -> str:
    """A time as people say it: `42s`, `3m 05s`, `2h 10m`."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def size(bytes_: float) -> str:
    """A number of bytes as people say it: `1.1 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if bytes_ < 1000:
            return f"{bytes_:.0f} bytes" if unit == "bytes" else f"{bytes_:.1f} {unit}"
        bytes_ /= 1000
    return f"{bytes_:.1f} TB"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"-|-?[\d,]+(\.\d+)?%?", cell) is not None
