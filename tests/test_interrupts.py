"""Signals and lost processes: many signals are one wish to end, what is open is closed, exit codes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Timer

import pytest

from prefopt import interrupts, steps
from prefopt.cli import run
from prefopt.interrupts import Interrupted, interrupt, on_signal
from prefopt.programs import FAILED, INTERRUPTED, TERMINATED


@pytest.fixture(autouse=True)
def long_ago(monkeypatch):
    """No signal came lately."""
    monkeypatch.setattr(interrupts, "_last", -interrupts.TOGETHER)


@dataclass
class Config:
    """The options of a program that does nothing."""

    output_dir: str = "out"


@pytest.fixture
def ended(monkeypatch, tmp_path, capsys):
    """Run `main` as a program; its exit code and its last line."""

    def ended(main) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["program.py", "--output_dir", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as end:
            run(main, Config)
        return end.value.code, capsys.readouterr().err.splitlines()[-1]

    return ended


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_a_signal_closes_what_is_open_and_has_its_exit_code(number, code, ended):
    closed = []

    def main(config):
        with ExitStack() as stack:
            # The launcher's own SIGTERM must not end the closing.
            stack.callback(lambda: (os.kill(os.getpid(), signal.SIGTERM), closed.append(True)))
            os.kill(os.getpid(), number)
            time.sleep(30)

    assert ended(main) == (code, "interrupted: what is finished is kept, and the same command goes on")
    assert closed == [True]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signals_that_come_together_are_one(monkeypatch):
    received = []
    with on_signal(received.append):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        monkeypatch.setattr(interrupts, "_last", time.monotonic() - 2 * interrupts.TOGETHER)
        os.kill(os.getpid(), signal.SIGINT)
    assert received == [signal.SIGTERM, signal.SIGINT]


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:4: Connection reset"


def test_a_lost_process_is_said_in_a_line(ended):
    def main(config):
        raise RuntimeError(GLOO)

    code, said = ended(main)
    assert code == FAILED
    assert said.startswith("error: another process of this run has ended") and said.endswith(
        "command goes on."
    )


def test_another_fault_stays_one(monkeypatch, tmp_path):
    def main(config):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(sys, "argv", ["program.py", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(RuntimeError, match="mat1"):
        run(main, Config)


def test_a_step_of_several_is_told_of_the_end_and_waited_for(tmp_path):
    """Guards: accelerate's launcher, which dies of SIGTERM and leaves the training behind."""
    slow = "import signal, time, pathlib\nsignal.signal(15, lambda *_: (time.sleep(0.3), "
    slow += f"pathlib.Path({str(tmp_path / 'kept')!r}).touch(), exit(143)))\n"
    slow += f"pathlib.Path({str(tmp_path / 'begun')!r}).touch()\ntime.sleep(30)"
    launcher = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {slow!r}]))"

    def terminate() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    Timer(0, terminate).start()
    with on_signal(interrupt), pytest.raises(Interrupted):
        steps._run([sys.executable, "-c", launcher])
    assert (tmp_path / "kept").exists()


def test_a_list_of_which_only_the_beginning_is_read_ends_in_silence():
    code = "import sys, prefopt.__main__ as p; sys.argv[1:] = ['--help']; sys.stdin.read(); p.main()"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        said = process.stderr.read()
    assert process.returncode == 0 and not said


def test_output_that_nobody_reads_ends_in_a_message(tmp_path):
    """Guards: a traceback after `| head -1`."""
    code = (
        "from dataclasses import dataclass\n"
        "from prefopt.cli import run\n"
        "@dataclass\n"
        "class Config:\n"
        f"    output_dir: str = {str(tmp_path / 'run')!r}\n"
        "run(lambda config: [print('line', flush=True) for _ in range(100_000)], Config)\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == FAILED
    assert said.endswith("error: what read this program's output has ended, as `head` does\n")
    assert "Traceback" not in said and "Exception ignored" not in said
