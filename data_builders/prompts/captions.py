"""Captions of real images, and the sources that generate an image from one of them.

`raw` is the table's text, `vlm` the description by a vision-language model, `prepared` that description
shaped for a text-to-image model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from data_builders.engine.stages import INVALID, Record, is_valid
from prefopt.diffusion.generator import Generator, changed
from prefopt.errors import InputError
from prefopt.options import is_local_path
from prefopt.pocket.world import caption, parse

if TYPE_CHECKING:
    from prefopt.vlm.generate import Generated

Caption = Literal["raw", "vlm", "prepared"]
CAPTIONS: tuple[Caption, ...] = get_args(Caption)
REAL = "real"  # in place of a source's name
# The words of a source; not `revision` and `variant`, whose VAE may be another one.
WORDS = ("caption", "steps", "guidance", "adapter", "scale")


# Sources


@dataclass(frozen=True)
class Source:
    """What generates one image for each real image, and from which of its captions."""

    name: str
    caption: Caption
    generator: Generator


def parse_sources(texts: Sequence[str], base: Generator) -> list[Source]:
    """The sources of --sources, each as `turbo4 caption=vlm steps=4 guidance=0 adapter=folder scale=0.4`.

    What a source does not say is the base's. An unknown word and a name twice are an InputError.
    """
    sources = [_source(text, base) for text in texts]
    names = [source.name for source in sources]
    if not names:
        raise InputError("--sources is empty; name at least one, such as `turbo4 caption=raw steps=4`")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"--sources names {twice!r} twice; give each source a name of its own")
    return sources


def _source(text: str, base: Generator) -> Source:
    where, (name, *words) = f"--sources {text!r}", text.split() or [""]
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == REAL:
        raise InputError(f"{where}: begin with a name of letters and digits, other than {REAL}")
    given = {key: value for key, _, value in (word.partition("=") for word in words)}
    if unknown := next((key for key in given if key not in WORDS), None):
        raise InputError(f"{where}: unknown {unknown!r}; known are {', '.join(WORDS)}")
    kind: Any = given.get("caption")
    if kind not in CAPTIONS:
        raise InputError(f"{where}: caption is {kind!r}; say caption= and one of {', '.join(CAPTIONS)}")
    generator = changed(base, [word for word in words if not word.startswith("caption=")], where)
    if generator.sampler.num_inference_steps < 1:
        raise InputError(f"{where}: steps is {generator.sampler.num_inference_steps}; it is 1 or more")
    if (adapter := generator.adapter) and is_local_path(adapter) and not Path(adapter).exists():
        raise InputError(f"{where}: there is no {adapter}")
    return Source(name, kind, generator)


# Captions

NO_CAPTION = {"raw": "no text", "vlm": "empty description", "prepared": "empty prepared caption"}


def caption_images(
    records: Iterable[Record],
    rows: Iterable[Record],
    describe: Callable[[Record], Generated] | None,
    shape: Callable[[str], str],
    sources: Sequence[Source],
    shared: Caption,
) -> list[Record]:
    """The records of real images with their captions, and `prompt`: the one of kind `shared`, or any other.

    `rows` are the stored images, `describe` returns what a vision-language model wrote about one, `shape`
    prepares that. An image that is invalid, or that lacks the caption of a source, is an invalid record.
    """
    found = []
    for record, row in zip(records, rows, strict=True):
        said = describe(row) if describe and is_valid(row) else None
        texts: dict[Caption, str] = {"raw": record["raw"], "vlm": "", "prepared": ""}
        if said:
            texts |= {"vlm": said.text, "prepared": shape(said.text)}
        prompt = next(filter(None, [texts[shared], *(texts[kind] for kind in reversed(CAPTIONS))]), "")
        lacking = next((s.caption for s in sources if not texts[s.caption]), None if prompt else shared)
        reason = row[INVALID] or (NO_CAPTION[lacking] if lacking else "")
        found.append(
            record | texts | {"prompt": prompt, "cut_off": bool(said and not said.finished), INVALID: reason}
        )
    return found


# Prepared captions

_MARKER = re.compile(r"^\s*(?:>|[-*\u2022\u00b7\u2013\u2014]|\(?\d{1,2}[.)])\s+")
_LABEL = re.compile(r"^(?:caption|description|image description|prompt|answer)\s*:\s*", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[.!?])[\"'\u201d)]*\s+(?=\S)")
# Words for a picture that say nothing of its style: a painting or a drawing stays one.
_PICTURE = (
    r"(?:(?:this|the|an?|provided|given|main|overall)\s+)*(?:image|picture|photo|photograph|photography)"
)
_VERB = (
    r"(?:shows?|depicts?|features?|displays?|presents?|captures?|portrays?|contains?|showcases?|"
    r"(?:is|shown is|consists) of|is showing|is depicting|is(?= an? ))"
)
_SEEN = r"(?:there (?:is|are)|(?:we|you|one)(?: can)? see|(?:it )?(?:shows|depicts))"
_PHRASES = re.compile(
    rf"^(?:(?:here|this|it)(?:'s|\s+is)\s+{_PICTURE}\s+of"
    rf"|in\s+{_PICTURE},?\s*(?:{_SEEN})?"
    rf"|{_PICTURE}\s+{_VERB}(?:\s+that\b)?"
    rf"|{_PICTURE}\s+of"
    rf"|{_PICTURE}(?=\W*$)"
    rf"|(?:in|at) the (?:cent(?:er|re)|middle) of {_PICTURE},?\s*(?:{_SEEN})?)\b[\s,:]*",
    re.IGNORECASE,
)


def prepare(text: str, fits: Callable[[str], bool]) -> str:
    """A description as a prompt: its first sentences, as many as `fits` accepts together.

    List markers, headings, bold type and phrases such as "The image shows" are removed. Where not even the
    first sentence fits, its first words are kept. Empty if nothing remains.

    "1. The image shows **two cats** on a sofa." -> "Two cats on a sofa."
    """
    prompt = ""
    for sentence in sentences(text):
        longer = f"{prompt} {sentence}".strip()
        if not fits(longer):
            return prompt or _first_words(sentence, fits)
        prompt = longer
    return prompt


def sentences(text: str) -> list[str]:
    """The sentences of a description without what `prepare` removes; a line ends a sentence."""
    found = []
    for line in text.splitlines():
        line = _MARKER.sub("", line).replace("**", "").replace("__", "").replace("`", "").strip(" \t\"'")
        line = " ".join(_LABEL.sub("", line).split())
        if not line or line.startswith("#") or line.endswith(":"):  # a heading
            continue
        if line[-1] not in ".!?,;":
            line += "."
        found += [_without_phrases(sentence) for sentence in _SENTENCE.split(line)]
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def _without_phrases(sentence: str) -> str:
    rest = _PHRASES.sub("", sentence)
    return rest if rest == sentence else rest[:1].upper() + rest[1:]


def _first_words(sentence: str, fits: Callable[[str], bool]) -> str:
    words = sentence.split()
    while words and not fits(" ".join(words)):
        words.pop()
    return " ".join(words).rstrip(" ,;:-")


def prepare_for_pocket(text: str, fits: Callable[[str], bool]) -> str:
    """A description in the first phrasing of the pocket's captions; other texts become those of `prepare`."""
    try:
        return caption(parse(text.strip().rstrip(".")), 0)
    except InputError:
        return prepare(text, fits)
