"""The checkpoint that a run goes on from: found and checked before anything is loaded.

transformers starts without a word where the optimizer's state is not there, and fails with a message about
something else where a file is damaged. Numbers that have changed are not found: they have no checksum.
"""

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from prefopt.config import LATEST, PreferenceConfig
from prefopt.errors import InputError
from prefopt.files import read_object
from prefopt.interrupts import has_lost_a_process
from prefopt.loading import UNUSABLE, first_line
from prefopt.model_files import check_files
from prefopt.runs import refuse_earlier_run
from prefopt.same_run import check_options

STATE_FILE = "trainer_state.json"
# What a checkpoint holds besides its state, by how the names begin; one of each line is there. DeepSpeed and
# FSDP write folders in place of some.
_PARTS = {
    "optimizer": ("optimizer", "global_step"),
    "schedule": ("scheduler.pt", "global_step"),
    "random numbers": ("rng_state",),
}


def check_start(config: PreferenceConfig) -> None:
    """InputError for a fresh run in a folder with checkpoints, and for one that cannot be gone on from.

    It may be damaged, or of a run with other options.
    """
    output_dir = Path(str(config.output_dir))
    if not config.resume_from_checkpoint:
        refuse_earlier_run(output_dir)
    elif found := find_checkpoint(output_dir, config.resume_from_checkpoint):
        check_options(found, config)


def find_checkpoint(output_dir: Path, wanted: str | bool) -> str | None:
    """The folder to go on from: the one named, or with True or `latest` the last of the run, if any.

    A damaged one is an InputError: to go on from an earlier one, it has to be deleted.
    """
    if wanted is not True and wanted != LATEST:
        if not Path(str(wanted), STATE_FILE).exists():
            raise InputError(f"{wanted} is no checkpoint: it has no {STATE_FILE}")
        found = str(wanted).rstrip("/")
    else:
        found = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if found:
        _check(Path(found))
        if Path(found).resolve().parent != output_dir.resolve():
            refuse_earlier_run(output_dir)
    return found


def read_state(checkpoint: str | Path) -> TrainerState:
    """The state of the trainer that a checkpoint was written in."""
    remedy, file = _remedy(checkpoint), Path(checkpoint, STATE_FILE)
    content = read_object(file, remedy)
    try:
        state = TrainerState(**content)
    except TypeError as error:
        raise InputError(f"{file} holds no state of a trainer: {error}. {remedy}") from error
    numbers = {name: getattr(state, name) for name in ("global_step", "max_steps", "num_train_epochs")}
    for name, value in numbers.items():
        if type(value) is not int or value < 0:
            raise InputError(f"{file}: its {name} is {value!r}, no whole number from 0 on. {remedy}")
    named = re.fullmatch(r"checkpoint-(\d+)", file.parent.name)
    if named and int(named[1]) != state.global_step:
        raise InputError(
            f"{file} is of step {state.global_step}, and its folder of step {named[1]}. {remedy}"
        )
    return state


def find_best(checkpoint: str | Path, *, needed: bool) -> str | None:
    """The best checkpoint up to this one, if its run measures that: beside it, or where it was written.

    Beside it, though its state names another place, after a run's folder was moved or renamed. One that is
    gone is an InputError if it is `needed`.
    """
    written = read_state(checkpoint).best_model_checkpoint
    if written is None:
        return None
    beside = Path(checkpoint).parent / Path(written).name
    if place := next((place for place in (beside, Path(written)) if place.is_dir()), None):
        return str(place)
    if not needed:
        return None
    raise InputError(
        f"{beside} is not there: of the checkpoints up to {Path(checkpoint).name} it measured best, and the "
        "end of this run would load it. Bring it back, or start again in another --output_dir"
    )


@contextmanager
def reading(checkpoint: str | Path, what: str) -> Iterator[None]:
    """Within, what cannot be loaded of a checkpoint is an InputError that says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except InputError as error:
        raise InputError(f"{error}. If the options are those of that run: {_remedy(checkpoint)}") from error
    except UnpicklingError as error:
        reason = "it holds objects that are neither tensors nor plain values"
        raise InputError(
            f"the {what} in {checkpoint} cannot be loaded: {reason}. {_remedy(checkpoint)}"
        ) from error
    except (EOFError, *UNUSABLE) as error:
        if has_lost_a_process(error):  # no fault of the checkpoint's
            raise
        reason = first_line(error)
        raise InputError(
            f"the {what} in {checkpoint} cannot be loaded: {reason}. {_remedy(checkpoint)}"
        ) from error


def _remedy(checkpoint: str | Path) -> str:
    folder = Path(checkpoint)
    others = [place for place in folder.parent.glob("checkpoint-*") if place.name != folder.name]
    then = "goes on from the one before" if others else "starts from the beginning, for this is the only one"
    return f"Delete the folder {checkpoint}, and run the same command again: it {then}"


def _check(folder: Path) -> None:
    """InputError for a part that is not there, and for a file that is not whole."""
    read_state(folder)
    names = [path.name for path in folder.iterdir()]
    for what, beginnings in _PARTS.items():
        if not any(name.startswith(beginnings) for name in names):
            raise InputError(f"{folder} holds no state of the {what}: no {beginnings[0]}. {_remedy(folder)}")
    for part in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        check_files(part, _remedy(folder))
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".pt", ".pth")):
        try:
            if not file.is_file():
                raise OSError("it is no file")
            zipfile.ZipFile(file).close()  # which reads the list of contents, at the end
        except (OSError, zipfile.BadZipFile) as error:
            reason = f"{error}" if isinstance(error, OSError) else "it is damaged, or was cut off"
            raise InputError(f"{file} is no whole file of torch's: {reason}. {_remedy(folder)}") from error
