"""The self-rewarding builder launched by path on the pocket: LLM, text-to-image model, judge, detector."""

import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny
from builds import build_of, contents
from launching import Launch, launch, torchrun

from data_builders.export.tally import soft_points
from prefopt.evaluation import words
from prefopt.ledger import Ledger
from prefopt.pocket import world

SCRIPT = "data_builders/self_rewarding.py"
SETTINGS = {
    "classes": ["elephant", "lion"],
    "prompts_per_class": 4,
    "held_out_per_class": 1,
    "candidates": 3,
    "block_size": 2,
    "num_inference_steps": 8,
    "guidance_scale": 2,
    "seed": 3,
}


def start(folder: Path, **changes) -> Launch:
    return launch(SCRIPT, SETTINGS | {"output_dir": folder} | changes, folder.with_suffix(".log"))


def built(folder: Path, **changes) -> Path:
    build = start(folder, **changes)
    assert build.wait(300) == 0, build.text()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return built(tmp_path_factory.mktemp("pocket") / "whole")


def test_the_pocket_writes_generates_judges_and_detects(whole):
    rows = pq.read_table(whole / "candidates").to_pylist()
    assert len(rows) == 2 * 4 * 3 and {row["class"] for row in rows} == {"elephant", "lion"}
    assert all(world.parse(row["prompt"]).animal == row["class"] for row in rows)
    assert len({row["hard_score"] for row in rows}) > 2, "the judge tells candidates apart"
    chosen = [row for row in rows if row["selected"]]
    assert chosen and all(row["confidence"] >= 0.6 for row in chosen)
    held_out = (whole / "held_out_prompts.txt").read_text().splitlines()
    assert len(held_out) == 2 and not set(held_out) & {row["prompt"] for row in rows}


def test_other_weights_ask_nothing(whole):
    folder = whole.with_name("weighed")
    shutil.copytree(whole, folder)
    built(folder, question_weights=["whole_prompt=4"])
    build = build_of(folder)
    assert not any(build["run"]["calls"].values()) and build["figures"]["highest_possible"] == 13
    assert "(whole_prompt=4)" in (folder / "README.md").read_text()


def test_a_study_prints_the_judge_s_worth_and_shows_it_in_the_gallery(whole, capsys, monkeypatch):
    import pairs

    folder = shutil.copytree(whole, whole.with_name("studied"))
    judged = pairs.Judged(folder)
    rows = pq.read_table(folder / "candidates").to_pylist()
    assert [sum(soft_points(judged.rubric, row).values()) for row in judged.candidates] == pytest.approx(
        [row["soft_score"] for row in rows], abs=1e-4
    ), "the soft score is made of these points"
    assert sum(judged.shares().values()) == pytest.approx(1)
    assert sum(judged.differences().values()) == len(judged.pairs)
    agrees = judged.agreement("all")
    assert agrees["comparisons"] > 4 and agrees["low"] <= agrees["rate"] <= agrees["high"]
    before = (folder / "gallery.html").read_text()
    monkeypatch.setattr(sys, "argv", ["pairs.py", str(folder)])
    pairs.main()
    assert words.percent(agrees["rate"]) in capsys.readouterr().out
    page = (folder / "gallery.html").read_text()
    assert "agrees with the oracle" in page and "agrees with the oracle" not in before
    assert page.count("<img") == before.count("<img")


def test_two_processes_make_the_identical_dataset(whole):
    folder = whole.with_name("two")
    torchrun(SCRIPT, SETTINGS | {"output_dir": folder})
    assert build_of(folder)["run"]["processes"] == 2
    assert contents(folder) == contents(whole)


def test_kill_9_while_it_generates_and_judges_then_the_identical_dataset(whole):
    """What was finished is not done again."""
    folder = whole.with_name("killed")
    work = folder / "work"

    def steps() -> int:
        return len(Ledger(work, "answers")) // 100 + sum(1 for _ in work.rglob("block-*.parquet"))

    for reached in (1, 3, 5):
        build = start(folder)
        build.wait_until(lambda reached=reached: steps() >= reached)
        build.kill()
    kept = len(Ledger(work, "answers"))
    generated = sum(pq.read_metadata(file).num_rows for file in work.rglob("block-*.parquet"))
    assert contents(built(folder)) == contents(whole)
    generating, judging, _ = build_of(folder)["run"]["calls"].values()
    assert generating == 24 - generated and judging == 10 * (24 + 8) - kept


def test_a_pipeline_without_a_safety_checker_generates(whole):
    model = tiny.tiny_stable_diffusion(whole.with_name("bare"))
    index = Path(model, "model_index.json")
    entries = json.loads(index.read_text())
    index.write_text(json.dumps({k: v for k, v in entries.items() if k != "safety_checker"}))
    changes = {"model_name_or_path": model, "exports": ["ranked"], "num_inference_steps": 1}
    parts = ("writer_model_name_or_path", "judge_model_name_or_path", "detector")
    changes |= dict.fromkeys(parts, "pocket")
    folder = built(whole.with_name("unchecked"), **changes)
    assert len(pq.read_table(folder / "candidates")) == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "{folder}/prompts.txt"}, "no prompt names lion; add some, or take it from --classes"),
        ({"classes": ["elephant", "dragon"]}, "the LLM lists no prompts of dragon"),
    ],
)
def test_a_class_with_no_prompts_is_named(tmp_path, changes, message):
    (tmp_path / "prompts.txt").write_text("one red elephant in the snow\n")
    if "prompts" in changes:
        changes = {"prompts": changes["prompts"].format(folder=tmp_path)}
    build = start(tmp_path / "data", **changes)
    assert build.wait(300) == 2 and "Traceback" not in build.text()
    assert message in " ".join(build.text().split())
