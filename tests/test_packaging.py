"""What a stranger gets from `pip install .`: a wheel that holds all three packages and works away from the repository.

Builds in a copy, installs into an empty environment, and reads only what is installed there.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "a2d_hf", "modeling", "trainers")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command in a clean environment: none of the caller's PYTHONPATH, and no repository in sight."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("copy")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    build = "import sys; from setuptools import build_meta as b; print(b.build_wheel(sys.argv[1]))"
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-c", build, target, cwd=copy)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel, and the dependencies by reference."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    (packages,) = (folder / "lib").glob("python*/site-packages")
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", packages, wheel,
        cwd=folder,
    )  # fmt: skip
    # `addsitedir` would follow the editable install's own .pth back into the repository; a plain path does not.
    dependencies = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return python


def test_the_wheel_holds_every_python_file_and_data_file(wheel: Path):
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for house, package in (("a2d_hf", "a2d_hf"), ("modeling", "a2d_hf/modeling"), ("trainers", "a2d_hf/trainers")):
        for path in (ROOT / house).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                expected.add(f"{package}/{path.relative_to(ROOT / house).as_posix()}")
    assert not expected - inside, "missing in the wheel: the folder or its data is not listed in pyproject.toml"
    top = {name.split("/")[0] for name in inside}
    assert {name for name in top if not name.endswith(".dist-info")} == {"a2d_hf"}, "no stray top-level package"


def test_three_packages_import_from_the_wheel_alone(installed: Path, tmp_path: Path):
    code = (
        "import json, a2d_hf, a2d_hf.modeling, a2d_hf.trainers, a2d_hf.cli;"
        "from a2d_hf import A2DConfig, A2DForMaskedDiffusion, MDLMConfig, MDLMTrainer, convert, detect;"
        "print(json.dumps([m.__file__ for m in (a2d_hf, a2d_hf.modeling, a2d_hf.trainers, a2d_hf.cli)]))"
    )
    files = json.loads(run(installed, "-c", code, cwd=tmp_path).stdout.splitlines()[-1])
    environment = installed.parents[1].resolve()
    assert all(Path(file).resolve().is_relative_to(environment) for file in files), files


def test_the_command_runs_outside_the_repository(installed: Path, tmp_path: Path):
    code = "import sys; from a2d_hf.cli import main; sys.exit(main(['--help']))"
    text = run(installed, "-c", code, cwd=tmp_path).stdout
    for command in ("detect", "convert", "sample", "eval", "runs", "resume", "quickstart"):
        assert command in text


def test_the_report_template_is_found_in_the_wheel(installed: Path, tmp_path: Path):
    code = "from a2d_hf.report import page; assert '<title>t</title>' in page('t', 'l', [])"
    run(installed, "-c", code, cwd=tmp_path)


def test_the_version_is_the_same_everywhere(wheel: Path):
    tree = ast.parse((ROOT / "a2d_hf" / "__init__.py").read_text(encoding="utf-8"))
    (version,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    )
    assert wheel.name.startswith(f"a2d_hf-{version}-")


def test_the_command_line_entry_point_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, function = project["scripts"]["a2d"].split(":")
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    names = {
        node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    }
    assert function in names
