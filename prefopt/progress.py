"""Progress bars: on a terminal a bar that moves, in a log file a line now and then."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS = 30  # between two lines in a log file


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
    return tqdm(iterable, **options)
