"""Prompts, sources, earlier outputs and votes that builders and comparisons cannot use."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from damage import SPECIAL, special
from trial import Trial, program
from world import World

PAIRS, COMPARE = "text_to_image_pairs", "compare_text_to_image"


def trials(world: World) -> Iterator[Trial]:
    """Every trial of this table."""
    yield from _prompts(world)
    yield from _sources(world)
    yield from _systems(world)
    yield from _earlier(world)
    yield from _votes(world)
    yield from _runs(world)


# Prompts


def _prompts(world: World) -> Iterator[Trial]:
    contents: dict[str, tuple[bytes, tuple[str, ...]]] = {
        "empty": (b"", ("prompts.txt", "empty")),
        "blank": (b" \n\n", ("prompts.txt", "empty")),
        "an empty line": (b"a lion\n\na bird\n", ("prompts.txt", "line 2")),
        "UTF-16": ("a lion\n".encode("utf-16"), ("prompts.txt", "UTF-8")),
        "Latin-1": ("a l\xf6we\n".encode("latin-1"), ("prompts.txt", "UTF-8")),
        "NUL": (b"a lion\0\n", ("prompts.txt", "line 1")),
        "a byte order mark": (b"\xef\xbb\xbfa lion\na bird\n", ()),
        "CRLF": (b"a lion\r\na bird\r\n", ()),
        "duplicates": (b"a lion\na lion\na bird\n", ()),
        "one of 100,000 characters": (b"lion " * 20_000, ("tokens", "shorten")),
        "markup": (b"<script>alert(1)</script>\n{{ 7 * 7 }} {prompt} %s\n", ()),
    }
    for name, (content, says) in contents.items():

        def act(folder: Path, content: bytes = content) -> None:
            (folder / "prompts.txt").write_bytes(content)
            program(PAIRS, world.options(PAIRS) | {"prompts": folder / "prompts.txt"})(folder)

        yield Trial(f"prompts: {name}", act, says, None if says else _has_pairs)
    for kind in SPECIAL:

        def no_file(folder: Path, kind: str = kind) -> None:
            place = special(folder / "place", kind)
            program(PAIRS, world.options(PAIRS) | {"prompts": place})(folder)

        yield Trial(f"prompts: {kind}", no_file, ("place|/dev/zero",))


def _has_pairs(folder: Path) -> None:
    import pyarrow.parquet as pq

    prompts = pq.read_table(folder / "run" / "pairs")["prompt"].to_pylist()
    assert prompts and all(prompt == prompt.strip("\r\ufeff") for prompt in prompts), prompts[:1]


# Sources and systems


def _sources(world: World) -> Iterator[Trial]:
    texts = {
        "steps=0": "steps",
        "steps=x": "steps",
        "steps=2000": "steps",
        "guidance=nan": "guidance",
        "guidance=": "guidance",
        "scale=inf": "scale",
        "adapter=nowhere/at/all": "nowhere",
        "nothing=1": "nothing",
        "=1": "sources",
        "pocket pocket": "sources",
        "./nowhere": "nowhere",
        "": "sources|empty",
    }
    for text, says in texts.items():
        act = program(PAIRS, world.options(PAIRS) | {"sources": [text]})
        yield Trial(f"--sources {text!r}", act, (says,))


def _systems(world: World) -> Iterator[Trial]:
    texts = {
        "": "--systems",
        "=runs/dpo": "--systems",
        "base": "base",
        "dpo=./nowhere": "nowhere",
        "dpo=" + "x" * 5000: "dpo|--systems",
        "dpo=a\0b": "--systems|dpo",
        f"dpo={world.pairs}": "pairs",
        f"dpo={world.vlm_run}": "vlm-run",
        f"dpo={world.run} steps=0": "steps",
        f"dpo={world.run} guidance=nan": "guidance",
        f"dpo={world.run} nothing=1": "nothing",
    }
    for text, says in texts.items():
        options = world.options(COMPARE) | {"systems": ["base", text]}
        told = text.replace(str(world.folder), "")[:40]
        yield Trial(f"--systems {told!r}", program(COMPARE, options), (says,))


# What an earlier command left


def _earlier(world: World) -> Iterator[Trial]:
    damages: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda content: b"",
        "cut": lambda content: content[: len(content) // 2],
        "other bytes": lambda content: b"\x9c\0{]" * 64,
        "a list": lambda content: b"[]",
    }
    for program_name, place in ((PAIRS, world.build), (COMPARE, world.comparison)):
        files = sorted(path for path in place.rglob("*") if path.is_file() and path.name != ".lock")
        for file in files:
            for how, damage in damages.items():
                name = f"{program_name}: {file.relative_to(place)} is {how}"
                yield Trial(*_damaged(world, program_name, place, file.relative_to(place), damage, name))
    for name, file in (("a file", "run"), ("in a file", "run/below")):

        def act(folder: Path, file: str = file) -> None:
            (folder / "run").write_text("mine")
            program(PAIRS, world.options(PAIRS) | {"output_dir": folder / file})(folder)

        yield Trial(f"output_dir {name}", act, ("run",))


def _damaged(
    world: World, name: str, place: Path, file: Path, damage: Callable[[bytes], bytes], title: str
) -> tuple:
    """The same command over a copy of what it wrote, one file of it damaged: what was kept is an error.

    What is written anew each time is as before afterwards.
    """

    def act(folder: Path) -> None:
        shutil.copytree(place, folder / "run")
        (folder / "run" / file).write_bytes(damage((place / file).read_bytes()))
        program(name, world.options(name))(folder)

    def check(folder: Path) -> None:
        assert _same(folder / "run" / file, place / file), f"{file} is not as it was"

    kept = "work" in file.parts or file.parts[0] in ("images",) or file.suffix == ".sqlite"
    # An empty database is one that holds nothing yet; a journal counts only after a crash.
    nothing = (file.suffix == ".sqlite" and damage(b"[]") == b"") or file.name.endswith("-journal")
    return (title, act, (file.name,)) if kept and not nothing else (title, act, (), check)


def _same(one: Path, other: Path) -> bool:
    """Whether two files hold the same but for times and the folders' names."""
    import pyarrow.parquet as pq

    if "sqlite" in one.name:
        return True  # what was computed is in the tables
    if one.suffix == ".parquet":
        tables = [pq.read_table(path) for path in (one, other)]
        plain = [t.drop_columns([n for n in t.column_names if n == "seconds"]) for t in tables]
        return plain[0].equals(plain[1])
    if one.name == "BUILD.json":
        found = [json.loads(path.read_text()) for path in (one, other)]
        return found[0]["rows"] == found[1]["rows"]
    return one.stat().st_size > 0 and abs(one.stat().st_size - other.stat().st_size) < 500


# Votes, and runs that a report shows


def _votes(world: World) -> Iterator[Trial]:
    vote: dict[str, Any] = {"systems": ["base", "dpo"], "prompt": "a", "seed": 0, "winner": "dpo"}
    good: dict[str, Any] = {"comparison": {"base": "x", "dpo": "y"}, "votes": [vote]}
    contents: dict[str, Any] = {
        "no JSON": "{",
        "a list": [],
        "null": None,
        "other keys": {"votes": []},
        "no votes": good | {"votes": []},
        "votes as text": good | {"votes": "dpo"},
        "a number as vote": good | {"votes": [7]},
        "an unknown winner": good | {"votes": [vote | {"winner": "sft"}]},
        "an unknown system": good | {"votes": [vote | {"systems": ["base", "sft"]}]},
        "one system": good | {"votes": [vote | {"systems": ["base"]}]},
        "a seed as text": good | {"votes": [vote | {"seed": "0"}]},
        "a seed that is true": good | {"votes": [vote | {"seed": True}]},
        "a list as prompt": good | {"votes": [vote | {"prompt": ["a"]}]},
        "the same vote twice, other winner": good | {"votes": [vote, vote | {"winner": "base"}]},
        "of another comparison": good,
        "an empty ballot": good | {"ballot": ""},
        "identities as numbers": good | {"comparison": {"base": 1, "dpo": 2}},
        "deep": "[" * 100_000,
        "bytes": "\x00\ud800",
    }
    for name, content in contents.items():

        def act(folder: Path, content: Any = content) -> None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / "votes.json").write_bytes(text.encode(errors="surrogatepass"))
            shutil.copytree(world.comparison, folder / "run")
            program(COMPARE, world.options(COMPARE) | {"votes": folder / "votes.json"})(folder)

        yield Trial(f"votes: {name}", act, ("votes",))


def _runs(world: World) -> Iterator[Trial]:
    for file in ("config.json", "metrics.jsonl"):
        for how, text in (("empty", ""), ("{", "{"), ("a list", "[]\n"), ("deep", "[" * 100_000)):

            def act(folder: Path, file: str = file, text: str = text) -> None:
                shutil.copytree(world.run, folder / "trained", ignore=shutil.ignore_patterns("checkpoint-*"))
                (folder / "trained" / file).write_text(text)
                shutil.copytree(world.comparison, folder / "run")
                program(COMPARE, world.options(COMPARE) | {"runs": folder / "trained"})(folder)

            # A run shorter than its --logging_steps has logged nothing, a killed one has torn the last line.
            fine = file == "metrics.jsonl" and how in ("empty", "{", "deep")
            says = () if fine else (r"trained.*" + file.replace(".", r"\."),)
            yield Trial(f"runs: {file} is {how}", act, says)
    for name, place in (("nothing", "nowhere"), ("a build", world.build)):
        shown = program(COMPARE, world.options(COMPARE) | {"runs": place})
        yield Trial(f"runs: {name}", shown, ("nowhere|build",))
