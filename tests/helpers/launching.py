"""Recipes launched by path in processes of their own, as a user does, without importing torch each time.

A fork server imports the libraries once; each launch is a fork of it that runs the recipe as `__main__`.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FORKS = multiprocessing.get_context("forkserver")
# Installed modules only: before Python 3.12 a fork server does not see the path that the tests lie in.
FORKS.set_forkserver_preload(
    [
        "prefopt",  # first: it silences a notice of the next
        "bitsandbytes",
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
        "peft",
        "prefopt.cli",
        "prefopt.diffusion.training",
        "prefopt.trainer",
    ]
)


@dataclass
class Launch:
    """A running launch and where its output goes."""

    process: Any
    output: Path

    def wait(self, seconds: float = 120) -> int:
        """The exit code; minus the number of the signal that ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s:\n{self.text()}"
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Return once the condition holds; fail if the process ends before it does."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive() and time.monotonic() < end, (
                f"the moment never came:\n{self.text()}"
            )
            time.sleep(0.002)

    def kill(self) -> None:
        """kill -9"""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Ctrl-C, or another signal."""
        os.kill(self.process.pid, number)

    def text(self) -> str:
        """Everything it has printed so far."""
        return self.output.read_text() if self.output.exists() else ""


def launch(
    script: str, options: dict[str, Any], output: Path, hook: Callable[[], None] | None = None
) -> Launch:
    """Start `python script --option value ...`, None being a bare flag; `hook` runs there before it.

    A list is an option of several values.
    """
    process = FORKS.Process(target=_main, args=(str(ROOT / script), arguments(options), str(output), hook))
    process.start()
    return Launch(process, output)


def arguments(options: dict[str, Any]) -> list[str]:
    """The options as words."""
    words = []
    for name, value in options.items():
        values = [] if value is None else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def torchrun(script: str, options: dict[str, Any]) -> None:
    """Run on two processes; `accelerate launch --cpu --num_processes 2` would start one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / script), *arguments(options)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def _main(script: str, arguments: list[str], output: str, hook: Callable[[], None] | None) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a fork server ignores it
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    if hook:
        hook()
    runpy.run_path(script, run_name="__main__")


def die_at_save(count: int) -> None:
    """A hook: kill -9 in the middle of writing the checkpoint's `count`-th file."""
    import torch

    save, calls = torch.save, []

    def half_save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(path)
        save(value, path, *args, **kwargs)
        if len(calls) == count:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half_save
