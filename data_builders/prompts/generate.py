"""Prompts for classes, written by an LLM that gets requests until there are enough different ones.

Request k of a class is a function of (seed, class, k): a template filled in, answered under a seed of its
own. The replies are read as lists (`list_parsing`); of prompts that repeat another one, or nearly, the later
is left out and counted. Replies are kept as they came, so a rerun requests nothing twice.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Self

import torch
from tqdm import tqdm

from data_builders.engine.passes import free_memory
from data_builders.prompts.config import PromptOptions
from data_builders.prompts.list_parsing import Distinct, parse_list
from data_builders.prompts.llm import PromptLLM, Sampling, lazy_llm
from data_builders.prompts.reading import Prompts, given_prompts, identify, naming, read_prompts
from prefopt.errors import InputError
from prefopt.files import content_key, reporting_write_errors, write_atomically
from prefopt.ledger import Ledger
from prefopt.loading import Lazy
from prefopt.progress import progress_bar

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).with_name("templates")
PER_REQUEST = 10  # prompts of one request
# Jaccard threshold for near-duplicates: different scenes of the pocket's world lie below it.
NEAR = 0.8
PATIENCE = 5  # requests in a row without a new prompt, until the LLM is given up


@dataclass(frozen=True)
class Templates:
    """The LLM's system prompt, and requests used in turn, with {count} and {class} to fill in."""

    system: str
    requests: tuple[str, ...]

    @classmethod
    def load(cls, system: str | None = None, requests: Sequence[str] = ()) -> Self:
        """The texts of these files; by default our own."""
        files = [Path(file) for file in requests] or [TEMPLATES / "request.txt"]
        texts = tuple(map(_text, files))
        for file, text in zip(files, texts, strict=True):
            if "{class}" not in text:
                raise InputError(
                    f"the request {file} has no {{class}}, so it would be the same for every class"
                )
        return cls(_text(Path(system) if system else TEMPLATES / "system.txt"), texts)

    def request(self, number: int, class_name: str, count: int) -> str:
        """The request of this number."""
        text = self.requests[number % len(self.requests)]
        return text.replace("{count}", str(count)).replace("{class}", class_name)


def prompts_for(options: PromptOptions, folder: Path, seed: int, device: str | torch.device) -> Prompts:
    """The prompts of a build: those of its file, or prompts by the LLM.

    For the LLM's, `held_out_prompts.txt` in the folder has those held out, and `prompts.json` the counts.
    """
    if options.prompts is not None:
        return given_prompts(read_prompts(options.prompts), options.classes)
    sampling = Sampling(options.temperature, options.top_p)
    name, revision = str(options.writer_model_name_or_path), options.writer_revision
    llm = lazy_llm(name, revision, url=options.writer_url, device=device, sampling=sampling)
    prompts = generate_prompts(
        llm,
        options.classes,
        options.prompts_per_class,
        seed=seed,
        held_out_per_class=options.held_out_per_class,
        templates=Templates.load(
            options.system_prompt, [options.request_template] if options.request_template else []
        ),
        ledger=Ledger(folder / "work", "prompts"),
    )
    with reporting_write_errors(folder):
        held_out = "".join(f"{record['prompt']}\n" for record in prompts.held_out)
        write_atomically(folder / "held_out_prompts.txt", held_out)
        about = {"writer": llm.identity, "sampling": asdict(sampling), "counts": dict(prompts.counts)}
        write_atomically(folder / "prompts.json", json.dumps(about, indent=2) + "\n")
    free_memory()  # which the text-to-image model needs next
    return prompts


def generate_prompts(
    llm: Lazy[PromptLLM],
    classes: Sequence[str],
    per_class: int,
    *,
    seed: int,
    held_out_per_class: int = 0,
    templates: Templates | None = None,
    ledger: Ledger | None = None,
    per_request: int = PER_REQUEST,
    near: float = NEAR,
    patience: int = PATIENCE,
) -> Prompts:
    """`per_class` prompts of each class, all different, after `held_out_per_class` that are held out.

    A description without the name of its class is left out, and counted. Near duplicates are looked for
    inside a class, exact ones among all. An LLM with nothing new `patience` times in a row is an InputError
    that quotes it.
    """
    templates = templates or Templates.load()
    llm = Lazy(llm.identity, cache(llm.load))  # loaded once, whatever the number of classes
    prompts, texts = Prompts(), Distinct(near=1.0)
    needed = held_out_per_class + per_class
    with progress_bar(total=needed * len(classes), desc="prompts", unit="prompt") as bar:
        for name in classes:
            replies = _Replies(llm, templates, ledger, seed, name, per_request, prompts.counts)
            found = _of_class(replies, needed, Distinct(near), texts, patience, bar)
            records = [record | {"class": name} for record in identify(found)]
            prompts.held_out += records[:held_out_per_class]
            prompts.training += records[held_out_per_class:]
    counts = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in sorted(prompts.counts.items()))
    logger.info("prompts of %s: %s", ", ".join(classes), counts)
    return prompts


@dataclass
class _Replies:
    """The LLM's replies about one class, in order; those that are kept without the LLM."""

    llm: Lazy[PromptLLM]
    templates: Templates
    ledger: Ledger | None
    seed: int
    name: str
    per_request: int
    counts: Counter[str]

    def __iter__(self) -> Iterator[str]:
        number = 0
        while True:
            self.counts["requested"] += self.per_request
            yield self._reply(number)
            number += 1

    def _reply(self, number: int) -> str:
        request = self.templates.request(number, self.name, self.per_request)
        seed = request_seed(self.seed, self.name, number)
        key = content_key(json.dumps([self.llm.identity, self.templates.system, request, seed]))
        if self.ledger is not None and key in self.ledger:
            self.counts["calls_kept"] += 1
            return self.ledger[key]
        reply = self.llm.load().generate(self.templates.system, request, seed=seed)
        self.counts["calls"] += 1
        if self.ledger is not None:
            self.ledger.add({key: reply})
        return reply


def request_seed(seed: int, class_name: str, number: int) -> int:
    """The seed of one request, in [0, 2^31): a function of these three and nothing else."""
    digest = hashlib.sha256(f"{seed} {number} {class_name}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1  # servers read it as a signed number of 32 bits


def _of_class(
    replies: _Replies, needed: int, of_class: Distinct, of_all: Distinct, patience: int, bar: tqdm
) -> list[str]:
    """The first `needed` different prompts of a class."""
    prompts: list[str] = []
    named = fruitless = 0
    for reply in replies:
        before = len(prompts)
        for prompt in parse_list(reply, replies.per_request):
            replies.counts["parsed"] += 1
            if not naming(replies.name).search(prompt):
                replies.counts["without_their_class"] += 1
                continue
            named += 1
            kind = of_class.add(prompt)
            if kind == "new" and len(prompts) < needed:
                kind = of_all.add(prompt)
                prompts += [prompt] if kind == "new" else []
            if kind != "new":
                replies.counts[f"{kind}_duplicates"] += 1
        bar.update(len(prompts) - before)
        if len(prompts) == needed:
            return prompts
        fruitless = 0 if len(prompts) > before else fruitless + 1
        if fruitless == patience:
            raise InputError(_fruitless(replies.name, needed, len(prompts), named, reply))
    raise AssertionError("replies never end")


def _fruitless(name: str, needed: int, found: int, named: int, reply: str) -> str:
    said = " ".join(reply.split())[:200]
    if not named:
        return (
            f"the LLM lists no prompts of {name}; what it says instead is such as {said!r}. Name another "
            "LLM, other templates, or a file of prompts"
        )
    return (
        f"the LLM repeats itself: {found} different prompts of {name} of {needed} needed, and now only such "
        f"as {said!r}. Ask for fewer, or raise the temperature"
    )


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"no template could be read from {file}: {error}") from error
    if not text:
        raise InputError(f"the template {file} is empty")
    return text
