"""Lists as LLMs write them, parsed item by item; and duplicates among prompts, by their words."""

import json
import re
import unicodedata
from typing import Literal

# 1. 1) (1) [1] 1: - * and their kin; not the 1. of 1.5, nor the 35 of 35mm.
_NUMBER = re.compile(r"[(\[]?\d{1,3}(?:[.)\]](?!\d)|\s*[:\u2013\u2014-](?=\s))\s*")
_BULLET = re.compile(r"(?:[-*+\u2013\u2014](?=\s)|[\u2022\u25e6\u2023])\s*")
_LABEL = re.compile(r"(?:prompt|description|picture|image)\s*\d*\s*[:.)]\s+", re.IGNORECASE)
_QUOTES = ('""', "''", "``", "\u201c\u201d", "\u2018\u2019", "\u00ab\u00bb", "**", "__")
# What a chat model says around a list, or in place of one.
_CHATTER = re.compile(
    r"(?:sure|certainly|absolutely|of course|okay|ok|here(?: are| is|['\u2019]s)|i|i['\u2019]\w+|as an|sorry|"
    r"unfortunately|let me know|feel free|hope|please|note|thank|these)\b",
    re.IGNORECASE,
)
_SENTENCES = re.compile(r"[.!?][\"'\u201d]?\s+[A-Z]")
_WORD = re.compile(r"\w+(?:[./]\d+)*")  # f/2.8 is one


def parse_list(text: str, count: int) -> list[str]:
    """The items of a list that was to have `count` of them, one a line; a text that is no list has none.

    Numbers, bullets, quotes, bold and labels around an item go, and so does what was said before and after
    the list. JSON lists are read, too. A line of keywords with commas is one item.

    >>> parse_list('Here are 2 prompts:\\n\\n1. "elephant, f/2.8, dusk"\\n2) **giraffe, 1.5 m tall**', 2)
    ['elephant, f/2.8, dusk', 'giraffe, 1.5 m tall']
    """
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)  # what a reasoning model says to itself
    items = _of_json(text)
    if items is None:
        items = _of_lines(text, count)
    return [item for item in map(_cleaned, items) if words(item)]


def words(prompt: str) -> list[str]:
    """The words that tell prompts apart: no case, no punctuation, the compatible forms of letters as one."""
    return _WORD.findall(unicodedata.normalize("NFKC", prompt).casefold())


class Distinct:
    """The prompts so far; says whether one more is new.

    A prompt is an exact duplicate of one with the same words in the same order, and a near one if of the
    words in either more than the share `near` is in both (Jaccard index of the sets of words).
    """

    def __init__(self, near: float):
        self.near = near
        self._texts: set[str] = set()
        self._words: list[frozenset[str]] = []

    def add(self, prompt: str) -> Literal["new", "exact", "near"]:
        """Whether the prompt is new; only a new one is remembered."""
        text, its = " ".join(words(prompt)), frozenset(words(prompt))
        if text in self._texts:
            return "exact"
        if any(len(its & other) > self.near * len(its | other) for other in self._words):
            return "near"
        self._texts.add(text)
        self._words.append(its)
        return "new"


def _of_json(text: str) -> list[str] | None:
    """The strings of the one JSON list in a text, of which each may lie in an object by itself."""
    start, end = text.find("["), text.rfind("]")
    try:
        entries = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except json.JSONDecodeError:
        return None
    if not isinstance(entries, list):
        return None
    flat = [next(iter(e.values())) if isinstance(e, dict) and len(e) == 1 else e for e in entries]
    texts = [entry for entry in flat if isinstance(entry, str)]
    return texts if texts and len(texts) == len(entries) else None


def _of_lines(text: str, count: int) -> list[str]:
    marked, lines = [], []
    for line in text.splitlines():
        line = line.replace("**", "").strip()
        if not line or line.startswith(("```", "#")) or line.lower().endswith((":", ": [")):
            continue
        item = _unmarked(line)
        if item is not None:
            marked.append(item)
        if item is not None or not (_CHATTER.match(line) or _SENTENCES.search(line)):
            lines.append(item or line)
    if 2 * len(marked) >= len(lines):
        return marked
    return lines if len(lines) > 1 or count == 1 else []


def _unmarked(line: str) -> str | None:
    """The line without its number or bullet (or both); None if it has none."""
    bullet = _BULLET.match(line)
    rest = line[bullet.end() :] if bullet else line
    number = _NUMBER.match(rest) or _LABEL.match(rest)
    if number:
        rest = rest[number.end() :]
    return rest if bullet or number else None


def _cleaned(item: str) -> str:
    """The item without quotes and commas around it, in one line."""
    item = " ".join(item.split())
    if label := _LABEL.match(item):
        item = item[label.end() :]
    while True:
        before = item
        item = item.strip().rstrip(",;").strip()
        for left, right in _QUOTES:
            inner = item[1:-1]
            if len(item) > 1 and item[0] == left and item[-1] == right and left not in inner:
                item = inner
        if item == before:
            return item
