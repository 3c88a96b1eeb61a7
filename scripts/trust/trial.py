"""One thing that a user can get wrong, done in a process of its own, and how it ended.

The libraries are imported once, in the process that tries: each trial is a fork of it, in an empty folder,
bounded in time and memory. Nothing there may start a thread, so the forks are safe.
"""

import os
import re
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from prefopt.cli import BAD_INPUT
from prefopt.errors import InputError
from prefopt.programs import find_program

SECONDS, BYTES = 60, 4 * 2**30  # that a trial may take
LONGEST = 1000  # characters of a clear message
WRONG = 3  # the exit code of a success whose check failed

CLEAR, ACCEPTED = "clear error", "accepted by rule"
TRACEBACK, HANG, UNCLEAR, SILENT, REFUSED = (
    "traceback",
    "hang",
    "unclear error",
    "silently wrong",
    "refused though valid",
)
FAULTS = (TRACEBACK, HANG, UNCLEAR, SILENT, REFUSED)


@dataclass(frozen=True)
class Trial:
    """Something done in an empty folder, and how it is to end.

    `says` are regular expressions that the one error message must contain. Without any it must succeed, and
    `check` then raises AssertionError if what came out is wrong.
    """

    name: str
    act: Callable[[Path], object]
    says: tuple[str, ...] = ()
    check: Callable[[Path], object] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a trial ended, one of CLEAR, ACCEPTED and FAULTS, with the end of what it printed."""

    trial: str
    ending: str
    seconds: float
    printed: str


@dataclass
class _Running:
    trial: Trial
    folder: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")


def program(name: str, options: dict[str, Any] | None = None, *words: str) -> Callable[[Path], None]:
    """Run a recipe or builder by its name as its command line does.

    `output_dir` is `run` in the trial's folder unless `options` name it; an option that is None is a bare
    flag, one that is a list has several values, and `words` follow as they are.
    """

    def act(folder: Path) -> None:
        import runpy

        path = find_program(name)
        given = {"output_dir": folder / "run", **(options or {})}
        sys.argv = [str(path), *_words(given), *words]
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")

    return act


def _words(options: dict[str, Any]) -> Iterator[str]:
    for option, value in options.items():
        yield f"--{option}"
        yield from map(str, value if isinstance(value, list) else [] if value is None else [value])


def run_trials(trials: Sequence[Trial], folder: Path, processes: int) -> Iterator[Outcome]:
    """The outcome of each trial as it ends, `processes` at a time, each in its own folder below `folder`."""
    waiting, running = list(enumerate(trials))[::-1], dict[int, _Running]()
    while waiting or running:
        while waiting and len(running) < processes:
            number, trial = waiting.pop()
            one = _Running(trial, folder / f"{number:04d}")
            one.folder.mkdir(parents=True)
            running[_fork(one)] = one
        for process, one in list(running.items()):
            ended, status, _ = os.wait4(process, os.WNOHANG)
            too_much = _excess(process, one) if not ended else ""
            if too_much:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
            if ended or too_much:
                del running[process]
                printed = one.log.read_text(errors="replace")
                ending = HANG if too_much else _ending(one.trial, os.waitstatus_to_exitcode(status), printed)
                seconds = round(time.monotonic() - one.began, 2)
                yield Outcome(one.trial.name, ending, seconds, printed[-3 * LONGEST :] + too_much)
        time.sleep(0.005)


def _fork(one: _Running) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _act(one)
    return process


def _act(one: _Running) -> NoReturn:
    os.setsid()  # so that what it starts ends with it
    log = os.open(one.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(one.folder)
    code = 0
    try:
        one.trial.act(one.folder)
        code = _checked(one)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = BAD_INPUT
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
        code = code or _checked(one)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _checked(one: _Running) -> int:
    try:
        if one.trial.check:
            one.trial.check(one.folder)
    except AssertionError as error:
        print(f"the result is wrong: {error}", file=sys.stderr)
        return WRONG
    return 0


def _excess(process: int, one: _Running) -> str:
    """What a running trial takes too much of."""
    if time.monotonic() - one.began > SECONDS:
        return f"\n(killed: more than {SECONDS} s)"
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return f"\n(killed: more than {BYTES} bytes)" if pages * os.sysconf("SC_PAGE_SIZE") > BYTES else ""


def _ending(trial: Trial, code: int, printed: str) -> str:
    if code == WRONG:
        return SILENT
    if code == 0:
        return SILENT if trial.says else ACCEPTED
    if code != BAD_INPUT or "Traceback (most recent call last)" in printed:
        return TRACEBACK
    if not trial.says:
        return REFUSED
    _, *messages = re.split(r"^error: ", printed, flags=re.MULTILINE)
    clear = len(messages) == 1 and len(messages[0]) <= LONGEST
    return CLEAR if clear and all(re.search(one, messages[0], re.DOTALL) for one in trial.says) else UNCLEAR


def table(outcomes: dict[str, list[Outcome]]) -> list[dict[str, Any]]:
    """A row of counts for each table of trials, and one of all."""
    rows, everything = [], list(chain.from_iterable(outcomes.values()))
    for name, of_table in {**outcomes, "all": everything}.items():
        counts = Counter(outcome.ending for outcome in of_table)
        rows.append(
            {"inputs": name, "tried": len(of_table)}
            | {ending: counts[ending] for ending in (CLEAR, ACCEPTED, *FAULTS)}
        )
    return rows
