"""Options and YAML files: each value is taken, or answered by an InputError that names it."""

import dataclasses
import inspect
from importlib import import_module
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import recipe

from data_builders.prompts.config import PromptOptions
from prefopt.cli import parse
from prefopt.diffusion.generator import Generator, changed
from prefopt.errors import InputError
from prefopt.judges.rubric import Rubric
from prefopt.options import check_number, option_types, range_of
from prefopt.programs import BUILDERS, RECIPES, programs
from prefopt.vlm.ensemble import parse_members
from prefopt.yaml_files import MOST_BYTES, parse_yaml, read_yaml

FEW = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def config_class(name: str) -> Any:
    """The class of a program's options."""
    module = recipe(name) if name in programs(RECIPES) else import_module(f"data_builders.{name}")
    named = inspect.signature(module.main).parameters["config"].annotation
    return getattr(module, named) if isinstance(named, str) else named


DPO = config_class("diffusion_dpo")


def parsed(folder, *words: str) -> Any:
    return parse(DPO, ["--output_dir", str(folder / "run"), *words])


# Numbers


@pytest.mark.parametrize("name", [*programs(RECIPES), *programs(BUILDERS)])
def test_every_number_has_a_range(name):
    config = config_class(name)
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        types = option_types(hints[field.name])
        if types & {int, float} and bool not in types:
            assert range_of(field), f"--{field.name} of {name} needs within=..."


@pytest.mark.parametrize(
    ("value", "interval", "whole", "said"),
    [
        (float("nan"), "(-inf, inf)", False, "x is nan; it is a finite number"),
        (float("inf"), "[0, inf)", False, "x is inf; it is 0 or more"),
        (0, "(0, inf)", False, "x is 0; it is above 0"),
        (1.0, "[0, 1)", False, r"x is 1.0; it lies in \[0, 1\)"),
        (2.5, "[1, 9]", True, "x is 2.5; it is a whole number"),
        (True, "[1, 9]", True, "x is True; it is a whole number"),
        ("3", "[1, 9]", False, "x is '3'; it is a number"),
        (10**400, "[1, inf)", True, "x is larger than 1e"),
    ],
)
def test_numbers_that_are_none_of_an_options(value, interval, whole, said):
    with pytest.raises(InputError, match=said):
        check_number("x", value, interval, whole=whole)


@pytest.mark.parametrize(
    "words",
    [
        "--learning_rate nan",
        "--num_train_epochs -1",
        "--max_steps 0",
        "--gradient_accumulation_steps 0",
        "--max_grad_norm nan",
        "--adam_beta1 2",
        "--dataloader_num_workers -1",
        "--data_seed -1",
        "--resolution -16",
        "--lora_alpha -3",
        "--lora_dropout 1",
        "--lr_scheduler_type cosine_with_min_lr",
        '--lr_scheduler_kwargs {"a":1}',
        "--lr_scheduler_kwargs {",
        '--accelerator_config {"a":1}',
        "--torch_compile_mode fast",
        "--optim_args a",
        "--optim_target_modules all",
        "--metric_for_best_model loss",
        "--save_strategy best",
        "--warmup_steps 3 --lr_scheduler_type constant",
        "--output_dir=",
        "--output_dir " + "x" * 5000,
        "--output_dir pyproject.toml/x",
        "--cache_dir a\0b",
    ],
    ids=lambda words: words[:40],
)
def test_values_that_no_run_can_use_name_their_option(words, tmp_path):
    with pytest.raises(InputError, match=words.split()[0].split("=")[0]) as error:
        parsed(tmp_path, *words.split(" "))
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["steps=0", "steps=1e3", "guidance=nan", "scale=inf", "adapter=", "steps"])
def test_words_about_a_generator_have_ranges_too(word):
    with pytest.raises(InputError, match=f"--sources: {word.partition('=')[0]}"):
        changed(Generator("pocket"), [word], "--sources")
    with pytest.raises(InputError, match="steps needs one value"):
        changed(Generator("pocket"), ["steps=2", "steps=3"], "--sources")


@pytest.mark.parametrize(
    "part", ["lora_r=0", "lora_alpha=-3", "lora_dropout=1", "learning_rate=nan", "seed=-1"]
)
def test_words_about_a_member_have_ranges_too(part, tmp_path):
    with pytest.raises(InputError, match=f"--members '{part}': {part.partition('=')[0]} is"):
        parse_members(["lora_r=2", part], tmp_path)


@pytest.mark.parametrize("classes", [[""], ["!"], ["lion "], ["Lion", "lion"], ["a\0b"], []])
def test_classes_that_no_prompt_could_name(classes):
    with pytest.raises(InputError, match="--classes"):
        PromptOptions(classes=classes)


# YAML


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "'a' is given in line 1 and in line 3"),
        ("a: " + "[" * 3000, "line 1: lists and mappings lie more than 30 deep"),
        ("a: &a [*a]", "line 1: an alias stands for what it is in"),
        ("a: !!python/name:os.system", "line 1: the tag !!python/name:os.system"),
        ("? [a]\n: b", "line 1: a list or mapping is used as a key"),
        ("a: 1\n---\nb: 2", "line 2"),
        ("a: " + "9" * 5000, "digits"),
    ],
)
def test_yaml_that_is_not_read(text, said):
    with pytest.raises(InputError, match=f"here.*{said}"):
        parse_yaml(text, "here")


def test_a_bomb_of_aliases_is_refused_before_it_is_built():
    bomb = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(InputError, match="aliases"):
        parse_yaml("\n".join(bomb), "here")


def test_words_and_numbers_are_those_of_yaml_1_2():
    text = "[no, on, 012, 1:30, 2001-01-01, 1e-4, -2, .5, true, ~, '1']"
    assert parse_yaml(text, "here") == (
        ["no", "on", "012", "1:30", "2001-01-01", 1e-4, -2, 0.5, True, None, "1"]
    )


def test_what_is_no_file_of_text(tmp_path):
    (tmp_path / "large.yaml").write_text("# nothing\n" * (MOST_BYTES // 10 + 1))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    for name, said in {
        "large.yaml": "larger",
        "bytes.yaml": "UTF-8",
        ".": "no file of text",
        "nowhere": "No such file",
        "x" * 300: "too long",
    }.items():
        with pytest.raises(InputError, match=said):
            read_yaml(tmp_path / name)
    with pytest.raises(InputError, match="/dev/zero is no file of text"):
        read_yaml("/dev/zero")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("max_step: 1", "'max_step' is no option; did you mean max_steps"),
        ("max_steps: [1, 2]", "max_steps is a list"),
        ("max_steps: {a: 1}", "max_steps is a mapping"),
        ("max_steps: true", "max_steps is true"),
        ("max_steps:", "max_steps has no value"),
        ("max_steps: 1.5", "max_steps is 1.5; it is a whole number"),
        ("dataset_revision: 12", "write it in quotes: '12'"),
        ("lora_target_modules: [[a]]", "lora_target_modules holds"),
        ("bf16: perhaps", "bf16 is 'perhaps'"),
    ],
)
def test_values_of_a_file_that_are_of_another_type(text, said, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        parsed(tmp_path, "--config", str(file))


# Whatever they say

TEXT = st.text("ab7-+.eé\u2028 \t\n:[]{}&*!|>'\"#%@`,?~<=\0\ufeff", max_size=60)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(TEXT, inside, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([field.name for field in dataclasses.fields(DPO) if field.init])
KEYS = st.sampled_from(["name", "text", "check", "polarity", "weight", "needs", "soft", "other"])
WORDS = st.sampled_from(["positive", "negative", "count", "tanh", "log_odds", "{class}", "a", "b"])
ENTRIES = st.dictionaries(KEYS, VALUES | WORDS | st.lists(WORDS, max_size=2), max_size=7)


@FEW
@given(TEXT)
def test_any_text_is_yaml_or_an_error(text):
    try:
        parse_yaml(text, "here")
    except InputError as error:
        assert str(error).startswith("here")


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")  # old names
@FEW
@given(st.dictionaries(NAMES, VALUES, min_size=1, max_size=2))
def test_any_options_are_a_config_or_an_error(tmp_path, options):
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(options, allow_unicode=True), encoding="utf-8")
    try:
        parsed(tmp_path, "--config", str(file))
    except InputError as error:
        assert len(str(error)) < 1000


@FEW
@given(st.lists(ENTRIES | VALUES, max_size=3) | VALUES)
def test_any_questions_are_a_rubric_or_an_error(tmp_path, entries):
    file = tmp_path / "rubric.yaml"
    file.write_text(yaml.safe_dump(entries, allow_unicode=True), encoding="utf-8")
    try:
        rubric = Rubric.load(str(file))
    except InputError as error:
        assert len(str(error)) < 1000
        return
    file.write_text(rubric.as_yaml(), encoding="utf-8")
    assert Rubric.load(str(file)) == rubric
