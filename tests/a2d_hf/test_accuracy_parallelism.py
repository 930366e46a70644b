"""The accuracy-parallelism curve: AUP by hand, and a picture that parses."""

import math
import xml.etree.ElementTree as ElementTree

import pytest

from a2d_hf.accuracy_parallelism import aup, draw_panels


def test_a_flat_curve_is_a_rectangle():
    assert aup([(1.0, 80.0), (4.0, 80.0), (2.0, 80.0)]) == pytest.approx(4 * 80)


def test_lost_accuracy_is_discounted():
    w = math.exp(-3 * (1 - 76 / 80))
    assert aup([(1.0, 80.0), (3.0, 76.0)]) == pytest.approx(80 + 0.5 * 2 * (76 * w + 80))
    # Against a better method both points are discounted, the first rectangle is not.
    w1, w2 = (math.exp(-3 * (1 - y / 90)) for y in (80, 76))
    assert aup([(1.0, 80.0), (3.0, 76.0)], best=90.0) == pytest.approx(80 + 0.5 * 2 * (76 * w2 + 80 * w1))


def test_points_that_fell_too_far_do_not_count():
    assert aup([(1.0, 80.0), (2.0, 80.0), (5.0, 74.9)]) == pytest.approx(160)
    assert aup([(1.0, 80.0), (2.0, 75.0)]) > 80
    assert aup([(1.0, 0.0), (2.0, 0.0)]) == 0.0
    with pytest.raises(ValueError, match="`points` is empty"):
        aup([])


def test_the_picture_has_a_line_for_each_name_and_a_dot_for_each_point():
    lines = {"a < b": [(1.0, 2.0), (3.0, 1.0)], "c": [(2.0, 2.0)]}
    root = ElementTree.fromstring(draw_panels([("left", "x", "y", lines), ("right", "x", "y", {"c": [(0.0, 0.0)]})]))
    name = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f".//{name}polyline")) == 3 and len(root.findall(f".//{name}circle")) == 4
    texts = [text.text for text in root.iter(f"{name}text")]
    assert texts.count("a < b") == 1 and texts.count("c") == 1 and "left" in texts
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.findall(f".//{name}circle")]
    assert dots[0][0] < dots[2][0] < dots[1][0] and dots[0][1] < dots[1][1]  # y grows downwards
