"""`import a2d_hf` costs no torch, and still transformers' Auto classes know converted checkpoints, in any order."""

import subprocess
import sys
import time

import pytest


def run_python(code: str, *arguments: str) -> str:
    """stdout of `code` in a fresh interpreter."""
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


HEAVY = "import sys; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"


@pytest.mark.parametrize(
    "code",
    [
        "import a2d_hf",
        "from a2d_hf import detect",
        "import a2d_hf.cli; a2d_hf.cli.main(['--version'])",
        "import a2d_hf.cli; assert a2d_hf.cli.main(['convert', '--help']) == 0",
    ],
)
def test_light_imports_do_not_load_torch(code):
    assert run_python(f"{code}\n{HEAVY}").splitlines()[-1] == "[]"


def test_help_answers_in_under_a_second():
    taken = []
    for _ in range(3):
        began = time.monotonic()
        text = run_python("import sys, a2d_hf.cli; sys.exit(a2d_hf.cli.main(['--help']))")
        taken.append(time.monotonic() - began)
    assert "convert" in text
    assert min(taken) < 1.0


@pytest.mark.parametrize(
    "imports",
    [
        "import a2d_hf; from transformers import AutoModel",
        "from transformers import AutoModel; import a2d_hf",
        "import a2d_hf; from transformers import Trainer",
        "from transformers import AutoConfig; import a2d_hf",
        "import a2d_hf.modeling.modeling_a2d",
        "import a2d_hf; import trl",
    ],
)
def test_auto_classes_know_the_type_in_any_import_order(imports):
    code = f"{imports}\nfrom transformers import AutoConfig, AutoModelForMaskedLM\n" + (
        "config = AutoConfig.for_model('a2d')\n"
        "print(type(config).__name__, AutoModelForMaskedLM._model_mapping[type(config)].__name__)"
    )
    assert run_python(code).split() == ["A2DConfig", "A2DForMaskedDiffusion"]


def test_the_import_hook_takes_itself_away():
    code = (
        "import sys, a2d_hf; before = len(sys.meta_path); from transformers import AutoModel\n"
        "names = [type(finder).__name__ for finder in sys.meta_path]\n"
        "import transformers.models.auto.modeling_auto as m\n"
        "print('_WatchingFinder' in names, type(m.__loader__).__name__, type(m.__spec__.loader).__name__)"
    )
    assert run_python(code).split() == ["False", "SourceFileLoader", "SourceFileLoader"]


def test_a_failing_import_inside_transformers_leaves_the_hook_working():
    code = (
        "import a2d_hf, importlib\n"
        "try: importlib.import_module('transformers.does_not_exist')\n"
        "except ModuleNotFoundError: pass\n"
        "from transformers import AutoConfig; print(type(AutoConfig.for_model('a2d')).__name__)"
    )
    assert run_python(code).strip() == "A2DConfig"


def test_an_unknown_name_is_an_attribute_error():
    import a2d_hf

    with pytest.raises(AttributeError, match="no_such_name"):
        a2d_hf.no_such_name  # noqa: B018


def test_convert_stays_a_function_after_its_module_was_imported():
    code = (
        "import a2d_hf.conversion, a2d_hf.detection; from a2d_hf import convert, detect\n"
        "print(callable(convert), callable(detect))"
    )
    assert run_python(code).split() == ["True", "True"]
