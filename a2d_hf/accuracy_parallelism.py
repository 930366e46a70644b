"""How much accuracy each further token per forward costs: the curve, its AUP and its picture.

Owns the arithmetic and the drawing, given plain numbers; knows nothing of models. Writes no file.
"""

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape


Points = Sequence[tuple[float, float]]

TOLERANCE = 5.0  # percentage points below the first point of a curve, from which points no longer count
DECAY = 3.0
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
WIDTH, HEIGHT, MARGIN = 420, 280, 56


def aup(points: Points, best: float | None = None) -> float:
    """
    Accuracy under parallelism (d3LLM, https://huggingface.co/papers/2601.07568): a weighted area under the curve.

    Points in rising order of parallelism r, those more than five percentage points below the first left out:
    r_1 y_1 + sum of 1/2 (r_i - r_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})), with W(y) = min(exp(-3 (1 - y / best)), 1).

    Args:
        points (`Sequence[tuple[float, float]]`): tokens per forward, and accuracy in percent.
        best (`float`, *optional*): the best accuracy of any method on the task; that of these points by default.
    """
    points = sorted(points)
    if not points:
        raise ValueError("`points` is empty: there is no curve to measure.")
    points = [(r, y) for r, y in points if y >= points[0][1] - TOLERANCE]
    best = max(y for _, y in points) if best is None else best

    def weighed(y: float) -> float:
        return y * min(math.exp(-DECAY * (1 - y / best)), 1.0) if best > 0 else 0.0

    area = points[0][0] * points[0][1]
    for (before_r, before_y), (r, y) in zip(points, points[1:], strict=False):
        area += 0.5 * (r - before_r) * (weighed(y) + weighed(before_y))
    return area


def draw_panels(panels: Sequence[tuple[str, str, str, Mapping[str, Points]]]) -> str:
    """
    Line charts side by side, as one SVG.

    Args:
        panels (`Sequence[tuple]`): for each its title, the labels of x and y, and the points of each line by name.
    """
    names = list(dict.fromkeys(name for *_, lines in panels for name in lines))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    width, height = WIDTH * len(panels), HEIGHT + 18 * math.ceil(len(names) / 4) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    for i, (title, x_label, y_label, lines) in enumerate(panels):
        parts.append(f'<g transform="translate({i * WIDTH} 0)">{_panel(title, x_label, y_label, lines, colour)}</g>')
    for i, name in enumerate(names):
        x, y = MARGIN + (i % 4) * 150, HEIGHT + 14 + 18 * (i // 4)
        parts.append(f'<rect x="{x}" y="{y - 8}" width="14" height="4" fill="{colour[name]}"/>')
        parts.append(f'<text x="{x + 20}" y="{y - 2}">{escape(name)}</text>')
    return "".join([*parts, "</svg>\n"])


def _panel(title: str, x_label: str, y_label: str, lines: Mapping[str, Points], colour: Mapping[str, str]) -> str:
    every = [point for points in lines.values() for point in points]
    (left, right), (low, high) = (_range([point[axis] for point in every]) for axis in (0, 1))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = MARGIN + (point[0] - left) / (right - left) * (WIDTH - MARGIN - 20)
        return x, HEIGHT - 44 - (point[1] - low) / (high - low) * (HEIGHT - 84)

    parts = [f'<text x="{WIDTH / 2}" y="20" text-anchor="middle" font-size="13">{escape(title)}</text>']
    for k in range(5):
        value_x, value_y = left + (right - left) * k / 4, low + (high - low) * k / 4
        x, _ = place((value_x, low))
        _, y = place((left, value_y))
        parts.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{value_y:.3g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 28}" text-anchor="middle">{value_x:.3g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    for name, points in lines.items():
        spots = [place(point) for point in sorted(points)]
        route = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{route}" fill="none" stroke="{colour[name]}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour[name]}"/>' for x, y in spots]
    return "".join(parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    slack = (high - low) * 0.05 or max(abs(high) * 0.05, 0.5)
    return low - slack, high + slack
