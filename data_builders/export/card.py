"""What lies beside a dataset's tables: BUILD.json, and README.md, the card that the hub shows."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_builders.export.config import UNKNOWN
from prefopt.files import public_name, reporting_write_errors, write_atomically

# Of these the first that has rows is the table that is read by default.
DEFAULTS = ("pairs", "ranked", "sft")
SIZES = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"]
TEXT = """---
{header}---

# {title}

{facts}

## How it was made

{about}

| | model |
|---|---|
{models}

BUILD.json has the settings, the identities of the models, and the versions.

{questions}## Tables

{tables}

{reading}## License

{license}
"""
READING = """With this folder, or its id on the hub, `datasets.load_dataset` reads `{default}`, or the table
whose name follows.

"""
NO_LICENSE = (
    "Unknown: whoever publishes this dataset has to choose one that the licenses of the models above, and of "
    "the data that they were given, allow."
)


@dataclass(frozen=True)
class Card:
    """The card of a dataset; all texts but `about` are shown as they are, whatever signs they hold."""

    title: str
    about: str  # how it was made, in Markdown
    facts: Mapping[str, str]
    models: Mapping[str, str]  # by what each did
    tables: Mapping[str, str]  # what each table is
    rows: Mapping[str, Mapping[str, int]]  # of each table that is Parquet, by split
    tasks: Sequence[str]  # as the hub calls them
    license: str
    tags: Sequence[str] = ()
    questions: Mapping[str, str] = field(default_factory=dict)  # what the models were asked, by heading

    @property
    def splits(self) -> dict[str, list[str]]:
        """The splits of each table that has any rows."""
        found = {name: [split for split, count in rows.items() if count] for name, rows in self.rows.items()}
        return {name: splits for name, splits in found.items() if splits}

    @property
    def default(self) -> str:
        """The table that is read if none is named; empty without tables."""
        others = sorted(self.splits, key=lambda name: name == "candidates")  # which is everything, so last
        return next((name for name in (*DEFAULTS, *others) if name in self.splits), "")

    @property
    def header(self) -> dict[str, Any]:
        """What the hub and datasets read."""
        count = sum(sum(rows.values()) for rows in self.rows.values())
        configs = [
            {
                "config_name": name,
                "data_files": [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in splits],
            }
            | ({"default": True} if name == self.default else {})
            for name, splits in self.splits.items()
        ]
        return {
            "license": self.license,
            "task_categories": list(self.tasks),
            "tags": ["prefopt", "preference", *self.tags],
            "size_categories": [SIZES[min(len(str(count // 1000)) if count >= 1000 else 0, len(SIZES) - 1)]],
            **({"configs": configs} if configs else {}),
        }

    def __str__(self) -> str:
        questions = "".join(
            f"## {plain(heading)}\n\n{fenced(text)}\n\n" for heading, text in self.questions.items()
        )
        return TEXT.format(
            header=yaml.safe_dump(self.header, sort_keys=False, allow_unicode=True),
            title=plain(self.title),
            facts=table(self.facts),
            about=self.about,
            models="\n".join(f"| {plain(name)} | {plain(model)} |" for name, model in self.models.items()),
            questions=questions,
            tables=table({f"`{name}`": about for name, about in self.tables.items()}),
            reading=READING.format(default=plain(self.default)) if self.default else "",
            license=NO_LICENSE if self.license == UNKNOWN else plain(self.license),
        )


def table(facts: Mapping[str, str]) -> str:
    """Facts as a table of Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {plain(k)} | {plain(v)} |" for k, v in facts.items())])


def plain(text: str) -> str:
    """A text in one line of Markdown, without signs that would end a cell of a table or become HTML."""
    return html.escape(" ".join(str(text).splitlines()), quote=False).replace("|", "\\|")


def fenced(text: str) -> str:
    """A text as a block that no backticks in it can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"


def public_words(text: str) -> str:
    """Words such as `models/sd steps=4 adapter=runs/lora` with paths shortened to their last part."""
    words = (word.rpartition("=") for word in text.split())
    return " ".join(f"{key}{equals}{public_name(value)}" for key, equals, value in words)


def write_about(folder: Path, build: Mapping[str, Any], card: Card) -> None:
    """Write both files, each whole or not at all."""
    with reporting_write_errors(folder):
        write_atomically(folder / "BUILD.json", json.dumps(build, indent=2) + "\n")
        write_atomically(folder / "README.md", str(card))
