"""Checked examples: what a row becomes, what stops the run, what is hashed, and splits by image."""

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from pictures import cell, encoded, picture, png, write_table
from PIL import Image as Pictures
from tiny_vlm import vision_pairs

from prefopt.errors import InputError
from prefopt.visits import Identified, where
from prefopt.vlm.examples import VisionExamples, read_vision_examples
from prefopt.vlm.formats import Kind
from prefopt.vlm.splits import split_by_image

IMAGE = {"type": "image"}
TEXTS = Features(
    images=List(Image()), prompt=Value("string"), chosen=Value("string"), rejected=Value("string")
)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def row(**changes: Any) -> dict:
    return {
        "images": [picture(1)],
        "prompt": "What is it?",
        "chosen": "A cat.",
        "rejected": "A dog.",
    } | changes


def read(rows: list[dict] | Dataset, kind: Kind = "pairs", **options: Any) -> VisionExamples:
    return VisionExamples(
        rows if isinstance(rows, Dataset) else Dataset.from_list(rows), "rows", kind, **options
    )


# What a row becomes


def test_an_example_holds_what_its_row_says() -> None:
    example = read([row(), row(images=[picture(2)], chosen="A cow.")])[1, 0]
    assert example.pop("images")[0].tobytes() == picture(2).tobytes()
    assert example == {
        "item": 1,
        "where": "rows: row 1",
        "image_key": hashlib.sha256(png(2)).hexdigest(),
        "prompt": [{"role": "user", "content": [IMAGE, text("What is it?")]}],
        "completions": [
            [{"role": "assistant", "content": [text("A cow.")]}],
            [{"role": "assistant", "content": [text("A dog.")]}],
        ],
        "p_chosen": None,
    }


@pytest.mark.parametrize("token", ["<image>", "<|image_pad|>"])
@pytest.mark.parametrize(
    "prompt",
    [
        "What is it?",
        "<image>\nWhat is it?",
        [{"role": "user", "content": "What is it?"}],
        [{"role": "user", "content": [IMAGE, text("What is it?")]}],
        [
            {
                "role": "user",
                "content": [{"index": 0, "type": "image"}, {"type": "text", "text": "What is it?"}],
            }
        ],
    ],
)
def test_every_way_to_write_a_prompt_reads_alike_for_every_processor(prompt: Any, token: str) -> None:
    example = read([row(prompt=prompt)], image_token=token)[0, 0]
    assert example["prompt"] == [{"role": "user", "content": [IMAGE, text("What is it?")]}]


def test_a_processors_own_image_token_is_a_placeholder() -> None:
    example = read([row(prompt="See <|image_pad|>\nand say.")], image_token="<|image_pad|>")[0, 0]
    assert example["prompt"][0]["content"] == [text("See "), IMAGE, text("and say.")]


def test_an_answer_may_spell_out_what_is_no_token_of_the_processor() -> None:
    example = read([row(chosen="The tag is <image>.")], image_token="<|image_pad|>")[0, 0]
    assert example["completions"][0][0]["content"] == [text("The tag is <image>.")]


def test_several_images_go_where_their_placeholders_are() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nRemember it."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Is <image> the same?"},
    ]
    example = read([row(prompt=turns, images=[picture(1), picture(2)])])[0, 0]
    assert [message["content"] for message in example["prompt"]] == [
        [text("Be brief.")],
        [IMAGE, text("Remember it.")],
        [text("Yes.")],
        [text("Is "), IMAGE, text(" the same?")],
    ]
    assert [image.tobytes() for image in example["images"]] == [picture(i).tobytes() for i in (1, 2)]


def test_rows_without_images_mix_with_others() -> None:
    examples = read([row(), row(images=[]), row(images=None)])
    for index in (1, 2):
        assert examples[index, 0]["images"] == [] and examples[index, 0]["image_key"] == ""
        assert examples[index, 0]["prompt"][0]["content"] == [text("What is it?")]
    assert examples.image_keys()[1:] == ["", ""]


def test_pictures_are_upright_and_their_transparent_parts_white() -> None:
    """Guards: alpha that is dropped, so that the model is shown colours that nobody sees."""
    clear = Pictures.new("RGBA", (16, 16), (255, 0, 0, 0))
    lying = Pictures.new("RGB", (16, 8), (255, 0, 0))
    turned = lying.getexif()
    turned[0x0112] = 6
    content = encoded(lying, "JPEG", exif=turned)
    images = [{"bytes": encoded(clear), "path": None}, {"bytes": content, "path": None}]
    examples = read([row(images=images, prompt="<image><image>")])
    white, upright = examples[0, 0]["images"]
    assert white.getpixel((0, 0)) == (255, 255, 255) and upright.size == (8, 16)


def test_soft_labels_belong_to_pairs() -> None:
    examples = read([row(p_chosen=0.7), row(p_chosen=1.0)])
    assert examples.soft_labels and [examples[i, 0]["p_chosen"] for i in (0, 1)] == [0.7, 1.0]
    learned = read([row(p_chosen=0.7)], "sft")
    assert not learned.soft_labels and learned[0, 0]["p_chosen"] is None
    with pytest.raises(InputError, match=r"row 0.*p_chosen"):
        read([row(p_chosen=1.7)])


def test_ties_are_dropped_and_counted_and_rows_keep_their_numbers() -> None:
    examples = read([row(), row(rejected="A cat. "), row(chosen="A cow.")])
    assert examples.items == [0, 2] and examples.dropped == {"tie": 1}
    assert str(examples) == "rows: 2 rows (dropped: 1 tie)"
    assert examples[1, 0]["where"] == where(examples, 2) == "rows: row 2"
    with pytest.raises(InputError, match="all of its 2 rows are ties"):
        read([row(rejected="A cat."), row(rejected="A cat.")])


def test_pairs_are_read_as_their_chosen_sides() -> None:
    """A tie has an answer to learn from, too."""
    examples = read([row(), row(chosen="A dog.")], "sft")
    assert str(examples) == "rows: 2 rows, the chosen side of each pair"
    assert [examples[i, 0]["completions"] for i in (0, 1)] == [
        [[{"role": "assistant", "content": [text(words)]}]] for words in ("A cat.", "A dog.")
    ]


def test_selected_examples_keep_their_rows() -> None:
    examples = read([row(), row(rejected="A cat."), row(images=[picture(3)])])
    keys = examples.image_keys()
    part = examples.select([1])
    assert part[0, 0]["item"] == 2 and part.image_keys() == keys[1:] and len(examples) == 2
    assert str(part) == "rows: 1 rows"


# What stops the run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]},
            "0 image placeholders.*1 images",
        ),
        ({"images": [], "prompt": "<image>\nWhat?"}, "1 image placeholders.*0 images"),
        ({"images": [picture(1)] * 2, "prompt": "<image>\nWhat?"}, "1 image placeholders.*2 images"),
        ({"chosen": " "}, "row 1, chosen is empty"),
        ({"rejected": ""}, "row 1, rejected is empty"),
        ({"chosen": "<image>"}, "row 1, chosen holds an image placeholder"),
        ({"chosen": None}, "row 1, chosen is None"),
        ({"chosen": [{"role": "user", "content": "A cat."}]}, "row 1, chosen is a message of 'user'"),
        ({"chosen": [{"role": "assistant", "content": "A cat."}] * 2}, "row 1, chosen has 2 messages"),
        ({"chosen": [{"role": "assistant", "content": None}]}, "row 1, chosen has the message"),
        (
            {"prompt": [{"role": "robot", "content": "What?"}]},
            "row 1, prompt has a message of 'robot'",
        ),
        (
            {"prompt": [{"role": "assistant", "content": "What?"}]},
            "row 1, prompt ends with a message of 'assistant'",
        ),
        (
            {"prompt": [{"role": role, "content": "What?"} for role in ("user", "system", "user")]},
            "row 1, prompt has a message of 'system' that is not the first",
        ),
        ({"prompt": []}, r"row 1, prompt is \[\]"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "audio", "text": "What?"}]}]},
            "row 1, prompt has the block .*'audio'",
        ),
    ],
)
def test_broken_rows_are_named_before_training(changes: dict, message: str) -> None:
    """Guards against images that go nowhere: a trainer must not read past them."""
    good = row()
    for name in ("prompt", "chosen"):  # one column holds one type
        if isinstance(changes.get(name), list):
            good[name] = [{"role": "assistant" if name == "chosen" else "user", "content": good[name]}]
            if changes[name] and isinstance(changes[name][0]["content"], list):
                good[name][0]["content"] = [{"type": "image"}, {"type": "text", "text": "What?"}]
    with pytest.raises(InputError, match=message):
        read([good, good | changes])


def test_images_in_another_order_than_their_column_are_refused() -> None:
    blocks = [{"type": "image", "index": 1}, {"type": "image", "index": 0}]
    with pytest.raises(InputError, match=r"shows its images in the order \[1, 0\]"):
        read([row(prompt=[{"role": "user", "content": blocks}], images=[picture(1), picture(2)])])


def test_an_image_inside_of_a_message_is_refused() -> None:
    blocks = [{"type": "image", "image": picture(1)}]
    with pytest.raises(InputError, match="row 0, prompt carries an image inside of a message"):
        read([row(prompt=[{"role": "user", "content": blocks}])])


def test_missing_columns_are_named() -> None:
    with pytest.raises(InputError, match=r"no column 'rejected' and no column 'images'.*'prompt', 'chosen'"):
        read([{"prompt": "What?", "chosen": "A cat."}])
    with pytest.raises(
        InputError, match=r"no column 'images'; its columns are .*'rejected'\], and \['images"
    ):
        read([{"prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image": picture(2)},
            "nothing would show the images of 'image'; put all images of a row into 'imag",
        ),
        ({"image": "a.png"}, "nothing would show the images of 'image'"),
        ({"second": picture(2)}, "nothing would show the images of 'second'"),
        ({"others": [picture(2)]}, "nothing would show the images of 'others'"),
        ({"images": picture(2)}, "'images' holds no lists"),
        ({"images": [3]}, "'images' holds no images but int64"),
        ({"images": [{"bytes": 3, "path": "a"}]}, "'images' holds no images but struct<bytes: int64, path"),
        ({"images": [{"bytes": "a", "path": "a"}]}, "'images' holds no images but struct<bytes: string, pa"),
    ],
)
def test_images_that_nothing_would_show_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read([row(**changes)])


@pytest.mark.parametrize("name", ["tools", "videos"])
def test_what_else_a_model_should_read_is_refused(name: str) -> None:
    assert len(read([row(**{name: []}), row(**{name: None})])) == 2
    with pytest.raises(InputError, match=f"row 1 has {name}, which are not read"):
        read([row(**{name: []}), row(**{name: ["x"]})])


def second_image(content: bytes) -> Dataset:
    broken = Dataset.from_list([row(images=[cell(content)])], features=TEXTS)
    return concatenate_datasets([Dataset.from_list([row()], features=TEXTS), broken])


@pytest.mark.parametrize(
    ("content", "message"), [(b"no image", "begins with b'no image'"), (b"", "without an image")]
)
def test_images_that_are_none_are_named_at_the_start(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"rows: row 1, images.*{message}"):
        read(second_image(content))


@pytest.mark.parametrize(
    ("content", "message"), [(png(0)[:60], "cannot be decoded|truncated"), (png(0, 1, 1), "1 x 1 pixels")]
)
def test_images_that_are_damaged_within_are_named(content: bytes, message: str) -> None:
    examples = read(second_image(content))
    assert examples[0, 0]["images"][0].mode == "RGB"
    with pytest.raises(InputError, match=rf"rows: row 1, images.*({message})"):
        examples[1, 0]


# Where rows and images lie


def test_tables_are_read_from_folders_and_one_image_columns(tmp_path: Path) -> None:
    vision_pairs().save_to_disk(tmp_path / "arrow")
    single = {
        "image": [cell(png(0)), None, cell(png(2))],
        **{name: [f"{name} {i}" for i in range(3)] for name in ("prompt", "chosen", "rejected")},
    }
    features = Features(image=Image(), **{name: Value("string") for name in single if name != "image"})
    write_table(tmp_path / "parquet", single, features)
    assert len(read_vision_examples(str(tmp_path / "arrow"), "pairs")) == 12
    examples = read_vision_examples(str(tmp_path / "parquet"), "pairs")
    assert [len(examples[i, 0]["images"]) for i in range(3)] == [1, 0, 1]
    assert examples[2, 0]["images"][0].tobytes() == picture(2).tobytes()
    with pytest.raises(InputError, match="nowhere"):
        read_vision_examples(str(tmp_path / "nowhere"), "pairs")


def with_files(folder: Path, images: list) -> VisionExamples:
    """Rows whose images are pictures 0.png, 1.png ... beside the table."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for number in range(len(images)):
        (folder / "pictures" / f"{number}.png").write_bytes(png(number))
    columns = {name: [f"{name} {i}" for i in range(len(images))] for name in ("prompt", "chosen", "rejected")}
    write_table(folder, {"images": images, **columns})
    return read_vision_examples(str(folder), "pairs")


@pytest.mark.parametrize("as_structs", [False, True])
def test_paths_lead_to_pictures_beside_the_table(tmp_path: Path, as_structs: bool) -> None:
    paths = [f"pictures/{i}.png" for i in range(3)]
    images = [[cell(None, path) if as_structs else path] for path in paths]
    examples = with_files(tmp_path, images)
    assert [examples[i, 0]["images"][0].tobytes() for i in range(3)] == [
        picture(i).tobytes() for i in range(3)
    ]
    images[1] = [cell(None, "pictures/none.png") if as_structs else "pictures/none.png"]
    with pytest.raises(InputError, match=r"row 1, images points to pictures/none\.png, which is not there"):
        with_files(tmp_path, images)


@pytest.mark.parametrize("kind", ["relative", "absolute", "link"])
def test_a_path_may_not_leave_the_folder(tmp_path: Path, kind: str) -> None:
    (tmp_path / "secret.png").write_bytes(png(9))
    path = {"relative": "../secret.png", "absolute": str(tmp_path / "secret.png"), "link": "link.png"}[kind]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match=r"row 1, images points to .*, outside of the dataset's folder"):
        with_files(tmp_path / "data", [["pictures/0.png"], [path]])


def test_a_column_of_bytes_holds_images() -> None:
    assert read([row(images=[png(4)])])[0, 0]["images"][0].tobytes() == picture(4).tobytes()
    with pytest.raises(InputError, match="row 1, images has a cell without an image"):
        read([row(images=[png(4)]), row(images=[None])])


def test_nothing_is_decoded_before_an_example_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a check that opens every picture of a large table."""
    rows = Dataset.from_list([row(), row(images=[picture(2)])])
    monkeypatch.setattr(Pictures, "open", None)
    examples = read(rows)
    assert len(set(examples.image_keys())) == 2 and examples.identity
    split_by_image(examples, 1, seed=0)
    with pytest.raises(TypeError):
        examples[0, 0]


# What is hashed


def test_image_keys_are_those_of_the_examples() -> None:
    """One image's key is its SHA-256, whatever is asked of it; the order of several counts."""
    several = [[picture(1), picture(2)], [picture(2), picture(1)], [picture(1)], [picture(1)], []]
    examples = read([row(images=images, chosen=f"It is {len(images)}.") for images in several])
    keys = examples.image_keys()
    assert keys == [examples[i, 0]["image_key"] for i in range(5)]
    assert keys[2] == keys[3] == hashlib.sha256(png(1)).hexdigest() and keys[4] == ""
    assert len(set(keys)) == 4
    hashes = [hashlib.sha256(png(i)).hexdigest() for i in (1, 2)]
    assert keys[0] == hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def test_an_image_that_changes_under_a_read_table_is_named(tmp_path: Path) -> None:
    examples = with_files(tmp_path, [["pictures/0.png"], ["pictures/1.png"]])
    examples.image_keys()
    (tmp_path / "pictures" / "1.png").write_bytes(png(9))
    assert examples[0, 0]["images"]
    with pytest.raises(InputError, match="row 1: an image has changed since the table was read"):
        examples[1, 0]


def test_the_identity_is_that_of_all_texts_and_images() -> None:
    """Guards: a cache whose key ignores the data."""
    base = [row(), row(chosen="A cow.")]
    same = read(base)
    assert isinstance(same, Identified) and same.identity == read(base).identity
    tie = row(rejected="A cat.")
    assert read([*base, tie]).identity == same.identity, "a dropped row is no part of it"
    changed = [
        [row(), row(chosen="A cow.", images=[picture(2)])],
        [row(), row(chosen="A cow.", images=[])],
        [row(), row(chosen="A cow?")],
        [row(), row(chosen="A cow.", rejected="A dog?")],
        [row(), row(chosen="A cow.", prompt="What?")],
        base[::-1],
        base[:1],
    ]
    found = [read(rows).identity["rows"] for rows in changed]
    found += [same.identity["rows"], read(base, "sft").identity["rows"]]
    assert len(set(found)) == 9
    assert same.select([0]).identity == read(base[:1]).identity
    assert same.select([1, 0]).identity == read(base[::-1]).identity


# Splits


def shown(examples: VisionExamples, indices: list[int]) -> set[str]:
    return {key for index in indices for key in examples.image_hashes()[index]}


@pytest.fixture(scope="module")
def many() -> VisionExamples:
    """200 rows over 60 pictures: most show one of them, some two, some none and then one of 15 prompts."""
    draw, rows = random.Random(0), []
    for number in range(200):
        images = [
            cell(png(picked, 4, 4)) for picked in draw.sample(range(60), draw.choice([0, 1, 1, 1, 1, 2]))
        ]
        prompt = "<image>" * len(images) + f"Question {draw.randrange(15)}"
        rows.append(row(images=images, prompt=prompt, chosen=f"Answer {number}"))
    features = Features(
        images=List(Image()), **{name: Value("string") for name in rows[0] if name != "images"}
    )
    return read(Dataset.from_list(rows, features=features))


@pytest.mark.parametrize("size", [30, 0.15])
@pytest.mark.parametrize("seed", range(5))
def test_no_image_is_on_both_sides(many: VisionExamples, size: float, seed: int) -> None:
    """Guards: a split by row, which tests on pictures that were trained on."""
    train, test = split_by_image(many, size, seed)
    assert sorted([*train, *test]) == list(range(200))
    assert len(test) == 30
    assert not shown(many, train) & shown(many, test) and shown(many, test)
    questions = [
        {many[i, 0]["prompt"][0]["content"][0]["text"] for i in side if not many.image_hashes()[i]}
        for side in (train, test)
    ]
    assert not questions[0] & questions[1]
    by_row = set(random.Random(seed).sample(range(200), 30))
    assert shown(many, [i for i in range(200) if i not in by_row]) & shown(many, sorted(by_row))


def test_a_split_is_its_seeds_and_not_the_orders(many: VisionExamples) -> None:
    assert split_by_image(many, 30, 1) == split_by_image(many, 30, 1)
    assert split_by_image(many, 30, 1) != split_by_image(many, 30, 2)
    order = random.Random(7).sample(range(200), 200)
    _, test = split_by_image(many.select(order), 30, 1)
    assert sorted(order[index] for index in test) == split_by_image(many, 30, 1)[1]


def test_rows_that_share_images_by_way_of_others_stay_together() -> None:
    chain = [[1, 2], [2, 3], [3, 4], [5], [5, 6], [7]]
    rows = [row(images=[picture(i) for i in images], prompt="<image>" * len(images)) for images in chain]
    sides = {tuple(split_by_image(read(rows), 3, seed)[1]) for seed in range(20)}
    assert sides == {(0, 1, 2), (3, 4, 5)}


def test_impossible_splits_are_named() -> None:
    examples = read([row(chosen=f"Answer {i}") for i in range(4)])
    for size in (0, 4, 5, 0.0, 1.0, 0.1):
        with pytest.raises(InputError, match=f"test_size {size}: rows has 4 examples"):
            split_by_image(examples, size, 0)
    with pytest.raises(InputError, match="share images come in groups of 4 and more"):
        split_by_image(examples, 2, 0)
