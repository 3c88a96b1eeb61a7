"""From rows to batches: what is scored, where the images go, and which rows are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from PIL import Image as PicturesImage
from tiny_vlm import CLOSED, IMAGE_TOKENS, LLAVA_1_5, picture, tiny_llava, vision_pairs
from transformers import AutoProcessor, ProcessorMixin
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from prefopt.errors import InputError
from prefopt.vlm.chat import PairCollator, completion_ids, render
from prefopt.vlm.pairs import VisionPairs, read_vision_pairs


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ProcessorMixin]:
    templates = {"closed": CLOSED, "llava-1.5": LLAVA_1_5}
    folders = {name: tmp_path_factory.mktemp(name) for name in templates}
    return {
        name: AutoProcessor.from_pretrained(tiny_llava(folders[name], template=template))
        for name, template in templates.items()
    }


def pairs(rows: list[dict] | Dataset) -> VisionPairs:
    return VisionPairs(rows if isinstance(rows, Dataset) else Dataset.from_list(rows), "rows")


def row(**changes: Any) -> dict:
    return {
        "images": [picture(1)],
        "prompt": "What is it?",
        "chosen": "A cat.",
        "rejected": "A dog.",
    } | changes


def scored(processor: Any, batch: dict[str, torch.Tensor]) -> list[str]:
    """What the completion mask covers, as text."""
    rows = zip(batch["input_ids"], batch["completion_mask"].bool(), strict=True)
    return [processor.tokenizer.decode(ids[mask]) for ids, mask in rows]


@pytest.mark.parametrize("template", ["closed", "llava-1.5"])
def test_mask_covers_the_completion_and_nothing_else(processors: dict, template: str) -> None:
    """Guards against labels that are not aligned with the target."""
    processor, table = processors[template], vision_pairs()
    examples = pairs(table)
    batch = PairCollator(processor)([examples[i, 0] for i in range(len(table))])
    for side, texts in zip(
        ("chosen", "rejected"), (scored(processor, batch)[:12], scored(processor, batch)[12:]), strict=True
    ):
        assert texts == [f" {content[0]['content']}</s>" for content in table[side]]
    assert (batch["attention_mask"] >= batch["completion_mask"]).all()
    assert batch["item"].tolist() == list(range(12))


def test_eos_of_an_open_template_is_in_the_loss_and_bos_is_read(processors: dict) -> None:
    """Guards against LLaVA-1.5's template, which has neither, so that the stop token is never learned."""
    tokenizer = processors["llava-1.5"].tokenizer
    batch = PairCollator(processors["llava-1.5"])([pairs(vision_pairs())[i, 0] for i in range(4)])
    last = batch["attention_mask"].sum(dim=1) - 1
    rows = torch.arange(len(last))
    assert (batch["input_ids"][rows, last] == tokenizer.eos_token_id).all()
    assert (batch["completion_mask"][rows, last] == 1).all()
    assert (batch["input_ids"][:, 0] == tokenizer.bos_token_id).all()
    assert (batch["input_ids"] == tokenizer.bos_token_id).sum() == len(last)  # once in each


def test_templates_that_close_their_turn_get_no_second_end(processors: dict) -> None:
    tokenizer = processors["closed"].tokenizer
    assert completion_ids(tokenizer, "ASSISTANT:", " It is.</s>")[-2:] != [tokenizer.eos_token_id] * 2
    assert completion_ids(tokenizer, "ASSISTANT:", " It is.</s>\n")[-2] == tokenizer.eos_token_id
    assert tokenizer.decode(completion_ids(tokenizer, "ASSISTANT:", " It is. ")) == " It is.</s>"


def test_batches_are_trl_s_where_the_template_is_complete(processors: dict) -> None:
    table = vision_pairs()
    ours = PairCollator(processors["closed"])([pairs(table)[i, 0] for i in range(6)])
    theirs = DataCollatorForVisionPreference(processors["closed"])([table[i] for i in range(6)])
    read = theirs["attention_mask"].bool()  # trl pads completions with EOS where PAD is token 0
    assert torch.equal(ours["input_ids"][read], theirs["input_ids"][read])
    for name in ("attention_mask", "completion_mask", "pixel_values"):
        assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize(
    "prompt",
    [
        "What is it?",
        "<image>\nWhat is it?",
        [{"role": "user", "content": "What is it?"}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
    ],
)
def test_every_way_to_write_a_prompt_reads_alike(processors: dict, prompt: Any) -> None:
    example = pairs([row(prompt=prompt)])[0, 0]
    text = "<s>USER: <image>\nWhat is it? ASSISTANT:"
    assert render(processors["closed"], example) == (text, " A cat.</s>", " A dog.</s>")


def test_several_images_go_where_their_placeholders_are(processors: dict) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nRemember it."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Is <image> the same?"},
    ]
    example = pairs([row(prompt=turns, images=[picture(1), picture(2)])])[0, 0]
    batch = PairCollator(processors["closed"])([example])
    assert batch["pixel_values"].shape[0] == 4  # two images, for the chosen and for the rejected side
    assert (batch["input_ids"][0] == processors["closed"].image_token_id).sum() == 2 * IMAGE_TOKENS


def test_a_row_without_images_trains_on_text_beside_one_with(processors: dict) -> None:
    examples = pairs([row(), row(images=[])])
    batch = PairCollator(processors["closed"])([examples[0, 0], examples[1, 0]])
    assert batch["pixel_values"].shape[0] == 2
    assert (batch["input_ids"][[1, 3]] == processors["closed"].image_token_id).sum() == 0
    assert "pixel_values" not in PairCollator(processors["closed"])([examples[1, 0]])


def test_max_length_cuts_the_completion_and_never_an_image(processors: dict) -> None:
    """Guards against truncation that leaves pixels without their placeholder tokens."""
    processor, example = processors["closed"], pairs([row(chosen="Perhaps it is a cat.")])[0, 0]
    whole = PairCollator(processor)([example])
    prompt = int((whole["attention_mask"] - whole["completion_mask"])[0].sum())
    short = PairCollator(processor, max_length=prompt + 3)([example])
    assert short["completion_mask"].sum(dim=1).tolist() == [3, 3]
    assert torch.equal(short["input_ids"], whole["input_ids"][:, : prompt + 3])
    with pytest.raises(InputError, match=rf"row 0.* {prompt} tokens.* max_length {prompt}"):
        PairCollator(processor, max_length=prompt)([example])
    with pytest.raises(InputError, match=r"row 0: chosen and rejected are the same 1 tokens"):
        PairCollator(processor, max_length=prompt + 1)([example])


def test_ties_are_dropped_and_counted_and_rows_keep_their_numbers() -> None:
    examples = pairs([row(), row(rejected="A cat. "), row(chosen="A cow.")])
    assert examples.items == [0, 2]
    assert str(examples) == "rows: 2 rows (dropped: 1 tie)"
    assert examples[1, 0]["where"] == "rows: row 2"
    with pytest.raises(InputError, match="all of its 2 rows are ties"):
        pairs([row(rejected="A cat."), row(rejected="A cat.")])


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
        ({"prompt": [{"role": "robot", "content": "What?"}]}, "row 1, prompt has a message of 'robot'"),
        (
            {"prompt": [{"role": "assistant", "content": "What?"}]},
            "row 1, prompt ends with a message of 'assistant'",
        ),
        ({"prompt": []}, r"row 1, prompt is \[\]"),
    ],
)
def test_broken_rows_are_named_before_training(changes: dict, message: str) -> None:
    """Guards against images that go nowhere: a trainer must not read past them."""
    good = row()
    for name in ("prompt", "chosen", "rejected"):  # one column holds one type
        if isinstance(changes.get(name), list):
            good[name] = [{"role": "assistant" if name == "chosen" else "user", "content": good[name]}]
            if changes[name] and isinstance(changes[name][0]["content"], list):
                good[name][0]["content"] = [{"type": "image"}, {"type": "text", "text": "What?"}]
    with pytest.raises(InputError, match=message):
        pairs([good, good | changes])


def test_missing_columns_are_named() -> None:
    with pytest.raises(InputError, match=r"no column 'rejected' and no column 'images'.*'prompt', 'chosen'"):
        pairs([{"prompt": "What?", "chosen": "A cat."}])


@pytest.mark.parametrize(
    ("content", "message"), [(b"no image", "cannot be decoded"), (b"", "0 bytes"), (None, "1 x 1 pixels")]
)
def test_images_that_are_none_are_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is None:
        file = tmp_path / "dot.png"
        picture(0).resize((1, 1)).save(file)
        content = file.read_bytes()
    features = Features(
        images=List(Image()), prompt=Value("string"), chosen=Value("string"), rejected=Value("string")
    )
    broken = Dataset.from_list([row(images=[{"bytes": content, "path": None}])], features=features)
    examples = pairs(concatenate_datasets([Dataset.from_list([row()], features=features), broken]))
    assert examples[0, 0]["images"][0].mode == "RGB"
    with pytest.raises(InputError, match=rf"rows: row 1.*{message}"):
        examples[1, 0]


def test_a_template_that_leaves_images_out_is_refused(processors: dict) -> None:
    """Guards against training silently without the images."""
    processor = processors["closed"]
    blind = type(processor)(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        chat_template=CLOSED.replace("<image>", ""),
    )
    with pytest.raises(InputError, match="row 0 has 1 images, but the chat template writes 0 placeholders"):
        PairCollator(blind)([pairs([row()])[0, 0]])


def test_tables_are_read_from_folders_and_one_image_columns(tmp_path: Path) -> None:
    vision_pairs().save_to_disk(tmp_path / "arrow")
    (tmp_path / "parquet").mkdir()
    single = [row(image=picture(i)) for i in range(3)]
    for one in single:
        del one["images"]
    Dataset.from_list(single).to_parquet(tmp_path / "parquet" / "train.parquet")
    assert len(read_vision_pairs(str(tmp_path / "arrow"))) == 12
    examples = read_vision_pairs(str(tmp_path / "parquet"))
    assert [len(examples[i, 0]["images"]) for i in range(3)] == [1, 1, 1]
    assert examples[2, 0]["images"][0].getpixel((0, 0)) == picture(2).getpixel((0, 0))
    with pytest.raises(InputError, match="nowhere"):
        read_vision_pairs(str(tmp_path / "nowhere"))


def test_transparent_parts_of_a_picture_are_white() -> None:
    """Guards: alpha that is dropped, so that the model is shown colours that nobody sees."""
    clear = PicturesImage.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert pairs([row(images=[clear])])[0, 0]["images"][0].getpixel((0, 0)) == (255, 255, 255)


def test_soft_labels_are_in_the_batch(processors: dict) -> None:
    rows = [row(p_chosen=0.7), row(p_chosen=1.0)]
    examples = pairs(rows)
    batch = PairCollator(processors["closed"])([examples[i, 0] for i in range(2)])
    assert batch["p_chosen"].tolist() == pytest.approx([0.7, 1.0])
    with pytest.raises(InputError, match=r"row 0.*p_chosen"):
        pairs([row(p_chosen=1.7)])[0, 0]
