"""README.md and docs/: links lead somewhere, commands are understood, options exist, defaults are right."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from documents import DOCS, FENCED
from launching import ROOT
from running import recipe
from torch.distributed.run import get_args_parser

from prefopt import cli
from prefopt.errors import InputError
from prefopt.objectives import OBJECTIVES
from prefopt.programs import BUILDERS, RECIPES, find_program, programs

PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PROGRAMS = {path.resolve(): name for name, path in (programs(RECIPES) | programs(BUILDERS)).items()}
FOLDERS = "benchmarks|data_builders|docs|prefopt|recipes|scripts|tests"
# Those of argparse, torchrun, our shell scripts and img2dataset.
OTHERS = {"--help", "--help-all", "--nproc_per_node", "--slow", "--fix", "--save_additional_columns"}


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings(page: Path) -> list[str]:
    return [slug(line) for line in re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text("utf-8")), re.M)]


# Links and paths


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, part = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), f"{page.name} links to {target}"
        assert not part or part in headings(file), f"{page.name} links to {target}, no heading there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*\w)", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_line_of_the_security_page_names_tests_that_exist():
    rows = [
        line
        for line in (DOCS / "security.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| what ")
    ]
    assert len(rows) >= 20
    for row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
        assert tests, row
        for file, name in tests:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {name}"


def test_the_index_has_every_page_once():
    linked = re.findall(r"^\| \[\S+\]\((\S+)\)", (DOCS / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted([*linked, "README.md"]) == [page.name for page in PAGES[1:]]
    assert len(headings(DOCS / "training.md")) > 10


# Commands

# Behind variables of the environment; of shell scripts those that are meant to be launched.
COMMAND = re.compile(
    r"\s*(\w+=\S+ )*((python|accelerate launch|torchrun|prefopt|make|pip) [^=]|scripts/(test|lint|demo))"
)


def commands(page: Path) -> list[list[str]]:
    """The words of each command of ours on a page: in blocks, and in code within a sentence."""
    text = page.read_text(encoding="utf-8")
    blocks = [body for kind, body in FENCED.findall(text) if kind in ("", "bash", "sh")]
    text = FENCED.sub("", text)
    blocks += re.findall(r"(?:^ {4}.*\n)+", text, re.M)
    lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    sentences = re.sub(r"^ {4}.*$", "", text, flags=re.M)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", sentences)]
    found = []
    for line in (part for whole in lines for part in whole.split(" && ")):
        if COMMAND.match(line):
            words = [word for word in shlex.split(line, comments=True) if word != "..."]
            found.append(words[next(i for i, word in enumerate(words) if "=" not in word) :])
    return found


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]
RUNS = [(page, words) for page, words in COMMANDS if words[0] not in ("make", "pip")]


def launched(words: list[str]) -> list[str]:
    """A command without what launches it: a program's name or a script's path, and its options."""
    if words[0] == "accelerate":
        given = launch_command_parser().parse_args(words[2:])
    elif words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
    else:
        return words[1 + (words[1] == "-m") :] if words[0] == "python" else words
    return [given.training_script, *given.training_script_args]


def test_pages_have_commands():
    assert len(RUNS) >= 50
    of_programs = {Path(word).stem for _, words in RUNS for word in words} & set(PROGRAMS.values())
    assert of_programs == set(PROGRAMS.values()), "every recipe and builder is shown at work"
    targets = set(re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.M))
    made = {words[1] for _, words in COMMANDS if words[0] == "make"}
    assert made and made <= {name for names in targets for name in names.split()}


@pytest.mark.parametrize(("page", "words"), RUNS, ids=[" ".join(w)[:70] for _, w in RUNS])
def test_a_command_is_understood(page, words, monkeypatch):
    """By the program's own parser, its choices and its --config; that folders exist is the user's affair."""
    program, *options = launched(words)
    monkeypatch.chdir(ROOT)
    if program in ("prefopt", "mine.py"):  # docs/extending.md
        monkeypatch.setitem(OBJECTIVES, "exponential", None)
        if options == ["--help"]:
            return
        path, *options = find_program(options[0]), *options[1:]
    else:
        path = Path(program).resolve()
    assert path.is_file(), program
    monkeypatch.setattr(sys, "argv", [str(path), *(word for word in options if word != "--help")])
    if path in PROGRAMS:
        parsed = []
        monkeypatch.setattr(cli, "run", lambda main, config: parsed.append(parse_alone(config)))
        runpy.run_path(str(path), run_name="__main__")
        assert len(parsed) == 1
    elif path.suffix == ".py":
        monkeypatch.syspath_prepend(str(path.parent))
        parse = understand if "--help" in options else parse_and_stop
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(Understood):
            runpy.run_path(str(path), run_name="__main__")


def parse_alone(config: type) -> Any:
    """The options, without the checks of paths and of one option against another."""
    config.__post_init__ = lambda self: None
    return cli.parse(config)


class Understood(Exception):
    """A script's options are right: it need not run."""


PARSE = argparse.ArgumentParser.parse_args


def understand(self: argparse.ArgumentParser) -> NoReturn:
    raise Understood


def parse_and_stop(self: argparse.ArgumentParser) -> NoReturn:
    PARSE(self)
    raise Understood


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("prefopt diffusion_dpo --beta_dop 3", "--beta_dop is no option; did you mean --beta_dpo?"),
        ("prefopt diffusion_dpo --encode sometimes", "invalid choice: 'sometimes'"),
        ("prefopt diffusion_dpo --config diffusion_dpo_sd16", "no preset of this name"),
    ],
)
def test_a_command_that_has_rotted_is_noticed(words, said, monkeypatch):
    with pytest.raises(InputError, match=re.escape(said)):
        test_a_command_is_understood("", words.split(), monkeypatch)


def test_options_that_are_named_are_some_programs(monkeypatch):
    launcher = [option for action in launch_command_parser()._actions for option in action.option_strings]
    known = {*OTHERS, *launcher}
    monkeypatch.setattr(cli, "run", lambda main, config: known.update(options_of(config)))
    for path in PROGRAMS:
        runpy.run_path(str(path), run_name="__main__")
    for script in (ROOT / "scripts").rglob("*.py"):
        known |= set(re.findall(r"add_argument\(\s*\"(--\w+)\"", script.read_text(encoding="utf-8")))
    named = {
        (page.name, option)
        for page in PAGES
        for option in re.findall(r"(?<![\w-])(--[a-z0-9][\w-]*)", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 150
    assert sorted((page, option) for page, option in named if option not in known) == []


def options_of(config: type) -> list[str]:
    return [*cli.Parser(config)._option_string_actions, "--config"]


# Tables of the pages


def test_the_default_learning_rates_are_those_of_the_recipes():
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    table = text.split("has a default by what is trained:")[1].split("\n\n")[1]
    shown = {}
    for row in table.splitlines()[2:]:
        names, *rates = (cell.strip() for cell in row.strip("|").split("|"))
        shown |= {name: [float(rate) for rate in rates if rate] for name in re.findall(r"`(\w+)`", names)}
    assert shown.pop("discriminator") == [recipe("discriminator").DiscriminatorConfig.learning_rate]
    assert set(shown) == {
        "diffusion_dpo",
        "diffusion_cpo",
        "diffusion_sft",
        "vlm_dpo",
        "vlm_sft",
        "vlm_qlora_ensemble",
    }
    for name, rates in shown.items():
        text = (RECIPES / f"{name}.py").read_text(encoding="utf-8")
        (call,) = re.findall(r"LearningRates\(lora=(\S+), full=(\S+), pocket=(\S+)\)", text)
        assert rates == [float(rate) for rate in call], name


def test_the_citation_is_that_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', project, re.M)
    assert (cited["title"], cited["version"], cited["license"]) == ("prefopt", version, "Apache-2.0")
