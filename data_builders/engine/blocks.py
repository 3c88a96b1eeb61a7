"""Generated images on disk: one Parquet file for each block of prompts, found again by content.

A block's boundaries follow from the list of prompts alone, so any number of processes makes the same files.
Each is renamed into place when it is whole: what a killed run has finished stays finished, and nothing else
is there. A block's name holds the hash of its prompts and of everything its images depend on.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_builders.engine.stages import Record
from data_builders.engine.tables import IMAGES, features
from prefopt.errors import InputError
from prefopt.files import (
    IDENTITY,
    check_identity,
    content_key,
    remove_partials,
    replacing,
    reporting_write_errors,
)


@dataclass(frozen=True)
class Block:
    """Prompts whose images are generated and written together."""

    index: int
    prompts: list[Record]
    file: Path


class ImageBlocks:
    """The blocks of a list of prompts, in order; InputError if `folder` holds other prompts or settings."""

    def __init__(self, folder: Path, identity: Mapping[str, object], prompts: list[Record], block_size: int):
        self.folder, self.identity = folder, dict(identity)
        self.blocks: list[Block] = []
        for index, start in enumerate(range(0, len(prompts), block_size)):
            chunk = prompts[start : start + block_size]
            key = content_key(json.dumps([self.identity, [r["prompt"] for r in chunk]], sort_keys=True))
            self.blocks.append(Block(index, chunk, folder / f"block-{index:05d}-{key[:16]}.parquet"))
        if not (folder / IDENTITY).is_file():
            self._check_strangers()  # before the folder is said to be of this run
        with reporting_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            check_identity(folder, self.identity, what="folder", option="--output_dir")
        self._check_strangers()

    def __getitem__(self, index: int) -> Block:
        return self.blocks[index]

    def __len__(self) -> int:
        return len(self.blocks)

    def write(self, block: Block, rows: Iterable[Record]) -> None:
        """Write the block's rows, whole or not at all; only the columns of IMAGES are written."""
        table = pa.Table.from_pylist(list(rows), schema=features(IMAGES).arrow_schema)
        with reporting_write_errors(block.file), replacing(block.file) as partial:
            pq.write_table(table, partial)

    def rows(self, block: Block, *, images: bool = True) -> list[Record]:
        """The rows of a block, with or without the images; one that cannot be read is an InputError."""
        columns = [name for name in IMAGES if images or name != "image"]
        try:
            return pq.read_table(block.file, columns=columns).to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(
                f"{block.file} cannot be read: {error}. Delete it, and run the same command again"
            ) from error

    def clean(self) -> None:
        """Remove what killed runs left half written; only while no process writes."""
        remove_partials(self.folder)

    def _check_strangers(self) -> None:
        ours = {block.file for block in self.blocks}
        strangers = sorted(set(self.folder.glob("block-*.parquet")) - ours)
        if strangers:
            raise InputError(
                f"{self.folder} holds {len(strangers)} blocks of other prompts or settings than this run's, "
                f"{strangers[0].name} the first. Name another --output_dir, or delete those files"
            )


class Images:
    """The images of all generators: the candidates of each prompt of a block, in their order."""

    def __init__(self, tables: Sequence[ImageBlocks]):
        self.tables = tables

    @property
    def have_classes(self) -> bool:
        """Whether every prompt has a class."""
        return all(prompt["class"] for block in self.tables[0].blocks for prompt in block.prompts)

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self.tables[0])

    def rows(self, block: int, *, images: bool = True) -> list[Record]:
        """All rows of a block with their `class`, prompt by prompt, with or without their images."""
        prompts = self.tables[0][block].prompts
        order = {prompt["prompt_id"]: place for place, prompt in enumerate(prompts)}
        rows = [row for table in self.tables for row in table.rows(table[block], images=images)]
        for row in rows:
            row["class"] = prompts[order[row["prompt_id"]]]["class"]  # empty: none
        return sorted(rows, key=lambda row: (order[row["prompt_id"]], row["candidate"]))
