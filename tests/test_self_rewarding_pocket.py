"""The self-rewarding builder launched by path on the pocket: its own writer, drawer, judge and detector."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from test_self_rewarding import build_of, contents

from prefopt.pocket import world

SCRIPT = str(Path(__file__).parent.parent / "data_builders" / "self_rewarding.py")
SIZE = {"--prompts_per_class": "4", "--held_out_per_class": "1", "--candidates": "3", "--block_size": "2"}
DRAWING = {"--num_inference_steps": "8", "--guidance_scale": "2", "--seed": "3"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def command(folder: Path, *, processes: int = 1, **changes: str) -> list[str]:
    options = SIZE | DRAWING | {"--output_dir": str(folder)} | {f"--{k}": v for k, v in changes.items()}
    flags = [word for name, value in options.items() for word in (name, *value.split())]
    launcher = [*TORCHRUN, str(processes)] if processes > 1 else []
    return [sys.executable, *launcher, SCRIPT, "--classes", "elephant", "lion", *flags]


def build(folder: Path, **changes) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # what torchrun gives each process
    words = command(folder, **changes)
    return subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket") / "whole"
    ran = build(folder)
    assert ran.returncode == 0, ran.stderr
    return folder


def test_the_pocket_writes_draws_judges_and_detects(whole):
    rows = pq.read_table(whole / "candidates").to_pylist()
    assert len(rows) == 2 * 4 * 3 and {row["class"] for row in rows} == {"elephant", "lion"}
    assert all(world.parse(row["prompt"]).animal == row["class"] for row in rows)
    assert len({row["hard_score"] for row in rows}) > 2, "the judge tells candidates apart"
    chosen = [row for row in rows if row["selected"]]
    assert chosen and all(row["confidence"] >= 0.6 for row in chosen)
    held_out = (whole / "held_out_prompts.txt").read_text().splitlines()
    assert len(held_out) == 2 and not set(held_out) & {row["prompt"] for row in rows}


def test_two_processes_make_the_identical_dataset(whole):
    folder = whole.with_name("two")
    ran = build(folder, processes=2)
    assert ran.returncode == 0, ran.stderr
    assert build_of(folder)["run"]["processes"] == 2
    assert contents(folder).keys() == contents(whole).keys()
    for name, table in contents(whole).items():
        assert contents(folder)[name] == table, name


def test_kill_9_at_random_then_the_identical_dataset(whole):
    """Whatever it was at, a few times over; what was finished is not done again."""
    folder, chance = whole.with_name("killed"), np.random.default_rng(1)
    for moment in chance.uniform(9, 16, size=3):
        process = subprocess.Popen(
            command(folder), stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = sum(
        len(json.loads(line)) for file in (folder / "work").glob("answers-*.jsonl") for line in file.open()
    )
    drawn = sum(pq.read_metadata(file).num_rows for file in (folder / "work").rglob("block-*.parquet"))
    ran = build(folder)
    assert ran.returncode == 0, ran.stderr
    assert contents(folder) == contents(whole)
    drawing, asking, _ = build_of(folder)["run"]["calls"].values()
    assert drawing == 24 - drawn and asking == 10 * (24 + 8) - kept


def test_a_pipeline_without_a_safety_checker_is_drawn_from(whole):
    model = tiny.tiny_stable_diffusion(whole.with_name("bare"))
    index = Path(model, "model_index.json")
    entries = json.loads(index.read_text())
    index.write_text(json.dumps({k: v for k, v in entries.items() if k != "safety_checker"}))
    folder = whole.with_name("unchecked")
    ran = build(folder, model_name_or_path=str(model), exports="ranked", num_inference_steps="1")
    assert ran.returncode == 0, ran.stderr
    assert len(pq.read_table(folder / "candidates")) == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "{prompts}"}, "no prompt names lion; add some, or take it from --classes"),
        ({"classes": "elephant dragon"}, "the LLM lists no prompts of dragon"),
    ],
)
def test_a_class_with_no_prompts_is_named(tmp_path, changes, message):
    (tmp_path / "prompts.txt").write_text("one red elephant in the snow\n")
    changes = {name: value.format(prompts=tmp_path / "prompts.txt") for name, value in changes.items()}
    ran = build(tmp_path / "data", **changes)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert re.search(message, ran.stderr + ran.stdout)
