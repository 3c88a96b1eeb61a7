"""Exports are replaced all at once: whatever ends a build, its tables are all old or all new, or not read."""

import json
import os

import pyarrow.parquet as pq
import pytest
from builds import kill_at_rename
from disks import limited_files

from data_builders.engine.stages import Group
from data_builders.export.tables import Export
from data_builders.export.writers import write_exports
from prefopt.errors import InputError
from prefopt.local_tables import table_folder

TABLES = ("candidates", "pairs", "sft")
EXPORTS = {name: Export(name, {"text": "string"}, lambda group: group.candidates) for name in TABLES}
EXPORTS |= {"imagefolder": Export("pictures", None, lambda group: group.candidates)}


def groups_of(text, count=3):
    row = {"prompt_id": "0" * 64, "image": {"bytes": b"x" * 99}}
    rows = [row | {"text": f"{text} {i}", "prompt": text} for i in range(count)]
    return [Group([row], [], []) for row in rows]


def write(folder, text):
    write_exports(groups_of(text), folder, EXPORTS, test_fraction=0.0, max_bytes=2**20)


def words_of(folder):
    """The first word of every table, read as users read it."""
    tables = [pq.read_table(table_folder(str(folder), name))["text"].to_pylist() for name in TABLES]
    lines = (folder / "imagefolder" / "train" / "metadata.jsonl").read_text().splitlines()
    assert all(len(table) == 3 for table in (*tables, lines))
    return {table[0].split()[0] for table in tables} | {json.loads(line)["text"] for line in lines}


def test_rows_are_written_in_small_groups(tmp_path):
    exports = {"pairs": EXPORTS["pairs"]}
    counts = write_exports(groups_of("old", 2500), tmp_path, exports, test_fraction=0.0, max_bytes=2**20)
    assert counts == {"pairs": {"train": 2500}}
    file = pq.ParquetFile(tmp_path / "pairs" / "train-00000.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [1000, 1000, 500]
    assert file.read()["text"][2499].as_py() == "old 2499"


@pytest.mark.parametrize("moment", [0, 1, 2, 8])
def test_kill_9_at_any_renaming_leaves_the_old_tables_or_the_new(tmp_path, moment):
    """One renaming decides, then four folders are exchanged by two renamings each."""
    write(tmp_path, "old")
    kill_at_rename(moment, write, tmp_path, "new")
    if moment == 0:
        assert words_of(tmp_path) == {"old"}
    else:
        with pytest.raises(InputError, match=r"a builder ended while it replaced .* Run its command again"):
            words_of(tmp_path)
    with pytest.raises(ZeroDivisionError):  # the next build goes on with the exchange, before anything else
        write_exports((1 / 0 for _ in "x"), tmp_path, EXPORTS, test_fraction=0.0, max_bytes=1)
    assert words_of(tmp_path) == ({"old"} if moment == 0 else {"new"})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_leaves_the_old_tables(tmp_path):
    write(tmp_path, "old")
    with pytest.raises(InputError, match=r"could not write .*largest size of a file"), limited_files(100):
        write(tmp_path, "new")
    assert words_of(tmp_path) == {"old"} and not [p for p in os.listdir(tmp_path) if p.startswith(".")]
