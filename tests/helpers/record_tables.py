"""Tables in text files, whose cells name pictures beside them by path."""

import json
from pathlib import Path
from typing import Any

from pictures import png, sha

from prefopt.diffusion.tables import Table


def write_pictures(folder: Path, count: int = 12) -> None:
    """The pictures pictures/0.png, pictures/1.png, ..."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        (folder / "pictures" / f"{seed}.png").write_bytes(png(seed))


def write_records(folder: Path, records: list[dict], name: str) -> str:
    """Records as a JSON, JSON Lines or CSV file, beside its pictures; the path of the file."""
    write_pictures(folder)
    if name.endswith(".csv"):
        rows = [list(records[0]), *(record.values() for record in records)]
        text = "\n".join(",".join('"' + str(cell).replace('"', '""') + '"' for cell in row) for row in rows)
    elif name.endswith(".jsonl"):
        text = "\n".join(map(json.dumps, records))
    else:
        text = json.dumps(records, indent=1)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def pair(number: int, **changes: Any) -> dict:
    names = {"chosen": f"pictures/{2 * number}.png", "rejected": f"pictures/{2 * number + 1}.png"}
    return {"prompt": f"prompt {number}", **names, **changes}


def seeds(table: Table) -> list[list[int]]:
    """Of each example the pictures, best first, by their seeds."""
    known = {sha(png(seed)): seed for seed in range(12)}
    return [[known[key] for key in keys] for keys in table.column("sha256")]
