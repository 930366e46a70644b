"""HTML reports: nothing unescaped, nothing loaded from elsewhere, and charts whose geometry is the data's."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from a2d_hf.report import (
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Level,
    Section,
    Series,
    Tile,
    code_block,
    figure,
    line_chart,
    page,
    paragraphs,
    sample,
    table,
    verdict,
    write_page,
)


EVIL = '<script>alert("1")</script>&'
VOID = {"meta", "br", "img", "input", "hr", "link"}


class Balance(HTMLParser):
    """Fails on a tag that is closed twice or never."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag


def chart(points, **options) -> ElementTree.Element:
    options = {"x_label": "step", "y_label": "nats", "alt": "a chart"} | options
    series = points if isinstance(points[0], Series) else [Series("loss", points, colour=0)]
    return ElementTree.fromstring(str(line_chart(series, **options)))


def polyline(svg: ElementTree.Element) -> list[tuple[float, float]]:
    text = svg.find("polyline").get("points")
    return [tuple(map(float, pair.split(","))) for pair in text.split()]


def full_page() -> str:
    body = [
        Section(EVIL, paragraphs(EVIL)),
        Section("code", code_block(EVIL)),
        Section("table", table([EVIL], [[EVIL], [3]])),
        Section("sample", sample(EVIL, EVIL)),
        Section("plain text", EVIL),
        Section(
            "chart",
            figure(
                line_chart(
                    [Series(EVIL, [(0, 1), (1, 2)], 0)],
                    levels=[Level(EVIL, 1, 1)],
                    x_label=EVIL,
                    y_label=EVIL,
                    alt=EVIL,
                ),
                EVIL,
            ),
        ),
    ]
    return page(EVIL, EVIL, body, tiles=[Tile(EVIL, EVIL)], footer=EVIL)


def test_every_text_is_escaped():
    html = full_page()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 15


def test_tags_balance():
    parser = Balance()
    parser.feed(full_page())
    assert not parser.open
    assert {"svg", "table", "figure", "section"} <= set(parser.seen)


def test_page_loads_nothing_from_elsewhere():
    html = full_page()
    assert not re.search(r"""(?:src|href|action)\s*=|url\(|@import|https?://""", html)


def test_page_is_made_for_phones_and_both_schemes():
    html = full_page()
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html
    styles = re.findall(r":root \{(.*?)\}", html, re.S)
    light, dark = (set(re.findall(r"(--[\w-]+):", style)) for style in styles)
    assert light == dark, "a colour is missing in one of the schemes"
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) - {"--when", "--at"} <= light


def test_page_without_tiles_and_footer():
    assert '<div class="tiles">' not in page("t", "l", [])


def test_write_page_leaves_only_the_page(tmp_path: Path):
    path = write_page(tmp_path / "report.html", page("t", "l", []))
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_verdict_says_it_in_words_too():
    assert "pass" in verdict(True) and "FAIL" in verdict(False)


def test_numbers_are_aligned_and_text_is_not():
    html = table(["a", "b"], [["x", 1.5]])
    assert '<td class="number">1.5</td>' in html and "<td>x</td>" in html


def test_markup_passes_unescaped_and_text_does_not():
    assert paragraphs(Markup("<b>x</b>"), "<b>") == "<p><b>x</b></p>\n<p>&lt;b&gt;</p>"


def test_line_follows_the_data():
    points = polyline(chart([(0, 4.0), (50, 2.0), (100, 1.0)]))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 == LEFT and x2 == WIDTH - RIGHT and x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    # From 0 upwards and linear: the fall from 4 to 2 is twice the fall from 2 to 1, and downwards on the screen.
    assert y1 - y0 == pytest.approx(2 * (y2 - y1), abs=0.2) and y1 > y0


def test_everything_stays_inside_the_frame():
    svg = chart([(0, 7.3), (999, 0.01)], levels=[Level("high", 9.9, 1)])
    for element in svg.iter():
        for name, limit in (("x", WIDTH), ("x1", WIDTH), ("x2", WIDTH), ("y", HEIGHT), ("y1", HEIGHT), ("y2", HEIGHT)):
            if element.get(name) is not None:
                assert 0 <= float(element.get(name)) <= limit


def test_smoothing_is_the_centred_mean_and_keeps_both_ends():
    values = [3.0, 1.0, 2.0, 6.0, 4.0]
    plain = polyline(chart([(i, v) for i, v in enumerate(values)], levels=[Level("top", 6.0, 1)]))
    smooth = polyline(chart([Series("loss", list(enumerate(values)), 0, smooth=3)], levels=[Level("top", 6.0, 1)]))
    expected = [plain[0][1], *((plain[i - 1][1] + plain[i][1] + plain[i + 1][1]) / 3 for i in (1, 2, 3)), plain[4][1]]
    assert [y for _, y in smooth] == pytest.approx(expected, abs=0.11)


def test_noisy_points_are_drawn_behind_a_smoothed_line():
    svg = chart([Series("loss", [(i, 1.0 + i % 2) for i in range(10)], 0, smooth=5)])
    assert len(svg.findall("g/circle")) == 10


def test_points_that_are_no_numbers_are_left_out():
    assert len(polyline(chart([(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]))) == 2


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="no finite point"):
        line_chart([Series("loss", [(0, math.nan)], 0)], x_label="x", y_label="y", alt="a")


def test_labels_do_not_lie_on_each_other():
    svg = chart([(0, 2.0), (1, 2.0)], levels=[Level("one", 2.0, 0), Level("two", 2.01, 1), Level("three", 1.99, 1)])
    texts = [t for t in svg.findall("text") if t.get("class")]
    assert {t.text for t in texts} == {"loss", "one", "two", "three"}
    for side in ("start", "end"):
        heights = sorted(float(t.get("y")) for t in texts if t.get("text-anchor") == side)
        assert all(b - a >= 14 for a, b in zip(heights, heights[1:], strict=False))


def test_a_label_stands_where_the_curve_is_far_from_it():
    svg = chart([(0, 8.0), (50, 2.0), (100, 1.0)], levels=[Level("top", 8.0, 1), Level("bottom", 1.2, 1)])
    sides = {t.text: t.get("text-anchor") for t in svg.findall("text") if t.get("class")}
    assert sides["top"] == "end" and sides["bottom"] == "start"


def test_chart_has_words_for_those_who_cannot_see_it():
    assert chart([(0, 1), (1, 2)]).get("aria-label") == "a chart"
