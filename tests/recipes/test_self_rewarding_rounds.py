"""The self-rewarding loop: what each step is told, and that a finished step is not repeated."""

import sys
from pathlib import Path

import pytest
import yaml
from launching import ROOT
from running import recipe

from data_builders.self_rewarding import SelfRewardingConfig
from prefopt import steps
from prefopt.cli import parse
from prefopt.errors import InputError

CONFIGS = ROOT / "recipes" / "configs"


@pytest.fixture(scope="module")
def rounds():
    """The recipe as a module."""
    return recipe("self_rewarding_rounds")


@pytest.mark.parametrize(
    "file", sorted(CONFIGS.glob("self_rewarding_build_*.yaml")), ids=lambda file: file.stem
)
def test_every_builder_preset_is_understood(file):
    settings = parse(SelfRewardingConfig, ["--config", str(file)])
    assert all(getattr(settings, name) == value for name, value in yaml.safe_load(file.read_text()).items())


@pytest.mark.parametrize(
    "file", sorted(CONFIGS.glob("self_rewarding_compare_*.yaml")), ids=lambda file: file.stem
)
def test_every_comparison_preset_is_understood(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the prompts that it names are made first
    values = yaml.safe_load(file.read_text())
    prompts = Path(values.get("prompts", "prompts.txt"))
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("a lion\n")
    words = ["--config", str(file), "--systems", "base"]
    settings = parse(recipe("compare_text_to_image").CompareConfig, words)
    assert all(getattr(settings, name) == value for name, value in values.items())


def option(command, name):
    """What follows a flag, up to the next one."""
    start = command.index(f"--{name}") + 1
    end = next((i for i in range(start, len(command)) if command[i].startswith("--")), len(command))
    return command[start:end]


OPTIONS = {
    name: str(CONFIGS / f"self_rewarding_{name}_pocket.yaml") for name in ("build", "sft", "dpo", "compare")
}


def test_a_first_round_starts_from_the_base(rounds, tmp_path):
    config = rounds.RoundsConfig(classes=["Lion"], model_name_or_path="some/model", **OPTIONS)
    steps = rounds.round_steps(config, tmp_path, None, seed=0)
    assert list(steps) == ["data", "sft", "dpo", "compare"]
    assert all(option(command, "model_name_or_path") == ["some/model"] for command in steps.values())
    assert option(steps["data"], "classes") == ["Lion"] and "--adapter" not in steps["data"]
    assert option(steps["sft"], "dataset_name") == [str(tmp_path / "data" / "sft")]
    assert option(steps["dpo"], "dataset_name") == [str(tmp_path / "data" / "pairs")]
    assert "--adapter_name_or_path" not in steps["dpo"]
    systems = ["base", f"sft={tmp_path / 'sft'}", f"dpo={tmp_path / 'dpo'}"]
    assert option(steps["compare"], "systems") == systems


def test_a_later_round_draws_and_trains_on_from_the_adapter(rounds, tmp_path):
    config, adapter = rounds.RoundsConfig(rounds=2, sft="none"), tmp_path / "round-1" / "dpo"
    steps = rounds.round_steps(config, tmp_path / "round-2", adapter, seed=1)
    assert list(steps) == ["data", "dpo", "compare"]
    assert option(steps["data"], "adapter") == [str(adapter)]
    assert option(steps["data"], "seed") == ["1"], "new prompts, new images"
    assert option(steps["dpo"], "adapter_name_or_path") == [str(adapter)], "and that adapter is the reference"
    assert option(steps["compare"], "systems")[:2] == ["base", f"before={adapter}"]


def test_every_step_is_a_script_with_a_readable_preset(rounds, tmp_path):
    for command in rounds.round_steps(rounds.RoundsConfig(), tmp_path, None, seed=0).values():
        assert Path(command[0]).is_file()
        assert yaml.safe_load(Path(option(command, "config")[0]).read_text())


def test_candidates_of_another_sampler_than_the_comparison_s_are_named(rounds, tmp_path):
    files = {name: tmp_path / f"{name}.yaml" for name in ("build", "compare")}

    def said(build, compare):
        for name, options in (("build", build), ("compare", compare)):
            files[name].write_text(yaml.safe_dump(options))
        return rounds.other_sampler(
            rounds.RoundsConfig(**{**OPTIONS, **{n: str(f) for n, f in files.items()}})
        )

    assert said({"guidance_scale": 2.0}, {"guidance_scales": [2, 3]}) == said({}, {}) == ""
    assert "at --guidance_scale 2, and" in said({"guidance_scale": 2.0}, {"guidance_scales": [3, 4.5]})
    assert "compares at 3:" in said({"guidance_scale": 2.0}, {})
    assert "at --num_inference_steps 4, and" in said({"num_inference_steps": 4}, {"num_inference_steps": 20})
    assert said({"guidance_scale": "1e1", "num_inference_steps": 30}, {"guidance_scale": 10}) == ""
    assert said({"sources": ["a guidance=1"]}, {"guidance_scale": 10}) == ""
    assert said({"guidance_scale": "much"}, {"guidance_scales": 3}) == "", "the step refuses it"
    both = said({"num_inference_steps": 4, "guidance_scale": 1}, {})
    assert both.count(" compares at ") == 2
    assert rounds.other_sampler(rounds.RoundsConfig(**OPTIONS)) == "", "the presets"


SCRIPT = """
import sys
from dataclasses import dataclass
from prefopt.options import option

@dataclass
class Options:
    a: int = option(1, "A number.", within="[0, 5]")

def run(main, options):
    open({log!r}, "a").write(sys.argv[-1] + " ")
    sys.exit(sys.argv[-1] == "bad")

if __name__ == "__main__":
    run(None, Options)
"""


def scripted_steps(tmp_path, monkeypatch):
    """Runs two steps with these words; each writes its word to a log, and `bad` fails."""
    script, log, config = tmp_path / "script.py", tmp_path / "log", tmp_path / "options.yaml"
    script.write_text(SCRIPT.format(log=str(log)))
    log.touch()
    config.write_text("a: 1")
    monkeypatch.setattr(steps, "launcher", lambda processes: [sys.executable])

    def run(first, second):
        words = {"sft": first, "compare": second}
        commands = {name: [str(script), "--config", str(config), word] for name, word in words.items()}
        steps.run_steps(commands, tmp_path / "run", 1)

    return run, log, config


def test_a_step_that_ended_well_is_not_repeated_unless_it_or_one_before_it_changes(
    tmp_path, monkeypatch, capfd
):
    run, log, config = scripted_steps(tmp_path, monkeypatch)
    run("one", "two")
    run("one", "two")
    assert log.read_text() == "one two " and "sft is done" in capfd.readouterr().out
    run("one", "three")
    assert log.read_text() == "one two three "
    run("other", "three")
    assert log.read_text() == "one two three other three ", "what stands on a changed step is done again"
    config.write_text("a: 2")
    run("other", "three")
    assert log.read_text().endswith("three other three ")


@pytest.mark.parametrize(
    ("options", "said"),
    [("a: 7", "--a is 7; it lies in"), ("aa: 1", "'aa' is no option; did you mean a"), ("a: [1]", "a list")],
)
def test_the_options_of_all_steps_are_checked_before_the_first_runs(tmp_path, monkeypatch, options, said):
    run, log, config = scripted_steps(tmp_path, monkeypatch)
    config.write_text(options)
    with pytest.raises(InputError, match=f"{config}: .*{said}"):
        run("one", "two")
    assert not log.read_text()


def test_a_step_that_fails_ends_the_run_and_is_tried_again(tmp_path, monkeypatch):
    run, log, _ = scripted_steps(tmp_path, monkeypatch)
    for _ in range(2):
        with pytest.raises(InputError, match="the step compare ended with exit code 1"):
            run("one", "bad")
    assert log.read_text() == "one bad bad "


def test_a_training_goes_on_from_its_checkpoints_and_never_from_those_of_other_options(tmp_path, monkeypatch):
    run, log, _ = scripted_steps(tmp_path, monkeypatch)
    with pytest.raises(InputError, match="exit code 1"):
        run("bad", "two")
    (tmp_path / "run" / "sft" / "checkpoint-50").mkdir(parents=True)
    with pytest.raises(InputError, match="exit code 1"):
        run("bad", "two")
    with pytest.raises(InputError, match=r"sft has checkpoints of other options .* delete that folder"):
        run("one", "two")
    assert log.read_text() == "bad bad "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "--rounds is 0"),
        ({"build": "nowhere.yaml"}, "--build: no file nowhere.yaml"),
        ({"rounds": 2, "dpo": "none"}, "--next_round dpo is not trained"),
        ({"compare": "none"}, "--compare: no file none"),
        ({"dpo": str(ROOT / "README.md")}, "README.md is no YAML file of options"),
        ({"model_name_or_path": "some/model"}, "--build is missing: only the model `pocket` has a default"),
    ],
)
def test_options_that_cannot_be_are_named(rounds, changes, message):
    with pytest.raises(InputError, match=message):
        rounds.RoundsConfig(**changes)
