"""Try what users can get wrong, hundreds of inputs, and count how each ends.

    python scripts/trust/campaign.py
    python scripts/trust/campaign.py --only flags readers --sample 50

Each input ends in a clear error (one message that names what is wrong and says what to do, exit code 2), or
is accepted by a stated rule. Everything else is a fault: a traceback, more than a minute or 4 GB, a message
that does not name what is wrong, a result that is silently wrong, a valid input refused. Faults are printed
in full, and the exit code is 1. The tables are in inputs/; --sample takes as many of each as it says, by
--seed.
"""

# ruff: noqa: E402 (the environment comes first)

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests" / "helpers")]
# Before any library reads them: no network, no second thread in a process that forks.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1", MPLBACKEND="Agg")
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")

from trial import FAULTS, Outcome, Trial, run_trials, table
from world import World, make_world

TABLES = tuple(path.stem for path in sorted((HERE / "inputs").glob("[!_]*.py")))
# Imported before the forks.
LIBRARIES = (
    "prefopt",
    "bitsandbytes",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "peft",
    "prefopt.cli",
    "prefopt.diffusion.training",
    "prefopt.trainer",
    "prefopt.vlm.training",
)


def trials_of(name: str, world: World) -> list[Trial]:
    """The trials of a table, in its order; two of one name are an error."""
    trials: Callable[[World], Iterator[Trial]] = import_module(f"inputs.{name}").trials
    found = list(trials(world))
    twice = [name for name, count in Counter(trial.name for trial in found).items() if count > 1]
    if twice:
        raise ValueError(f"inputs/{name}.py names two trials {twice[0]!r}")
    return found


def campaign(
    names: tuple[str, ...], folder: Path, *, sample: int | None, seed: int, processes: int
) -> dict[str, list[Outcome]]:
    """The outcomes of each table; faults are printed as they are found."""
    for library in LIBRARIES:
        import_module(library)
    world, outcomes = make_world(folder / "world"), dict[str, list[Outcome]]()
    for name in names:
        trials = trials_of(name, world)
        if sample is not None and sample < len(trials):
            trials = random.Random(f"{seed} {name}").sample(trials, sample)
        outcomes[name] = []
        for outcome in run_trials(trials, folder / name, processes):
            outcomes[name].append(outcome)
            if outcome.ending in FAULTS:
                print(f"{name}: {outcome.trial}: {outcome.ending}\n{outcome.printed}\n", flush=True)
    return outcomes


def main() -> int:
    """The command line; 1 if there are faults."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    options.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="tables of inputs")
    options.add_argument("--sample", type=int, help="how many of each table (default: all)")
    options.add_argument("--seed", type=int, default=0, help="of the sample")
    options.add_argument("--processes", type=int, default=2, help="trials at a time")
    options.add_argument("--json", type=Path, help="a file to write the counts to")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="prefopt-trust-") as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/datasets"
        outcomes = campaign(
            tuple(given.only), Path(folder), sample=given.sample, seed=given.seed, processes=given.processes
        )
    rows = table(outcomes)
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in rows[0]}
    for row in [{name: name for name in widths}, *rows]:
        print("  ".join(str(row[name]).rjust(width) for name, width in widths.items()))
    if given.json:
        from prefopt.runs import versions

        given.json.write_text(json.dumps({"tables": rows, "versions": versions()}, indent=2) + "\n")
    return int(any(rows[-1][fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
