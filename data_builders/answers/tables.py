"""The tables of a self-critique: their columns, and the rows of a prompt."""

from collections.abc import Callable, Iterable, Iterator

from data_builders.answers.selection import is_consistent
from data_builders.engine.stages import Group, Record
from data_builders.engine.tables import Columns
from data_builders.export.tables import Export

# An image block has no text.
MESSAGES = [{"role": "string", "content": [{"type": "string", "text": "string"}]}]
ANSWERS: Columns = {
    "prompt": MESSAGES,
    "answer": "string",
    "item": "int64",  # the row of the source
    "source": "string",
    "image_key": "string",  # SHA-256 of the encoded image, or over those of several
    "prompt_id": "string",  # SHA-256 of images and prompt: what the answer's randomness depends on ...
    "seed": "int64",  # ... with this
    "candidate": "int32",  # ... and its number: 0, 1, ... within the prompt
    "temperature": "float32",
    "top_p": "float32",
    "max_new_tokens": "int32",
    "tokens": "int32",  # generated, the one that ended it included
    "finished": "bool",
    "model": "string",
    "model_revision": "string",
    "model_identity": "string",
    "adapter": "string",
    "adapter_identity": "string",
    "dtype": "string",
    "reference": "string",  # the source's own answer
    "compared_with": ["int32"],  # the numbers of other answers; the next two have one value for each
    "p_better": ["float32"],  # how likely this answer is the better one, over both orders
    "consistent": ["bool"],  # whether the critic preferred the same answer in both orders
    "unreadable": "int32",  # further comparisons, which could not be read
    "score": "float32",  # the mean of p_better; null without a comparison
    "rank": "int32",  # by score; 1 = best, equal = tie
    "selected": "bool",  # whether it is in a pair
    "invalid_reason": "string",  # why it cannot be used; empty if it can
    "not_selected_reason": "string",  # why it is in no pair, though it can be used
    "critic": "string",
    "critic_adapter": "string",
    "critic_identity": "string",
}
PAIRS: Columns = {
    "images": ["image"],  # the source's bytes
    "prompt": MESSAGES,
    "chosen": MESSAGES,
    "rejected": MESSAGES,
    "p_chosen": "float32",  # how likely the chosen answer is the better one, over both orders
    "margin": "float32",  # p_chosen - 0.5
    "consistent": "bool",
    "chosen_tokens": "int32",
    "rejected_tokens": "int32",
    "item": "int64",
    "source": "string",
    "prompt_id": "string",
    "chosen_candidate": "int32",
    "rejected_candidate": "int32",
}


def exports(images: Callable[[Record], Iterable[bytes]]) -> dict[str, Export]:
    """The tables to write; `images` gives the encoded images of a record."""

    def pairs(group: Group) -> Iterator[Record]:
        for pair in group.pairs:
            chosen, rejected, margin = pair
            yield {
                "images": [{"bytes": image, "path": None} for image in images(chosen)],
                **{name: chosen[name] for name in ("prompt", "item", "source", "prompt_id")},
                "chosen": _message(chosen),
                "rejected": _message(rejected),
                "p_chosen": 0.5 + margin,
                "margin": margin,
                "consistent": is_consistent(pair),
                **{
                    f"{side}_{name}": record[name]
                    for side, record in (("chosen", chosen), ("rejected", rejected))
                    for name in ("tokens", "candidate")
                },
            }

    return {
        "pairs": Export(
            "a better and a worse answer to a prompt, in trl's vision preference format", PAIRS, pairs
        ),
        "candidates": Export(
            "every answer with what it was made by, its comparisons, why it is in no pair; without images",
            ANSWERS,
            lambda group: group.candidates,
        ),
    }


def _message(record: Record) -> list[dict]:
    return [{"role": "assistant", "content": [{"type": "text", "text": record["answer"]}]}]
