"""Prompts for classes, written by an LLM that is asked until there are enough that differ.

Ask k of a class is a function of (seed, class, k): a request from a template, answered under a seed of its
own. The answers are read as lists (`data_builders.listing`); of prompts that repeat another one, or nearly,
the later is dropped and counted. Answers are kept as they came, so a rerun asks nothing twice.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from data_builders.listing import Distinct, parse_list
from data_builders.prompts import distinct, identify, read_prompts
from data_builders.self_rewarding_config import SelfRewardingConfig
from data_builders.stages import Record, flow
from data_builders.writers import EndpointWriter, LocalWriter, Sampling, Writer
from prefopt.records import InputError
from prefopt.store import Ledger, content_key, write_atomically, writing

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).with_name("templates")
PER_ASK = 10  # prompts asked for at once
NEAR = 0.8  # beyond it, a prompt is near another one; scenes of the pocket that differ at all lie below
PATIENCE = 5  # asks in a row that bring nothing new, until it is given up


@dataclass(frozen=True)
class Templates:
    """What the LLM is told: its part, and requests that take turns, with {count} and {class} to fill in."""

    system: str
    requests: tuple[str, ...]

    @classmethod
    def load(cls, system: str | None = None, requests: Sequence[str] = ()) -> Templates:
        """The texts of these files; by default our own."""
        files = [Path(file) for file in requests] or [TEMPLATES / "request.txt"]
        texts = tuple(map(_text, files))
        for file, text in zip(files, texts, strict=True):
            if "{class}" not in text:
                raise InputError(
                    f"the request {file} has no {{class}}, so it would ask the same of every class"
                )
        return cls(_text(Path(system) if system else TEMPLATES / "system.txt"), texts)

    def request(self, ask: int, class_name: str, count: int) -> str:
        """The request of this ask."""
        text = self.requests[ask % len(self.requests)]
        return text.replace("{count}", str(count)).replace("{class}", class_name)


@dataclass
class Written:
    """Records of `prompt`, `prompt_id`, `class`: those to train on, those kept apart; and what it took.

    `counts`: prompts asked for and parsed, exact_duplicates and near_duplicates dropped, calls of the LLM
    made now, and calls_kept that were made before.
    """

    training: list[Record] = field(default_factory=list)
    held_out: list[Record] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def write_prompts(
    writer: Writer,
    classes: Sequence[str],
    per_class: int,
    *,
    seed: int,
    held_out_per_class: int = 0,
    templates: Templates | None = None,
    ledger: Ledger | None = None,
    per_ask: int = PER_ASK,
    near: float = NEAR,
    patience: int = PATIENCE,
) -> Written:
    """As many prompts of each class as named, all different; the first of each class are held out.

    A description without the name of its class is left out, and counted. Near duplicates are looked for
    inside a class, exact ones among all. An LLM that brings nothing new `patience` times in a row is an
    InputError that quotes it.
    """
    templates = templates or Templates.load()
    written, texts = Written(), Distinct(near=1.0)
    needed = held_out_per_class + per_class
    with tqdm(total=needed * len(classes), desc="prompts", unit="prompt", disable=None) as bar:
        for name in classes:
            asks = _Asks(writer, templates, ledger, seed, name, per_ask, written.counts)
            prompts = _of_class(asks, needed, Distinct(near), texts, patience, bar)
            records = [record | {"class": name} for record in identify(prompts)]
            written.held_out += records[:held_out_per_class]
            written.training += records[held_out_per_class:]
    counts = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in sorted(written.counts.items()))
    logger.info("prompts of %s: %s", ", ".join(classes), counts)
    return written


@dataclass
class _Asks:
    """The LLM's answers about one class, in order, those that are kept without asking."""

    writer: Writer
    templates: Templates
    ledger: Ledger | None
    seed: int
    name: str
    per_ask: int
    counts: Counter[str]

    def __iter__(self) -> Iterator[str]:
        number = 0
        while True:
            self.counts["asked"] += self.per_ask
            yield self._answer(number)
            number += 1

    def _answer(self, number: int) -> str:
        request = self.templates.request(number, self.name, self.per_ask)
        seed = ask_seed(self.seed, self.name, number)
        key = content_key(json.dumps([self.writer.identity, self.templates.system, request, seed]))
        if self.ledger is not None and key in self.ledger:
            self.counts["calls_kept"] += 1
            return self.ledger[key]
        answer = self.writer.write(self.templates.system, request, seed=seed)
        self.counts["calls"] += 1
        if self.ledger is not None:
            self.ledger.add({key: answer})
        return answer


def ask_seed(seed: int, class_name: str, number: int) -> int:
    """The seed of one ask, in [0, 2^31): a function of these three and nothing else."""
    digest = hashlib.sha256(f"{seed} {number} {class_name}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1  # servers read it as a signed number of 32 bits


def _of_class(
    asks: _Asks, needed: int, of_class: Distinct, of_all: Distinct, patience: int, bar: tqdm
) -> list[str]:
    """The first `needed` different prompts of a class."""
    prompts: list[str] = []
    named = fruitless = 0
    for answer in asks:
        before = len(prompts)
        for prompt in parse_list(answer, asks.per_ask):
            asks.counts["parsed"] += 1
            if not _naming(asks.name).search(prompt):
                asks.counts["without_their_class"] += 1
                continue
            named += 1
            kind = of_class.add(prompt)
            if kind == "new" and len(prompts) < needed:
                kind = of_all.add(prompt)
                prompts += [prompt] if kind == "new" else []
            if kind != "new":
                asks.counts[f"{kind}_duplicates"] += 1
        bar.update(len(prompts) - before)
        if len(prompts) == needed:
            return prompts
        fruitless = 0 if len(prompts) > before else fruitless + 1
        if fruitless == patience:
            raise InputError(_fruitless(asks.name, needed, len(prompts), named, answer))
    raise AssertionError("asks never end")


def _fruitless(name: str, needed: int, found: int, named: int, answer: str) -> str:
    said = " ".join(answer.split())[:200]
    if not named:
        return (
            f"the LLM lists no prompts of {name}; what it says instead is such as {said!r}. Name another "
            "LLM, other templates, or a file of prompts"
        )
    return (
        f"the LLM repeats itself: {found} different prompts of {name} of {needed} needed, and now only such "
        f"as {said!r}. Ask for fewer, or raise the temperature"
    )


def prompts_of(config: SelfRewardingConfig, folder: Path, device: str | torch.device) -> list[Record]:
    """The prompts of a build: those of its file, or written ones.

    Of the written, `held_out_prompts.txt` in the folder has those kept apart, and `prompts.json` the counts.
    """
    if config.prompts is not None:
        return list(of_classes(read_prompts(config.prompts, None, config.seed), config.classes))
    sampling = Sampling(config.temperature, config.top_p)
    name = config.writer_model_name_or_path
    if config.writer_url:
        writer: Writer = EndpointWriter(config.writer_url, name, sampling=sampling)
    else:
        writer = LocalWriter(name, config.writer_revision, device=device, sampling=sampling)
    written = write_prompts(
        writer,
        config.classes,
        config.prompts_per_class,
        seed=config.seed,
        held_out_per_class=config.held_out_per_class,
        templates=Templates.load(
            config.system_prompt, [config.request_template] if config.request_template else []
        ),
        ledger=Ledger(folder / "work", "prompts"),
    )
    with writing(folder):
        held_out = "".join(f"{record['prompt']}\n" for record in written.held_out)
        write_atomically(folder / "held_out_prompts.txt", held_out)
        about = {"writer": writer.identity, "sampling": asdict(sampling), "counts": dict(written.counts)}
        write_atomically(folder / "prompts.json", json.dumps(about, indent=2) + "\n")
    del writer
    gc.collect()  # its memory is wanted by the model that draws
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return written.training


@cache
def _naming(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b{re.escape(name)}(?:e?s)?\b", re.IGNORECASE)


def of_classes(prompts: Sequence[str], classes: Sequence[str]) -> Iterator[Record]:
    """Records of given prompts, each with the one class that it names; repeated ones once."""
    patterns = {name: _naming(name) for name in classes}
    missing = set(classes)
    repeated: Counter[str] = Counter()
    for record in flow(identify(prompts), [distinct(repeated)]):
        named = [name for name, pattern in patterns.items() if pattern.search(record["prompt"])]
        if len(named) != 1:
            raise InputError(
                f"the prompt {record['prompt']!r} names {' and '.join(named) or 'none'} of the classes "
                f"{', '.join(classes)}; it has to name one"
            )
        missing -= set(named)
        yield record | {"class": named[0]}
    if repeated:
        logger.info("%d prompts are repetitions of others, and left out", repeated.total())
    if missing:
        raise InputError(f"no prompt names {sorted(missing)[0]}; add some, or take it from --classes")


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"no template could be read from {file}: {error}") from error
    if not text:
        raise InputError(f"the template {file} is empty")
    return text
