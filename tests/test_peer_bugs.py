"""docs/peer-bugs.md names tests and lines of ours: each of them is there."""

import ast
import re
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "peer-bugs.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| bug |", "| --- |"))
]


def test_the_page_has_rows_of_three_cells():
    assert len(ROWS) > 50
    assert [row for row in ROWS if len(row) != 3] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1].strip("`").rsplit("::", 1)[-1])
def test_the_named_test_and_line_exist(row):
    _, named, line = row
    file, test = named.strip("`").split("::")
    tree = ast.parse((REPOSITORY / "tests" / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    if line.startswith("none: "):
        return
    source, text = re.fullmatch(r"`([^`]+)`: `([^`]+)`(?: \*\*✂\*\*)?", line).groups()
    assert text in (REPOSITORY / source).read_text(encoding="utf-8")
