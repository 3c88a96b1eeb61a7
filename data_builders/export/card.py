"""What lies beside a dataset's tables: BUILD.json, and README.md, the card that the hub shows."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefopt.files import reporting_write_errors, write_atomically


def table_configs(tables: Mapping[str, Iterable[str]]) -> str:
    """The `configs` of a card: where the splits of each table are; a table without any is left out."""
    configs = []
    for name, splits in tables.items():
        if files := [f'  - split: {split}\n    path: "{name}/{split}-*.parquet"' for split in splits]:
            configs.append(f"- config_name: {name}\n  data_files:\n" + "\n".join(files))
    return "\n".join(configs)


def fact_table(facts: Mapping[str, str]) -> str:
    """Facts as a table of Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items())])


def write_about(folder: Path, build: Mapping[str, Any], card: str) -> None:
    """Write both files, each whole or not at all."""
    with reporting_write_errors(folder):
        write_atomically(folder / "BUILD.json", json.dumps(build, indent=2) + "\n")
        write_atomically(folder / "README.md", card)
