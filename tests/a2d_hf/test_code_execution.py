"""Programs under limits: each attack that docs/evaluation.md lists, tried; and pass@k against counting."""

import itertools
import os
import time
from pathlib import Path

import pytest

from a2d_hf import code_execution
from a2d_hf.code_execution import Limits, pass_at_k, run_program, run_programs
from a2d_hf.errors import BadInput


SMALL = Limits(seconds=3.0, memory_mb=256, file_mb=1, processes=4)


def marked(mark: str) -> list[int]:
    """Processes that have `mark` in their command line or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_a_right_program_passes_and_a_wrong_one_says_why():
    assert run_program("def f(x):\n    return x + 1\nassert f(1) == 2").result == "passed"
    outcome = run_program("def f(x):\n    return x\nassert f(1) == 2, 'one off'")
    assert not outcome.passed and outcome.result == "failed: AssertionError: one off"
    assert "SyntaxError" in run_program("def f(:").result


ATTACKS = {
    "infinite loop": ("while True:\n    pass", "timed out"),
    "sleeps for ever": ("import time\ntime.sleep(10**6)", "timed out"),
    "memory bomb": ("x = bytearray(10**9)", "MemoryError"),
    "growing memory": ("x = []\nwhile True:\n    x.append(bytearray(10**7))", "MemoryError"),
    "fork bomb": ("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
                  "timed out"),
    "fork bomb that leaves its session": (
        "import os\nwhile True:\n    try:\n        if os.fork() == 0:\n            os.setsid()\n"
        "    except OSError:\n        pass", "timed out"),
    "starts a program": ("import subprocess\nsubprocess.run(['/bin/true'])", "PermissionError"),
    "sys.exit before the tests": ("import sys\nsys.exit(0)", "ended before its tests (exit code 0)"),
    "os._exit before the tests": ("import os\nos._exit(0)", "ended before its tests (exit code 0)"),
    "reads standard input": ("input()", "EOFError"),
    "kills its parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nwhile True:\n    pass",
                         "it ended its supervisor"),
    "kills its process group": ("import os, signal\nos.killpg(0, signal.SIGKILL)", "exit code -9"),
    "a huge file": ("with open('big', 'wb') as f:\n    f.write(bytes(2**22))\n", "File too large"),
    "raises its own limits": ("import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))\n"
                              "with open('big', 'wb') as f:\n    f.write(bytes(2**22))\n", None),
    "a huge error": ("import sys\nwhile True:\n    sys.stderr.write('x' * 2**20)", None),
    "recursion": ("def f():\n    f()\nf()", "RecursionError"),
    "pretends to have passed": ("import os\nfor n in range(3, 64):\n    try:\n        os.write(n, b'passed')\n"
                                "    except OSError:\n        pass\nos._exit(0)", "ended before its tests"),
}  # fmt: skip


@pytest.mark.parametrize(("program", "words"), ATTACKS.values(), ids=ATTACKS)
def test_an_attack_fails_and_leaves_nothing_running(program, words):
    started = time.monotonic()
    outcome = run_program(program + "\nassert False", SMALL)
    assert not outcome.passed and time.monotonic() - started < 15
    words = (words,) if isinstance(words, str) else words or ("",)
    assert any(word in outcome.result for word in words), outcome.result
    time.sleep(0.2)
    assert not marked("a2d-code-"), "something of it still runs"


def test_huge_output_goes_nowhere_and_harms_nobody():
    outcome = run_program("for _ in range(200):\n    print('x' * 2**20)", Limits(seconds=20.0))
    assert outcome.passed and outcome.result == "passed"
    outcome = run_program("raise ValueError('x' * 10**6)")
    assert len(outcome.result) < 400


def test_it_writes_into_a_folder_of_its_own_which_is_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = (
        "import os, tempfile\nfor name in ('here', '~/home'):\n    open(os.path.expanduser(name), 'w').write('x')\n"
        "assert os.getcwd() == os.environ['HOME'] == tempfile.gettempdir()\nraise ValueError(os.getcwd())"
    )  # fmt: skip
    outcome = run_program(program)
    folder = Path(outcome.result.split("ValueError: ")[1])
    assert not folder.exists() and not list(tmp_path.iterdir())


def test_it_sees_nothing_of_our_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    outcome = run_program(
        "import os, sys\nassert 'HF_TOKEN' not in os.environ, 'seen'\nassert 'a2d_hf' not in sys.modules"
    )
    assert outcome.passed, outcome.result


def test_threads_are_no_processes():
    program = (
        "import threading\nx = []\nt = threading.Thread(target=lambda: x.append(1))\nt.start()\nt.join()\nassert x"
    )
    assert run_program(program).result == "passed"


def test_many_run_side_by_side_in_order():
    programs = [f"assert {i} % 2 == 0" for i in range(6)]
    ended = []
    outcomes = run_programs(programs, SMALL, workers=2, advance=lambda: ended.append(1))
    assert [one.passed for one in outcomes] == [True, False] * 3 and len(ended) == 6


def test_a_supervisor_that_hangs_is_ended(monkeypatch, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(code_execution, "SUPERVISOR", slow)
    monkeypatch.setattr(code_execution, "GRACE_S", 0.5)
    assert "its supervisor with it" in run_program("pass", Limits(seconds=0.5)).result


@pytest.mark.parametrize(("total", "correct"), [(5, 0), (5, 2), (5, 5), (4, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(total, correct):
    samples = [True] * correct + [False] * (total - correct)
    for k in range(1, total + 1):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(total, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(BadInput, match="pass@3 needs at least 3 samples per problem, not 2"):
        pass_at_k(2, 1, 3)
