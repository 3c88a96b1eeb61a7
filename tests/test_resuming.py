"""Checkpoints and shards that are damaged since: found before anything is loaded, by their names."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prefopt.config import PreferenceConfig
from prefopt.errors import InputError
from prefopt.model_files import check_files
from prefopt.resuming import check_start, find_checkpoint, reading
from prefopt.store import TensorStore

Damage = Callable[[Path], object]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A folder with what a checkpoint holds."""
    folder = tmp_path / "run" / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3, "max_steps": 9}))
    save_file({"weight": torch.ones(4)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": torch.zeros(2)}, folder / name)
    return folder


def write(content: str | bytes) -> Damage:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("trainer_state.json", write("{"), "is no JSON"),
        ("trainer_state.json", write("[]"), "holds no JSON object but a list"),
        ("trainer_state.json", write("[" * 100_000), "is no JSON"),
        ("trainer_state.json", write(bytes(range(256))), "is no JSON"),
        ("trainer_state.json", write('{"global_step": "3"}'), "its global_step is '3'"),
        ("trainer_state.json", write('{"global_step": -1}'), "its global_step is -1"),
        ("trainer_state.json", write('{"global_step": 4}'), "is of step 4, and its folder of step 3"),
        ("trainer_state.json", write('{"nothing": 4}'), "holds no state of a trainer"),
        ("trainer_state.json", pipe, "is no file"),
        ("model.safetensors", half, "is no whole file of safetensors"),
        ("model.safetensors", write(b"\xff" * 64), "is no whole file of safetensors"),
        ("model.safetensors", pipe, "is no file"),
        ("optimizer.pt", Path.unlink, "holds no state of the optimizer"),
        ("optimizer.pt", half, "is no whole file of torch's"),
        ("scheduler.pt", Path.unlink, "holds no state of the schedule"),
        ("scheduler.pt", write(b""), "is no whole file of torch's"),
        ("rng_state.pth", Path.unlink, "holds no state of the random numbers"),
        ("rng_state.pth", write(b"pickle"), "is no whole file of torch's"),
        ("rng_state.pth", pipe, "is no whole file of torch's"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_not_passed_over(checkpoint, file, damage, said):
    """Guards: a fresh optimizer in place of one that is gone, without a word; an earlier checkpoint taken."""
    run = checkpoint.parent
    assert find_checkpoint(run, "latest") == find_checkpoint(run, str(checkpoint)) == str(checkpoint)
    damage(checkpoint / file)
    with pytest.raises(InputError, match=rf"checkpoint-3.*{said}.*Delete the folder {checkpoint}"):
        check_start(PreferenceConfig(str(run), resume_from_checkpoint="latest"))


def test_states_of_several_processes_are_whole(checkpoint):
    """Whether there are as many now is the Trainer's affair."""
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_1.pth")
    assert find_checkpoint(checkpoint.parent, True)


def test_no_checkpoint_and_an_earlier_run(checkpoint, tmp_path):
    assert find_checkpoint(tmp_path / "nothing", "latest") is None
    with pytest.raises(InputError, match=r"is no checkpoint: it has no trainer_state\.json"):
        check_start(PreferenceConfig(str(checkpoint.parent), resume_from_checkpoint=str(tmp_path)))
    with pytest.raises(InputError, match="holds checkpoint-3 of an earlier run"):
        check_start(PreferenceConfig(str(checkpoint.parent)))


class Runs:
    """What leaves a file behind if it is unpickled."""

    def __reduce__(self):
        return exec, ("open('unpickled', 'w').close()",)


def test_code_in_a_state_is_not_run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Runs(), checkpoint / "optimizer.pt")
    said = "the optimizer in .*neither tensors nor plain values. Delete"
    with pytest.raises(InputError, match=said), reading(checkpoint, "optimizer"):
        torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert not Path("unpickled").exists()


# Models and caches


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "{", "is no JSON"),
        ("config.json", "null", "holds no JSON object but a NoneType"),
        ("unet_config.json", "[", "unet_config.json is no JSON"),
        ("tokenizer.json", "17", "holds no JSON object but a int"),
        ("model.safetensors.index.json", "{}", "names no weights"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "../../x"}}',
            "'../../x', which is not in its",
        ),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}', "which is not there"),
        ("model.safetensors", "pickle", "is no whole file of safetensors"),
    ],
)
def test_a_damaged_file_of_a_model_is_named(tmp_path, name, content, said):
    (tmp_path / "README.md").write_text("[")
    (tmp_path / "vocab.json").write_text("[]")
    check_files(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        check_files(tmp_path)


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("identity.json", write("{"), r"identity\.json is no JSON.*--cache_dir"),
        ("identity.json", write("[]"), "holds no JSON object but a list"),
        ("identity.json", pipe, "is no file"),
        ("*.safetensors", half, r"is no whole file.*Delete this file"),
        ("*.safetensors", pipe, "is no file"),
        ("*.safetensors", lambda path: save_file({"a/b": torch.ones(1)}, path), "for another cache than"),
    ],
)
def test_a_damaged_cache_is_named(tmp_path, file, damage, said):
    TensorStore(tmp_path, {"weights": "abc"}).write({"key": {"mean": torch.ones(2)}})
    damage(next(tmp_path.glob(file)))
    with pytest.raises(InputError, match=said):
        TensorStore(tmp_path, {"weights": "abc"})


def test_a_shard_of_another_cache_is_refused(tmp_path):
    """Guards: shards copied between folders, whose values depend on something else."""
    for name in ("abc", "xyz"):
        store = TensorStore(tmp_path / name, {"weights": name})
        store.write({"key": {"mean": torch.ones(2)}})
    (shard,) = (tmp_path / "xyz").glob("*.safetensors")
    shard.replace(tmp_path / "abc" / "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors was written for another cache"):
        TensorStore(tmp_path / "abc", {"weights": "abc"})
