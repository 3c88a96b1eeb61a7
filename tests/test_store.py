"""The stores of what was computed once: whole shards, several writers, no silent reuse, and full disks."""

import errno
import json
import os
import pickle
from multiprocessing import get_context

import pytest
import torch
from disks import limited_files
from safetensors import SafetensorError

from prefopt.errors import InputError
from prefopt.files import content_key, exclusive_lock, reporting_write_errors, write_atomically
from prefopt.store import TensorStore, tensors_key

IDENTITY = {"weights": "abc", "resolution": "64"}


def entry(value: float) -> dict[str, torch.Tensor]:
    return {"mean": torch.full((2, 3), value), "sizes": torch.arange(6.0)}


def test_what_is_written_is_read_by_others(tmp_path):
    store = TensorStore(tmp_path, IDENTITY)
    store.write({"a": entry(1), "b": entry(2)})
    store.write({"c": entry(3)})
    for reader in (store, TensorStore(tmp_path, IDENTITY), pickle.loads(pickle.dumps(store))):
        assert len(reader) == 3 and "a" in reader and "d" not in reader
        assert torch.equal(reader["b"]["mean"], torch.full((2, 3), 2.0))
        assert set(reader["c"]) == {"mean", "sizes"}
    assert store.missing(["d", "a", "e", "d"]) == ["d", "e"]
    with pytest.raises(KeyError, match=f"d is not in the cache {tmp_path}"):
        store["d"]


def test_tensors_that_share_memory_are_stored_apart(tmp_path):
    """Moments of one batch are views of one tensor."""
    batch = torch.arange(12.0).view(2, 6)
    store = TensorStore(tmp_path, IDENTITY)
    store.write({"a": {"mean": batch[0]}, "b": {"mean": batch[1]}, "c": {"mean": batch.T[0]}})
    assert store["b"]["mean"].tolist() == [6, 7, 8, 9, 10, 11]
    assert store["c"]["mean"].tolist() == [0, 6]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"weights": "xyz", "resolution": "64"}, "weights: abc (cache), xyz (this run)"),
        ({"weights": "abc", "resolution": "128"}, "resolution: 64 (cache), 128 (this run)"),
        ({"weights": "abc"}, "resolution: 64 (cache), None (this run)"),
        ({**IDENTITY, "dtype": "bf16"}, "dtype: None (cache), bf16 (this run)"),
    ],
)
def test_another_identity_is_an_error_that_names_both_sides(tmp_path, other, said):
    """Guards: a stale cache reused without a word."""
    TensorStore(tmp_path, IDENTITY)
    with pytest.raises(InputError) as error:
        TensorStore(tmp_path, other)
    for part in (said, str(tmp_path), "--cache_dir"):
        assert part in str(error.value)


def test_a_half_written_shard_is_never_seen(tmp_path):
    store = TensorStore(tmp_path, IDENTITY)
    store.write({"a": entry(1)})
    whole = next(tmp_path.glob("*.safetensors"))
    (tmp_path / f".{'0' * 32}.safetensors.17").write_bytes(whole.read_bytes()[:40])
    (tmp_path / ".half.safetensors").write_bytes(whole.read_bytes()[:40])
    assert len(TensorStore(tmp_path, IDENTITY)) == 1


def _write_many(folder: str, first: int) -> None:
    store = TensorStore(folder, IDENTITY)
    for i in range(first, first + 20):
        store.write({f"{first}-{i}": entry(i), "shared": entry(7)})


def test_two_processes_write_side_by_side(tmp_path):
    context = get_context("fork")
    writers = [context.Process(target=_write_many, args=(str(tmp_path), first)) for first in (0, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    store = TensorStore(tmp_path, IDENTITY)
    assert len(store) == 41
    assert store["100-119"]["mean"][0, 0] == 119 and store["shared"]["mean"][0, 0] == 7
    assert not list(tmp_path.glob(".*"))


def test_what_another_process_wrote_is_seen_after_refresh(tmp_path):
    first, second = TensorStore(tmp_path, IDENTITY), TensorStore(tmp_path, IDENTITY)
    first.write({"a": entry(1)})
    assert "a" not in second
    second.refresh()
    assert second["a"]["mean"][0, 0] == 1


def test_a_full_disk_is_an_error_and_leaves_the_store_as_it_was(tmp_path):
    store = TensorStore(tmp_path, IDENTITY)
    with pytest.raises(InputError, match=f"could not write {tmp_path}.*size of a file"), limited_files(1000):
        store.write({"a": {"mean": torch.zeros(10_000)}})
    assert len(store) == len(TensorStore(tmp_path, IDENTITY)) == 0
    store.write({"b": {"mean": torch.zeros(10)}})
    assert len(TensorStore(tmp_path, IDENTITY)) == 1


def test_a_full_disk_under_torch_save_is_named_too(tmp_path):
    with (
        pytest.raises(InputError, match="could not write the optimizer"),
        limited_files(1000),
        reporting_write_errors("the optimizer"),
    ):
        torch.save(torch.zeros(10_000), tmp_path / "optimizer.pt")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "Free some space"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "read-only: make it writable"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Check the disk"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Change its permissions"),
        (FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)), "a file where a folder is needed"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), "run the same command again"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "Free some space"),
        (RuntimeError("Parent directory /x does not exist."), "run the same command again"),
        (RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos"), "Check the disk"),
    ],
    ids=str,
)
def test_a_failure_to_write_says_what_to_do(error, advice):
    said = f"could not write the file: .*{advice}"
    with pytest.raises(InputError, match=said), reporting_write_errors("the file"):
        raise error


def test_a_lock_sweeps_what_a_killed_run_left_half_written(tmp_path):
    (tmp_path / ".results.jsonl.0123456789abcdef").write_text("{")
    (tmp_path / ".mine").write_text("stays")
    with exclusive_lock(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".mine"]


def test_other_errors_pass_through_writing():
    with pytest.raises(RuntimeError, match="shapes"), reporting_write_errors("x"):
        raise RuntimeError("shapes do not match")


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(InputError, match="cache"):
        TensorStore(tmp_path / "cache" / "images", IDENTITY)


def test_a_text_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_atomically(path, json.dumps({"a": 1}))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        write_atomically(path, json.dumps({"a": 2}))
    assert json.loads(path.read_text()) == {"a": 1}


def test_keys_tell_contents_apart():
    """SHA-256 of "abc" as FIPS 180-2 gives it."""
    assert content_key("abc") == content_key(b"abc")
    assert content_key("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    weights = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    key = tensors_key(weights)
    assert key == tensors_key(dict(reversed(weights.items()))), "whatever their order"
    changed = [
        {**weights, "a": torch.zeros(3, 2)},
        {**weights, "a": torch.zeros(2, 3, dtype=torch.float64)},
        {**weights, "a": torch.full((2, 3), 1e-30)},
        {"a2": weights["a"], "b": weights["b"]},
        {"a": weights["a"]},
    ]
    assert len({key, *map(tensors_key, changed)}) == 6
