"""Tables on disk: every format that is read, what is dropped with which reason, and what stops the run."""

import json
import math
import os
from pathlib import Path

import datasets
import pytest
from pictures import (
    PAIRS,
    cell,
    pair_rows,
    png,
    sha,
    write_pairs,
    write_table,
)
from PIL import Image

from prefopt.diffusion.families import family_of
from prefopt.diffusion.latents import Encoder
from prefopt.diffusion.sampling import load_pipeline
from prefopt.diffusion.tables import Table, read_preferences, read_sft
from prefopt.errors import InputError
from prefopt.records import image_bytes

COUNT = 4


def check_pairs(table: Table) -> None:
    """The rows that `pair_rows` makes, with their bytes as they were written."""
    assert len(table) == COUNT
    assert table.facts["prompt"][:] == [f"prompt {i}" for i in range(COUNT)]
    for i in range(COUNT):
        assert table.images(i) == [png(2 * i), png(2 * i + 1)]
        assert table.facts[i]["sha256"] == [sha(png(2 * i)), sha(png(2 * i + 1))]


# Formats


def as_parquet(folder: Path) -> str:
    return write_pairs(folder, COUNT)


def as_shards(folder: Path) -> str:
    rows = datasets.Dataset.from_dict(pair_rows(COUNT), PAIRS)
    (folder / "data").mkdir(parents=True)
    for shard in range(2):
        rows.select(range(2 * shard, 2 * shard + 2)).to_parquet(
            folder / "data" / f"train-{shard:05d}-of-00002.parquet"
        )
    write_table(folder / "data", pair_rows(1), PAIRS, "test-00000-of-00001.parquet")
    return str(folder)


def as_saved(folder: Path) -> str:
    datasets.Dataset.from_dict(pair_rows(COUNT), PAIRS).save_to_disk(folder)
    return str(folder)


def as_saved_dict(folder: Path) -> str:
    rows = datasets.Dataset.from_dict(pair_rows(COUNT), PAIRS)
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(folder)
    return str(folder)


def as_binary(folder: Path) -> str:
    """Columns of plain bytes."""
    rows = pair_rows(COUNT)
    plain = {name: [image["bytes"] for image in rows[name]] for name in ("chosen", "rejected")}
    return write_table(folder, {"prompt": rows["prompt"], **plain})


def as_imagefolder(folder: Path) -> str:
    """Image files and a metadata.jsonl; here the prompt is called text."""
    lines = []
    for i in range(COUNT):
        names = {"chosen_file_name": f"{i}-good.png", "rejected_file_name": f"sub/{i}-bad.png"}
        for side, name in enumerate(names.values()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(png(2 * i + side))
        lines.append(json.dumps({**names, "text": f"prompt {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def as_paths(folder: Path) -> str:
    """Columns of paths, relative to the dataset's folder."""
    (folder / "images").mkdir(parents=True)
    for i in range(2 * COUNT):
        (folder / "images" / f"{i}.png").write_bytes(png(i))
    sides = {
        name: [f"images/{2 * i + side}.png" for i in range(COUNT)]
        for side, name in enumerate(("chosen", "rejected"))
    }
    return write_table(folder, {"prompt": pair_rows(COUNT)["prompt"], **sides})


def as_preferences(folder: Path) -> str:
    """As in open-image-preferences: the columns of pairs, among many others."""
    others = {"chosen_model": ["m"] * COUNT, "evolution": ["quality"] * COUNT, "id": list(range(COUNT))}
    return write_pairs(folder, COUNT, **others)


@pytest.mark.parametrize(
    "write",
    [
        as_parquet,
        as_shards,
        as_saved,
        as_saved_dict,
        as_binary,
        as_imagefolder,
        as_paths,
        as_preferences,
    ],
)
def test_every_format_reads_alike(tmp_path, write):
    table = read_preferences(write(tmp_path / "data"))
    assert len(table) == COUNT and not table.dropped
    check_pairs(table)


def test_a_split_is_chosen_by_name(tmp_path):
    assert len(read_preferences(as_shards(tmp_path / "shards"), split="test")) == 1
    assert len(read_preferences(as_saved_dict(tmp_path / "dict"), split="test")) == 1
    with pytest.raises(InputError, match=r"no split 'validation'; it has \['test', 'train'\]"):
        read_preferences(str(tmp_path / "dict"), split="validation")
    with pytest.raises(InputError, match=r"no parquet file of a split 'validation'.*test-00000"):
        read_preferences(str(tmp_path / "shards"), split="validation")


def test_held_out_files_are_not_taken_for_training_data(tmp_path):
    """Neither where no file is named for training, nor by a name that contains the word."""
    for name in ("validation.parquet", "test-00000-of-00001.parquet"):
        write_table(tmp_path / "held", pair_rows(1), PAIRS, name)
    with pytest.raises(InputError, match="no parquet file of a split 'train'"):
        read_preferences(str(tmp_path / "held"))
    write_table(tmp_path / "held", pair_rows(4), PAIRS, "Eval.parquet")
    write_table(tmp_path / "held", pair_rows(2), PAIRS, "pairs.parquet")
    assert len(read_preferences(str(tmp_path / "held"))) == 2
    write_table(tmp_path / "held", pair_rows(3), PAIRS, "train-00000-of-00001.parquet")
    assert len(read_preferences(str(tmp_path / "held"))) == 3
    assert len(read_preferences(str(tmp_path / "held"), split="eval")) == 4


def test_single_images_with_prompts(tmp_path):
    """Guards: captions zipped with sorted files, where one lost image shifts them all."""
    folder = tmp_path / "images"
    folder.mkdir()
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) for i in (2, 0, 1)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(i))
    table = read_sft(str(folder))
    found = {fact["prompt"]: fact["sha256"] for fact in table.facts}
    assert found == {f"picture {i}": [sha(png(i))] for i in range(3)}
    columns = {"caption": ["a", "b"], "image": [cell(png(0)), cell(png(1))]}
    features = datasets.Features({"caption": datasets.Value("string"), "image": datasets.Image()})
    table = read_sft(write_table(tmp_path / "table", columns, features))
    assert table.facts["prompt"][:] == ["a", "b"] and table.images(1) == [png(1)]


def test_pairs_are_read_as_their_chosen_images(tmp_path):
    table = read_sft(write_pairs(tmp_path / "pairs", COUNT))
    assert [table.images(i) for i in range(COUNT)] == [[png(2 * i)] for i in range(COUNT)]


# Drops


def test_what_is_no_preference_is_dropped_and_counted(tmp_path):
    """Guards: the same image written as winner and loser."""
    rows = pair_rows(5)
    rows["rejected"][3] = rows["chosen"][3]
    folder = write_pairs(tmp_path / "p", 5, margin=[0.5, 0.0, 2.0, 1.0, 0.0], rejected=rows["rejected"])
    table = read_preferences(folder)
    assert table.facts["rows"][:] == [[0, 0], [2, 2]]
    assert table.dropped == {"tie": 2, "same image twice": 1}
    assert table.where(1) == f"{folder}: row 2", "a row keeps the number that it has in the file"
    assert table.images(1) == [png(4), png(5)]


def test_no_margin_is_no_tie(tmp_path):
    assert len(read_preferences(write_pairs(tmp_path / "p", 2, margin=[None, 0.1]))) == 2


@pytest.mark.parametrize(
    ("margin", "said"),
    [
        (-0.5, "row 1 has the margin -0.5: its rejected image scores higher"),
        (math.nan, "row 1 has the margin nan; a margin is a finite number"),
        (math.inf, "row 1 has the margin inf"),
    ],
)
def test_a_margin_that_contradicts_its_pair_stops_the_run(tmp_path, margin, said):
    with pytest.raises(InputError, match=said):
        read_preferences(write_pairs(tmp_path / "p", 2, margin=[1.0, margin]))


def test_nothing_but_ties_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"none of its 3 rows can be used \(3 tie\)"):
        read_preferences(write_pairs(tmp_path / "p", 3, margin=[0.0] * 3))


# What stops the run


def image_columns(at: int, side: str, value: dict | None) -> dict[str, list]:
    rows = pair_rows(3)
    rows[side][at] = value
    return {side: rows[side]}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (image_columns(1, "rejected", None), "row 1, column rejected has no image; fill it, or drop the row"),
        (image_columns(2, "chosen", cell(b"")), "row 2, column chosen is an image of 0 bytes"),
        (image_columns(0, "chosen", cell(None, "no.png")), "row 0, column chosen points to no.png"),
        ({"prompt": [1, 2, 3]}, "row 0 has the prompt 1; a prompt is text"),
        ({"prompt": ["a", None, "b"]}, "row 1 has the prompt None; a prompt is text"),
        ({"prompt": [["a"], ["b"], ["c"]]}, r"row 0 has the prompt \['a'\]; a prompt is text"),
        ({"margin": ["0.1", "0.2", "0.3"]}, "row 0 has the margin '0.1'"),
    ],
)
def test_a_broken_row_is_named(tmp_path, columns, said):
    folder = write_pairs(tmp_path / "p", 3, **columns)
    with pytest.raises(InputError, match=said):
        read_preferences(folder)


@pytest.mark.parametrize("lost", ["prompt", "chosen", "rejected"])
def test_a_missing_column_is_named_beside_those_there(tmp_path, lost):
    columns = {name: values for name, values in pair_rows(2).items() if name != lost}
    features = datasets.Features({name: PAIRS[name] for name in columns})
    with pytest.raises(InputError, match=f"no column '{lost}'; its columns are .*{next(iter(columns))}"):
        read_preferences(write_table(tmp_path / "p", columns, features))


@pytest.mark.parametrize("values", [[1, 2], [0.5, 0.25], [["a"], ["b"]]])
def test_a_column_that_holds_no_images_is_named(tmp_path, values):
    rows = {**pair_rows(2), "chosen": values}
    features = {**PAIRS, "chosen": datasets.Dataset.from_dict({"chosen": values}).features["chosen"]}
    with pytest.raises(InputError, match="'chosen' holds no images"):
        read_preferences(write_table(tmp_path / "p", rows, datasets.Features(features)))


@pytest.mark.parametrize("kind", ["relative", "absolute", "link"])
def test_a_path_may_not_leave_the_datasets_folder(tmp_path, kind):
    """A downloaded table must not reach for a user's other files."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(0))
    folder = tmp_path / "data" / "p"
    path = {"relative": "../../secret.png", "absolute": str(secret), "link": "link.png"}[kind]
    write_pairs(folder, 3, **image_columns(1, "chosen", cell(None, path)))
    (folder / "link.png").symlink_to(secret)
    with pytest.raises(InputError, match=r"row 1, column chosen points to .*, outside of the dataset's"):
        read_preferences(str(folder))


def test_an_imagefolder_may_not_leave_its_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(0))
    folder = Path(as_imagefolder(tmp_path / "p"))
    line = {"chosen_file_name": "../secret.png", "rejected_file_name": "0-good.png", "text": "x"}
    (folder / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(InputError):
        read_preferences(str(folder))


def test_a_table_from_the_hub_reaches_downloads_alone(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(0))
    with pytest.raises(InputError, match="outside of the dataset's folder"):
        image_bytes(cell(None, str(tmp_path / "secret.png")), "hub/name: row 0")


def test_what_is_no_dataset(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.txt").write_text("nothing here")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "train.parquet").write_bytes(b"PAR1 and no more")
    rows = datasets.Dataset.from_dict({name: [] for name in PAIRS}, PAIRS)
    (tmp_path / "rowless").mkdir()
    rows.to_parquet(tmp_path / "rowless" / "train.parquet")
    for name, said in {
        "empty": "is empty: no Parquet, Arrow, JSON, CSV or image files",
        "notes": r"notes holds no table and no pictures, but \['README.txt'\]",
        "torn": r"train\.parquet is damaged, or no parquet file",
        "torn/train.parquet": r"train\.parquet is damaged, or no parquet file .*; write or download it again",
        "notes/README.txt": r"README\.txt is no table; those that can be read end with \.parquet, \.arrow",
        "rowless": r"train\.parquet has no rows",
        "missing": "no such folder or file is here",
    }.items():
        with pytest.raises(InputError, match=said):
            read_preferences(str(tmp_path / name))
    with pytest.raises(InputError, match="no dataset 'nobody/nothing': no such folder or file is here"):
        read_preferences("nobody/nothing")


def test_images_are_not_decoded_while_reading(tmp_path, monkeypatch):
    """An image that is damaged within is found when it is encoded, once; what begins as none at the start."""
    folder = write_pairs(tmp_path / "p", 3, **image_columns(1, "chosen", cell(png(1)[:40])))
    other = write_pairs(tmp_path / "q", 3, **image_columns(1, "chosen", cell(b"no image")))
    monkeypatch.setattr(Image, "open", None)
    assert read_preferences(folder).images(1)[0] == png(1)[:40]
    with pytest.raises(
        InputError, match=r"row 1, column chosen: no image of PNG, .* begins with b'no image'"
    ):
        read_preferences(other)


# Kept by content: what changed on disk is seen


def with_paths(folder: Path) -> Path:
    """A table whose cells name pictures beside it."""
    (folder / "pictures").mkdir(parents=True)
    for i in range(4):
        (folder / "pictures" / f"{i}.png").write_bytes(png(i))
    paths = [f"pictures/{i}.png" for i in range(4)]
    columns = {"prompt": ["a", "b"]}
    columns |= {"chosen": [cell(None, p) for p in paths[:2]], "rejected": [cell(None, p) for p in paths[2:]]}
    write_table(folder, columns, PAIRS)
    return folder / "pictures"


def hashes(folder: Path) -> list[str]:
    return read_preferences(str(folder)).facts["sha256"][0]


def test_a_replaced_picture_has_a_new_hash(tmp_path):
    """Guards: the hash of the old picture from datasets' cache, under which the new one is encoded."""
    pictures = with_paths(tmp_path)
    assert hashes(tmp_path) == [sha(png(0)), sha(png(2))]
    (pictures / "0.png").write_bytes(png(9))
    assert hashes(tmp_path) == [sha(png(9)), sha(png(2))]
    (pictures / "0.png").unlink()
    with pytest.raises(InputError, match=r"row 0, column chosen points to pictures/0\.png, which is"):
        read_preferences(str(tmp_path))


def test_a_picture_replaced_in_place_with_its_old_times_has_a_new_hash(tmp_path):
    pictures = with_paths(tmp_path)
    file = pictures / "0.png"
    before = file.stat()
    assert hashes(tmp_path)[0] == sha(png(0))
    content = png(9)
    file.write_bytes(content + b"\0" * (before.st_size - len(content)))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashes(tmp_path)[0] == sha(file.read_bytes())


def test_a_parquet_file_replaced_within_the_same_second_is_read_anew(tmp_path):
    """Guards: datasets' own key of a file, which is its name and its time in whole seconds."""
    for seed in range(4):
        write_pairs(tmp_path, 2, chosen=[cell(png(10 * seed)), cell(png(10 * seed + 1))])
        assert hashes(tmp_path)[0] == sha(png(10 * seed))


def test_a_saved_dataset_is_checked_once(tmp_path):
    """Guards: datasets' own caches in that folder, taken for a change of it."""
    folder = Path(as_saved(tmp_path / "saved"))
    for _ in range(3):
        check_pairs(read_preferences(str(folder)))
        assert len(list(folder.glob("cache-*.arrow"))) == 1


def test_a_picture_that_changes_under_a_read_table_is_named(tmp_path, stable_diffusion):
    pictures = with_paths(tmp_path / "table")
    table = read_preferences(str(tmp_path / "table"))
    (pictures / "1.png").write_bytes(png(9))
    pipeline = load_pipeline(stable_diffusion)
    encoder = Encoder(pipeline, tmp_path / "cache", 16, family_of(pipeline))
    with pytest.raises(InputError, match="row 1, column chosen: the image has changed since"):
        encoder.images(table, mirrored=False)


# A builder's folder


def test_a_table_is_named_among_those_of_a_builders_folder(tmp_path):
    write_pairs(tmp_path / "pairs", 3)
    write_table(tmp_path / "sft", {"prompt": ["a"], "image": [cell(png(0))]})
    (tmp_path / "BUILD.json").write_text("{}")
    assert len(read_preferences(str(tmp_path), config="pairs")) == 3
    assert len(read_sft(str(tmp_path), config="sft")) == 1
    with pytest.raises(InputError, match="several tables; name one with --dataset_config: pairs, sft"):
        read_preferences(str(tmp_path))
    with pytest.raises(
        InputError,
        match=r"--dataset_config ranked: .* its tables are pairs, sft; a builder that has --exports",
    ):
        read_preferences(str(tmp_path), config="ranked")


# Soft labels


def test_soft_labels_are_probabilities(tmp_path):
    table = read_preferences(write_pairs(tmp_path / "p", 2, p_chosen=[0.9, 0.5]))
    assert table.soft_labels and [*table.column("p_chosen")] == pytest.approx([0.9, 0.5])
    assert not read_preferences(write_pairs(tmp_path / "q", 2)).soft_labels
    for wrong in (1.5, -0.1, float("nan"), None):
        with pytest.raises(InputError, match=r"row 1 has the p_chosen .*; it is a probability"):
            read_preferences(write_pairs(tmp_path / "w", 2, p_chosen=[0.9, wrong]))


@pytest.mark.parametrize("read", [read_preferences, read_sft])
def test_a_table_of_two_formats_is_refused(tmp_path, read):
    """Guards: votes that say something else than the pairs beside them, and are not read."""
    votes = {"image1": pair_rows(2)["chosen"], "image2": pair_rows(2)["rejected"]}
    more = {"votes_image1": [0, 1], "votes_image2": [2, 3]}
    folder = write_table(tmp_path / "p", {**pair_rows(2), **votes, **more})
    said = "p is in two formats at once: it has the columns .*image1, image2, votes_image1, votes_image2"
    with pytest.raises(InputError, match=f"{said}.*chosen, rejected|.*chosen, rejected.*votes.*; drop those"):
        read(folder)
    pairs_and_images = write_table(tmp_path / "q", pair_rows(2) | {"image": pair_rows(2)["chosen"]})
    if read is read_sft:
        with pytest.raises(InputError, match="the columns image, and chosen, rejected; drop those of one"):
            read(pairs_and_images)
    else:
        assert len(read(pairs_and_images)) == 2
