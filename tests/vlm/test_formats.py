"""Foreign formats: each as it lies on disk or on the hub, and the example that it becomes."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, Json, List, Value
from pictures import cell, picture, png, write_table
from trl.data_utils import extract_prompt

from prefopt.errors import InputError
from prefopt.vlm.examples import VisionExamples, read_vision_examples
from prefopt.vlm.formats import Kind

IMAGE = {"type": "image"}


def said(role: str, words: str, images: int = 0) -> dict:
    """A message as an example holds it."""
    return {"role": role, "content": [IMAGE] * images + [{"type": "text", "text": words}]}


def turns(*texts: str, keys: tuple[str, ...] = ("from", "human", "gpt", "value")) -> list[dict]:
    """A conversation of two who take turns."""
    return [{keys[0]: keys[1 + i % 2], keys[3]: words} for i, words in enumerate(texts)]


CHAT = ("role", "user", "assistant", "content")
ANSWERS = [[said("assistant", "A cat.")], [said("assistant", "A dog.")]]
CHOSEN, REJECTED = (turns(words, keys=("role", "assistant", "", "content")) for words in ("A cat.", "A dog."))


def read(rows: list[dict], kind: Kind, **options: Any) -> VisionExamples:
    return VisionExamples(Dataset.from_list(rows), "rows", kind, **options)


def only(rows: list[dict], kind: Kind, **options: Any) -> Any:
    examples = read(rows, kind, **options)
    assert len(examples) == len(rows)
    return examples[0, 0]


# Pairs

PAIRS = {
    "trl": {"images": [picture(1)], "prompt": turns("What is it?", keys=CHAT)}
    | {"chosen": CHOSEN, "rejected": REJECTED},
    "trl without a prompt": {
        "images": [picture(1)],
        "chosen": turns("What is it?", "A cat.", keys=CHAT),
        "rejected": turns("What is it?", "A dog.", keys=CHAT),
    },
    "RLAIF-V": {
        "ds_name": "rlaif",
        "image": picture(1),
        "question": "What is it?",
        "chosen": "A cat.",
        "rejected": "A dog.",
        "image_path": "images/1.jpg",
    },
    "ShareGPT": {
        "images": [picture(1)],
        "conversations": turns("<image>What is it?"),
        "chosen": {"from": "gpt", "value": "A cat."},
        "rejected": {"from": "gpt", "value": "A dog."},
    },
    "ShareGPT with roles": {
        "images": [picture(1)],
        "messages": turns("<image>What is it?", keys=CHAT),
        "chosen": {"role": "assistant", "content": "A cat."},
        "rejected": {"role": "assistant", "content": "A dog."},
    },
}


@pytest.mark.parametrize("token", ["<image>", "<|image_pad|>"])
@pytest.mark.parametrize("name", PAIRS)
def test_every_format_of_pairs_reads_alike(name: str, token: str) -> None:
    example = only([PAIRS[name]], "pairs", image_token=token)
    assert example["images"][0].tobytes() == picture(1).tobytes()
    assert example["prompt"] == [said("user", "What is it?", images=1)]
    assert example["completions"] == ANSWERS


@pytest.mark.parametrize("name", PAIRS)
def test_every_format_of_pairs_reads_as_its_chosen_side(name: str) -> None:
    example = only([PAIRS[name]], "sft")
    assert example["prompt"] == [said("user", "What is it?", images=1)]
    assert example["completions"] == ANSWERS[:1]


def test_the_common_start_of_two_conversations_is_the_prompt() -> None:
    system, start = {"role": "system", "content": "Be brief."}, ("Hello.", "Yes?", "What is it?")
    row = {
        "images": [picture(1)],
        "chosen": [system, *turns(*start, "A cat.", keys=CHAT)],
        "rejected": [system, *turns(*start, "A dog.", keys=CHAT)],
    }
    example = only([row], "pairs")
    assert example["prompt"] == [
        said("system", "Be brief."),
        said("user", "Hello.", images=1),
        said("assistant", "Yes?"),
        said("user", "What is it?"),
    ]
    assert example["completions"] == ANSWERS
    examples = read([row, row | {"rejected": row["chosen"]}], "pairs")
    assert examples.items == [0] and examples.dropped == {"tie": 1}


@pytest.mark.parametrize(
    ("rejected", "message"),
    [
        (("Where?", "There."), "row 0: chosen and rejected begin with different messages"),
        (("What is it?", "A dog.", "Sure?", "Yes."), "row 0, rejected has 3 messages"),
        (("What is it?",), "row 0: chosen and rejected begin with different messages"),
    ],
)
def test_conversations_that_are_no_pair_are_named(rejected: tuple, message: str) -> None:
    row = {"images": [picture(1)], "chosen": turns("What is it?", "A cat.", keys=CHAT)}
    with pytest.raises(InputError, match=message):
        read([row | {"rejected": turns(*rejected, keys=CHAT)}], "pairs")


@pytest.mark.parametrize(
    "sides",
    [
        ("What is it? A cat.", "What is it? No cat."),
        ("What is it?\nA cat.", "What is it?\nA dog."),
        ("What is it? A cat.", "What is it? A cow."),
        ("Say: yes", "Say: no"),
    ],
)
def test_the_common_start_of_two_texts_is_the_prompt_as_in_trl(sides: tuple[str, str]) -> None:
    row = dict(zip(("chosen", "rejected"), sides, strict=True))
    example, expected = only([row | {"images": [picture(1)]}], "pairs"), extract_prompt(dict(row))
    assert example["prompt"] == [said("user", expected["prompt"], images=1)]
    assert example["completions"] == [[said("assistant", expected[name])] for name in row]


def test_a_table_of_two_formats_is_refused() -> None:
    """Guards: a prompt that is not read; UltraFeedback has `messages` beside its pairs, and they agree."""
    row = {"images": [picture(1)], "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    said = "rows is in two formats at once: it has the columns prompt, chosen, rejected, and question, chosen"
    with pytest.raises(InputError, match=said):
        read([row | {"question": "Where?"}], "pairs")
    assert len(read([row | {"messages": turns("What is it?", "A cat.", keys=CHAT)}], "pairs")) == 1
    with pytest.raises(InputError, match="the columns messages, and conversations; drop those of one"):
        read([SFT["trl messages"] | {"conversations": turns("Who?", "A dog.")}], "sft")


def test_equal_texts_are_a_tie() -> None:
    rows = [
        {"images": [picture(1)], "chosen": "Is it? Yes.", "rejected": text}
        for text in ("Is it? Yes.", "Is it? No.")
    ]
    examples = read(rows, "pairs")
    assert examples.items == [1] and examples.dropped == {"tie": 1}
    assert examples[0, 0]["prompt"] == [said("user", "Is it?", images=1)]


def test_a_prompt_that_is_text_beside_whole_conversations_is_in_them() -> None:
    """As in UltraFeedback, and in trl's own reading of it."""
    row = PAIRS["trl without a prompt"] | {"prompt": "What is it?"}
    assert only([row], "pairs")["prompt"] == [said("user", "What is it?", images=1)]
    assert only([row], "pairs")["completions"] == ANSWERS


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("A cat.", "No cat.", "row 0: chosen and rejected begin with different texts; without a column"),
        (" a cat.", " no cat.", "row 0: chosen and rejected begin with different texts"),
        ("", "No cat.", "row 0: chosen and rejected begin with different texts"),
        ("A cat.", None, "row 0: of chosen and rejected one is text and the other is not"),
        ("A cat. ", "A cat. Yes.", "row 0, chosen is empty; a completion needs at least one word"),
    ],
)
def test_texts_without_a_common_start_are_named(chosen: str, rejected: str | None, message: str) -> None:
    rows = [{"images": [picture(1)], "chosen": chosen, "rejected": rejected}]
    with pytest.raises(InputError, match=message):
        read(rows, "pairs")


# One completion

TALK = ("What is it?", "A cat.", "Which colour?", "Black.")
LEARNED = [said("assistant", "A cat."), said("user", "Which colour?"), said("assistant", "Black.")]
BLOCKS = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
SFT = {
    "trl messages": {"images": [picture(1)], "messages": turns(*TALK, keys=CHAT)},
    "trl prompt and completion": {
        "images": [picture(1)],
        "prompt": [{"role": "user", "content": BLOCKS}],
        "completion": turns(*TALK[1:], keys=("role", "assistant", "user", "content")),
    },
    "LLaVA-OneVision": {
        "id": "1",
        "image": picture(1),
        "conversations": turns("<image>\n" + TALK[0], *TALK[1:]),
        "data_source": "lrv_chart",
    },
    "ShareGPT": {"images": [picture(1)], "conversations": turns("<image>" + TALK[0], *TALK[1:])},
    "LLaMA-Factory messages": {
        "images": [picture(1)],
        "messages": turns("<image>" + TALK[0], *TALK[1:], keys=CHAT),
    },
}


@pytest.mark.parametrize("token", ["<image>", "<|image_pad|>"])
@pytest.mark.parametrize("name", SFT)
def test_every_format_of_conversations_reads_alike(name: str, token: str) -> None:
    example = only([SFT[name]], "sft", image_token=token)
    assert example["images"][0].tobytes() == picture(1).tobytes()
    assert example["prompt"] == [said("user", "What is it?", images=1)]
    assert example["completions"] == [LEARNED]
    assert example["p_chosen"] is None


@pytest.mark.parametrize("name", SFT)
def test_a_table_without_pairs_is_not_read_as_pairs(name: str) -> None:
    with pytest.raises(InputError, match=r"rows: no column .*'rejected'; its columns are .* are needed"):
        read([SFT[name]], "pairs")


def test_text_prompts_and_completions() -> None:
    example = only([{"image": picture(1), "prompt": "What is it?", "completion": "A cat."}], "sft")
    assert example["prompt"] == [said("user", "What is it?", images=1)]
    assert example["completions"] == ANSWERS[:1]


def test_a_system_message_comes_first_or_in_a_column_of_its_own() -> None:
    first = [{"from": "system", "value": "Be brief."}, *turns("What is it?", "A cat.")]
    row = {"images": [picture(1)], "conversations": first, "system": None}
    beside = row | {"conversations": first[1:], "system": "Be brief."}
    examples = read([row, beside, row | {"conversations": first[1:]}], "sft")
    assert examples[0, 0]["prompt"] == [said("system", "Be brief."), said("user", "What is it?", images=1)]
    assert examples[1, 0]["prompt"] == examples[0, 0]["prompt"]
    assert examples[2, 0]["prompt"] == examples[0, 0]["prompt"][1:]
    with pytest.raises(InputError, match="row 0, conversations has a message of 'system' that is not the"):
        read([row | {"system": "Be kind."}], "sft")


def test_none_keys_are_stripped() -> None:
    """Guards: Arrow gives each struct the keys of all others, and a block with text None is no text."""
    message = {"role": None, "content": None, "from": None, "value": None, "tool_calls": None}
    rows = [
        message | {"role": "user", "content": "What is it?"},
        message | {"from": "gpt", "value": "A cat."},
    ]
    example = only([{"images": [picture(1)], "messages": rows}], "sft")
    assert example["prompt"] == [said("user", "What is it?", images=1)]
    assert example["completions"] == ANSWERS[:1]
    blocks = [block | {"index": None} for block in BLOCKS]
    messages = [{"role": "user", "content": blocks}, {"role": "assistant", "content": BLOCKS[1:]}]
    example = only([{"images": [picture(1)], "messages": messages}], "sft")
    assert example["prompt"] == [said("user", "What is it?", images=1)]
    assert example["completions"] == [[said("assistant", "What is it?")]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            turns("Hi.", "Yes?", "What is it?"),
            "ends with a message of 'user'; it is to end with",
        ),
        (turns("Hi.")[:1], "ends with a message of 'user'"),
        (
            turns("", "Hi.", "What?", "It.")[1:],
            "begins with a message of 'assistant'; it is to begin",
        ),
        (
            turns("Hi.", "Yes?") + turns("", "No?")[1:],
            "has 'assistant' after 'assistant'; assis",
        ),
        (turns("Hi.", "Yes?", "So?") + turns("And?", "No?"), "has 'user' after 'user'"),
        (turns("What is it?", " "), "is empty; a completion needs at least one word in every answer"),
        (turns("What is it?", "A cat.", "Sure?", ""), "is empty"),
        (
            turns("What?", "It.", keys=("from", "human", "observation", "value")),
            "has a message of 'observation'",
        ),
        (turns("<image><image>", "A cat."), "has 2 image placeholders, and the row has 1 images"),
        (turns("What?", "A cat.", "<image>And now?", "It."), "holds an image placeholder; only a prompt"),
        (turns("What?", "A cat: <image>."), "holds an image placeholder"),
        ([{"from": "human"}, {"value": "A cat."}], "has the message {'from': 'human'}"),
        ([], r"is \[\]; it is to be text or a list of messages"),
    ],
)
def test_broken_conversations_are_named(messages: list, message: str) -> None:
    good = {"image": picture(1), "conversations": turns("<image>\nWhat is it?", "A cat.")}
    with pytest.raises(InputError, match=rf"rows: row 1, conversations {message}"):
        read([good, good | {"conversations": messages}], "sft")


def test_an_image_in_a_later_turn_goes_nowhere_and_is_refused_for_every_processor() -> None:
    """Guards: an image that is moved to the first turn since the second one's placeholder is read as text."""
    row = {"image": picture(1), "conversations": turns("Hi.", "Yes?", "<image>What is it?", "A cat.")}
    with pytest.raises(InputError, match="row 0, conversations holds an image placeholder"):
        read([row], "sft", image_token="<|image_pad|>")


def test_tables_of_other_things_are_named() -> None:
    with pytest.raises(InputError, match=r"no column 'messages'; its columns are \['images', 'caption'\]"):
        read([{"images": [picture(1)], "caption": "A cat."}], "sft")
    rows = [{"prompt": "A cat", "chosen": picture(1), "rejected": picture(2), "images": [picture(3)]}]
    with pytest.raises(InputError, match="nothing would show the images of 'chosen' and 'rejected'"):
        read(rows, "pairs")


# On disk, and as datasets stores it


def write_llava(folder: Path, records: list[dict], name: str = "llava.json") -> str:
    """A LLaVA file with pictures 0.png, 1.png ... in a sub-folder."""
    (folder / "coco" / "train").mkdir(parents=True, exist_ok=True)
    for number in range(3):
        (folder / "coco" / "train" / f"{number}.png").write_bytes(png(number))
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    text = "\n".join(lines) if name.endswith(".jsonl") else json.dumps(records, indent=1)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


def llava(number: int, **changes: Any) -> dict:
    conversation = turns(f"<image>\nQuestion {number}?", "A cat.", "Which colour?", "Black.")
    return {"id": f"{number}", "image": f"coco/train/{number}.png", "conversations": conversation} | changes


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_a_llava_file_with_its_pictures_is_read(tmp_path: Path, name: str) -> None:
    """Rows without images, with several, and keys of several types, among them."""
    alone = {"id": 7, "conversations": turns("3", "4")}
    several = llava(1, image=["coco/train/1.png", "coco/train/2.png"])
    several["conversations"] = turns("<image>\n<image>\nThe same?", "No.\u2028Not quite.")
    folder = write_llava(tmp_path, [alone, llava(0), several], name)
    examples = read_vision_examples(folder, "sft")
    assert str(examples) == f"{folder}/{name}: 3 rows"
    assert [examples[0, 0][part] for part in ("images", "prompt")] == [[], [said("user", "3")]]
    assert examples[0, 0]["completions"] == [[said("assistant", "4")]]
    assert examples[1, 0]["prompt"] == [said("user", "Question 0?", images=1)]
    assert examples[1, 0]["completions"] == [LEARNED]
    assert examples[2, 0]["prompt"] == [said("user", "The same?", images=2)]
    assert examples[2, 0]["completions"] == [[said("assistant", "No.\u2028Not quite.")]]
    pictures = [[image.tobytes() for image in examples[i, 0]["images"]] for i in (1, 2)]
    assert pictures == [[picture(0).tobytes()], [picture(1).tobytes(), picture(2).tobytes()]]


def test_blocks_and_texts_mix_in_a_file(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": BLOCKS}, {"role": "assistant", "content": "A cat."}]
    folder = write_llava(tmp_path, [{"images": ["coco/train/0.png"], "messages": messages}])
    example = read_vision_examples(folder, "sft")[0, 0]
    assert example["prompt"] == [said("user", "What is it?", images=1)]
    assert example["completions"] == ANSWERS[:1]


def test_a_file_of_pairs_is_read(tmp_path: Path) -> None:
    pair = {
        "images": ["coco/train/1.png"],
        "conversations": turns("<image>What is it?"),
        "chosen": {"from": "gpt", "value": "A cat."},
        "rejected": {"from": "gpt", "value": "A dog."},
        "p_chosen": 0.75,
    }
    example = read_vision_examples(write_llava(tmp_path, [pair]), "pairs")[0, 0]
    assert example["completions"] == ANSWERS and example["p_chosen"] == 0.75


def test_texts_that_look_like_json_stay_texts(tmp_path: Path) -> None:
    """Guards: the answer "7", which datasets' own JSON cells turn into a number."""
    record = {"image": "coco/train/1.png", "question": "How many?", "chosen": "7", "rejected": '["8"]'}
    example = read_vision_examples(write_llava(tmp_path, [record]), "pairs")[0, 0]
    assert example["completions"] == [[said("assistant", "7")], [said("assistant", '["8"]')]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (llava(1, image="coco/train/9.png"), r"row 1, image points to coco/train/9\.png, which is not there"),
        (llava(1, image=3), "row 1, image is 3; it is to be the path of an image"),
        (llava(1, image=["coco/train/1.png", None]), "row 1, image is .*; it is to be the path of an image"),
        (llava(1, conversations="<image>What?"), "row 1, conversations ends with a message of 'user'"),
        (llava(1, image=None), "row 1, conversations has 1 image placeholders, and the row has 0 images"),
    ],
)
def test_broken_records_are_named(tmp_path: Path, record: dict, message: str) -> None:
    folder = write_llava(tmp_path, [llava(0), record])
    with pytest.raises(InputError, match=message):
        read_vision_examples(folder, "sft")


def test_a_file_may_not_reach_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(0))
    folder = write_llava(tmp_path / "data", [llava(0, image="../secret.png")])
    with pytest.raises(InputError, match=r"row 0, image points to \.\./secret\.png, outside of the"):
        read_vision_examples(folder, "sft")[0, 0]


def test_a_split_has_a_file_of_its_own(tmp_path: Path) -> None:
    """A file that is held out is never read as training data."""
    (tmp_path / "dataset_info.json").write_text('{"llava": {"file_name": "llava.json"}}')
    write_llava(tmp_path, [llava(0)], "chart_test.json")
    with pytest.raises(
        InputError, match=r"no json file of a split 'train'; there are \['chart_test\.json'\]"
    ):
        read_vision_examples(str(tmp_path), "sft")
    write_llava(tmp_path, [llava(0), llava(1)], "chart.json")
    assert len(read_vision_examples(str(tmp_path), "sft")) == 2
    assert len(read_vision_examples(str(tmp_path), "sft", split="test")) == 1
    write_llava(tmp_path, [llava(0)] * 3, "train.jsonl")
    assert len(read_vision_examples(str(tmp_path), "sft")) == 3
    write_llava(tmp_path, [llava(0)], "train_more.json")
    with pytest.raises(InputError, match=r"there are \['train\.jsonl', 'train_more\.json'\]"):
        read_vision_examples(str(tmp_path), "sft")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1', r"llava\.json: line 1 is no JSON: Expecting ',' delimiter"),
        ('{"id": 1}', "holds {'id': 1}; it is to be a list of records"),
        ("[1, 2]", r"llava\.json: row 0 is 1; it is to be a record of named values"),
        ("[]", r"llava\.json holds no records"),
    ],
)
def test_files_that_hold_no_records_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "llava.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_vision_examples(str(tmp_path), "sft")


def test_tables_come_before_files_and_folders_of_images_stay_such(tmp_path: Path) -> None:
    features = Features(image=Image(), prompt=Value("string"), completion=Value("string"))
    columns = {"image": [cell(png(1))] * 2, "prompt": ["What is it?"] * 2, "completion": ["A cat."] * 2}
    write_table(tmp_path / "table", columns, features)
    write_llava(tmp_path / "table", [llava(0)], "notes.json")
    assert len(read_vision_examples(str(tmp_path / "table"), "sft")) == 2
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png(1))
    (tmp_path / "images" / "notes.json").write_text("{}")
    line = {"file_name": "1.png", "prompt": "What is it?", "completion": "A cat."}
    (tmp_path / "images" / "metadata.jsonl").write_text(json.dumps(line))
    examples = read_vision_examples(str(tmp_path / "images"), "sft")
    assert examples[0, 0]["images"][0].tobytes() == picture(1).tobytes()


def test_cells_that_datasets_stores_as_json_are_decoded() -> None:
    features = Features(images=List(Image()), messages=List({"role": Value("string"), "content": Json()}))
    messages = [{"role": "user", "content": BLOCKS}, {"role": "assistant", "content": "A cat."}]
    rows = Dataset.from_list([{"images": [picture(1)], "messages": messages}], features=features)
    example = VisionExamples(rows, "rows", "sft")[0, 0]
    assert example["prompt"] == [said("user", "What is it?", images=1)]
    assert example["completions"] == ANSWERS[:1]
