"""Formats of vision-language tables, and how a row of each becomes a conversation with checked messages.

A format is recognised by its columns: the first of these whose columns are all there. Those of two formats
for one use are refused; only `messages` beside prompt, chosen and rejected are not read. Beside them stands
`images`, a list, or `image`, a single one or a list; a row without images is text alone.

| columns                                     | format                                         | read as    |
|---------------------------------------------|------------------------------------------------|------------|
| prompt, chosen, rejected                    | trl preference                                 | pairs, sft |
| question, chosen, rejected                  | RLAIF-V                                        | pairs, sft |
| conversations or messages, chosen, rejected | LLaMA-Factory ShareGPT preference              | pairs, sft |
| chosen, rejected                            | trl preference without a prompt: both sides    | pairs, sft |
|                                             | are whole conversations, or texts, that begin  |            |
|                                             | alike                                          |            |
| prompt, completion                          | trl prompt and completion                      | sft        |
| messages                                    | trl or LLaMA-Factory conversation              | sft        |
| conversations                               | LLaVA, LLaVA-OneVision, LLaMA-Factory ShareGPT | sft        |

A pair read as sft is its prompt and its chosen side. All that comes before the first answer of a conversation
is the prompt. Without a prompt, that is what chosen and rejected have in common: the messages with which both
begin; or of two texts the characters, without a space at the end, also those of a word that only begins alike
(as in trl). A prompt that is text is not read beside whole conversations, which begin with it. A message is
{role, content} or {from, value}, and a text alone is one message; `conversations` and `messages` may have a
column `system` beside them.

In what the system and the user say, `<image>` or the processor's own image token is the place of an image.
Where a prompt has no such place, its images go before its first user turn, as in trl.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from reprlib import repr as shortened
from typing import Any, Literal, NamedTuple

from prefopt.errors import InputError
from prefopt.vlm.messages import messages_of

Kind = Literal["pairs", "sft"]
# Columns of these formats that would change what a model reads, and that are not read here.
UNREAD = ("tools", "video", "videos", "audio", "audios")


class Conversation(NamedTuple):
    """A row as its format tells it: messages of role and content, not yet checked together."""

    prompt: list[dict]
    completions: list[list[dict]]
    names: tuple[str, ...]  # what errors call the prompt and each completion


class Format(NamedTuple):
    """How a table's rows are read."""

    columns: tuple[str, ...]
    kind: Kind
    read: Callable[[dict, tuple[str, ...], str], Conversation]  # of a row, these columns, and its name

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are read if they are there."""
        return ("system",) if self.columns[0] in ("conversations", "messages") else ()


def find_format(columns: Sequence[str], kind: Kind, source: str) -> Format:
    """The format that a table's columns show; InputError names what is missing to the nearest one."""
    known = [one for one in FORMATS if kind in ("sft", one.kind)]

    def missing(one: Format) -> list[str]:
        return [name for name in one.columns if name not in columns]

    nearest = min(known, key=lambda one: len(missing(one)))
    images = "image" if "image" in columns and "images" not in columns else "images"
    lacking = missing(nearest) + [images] * (images not in columns)
    if lacking:
        others = "; ".join(", ".join(one.columns) for one in known if one is not nearest)
        answers = any(one.kind == "sft" and not missing(one) for one in FORMATS)
        more = "; answers without a second one are for vlm_sft" if answers and kind == "pairs" else ""
        raise InputError(
            f"{source}: no column {' and no column '.join(map(repr, lacking))}; its columns are "
            f"{list(columns)!s:.500}, and {['images', *nearest.columns]} are needed (or, instead of "
            f"{', '.join(nearest.columns)}: {others}){more}"
        )
    for other in known:
        extra = [name for name in other.columns if name not in nearest.columns]
        # UltraFeedback repeats the chosen side under `messages`.
        repeats = extra == ["messages"] and nearest.columns == ("prompt", "chosen", "rejected")
        if other.kind == nearest.kind and extra and not repeats and not missing(other):
            raise InputError(
                f"{source} is in two formats at once: it has the columns {', '.join(nearest.columns)}, and "
                f"{', '.join(other.columns)}; drop those of one"
            )
    return nearest


# Rows


def _pair(row: dict, columns: tuple[str, ...], where: str) -> Conversation:
    if isinstance(row[columns[0]], str) and all(
        isinstance(row[name], list) and len(row[name]) > 1 for name in columns[1:]
    ):
        return _pair_without_prompt(row, columns[1:], where)
    prompt = _with_system(row, messages_of(row[columns[0]], "user", f"{where}, {columns[0]}"), where)
    sides = [messages_of(row[name], "assistant", f"{where}, {name}") for name in columns[1:]]
    return Conversation(prompt, sides, columns)


def _pair_without_prompt(row: dict, columns: tuple[str, ...], where: str) -> Conversation:
    texts = [isinstance(row[name], str) for name in columns]
    if any(texts) and not all(texts):
        raise InputError(
            f"{where}: of chosen and rejected one is text and the other is not; without a column 'prompt' "
            "both are to be whole texts, or whole conversations"
        )
    whole: list[Any] = [row[name] for name in columns]
    if not all(texts):
        whole = [messages_of(row[name], "user", f"{where}, {name}") for name in columns]
    chosen, rejected = whole
    common = len(list(takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))))
    common = min(common, len(chosen) - 1, len(rejected) - 1)  # an answer is left, in a tie too
    if all(texts) and common > 0 and chosen[common - 1] == " ":
        common -= 1
    if common < 1:
        raise InputError(
            f"{where}: chosen and rejected begin with different {'texts' if all(texts) else 'messages'}; "
            "without a column 'prompt' both are to begin with the prompt"
        )
    parts = chosen[:common], chosen[common:], rejected[common:]
    prompt, *sides = (
        messages_of(part, role, where)
        for part, role in zip(parts, ("user", "assistant", "assistant"), strict=True)
    )
    return Conversation(prompt, sides, ("the common start of chosen and rejected", *columns))


def _prompt_and_completion(row: dict, columns: tuple[str, ...], where: str) -> Conversation:
    prompt, completion = columns
    asked = messages_of(row[prompt], "user", f"{where}, {prompt}")
    return Conversation(asked, [messages_of(row[completion], "assistant", f"{where}, {completion}")], columns)


def _whole_conversation(row: dict, columns: tuple[str, ...], where: str) -> Conversation:
    name = f"{where}, {columns[0]}"
    messages = _with_system(row, messages_of(row[columns[0]], "user", name), where)
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise InputError(f"{name} ends with a message of {roles[-1]!r}; it is to end with the assistant's")
    start = roles.index("assistant")
    if "user" not in roles[:start]:
        raise InputError(f"{name} begins with a message of 'assistant'; it is to begin with the user's")
    return Conversation(messages[:start], [messages[start:]], (columns[0],) * 2)


def _with_system(row: dict, messages: list[dict], where: str) -> list[dict]:
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise InputError(f"{where}, system is {shortened(system)}; it is to be text")
    return [{"role": "system", "content": system}, *messages] if system else messages


FORMATS = (
    Format(("prompt", "chosen", "rejected"), "pairs", _pair),
    Format(("question", "chosen", "rejected"), "pairs", _pair),
    Format(("conversations", "chosen", "rejected"), "pairs", _pair),
    Format(("messages", "chosen", "rejected"), "pairs", _pair),
    Format(("chosen", "rejected"), "pairs", _pair_without_prompt),
    Format(("prompt", "completion"), "sft", _prompt_and_completion),
    Format(("messages",), "sft", _whole_conversation),
    Format(("conversations",), "sft", _whole_conversation),
)
