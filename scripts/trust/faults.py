"""Programs whose disk fails, or who die, at the n-th change of a folder: faults.c from Python.

Whatever language a library writes in (safetensors in Rust, Arrow in C++), its writes pass there. What a
process computes between two of them leaves no trace, so the changes are all moments that a rerun can tell
apart.
"""

import ctypes
import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
COUNT, KILL, TEAR, ONCE, FULL, STOP = range(6)  # as faults.c
MODES = {KILL: "killed before", TEAR: "killed amid", ONCE: "once", FULL: "from then on", STOP: "before"}


class Plan(ctypes.Structure):
    """What is to happen when: `struct plan` of faults.c."""

    _fields_ = (
        ("calls", ctypes.c_int64),
        ("at", ctypes.c_int64),
        ("mode", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("hit", ctypes.c_int32),
        ("removals", ctypes.c_int32),
        ("what", ctypes.c_char * 24),
        ("where", ctypes.c_char * 4096),
        ("folder", ctypes.c_char * 4096),
    )

    def arm(
        self,
        folder: Path,
        mode: int = COUNT,
        at: int = 0,
        *,
        error: int = errno.ENOSPC,
        removals: bool = True,
    ) -> None:
        """From now on count the changes of a folder, removals or not, and let this happen at the n-th."""
        self.folder = b""
        self.calls, self.at, self.mode, self.error, self.hit = 0, at, mode, error, 0
        self.removals, self.what, self.where = int(removals), b"", b""
        self.folder = os.fsencode(folder.resolve())

    def disarm(self) -> None:
        """Nothing fails any more."""
        self.folder = b""

    def moment(self, folder: Path) -> str:
        """What came: `once write work/answers-00000.jsonl`; empty if it did not."""
        if not self.hit:
            return ""
        where = os.path.relpath(os.fsdecode(self.where), folder.resolve())
        return f"{MODES[self.mode]} {self.what.decode()} {where}"


@contextmanager
def planning(folder: Path) -> Iterator[Plan]:
    """A plan for all programs that are started meanwhile; before any fork server is."""
    library, file = folder / "faults.so", folder / "faults.plan"
    command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    file.write_bytes(bytes(ctypes.sizeof(Plan)))
    os.environ |= {"LD_PRELOAD": str(library), "PREFOPT_FAULTS": str(file)}
    with file.open("r+b") as opened:
        plan = Plan.from_buffer(mmap.mmap(opened.fileno(), 0))
    try:
        yield plan
    finally:
        plan.disarm()
