"""The ledger of what was computed: nothing kept is lost, whatever is killed, and damage is named."""

import os
import random
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest
from disks import limited_files

from prefopt.errors import InputError
from prefopt.ledger import Ledger

ENTRIES = {f"key {number}": {"p": number / 7, "words": "zebra" * 20} for number in range(200)}


def filled(folder: Path, process: int = 0) -> Path:
    """A ledger's file."""
    Ledger(folder, "answers", process).add(ENTRIES)
    return folder / f"answers-{process:05d}.sqlite"


def test_what_is_added_is_read_by_all(tmp_path):
    early, other = Ledger(tmp_path, "answers", 1), Ledger(tmp_path, "boxes")
    ledger = Ledger(tmp_path, "answers")
    assert not list(tmp_path.iterdir()), "who computes nothing writes nothing"
    ledger.add({"a": None, "b": [1.5, "two"]})
    ledger.add({"b": {"ü": "\U0001f993"}, "c": False})
    assert "a" not in early
    early.refresh()
    early.add({"d": 0.1})
    for reader in (early, Ledger(tmp_path, "answers", 7)):
        assert [reader[key] for key in "abcd"] == [None, {"ü": "\U0001f993"}, False, 0.1]
        assert len(reader) == 4 and "e" not in reader
    other.refresh()
    assert len(other) == 0
    with pytest.raises(KeyError, match="e is not in the ledger"):
        early["e"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        ledger.add({"e": 1, "f": float("nan")})
    assert "e" not in ledger


def test_the_entries_of_processes_that_write_at_once_are_all_kept(tmp_path):
    def write(process: int) -> None:
        ledger = Ledger(tmp_path, "answers", process)
        for number in range(15):
            ledger.add({f"{process} {number}": number, "shared": "same"})
            assert "0 0" not in ledger or ledger["0 0"] == 0

    writers = [get_context("fork").Process(target=write, args=(process,)) for process in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not any(writer.exitcode for writer in writers)
    ledger = Ledger(tmp_path, "answers")
    assert all(ledger[f"{process} {number}"] == number for process in range(3) for number in range(15))
    assert ledger["shared"] == "same"


def test_what_add_returned_from_outlasts_kill_9(tmp_path):
    receive, send = os.pipe()

    def write() -> None:
        ledger = Ledger(tmp_path, "answers")
        for number in range(10_000):
            ledger.add({f"{number} {part}": number for part in range(50)})
            os.write(send, b".")

    for enough in (1, 12):
        writer = get_context("fork").Process(target=write)
        writer.start()
        said = sum(len(os.read(receive, 1)) for _ in range(enough))
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        ledger = Ledger(tmp_path, "answers")
        whole = [[f"{number} {part}" in ledger for part in range(50)] for number in range(said + 20)]
        assert all(map(all, whole[:said])), "everything that was said to be kept"
        assert all(all(parts) or not any(parts) for parts in whole), "nothing half"


def test_damage_is_named_or_without_effect(tmp_path):
    """A flipped byte, wherever it is: the value is right, or missing, or the file is named."""
    file, chance, seen = filled(tmp_path), random.Random(0), set()
    sound = file.read_bytes()
    for _ in range(60):
        place = chance.randrange(len(sound))
        file.write_bytes(
            sound[:place] + bytes([sound[place] ^ 1 << chance.randrange(8)]) + sound[place + 1 :]
        )
        try:
            ledger = Ledger(tmp_path, "answers")
            for key, value in ENTRIES.items():
                assert key not in ledger or ledger[key] == value
            seen.add("right")
        except InputError as error:
            assert str(file) in str(error) and "Delete it, and run the same command again" in str(error)
            seen.add("named")
    assert seen == {"right", "named"}


@pytest.mark.parametrize("content", [b'{"a": 1}\n' * 200, b"SQLite format 3\0" + b"\xff" * 4096, b"half"])
def test_a_file_that_is_no_ledger_is_named(tmp_path, content):
    (tmp_path / "answers-00001.sqlite").write_bytes(content)
    with pytest.raises(InputError, match=r"answers-00001\.sqlite is damaged: file is not a database"):
        Ledger(tmp_path, "answers")


def test_a_file_cut_off_is_named(tmp_path):
    file = filled(tmp_path)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(InputError, match=r"answers-00000\.sqlite is damaged: .*Delete it"):
        _ = [key in Ledger(tmp_path, "answers") for key in ENTRIES]


def test_a_file_without_a_table_is_one_that_nothing_was_added_to(tmp_path):
    file = tmp_path / "answers-00000.sqlite"
    file.touch()
    assert len(Ledger(tmp_path, "answers", 1)) == 0
    filled(tmp_path)
    assert Ledger(tmp_path, "answers", 1)["key 3"] == ENTRIES["key 3"]


def test_a_full_disk_is_named_and_what_was_kept_stays(tmp_path):
    filled(tmp_path)
    ledger = Ledger(tmp_path, "answers")
    with limited_files(30_000), pytest.raises(InputError, match=r"answers-00000\.sqlite: .*may be full"):
        ledger.add({f"more {number}": "x" * 500 for number in range(1000)})
    assert len(ledger) == len(ENTRIES)
    ledger.add({"more": 1})
    assert Ledger(tmp_path, "answers")["more"] == 1 and "more 0" not in ledger
