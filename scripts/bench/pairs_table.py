"""Time and memory of reading a large table of pairs: checked for the first time, and from the cache.

    python scripts/bench/pairs_table.py --rows 1000000
    python scripts/bench/pairs_table.py --rows 1000000 --limit_mb 400

Writes Parquet files of pairs with pictures, all different, and reads them as a recipe does, each time in a
new process. `anonymous` is what the process holds itself; the peak counts, besides, the pages of files that
the system keeps in memory for it as long as nobody else needs the room: tables are mapped, not loaded. With
--limit_mb the system lets the reading processes have no more than this, pages of files included, and kills
one that needs more. Prints JSON.
"""

import argparse
import io
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from children import in_process, memory_limit, memory_mb

SHARD = 50_000  # rows of a file
GROUP = 1000  # rows that are read at once


def write(folder: Path, rows: int, size: int) -> None:
    """A builder's table `pairs` with prompts and pictures that differ."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from data_builders.engine.tables import PAIRS, features

    columns = features(PAIRS).arrow_schema
    schema = pa.schema([columns.field(name) for name in ("prompt", "chosen", "rejected")])
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="WEBP", lossless=True)
    for start in range(0, rows, SHARD):
        numbers = range(start, min(start + SHARD, rows))
        # Readers of WebP pass over what follows the picture.
        cells = {
            side: [{"bytes": file.getvalue() + f"{side}{number:0{size}}".encode()} for number in numbers]
            for side in ("chosen", "rejected")
        }
        texts = {"prompt": [f"{number} animals in the snow at dusk" for number in numbers]}
        table = pa.table(texts | cells, schema=schema)
        pq.write_table(table, folder / f"train-{start // SHARD:05d}.parquet", row_group_size=GROUP)


def read(folder: Path) -> dict[str, Any]:
    """Read and divide the table; seconds and memory."""
    from prefopt.diffusion.tables import read_preferences

    imported, start = memory_mb(), time.perf_counter()
    table = read_preferences(str(folder))
    seconds, read_mb = time.perf_counter() - start, memory_mb()
    start = time.perf_counter()
    train, test = table.divide(0.01)
    divided = time.perf_counter() - start
    assert len(train) + len(test) == len(table) and len(train.images(len(train) - 1)) == 2
    return {
        "seconds": round(seconds, 1),
        "imported_mb": imported,
        "read_mb": read_mb,
        "dividing_seconds": round(divided, 1),
        "divided_mb": memory_mb(),
    }


def main() -> None:
    """Write, read twice, and print."""
    parser = argparse.ArgumentParser(description="Read a large table of pairs.")
    parser.add_argument("--rows", type=int, default=1_000_000, help="pairs of the table")
    parser.add_argument("--picture_bytes", type=int, default=62, help="bytes after each picture")
    parser.add_argument("--limit_mb", type=int, help="memory of a reading process; needs Linux and root")
    parser.add_argument("--folder", type=Path, help="on the disk to be used (default: a temporary one)")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="pairs-", dir=options.folder))
    os.environ["HF_DATASETS_CACHE"] = str(place / "cache")
    try:
        table = place / "pairs"
        table.mkdir()
        in_process(write, table, options.rows, options.picture_bytes)
        with memory_limit(options.limit_mb) as group:
            first, again = (in_process(read, table, group=group)[0] for _ in range(2))
        cache = sum(file.stat().st_size for file in (place / "cache").rglob("*") if file.is_file())
    finally:
        shutil.rmtree(place)
    asked = {name: getattr(options, name) for name in ("rows", "picture_bytes", "limit_mb")}
    found = asked | {"first": first, "again": again, "cache_mb": round(cache / 2**20, 1)}
    from prefopt.runs import versions  # not above: the other processes shall not import it

    print(json.dumps(found | {"versions": versions()}, indent=2))


if __name__ == "__main__":
    main()
