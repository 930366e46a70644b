"""`a2d chat` as a user meets it: lines piped in, and a real terminal."""

import contextlib
import io
import json
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
    _, out, _, prompts = chat(["The quick", "", "dog"])
    assert out.count("cut off after 8 tokens") == 3 and out.count("8 tokens; from nothing") == 1
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
    assert all(
        f"/{name}" in out for name in ("set", "settings", "tokens", "seed", "negative", "undo", "retry", "save")
    )


def test_any_field_can_be_set_alone_or_with_others_and_given_back(chat):
    lines = ["/set remasking=remdm_cap remasking_eta=0.5 steps=9", "/set use_cache off", "/set suppress_tokens 5,6"]
    lines += ["/set stop-strings no such text", "/set guidance_scale 2.5", "The"]
    code, _, err, prompts = chat(lines)
    kwargs = prompts[0][1]
    wanted = {"remasking": "remdm_cap", "remasking_eta": 0.5, "steps": 9, "use_cache": False, "guidance_scale": 2.5}
    wanted |= {"suppress_tokens": [5, 6], "stop_strings": "no such text"}
    assert code == 0 and not err and {name: kwargs[name] for name in wanted} == wanted
    _, _, _, prompts = chat(["/set min_p 0.5", "/set temperature 1", "/set min_p auto", "/seed 7", "The", "dog"])
    assert "min_p" not in prompts[0][1] and prompts[0][1]["temperature"] == 1
    assert [kwargs["seed"] for _, kwargs in prompts] == [7, 8]


def test_a_bad_value_changes_nothing(chat):
    _, _, err, prompts = chat(["/steps 2", "/set steps=4 temperature=-1", "/set steps 0", "/set nonsense 3", "The"])
    assert err.count("a2d: error:") == 3 and prompts[0][1]["steps"] == 2 and "temperature" not in prompts[0][1]


def test_settings_show_what_is_in_force_and_mark_what_was_changed(chat):
    _, out, _, _ = chat(["/settings", "/steps 3", "/settings"], "--temperature", "0.5")
    before, after = out.split("steps 3   (checkpoint: as many as the selector needs)\n", 1)
    fields = [line for line in before.splitlines() if line.startswith(("* ", "  "))]
    starred = [line.split()[1] for line in fields if line.startswith("*") and "checkpoint:" in line]
    assert starred == ["max_new_tokens", "temperature"]
    assert re.search(r"^  block_size +8, as trained$", before, re.M)
    assert re.search(r"^  selector +confidence$", before, re.M)
    assert re.search(r"^\* steps +3 +\(checkpoint: as many as the selector needs\)$", after, re.M)
    assert re.search(r"not set: .*remasking", before)


def test_a_field_explains_itself(chat):
    _, out, _, _ = chat(["/help draft_steps", "/help top-k"])
    assert "draft_steps (int, default 1): forwards per draft" in out and "Limit what may be sampled" in out


def test_undo_takes_back_a_turn_and_retry_answers_it_again(chat, converted):
    _, out, _, prompts = chat(["The quick", "dog", "/undo", "/retry", "fox"], "--temperature", "1")
    texts = [text_of(converted, ids) for ids, _ in prompts]
    assert texts[0] == texts[2] == "The quick" and [kwargs["seed"] for _, kwargs in prompts] == [0, 1, 2, 3]
    first, _, rest = re.split(r"\n\[8 forwards.*\n", out)[:3]
    again = rest.removeprefix("  forgotten: dog\n")
    assert again != rest and again != first and texts[3] == f"The quick{again}\nfox"
    # Nothing random: the same answer is called that.
    assert "the same answer: /temperature 0.8" in chat(["The quick", "/retry"])[1]


def test_a_retry_that_fails_keeps_the_turn(chat, converted):
    _, _, err, prompts = chat(["The quick", "/tokens 400", "/retry", "/tokens 8", "dog"])
    assert err.count("a2d: error:") == 1 and text_of(converted, prompts[-1][0]).startswith("The quick")


def test_a_negative_prompt_goes_with_guidance_and_rests_without(chat, converted):
    lines = ["/set guidance_scale 2", "/negative A lazy dog", "The", "/set guidance_scale 1", "The"]
    _, out, err, prompts = chat([*lines, "/set guidance_scale 2", "/negative", "The"])
    assert not err and text_of(converted, prompts[0][1]["negative_prompt_ids"]) == "A lazy dog"
    assert "negative_prompt_ids" not in prompts[1][1] and "rests" in out
    assert "negative_prompt_ids" not in prompts[2][1]


def test_save_writes_the_conversation_and_never_over_a_file_of_somebody_else(chat, tmp_path):
    file, other = tmp_path / "talk.json", tmp_path / "other.json"
    other.write_text("mine")
    lines = ["/steps 4", "The quick", f"/save {file}", "dog", f"/save {file}", f"/save {other}"]
    _, out, err, _ = chat(lines)
    saved = json.loads(file.read_text())
    assert [each["role"] for each in saved["messages"]] == ["user", "assistant"] * 2
    assert saved["messages"][0]["content"] == "The quick" and saved["messages"][1]["content"] in out
    assert saved["settings"]["steps"] == 4 and saved["settings"]["block_size"] == 8
    assert err.count("a2d: error:") == 1 and "exists already" in err and other.read_text() == "mine"


def test_a_stop_string_is_told_apart_from_the_end_of_the_room(chat):
    answer = chat(["The quick"])[1].splitlines()[0]
    _, out, err, _ = chat([f"/set stop_strings {answer.strip()[:3]}", "The quick"])
    assert not err and "a stop string ended it" in out


def test_a_slash_can_be_said_behind_a_space(chat, converted):
    _, _, err, prompts = chat([" /etc/hosts"])
    assert not err and text_of(converted, prompts[0][0]) == "/etc/hosts"


def test_a_block_size_that_was_not_trained_is_warned_about_with_the_one_that_was(chat):
    from transformers.utils.logging import warning_once

    warning_once.cache_clear()
    code, out, err, _ = chat(["The quick"], "--block-size", "6")
    assert code == 0 and "8 forwards" in out and err.count("warning:") == 1
    assert "trained with blocks of 8 tokens and is decoded with `block_size=6`" in err


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/fly", "no command /fly"),
        ("/steps", "/steps takes one value"),
        ("/steps many", "`steps` must be a positive integer, not 'many'"),
        ("/steps 0", "`steps`"),
        ("/tokens 0", "an answer needs room"),
        ("/selector", "/selector takes a name"),
        ("/selector best", "`selector` must be one of confidence, margin"),
        ("/threshold 0.5", "write /set threshold VALUE"),
        ("/stepz 4", "did you mean /steps?"),
        ("/set", "/set takes a field and a value"),
        ("/set steps", "lacks a value"),
        ("/set temprature 1", "did you mean `temperature`?"),
        ("/set alg maskgit_plus", "`alg='maskgit_plus'` is called `selector=\"confidence\"` here"),
        ("/set remasking random", "`remasking='random'` is called `selector=\"random\"` here"),
        ("/set cfg_scale 1.5", "`cfg_scale` is called `guidance_scale`"),
        ("/set num_beams 4", "`num_beams=4` has no meaning"),
        ("/set num_beams 1", "`num_beams` does nothing"),
        ("/set num_return_sequences 2", "another seed"),
        ("/set threshold 0.5", "`threshold` does nothing with"),
        ("/set remasking=remdm_cap steps=0", "`steps`"),
        ("/set steps 2.5", "`steps`"),
        ("/set approximate_cache dual", "for MDLM models"),
        ("/set seed soon", "`seed` must be an integer"),
        ("/negative A sad dog", "guidance_scale 2 first"),
        ("/undo", "nothing to undo"),
        ("/retry", "nothing to answer again"),
        ("/save", "/save takes a file"),
        ("/save /no/such/folder/x.json", "no file in a folder that exists"),
        ("/help temprature", "did you mean `temperature`?"),
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
    """`a2d chat` in a pseudo-terminal. It waits for what must come, however busy the machine; a dead chat ends it."""

    def __init__(self, folder, *arguments):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "a2d_hf.cli", "chat", str(folder), "--device", "cpu", *arguments]
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            # Tests that were started in the background of a shell ignore Ctrl-C, and would hand that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(slave)
        self.seen = self.unread = ""

    def wait_for(self, text: str, seconds: float = 600.0) -> str:
        """Reads on from where the last call stopped, to the end of `text`; returns what was read."""
        end = time.monotonic() + seconds
        while text not in self.unread:
            assert time.monotonic() < end, f"no {text!r} in {self.unread[-500:]!r}"
            alive = self.process.poll() is None
            if select.select([self.master], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):  # Linux: nobody holds the other end any more
                    self.unread += os.read(self.master, 65536).decode(errors="replace")
            assert alive or text in self.unread, (
                f"ended with {self.process.returncode}, no {text!r}: {self.unread[-500:]!r}"
            )
        # What came in the same gulp belongs to the next call.
        end_of_text = self.unread.index(text) + len(text)
        read, self.unread = self.unread[:end_of_text], self.unread[end_of_text:]
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
    # So many steps that it still writes when the signal arrives, however late that is.
    screen.type("/set max_new_tokens=100 steps=1000000 remasking=remdm_rescale remasking_eta=1\n")
    screen.wait_for("> ")
    screen.type("The\n")
    screen.wait_for("\033[33m")
    screen.interrupt()  # while it writes: only this answer ends
    screen.wait_for("this turn is forgotten]")
    screen.wait_for("> ")
    # At the prompt it leaves, with a new line at once. Only where none comes is the signal sent again (between prompt
    # and read, CPython holds one until the next): in an interpreter that is shutting down it would kill.
    for _ in range(10):
        screen.interrupt()
        with contextlib.suppress(AssertionError):
            screen.wait_for("\n", 20)
            break
    screen.process.wait(600)
    assert screen.process.returncode == 130 and "Traceback" not in screen.seen


def test_ctrl_d_leaves(terminal):
    screen = terminal()
    screen.wait_for("> ")
    screen.type("\x04")
    assert screen.process.wait(600) == 0


def test_a_draft_makes_room_before_it_remembers_its_place(capsys):
    class Letters:
        def decode(self, ids, **kwargs):
            return "x" * len(ids)

    LiveDraft(Letters()).put_draft(torch.zeros(50, dtype=torch.long))
    printed = capsys.readouterr().out
    down, up = printed.count("\033D"), re.search(r"\033\[(\d+)A", printed)
    assert down == int(up[1]) == 2 and printed.index("\033D") < printed.index("\0337") < printed.index("xxx")
