"""Graded images: each real image with those generated from its captions; from the passes to the tables."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from accelerate import PartialState

from data_builders.engine.passes import Pass, run_passes
from data_builders.engine.stages import INVALID, Group, Record, is_valid
from data_builders.engine.tables import IMAGES, Columns
from data_builders.export.card import Card, public_words, table, write_about
from data_builders.export.hub import push
from data_builders.export.summary import TABLE, reasons
from data_builders.export.tables import Export
from data_builders.export.writers import write_exports
from data_builders.images.graded_passes import (
    GenerateFromCaptions,
    StoredImages,
    StoreRealImages,
    grade,
    lazy_codec,
    native_side,
    token_limit,
)
from data_builders.images.real import RealImages
from data_builders.prompts.captions import CAPTIONS, REAL, caption_images
from prefopt.errors import InputError
from prefopt.files import public_name
from prefopt.ledger import Ledger
from prefopt.runs import versions
from prefopt.vlm.generate import Generated


class Describing(Pass, Protocol):
    """The pass that describes stored images; `describe(asked)` is what it wrote about one."""

    ledger: Ledger

    def answers(self, record: Record) -> Sequence[Generated]: ...


def build(
    config: Any,
    real: RealImages,
    question: str,
    describing: Callable[[StoredImages, Ledger], Describing] | None,
    shape: Callable[[str, Callable[[str], bool]], str],
    state: PartialState,
) -> str:
    """Compute what is missing, each process its share; then write everything. A sentence about it.

    `config` are the options of data_builders/discriminator_pairs.py; `describing` makes the pass that asks
    `question` (None: nothing is described), `shape` prepares a description. A build without a pair is an
    InputError; nothing that was computed is lost.
    """
    start, folder, device = perf_counter(), Path(config.output_dir), torch.device(str(state.device))
    work, sizes = folder / "work", {"batch_size": config.batch_size, "block_size": config.block_size}
    side = config.height or native_side(config.generator)
    codec = lazy_codec(config.generator, device) if config.through_vae else None
    storing = StoreRealImages(codec, real, work / "real", side=side, **sizes)
    calls = run_passes([storing], len(storing.blocks), state, keep_resident=False)

    stored, describe = StoredImages(storing.blocks, question), None
    passes: list[Pass] = [storing]
    if describing:
        describe = describing(stored, Ledger(work, "descriptions", state.process_index))
        calls += run_passes([describe], len(stored.blocks), state, keep_resident=False)
        describe.ledger.refresh()  # what other processes wrote
        passes.append(describe)

    fits = token_limit(config.generator)
    captioned = caption_images(
        real.records,
        (row for block in storing.blocks.blocks for row in storing.blocks.rows(block, images=False)),
        (lambda row: describe.answers(stored.asked(row))[0]) if describe else None,
        lambda text: shape(text, fits),
        config.parsed_sources,
        config.captions,
    )
    generating = [
        GenerateFromCaptions(source, side, captioned, work, seed=config.seed, device=device, **sizes)
        for source in config.parsed_sources
    ]
    calls += run_passes(generating, len(generating[0].blocks), state, keep_resident=False)
    passes += generating

    said = ""
    if state.is_main_process:
        made = sum((Counter(of_one) for of_one in calls), Counter[str]())
        for blocks in (storing.blocks, *(each.blocks for each in generating)):
            blocks.clean()
        run = {
            "processes": state.num_processes,
            "seconds": round(perf_counter() - start, 1),
            "calls": {each.name: made[each.name] for each in passes},
        }
        identities = {each.name: each.identity for each in passes}
        groups, summary = grade(captioned, storing.blocks, generating), Summary(real.left_out)
        said = _write(config, groups, summary, identities, side=side, run=run)
    state.wait_for_everyone()
    return said


def _write(
    config: Any,
    groups: Iterable[Group],
    summary: "Summary",
    identities: Mapping[str, str],
    *,
    side: int,
    run: Mapping[str, Any],
) -> str:
    """From the groups to the tables and the card, and to the hub if wanted; a sentence."""
    folder = Path(config.output_dir)
    counts = write_exports(
        summary.counted(groups),
        folder,
        {name: TABLES[name] for name in (TABLE, *config.exports)},
        test_fraction=config.test_fraction,
        max_bytes=config.shard_megabytes * 2**20,
    )
    said = write_build(config, identities, summary, counts, side=side, run=run)
    if config.push_to_hub:
        push(folder, config.push_to_hub)
    return said


# Tables

GRADED: Columns = {
    **IMAGES,
    "source": "string",  # what it was generated by; real: nothing
    "rank": "int32",  # 1 = real, 2 = by the last source, ...; null if invalid
    "caption": "string",  # that it was generated from
    **dict.fromkeys(CAPTIONS, "string"),  # of the real image
    "item": "int64",  # the real image's row in its table
    "url": "string",
    **dict.fromkeys(("aesthetic", "watermark", "nsfw"), "float32"),
}
PAIRS: Columns = {
    "prompt": "string",
    "chosen": "image",
    "rejected": "image",
    **dict.fromkeys(("source", "caption", "prompt_id"), "string"),
    "rejected_seed": "int64",
}
RANKED: Columns = {
    "prompt": "string",
    "images": ["image"],
    "ranks": ["int32"],
    "sources": ["string"],
    "prompt_id": "string",
}


def _pairs(group: Group) -> Iterator[Record]:
    for real, other, _ in group.pairs:
        shared = {name: other[name] for name in ("prompt", "source", "caption", "prompt_id")}
        yield shared | {"chosen": real["image"], "rejected": other["image"], "rejected_seed": other["seed"]}


def _ranked(group: Group) -> Iterator[Record]:
    if group.ranked:
        yield {
            "prompt": group.ranked[0]["prompt"],
            "images": [record["image"] for record in group.ranked],
            "ranks": [record["rank"] for record in group.ranked],
            "sources": [record["source"] for record in group.ranked],
            "prompt_id": group.ranked[0]["prompt_id"],
        }


TABLES = {
    TABLE: Export(
        "every image with its source, seed, captions, rank, and why it is invalid",
        GRADED,
        lambda group: group.candidates,
    ),
    "pairs": Export("a real image, chosen, and a generated one, rejected, by each source", PAIRS, _pairs),
    "ranked": Export("a real image, rank 1, with all those generated from its captions", RANKED, _ranked),
}


# What it amounts to


class Summary:
    """Counts over the images themselves, so a build that was resumed counts the same."""

    def __init__(self, left_out: Mapping[str, int]):
        self.left_out = Counter(left_out)  # rows of the table, by reason
        self.images: Counter[str] = Counter()  # valid ones, by source
        self.invalid: dict[str, Counter[str]] = defaultdict(Counter)  # by source and reason
        self.words: Counter[str] = Counter()  # of the captions of real images
        self.cut_off = 0  # descriptions that ended at their longest length

    def counted(self, groups: Iterable[Group]) -> Iterator[Group]:
        """The groups, each counted."""
        for group in groups:
            self._add(group)
            yield group

    def _add(self, group: Group) -> None:
        real = group.candidates[0]
        for record in group.candidates:
            if is_valid(record):
                self.images[record["source"]] += 1
            else:
                self.invalid[record["source"]][record[INVALID]] += 1
        if is_valid(real):
            self.words.update({kind: len(real[kind].split()) for kind in CAPTIONS})
            self.cut_off += real["cut_off"]

    def facts(self) -> dict[str, str]:
        """A few lines for the terminal and the card."""
        real = self.images[REAL]
        words = (f"{self.words[kind] / real:.1f} {kind}" for kind in CAPTIONS if self.words[kind])
        invalid = (
            f"{name}: {reasons(counts)}" for name, counts in sorted(self.invalid.items()) if name != REAL
        )
        return {
            "real images": f"{real} (left out: {reasons(self.left_out + self.invalid[REAL])})",
            "generated": ", ".join(f"{n} {name}" for name, n in self.images.items() if name != REAL)
            or "none",
            "generated, invalid": "; ".join(invalid) or "none",
            "mean words of captions": ", ".join(words) or "none",
            "descriptions cut off": str(self.cut_off),
        }

    def dropped(self) -> dict[str, dict[str, int]]:
        """Rows of the table, stored real images, and each source's images that are in no pair, by reason."""
        invalid = {
            name: dict(sorted(counts.items())) for name, counts in sorted(self.invalid.items()) if counts
        }
        return {"rows": dict(sorted(self.left_out.items())), **invalid}


ABOUT = """{sources}

Real images were resized to {side} x {side} pixels (LANCZOS, then the centre){vae}.
All images are stored as lossless WebP. Splits are by real image. The prompt is the caption that a real image
shares with those generated for it."""


def write_build(
    config: Any,
    identities: Mapping[str, str],
    summary: Summary,
    counts: Mapping[str, Mapping[str, int]],
    *,
    side: int,
    run: Mapping[str, Any],
) -> str:
    """Write BUILD.json and README.md; a sentence. A build without a pair is an InputError that says why."""
    folder = Path(config.output_dir)
    build = {
        "facts": summary.facts(),
        "figures": {"images": dict(summary.images), "descriptions_cut_off": summary.cut_off, "side": side},
        "rows": {name: dict(by_split) for name, by_split in counts.items()},
        "dropped": summary.dropped(),
        "run": run,
        "settings": asdict(config),
        "identity": identities,
        "versions": versions(),
    }
    write_about(folder, build, _card(config, summary, counts, side))
    said = "; ".join(f"{name}: {fact}" for name, fact in summary.facts().items())
    if set(summary.images) <= {REAL}:
        raise InputError(f"{folder}: there is no pair ({said}). `candidates` says why each image is invalid")
    return f"{folder}: {said}"


def _card(config: Any, summary: Summary, counts: Mapping[str, Mapping[str, int]], side: int) -> Card:
    sources = [REAL, *map(public_words, reversed(config.sources))]
    model = public_name(config.model_name_or_path)
    captioner = {"described the real images": public_name(config.captioner_model_name_or_path)}
    return Card(
        title=f"Real images, and images that {model} generated from their captions",
        about=ABOUT.format(
            sources=table({f"rank {rank}": source for rank, source in enumerate(sources, start=1)}),
            side=side,
            vae=" and passed once through the model's VAE" if config.through_vae else "",
        ),
        facts=summary.facts(),
        models={"generated the images": model, **(captioner if config.described else {})},
        tables={name: TABLES[name].about for name in counts},
        rows=counts,
        tasks=["text-to-image", "image-classification"],
        license=config.license,
        questions={"What was asked about each real image": config.question} if config.described else {},
    )
