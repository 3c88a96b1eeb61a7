"""Prompts with images, each once, from a vision-language table; images stay encoded until they are needed."""

import json
from collections import Counter
from collections.abc import Sequence

from PIL import Image

from data_builders.answers.config import SelfCritiqueConfig
from data_builders.engine.stages import Record
from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.vlm.cells import encoded_images
from prefopt.vlm.examples import VisionExamples, read_vision_examples
from prefopt.vlm.messages import question_of, text_of

DUPLICATE = "duplicate"
NOT_ONE_IMAGE = "not one image"


class Source:
    """The prompts of a table in blocks of `block_size`, in the order of its rows.

    A record has `index` (the example's), `item` (its row), `image_key`, `prompt` (messages of blocks),
    `prompt_id` (a hash of the last two), `question` (the prompt's texts) and `reference` (the row's first
    answer). A prompt that was there before with the same images, and with `one_image` one that has none or
    several, is left out; `left_out` counts them by reason. If nothing remains, an InputError.
    """

    def __init__(self, examples: VisionExamples, block_size: int, *, one_image: bool):
        self.examples = examples
        self.left_out: Counter[str] = Counter()
        records = self._records(one_image)
        if not records:
            counted = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            raise InputError(
                f"{examples.source}: none of its {len(examples)} prompts can be used ({counted}); a critic "
                "by log-odds is shown one image, one that writes (--critic_writes) is shown any number"
            )
        self.blocks = [records[at : at + block_size] for at in range(0, len(records), block_size)]

    def __len__(self) -> int:
        return sum(map(len, self.blocks))

    def _records(self, one_image: bool) -> list[Record]:
        records: dict[str, Record] = {}
        examples = self.examples
        rows = zip(
            examples.items,
            examples.image_hashes(),
            examples.image_keys(),
            examples.conversations(),
            strict=True,
        )
        for index, (item, hashes, image_key, (prompt, completions)) in enumerate(rows):
            prompt_id = content_key(json.dumps([image_key, prompt]))
            if prompt_id in records:
                self.left_out[DUPLICATE] += 1
            elif one_image and len(hashes) != 1:
                self.left_out[NOT_ONE_IMAGE] += 1
            else:
                records[prompt_id] = {
                    "index": index,
                    "item": item,
                    "image_key": image_key,
                    "prompt": prompt,
                    "prompt_id": prompt_id,
                    "question": question_of(prompt),
                    "reference": text_of(completions[0][0]),
                }
        return list(records.values())

    def images(self, record: Record) -> Sequence[Image.Image]:
        """The pictures of a record."""
        return self.examples[record["index"], 0]["images"]

    def encoded(self, record: Record) -> list[bytes]:
        """The images of a record as the table has them, encoded."""
        examples, column = self.examples, self.examples.column
        cell = examples.rows[record["item"]][column].to_pylist()[0]  # pyright: ignore (an Arrow table)
        return encoded_images(cell, f"{examples.where(record['item'])}, {column}", examples.folder)


def read_source(config: SelfCritiqueConfig) -> Source:
    """The prompts that the options name; InputError for a table that cannot be read."""
    examples = read_vision_examples(
        str(config.dataset_name),
        "sft",
        split=config.dataset_split,
        config=config.dataset_config,
        revision=config.dataset_revision,
    )
    if config.max_rows is not None:
        examples = examples.select(range(min(config.max_rows, len(examples))))
    return Source(examples, config.block_size, one_image=not config.critic_writes)
