"""Formats of tables of images: ranked lists, Pick-a-Pic, votes, HPDv2, ImageReward, as they are on disk."""

import json
import math
import os
from pathlib import Path

import datasets
import pytest
from pictures import (
    RANKED,
    cell,
    encoded,
    pair_rows,
    picture,
    png,
    ranked_rows,
    sha,
    write_ranked,
    write_table,
)
from PIL import Image

from prefopt.diffusion.formats import find_format
from prefopt.diffusion.tables import Table, read_preferences, read_sft
from prefopt.errors import InputError

# Pick-a-Pic


def as_pickapic(folder: Path, labels: list[tuple], **more: list) -> str:
    rows = {
        "caption": [f"caption {i}" for i in range(len(labels))],
        "jpg_0": [encoded(picture(2 * i), "JPEG") for i in range(len(labels))],
        "jpg_1": [encoded(picture(2 * i + 1), "JPEG") for i in range(len(labels))],
        "label_0": [left for left, _ in labels],
        "label_1": [right for _, right in labels],
        "are_different": [True] * len(labels),
    }
    return write_table(folder, {**rows, **more})


def test_pickapic_the_higher_label_wins(tmp_path):
    """Guards: label_0 = 0.5 is read as a win for jpg_0."""
    table = read_preferences(as_pickapic(tmp_path / "p", [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]))
    jpegs = [encoded(picture(i), "JPEG") for i in range(6)]
    assert [table.images(i) for i in range(2)] == [[jpegs[0], jpegs[1]], [jpegs[5], jpegs[4]]]
    assert table.facts["prompt"][:] == ["caption 0", "caption 2"]
    assert table.dropped == {"tie": 1}
    assert str(table) == f"{tmp_path / 'p'}: 2 rows (dropped: 1 tie)"


def test_pickapic_whole_numbers_and_rows_without_label(tmp_path):
    folder = as_pickapic(tmp_path / "p", [(1, 0), (0, 0), (1, 0)], has_label=[True, False, False])
    table = read_preferences(folder)
    assert len(table) == 1 and table.dropped == {"no label": 2}


@pytest.mark.parametrize("value", ["True", 7, None])
def test_whether_pickapic_has_a_label_is_true_or_false(tmp_path, value):
    """Guards: the text 'False', which Python takes for true."""
    folder = as_pickapic(tmp_path / "p", [(1, 0)], has_label=[value])
    with pytest.raises(InputError, match=r"row 0 has the has_label .*; it is true or false"):
        read_preferences(folder)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([("1", "0")], "row 0 has the label '1'"),
        ([(True, False)], "row 0 has the label True"),
        ([(1.0, 0.0), (math.nan, 1.0)], "row 1 has the label nan"),
        ([(1.0, 0.0), (1.0, None)], "row 1 has the label None"),
        ([(1, 0), (7, 0)], "row 1 has the label 7; labels are numbers: 0, 0.5 or 1"),
        ([(1, 0), (1, -3)], "row 1 has the label -3"),
    ],
)
def test_pickapic_labels_are_checked_numbers(tmp_path, labels, said):
    """Guards: labels read from text files as strings, so that jpg_0 always wins."""
    with pytest.raises(InputError, match=said):
        read_preferences(as_pickapic(tmp_path / "p", labels))


# Ranked lists


def seeds_of(table: Table, index: int, count: int = 12) -> list[int]:
    """An example's images, best first, by the seeds of their pictures."""
    known = {png(seed): seed for seed in range(count)}
    return [known[content] for content in table.images(index)]


def test_ranked_lists_are_in_the_order_of_their_ranks_however_they_are_written(tmp_path):
    lists = [[0, 1, 2, 3], [4, 5], [6, 7, 8]]
    table = read_preferences(write_ranked(tmp_path / "p", lists, [[3, 1, 4, 2], [2, 1], [7, 0, 3]]))
    assert [seeds_of(table, i) for i in range(3)] == [[1, 3, 0, 2], [5, 4], [7, 8, 6]]
    assert [*table.column("ranks")] == [[1, 2, 3, 4], [1, 2], [1, 2, 3]], "of any unequal lengths"
    assert [*table.column("rows")] == [[0] * 4, [1] * 2, [2] * 3]
    assert table.facts[1]["columns"] == ["images[1]", "images[0]"]
    assert table.facts[1]["sha256"] == [sha(png(5)), sha(png(4))]
    assert not table.soft_labels and [*table.column("p_chosen")] == [None] * 3
    assert table.image(2, 1)[1] == f"{tmp_path / 'p'}: row 2, column images[2]"


def test_ties_keep_equal_ranks_which_are_one_more_than_the_number_of_better_images(tmp_path):
    folder = write_ranked(tmp_path / "p", [[0, 1, 2, 3], [4, 5, 6]], [[2, 1, 1, 2], [9, 5, 9]])
    table = read_preferences(folder)
    assert [*table.column("ranks")] == [[1, 1, 3, 3], [1, 2, 2]]
    assert [seeds_of(table, i) for i in range(2)] == [[1, 2, 0, 3], [5, 4, 6]], "ties as they are written"


def test_an_image_counts_once_at_one_rank_and_drops_its_row_at_two(tmp_path):
    """Guards: the same image written as winner and loser."""
    lists = [[0, 1, 0], [2, 3, 2], [4, 4, 5, 5], [6, 6]]
    table = read_preferences(
        write_ranked(tmp_path / "p", lists, [[1, 2, 1], [1, 2, 3], [2, 2, 1, 1], [1, 1]])
    )
    assert [seeds_of(table, i) for i in range(2)] == [[0, 1], [5, 4]]
    assert [*table.column("ranks")] == [[1, 2], [1, 2]], "an image that is left out is no better one"
    assert table.dropped == {"same image twice": 1, "tie": 1}


def test_lists_of_nothing_but_ties_are_an_error(tmp_path):
    with pytest.raises(InputError, match=r"none of its 2 rows can be used \(2 tie\)"):
        read_preferences(write_ranked(tmp_path / "p", [[0, 1, 2], [3, 4]], [[1, 1, 1], [2, 2]]))


@pytest.mark.parametrize(
    ("seeds", "ranks", "said"),
    [
        ([0, 1, 2], [1, 2], "row 1 has 3 images, but 2 ranks"),
        ([0, 1], [1, 2, 3], "row 1 has 2 images, but 3 ranks"),
        ([0, 1], None, "row 1 has 2 images, but 0 ranks"),
        ([0], [1], "row 1 has 1 in its list images; a ranking needs two or more"),
        ([], [], "row 1 has 0 in its list images; a ranking needs two or more"),
        ([0, 1], [1, None], "row 1 has the rank None; ranks are whole numbers"),
        ([0, 1], [-1, 2], "row 1 has the rank -1; ranks are whole numbers"),
    ],
)
def test_a_broken_list_is_named(tmp_path, seeds, ranks, said):
    with pytest.raises(InputError, match=said):
        read_preferences(write_ranked(tmp_path / "p", [[8, 9], seeds], [[1, 2], ranks]))


@pytest.mark.parametrize("ranks", [[1.0, 2.5], ["1", "2"], [True, False]])
def test_ranks_are_whole_numbers(tmp_path, ranks):
    with pytest.raises(InputError, match=rf"row 0 has the rank {ranks[0]!r}; ranks are whole numbers"):
        read_preferences(write_ranked(tmp_path / "p", [[0, 1]], [ranks]))


def test_a_list_without_images_is_named(tmp_path):
    rows = ranked_rows([[0, 1], [2, 3]], [[1, 2], [1, 2]])
    for images, said in (
        (None, "row 1 has 0 images, but 2 ranks"),
        ([cell(png(2)), None], r"row 1, column images\[1\] has no image"),
    ):
        folder = write_table(tmp_path / "p", {**rows, "images": [rows["images"][0], images]}, RANKED)
        with pytest.raises(InputError, match=said):
            read_preferences(folder)
    with pytest.raises(InputError, match="the column 'images' holds no lists of images"):
        read_preferences(write_table(tmp_path / "q", {**rows, "images": [cell(png(0)), cell(png(1))]}))


def saved(folder: Path, rows: dict) -> str:
    datasets.Dataset.from_dict(rows, RANKED).save_to_disk(folder)
    return str(folder)


def with_large_lists(folder: Path, rows: dict) -> str:
    features = {**RANKED, "images": datasets.LargeList(datasets.Image())}
    return write_table(folder, rows, datasets.Features(features))


def listed_paths(folder: Path, rows: dict) -> str:
    """Lists of files in place of pictures."""
    (folder / "pictures").mkdir(parents=True)
    names = [[f"pictures/{i}-{j}.png" for j in range(len(images))] for i, images in enumerate(rows["images"])]
    for files, images in zip(names, rows["images"], strict=True):
        for file, image in zip(files, images, strict=True):
            (folder / file).write_bytes(image["bytes"])
    return write_table(folder, {**rows, "images": names})


@pytest.mark.parametrize(
    "write",
    [
        lambda folder, rows: write_table(folder, rows, RANKED),
        write_table,  # structs of bytes and path
        saved,
        with_large_lists,
        listed_paths,
        lambda folder, rows: write_table(
            folder, {**rows, "images": [[image["bytes"] for image in images] for images in rows["images"]]}
        ),
    ],
    ids=["parquet", "structs", "saved", "large lists", "paths", "binary"],
)
def test_images_of_lists_stay_encoded(tmp_path, write, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    folder = write(tmp_path / "p", ranked_rows([[0, 1, 2], [3, 4]], [[2, 1, 3], [1, 2]]))
    for _ in range(2):  # the second time from datasets' cache
        table = read_preferences(folder)
        assert [table.images(i) for i in range(2)] == [[png(1), png(0), png(2)], [png(3), png(4)]]


def test_of_lists_the_best_images_are_imitated(tmp_path):
    folder = write_ranked(tmp_path / "p", [[0, 1, 2], [3, 4], [5, 6]], [[3, 1, 1], [2, 1], [1, 1]])
    table = read_sft(folder)
    assert [seeds_of(table, i) for i in range(2)] == [[1], [4]] and table.dropped == {"tie": 1}
    assert [*table.column("ranks")] == [[1], [1]] and table.facts["prompt"][:] == ["prompt 0", "prompt 1"]
    votes = read_sft(as_votes(tmp_path / "v", [(1, 2)]))
    assert votes.images(0) == [png(1)] and not votes.soft_labels
    write_ranked(tmp_path / "build" / "ranked", [[0, 1]], [[2, 1]])
    (tmp_path / "build" / "BUILD.json").write_text("{}")
    assert seeds_of(read_sft(str(tmp_path / "build"), config="ranked"), 0) == [1]


def test_the_configuration_of_a_hub_id_reaches_its_lists(tmp_path, monkeypatch):
    asked = []

    def load_dataset(source, config, **options):
        asked.append((source, config, options))
        return datasets.Dataset.from_dict(ranked_rows([[0, 1]], [[2, 1]]), RANKED)

    monkeypatch.setattr("prefopt.records.datasets.load_dataset", load_dataset)
    table = read_sft("nobody/lists", config="small", split="test", revision="main")
    assert table.images(0) == [png(1)]
    assert all(call == ("nobody/lists", "small", {"split": "test", "revision": "main"}) for call in asked), (
        asked
    )


# Votes


def as_votes(folder: Path, votes: list[tuple]) -> str:
    rows = pair_rows(len(votes))
    columns = {"prompt": rows["prompt"], "image1": rows["chosen"], "image2": rows["rejected"]}
    counts = {f"votes_image{side + 1}": [of[side] for of in votes] for side in range(2)}
    return write_table(folder, {**columns, **counts})


def test_votes_give_the_winner_and_its_share(tmp_path):
    table = read_preferences(as_votes(tmp_path / "p", [(3, 1), (2, 2), (0, 5), (0, 0), (2, 4)]))
    assert [*table.column("rows")] == [[0, 0], [2, 2], [4, 4]]
    assert [table.facts[i]["columns"][0] for i in range(3)] == ["image1", "image2", "image2"]
    assert table.soft_labels and [*table.column("p_chosen")] == pytest.approx([0.75, 1.0, 4 / 6])
    assert table.images(1) == [png(5), png(4)]
    assert table.dropped == {"tie": 1, "no votes": 1}


def test_votes_may_be_whole_numbers_as_floats(tmp_path):
    """As pandas writes a column of counts that once had a hole."""
    assert [*read_preferences(as_votes(tmp_path / "p", [(3.0, 1.0)])).column("p_chosen")] == [0.75]


@pytest.mark.parametrize(
    ("votes", "said"),
    [
        ([(3, 1), (-1, 2)], "row 1 has -1 votes"),
        ([(0.5, 2.0)], "row 0 has 0.5 votes"),
        ([("3", "1")], "row 0 has '3' votes"),
        ([(True, False)], "row 0 has True votes"),
        ([(3, 1), (3, None)], "row 1 has None votes"),
        ([(1.0, math.nan)], "row 0 has nan votes"),
        ([(math.inf, 1.0)], "row 0 has inf votes"),
    ],
)
def test_votes_are_counted(tmp_path, votes, said):
    with pytest.raises(InputError, match=f"{said}; votes are counted"):
        read_preferences(as_votes(tmp_path / "p", votes))


# HPDv2


def as_hpdv2(folder: Path, rows: list[dict], below: str = "", split: str = "train") -> str:
    """A JSON file of rows, and the pictures 0.png ... 8.png in the folder or one below it."""
    (folder / below).mkdir(parents=True, exist_ok=True)
    for seed in range(9):
        (folder / below / f"{seed}.png").write_bytes(png(seed))
    (folder / f"{split}.json").write_text(json.dumps(rows))
    return str(folder)


@pytest.mark.parametrize("below", ["", "train"])
def test_hpdv2_in_lists_and_in_pairs(tmp_path, below):
    lists = [
        {"prompt": "a", "image_path": ["0.png", "1.png", "2.png"], "rank": [3, 1, 2]},
        {"prompt": "b", "image_path": ["3.png", "4.png"], "rank": [1, 2]},
    ]
    table = read_preferences(as_hpdv2(tmp_path / "lists", lists, below))
    assert [seeds_of(table, i) for i in range(2)] == [[1, 2, 0], [3, 4]]
    assert table.facts["prompt"][:] == ["a", "b"] and [*table.column("ranks")] == [[1, 2, 3], [1, 2]]
    pairs = [
        {"prompt": "a", "image_path": ["5.png", "6.png"], "human_preference": [0, 1]},
        {"prompt": "b", "image_path": ["7.png", "8.png"], "human_preference": [1, 0]},
        {"prompt": "c", "image_path": ["7.png", "8.png"], "human_preference": [1, 1]},
    ]
    table = read_preferences(as_hpdv2(tmp_path / "pairs", pairs, below))
    assert [seeds_of(table, i) for i in range(2)] == [[6, 5], [7, 8]] and table.dropped == {"tie": 1}
    assert not table.soft_labels


def test_hpdv2_has_a_file_for_each_split(tmp_path):
    row = {"prompt": "a", "image_path": ["0.png", "1.png"], "human_preference": [1, 0]}
    as_hpdv2(tmp_path, [row], "train")
    ranked = {"prompt": "b", "image_path": ["2.png", "3.png"], "rank": [2, 1]}
    as_hpdv2(tmp_path, [ranked], "test", "test")
    assert seeds_of(read_preferences(str(tmp_path)), 0) == [0, 1]
    assert seeds_of(read_preferences(str(tmp_path), split="test"), 0) == [3, 2]
    with pytest.raises(InputError, match="no json file of a split 'validation'; there are"):
        read_preferences(str(tmp_path), split="validation")


def test_hpdv2_as_a_table(tmp_path):
    rows = ranked_rows([[0, 1, 2]], [[2, 3, 1]])
    columns = {"prompt": rows["prompt"], "image_path": rows["images"], "rank": rows["ranks"]}
    assert seeds_of(read_preferences(write_table(tmp_path / "p", columns)), 0) == [2, 0, 1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image_path": ["../secret.png", "1.png"], "rank": [1, 2]}, r"outside of the dataset's folder"),
        ({"image_path": ["9.png", "1.png"], "rank": [1, 2]}, r"points to 9\.png, which is not there"),
        ({"image_path": ["0.png", "1.png"], "rank": [1]}, "row 0 has 2 image_path, but 1 rank"),
        ({"image_path": ["0.png", "1.png"], "rank": [1, 1.5]}, "row 0 has the rank 1.0"),
        ({"image_path": ["0.png", "1.png"], "human_preference": [0, 2]}, r"human_preference \[0, 2\]"),
        ({"image_path": ["0.png", "1.png"], "human_preference": [1]}, r"human_preference \[1\]"),
        ({"image_path": ["0.png"], "human_preference": [1, 0]}, "row 0 has 1 image_path, but"),
        ({"image_path": "0.png", "human_preference": [1, 0]}, "'image_path' holds no lists of images"),
    ],
)
@pytest.mark.parametrize("below", ["", "train"])
def test_a_broken_row_of_hpdv2_is_named(tmp_path, row, said, below):
    (tmp_path / "secret.png").write_bytes(png(9))
    with pytest.raises(InputError, match=said):
        read_preferences(as_hpdv2(tmp_path / "p", [{"prompt": "a", **row}], below))


def test_a_json_file_replaced_with_its_old_time_is_read_anew(tmp_path):
    """Guards: datasets' own key of a file, which is its name and its time."""
    for best in (0, 1, 0, 1):
        row = {"prompt": "a", "image_path": ["0.png", "1.png"], "rank": [1 + best, 2 - best]}
        folder = as_hpdv2(tmp_path / "p", [row])
        os.utime(tmp_path / "p" / "train.json", (1, 1))
        assert seeds_of(read_preferences(folder), 0) == [best, 1 - best]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", r"train\.json holds no records"),
        ("", r"train\.json: line 1 is no JSON: Expecting value"),
        ("{", r"train\.json: line 1 is no JSON: "),
        ('["a", "b"]', r"train\.json: row 0 is 'a'; it is to be a record of named values"),
    ],
)
def test_a_json_file_without_rows_is_named(tmp_path, text, said):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(InputError, match=said):
        read_preferences(str(tmp_path))


# ImageReward


def as_image_reward(folder: Path, rows: list[tuple]) -> str:
    """Rows of (seed, rank, prompt_id, prompt)."""
    names = ("image", "rank", "prompt_id", "prompt")
    columns = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    columns["image"] = [cell(png(seed)) for seed in columns["image"]]
    return write_table(folder, columns)


def test_imagereward_s_rows_are_grouped_though_they_do_not_follow_one_another(tmp_path):
    rows = [(0, 2, "x", "a"), (1, 1, "y", "b"), (2, 1, "x", "a"), (3, 5, "z", "c"), (4, 2, "x", "a")]
    table = read_preferences(as_image_reward(tmp_path / "p", [*rows, (5, 2, "y", "b")]))
    assert [seeds_of(table, i) for i in range(2)] == [[2, 0, 4], [1, 5]]
    assert [*table.column("ranks")] == [[1, 2, 2], [1, 2]] and table.facts["prompt"][:] == ["a", "b"]
    assert [*table.column("rows")] == [[2, 0, 4], [1, 5]]
    assert table.dropped == {"no second image": 1}
    assert table.image(0, 2)[1] == f"{tmp_path / 'p'}: row 4, column image"
    assert seeds_of(read_sft(str(tmp_path / "p")), 0) == [2]


def test_equal_prompts_of_two_ids_stay_two_examples(tmp_path):
    rows = [(0, 1, 7, "a"), (1, 2, 7, "a"), (2, 2, 8, "a"), (3, 1, 8, "a")]
    table = read_preferences(as_image_reward(tmp_path / "p", rows))
    assert [seeds_of(table, i) for i in range(2)] == [[0, 1], [3, 2]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ((2, 3, "x", "b"), "rows 0 and 2 have the prompt_id x, but the prompts 'a' and 'b'"),
        ((2, None, "x", "a"), "row 2 has the rank None; ranks are whole numbers"),
        ((2, -3, "x", "a"), "row 2 has the rank -3; ranks are whole numbers"),
        ((2, 3, None, "a"), "row 2 has no prompt_id"),
    ],
)
def test_a_broken_row_of_imagereward_is_named(tmp_path, row, said):
    rows = [(0, 1, "x", "a"), (1, 2, "x", "a"), row]
    with pytest.raises(InputError, match=said):
        read_preferences(as_image_reward(tmp_path / "p", rows))


def test_imagereward_drops_ties_and_an_image_at_two_ranks(tmp_path):
    rows = [(0, 1, "x", "a"), (1, 1, "x", "a"), (2, 1, "y", "b"), (2, 2, "y", "b"), (3, 1, "z", "c")]
    table = read_preferences(as_image_reward(tmp_path / "p", [*rows, (4, 2, "z", "c")]))
    assert seeds_of(table, 0) == [3, 4] and table.dropped == {"tie": 1, "same image twice": 1}


def test_a_misspelt_column_is_guessed():
    with pytest.raises(InputError, match=r"no column 'chosen' \(is it 'choosen', misspelt\?\); its columns"):
        find_format({"prompt": False, "choosen": False, "rejected": False}, "pairs.jsonl")
