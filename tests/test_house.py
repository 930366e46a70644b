"""The rules of the house that a reader cannot check by eye: import directions, file lengths, no private paths.

Reads source files only; imports no package of the project.
"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("modeling", "trainers", "a2d_hf", "recipes", "scripts")
# What each house may import of this project; itself always.
MAY_IMPORT = {
    "modeling": set(),
    "trainers": {"modeling"},
    "a2d_hf": {"modeling", "trainers"},
    "recipes": {"modeling", "trainers", "a2d_hf"},
    "scripts": {"modeling", "trainers", "a2d_hf", "recipes"},
}
LONGEST_FILE, LONGEST_TEST_FILE = 400, 600  # lines
# Dated exceptions, each with a reason; empty is the goal.
LONGER_FILES: dict[str, int] = {}
STANDARD = set(sys.stdlib_module_names)
# What only an extra brings, and the files that are useless without it.
NEEDS_AN_EXTRA = {
    "matplotlib": {"scripts/bench_conversion.py", "scripts/bench_decoding.py"},
    "lm_eval": {
        "a2d_hf/lm_eval_model.py",
        "a2d_hf/lm_eval_cli.py",
        "a2d_hf/local_metrics.py",
        "a2d_hf/task_scores.py",
    },
    "evaluate": {
        "a2d_hf/local_metrics.py",
        "a2d_hf/metric_code_eval.py",
        "a2d_hf/metric_exact_match.py",
        "a2d_hf/metric_rouge.py",
    },
    "rouge_score": {"a2d_hf/metric_rouge.py"},
    "bitsandbytes": {"trainers/model_resolution.py"},
    "tqdm": {"a2d_hf/lm_eval_model.py"},
}


def source_files(house: str) -> list[Path]:
    return sorted(path for path in (ROOT / house).rglob("*.py") if "__pycache__" not in path.parts)


def house_of(module: str) -> str | None:
    """Which house an absolute module name of this project lives in; `None` for other packages."""
    if not (module == "a2d_hf" or module.startswith("a2d_hf.")):
        return module if module in HOUSES else None
    second = module.split(".")[1] if "." in module else ""
    return second if second in ("modeling", "trainers") else "a2d_hf"


def imported_modules(path: Path, house: str) -> list[tuple[int, str]]:
    """Absolute names of everything a file imports, at any depth of nesting, relative imports resolved."""
    inside = path.relative_to(ROOT / house).with_suffix("").parts
    package = {"a2d_hf": ["a2d_hf"]}.get(house, ["a2d_hf", house]) + list(inside[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - (node.level - 1)]
                found.append((node.lineno, ".".join([*base, node.module] if node.module else base)))
                if node.module is None:
                    found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
            else:
                found.append((node.lineno, node.module or ""))
    return found


@pytest.mark.parametrize("house", HOUSES)
def test_imports_point_one_way(house: str):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in source_files(house)
        for line, module in imported_modules(path, house)
        if (target := house_of(module)) is not None and target != house and target not in MAY_IMPORT[house]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_import_check_sees_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "modeling").mkdir()
    file = tmp_path / "modeling" / "wrong.py"
    file.write_text("def f():\n    from a2d_hf.trainers import x\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(AssertionError, match="wrong.py:2 imports a2d_hf.trainers"):
        test_imports_point_one_way("modeling")


def test_modeling_files_can_travel_alone():
    """transformers' exporter follows `from .sibling import x` only; anything else breaks a saved checkpoint."""
    wrong = []
    for path in source_files("modeling"):
        if path.parent != ROOT / "modeling":
            wrong.append(f"{path.relative_to(ROOT)} lies in a folder of its own")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            elif isinstance(node, ast.ImportFrom):
                if node.level > 1 or not node.module or "." in node.module:
                    wrong.append(f"{where} is not a flat sibling import")
                continue
            else:
                continue
            for name in names:
                if name.split(".")[0] not in STANDARD | {"torch", "transformers"}:
                    wrong.append(f"{where} imports {name}")
    assert not wrong, "\n".join(wrong)


def beside(path: Path) -> set[str]:
    """A script finds the modules of its own folder."""
    return {sibling.stem for sibling in path.parent.glob("*.py")} if path.parent == ROOT / "scripts" else set()


def test_every_third_party_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("-", "_") for line in project["dependencies"]}
    # Modules whose distribution has another name, and those that a declared one cannot be without.
    declared |= {"huggingface_hub", "numpy", "yaml", "packaging", "markupsafe", "pyarrow"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for house in HOUSES
        for path in source_files(house)
        for line, module in imported_modules(path, house)
        if module.split(".")[0] not in STANDARD | declared | set(HOUSES) | beside(path)
        and path.relative_to(ROOT).as_posix() not in NEEDS_AN_EXTRA.get(module.split(".")[0], ())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("house", [*HOUSES, "tests"])
def test_files_are_rooms_not_halls(house: str):
    longest = LONGEST_TEST_FILE if house == "tests" else LONGEST_FILE
    long = [
        f"{path.relative_to(ROOT)} has {count} lines"
        for path in source_files(house)
        if (count := len(path.read_text(encoding="utf-8").splitlines()))
        > LONGER_FILES.get(str(path.relative_to(ROOT)), longest)
    ]
    assert not long, f"more than {longest} lines: " + ", ".join(long)


@pytest.mark.parametrize("house", [*HOUSES, "tests"])
def test_files_say_first_what_they_own(house: str):
    silent = [
        str(path.relative_to(ROOT))
        for path in source_files(house)
        if path.read_text(encoding="utf-8").strip()
        and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent, silent


def project_texts() -> list[Path]:
    """Everything that is or would be committed, as git sees it; the whole tree where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        skipped = {".venv", "runs", "build", "__pycache__", ".git"}
        paths = [path for path in ROOT.rglob("*") if not skipped & set(path.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file() and path.suffix not in {".png", ".safetensors", ".gz"}]


def test_no_file_names_a_private_path():
    private = re.compile(r"(?<![\w/.])/(?:home|root|Users|work|mnt)/[\w.-]+")
    wrong = []
    for path in project_texts():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if private.search(line) and "private = re.compile" not in line:
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def test_readme_shows_the_two_commands_and_the_snippet_runs_on_real_names():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for command in ("quickstart", "test"):
        assert re.search(rf"^\s*make {command}\b", readme, re.M), f"README does not show `make {command}`"
        assert command in targets, f"Makefile has no target {command}"
    snippets = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert snippets, "README has no Python snippet"
    exported = set(
        re.findall(
            r'"(\w+)"', re.search(r"_HOME = \{(.*?)\}", (ROOT / "a2d_hf/__init__.py").read_text(), re.S).group(1)
        )
    )
    for snippet in snippets:
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module == "a2d_hf":
                assert {alias.name for alias in node.names} <= exported, "README imports what a2d_hf does not export"


def test_constraints_pin_every_line_exactly():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    loose = [
        line for line in lines if line and not line.startswith("#") and not re.fullmatch(r"[\w.-]+==[\w.]+", line)
    ]
    assert not loose, loose
