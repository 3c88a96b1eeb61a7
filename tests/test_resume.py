"""Killed, interrupted and split runs: the result is the uninterrupted one's."""

import functools
import json
import random
import signal
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from launching import die_at_save, launch, torchrun
from pictures import write_pairs
from processes import run_two
from running import logged

from prefopt.checkpoints import CheckpointingTrainer
from prefopt.files import exclusive_lock
from prefopt.hub import ADAPTER_FILE
from prefopt.programs import INTERRUPTED, TERMINATED

DPO = "recipes/diffusion_dpo.py"
STEPS = 12


@pytest.fixture(scope="module")
def options(setting) -> dict:
    """A run of twelve steps that keeps a checkpoint every second one."""
    more = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 2,
        "lora_dropout": 0.1,
        "ema_decay": 0.9,
    }
    return {**setting, **more, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    running = launch(DPO, {**options, "output_dir": folder}, folder.parent / "log")
    assert running.wait() == 0, running.text()
    return folder


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_killed_five_times_the_adapter_is_bit_identical(options, whole, tmp_path):
    """Guards: data order that is not restored, half-written checkpoints that are resumed from."""
    folder, log = tmp_path / "run", tmp_path / "log"
    same = {**options, "output_dir": folder, "resume_from_checkpoint": None}
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    print(f"moments of seed {seed}")
    for moment in ("before the first checkpoint", *sorted(chance.sample(range(3, STEPS - 1), 3))):
        running = launch(DPO, same, log)
        wanted = 1 if isinstance(moment, str) else moment
        running.wait_until(lambda wanted=wanted: lines(folder) >= wanted)
        running.kill()

    checkpoints = set(folder.glob("checkpoint-*"))
    running = launch(DPO, same, log, functools.partial(die_at_save, 1))
    assert running.wait() == -9, running.text()
    assert list((folder / "unfinished").iterdir()), "it died while a checkpoint was being written"
    assert set(folder.glob("checkpoint-*")) == checkpoints

    running = launch(DPO, same, log)
    assert running.wait() == 0, running.text()
    assert (folder / ADAPTER_FILE).read_bytes() == (whole / ADAPTER_FILE).read_bytes()
    assert logged(folder) == logged(whole)
    assert not (folder / "unfinished").exists()
    assert running.text().count("resuming from") >= 3


def test_a_signal_keeps_a_checkpoint(options, whole, tmp_path):
    """Guards: a scheduler's SIGTERM that loses the steps since the last checkpoint."""
    folder, log = tmp_path / "run", tmp_path / "log"
    more = {"output_dir": folder, "resume_from_checkpoint": None}
    for number, code, wanted, workers in (
        (signal.SIGTERM, TERMINATED, 3, 1),
        (signal.SIGINT, INTERRUPTED, 7, 0),
    ):
        running = launch(DPO, {**options, **more, "dataloader_num_workers": workers}, log)
        running.wait_until(lambda wanted=wanted: lines(folder) >= wanted)
        # As a launcher and a scheduler do: to every process, the workers included, and again.
        for process in [*psutil.Process(running.process.pid).children(), psutil.Process(running.process.pid)]:
            process.send_signal(number)
        running.interrupt(number)
        assert running.wait() == code, running.text()
        step = max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))
        assert f"checkpoint kept at step {step} of {folder}" in running.text()
        assert (folder / f"checkpoint-{step}" / "trainer_state.json").exists()
        assert wanted - 1 <= step < STEPS
        assert not (folder / ADAPTER_FILE).exists()

    running = launch(DPO, {**options, **more}, log)
    assert running.wait() == 0, running.text()
    assert (folder / ADAPTER_FILE).read_bytes() == (whole / ADAPTER_FILE).read_bytes()


@pytest.mark.parametrize("killed", [False, True], ids=["ended", "killed before its last save"])
def test_a_finished_run_repeated_trains_nothing(setting, tmp_path, killed):
    """Guards: a last checkpoint inside an epoch, from which the Trainer goes on to that epoch's end."""
    rows = write_pairs(tmp_path / "pairs", 4)
    options = {**setting, "dataset_name": rows, "per_device_train_batch_size": 2, "max_steps": 3}
    options |= {"save_strategy": "steps", "save_steps": 3, "ema_decay": 0.5}
    options |= {"output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    first = launch(DPO, options, tmp_path / "log")
    assert first.wait() == 0, first.text()
    adapter = tmp_path / "run" / ADAPTER_FILE
    metrics = tmp_path / "run" / "metrics.jsonl"
    before, losses, lines = adapter.read_bytes(), logged(tmp_path / "run"), metrics.read_bytes()
    if killed:
        adapter.unlink()
    again = launch(DPO, {**options, "resume_from_checkpoint": None}, tmp_path / "log")
    assert again.wait() == 0, again.text()
    assert "all 3 steps are done: nothing is trained" in again.text()
    assert adapter.read_bytes() == before
    assert metrics.read_bytes() == lines and len(losses) == 3
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(2, None, [10, 9]), (2, 1, [10, 1]), (1, None, [10]), (None, None, [10, 9, 2, 1])],
)
def test_the_oldest_checkpoints_go_but_not_the_best(tmp_path, limit, best, left):
    for step in (1, 2, 9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    state = SimpleNamespace(best_model_checkpoint=best and str(tmp_path / f"checkpoint-{best}"))
    trainer: Any = SimpleNamespace(args=SimpleNamespace(save_total_limit=limit), state=state)
    CheckpointingTrainer._rotate(trainer, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in left}


def test_the_best_checkpoint_stays_however_its_path_is_spelled(tmp_path, monkeypatch):
    """Guards: a run that is resumed from a checkpoint named from the root on, in a folder named from here."""
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    monkeypatch.chdir(tmp_path.parent)
    state = SimpleNamespace(best_model_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer: Any = SimpleNamespace(args=SimpleNamespace(save_total_limit=1), state=state)
    CheckpointingTrainer._rotate(trainer, Path(tmp_path.name))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-3"}


def test_two_trainings_in_one_folder_are_an_error(setting, tmp_path):
    with exclusive_lock(tmp_path / "run"):
        second = launch(DPO, {**setting, "output_dir": tmp_path / "run"}, tmp_path / "log")
        assert second.wait() == 2
    assert f"another run is using {tmp_path / 'run'}" in second.text()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_worker_does_not_hold_its_parents_lock(tmp_path):
    """Guards: workers that outlive a killed run by seconds, in which the same command is refused."""
    context = get_context("fork")
    started, ended = context.Event(), context.Event()
    with exclusive_lock(tmp_path):
        worker = context.Process(target=lambda: (started.set(), ended.wait()), daemon=True)
        worker.start()
        assert started.wait(30)
    with exclusive_lock(tmp_path):
        assert worker.is_alive()
    ended.set()
    worker.join()


def test_a_new_run_does_not_overwrite_an_old_one(options, whole, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    running = launch(DPO, {**options, "output_dir": whole}, tmp_path / "log")
    assert running.wait() == 2
    assert f"{whole} holds checkpoint-12 of an earlier run" in running.text()
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_two_processes_give_the_losses_of_one_with_accumulation_two(setting, tmp_path):
    """Guards: every process drawing the same noise; a loss scored past the wrapper that syncs gradients."""
    options = {
        **setting,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    one = launch(
        DPO, {**options, "output_dir": tmp_path / "one", "gradient_accumulation_steps": 2}, tmp_path / "log"
    )
    two = {**options, "output_dir": tmp_path / "two", "cache_dir": tmp_path / "cache"}
    torchrun(DPO, two)
    assert one.wait() == 0, one.text()
    arithmetic = json.loads((tmp_path / "two" / "config.json").read_text())["arithmetic"]
    assert "2 a batch x 1 accumulated x 2 processes = 4 a step" in arithmetic
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), abs=1e-6)


@pytest.mark.slow
def test_two_processes_resume_within_an_epoch(setting, tmp_path):
    """Guards: an epoch's order that a resumed loader on several processes does not get to know."""
    options = {**setting, "per_device_train_batch_size": 2, "max_steps": 5}
    options |= {"save_strategy": "steps", "save_steps": 4}
    folder = tmp_path / "run"
    torchrun(DPO, {**options, "output_dir": folder})
    through = logged(folder)
    torchrun(DPO, {**options, "output_dir": folder, "resume_from_checkpoint": folder / "checkpoint-4"})
    assert logged(folder) == pytest.approx(through, abs=1e-6)


def test_two_processes_end_with_the_best_weights(setting, tmp_path):
    """Guards: a second process that looks for the best checkpoint where the first had staged it."""
    data, folder = Path(write_pairs(tmp_path / "data", 12)), tmp_path / "run"
    Path(write_pairs(tmp_path / "other", 5), "train.parquet").rename(data / "test.parquet")
    options = {**setting, "dataset_name": data, "dataset_test_split": "test", "early_stopping_patience": 9}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"learning_rate": 0.6, "lr_scheduler_type": "constant", "save_total_limit": 1}
    options |= {"per_device_train_batch_size": 2, "max_steps": 3, "output_dir": folder}
    run_two(DPO, options, tmp_path / "log")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line["eval_loss"] for line in lines if "eval_loss" in line]
    best = folder / f"checkpoint-{1 + measured.index(min(measured))}"
    assert (folder / ADAPTER_FILE).read_bytes() == (best / ADAPTER_FILE).read_bytes()
    assert len(measured) == 3 and (folder / "checkpoint-3").is_dir()
