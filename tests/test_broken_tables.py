"""Tables that are damaged, or that lead out of their folder: the file, the row or the column is named."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pictures import PAIRS, pair_rows, png, write_table
from record_tables import pair, seeds, write_pictures, write_records

from prefopt.diffusion.tables import read_preferences, read_sft
from prefopt.errors import InputError
from prefopt.records import image_file, load

# Paths, pipes and names

NOWHERE = {
    "file:///etc/hostname": "'file:///etc/hostname', a URL; put the file into the dataset's folder",
    "https://a.org/0.png": "a URL",
    "zip://0.png::a.zip": "a URL",
    "simplecache::file:///etc/hostname": "a URL",
    "hf://datasets/a/b/0.png": "a URL",
    "pictures/\0.png": "no name of a file",
    "pictures": "which is no file",
    "pictures/pipe.png": "which is no file",
    "pictures/zeros.png": "outside of the dataset's folder",
    "pictures/loop.png": "which is no file",
    "x" * 5000: "which is not there",
}


@pytest.mark.parametrize("path", NOWHERE, ids=[path[:20] for path in NOWHERE])
def test_a_path_leads_to_a_file_of_the_dataset_or_nowhere(tmp_path: Path, path: str) -> None:
    write_pictures(tmp_path)
    os.mkfifo(tmp_path / "pictures" / "pipe.png")
    (tmp_path / "pictures" / "zeros.png").symlink_to("/dev/zero")
    (tmp_path / "pictures" / "loop.png").symlink_to("loop.png")
    with pytest.raises(InputError) as raised:
        image_file(path, "row 1", tmp_path)
    assert str(raised.value).startswith("row 1 points to ") and NOWHERE[path] in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("ending", ["parquet", "arrow", "json", "jsonl", "csv"])
@pytest.mark.parametrize("kind", ["pipe", "zeros", "loop"])
def test_a_table_is_a_file(tmp_path: Path, kind: str, ending: str) -> None:
    """Guards: a run that waits at a pipe, or fills its memory with zeros."""
    file = tmp_path / f"train.{ending}"
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero" if kind == "zeros" else file.name)
    with pytest.raises(InputError, match=f"train.{ending} is no file, but a folder, a pipe, a device"):
        read_preferences(str(tmp_path))
    if kind != "loop":
        with pytest.raises(InputError, match="a pipe, a device or a broken link"):
            read_preferences(str(file))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "--dataset_name is ''; give a name or a path"),
        ("a\0b", r"--dataset_name is 'a\\x00b'"),
        ("x" * 5000, "--dataset_name is too long for a path"),
        ("/", "/ is a whole disk or home folder; name the folder of one dataset"),
        ("csv", "no dataset 'csv': no such folder or file is here, and a hub id has the form org/name"),
        ("pandas", "no dataset 'pandas'"),
        ("https://a.org/b", "no dataset 'https://a.org/b': no such folder or file is here, and a hub id"),
        ("hf://datasets/a/b", "a hub id has the form org/name"),
        ("/dev/zero", "/dev/zero is no table"),
    ],
)
def test_names_that_are_no_dataset(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_preferences(name)


# Parquet files and saved datasets that are damaged


def test_of_several_files_the_damaged_one_is_named(tmp_path: Path) -> None:
    for number in (0, 1):
        write_table(tmp_path, pair_rows(2), PAIRS, f"train-{number}.parquet")
    content = (tmp_path / "train-1.parquet").read_bytes()
    for broken in (b"", content[:-9], content[:4] + bytes(500) + content[504:]):
        (tmp_path / "train-1.parquet").write_bytes(broken)
        with pytest.raises(
            InputError, match=r"train-1\.parquet is damaged, or no parquet file \(.*write or d"
        ):
            read_preferences(str(tmp_path))
    write_table(tmp_path, {"prompt": [1], "other": [2]}, None, "train-1.parquet")
    with pytest.raises(
        InputError, match=r"train-1\.parquet has the columns prompt \(int64\), other .*, but tr"
    ):
        read_preferences(str(tmp_path))


def test_columns_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    names = ["prompt", "prompt", "chosen", "rejected"]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 4, names)
    pyarrow.parquet.write_table(twice, tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"train\.parquet has two columns 'prompt'; name each once"):
        read_preferences(str(tmp_path))
    texts = pyarrow.array([b"\xff"], pyarrow.binary()).buffers()
    wrong = pyarrow.Array.from_buffers(pyarrow.string(), 1, texts)
    table = pyarrow.table({"prompt": wrong, "chosen": ["a"], "rejected": ["b"]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"the column 'prompt' is damaged .*UTF8"):
        read_preferences(str(tmp_path))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("{", "state.json is no JSON"),
        ("[]", "state.json holds no JSON object"),
        ("{}", "state.json names no files under _data_files; save the dataset again"),
        ({"_data_files": ["a"]}, "state.json names no files under _data_files"),
        (
            {"_data_files": [{"filename": "../other/0.arrow"}]},
            "state.json: _data_files points to ../other/0.arr",
        ),
        ({"_data_files": [{"filename": "/etc/hostname"}]}, "outside of the dataset's folder"),
        ({"_data_files": [{"filename": "link.arrow"}]}, "outside of the dataset's folder"),
        ({"_data_files": [{"filename": "no.arrow"}]}, "which is not there"),
    ],
)
def test_a_saved_dataset_is_the_files_in_its_folder(tmp_path: Path, state: Any, said: str) -> None:
    """Guards: a downloaded state.json that makes a training set of a user's other files."""
    rows = datasets.Dataset.from_dict(pair_rows(1), PAIRS)
    for name in ("saved", "other"):
        rows.save_to_disk(tmp_path / name)
    (tmp_path / "other" / "data-00000-of-00001.arrow").rename(tmp_path / "other" / "0.arrow")
    (tmp_path / "saved" / "link.arrow").symlink_to(tmp_path / "other" / "0.arrow")
    (tmp_path / "saved" / "state.json").write_text(state if isinstance(state, str) else json.dumps(state))
    with pytest.raises(InputError, match=said):
        read_preferences(str(tmp_path / "saved"))


def test_what_else_a_saved_dataset_says_is_not_needed(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict(pair_rows(2), PAIRS)
    rows.with_format("numpy", columns=["prompt"]).save_to_disk(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{")
    assert seeds(read_preferences(str(tmp_path))) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("splits", ["{", "[]", '{"splits": "train"}', '{"splits": ["../other"]}'])
def test_the_splits_of_a_saved_dataset_are_names(tmp_path: Path, splits: str) -> None:
    (tmp_path / "dataset_dict.json").write_text(splits)
    with pytest.raises(InputError, match=r"dataset_dict\.json (is no JSON|holds no|has no list of names)"):
        read_preferences(str(tmp_path))


# Folders of images


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"file_name": "pictures/0.png", "text": "a"}\n{', "metadata.jsonl: line 2 is no JSON"),
        ('{"text": "a"}', "metadata.jsonl: no column 'file_name' or '..._file_name'; its columns are"),
        ('{"file_name": 7, "text": "a"}', "metadata.jsonl: row 0, file_name is 7; it is to be the path"),
        ('{"file_name": "a.png", "image": "b", "text": "a"}', "two columns for 'image'"),
        ('{"file_name": "no.png", "text": "a"}', "row 0, column image points to no.png, which is not there"),
        ('{"file_name": "../a.png", "text": "a"}', "row 0, column image points to ../a.png, outside of"),
    ],
)
def test_broken_metadata_of_a_folder_of_images_is_named(tmp_path: Path, lines: str, said: str) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text(lines)
    with pytest.raises(InputError) as raised:
        read_sft(str(tmp_path))
    assert said in str(raised.value)


def test_archives_are_not_unpacked(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.writestr("1.png", png(1))
    with pytest.raises(InputError, match=r"archives are not read; unpack more\.zip, and delete it"):
        load(str(tmp_path), split="train", config=None, revision=None)


def test_the_code_of_a_dataset_is_not_run(tmp_path: Path) -> None:
    write_records(tmp_path / "data", [pair(0)], "pairs.jsonl")
    (tmp_path / "data" / "data.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    (tmp_path / "data" / "more.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert len(read_preferences(str(tmp_path / "data"))) == 1 and not Path("ran").exists()
