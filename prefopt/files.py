"""Files that are whole or absent, content hashes, and locks: what every room that writes to disk shares."""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open

from prefopt.errors import InputError

# What the errors of torch's writer name.
TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error", "Parent directory")
# What to do about a failure to write, by its number.
_ADVICE = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space",
    errno.EFBIG: "Raise the largest size of a file (ulimit -f)",
    errno.EROFS: "This disk is read-only: make it writable",
    errno.EACCES: "Change its permissions",
    errno.EPERM: "Change its permissions",
    errno.EEXIST: "There is a file where a folder is needed: move it away",
    errno.ENOTDIR: "There is a file where a folder is needed: move it away",
    errno.ENOENT: "If its folder was removed meanwhile, run the same command again",
}
os.umask(_mask := os.umask(0))
_NEW_FILE = 0o666 & ~_mask  # permissions
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}")  # what `replacing` writes to
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_locked: dict[Path, IO[str]] = {}  # the folders that this process has locked, with their lock files


# Text


def text_lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, stripped; an empty one is an InputError that names its number."""
    if not file.is_file():
        raise InputError(f"no prompts file {file}: name a text file, one prompt a line")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no UTF-8 text: {error}") from error
    if not text.strip():
        raise InputError(f"{file} is empty; it needs one prompt a line")
    # Not splitlines: that also splits at characters which a prompt may hold, such as U+2028.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        if not line.strip():
            raise InputError(f"{file}: line {number} is empty; each line is a prompt, so delete it")
        if "\0" in line:
            raise InputError(f"{file}: line {number} holds a NUL character, which no text has; delete it")
        yield line.strip()


def public_name(name: str) -> str:
    """A hub id or a word as it is; of a path its last part, for the rest says where it was."""
    return Path(name).name if name and (Path(name).exists() or name.count("/") > 1) else name


# Content


def content_key(content: bytes | str) -> str:
    """The SHA-256 of bytes, or of a text's UTF-8, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def lines_key(lines: Iterable[str]) -> str:
    """The `content_key` of lines, each with its line end, of which one at a time is in memory."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def file_key(path: Path) -> str:
    """The SHA-256 of a file, read once per process as long as the file does not change."""
    return _file_key(path, *file_state(path))


def file_state(path: Path) -> tuple[int, int, int, int]:
    """Size, time of change (of content, of the entry) and inode: no rewriting leaves all of them alone."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@cache
def _file_key(path: Path, *state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_key(folder: Path, paths: Iterable[Path]) -> str:
    """The SHA-256 over some files of a folder in this order, their names there included."""
    return named_files_key({str(path.relative_to(folder)): path for path in paths})


def named_files_key(files: Mapping[str, Path]) -> str:
    """The SHA-256 over some files in this order, and over the names that they are given here."""
    return content_key("\n".join(f"{name} {file_key(path)}" for name, path in files.items()))


def variant_of(file: Path) -> str | None:
    """The variant that the name of a file of weights says, such as fp16 in `model.fp16.safetensors`."""
    return _SHARD.sub("", file.stem).partition(".")[2] or None


def used_variant(part: Path, variant: str | None) -> str | None:
    """The variant to load of a pipeline's part: this one if its folder has it, else the plain weights."""
    return variant if variant in map(variant_of, part.glob("*.safetensors")) else None


# Reading what others may have damaged


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file; anything else there is an InputError that ends with `remedy`."""
    check_is_file(path, remedy)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {error}. {remedy}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object but a {type(content).__name__}. {remedy}")
    return content


def open_tensors(path: Path, remedy: str) -> Any:
    """`safe_open` of a file of safetensors; a damaged one is an InputError that ends with `remedy`."""
    check_is_file(path, remedy)
    try:
        return safe_open(path, framework="pt")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} is no whole file of safetensors: {error}. {remedy}") from error


def check_is_file(path: Path, remedy: str) -> None:
    """InputError, which ends with `remedy`, for what is no file: reading a pipe would never end."""
    if not path.is_file():
        there = path.exists() or path.is_symlink()
        what = "is no file, but a folder, a pipe, a device or a broken link" if there else "is not there"
        raise InputError(f"{path} {what}. {remedy}")


# Writing


@contextmanager
def reporting_write_errors(what: object) -> Iterator[None]:
    """Turn a failure to write (a full disk, a missing permission) into an InputError that names `what`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch reports a full disk as a RuntimeError of its writer; others are not about the disk.
        if isinstance(error, RuntimeError) and not any(part in str(error) for part in TORCH_WRITER):
            raise
        raise InputError(f"could not write {what}: {error}. {advice(_number(error))}") from error


def _number(error: Exception) -> int | None:
    """The errno of a failure; libraries that are not Python's name it in their text, or not at all."""
    if "Parent directory" in str(error):
        return errno.ENOENT
    named = re.search(r"\berr(?:or|no) (\d+)", str(error), re.IGNORECASE)
    return getattr(error, "errno", None) or (int(named[1]) if named else None)


def advice(number: int | None) -> str:
    """What to do about a failure to write of this errno; None: it is not known."""
    unknown = "Check the disk, which may be full, broken or read-only"
    return f"{_ADVICE.get(number or 0, unknown)}, or name another folder"


def make_readable(*paths: Path) -> None:
    """Give files the permissions of any new file; safetensors writes them for their owner alone."""
    for path in paths:
        if path.is_file():
            path.chmod(_NEW_FILE)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, would outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not do this to folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when all is on disk; after an error nothing of it stays."""
    # A process id would not do: containers that share a folder count from 1 each.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield partial
        make_readable(partial)
        flush_to_disk(partial)
        os.replace(partial, path)
        flush_to_disk(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_partials(folder: Path) -> None:
    """Remove what killed runs left half written in a folder; only while nothing writes there."""
    for path in folder.glob(".*"):
        if _PARTIAL.fullmatch(path.name):
            path.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new, nothing between."""
    with replacing(path) as partial:
        partial.write_text(
            text, encoding="utf-8", errors="surrogateescape"
        )  # of names that the locale cannot say


# Folders


IDENTITY = "identity.json"  # of a folder whose content is kept for reruns


def check_identity(folder: Path, identity: Mapping[str, object], *, what: str, option: str) -> None:
    """Record in identity.json what this folder depends on; InputError if it was made for something else.

    `what` the folder is called in the message, `option` names the flag that chooses another one.
    """
    path = folder / IDENTITY
    if not os.path.lexists(path):
        write_atomically(path, json.dumps(identity, indent=2, sort_keys=True))
        return
    found = read_object(path, f"Delete the folder {folder}, or name another {option}")
    for name in sorted(found.keys() | identity.keys()):
        if found.get(name) != identity.get(name):
            raise InputError(
                f"the {what} {folder} does not fit this run. {name}: {found.get(name)} ({what}), "
                f"{identity.get(name)} (this run). Name another {option}, or delete that folder"
            )


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes, and remove what killed ones left half written in it.

    InputError if another process holds it. A process that is killed holds nothing, whatever workers it leaves
    behind. Inside of a lock of the same process it does nothing.
    """
    place = folder.resolve()
    if place in _locked:
        yield
        return
    with reporting_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another run is using {folder}. Wait for it, or name another --output_dir"
            ) from error
        _locked[place] = file
        try:
            remove_partials(folder)
            yield
        finally:
            del _locked[place]


def _close_locks() -> None:
    for file in _locked.values():
        file.close()


os.register_at_fork(after_in_child=_close_locks)  # else a worker would hold its parent's lock
