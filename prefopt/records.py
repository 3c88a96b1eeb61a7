"""Tables on disk: the rows of a folder, a file or a hub id, with images as encoded bytes.

What the rows of a table of images mean is told in diffusion/formats.py, of conversations in vlm/formats.py.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple

import datasets
from datasets import Dataset
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from huggingface_hub.constants import HF_HUB_CACHE
from pyarrow import ArrowException, LargeListType, ListType, StructType, compute

from prefopt.errors import InputError
from prefopt.local_tables import files_state, folder_state, read_file, read_folder, table_folder
from prefopt.options import check_name
from prefopt.paths import file_inside
from prefopt.table_files import cause, check_cache, check_values

# Kinds of columns that hold files; they stay encoded, and only images are read.
MEDIA = (datasets.Image, datasets.Audio, datasets.Video, datasets.Pdf, datasets.Nifti, datasets.Mesh)


class Source(NamedTuple):
    """The rows of a table, and where they are."""

    rows: Dataset
    name: str  # what errors call it: a folder, a file or a hub id, with the slice of it that was read
    folders: tuple[Path, ...]  # that paths in cells start from, see `image_bytes`; none of a hub id
    is_file: bool = False  # else a folder, or a hub id

    def state(self, columns: Sequence[str]) -> str:
        """A hash that changes with any file in the folder; of one file, with those that its cells name."""
        if not self.folders:
            return ""
        if not self.is_file:
            return folder_state(self.folders[0])
        named = {path for name in columns for path in _paths(self.rows, name)}
        return files_state(self.folders[0], (Path(of, path) for of in self.folders for path in named))


def load(source: str, *, split: str, config: str | None, revision: str | None) -> Source:
    """A split, or slices as `train[:500]`, of a local folder or file, or of a hub id; images stay encoded.

    A folder holds Parquet, Arrow or images, one JSON, JSON Lines or CSV file for each split, a dataset that
    was saved, or the tables of a builder, of which `config` names one.
    """
    check_name(source, "--dataset_name")
    if os.path.exists(source):
        found = _load_local(source, split, config, revision)
    else:
        found = Source(_load_hub(source, split, config, revision), source, ())
    rows = found.rows
    if len(rows) == 0:
        raise InputError(f"{source}: the split {split!r:.100} has no rows")
    check_values(rows.data, found.name)
    for name, feature in rows.features.items():
        listed = isinstance(feature, datasets.List | datasets.LargeList)
        kind: Any = feature.feature if listed else feature
        if isinstance(kind, MEDIA):
            encoded: Any = replace(kind, decode=False)
            rows = rows.cast_column(name, datasets.List(encoded) if listed else encoded)
    return found._replace(rows=rows)


def _paths(rows: Dataset, name: str) -> Iterator[str]:
    """The paths in a column's cells, images, texts or lists of them; the bytes beside them are not read."""
    for batch in rows.select_columns([name]).with_format("arrow").iter(1000):
        cells: Any = batch[name]  # pyright: ignore[reportArgumentType, reportCallIssue]
        if isinstance(cells.type, ListType | LargeListType):
            cells = compute.call_function("list_flatten", [cells])
        if isinstance(cells.type, StructType):
            cells = compute.call_function("struct_field", [cells], compute.StructFieldOptions(["path"]))
        yield from filter(lambda path: isinstance(path, str) and path, cells.to_pylist())


def _load_local(source: str, split: str, config: str | None, revision: str | None) -> Source:
    refuse_options(source, revision=revision)
    place, places = table_folder(source, config), []

    def read(name: str) -> Dataset:
        rows, of = read_folder(place, name) if place.is_dir() else (read_file(place, name), place)
        places.append(of)
        return rows

    try:
        rows = read_split(split, read)
    except InputError:
        raise
    except (DatasetsError, OSError, ValueError, ArrowException) as error:
        check_cache(error)
        raise InputError(f"{place} cannot be read as a dataset: {cause(error)}") from error
    name = str(places[0] if len(places) == 1 else place) + (f", {split}" if is_sliced(split) else "")
    folder = (place if place.is_dir() else place.parent).resolve()
    # Where HPDv2 has the pictures of test.json: in test/. Of two splits they would bear the same names.
    below = [folder / (split.partition("[")[0] if place.is_dir() else place.stem)] if len(places) == 1 else []
    return Source(rows, name, (folder, *below), place.is_file())


def refuse_options(source: str, **options: str | None) -> None:
    """InputError for a `config` or `revision` of a dataset on this machine, which has none."""
    for name, value in options.items():
        if value:
            raise InputError(
                f"--dataset_{name} {value}: {source} is on this machine and has no {name}s, as a dataset of "
                "the hub may; leave the option out"
            )


# Splits


def is_sliced(split: str) -> bool:
    """Whether a split's name is an instruction of datasets, such as `train[:10%]` or `train+test`."""
    return bool(re.search(r"[\[+]", split))


def may_share_rows(one: str, other: str) -> bool:
    """Whether two splits, sums or slices of splits have a row in common, for any number of rows.

    Slices of one split have none if one ends before the other starts, both in shares or both in row numbers.
    """
    return any(
        a.splitname == b.splitname and not (_precedes(a, b) or _precedes(b, a))
        for a in _instruction(one)._relative_instructions
        for b in _instruction(other)._relative_instructions
    )


def _precedes(one: Any, other: Any) -> bool:
    end, start = one.to, other.from_
    if end is None or start is None or (one.unit, one.rounding) != (other.unit, other.rounding):
        return False
    return end == start or 0 <= end <= start  # of unequal ends that count from the last row, rounding decides


def _instruction(split: str) -> datasets.ReadInstruction:
    if not is_sliced(split):
        return datasets.ReadInstruction(split)
    with _reporting_wrong_slices(split):
        return datasets.ReadInstruction.from_spec(split)


def read_split(split: str, read: Callable[[str], Dataset]) -> Dataset:
    """The rows of a split or of slices of some; `read` returns the rows of a split by its name."""
    if not is_sliced(split):
        return read(split)
    wanted = _instruction(split)
    names = dict.fromkeys(part.splitname for part in wanted._relative_instructions)
    rows = {name: read(name) for name in names}
    with _reporting_wrong_slices(split):
        parts = wanted.to_absolute({name: len(of) for name, of in rows.items()})
    slices = [rows[part.splitname].select(range(part.from_, part.to) or []) for part in parts]
    return datasets.concatenate_datasets(slices)


@contextmanager
def _reporting_wrong_slices(split: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(
            f"the split {split!r:.100} cannot be read: {cause(error)}. Write for example train[:500], "
            "train[500:] or train[10%:20%]"
        ) from error


def _load_hub(source: str, split: str, config: str | None, revision: str | None) -> Dataset:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise InputError(
            f"no dataset {source!r:.300}: no such folder or file is here, and a hub id has the form org/name"
        )
    try:
        with no_tensors_decoded():
            return datasets.load_dataset(source, config, split=split, revision=revision)
    except Exception as error:  # the hub's client raises dozens of types for 'not there'
        raise InputError(
            f"no dataset {source!r:.300}: no such folder or file is here, and as a hub id it could not be "
            f"loaded ({cause(error)})"
        ) from error


@contextmanager
def no_tensors_decoded() -> Iterator[None]:
    """datasets decodes every file of a tar shard by its ending; here texts alone, and no torch.load."""
    decoders = WebDataset.DECODERS
    WebDataset.DECODERS = {ending: decoders[ending] for ending in ("txt", "json")}
    try:
        yield
    finally:
        WebDataset.DECODERS = decoders


def in_test(text_hash: str, fraction: float) -> bool:
    """Whether a prompt, known by its SHA-256, is held out: whatever else is in the dataset."""
    return int(text_hash[:8], 16) < fraction * 2**32


def check_p_chosen(value: Any, where: str) -> None:
    """InputError unless a soft label is a probability."""
    if isinstance(value, bool) or not (isinstance(value, float | int) and 0 <= value <= 1):
        raise InputError(f"{where} has the p_chosen {shortened(value)}; it is a probability between 0 and 1")


def image_bytes(image: dict | None, where: str, *folders: Path) -> bytes:
    """The encoded bytes of an image cell.

    A path in a cell is looked for in the first of `folders`, then in those below it that follow, and may not
    leave the first, see `file_inside`. None, of a dataset from the hub, stands for the folders that downloads
    go to.
    """
    if image is None:
        raise InputError(f"{where} has no image; fill it, or drop the row")
    content, path = image.get("bytes"), image.get("path")
    if content is None and path:
        content = image_file(path, where, *folders).read_bytes()
    if not content:
        raise InputError(f"{where} is an image of 0 bytes")
    return content


def image_file(path: str, where: str, *folders: Path) -> Path:
    """The file that the path in an image cell names, see `image_bytes`."""
    homes = folders[:1] or (Path(HF_DATASETS_CACHE), Path(HF_HUB_CACHE))
    return Path(file_inside(path, where, homes, folders or homes[:1]))
