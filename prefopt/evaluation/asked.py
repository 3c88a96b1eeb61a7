"""The questions of a test set: each answer of a conversation makes one, with what was said before it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.vlm.examples import VisionExample, VisionExamples
from prefopt.vlm.messages import question_of, text_of
from prefopt.vlm.splits import group_keys


@dataclass(frozen=True)
class Asked:
    """One question, and the answer that is right."""

    index: int  # of its example
    where: str  # what an error calls it
    prompt: list[dict]  # messages of blocks, earlier answers among them
    answer: dict  # the assistant's message
    image_key: str
    group: str  # the same for questions about one image, and for those without any that are worded alike

    @property
    def question(self) -> str:
        """What a critic is told that was asked."""
        return question_of(self.prompt)

    @property
    def reference(self) -> str:
        """The text of the right answer."""
        return text_of(self.answer)

    @property
    def key(self) -> str:
        """The content key of what is shown and asked."""
        return content_key(json.dumps([self.prompt, self.image_key]))


class Questions:
    """The questions of a table, in its order; images stay encoded until they are read."""

    def __init__(self, examples: VisionExamples):
        self.examples = examples
        self.asked: list[Asked] = []
        keys, groups = examples.image_keys(), group_keys(examples)
        for index, (prompt, completions) in enumerate(examples.conversations()):
            turns = completions[0]
            for place in range(0, len(turns), 2):
                where = examples.where(examples.items[index])
                where = where if len(turns) == 1 else f"{where}, answer {place // 2 + 1}"
                before = [*prompt, *turns[:place]]
                self.asked.append(Asked(index, where, before, turns[place], keys[index], groups[index]))

    def __str__(self) -> str:
        return f"{self.examples}, {len(self.asked)} questions"

    def check_one_image(self) -> None:
        """InputError for a question without an image, or about several."""
        hashes = self.examples.image_hashes()
        for one in self.asked:
            if (count := len(hashes[one.index])) != 1:
                raise InputError(
                    f"{one.where} has {count} images, and a judge of typed questions is shown one: leave out "
                    "--rubric and --critic_typed, or drop the row"
                )

    def images(self, asked: Asked) -> Sequence[Image.Image]:
        """The images of a question, RGB and upright."""
        return self.examples[asked.index, 0]["images"]

    def example(self, asked: Asked) -> VisionExample:
        """The question with its right answer as an example to score."""
        example = self.examples[asked.index, 0]
        return {**example, "where": asked.where, "prompt": asked.prompt, "completions": [[asked.answer]]}
