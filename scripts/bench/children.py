"""Work in new processes, whose peak memory is theirs alone."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("spawn")
GROUPS = Path("/sys/fs/cgroup")


@contextmanager
def memory_limit(megabytes: int | None) -> Iterator[Path | None]:
    """A control group of Linux whose processes get no more memory, pages of files included; needs root.

    A process that needs more is killed; pages of files are dropped and read again. Swap is not limited. None:
    no group.
    """
    if megabytes is None:
        yield None
        return
    version_1 = (GROUPS / "memory").is_dir()
    group = (GROUPS / "memory" if version_1 else GROUPS) / f"prefopt-{os.getpid()}"
    group.mkdir()
    try:
        limit = group / ("memory.limit_in_bytes" if version_1 else "memory.max")
        limit.write_text(str(megabytes * 2**20))
        yield group
    finally:
        group.rmdir()


def in_process(work: Callable[..., Any], *arguments: Any, group: Path | None = None) -> tuple[Any, float]:
    """What `work` returns in a new process, and its seconds, the start of Python and all imports included.

    `group` is one of `memory_limit`, which the process joins first.
    """
    receive, send = context.Pipe(duplex=False)
    start = time.perf_counter()
    process = context.Process(target=_send, args=(send, group, work, *arguments))
    process.start()
    send.close()
    try:
        found = receive.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{work.__name__} ended with exit code {process.exitcode}") from None
    seconds = time.perf_counter() - start
    process.join()
    return found, round(seconds, 2)


def _send(connection: Any, group: Path | None, work: Callable[..., Any], *arguments: Any) -> None:
    if group:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    connection.send(work(*arguments))


def memory_mb() -> dict[str, float]:
    """The most memory of this process so far, and what it holds now besides pages of files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {words[0]: words[1] for words in lines if len(words) == 3}  # in KiB
    return {
        name: round(int(sizes[field]) / 1024, 1)
        for name, field in (("peak", "VmHWM:"), ("anonymous", "RssAnon:"))
    }
