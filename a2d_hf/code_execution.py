"""Running what a model has written: many programs side by side, each under a supervisor of its own, and pass@k.

Owns the default limits and the estimator. The limits themselves are code_supervisor.py's; this is no sandbox.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import BadInput


SUPERVISOR = Path(__file__).with_name("code_supervisor.py")
GRACE_S = 15.0  # what a supervisor may take beside the program's own time


@dataclass(frozen=True)
class Limits:
    """
    What one program may use.

    Attributes:
        seconds (`float`): of wall-clock time.
        memory_mb (`int`): of address space, per process.
        file_mb (`int`): largest file it may write.
        processes (`int`): that it may have at once.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    file_mb: int = 16
    processes: int = 8


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        passed (`bool`): whether the program reached its end.
        result (`str`): in words.
    """

    passed: bool
    result: str


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """
    Runs one program with a supervisor.

    Args:
        program (`str`): Python source, its tests included.
        limits ([`Limits`], *optional*): what it may use.

    Returns:
        [`Outcome`]
    """
    limits = limits or Limits()
    given = json.dumps({"program": program, "limits": asdict(limits)})
    with subprocess.Popen(
        [sys.executable, "-I", str(SUPERVISOR)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
        env={"PATH": os.defpath, "LANG": "C.UTF-8"},
    ) as supervisor:
        try:
            out, _ = supervisor.communicate(given, timeout=limits.seconds + GRACE_S)
            return Outcome(**json.loads(out))
        except subprocess.TimeoutExpired:
            supervisor.kill()
            return Outcome(False, "timed out, and its supervisor with it")
        except (ValueError, TypeError):
            return Outcome(False, "failed: it ended its supervisor")


def run_programs(
    programs: Sequence[str],
    limits: Limits | None = None,
    workers: int | None = None,
    advance: Callable[[], None] | None = None,
) -> list[Outcome]:
    """
    Runs programs side by side.

    Args:
        programs (`Sequence[str]`): Python sources.
        limits ([`Limits`], *optional*): for each.
        workers (`int`, *optional*): at once; as many as there are processors by default.
        advance (`Callable[[], None]`, *optional*): told of each that has ended.

    Returns:
        `list[Outcome]`: in order.
    """

    def one(program: str) -> Outcome:
        outcome = run_program(program, limits)
        if advance is not None:
            advance()
        return outcome

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(one, programs))


def pass_at_k(total: int, correct: int, k: int) -> float:
    """
    Chance that at least one of k samples is right, estimated without bias from `total` of which `correct` are
    (Codex, https://huggingface.co/papers/2107.03374, equation 1): 1 - C(n - c, k) / C(n, k).
    """
    if not 1 <= k <= total or not 0 <= correct <= total:
        raise BadInput(f"pass@{k} needs at least {k} samples per problem, not {total}.")
    return 1.0 - math.comb(total - correct, k) / math.comb(total, k)
