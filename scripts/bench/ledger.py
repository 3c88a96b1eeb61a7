"""How a ledger of many results is filled, killed, opened and read: rates, memory and disk.

    python scripts/bench/ledger.py --entries 1000000
    python scripts/bench/ledger.py --entries 10000000 --batch 10000 > benchmarks/ledger_10m_cpu.json

Some processes add entries (a key of 64 digits, a judge's answer as the value) at once, each in a file of its
own, until all are there; then each begins another `add` and is killed with SIGKILL. A new process opens the
ledger, looks up keys at random, and checks that everything is there that `add` returned from; its peak memory
is that of the whole process. Another one adds batches as small as a judge's. Prints JSON.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from children import context, in_process, memory_mb

from prefopt.files import content_key
from prefopt.ledger import Ledger

LOOKUPS = 20_000
SMALL = 16  # entries of a small batch
ANSWER = {"probabilities": {"yes": 0.7312345678901234, "no": 0.2687654321098766}, "other_mass": 0.0123456789}


def fill(folder: Path, process: int, numbers: range, batch: int, ready: Any) -> None:
    """Add these entries, say so, and go on adding without end."""
    ledger = Ledger(folder, "answers", process)
    for start in range(0, len(numbers), batch):
        ledger.add({content_key(str(number)): ANSWER for number in numbers[start : start + batch]})
    ready.send(process)
    for turn in range(10**9):
        ledger.add({content_key(f"more {process} {turn} {part}"): ANSWER for part in range(batch)})


def read(folder: Path, entries: int, batch: int) -> dict[str, Any]:
    """Open the ledger, look keys up, and check."""
    start = time.perf_counter()
    ledger = Ledger(folder, "answers")
    assert content_key("0") in ledger
    opened = time.perf_counter() - start
    chance = random.Random(0)
    keys = [content_key(str(chance.randrange(entries))) for _ in range(LOOKUPS)]
    found = _rate(lambda: all(ledger[key] == ANSWER for key in keys))
    missed = _rate(lambda: not any(key[::-1] in ledger for key in keys))
    peak = memory_mb()["peak"]
    assert all(content_key(str(number)) in ledger for number in range(entries - batch, entries))
    return {
        "open_seconds": round(opened, 4),
        "peak_memory_mb": peak,
        "lookups_per_second": {"found": found, "missing": missed},
        "entries_after_kill": len(ledger),
    }


def add_small(folder: Path) -> dict[str, Any]:
    """Add batches as a judge does, each of which is on the disk when it is done."""
    ledger, seconds = Ledger(folder, "answers"), []
    for turn in range(200):
        batch = {content_key(f"small {turn} {part}"): ANSWER for part in range(SMALL)}
        start = time.perf_counter()
        ledger.add(batch)
        seconds.append(time.perf_counter() - start)
    return {"entries": SMALL, "milliseconds": round(1000 * sorted(seconds)[len(seconds) // 2], 2)}


def _rate(work: Callable[[], bool]) -> int:
    start = time.perf_counter()
    assert work()
    return round(LOOKUPS / (time.perf_counter() - start))


def main() -> None:
    """Fill, kill, open, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=1_000_000, help="entries in all")
    parser.add_argument("--processes", type=int, default=2, help="that fill it at once")
    parser.add_argument("--batch", type=int, default=1000, help="entries of one `add` while it is filled")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: a temporary one)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ledger-", dir=options.folder))
    try:
        receive, send = context.Pipe(duplex=False)
        share = options.entries // options.processes
        start = time.perf_counter()
        shares = [range(options.entries)[place * share :][:share] for place in range(options.processes)]
        writers = [
            context.Process(target=fill, args=(folder, place, numbers, options.batch, send))
            for place, numbers in enumerate(shares)
        ]
        for writer in writers:
            writer.start()
        for _ in writers:
            receive.recv()
        seconds = time.perf_counter() - start
        for writer in writers:
            os.kill(writer.pid or 0, signal.SIGKILL)
            writer.join()
        reading, whole = in_process(read, folder, share * options.processes, options.batch)
        small, _ = in_process(add_small, folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
    finally:
        shutil.rmtree(folder)
    settings = {name: value for name, value in vars(options).items() if name != "folder"}
    fill_rate = {"fill_seconds": round(seconds, 1), "filled_per_second": round(options.entries / seconds)}
    found = {**settings, **fill_rate, **reading, "process_seconds": whole, "small_batch": small}
    print(json.dumps(found | {"disk_mb": round(size / 2**20, 1), "python": sys.version.split()[0]}, indent=2))


if __name__ == "__main__":
    main()
