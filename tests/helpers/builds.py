"""What a build wrote."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def build_of(folder: Path) -> dict[str, Any]:
    """Its BUILD.json."""
    return json.loads((folder / "BUILD.json").read_text())


def calls(folder: Path) -> list[int]:
    """How often its last run called each model."""
    return list(build_of(folder)["run"]["calls"].values())


def contents(folder: Path) -> dict[str, Any]:
    """Every table but for timings, and every picture's bytes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if "work" in path.parts or not path.is_file():
            continue
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            timings = [name for name in table.column_names if name == "seconds"]
            found[str(path.relative_to(folder))] = table.drop_columns(timings)
        elif path.suffix == ".webp" or path.name == "metadata.jsonl":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found
