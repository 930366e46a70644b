"""One-page HTML reports: self-contained, light and dark, readable on a phone, no script and nothing loaded from afar.

Owns the writing of HTML: every other module hands over plain values and gets `Markup` back, so that text from a model
or a file is escaped here and nowhere else. The look lives in report.html. May touch only the file that it is asked to
write.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .atomic_files import write_text


WIDTH, HEIGHT = 520, 290  # of a chart, in SVG units: small, so that its words stay readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 38, 22, 26, 42
DIGIT = 8  # width of a digit of a label, in the same units


@dataclass
class Tile:
    """A number that the reader should see first, and what it is."""

    value: str
    label: str


@dataclass
class Section:
    """A titled part of the page; `body` is `Markup` made by the functions of this module (plain text is escaped)."""

    title: str
    body: str | Markup


@dataclass
class Series:
    """
    One line of a chart.

    Args:
        label (`str`): written at the line's end; empty for none.
        points (`list[tuple[float, float]]`): (x, y), x ascending; points that are not finite are left out.
        colour (`int`): 0 or 1, one of the page's two chart colours.
        smooth (`int`, *optional*, defaults to 1): number of points in the running mean that the line shows; the
            points themselves are drawn faintly behind it when it is larger than 1.
        marks (`bool`, *optional*, defaults to `False`): a mark at every point: where there are few, and each counts.
        joined (`bool`, *optional*, defaults to `True`): a line from point to point.
    """

    label: str
    points: list[tuple[float, float]]
    colour: int
    smooth: int = 1
    marks: bool = False
    joined: bool = True


@dataclass
class Level:
    """A horizontal line at `y`: something measured once that a curve is compared with."""

    label: str
    y: float
    colour: int


def page(title: str, lead: str, sections: Sequence[Section], *, tiles: Sequence[Tile] = (), footer: str = "") -> str:
    """
    The whole document.

    Args:
        title (`str`): headline and window title.
        lead (`str`): one or two sentences that say what the reader is looking at.
        sections (`Sequence[Section]`): the parts, in order.
        tiles (`Sequence[Tile]`, *optional*): key numbers under the lead.
        footer (`str`, *optional*): provenance, in small print.

    Returns:
        `str`: HTML.
    """
    environment = Environment(
        loader=PackageLoader("a2d_hf", package_path=""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html").render(
        title=title, lead=lead, sections=sections, tiles=tiles, footer=footer
    )


def write_page(path: Path, html: str) -> Path:
    """Writes a page atomically and returns its path."""
    write_text(path, html)
    return path


def paragraphs(*texts: str | Markup) -> Markup:
    """Each text in a paragraph of its own; `Markup` passes as it is."""
    return Markup("\n").join(Markup("<p>{}</p>").format(text) for text in texts)


def join(*parts: Markup) -> Markup:
    """Several pieces one under the other."""
    return Markup("\n").join(parts)


def code_block(text: str) -> Markup:
    """Commands or code, as typed."""
    return Markup("<pre><code>{}</code></pre>").format(text)


def figure(content: Markup, caption: str | Markup) -> Markup:
    """A picture with the sentence that says how to read it above it."""
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(caption, content)


def sample(prompt: str, text: str) -> Markup:
    """A generated text with its prompt in the softer colour."""
    return Markup('<div class="sample"><span class="prompt">{}</span>{}</div>').format(prompt, text)


def verdict(passed: bool) -> Markup:
    """pass or FAIL, in words and colour."""
    return Markup('<span class="pass">pass</span>') if passed else Markup('<span class="fail">FAIL</span>')


def table(headers: Sequence[str], rows: Sequence[Sequence[str | Markup | int | float]]) -> Markup:
    """A table that scrolls sideways by itself where the screen is narrow; numbers keep their digits aligned."""
    head = Markup("").join(Markup("<th>{}</th>").format(header) for header in headers)
    body = Markup("\n").join(
        Markup("<tr>{}</tr>").format(
            Markup("").join(
                Markup('<td class="number">{}</td>' if isinstance(cell, int | float) else "<td>{}</td>").format(cell)
                for cell in row
            )
        )
        for row in rows
    )
    return Markup('<div class="wide"><table><thead><tr>{}</tr></thead><tbody>\n{}\n</tbody></table></div>').format(
        head, body
    )


def line_chart(
    series: Sequence[Series],
    *,
    levels: Sequence[Level] = (),
    x_label: str,
    y_label: str,
    alt: str,
) -> Markup:
    """
    A line chart as inline SVG, linear axes, y from 0 so that a fall by half looks like one.

    Args:
        series (`Sequence[Series]`): the lines.
        levels (`Sequence[Level]`, *optional*): horizontal references, dashed and labelled.
        x_label (`str`): what the horizontal axis counts.
        y_label (`str`): what the vertical axis measures, with its unit.
        alt (`str`): the chart in one sentence, for those who cannot see it.

    Returns:
        `Markup`: an `<svg>` element.

    Raises:
        `ValueError`: no finite point at all.
    """
    finite = [[(x, y) for x, y in s.points if math.isfinite(x) and math.isfinite(y)] for s in series]
    smoothed = [_running_mean(points, s.smooth) for points, s in zip(finite, series, strict=True)]
    if not any(smoothed):
        raise ValueError("`series` holds no finite point: there is nothing to draw.")
    xs = [x for points in finite for x, _ in points]
    # Single noisy points may leave the frame; the lines and levels never do.
    ys = [y for points in smoothed for _, y in points] + [level.y for level in levels]
    x_ticks = _ticks(min(0.0, min(xs)), max(xs) or 1.0)
    y_ticks = _ticks(0.0, max(ys) * 1.08 or 1.0)
    x_high, y_high = max(max(xs), x_ticks[-1]), y_ticks[-1]
    # Room for the longest label of the vertical axis.
    left = LEFT + DIGIT * max(0, max(len(_number(y)) for y in y_ticks) - 3)
    inner_width, inner_height = WIDTH - left - RIGHT, HEIGHT - TOP - BOTTOM

    def at_x(x: float) -> float:
        return round(left + inner_width * x / x_high, 1)

    def at_y(y: float) -> float:
        return round(TOP + inner_height * (1 - min(max(y, 0.0), y_high) / y_high), 1)

    parts: list[Markup] = []
    for y in y_ticks:
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                left, WIDTH - RIGHT, at_y(y), at_y(y)
            )
        )
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(left - 7, at_y(y) + 4, _number(y))
        )
    for x in x_ticks:
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
                at_x(x), HEIGHT - BOTTOM + 17, _number(x)
            )
        )
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            left + inner_width / 2, HEIGHT - 6, x_label
        )
    )
    parts.append(Markup('<text x="{}" y="{}">{}</text>').format(left, TOP - 12, y_label))
    for s, points, means in zip(series, finite, smoothed, strict=True):
        if s.smooth > 1:
            dots = Markup("").join(
                Markup('<circle cx="{}" cy="{}" r="1.6"/>').format(at_x(x), at_y(y)) for x, y in points if y <= y_high
            )
            parts.append(Markup('<g class="dots c{}">{}</g>').format(s.colour, dots))
        path = " ".join(f"{at_x(x)},{at_y(y)}" for x, y in means)
        if s.joined:
            parts.append(Markup('<polyline class="line c{}" points="{}"/>').format(s.colour, path))
        if s.marks:
            marks = [Markup('<circle cx="{}" cy="{}" r="3.5"/>').format(at_x(x), at_y(y)) for x, y in means]
            parts.append(Markup('<g class="c{}">{}</g>').format(s.colour, Markup("").join(marks)))
    curves = [[(at_x(x), at_y(y)) for x, y in means] for means in smoothed]
    labels: dict[str, list[tuple[float, str, int]]] = {"start": [], "end": []}
    for level in levels:
        parts.append(
            Markup('<line class="level c{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                level.colour, left, WIDTH - RIGHT, at_y(level.y), at_y(level.y)
            )
        )
        labels[_freer_side(at_y(level.y), curves)].append((at_y(level.y), level.label, level.colour))
    labels["end"] += [
        (curve[-1][1], s.label, s.colour) for s, curve in zip(series, curves, strict=True) if s.label and curve
    ]
    for anchor, at in (("start", left + 6), ("end", WIDTH - RIGHT - 4)):
        for y, label, colour in _spread(labels[anchor]):
            parts.append(
                Markup('<text class="c{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
                    colour, at, y, anchor, label
                )
            )
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, alt, Markup("\n").join(parts)
    )


def _running_mean(points: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Centred mean over `window` points, narrower at both ends so that the line begins and ends with the data."""
    means = []
    for i in range(len(points)):
        reach = min(window // 2, i, len(points) - 1 - i)
        nearby = points[i - reach : i + reach + 1]
        means.append((points[i][0], sum(y for _, y in nearby) / len(nearby)))
    return means


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to the first one at or above `high`."""
    raw = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first = math.floor(low / step)
    return [round(i * step, 10) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def _number(value: float) -> str:
    """A tick label without needless zeros."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def _freer_side(y: float, curves: Sequence[Sequence[tuple[float, float]]]) -> str:
    """The end of a horizontal line, `start` or `end`, where the curves keep the greater distance from it."""
    third = (WIDTH - LEFT - RIGHT) / 3

    def distance(low: float, high: float) -> float:
        return min((abs(at - y) for curve in curves for x, at in curve if low <= x <= high), default=math.inf)

    return "start" if distance(LEFT, LEFT + third) > distance(WIDTH - RIGHT - third, WIDTH - RIGHT) else "end"


def _spread(labels: list[tuple[float, str, int]], gap: float = 15) -> list[tuple[float, str, int]]:
    """Text just above its line, the lowest of several below; moved up where two would overlap, down at the frame."""
    placed: list[tuple[float, str, int]] = []
    for y, label, colour in sorted(labels, reverse=True):
        if placed:
            y = min(y - 5, placed[-1][0] - gap)
        else:
            y = min(y + gap, HEIGHT - BOTTOM - 4) if len(labels) > 1 else y - 5
        placed.append((y, label, colour))
    lowest = float(TOP + 8)
    for i in reversed(range(len(placed))):
        y, label, colour = placed[i]
        placed[i] = (max(y, lowest), label, colour)
        lowest = placed[i][0] + gap
    return placed
