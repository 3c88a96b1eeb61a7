"""From messages to tokens and batches: what is scored, where the images go, and which rows are refused."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_vlm import CLOSED, IMAGE_TOKENS, LLAVA_1_5, picture, tiny_llava, vision_pairs
from transformers import AutoProcessor, ProcessorMixin
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from prefopt.errors import InputError
from prefopt.vlm.batches import Collator
from prefopt.vlm.chat import Encoder, completion_ids, render
from prefopt.vlm.examples import VisionExamples


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ProcessorMixin]:
    templates = {"closed": CLOSED, "llava-1.5": LLAVA_1_5}
    folders = {name: tmp_path_factory.mktemp(name) for name in templates}
    return {
        name: AutoProcessor.from_pretrained(tiny_llava(folders[name], template=template))
        for name, template in templates.items()
    }


def pairs(rows: list[dict] | Dataset) -> VisionExamples:
    return VisionExamples(rows if isinstance(rows, Dataset) else Dataset.from_list(rows), "rows", "pairs")


def row(**changes: Any) -> dict:
    return {
        "images": [picture(1)],
        "prompt": "What is it?",
        "chosen": "A cat.",
        "rejected": "A dog.",
    } | changes


def scored(processor: Any, batch: dict[str, Any]) -> list[str]:
    """What is scored of each completion, as text."""
    count = batch["tokens"].numel()
    return [processor.tokenizer.decode(batch["targets"][batch["owner"] == number]) for number in range(count)]


@pytest.mark.parametrize("template", ["closed", "llava-1.5"])
def test_the_completion_is_scored_and_nothing_else(processors: dict, template: str) -> None:
    """Guards against labels that are not aligned with the target."""
    processor, table = processors[template], vision_pairs()
    examples = pairs(table)
    batch = Collator(processor)([examples[i, 0] for i in range(len(table))])
    texts = [f" {table[i][side][0]['content']}</s>" for i in range(12) for side in ("chosen", "rejected")]
    assert scored(processor, batch) == texts
    following = batch["input_ids"].flatten()[batch["places"] + 1]  # in a plain batch, the token itself
    assert torch.equal(following, batch["targets"])
    assert batch["tokens"].sum() == len(batch["targets"])
    assert batch["item"].tolist() == list(range(12))


def test_eos_of_an_open_template_is_in_the_loss_and_bos_is_read(processors: dict) -> None:
    """Guards against LLaVA-1.5's template, which has neither, so that the stop token is never learned."""
    tokenizer = processors["llava-1.5"].tokenizer
    batch = Collator(processors["llava-1.5"])([pairs(vision_pairs())[i, 0] for i in range(4)])
    last = torch.stack([batch["targets"][batch["owner"] == number][-1] for number in range(8)])
    assert (last == tokenizer.eos_token_id).all()
    ends = batch["input_ids"][torch.arange(8), batch["attention_mask"].sum(dim=1) - 1]
    assert (ends == tokenizer.eos_token_id).all()
    assert (batch["input_ids"][:, 0] == tokenizer.bos_token_id).all()
    assert (batch["input_ids"] == tokenizer.bos_token_id).sum() == 8  # once in each


def test_templates_that_close_their_turn_get_no_second_end(processors: dict) -> None:
    tokenizer = processors["closed"].tokenizer
    assert completion_ids(tokenizer, "ASSISTANT:", " It is.</s>")[-2:] != [tokenizer.eos_token_id] * 2
    assert completion_ids(tokenizer, "ASSISTANT:", " It is.</s>\n")[-2] == tokenizer.eos_token_id
    assert tokenizer.decode(completion_ids(tokenizer, "ASSISTANT:", " It is. ")) == " It is.</s>"


def test_plain_batches_are_trl_s_where_the_template_is_complete(processors: dict) -> None:
    table = vision_pairs()
    ours = Collator(processors["closed"])([pairs(table)[i, 0] for i in range(6)])
    theirs = DataCollatorForVisionPreference(processors["closed"])([table[i] for i in range(6)])
    order = [*range(0, 12, 2), *range(1, 12, 2)]  # trl has all chosen first
    read = [theirs["input_ids"][i][theirs["attention_mask"][i].bool()] for i in range(12)]
    completions = [theirs["input_ids"][i][theirs["completion_mask"][i].bool()] for i in range(12)]
    for theirs_at, number in enumerate(order):
        ids, mask = ours["input_ids"][number], ours["attention_mask"][number].bool()
        assert torch.equal(ids[mask], read[theirs_at])
        assert torch.equal(ours["targets"][ours["owner"] == number], completions[theirs_at])
    pixels = torch.cat([ours["images"][number]["pixel_values"] for number in ours["shown"]])
    assert torch.equal(pixels[order], theirs["pixel_values"])


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
    answers = [[(" A cat.</s>", True)], [(" A dog.</s>", True)]]
    assert render(processors["closed"], example) == ("<s>USER: <image>\nWhat is it? ASSISTANT:", answers)


def test_several_images_go_where_their_placeholders_are(processors: dict) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nRemember it."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Is <image> the same?"},
    ]
    example = pairs([row(prompt=turns, images=[picture(1), picture(2)])])[0, 0]
    batch = Collator(processors["closed"])([example])
    assert batch["images"][0]["pixel_values"].shape[0] == 2
    assert batch["counts"] == [2]
    assert batch["shown"] == [0, 0]  # before either answer
    assert (batch["input_ids"][0] == processors["closed"].image_token_id).sum() == 2 * IMAGE_TOKENS


def test_max_length_cuts_the_completion_and_never_an_image(processors: dict) -> None:
    """Guards against truncation that leaves pixels without their placeholders (trl #5283, #5285, #5881)."""
    processor, example = processors["closed"], pairs([row(chosen="Perhaps it is a cat.")])[0, 0]
    whole = Encoder(processor)(example)
    prompt = len(whole.prompt.ids)
    short = Encoder(processor, max_length=prompt + 3)(example)
    assert short.prompt.ids == whole.prompt.ids
    assert [one.ids for one in short.completions] == [one.ids[:3] for one in whole.completions]
    with pytest.raises(
        InputError, match=rf"row 0.* {prompt} tokens, {IMAGE_TOKENS} of them for images.* max_length {prompt}"
    ):
        Encoder(processor, max_length=prompt)(example)
    with pytest.raises(InputError, match=r"row 0: chosen and rejected are the same 1 tokens"):
        Encoder(processor, max_length=prompt + 1)(example)


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
        Collator(blind)([pairs([row()])[0, 0]])


def test_a_template_that_rewrites_earlier_turns_cannot_score_several_answers(processors: dict) -> None:
    """As templates do that drop an earlier answer's thoughts."""
    processor = processors["closed"]
    forgetful = type(processor)(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        chat_template="{% set last = messages | length - 1 %}"
        + CLOSED.replace(
            "{{ c['text'] +", "{{ (c['text'] if loop.length and messages[last] == m else c['text'][:3]) +"
        ),
    )
    turns = [("assistant", "A cat."), ("user", "Where?"), ("assistant", "There.")]
    table = Dataset.from_list(
        [
            {
                "images": [picture(1)],
                "messages": [
                    {"role": role, "content": text} for role, text in [("user", "What is it?"), *turns]
                ],
            }
        ]
    )
    example = VisionExamples(table, "rows", "sft")[0, 0]
    assert len(Encoder(processor)(example).completions[0].ids) > 10
    with pytest.raises(InputError, match="writes earlier turns otherwise"):
        Encoder(forgetful)(example)


def test_soft_labels_are_in_the_batch(processors: dict) -> None:
    examples = pairs([row(p_chosen=0.7), row(p_chosen=1.0)])
    batch = Collator(processors["closed"])([examples[i, 0] for i in range(2)])
    assert batch["p_chosen"].tolist() == pytest.approx([0.7, 1.0])
