"""Work in new processes, whose peak memory is theirs alone."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("spawn")


def in_process(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What `work` returns in a new process, and its seconds, the start of Python and all imports included."""
    receive, send = context.Pipe(duplex=False)
    start = time.perf_counter()
    process = context.Process(target=_send, args=(send, work, *arguments))
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


def _send(connection: Any, work: Callable[..., Any], *arguments: Any) -> None:
    connection.send(work(*arguments))


def memory_mb() -> dict[str, float]:
    """The most memory of this process so far, and what it holds now besides pages of files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {words[0]: words[1] for words in lines if len(words) == 3}  # in KiB
    return {
        name: round(int(sizes[field]) / 1024, 1)
        for name, field in (("peak", "VmHWM:"), ("anonymous", "RssAnon:"))
    }
