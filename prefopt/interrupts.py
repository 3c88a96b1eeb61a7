"""How a program ends before its time: by Ctrl-C or SIGTERM, or because another of its processes is gone.

A signal is one wish to end, though launchers and schedulers may send it several times at once.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# In the messages of gloo, of NCCL and of torch's store when another process is gone.
LOST = ("/gloo/transport/", "remote process exit", "Connection was likely closed", "Broken pipe")
# Seconds: a scheduler signals every process, a launcher hands the signal on, and Python hears of a signal
# only when a long call, such as one that writes a file, is over.
TOGETHER = 5.0

UNREAD = "error: what read this program's output has ended, as `head` does"

_last = -TOGETHER


class Interrupted(KeyboardInterrupt):
    """The end of a program by a signal; its exit code is 128 and the signal's number, as a shell has it."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number, self.code = number, 128 + number


@contextmanager
def on_signal(act: Callable[[int], None]) -> Iterator[None]:
    """Within, call `act` with the number of a SIGINT or SIGTERM, once for all that come together."""

    def receive(number: int, frame: object) -> None:
        global _last
        earlier, _last = _last, time.monotonic()
        if _last - earlier > TOGETHER:
            act(number)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def interrupt(number: int) -> None:
    """End what runs now, by an exception, so that whatever is open is closed."""
    raise Interrupted(number)


def begin_worker(then: Callable[[int], None] | None, number: int) -> None:
    """In a worker: leave SIGINT and SIGTERM to the process that it works for, which ends it."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    if then is not None:
        then(number)


def has_lost_a_process(error: Exception) -> bool:
    """Whether this process waited for another one, which has ended or cannot be reached."""
    return any(part in str(error) for part in LOST)


def is_unread() -> bool:
    """Whether nothing reads the output any more; if so, what is still to be printed goes nowhere."""
    if sys.stdout is None:  # it was closed from the start
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if broken := bool(output.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return broken
