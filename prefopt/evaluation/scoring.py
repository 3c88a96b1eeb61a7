"""Scores by content key, kept ones and new ones, each process its share; and the results, written once."""

import json
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from prefopt.errors import InputError
from prefopt.evaluation.scorers import Scorer
from prefopt.files import content_key, reporting_write_errors, write_atomically
from prefopt.ledger import Ledger
from prefopt.progress import progress_bar

Scores = dict[str, float | bool | None]  # a scorer's scores of one output, by part


def processes() -> PartialState:
    """This process among all; without `cpu`, each of several on CPUs would take itself for the only one."""
    return PartialState(cpu=not torch.accelerator.is_available())


def quiet() -> bool:
    """Whether this process leaves the progress bars to another one."""
    return not processes().is_main_process


def kept_scores(
    scorer: Scorer, keys: Sequence[str], inputs: Callable[[Sequence[str]], tuple], ledger: Ledger
) -> dict[str, Scores]:
    """The scores of each key's output, which `inputs` reads; kept on disk if the scorer has an identity."""
    entries = {key: content_key(f"{scorer.identity} {key}") for key in keys}
    found: dict[str, Scores] = {}
    if scorer.identity is not None:
        found = {key: ledger[entry] for key, entry in entries.items() if entry in ledger}
    missing = [key for key in entries if key not in found]
    if scorer.remember and missing and found:
        scorer.remember(list(found.values()))
    starts = range(0, len(missing), scorer.at_once)
    for start in progress_bar(starts, desc=scorer.title, disable=not missing or quiet()):
        batch = missing[start : start + scorer.at_once]
        new = dict(zip(batch, _by_output(scorer, scorer.score(*inputs(batch)), len(batch)), strict=True))
        if scorer.identity is not None:
            ledger.add({entries[key]: scores for key, scores in new.items()})
        found |= new
    scorer.release()  # the next scorer's model may need its memory
    return found


def write_results(folder: Path, rows: Sequence[Mapping], summary: Mapping) -> None:
    """Write results.jsonl and summary.json, on one process; the others wait."""
    state = processes()
    if state.is_main_process:
        with reporting_write_errors(folder):
            write_atomically(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            write_atomically(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    state.wait_for_everyone()


def _by_output(scorer: Scorer, values: Any, count: int) -> list[Scores]:
    """A scorer's values as one mapping per output; the part of a lone number is ''."""
    parts = values if isinstance(values, Mapping) else {"": values}
    for part, numbers in parts.items():
        if np.shape(numbers) != (count,):
            raise ValueError(
                f"the scorer {scorer.name} gave {np.shape(numbers)} for {part or 'its score'}, not ({count},)"
            )
    return [{part: _plain(scorer, numbers[i]) for part, numbers in parts.items()} for i in range(count)]


def _plain(scorer: Scorer, value: Any) -> float | bool | None:
    """A score as Python's own number; None where a reply could not be read."""
    plain = value.item() if isinstance(value, np.generic) else value
    if plain is not None and not isfinite(plain):
        raise InputError(f"the scorer {scorer.name} gave {plain}, which is no score: it failed on an output")
    return plain
