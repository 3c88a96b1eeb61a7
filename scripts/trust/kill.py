"""Kill every recipe and builder with `kill -9`, run the same command again, and compare the results.

    python scripts/trust/kill.py
    python scripts/trust/kill.py --only diffusion_dpo self_rewarding --rounds 6 --seed 1

Each program runs once undisturbed, at its smallest size on the pocket. Then the same command is killed at
changes of its output folder that the seed chooses, before one or in the middle of a write, up to --most times
in a row, and runs to its end. Its results have to be bit-identical but for times, with nothing left over; no
result of a model may be kept twice, and no call made twice unless it was not finished. The exit code is 1 if
any of this fails.
"""

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from faults import KILL, TEAR, Plan, planning
from smallest import PROGRAMS, Workplace, check_complete, contents, differing

KILLED = -9


@dataclass
class Round:
    """One program, killed and run to its end."""

    program: str
    moments: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)  # files
    kept_twice: int = 0  # results of models
    repeated_calls: int = 0  # of those that were finished
    error: str = ""  # of the run that had to end well

    @property
    def holds(self) -> bool:
        return not (self.differing or self.kept_twice or self.repeated_calls or self.error)


def killed_round(place: Workplace, plan: Plan, name: str, chance: random.Random, most: int) -> Round:
    """Kill a program up to `most` times in a row, let it end, and compare it with the undisturbed run."""
    found, runs = Round(name), []
    whole, calls, changes = undisturbed(place, plan, name)
    place.empty(name)
    left = changes
    for _ in range(chance.randint(1, most)):
        at = chance.randint(1, max(1, left))
        plan.arm(place.run(name), chance.choice((KILL, TEAR)), at)
        running = place.launch(name)
        code = running.wait(900)
        runs.append(place.happened())
        if not plan.hit:  # the rerun had less to do than this
            break
        assert code == KILLED, f"{name} ended with {code}:\n{running.text()}"
        found.moments.append(plan.moment(place.run(name)))
        left -= at
    plan.disarm()
    running = place.launch(name)
    if running.wait(900):
        found.error = running.text()[-3000:]
        return found
    runs.append(place.happened())
    kept = Counter(key for run in runs for event in run for key in event.get("kept", ()))
    found.kept_twice = sum(count > 1 for count in kept.values())
    made = sum(event.get("calls", 0) for run in runs for event in run)
    found.repeated_calls = max(0, made - sum(map(unfinished, runs[:-1])) - calls)
    found.differing = differing(whole, contents(place.run(name)))
    return found


def undisturbed(place: Workplace, plan: Plan, name: str) -> tuple[dict[str, str], int, int]:
    """Of a program's whole run: its files, the calls of models that it makes, the changes of its folder."""
    facts = place.whole / f"{name}.json"
    if not facts.exists():
        for source in place.sources(name):
            undisturbed(place, plan, source)
        plan.arm(place.run(name))
        folder = place.make_whole(name)
        calls = sum(event.get("calls", 0) for event in place.happened())
        facts.write_text(json.dumps([contents(folder), calls, plan.calls]))
    return json.loads(facts.read_text())


def unfinished(run: list[dict[str, Any]]) -> int:
    """The calls of a killed run after the last result that it kept."""
    last = max((place for place, event in enumerate(run) if "kept" in event), default=-1)
    return sum(event.get("calls", 0) for event in run[last + 1 :])


def table(rounds: list[Round]) -> str:
    """A line for each round, and what went wrong."""
    lines = [f"{'program':22} kills  identical  kept twice  calls repeated  moments"]
    for one in rounds:
        same = "no" if one.differing or one.error else "yes"
        counts = f"{one.kept_twice:10}  {one.repeated_calls:14}"
        lines.append(f"{one.program:22} {len(one.moments):5}  {same:>9}  {counts}  {'; '.join(one.moments)}")
        lines += [f"    differs: {', '.join(one.differing)}"] if one.differing else []
        lines += [f"    {one.error}"] if one.error else []
    kills = sum(len(one.moments) for one in rounds)
    bad = sum(not one.holds for one in rounds)
    programs = len({one.program for one in rounds})
    return "\n".join(
        [*lines, f"{kills} kills of {programs} programs in {len(rounds)} rounds: {bad} at fault"]
    )


def main() -> int:
    """The command line; 1 if a round is at fault."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    options.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="programs")
    options.add_argument("--rounds", type=int, default=20, help="at least one for each program")
    options.add_argument("--most", type=int, default=3, help="kills of a round")
    options.add_argument("--seed", type=int, default=0, help="of the moments")
    options.add_argument("--folder", type=Path, help="where programs run and what is whole stays")
    options.add_argument("--json", type=Path, help="a file to write the rounds to")
    given = options.parse_args()
    check_complete()
    from prefopt.runs import versions

    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="prefopt-kill-") as folder, planning(Path(folder)) as plan:
        place = Workplace(given.folder or Path(folder))
        for number in range(max(given.rounds, len(given.only))):
            name = given.only[number % len(given.only)]
            chance = random.Random(f"{given.seed} {number} {name}")
            rounds.append(killed_round(place, plan, name, chance, given.most))
            print(*table(rounds[-1:]).splitlines()[1:-1], sep="\n", flush=True)
            if given.json:
                facts = {
                    "seed": given.seed,
                    "rounds": [asdict(one) for one in rounds],
                    "versions": versions(),
                }
                given.json.write_text(json.dumps(facts, indent=2) + "\n")
    print(table(rounds))
    return int(not all(one.holds for one in rounds))


if __name__ == "__main__":
    sys.exit(main())
