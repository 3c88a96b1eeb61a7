"""Progress bars: on a terminal a bar that moves, in a log file a line now and then."""

import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, TextIO
from weakref import WeakSet

from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

SECONDS = 30  # between two lines in a log file
_bars: WeakSet[tqdm] = WeakSet()


class Lines:
    """A log file as tqdm writes to it: every state of a bar is a line, and no line is moved back to."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str) -> None:
        """Write what the bar shows, without the characters that move a terminal's cursor."""
        if shown := text.replace("\r", "").replace("\x1b[A", "").strip():
            self.file.write(f"{shown}\n")

    def flush(self) -> None:
        """Flush the log file."""
        self.file.flush()


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A bar on stderr, with the options of tqdm; where that is no terminal, a line every 30 seconds."""
    if not sys.stderr.isatty():
        options |= {"file": Lines(sys.stderr), "mininterval": SECONDS, "maxinterval": SECONDS, "ncols": 100}
    bar = tqdm(iterable, **options)
    _bars.add(bar)
    return bar


def close_bars() -> None:
    """Close every bar: what is printed next, such as an error, stays the last word."""
    for bar in list(_bars):
        bar.close()


class Encoding:
    """Writes encodings to a TensorStore behind a bar; after the first ones it says what all will cost."""

    def __init__(self, what: str, total: int, store: Any):
        self.what, self.total, self.store = what, total, store
        silent = total == 0 or not PartialState().is_local_main_process
        self.bar = progress_bar(total=total, desc=f"encoding {what}", disable=silent)
        self.start = time.monotonic()

    def __enter__(self) -> "Encoding":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def write(self, entries: Mapping[str, Mapping[str, Tensor]], count: int) -> None:
        """Store the encodings of `count` inputs."""
        self.store.write(entries)
        if self.bar.n == 0 and not self.bar.disable:
            self._announce(entries, count)
        self.bar.update(count)

    def _announce(self, entries: Mapping[str, Mapping[str, Tensor]], count: int) -> None:
        written = sum(tensor.nbytes for entry in entries.values() for tensor in entry.values())
        size = tqdm.format_sizeof(written / count * self.total * PartialState().num_processes, "B")
        left = tqdm.format_interval((time.monotonic() - self.start) / count * (self.total - count))
        self.bar.write(f"{self.total} {self.what} to encode: about {left}, {size} in {self.store.folder}")
