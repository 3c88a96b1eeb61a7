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
    assert said({"sources": ["a guidance=1"]}, {"guidance_scale": 10}) == said([], {}) == ""
    assert said({"guidance_scale": "much"}, {"guidance_scales": 3}) == "", "the step refuses it"
    both = said({"num_inference_steps": 4, "guidance_scale": 1}, {})
    assert both.count(" compares at ") == 2
    assert rounds.other_sampler(rounds.RoundsConfig(**OPTIONS)) == "", "the presets"


def test_a_step_that_ended_well_is_not_repeated_unless_it_changes(tmp_path, monkeypatch, capfd):
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(
        f"import sys; open({str(log)!r}, 'a').write(sys.argv[-1]); sys.exit(sys.argv[-1] == 'b')"
    )
    config = tmp_path / "options.yaml"
    config.write_text("a: 1")
    launch = [sys.executable, str(script)]
    monkeypatch.setattr(steps, "launcher", lambda processes: launch)

    def run(word):
        steps.run_step("sft", ["--config", str(config), word], tmp_path, 1)

    run("a")
    run("a")
    assert log.read_text() == "a" and "sft is done" in capfd.readouterr().out
    with pytest.raises(InputError, match="the step sft ended with exit code 1"):
        run("b")
    with pytest.raises(InputError, match="exit code 1"):
        run("b")
    assert log.read_text() == "abb"
    config.write_text("a: 2")
    run("a")
    assert log.read_text() == "abba"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "--rounds is 0"),
        ({"build": "nowhere.yaml"}, "--build: no file nowhere.yaml"),
        ({"rounds": 2, "dpo": "none"}, "--next_round dpo is not trained"),
        ({"compare": "none"}, "--compare: no file none"),
        ({"model_name_or_path": "some/model"}, "--build is missing: only the model `pocket` has a default"),
    ],
)
def test_options_that_cannot_be_are_named(rounds, changes, message):
    with pytest.raises(InputError, match=message):
        rounds.RoundsConfig(**changes)
