"""Runs one untrusted program under limits and says how it ended. A program of its own: `python -I code_supervisor.py`.

Owns the limits. Reads one JSON object on stdin, writes one on stdout, imports the standard library alone. It is no
sandbox: a program keeps the rights of the user who runs it, may read what he may read, and reach the network.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path


SUBREAPER, DEATH_SIGNAL = 36, 1  # prctl(2)
PAUSE_S, CLEANUP_S = 0.01, 5.0
DETAIL = 300  # characters of the error that are kept

# seccomp(2): for each machine its audit number and those of clone, fork and vfork (absent: a number nobody has).
MACHINES = {"x86_64": (0xC000003E, 56, 57, 58), "aarch64": (0xC00000B7, 220, 0xFFFF, 0xFFFF)}
CLONE3, CLONE_THREAD = 435, 0x10000
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE, UNKNOWN = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


def descendants(root: int) -> set[int]:
    """Every process below `root`; orphans hang below the supervisor too, since it is their reaper."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                    parents[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
    found, edge = set(), {root}
    while edge:
        edge = {child for child, parent in parents.items() if parent in edge} - found
        found |= edge
    return found


def end_all() -> None:
    """Kills everything that the program started, however often it forks meanwhile."""
    deadline = time.monotonic() + CLEANUP_S
    while time.monotonic() < deadline:
        left = descendants(os.getpid())
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none forks while the others die
            for pid in left:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(PAUSE_S)


def forbid_processes(prctl) -> bool:
    """Refuses this process, and what it becomes, every new process; threads stay. `False` where the kernel cannot."""
    if platform.machine() not in MACHINES:
        return False
    machine, clone, fork, vfork = MACHINES[platform.machine()]
    # Each line: operation, lines to skip where true, where false, operand.
    lines = [
        (LOAD, 0, 0, 4), (EQUAL, 0, 8, machine),
        (LOAD, 0, 0, 0), (EQUAL, 7, 0, CLONE3), (EQUAL, 5, 0, fork), (EQUAL, 4, 0, vfork), (EQUAL, 0, 2, clone),
        (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, CLONE_THREAD),
        (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, UNKNOWN),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code)))
    return prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and prctl(SET_SECCOMP, FILTER, program, 0, 0) == 0


def limited(limits: dict, prctl) -> None:
    """In the new process, before the program: the limits, which a child cannot raise again."""
    prctl(DEATH_SIGNAL, signal.SIGKILL)
    megabyte = 2**20
    for name, value in (
        (resource.RLIMIT_AS, limits["memory_mb"] * megabyte),
        (resource.RLIMIT_FSIZE, limits["file_mb"] * megabyte),
        (resource.RLIMIT_CPU, int(limits["seconds"]) + 1),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(name)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (bound, bound))
    os.umask(0o077)
    # Not RLIMIT_NPROC, which counts all processes of the user and exempts root. Without seccomp, `watch` counts.
    forbid_processes(prctl)


def watch(process: subprocess.Popen, limits: dict) -> str | None:
    """Waits for the program; what it was stopped for, or `None` where it ended by itself."""
    deadline = time.monotonic() + limits["seconds"]
    while process.poll() is None:
        if time.monotonic() > deadline:
            return "timed out"
        if len(descendants(process.pid)) >= limits["processes"]:
            return "too many processes"
        time.sleep(PAUSE_S)
    return None


def supervise(program: str, limits: dict) -> dict:
    """
    Runs a program.

    Args:
        program (`str`): Python source. It has passed when its last line is reached, not when it exits with 0.
        limits (`dict`): `seconds`, `memory_mb`, `file_mb`, `processes`.

    Returns:
        `dict`: `passed`, and `result` in words.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(SUBREAPER, 1, 0, 0, 0)
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="a2d-code-", ignore_cleanup_errors=True) as folder:
        work = Path(folder) / "work"
        work.mkdir(mode=0o700)
        source, errors = Path(folder) / "program.py", Path(folder) / "errors.txt"
        reading, writing = os.pipe()
        source.write_text(f"{program}\n\n__import__('os').write({writing}, b'{word}')\n", encoding="utf-8")
        environment = {"HOME": str(work), "TMPDIR": str(work), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8",
                       "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}  # fmt: skip
        with open(errors, "wb") as error_file:
            process = subprocess.Popen(
                [sys.executable, "-I", str(source)],
                cwd=work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=error_file,
                pass_fds=(writing,),
                start_new_session=True,
                preexec_fn=lambda: limited(limits, libc.prctl),
            )
        os.close(writing)
        stopped = watch(process, limits)
        end_all()
        os.set_blocking(reading, False)
        try:
            reached = os.read(reading, 4096).decode(errors="replace") == word
        except BlockingIOError:
            reached = False
        os.close(reading)
        last = errors.read_bytes()[-4000:].decode(errors="replace").strip().splitlines()[-1:]
    if stopped is None and reached:
        return {"passed": True, "result": "passed"}
    if stopped is None:
        code = process.returncode
        stopped = f"failed: {last[0][:DETAIL]}" if last else f"failed: ended before its tests (exit code {code})"
    return {"passed": False, "result": stopped}


if __name__ == "__main__":
    given = json.load(sys.stdin)
    print(json.dumps(supervise(given["program"], given["limits"])), flush=True)
