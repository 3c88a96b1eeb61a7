"""The candidates table on disk: one Parquet file for each block of prompts, found again by content.

A block's boundaries follow from the list of prompts alone, so any number of processes makes the same files.
Each is renamed into place when it is whole: what a killed run has finished stays finished, and nothing else
is there. A block's name holds the hash of its prompts and of everything its candidates depend on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Value

from data_builders.stages import Record, Stage
from prefopt.records import InputError
from prefopt.store import claim, content_key, replacing, writing

DRAWN = Features(
    {
        "image": Image(),  # lossless WebP; null if the model drew values that are not finite
        "pixels_sha256": Value("string"),
        "prompt": Value("string"),
        "prompt_id": Value("string"),  # SHA-256 of the prompt
        "candidate": Value("int32"),  # 0, 1, ... within the prompt
        "seed": Value("int64"),
        "model": Value("string"),
        "model_revision": Value("string"),
        "model_identity": Value("string"),
        "adapter": Value("string"),
        "adapter_identity": Value("string"),
        "adapter_scale": Value("float32"),
        "num_inference_steps": Value("int32"),
        "guidance_scale": Value("float32"),
        "height": Value("int32"),
        "width": Value("int32"),
        "dtype": Value("string"),
        "seconds": Value("float32"),  # the image's share of the time its batch was drawn in
        "reject_reason": Value("string"),  # empty if selected, or if nothing is decided yet
    }
)
CANDIDATES = Features(
    {
        **DRAWN,
        "clip_score": Value("float32"),
        "scorer": Value("string"),
        "scorer_identity": Value("string"),
        "rank": Value("int32"),  # 1 = best, equal = tie, null = dropped before it could be ranked
        "selected": Value("bool"),
    }
)


@dataclass(frozen=True)
class Block:
    """Prompts that are worked on and written together."""

    index: int
    prompts: list[Record]
    file: Path


class CandidatesTable:
    """The blocks of a list of prompts, in order; InputError if `folder` holds other prompts or settings."""

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, object],
        prompts: list[Record],
        block_size: int,
        features: Features = CANDIDATES,
    ):
        self.folder, self.identity, self.features = folder, dict(identity), features
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            claim(folder, self.identity, what="folder", option="--output_dir")
        self.blocks = []
        for index, start in enumerate(range(0, len(prompts), block_size)):
            chunk = prompts[start : start + block_size]
            key = content_key(json.dumps([self.identity, [r["prompt"] for r in chunk]], sort_keys=True))
            self.blocks.append(Block(index, chunk, folder / f"block-{index:05d}-{key[:16]}.parquet"))
        self._check_strangers()

    def missing(self, process: int, processes: int) -> list[Block]:
        """The blocks that this process of so many has still to make."""
        return [block for block in self.blocks[process::processes] if not block.file.exists()]

    def write(self, block: Block, rows: Iterable[Record]) -> None:
        """Write the block's rows, whole or not at all; what else is in the records stays out."""
        table = pa.Table.from_pylist(list(rows), schema=self.features.arrow_schema)
        with writing(block.file), replacing(block.file) as partial:
            pq.write_table(table, partial)

    def read(self, selection: Stage) -> Iterator[Record]:
        """All rows as `selection` decides on them; blocks that were decided otherwise are rewritten."""
        for block in self.blocks:
            found = self.rows(block)
            rows = list(selection(found))
            if rows != found:
                self.write(block, rows)
            yield from rows

    def rows(self, block: Block, *, images: bool = True) -> list[Record]:
        """What is written of a block, images or not; one that cannot be read is an InputError."""
        columns = [name for name in self.features if images or name != "image"]
        try:
            return pq.read_table(block.file, columns=columns).to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(
                f"{block.file} cannot be read: {error}. Delete it, and run the same command again"
            ) from error

    def clean(self) -> None:
        """Remove what killed runs left half written; only while no process writes."""
        for pattern in (".block-*", ".identity.json.*"):
            for partial in self.folder.glob(pattern):
                partial.unlink()

    def _check_strangers(self) -> None:
        ours = {block.file for block in self.blocks}
        strangers = sorted(set(self.folder.glob("block-*.parquet")) - ours)
        if strangers:
            raise InputError(
                f"{self.folder} holds {len(strangers)} blocks of other prompts than this run's, "
                f"{strangers[0].name} the first. Name another --output_dir, or delete those files"
            )
