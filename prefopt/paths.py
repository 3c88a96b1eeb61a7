"""Paths that a dataset names: files inside of its folder, and nothing else."""

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from prefopt.errors import InputError


def file_inside(path: str, where: str, homes: Sequence[Path], folders: Sequence[Path]) -> str:
    """The file that a dataset names by `path`, which starts in one of `folders` and ends in one of `homes`.

    Links count as what they lead to, but for those of a snapshot in the hub's cache, which lead to its blobs.
    What is outside or no file (a URL, a folder, a pipe) is an InputError that begins with `where`.
    """
    if "\0" in path or "://" in path:
        what = "a URL" if "://" in path else "no name of a file"
        raise InputError(
            f"{where} points to {path!r:.200}, {what}; put the file into the dataset's folder, and name it "
            "by its path there"
        )
    files = [os.path.join(folder, path) for folder in folders]
    file = next(filter(os.path.isfile, files), files[0])
    if os.path.islink(file) and ".." not in Path(file).parts:
        homes = (*homes, *_blobs(homes[0]))
    real = os.path.realpath(file)
    if not any(os.path.commonpath([real, home]) == home for home in map(os.path.realpath, homes)):
        raise InputError(f"{where} points to {path:.200}, outside of the dataset's folder {homes[0]}")
    if not os.path.isfile(file):
        what = "which is no file" if os.path.lexists(file) else "which is not there"
        raise InputError(f"{where} points to {path:.200}, {what}")
    return file


def _blobs(folder: Path) -> list[Path]:
    """Where the links of a snapshot in the hub's cache lead to; none for another folder.

    A snapshot is (datasets|models)--NAME/snapshots/REVISION, and its files are in the first folder's blobs.
    """
    return [
        cached / "blobs"
        for snapshots, cached in pairwise(folder.parents)
        if snapshots.name == "snapshots" and re.match("(datasets|models)--", cached.name)
    ]
