"""A bar moves on a terminal; a log file gets whole lines, and no characters that move a cursor."""

import io
import sys
from types import SimpleNamespace

from transformers import TrainerControl

from prefopt import progress
from prefopt.progress import close_bars, progress_bar
from prefopt.runs import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_bars(monkeypatch, file) -> str:
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(progress, "SECONDS", 0)
    outer, inner = (progress_bar(total=3, desc=name) for name in ("outer", "inner"))
    for _ in range(3):
        inner.update(1)
    inner.close()
    outer.close()
    return file.getvalue()


def test_a_log_file_gets_lines(monkeypatch):
    text = run_bars(monkeypatch, io.StringIO())
    assert "\r" not in text and "\x1b" not in text and "\n\n" not in text
    lines = text.splitlines()
    assert [line.split("|")[0] for line in lines if line.startswith("inner")][:4] == [
        "inner:   0%",
        "inner:  33%",
        "inner:  67%",
        "inner: 100%",
    ]
    assert any("3/3" in line for line in lines)


def test_a_terminal_gets_a_bar_that_moves(monkeypatch):
    assert "\rinner: 100%" in run_bars(monkeypatch, Terminal())


def test_a_training_logs_its_figures_beside_the_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    state = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=2)
    bar = Progress()
    bar.on_train_begin(None, state, TrainerControl())
    bar.on_step_end(None, state, TrainerControl())
    bar.on_log(None, state, TrainerControl(), logs={"loss": 0.5, "rewards/margins": 0.25})
    bar.on_train_end(None, state, TrainerControl())
    assert capsys.readouterr().out == "step 2: loss 0.5, rewards/margins 0.25\n"
    shown = sys.stderr.getvalue().splitlines()
    assert shown[0].startswith("training:   0%") and shown[-1].startswith("training:  50%")


def test_an_error_is_the_last_word(monkeypatch):
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    bar = progress_bar(total=3, desc="images")
    close_bars()
    print("error: no space", file=sys.stderr)
    del bar
    assert file.getvalue().splitlines()[-1] == "error: no space"
