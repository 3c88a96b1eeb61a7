"""Tables as people have them on disk: text files, single files, slices, cards, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from pictures import PAIRS, cell, pair_rows, png, write_pairs, write_table
from record_tables import pair, seeds, write_pictures, write_records

from prefopt import local_tables, record_files
from prefopt.diffusion.tables import read_preferences, read_sft
from prefopt.errors import InputError
from prefopt.files import file_state
from prefopt.local_tables import folder_state
from prefopt.records import load, may_share_rows
from prefopt.vlm.examples import read_vision_examples

ENDINGS = ("json", "jsonl", "csv")


# Text files


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("whole", [True, False], ids=["file", "folder"])
def test_pairs_of_paths(tmp_path: Path, ending: str, whole: bool) -> None:
    records = [pair(0, margin=0.5), pair(1, prompt='say "two, three"\nand four'), pair(2, margin=0)]
    records[1]["margin"] = 2
    file = write_records(tmp_path, records, f"pairs.{ending}")
    table = read_preferences(file if whole else str(tmp_path))
    assert seeds(table) == [[0, 1], [2, 3]] and table.dropped == {"tie": 1}
    assert table.facts["prompt"][:] == ["prompt 0", 'say "two, three"\nand four']
    assert str(table) == f"{file}: 2 rows (dropped: 1 tie)"
    assert table.images(1) == [png(2), png(3)]
    assert table.image(1, 0)[1] == f"{file}: row 1, column chosen"


def test_files_may_bear_a_mark_of_their_encoding_and_blank_lines(tmp_path: Path) -> None:
    for ending in ENDINGS:
        file = Path(write_records(tmp_path / ending, [pair(0), pair(1)], f"pairs.{ending}"))
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("\n", "\n\n") + "\n", encoding="utf-8-sig")
        assert seeds(read_preferences(str(file))) == [[0, 1], [2, 3]], ending
    lines = write_records(tmp_path, [pair(0), pair(1)], "pairs.jsonl")
    shutil.move(lines, tmp_path / "lines.json")
    assert seeds(read_preferences(str(tmp_path / "lines.json"))) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_ranked_lists_of_paths(tmp_path: Path, ending: str) -> None:
    lists = [
        {"prompt": "a", "images": [f"pictures/{i}.png" for i in (0, 1, 2)], "ranks": [2, 1, 2]},
        {"prompt": "b", "images": [f"pictures/{i}.png" for i in (3, 4)], "ranks": [2, 1]},
    ]
    table = read_preferences(write_records(tmp_path, lists, f"lists.{ending}"))
    assert seeds(table) == [[1, 0, 2], [4, 3]] and [*table.column("ranks")] == [[1, 2, 2], [1, 2]]
    assert table.facts[0]["columns"] == ["images[1]", "images[0]", "images[2]"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_images_to_imitate_by_path(tmp_path: Path, ending: str) -> None:
    records = [{"text": f"text {i}", "image": f"pictures/{i}.png"} for i in range(3)]
    table = read_sft(write_records(tmp_path, records, f"images.{ending}"))
    assert seeds(table) == [[0], [1], [2]] and table.facts["prompt"][:] == ["text 0", "text 1", "text 2"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_imagereward_with_paths(tmp_path: Path, ending: str) -> None:
    """As its metadata are published, with paths in place of pictures."""
    rows = [(0, 2, "x", "a"), (1, 1, "y", "b"), (2, 1, "x", "a"), (3, 2, "y", "b")]
    records = [
        {"image_path": f"pictures/{seed}.png", "prompt_id": key, "prompt": prompt, "rank": rank}
        | {"classification": "People", "image_amount_in_total": 2, "overall_rating": 4}
        for seed, rank, key, prompt in rows
    ]
    table = read_preferences(write_records(tmp_path, records, f"validation.{ending}"))
    assert seeds(table) == [[2, 0], [1, 3]] and table.facts["prompt"][:] == ["a", "b"]
    assert seeds(read_sft(str(tmp_path), split="validation")) == [[2], [1]]


def test_hpdv2_as_it_is_published(tmp_path: Path) -> None:
    """A folder of pictures for each split; train.json has pairs, test.json lists, under other names."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for seed in range(3):
            (tmp_path / split / f"{seed}.jpg").write_bytes(png(seed + 3 * (split == "test")))
    pairs = {"human_preference": [0, 1], "prompt": "a", "file_path": ["0.jpg", "1.jpg"], "user_hash": "u"}
    lists = {"prompt": "b", "image_path": ["0.jpg", "1.jpg", "2.jpg"], "rank": [2, 0, 1]}
    lists["raw_annotation"] = [{"rank": [2, 0, 1], "user_hash": "u"}]
    (tmp_path / "train.json").write_text(json.dumps([pairs]))
    (tmp_path / "test.json").write_text(json.dumps([lists]))
    assert seeds(read_preferences(str(tmp_path))) == [[1, 0]]
    assert seeds(read_preferences(str(tmp_path / "train.json"))) == [[1, 0]]
    assert seeds(read_preferences(str(tmp_path / "test.json"))) == [[4, 5, 3]], "of the file's own pictures"
    assert seeds(read_preferences(str(tmp_path), split="test[:1]")) == [[4, 5, 3]]


def test_a_csv_file_of_answers(tmp_path: Path) -> None:
    """Texts that are numbers stay texts."""
    records = [{"image": "pictures/1.png", "question": "How many?", "chosen": "7", "rejected": "8"}]
    example = read_vision_examples(write_records(tmp_path, records, "answers.csv"), "pairs")[0, 0]
    assert [side[0]["content"][0]["text"] for side in example["completions"]] == ["7", "8"]


def test_a_file_is_read_anew_when_it_changes(tmp_path: Path) -> None:
    file = write_records(tmp_path, [pair(0)], "pairs.jsonl")
    assert seeds(read_preferences(file)) == [[0, 1]]
    write_records(tmp_path, [pair(2)], "pairs.jsonl")
    assert seeds(read_preferences(file)) == [[4, 5]]
    (tmp_path / "pictures" / "4.png").write_bytes(png(6))
    assert seeds(read_preferences(file)) == [[6, 5]]


def test_a_file_depends_on_its_own_pictures_alone(tmp_path: Path) -> None:
    """Guards: a table checked again for every line of a log beside it."""
    write_records(tmp_path, [pair(0)], "pairs.jsonl")
    write_table(tmp_path, pair_rows(1), PAIRS, "pairs.parquet")
    for name in ("pairs.jsonl", "pairs.parquet"):
        source = load(str(tmp_path / name), split="train", config=None, revision=None)
        before = source.state(("chosen", "rejected"))
        (tmp_path / "run.log").write_text(name)
        (tmp_path / "pictures" / "9.png").write_bytes(png(3))
        assert source.state(("chosen", "rejected")) == before
        (tmp_path / "pictures" / "1.png").write_bytes(png(len(name)))
        assert (source.state(("chosen", "rejected")) != before) == (name == "pairs.jsonl")


def test_a_file_that_vanishes_while_a_folder_is_listed_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path, 2)
    before = folder_state(tmp_path)
    (tmp_path / "gone.txt").write_text("a")

    def state(path: Path) -> tuple[int, int, int, int]:
        if path.name == "gone.txt":
            path.unlink()
        return file_state(path)

    monkeypatch.setattr(local_tables, "file_state", state)
    assert folder_state(tmp_path) == before


# Text files that are broken


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.json", '[{"prompt": "a"},\n{"prompt" 1}]', "p.json: line 2 is no JSON: Expecting ':' delimiter"),
        ("p.json", '{"prompt": "a"}\n{"prompt": 1', "p.json: line 2 is no JSON"),
        ("p.json", '{"data": []}', "p.json holds {'data': []}; it is to be a list of records"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": ', "p.jsonl: line 3 is no JSON: Expecting value"),
        ("p.jsonl", '{"prompt": "a"}\n["a"]', "p.jsonl: row 1 is ['a']; it is to be a record"),
        ("p.jsonl", "\n", "p.jsonl holds no records"),
        ("p.csv", "prompt,chosen\na,b\nc\n", "p.csv: line 3 has 1 cells, its first line 2"),
        ("p.csv", "prompt,prompt\na,b", "p.csv has two columns 'prompt'; name each once"),
        ("p.csv", 'prompt,chosen\n"a"b,c', "p.csv: line 2 is no CSV"),
        ("p.csv", "prompt,chosen\n", "p.csv holds no records"),
        ("p.jsonl", b'{"prompt": "\xff"}', "p.jsonl is no UTF-8 text"),
        (
            "p.jsonl",
            '{"a": 1}\n' + "[" * 9999,
            "p.jsonl: line 2 is nested too deep; a record is nested a few",
        ),
        ("p.json", "[" * 9999, "p.json is nested too deep"),
        (
            "p.jsonl",
            '{"a": 1}\n{"a": 1, "a": 2}',
            "line 2 cannot be read: the name 'a' has two values; name it",
        ),
        ("p.json", '[{"a": 1, "a": 2}]', "p.json cannot be read: the name 'a' has two values; name it once"),
        ("p.json", '[{"a": "b"}, {"a": "\\ud83d"}]', "p.json: row 1 has half of a character, '\\ud83d'"),
        ("p.jsonl", f'{{"a": {"9" * 5000}}}', "p.jsonl: line 1 cannot be read: Exceeds the limit"),
        (
            "p.jsonl",
            '{"prompt": "a", "picture": "x.png"}',
            "p.jsonl: no column 'chosen' and no column 'rejected'",
        ),
        ("p.jsonl", '{"prompt": "a", "image": 3}', "p.jsonl: row 0, image is 3; it is to be the path"),
        ("p.txt", "prompt", "p.txt is no table; those that can be read end with .parquet, .arrow, .json,"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, name: str, text: Any, said: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as raised:
        read_preferences(str(tmp_path / name))
    assert said in str(raised.value)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rejected": "pictures/99.png"}, "row 1, column rejected points to pictures/99.png, which is not"),
        ({"rejected": "../secret.png"}, "row 1, column rejected points to ../secret.png, outside of the"),
        ({"rejected": ""}, "row 1, column rejected has no image; fill it"),
        ({"margin": "wide"}, "row 1 has the margin 'wide'; a margin is a finite number"),
        ({"margin": -1}, "row 1 has the margin -1: its rejected image scores higher"),
    ],
)
def test_a_broken_record_is_named_with_its_file(
    tmp_path: Path, ending: str, changes: dict, said: str
) -> None:
    (tmp_path / "secret.png").write_bytes(png(0))
    records = [pair(0, margin=1), pair(1, margin=1) | changes]
    file = write_records(tmp_path / "data", records, f"pairs.{ending}")
    with pytest.raises(InputError) as raised:
        read_preferences(file)
    assert str(raised.value).startswith(f"{file}: {said}")


def test_a_character_in_two_halves_is_whole(tmp_path: Path) -> None:
    file = Path(write_records(tmp_path, [pair(0, prompt="a \U0001f600")], "pairs.jsonl"))
    assert "\\ud83d" in file.read_text()
    assert [*read_preferences(str(file)).column("prompt")] == ["a \U0001f600"]


def test_a_line_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_files, "LONGEST", 50)
    file = write_records(tmp_path, [pair(0)], "pairs.jsonl")
    with pytest.raises(InputError, match=r"pairs\.jsonl: line 1 has more than 50 characters"):
        read_preferences(file)


def test_deep_values_are_kept_as_json(tmp_path: Path) -> None:
    """Guards: Arrow's limit of levels, in a column that nothing reads."""
    deep = json.loads("[" * 200 + "]" * 200)
    assert len(read_preferences(write_records(tmp_path, [pair(0, note=deep)], "pairs.json"))) == 1


@pytest.mark.parametrize("value", [7, {"a": 1}, ""])
def test_what_is_no_path_among_paths_is_named(tmp_path: Path, value: Any) -> None:
    file = write_records(tmp_path, [pair(0), pair(1, chosen=value)], "pairs.jsonl")
    with pytest.raises(InputError, match=r"pairs\.jsonl: row 1, column chosen (is|has no image)"):
        read_preferences(file)


def test_a_missing_column_is_told_with_the_formats(tmp_path: Path) -> None:
    file = write_records(tmp_path, [{"prompt": "a", "good": "pictures/0.png"}], "pairs.jsonl")
    for read in (read_preferences, read_sft):
        with pytest.raises(InputError, match=r"its columns are \['prompt', 'good'\].*; images, ranks; jpg_0"):
            read(file)


# Files and splits


def test_a_file_has_one_split(tmp_path: Path) -> None:
    """Guards: an evaluation on the rows that are trained on, for the file has no others."""
    file = write_records(tmp_path, [pair(0), pair(1)], "pairs.jsonl")
    with pytest.raises(InputError, match=r"pairs\.jsonl is one file, whose rows are the split 'train', not"):
        read_preferences(file, split="test")
    assert len(read_preferences(write_records(tmp_path, [pair(0)], "my_test.jsonl"), split="test")) == 1
    rows = datasets.Dataset.from_dict(pair_rows(2), PAIRS)
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"saved is one saved table, whose rows are the split 'train', not"):
        read_preferences(str(tmp_path / "saved"), split="test")


@pytest.mark.parametrize("ending", [*ENDINGS, "parquet"])
def test_the_name_of_a_split_may_hold_a_line(tmp_path: Path, ending: str) -> None:
    """As in ultrafeedback_binarized: train_prefs and test_prefs."""
    for count, split in enumerate(("train_prefs", "Test-prefs"), start=1):
        if ending == "parquet":
            write_table(tmp_path, pair_rows(count), PAIRS, f"{split}.parquet")
        else:
            write_records(tmp_path, [pair(number) for number in range(count)], f"{split}.{ending}")
    for split, count in {"train_prefs": 1, "train": 1, "test-prefs": 2, "test": 2}.items():
        assert len(read_preferences(str(tmp_path), split=split)) == count
    assert len(read_preferences(str(tmp_path / f"train_prefs.{ending}"), split="train_prefs")) == 1
    for whole in (tmp_path, tmp_path / f"Test-prefs.{ending}"):
        with pytest.raises(InputError, match="'prefs_of_others'"):
            read_preferences(str(whole), split="prefs_of_others")


def test_a_parquet_or_arrow_file_alone(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    assert seeds(read_preferences(str(tmp_path / "train.parquet"))) == [[0, 1], [2, 3]]
    datasets.Dataset.from_dict(pair_rows(2), PAIRS).save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    assert seeds(read_preferences(str(arrow))) == [[0, 1], [2, 3]]


def test_the_metadata_of_an_imagefolder_stand_for_it(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    line = {"file_name": "pictures/3.png", "text": "three"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    assert seeds(read_sft(str(tmp_path / "metadata.jsonl"))) == [[3]]


SLICES = {
    "train[:2]": [0, 1],
    "train[2:]": [2, 3, 4],
    "train[20%:60%]": [1, 2],
    "train[-1:]": [4],
    "train[:1]+train[3:4]": [0, 3],
    "train": [0, 1, 2, 3, 4],
}


@pytest.mark.parametrize("split", SLICES)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "file", "parquet", "saved", "imagefolder"])
def test_slices_of_local_tables_are_those_of_datasets(tmp_path: Path, split: str, kind: str) -> None:
    records = [pair(number) for number in range(5)]
    folder = tmp_path / "data"
    if kind == "parquet":
        write_pairs(folder, 5)
    elif kind == "saved":
        datasets.Dataset.from_dict(pair_rows(5), PAIRS).save_to_disk(folder)
    elif kind == "imagefolder":
        write_records(
            folder,
            [{f"{k}_file_name" if k != "prompt" else k: v for k, v in r.items()} for r in records],
            "metadata.jsonl",
        )
    else:
        write_records(folder, records, "pairs.csv" if kind == "csv" else "pairs.jsonl")
    source = str(folder / "pairs.jsonl") if kind == "file" else str(folder)
    table = read_preferences(source, split=split)
    assert seeds(table) == [[2 * number, 2 * number + 1] for number in SLICES[split]]
    assert str(table).endswith(f", {split}: {len(table)} rows") == (split != "train")


def test_a_sum_of_splits(tmp_path: Path) -> None:
    write_pairs(tmp_path, 3)
    write_table(tmp_path, pair_rows(1), PAIRS, "test.parquet")
    assert seeds(read_preferences(str(tmp_path), split="train[1:]+test")) == [[2, 3], [4, 5], [0, 1]]
    assert len(read_vision_examples("pocket", "sft", split="train[:3]+test[:2]")) == 5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train", "test"),
        ("train-a", "train-b"),
        ("train[:90%]", "train[90%:]"),
        ("train[:500]", "train[700:]"),
        ("train[:-10]", "train[-10:]"),
        ("train[:-1%]", "train[-1%:]"),
        ("train[:2]+train[4:]", "train[2:4]+test"),
    ],
)
def test_slices_that_share_no_row_of_any_table(one: str, other: str) -> None:
    """Checked against datasets' own row numbers in tables of 1 to 60 rows."""
    assert not may_share_rows(one, other) and not may_share_rows(other, one)
    for count in range(1, 61) if "[" in one else ():
        lengths = {"train": count, "test": count}
        rows = [
            {(part.splitname, row) for part in parts for row in range(part.from_, part.to)}
            for parts in (
                datasets.ReadInstruction.from_spec(split).to_absolute(lengths) for split in (one, other)
            )
        ]
        assert not rows[0] & rows[1]


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("train[:x]", r"the split 'train\[:x\]' cannot be read: Unrecognized instruction format"),
        ("train[:200%]", r"the split 'train\[:200%\]' cannot be read: Percent slice boundaries"),
        ("train[:2", r"the split 'train\[:2' cannot be read: .* Write for example train\[:500\]"),
        ("train[9:]", r"the split 'train\[9:\]' has no rows"),
        ("train[3:1]", r"the split 'train\[3:1\]' has no rows"),
        ("test[:2]", "no parquet file of a split 'test'"),
        ("train[:50%](pct1_dropremainder)", "cannot be read: Using .* on a split with less than 100"),
    ],
)
def test_wrong_slices_are_named(tmp_path: Path, split: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_preferences(write_pairs(tmp_path, 3), split=split)


# Options of the hub, and cards


def test_options_that_a_local_table_would_ignore_are_refused(tmp_path: Path) -> None:
    file, folder = write_records(tmp_path / "a", [pair(0)], "pairs.jsonl"), write_pairs(tmp_path / "b")
    for source in (file, folder):
        with pytest.raises(InputError, match=r"--dataset_revision main: .* is on this machine and has no"):
            read_preferences(source, revision="main")
        with pytest.raises(InputError, match=r"--dataset_revision main: .* is on this machine and has no"):
            read_vision_examples(source, "pairs", revision="main")
    with pytest.raises(InputError, match=r"--dataset_config pairs: .*pairs\.jsonl is one file; leave the"):
        read_preferences(file, config="pairs")
    with pytest.raises(
        InputError, match=r"--dataset_config pairs: .* has no such sub-folder; its tables are"
    ):
        read_preferences(folder, config="pairs")
    for option in ("config", "revision"):
        with pytest.raises(InputError, match=rf"--dataset_{option} x: pocket is on this machine and has no"):
            read_vision_examples("pocket", "sft", **{option: "x"})


def with_card(folder: Path, *configs: str) -> str:
    """Tables of 1, 2, ... pairs and a card that names them."""
    for number, name in enumerate(("first", "second"), start=1):
        write_table(folder / name, pair_rows(number), PAIRS, "train-00000.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n\n# A dataset\n")
    return str(folder)


def test_the_default_of_a_card_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    configs = [
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*.parquet"
        for name in ("first", "second")
    ]
    folder = with_card(tmp_path / "a", configs[0], configs[1] + "\n  default: true")
    assert len(read_preferences(folder)) == 2 == len(datasets.load_dataset(folder, split="train"))
    assert len(read_preferences(folder, config="first")) == 1
    with pytest.raises(InputError, match="holds several tables; name one with --dataset_config: first"):
        read_preferences(with_card(tmp_path / "b", *configs))
    write_pairs(tmp_path / "outside", 3)
    outside = "- config_name: ../outside\n  default: true"
    with pytest.raises(InputError, match="no parquet file of a split 'x'"):
        load(with_card(tmp_path / "c", outside), split="x", config=None, revision=None)
    with pytest.raises(InputError, match=r"README\.md: its lines between --- are no dataset card"):
        read_preferences(with_card(tmp_path / "d", "- {"))


def test_a_card_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    write_pairs(tmp_path, 3)
    write_pairs(tmp_path / "inner", 1)
    (tmp_path / "inner" / "README.md").write_text("---\nconfigs:\n- config_name: ..\n  default: true\n---\n")
    assert len(read_preferences(str(tmp_path / "inner"))) == 1
    for name in (".", ".."):
        with pytest.raises(InputError, match=rf"--dataset_config {re.escape(name)}: .* no such sub-folder"):
            read_preferences(str(tmp_path / "inner"), config=name)


def test_a_card_of_one_table_in_a_folder_named_otherwise(tmp_path: Path) -> None:
    """As the hub's own: `default`, with files data/train-*."""
    write_table(tmp_path / "data", pair_rows(2), PAIRS, "train-00000-of-00001.parquet")
    files = "  data_files:\n  - split: train\n    path: data/train-*"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n{files}\n---\n")
    assert len(read_preferences(str(tmp_path))) == len(read_preferences(str(tmp_path), config="default")) == 2


def test_a_snapshot_in_the_hubs_cache_is_links_to_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "datasets--someone--pairs"
    snapshot = repository / "snapshots" / "abc"
    write_records(tmp_path / "data", [pair(0)], "pairs.jsonl")
    (repository / "blobs").mkdir(parents=True)
    for path in sorted((tmp_path / "data").rglob("*.*")):
        blob = repository / "blobs" / path.name
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(tmp_path / "data")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    assert seeds(read_preferences(str(snapshot))) == [[0, 1]]
    (tmp_path / "secret.png").write_bytes(png(0))
    (snapshot / "pictures" / "0.png").unlink()
    (snapshot / "pictures" / "0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match="outside of the dataset's folder"):
        read_preferences(str(snapshot))


@pytest.mark.parametrize(
    ("place", "picture"),
    [
        ("datasets--a--b/snapshots/abc", "../../blobs/0.png"),
        ("datasets--a--b/snapshots/abc", "../other/0.png"),
        ("datasets--a--b/snapshots", "0.png"),
        ("mine/snapshots/abc", "0.png"),
    ],
)
def test_blobs_are_reached_by_the_links_of_a_snapshot_alone(tmp_path: Path, place: str, picture: str) -> None:
    folder = tmp_path / place
    for path in (folder, folder.parent / "other", folder.parent / "blobs", folder.parents[1] / "blobs"):
        path.mkdir(parents=True, exist_ok=True)
        (path / "0.png").write_bytes(png(0))
    blob = (folder.parent if folder.name == "snapshots" else folder.parents[1]) / "blobs" / "0.png"
    for link in (folder / "0.png", folder.parent / "other" / "0.png"):
        link.unlink()
        link.symlink_to(blob)
    records = [pair(0) | {"chosen": picture}]
    with pytest.raises(InputError, match=f"points to {picture}, outside of the dataset's folder"):
        read_preferences(write_records(folder, records, "pairs.jsonl"))


def test_bytes_in_parquet_and_hidden_folders(tmp_path: Path) -> None:
    """Guards: tables that a builder was writing when it was stopped."""
    images = {"prompt": ["a"], "image": [cell(png(3))]}
    write_table(tmp_path / "sft", images)
    write_table(tmp_path / ".sft", images)
    (tmp_path / "BUILD.json").write_text("{}")
    with pytest.raises(InputError, match=r"name one with --dataset_config: sft$"):
        read_sft(str(tmp_path))


def test_a_folder_is_read_whatever_its_name(tmp_path):
    """Guards: datasets, which takes a path for a pattern."""
    folder = write_pairs(tmp_path / "ranks[1-2] of *?", 3)
    assert len(read_preferences(folder)) == 3


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_cache_that_cannot_be_written_is_no_fault_of_the_table(tmp_path, monkeypatch, kind):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    source = write_pairs(tmp_path / "pairs", 3)
    if kind == "jsonl":
        source = str(tmp_path / "rows.jsonl")
        Path(source).write_text('{"prompt": "a fox", "chosen": "a.png", "rejected": "b.png"}\n')
    with pytest.raises(InputError, match=r"could not write the cache of tables .*/file.*HF_DATASETS_CACHE"):
        read_preferences(source)
