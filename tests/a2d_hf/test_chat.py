"""`a2d chat` as a user meets it: lines piped in, and a real terminal."""

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

from a2d_hf.cli import main
from a2d_hf.live_draft import LiveDraft


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Two converted checkpoints that end no text early: one with a chat template, one without."""
    from a2d_hf.modeling import A2DForMaskedDiffusion, A2DGenerationConfig
    from tests.conftest import tiny_model, tiny_tokenizer

    folders = {}
    for name, template in (("template", TEMPLATE), ("plain", None)):
        tokenizer = tiny_tokenizer()
        model = A2DForMaskedDiffusion.from_causal_lm(tiny_model("llama"), tokenizer, objective="bd3lm", block_size=8)
        model.generation_config = A2DGenerationConfig(bos_token_id=1, pad_token_id=0)
        tokenizer.chat_template = template
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture
def chat(converted, capsys, monkeypatch):
    """Runs a chat over lines: (exit code, stdout, stderr, prompts that the model got)."""
    from a2d_hf.modeling import A2DForMaskedDiffusion

    def run(lines: list[str], *arguments: str, model: str = "plain"):
        prompts = []
        decode = A2DForMaskedDiffusion.diffusion_generate

        def spy(self, inputs=None, **kwargs):
            prompts.append((kwargs.get("input_ids"), kwargs))
            return decode(self, inputs, **kwargs)

        monkeypatch.setattr(A2DForMaskedDiffusion, "diffusion_generate", spy)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        defaults = ["--max-new-tokens", "8", "--device", "cpu"]
        before = signal.getsignal(signal.SIGTERM)
        code = main(["chat", str(converted[model]), *defaults, *arguments])
        signal.signal(signal.SIGTERM, before)
        captured = capsys.readouterr()
        return code, captured.out, captured.err, prompts

    return run


def text_of(converted, ids) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(converted["plain"]).decode(ids[0])


def test_plain_text_goes_on_from_turn_to_turn(chat, converted):
    code, out, err, prompts = chat(["The quick", "A model"])
    first, second = (text_of(converted, ids) for ids, _ in prompts)
    assert code == 0 and first == "The quick" and not err
    answer = out.splitlines()[0]
    assert second == f"The quick{answer}\nA model" and len(answer) > 0
    assert out.count("8 forwards, 1.00 tokens per forward; cut off after 8 tokens") == 2


def test_the_chat_template_is_used_unless_told_otherwise(chat, converted):
    _, out, _, prompts = chat(["The quick", "dog"], model="template")
    answer = out.splitlines()[0].strip()
    first, second = (text_of(converted, ids) for ids, _ in prompts)
    assert first == "user: The quick\nassistant: "
    assert second == f"user: The quick\nassistant: {answer}\nuser: dog\nassistant: "
    _, _, _, prompts = chat(["The quick"], "--no-chat-template", model="template")
    assert text_of(converted, prompts[0][0]) == "The quick"


def test_an_empty_line_writes_from_nothing_and_leaves_the_conversation_alone(chat, converted):
    _, _, _, prompts = chat(["The quick", "", "dog"])
    assert prompts[1][0] is None and text_of(converted, prompts[2][0]).startswith("The quick")


def test_commands_change_the_decoding(chat):
    lines = ["/steps 2", "/block 4", "/selector threshold 0.25", "/temperature 0.5", "/tokens 4", "The"]
    code, _, err, prompts = chat(lines)
    kwargs = prompts[0][1]
    assert code == 0 and not err
    wanted = {"steps": 2, "block_size": 4, "selector": "threshold", "threshold": 0.25, "temperature": 0.5}
    assert {name: kwargs[name] for name in wanted} == wanted and kwargs["max_new_tokens"] == 4
    _, _, _, prompts = chat(["/steps 2", "/steps auto", "/selector threshold 0.25", "/selector margin", "The"])
    kwargs = prompts[0][1]
    assert "steps" not in kwargs and "threshold" not in kwargs and kwargs["selector"] == "margin"


def test_reset_forgets_help_lists_and_quit_leaves(chat, converted):
    code, out, _, prompts = chat(["The", "/reset", "dog", "/help", "/quit", "never"])
    assert code == 0 and len(prompts) == 2 and text_of(converted, prompts[1][0]) == "dog"
    assert all(f"/{name}" in out for name in ("steps", "block", "selector", "temperature", "reset", "help", "quit"))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/fly", "no command /fly"),
        ("/steps", "/steps takes one value"),
        ("/steps many", "takes a number, not 'many'"),
        ("/steps 0", "`steps`"),
        ("/tokens auto", "takes a number"),
        ("/selector best", "/selector takes one of confidence"),
        ("/selector margin 3", "takes no number"),
        ("/selector threshold 3", "`threshold`"),
        ("/temperature -1", "`temperature`"),
        ("/tokens 400", None),
    ],
)
def test_a_bad_command_is_one_sentence_and_the_chat_goes_on(chat, line, sentence):
    lines = [line, "The quick"] if sentence else [line, "The quick", "/tokens 8", "The quick"]
    code, out, err, _ = chat(lines)
    assert code == 0 and err.count("a2d: error:") == 1 and "Traceback" not in err
    assert (sentence or "context is 128") in err
    assert out.count("8 forwards") == 1


def test_a_mask_token_in_the_text_is_refused(chat, converted):
    from transformers import AutoTokenizer

    mask = AutoTokenizer.from_pretrained(converted["plain"]).mask_token
    code, out, err, prompts = chat([f"The {mask} fox", "dog"])
    assert code == 0 and err.count("a2d: error:") == 1 and mask in err and "leave it out" in err
    assert len(prompts) == 1 and text_of(converted, prompts[0][0]) == "dog"


def test_turns_that_no_longer_fit_are_forgotten_aloud(chat, converted):
    line = "the lazy dog jumps over the fox"
    _, _, err, prompts = chat([line] * 5, "--max-new-tokens", "40")
    assert "forgotten: the context holds 128 tokens" in err
    assert all(ids.shape[1] + 40 <= 128 for ids, _ in prompts)


def test_the_same_seed_gives_the_same_conversation(chat):
    arguments = ("--temperature", "1.0", "--seed", "5")
    first, second = chat(["The", "dog"], *arguments)[1], chat(["The", "dog"], *arguments)[1]
    assert first == second != chat(["The", "dog"], "--temperature", "1.0", "--seed", "6")[1]


def test_wrong_arguments_are_refused_before_the_model_is_loaded(chat, tmp_path, capsys):
    assert chat(["The"], "--steps", "0")[0] == 2
    assert main(["chat", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("a2d: error:") == 1


# ------------------------------------------------------------------------------------------------- a real terminal


class Terminal:
    """`a2d chat` in a pseudo-terminal."""

    def __init__(self, folder, *arguments):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "a2d_hf.cli", "chat", str(folder), "--device", "cpu", *arguments]
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 90.0) -> str:
        """Reads until `text` has appeared since the last call; returns what was read."""
        end, read = time.monotonic() + seconds, ""
        while text not in read:
            assert time.monotonic() < end, f"no {text!r} in {read!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    read += os.read(self.master, 65536).decode(errors="replace")
        self.seen += read
        return read

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@pytest.fixture
def terminal(converted):
    terminals = []

    def start(*arguments):
        terminals.append(Terminal(converted["plain"], *arguments))
        return terminals[-1]

    yield start
    for each in terminals:
        each.process.kill()
        each.process.wait()
        os.close(each.master)


def test_in_a_terminal_the_answer_is_drawn_live_and_ctrl_c_is_clean(terminal):
    screen = terminal("--max-new-tokens", "100")
    assert "/help for commands" in screen.wait_for("> ")
    screen.type("/tokens 8\n")
    screen.wait_for("> ")
    screen.type("The quick\n")
    drawn = screen.wait_for("tokens per forward")
    assert drawn.count("\033[33m") == 8 and "\0338\033[J" in drawn  # each draft in yellow, then taken back
    screen.wait_for("> ")
    screen.type("/tokens 100\n")
    screen.wait_for("> ")
    screen.type("The\n")
    screen.wait_for("\033[33m")
    screen.interrupt()  # while it writes: only this answer ends
    assert "this turn is forgotten" in screen.wait_for("> ")
    for _ in range(6):  # at the prompt: leaves; between prompt and read, CPython holds a signal until the next one
        screen.interrupt()
        with contextlib.suppress(subprocess.TimeoutExpired):
            screen.process.wait(5)
            break
    assert screen.process.wait(1) == 130 and "Traceback" not in screen.seen


def test_ctrl_d_leaves(terminal):
    screen = terminal()
    screen.wait_for("> ")
    screen.type("\x04")
    assert screen.process.wait(30) == 0


def test_a_draft_makes_room_before_it_remembers_its_place(capsys):
    class Letters:
        def decode(self, ids, **kwargs):
            return "x" * len(ids)

    LiveDraft(Letters()).put_draft(torch.zeros(50, dtype=torch.long))
    printed = capsys.readouterr().out
    down, up = printed.count("\033D"), re.search(r"\033\[(\d+)A", printed)
    assert down == int(up[1]) == 2 and printed.index("\033D") < printed.index("\0337") < printed.index("xxx")
