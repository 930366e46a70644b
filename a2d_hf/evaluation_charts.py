"""The charts of the page of `a2d eval`: accuracy by what is hidden, speed, and what the speed costs.

Owns the figures and the section on speed; the other sections are evaluation_report.py's. Given the content of
report.json and timings.json, returns `Markup`; touches no file.
"""

from typing import Any

from markupsafe import Markup

from .report import Level, Series, figure, join, line_chart, paragraphs, table


def masked_chart(report: dict[str, Any], other: dict[str, Any] | None = None) -> Markup:
    """Accuracy of one pass by how much is hidden, of one model or of two."""

    def points(each: dict[str, Any]) -> list[tuple[float, float]]:
        return [(100 * row["ratio"], 100 * row["accuracy"]) for row in each["masked_accuracy"]]

    series = [Series("" if other is None else report["model"], points(report), colour=0, marks=True)]
    if other is not None:
        series.append(Series(other["model"], points(other), colour=1, marks=True))
    first, last = points(report)[0], points(report)[-1]
    return figure(
        line_chart(
            series,
            x_label="share of the text that is hidden, %",
            y_label="% of hidden tokens right",
            alt=f"Accuracy falls from {first[1]:.0f} % with {first[0]:.0f} % hidden to {last[1]:.0f} % with "
            f"{last[0]:.0f} %.",
        ),
        "Hidden tokens that one pass predicts exactly. The fewer are left to read, the harder it is.",
    )


def speed(report: dict[str, Any], timings: dict[str, Any]) -> Markup:
    """The section on speed: the sweep with the parent beside it, and the curves of what it costs."""
    swept, clocks = report["throughput"], timings["throughput"]
    rows = []
    for point, clock in zip(swept["points"], clocks, strict=True):
        rows.append(_speed_row(point["name"], point, clock))
    beside = swept["parent"]
    honest, levels = "", []
    if beside is not None:
        theirs = timings["parent_throughput"]["tokens_per_second"]
        rows.append(_speed_row("the parent, left to right", beside, timings["parent_throughput"]))
        levels = [Level(f"the parent {theirs:,.0f}", theirs, 1)]
        faster = [p["name"] for p, c in zip(swept["points"], clocks, strict=True) if c["tokens_per_second"] > theirs]
        honest = (
            "No setting is faster than the parent on this machine: a pass of diffusion computes every open position "
            "anew, while the parent keeps what it has computed and adds one token."
            if not faster
            else f"Faster than the parent on this machine: {', '.join(faster)}. The others are slower."
        )
        honest += " Look at the quality beside the speed: fast and bad is easy."
    chart = line_chart(
        _settings_drawn(swept["points"], [clock["tokens_per_second"] for clock in clocks]), levels=levels,
        x_label="tokens per forward pass", y_label="tokens per second",
        alt="Tokens per second against tokens per forward pass, the parent as a level.",
    )  # fmt: skip
    parts = [
        paragraphs(
            f"{swept['prompts']} prompts at once, {swept['new_tokens']} tokens written behind each, always the "
            "likeliest token. Times are of this machine and of this call.",
            honest,
        ),
        figure(chart, "The line joins fixed numbers of steps; single marks are thresholds."),
        table(("Setting", "tokens per pass", "tokens per second", "parent's NLL of it", "different tokens"), rows),
    ]
    if beside is not None:
        parts.append(_opinion_chart(swept))
    if report["against"] is None:
        parts.append(accuracy_curve(report, None))
    return join(*[part for part in parts if part is not None])


def _settings_drawn(points: list[dict[str, Any]], values: list[float]) -> list[Series]:
    """One value for each setting against its tokens per pass: a line through the steps, marks for the thresholds."""
    steps, thresholds = [], []
    for point, value in zip(points, values, strict=True):
        (thresholds if "threshold" in point["setting"] else steps).append((point["tokens_per_forward"], value))
    series = [Series("", sorted(steps), colour=0, marks=True)]
    return series + ([Series("", sorted(thresholds), colour=0, marks=True, joined=False)] if thresholds else [])


def _speed_row(name: str, point: dict[str, Any], clock: dict[str, Any]) -> tuple[str, ...]:
    nll, distinct = point.get("parent_nll"), point.get("distinct")
    return (
        name,
        f"{point['tokens_per_forward']:.2f}",
        f"{clock['tokens_per_second']:,.0f}",
        "–" if nll is None else f"{nll:.2f}",
        "–" if distinct is None else f"{distinct:.0%}",
    )


def _opinion_chart(swept: dict[str, Any]) -> Markup:
    drawn = _settings_drawn(swept["points"], [point["parent_nll"] for point in swept["points"]])
    own = swept["parent"]["parent_nll"]
    chart = line_chart(
        drawn, levels=[Level(f"its own text {own:.2f}", own, 1)],
        x_label="tokens per forward pass", y_label="nats per token under the parent",
        alt="The parent's NLL of what the conversion wrote, against tokens per forward pass.",
    )  # fmt: skip
    return figure(
        chart,
        "How likely the parent finds what was written: lower is likelier, but repetition pleases it too, which is why "
        "the share of different tokens stands beside it.",
    )


def accuracy_curve(report: dict[str, Any], other: dict[str, Any] | None) -> Markup | None:
    """Accuracy of filling gaps against tokens per pass, with the AUP; `None` where no gap had room."""
    every = [each for each in (report, other) if each is not None and each["throughput"]["infilling_curve"]]
    if not every:
        return None
    series = [
        Series(
            each["model"] if other is not None else "",
            [(p["tokens_per_forward"], 100 * p["token_accuracy"]) for p in each["throughput"]["infilling_curve"]],
            colour=int(each is other),
            marks=True,
        )
        for each in every
    ]
    areas = ", ".join(f"{each['model']} {each['throughput']['aup']:.1f}" for each in every)
    length = every[0]["throughput"]["infilling_curve"][0]["length"]
    chart = line_chart(
        series, x_label="tokens per forward pass", y_label="% of the gap's tokens right",
        alt="Accuracy of filling gaps against tokens per forward pass.",
    )  # fmt: skip
    return figure(
        chart,
        f"The same gaps of {length} tokens, filled with fewer and fewer passes. AUP, the weighted area under this "
        f"curve: {areas}. Higher is better between curves of like height; a low, flat one has an area too.",
    )


def task_curve(curve: dict[str, Any]) -> Markup:
    """Accuracy of a task against tokens per pass, the parent as a level, with its table."""
    points, theirs = curve["points"], curve["parent_value"]
    levels = [] if theirs is None else [Level(f"the parent {100 * theirs:.1f}", 100 * theirs, 1)]
    chart = line_chart(
        _settings_drawn(points, [100 * point["value"] for point in points]), levels=levels,
        x_label="tokens per forward pass", y_label=f"{curve['metric']}, %",
        alt=f"{curve['task']}: {curve['metric']} against tokens per forward pass, the parent as a level.",
    )  # fmt: skip
    rows = [
        (point["name"], f"{point['tokens_per_forward']:.2f}", _share(point["value"], point["stderr"]))
        for point in points
    ]
    if theirs is not None:
        rows.append(("the parent, left to right", "1.00", _share(theirs, curve["parent_stderr"])))
    areas = ", ".join(f"{way} {area:.1f}" for way, area in curve["aup"].items())
    return join(
        figure(
            chart,
            f"{curve['task']}, {curve['examples']} examples: what writing more tokens per pass costs. The line joins "
            f"fixed numbers of steps; single marks are thresholds. AUP, the weighted area under each: {areas}. A low, "
            "flat curve has an area too: read it with its first point.",
        ),
        table(("Setting", "tokens per pass", f"{curve['metric']} ± standard error"), rows),
    )


def _share(value: float, error: float | None) -> str:
    return f"{100 * value:.1f}" + ("" if error is None else f"\u00a0±\u00a0{100 * error:.1f}") + "\u00a0%"
