"""People's blind votes between two systems' images: read, checked, and compared with what scorers prefer.

The page blind.html writes them as votes.json:

    {"ballot": "<id>",
     "comparison": {"base": "<identity>", "dpo": "<identity>"},
     "votes": [{"systems": ["base", "dpo"], "prompt": "a red lion", "seed": 3, "winner": "dpo"}]}

A `winner` of null is a tie. A ballot's id is random, and the same in all files of one person's votes; a file
written by hand needs none. A system's identity is a hash of its weights and sampler, so votes stay valid when
a comparison gets more systems, prompts or scorers.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefopt.errors import InputError
from prefopt.evaluation.stats import paired_bootstrap, signs_of
from prefopt.files import content_key

_OF_A_VOTE = {"systems", "prompt", "seed", "winner"}


class Vote(NamedTuple):
    """Which of two systems' images of a prompt and a seed a person prefers."""

    systems: tuple[str, str]
    prompt: str
    seed: int
    winner: str | None  # one of the systems; None: a tie


class Ballot(NamedTuple):
    """The votes of a file, which are those of a person."""

    file: str
    identities: dict[str, str]  # of the systems that the page showed
    votes: list[Vote]
    id: str | None = None  # random, of the page; None in a file written by hand


def system_identity(system: Mapping[str, Any]) -> str:
    """The hash of a system's weights and sampler, of its entry in summary.json."""
    return content_key(json.dumps([system["identity"], system["settings"]]))


# Reading


def read_votes(paths: Sequence[str | Path]) -> list[Ballot]:
    """The ballots of the files; what is not as blind.html writes it is an InputError that names the entry."""
    ballots = [_read(Path(path)) for path in paths]
    for one, other in combinations(ballots, 2):
        same_file = Path(one.file).resolve() == Path(other.file).resolve()
        if same_file or (one.id is not None and one.id == other.id):
            raise InputError(
                f"--votes: {one.file} and {other.file} are of the same person; name one file for each"
            )
    return ballots


def _read(path: Path) -> Ballot:
    if not path.is_file():
        raise InputError(f"--votes: there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}; name what blind.html downloaded") from error
    if not isinstance(content, dict) or content.keys() - {"ballot"} != {"comparison", "votes"}:
        raise InputError(
            f"{path} needs the keys `comparison` and `votes`, may have `ballot`, and no other; name what "
            "blind.html downloaded"
        )
    identities, entries, ballot = content["comparison"], content["votes"], content.get("ballot")
    if "ballot" in content and not (isinstance(ballot, str) and ballot):
        raise InputError(f"{path}: `ballot` is {ballot!r}, not an id; leave it out of a file written by hand")
    if not isinstance(identities, dict) or not all(isinstance(value, str) for value in identities.values()):
        raise InputError(f"{path}: `comparison` is not an object of the systems' identities")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} holds no votes; `votes` is a list of them")
    votes: dict[tuple, int] = {}
    found = []
    for number, entry in enumerate(entries, start=1):
        vote = _vote(entry, identities, f"{path}: vote {number}")
        key = (frozenset(vote.systems), vote.prompt, vote.seed)
        if key in votes:
            raise InputError(f"{path}: vote {number} is about the same images as vote {votes[key]}")
        votes[key] = number
        found.append(vote)
    return Ballot(str(path), identities, found, ballot)


def _vote(entry: Any, identities: Mapping[str, str], where: str) -> Vote:
    if not isinstance(entry, dict) or entry.keys() != _OF_A_VOTE:
        raise InputError(f"{where} needs the keys {', '.join(sorted(_OF_A_VOTE))}, and no other")
    systems, prompt, seed, winner = (entry[name] for name in ("systems", "prompt", "seed", "winner"))
    named = isinstance(systems, list) and all(isinstance(name, str) for name in systems)
    if not named or len(systems) != 2 or systems[0] == systems[1]:
        raise InputError(f"{where}: `systems` is {systems!r}, not the names of two systems")
    for name in systems:
        if name not in identities:
            raise InputError(f"{where}: the file's `comparison` has no system {name!r}")
    if not isinstance(prompt, str):
        raise InputError(f"{where}: `prompt` is {prompt!r}, not a text")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"{where}: `seed` is {seed!r}, not a whole number")
    if winner is not None and winner not in systems:
        raise InputError(f"{where}: `winner` is {winner!r}, not one of {systems} or null for a tie")
    return Vote((systems[0], systems[1]), prompt, seed, winner)


def check_votes(
    ballots: Sequence[Ballot], identities: Mapping[str, str], images: Collection[tuple[str, str, int]]
) -> None:
    """InputError unless all votes are about images (system, prompt, seed) of the comparison."""
    prompts = {prompt for _, prompt, _ in images}
    for ballot in ballots:
        for number, vote in enumerate(ballot.votes, start=1):
            where = f"{ballot.file}: vote {number}"
            for name in vote.systems:
                if name not in identities:
                    raise InputError(
                        f"{where} is about the system {name!r}; this comparison has "
                        f"{', '.join(identities)}; repeat the command that was voted on, with the same "
                        "--systems, --guidance_scales and --lora_scales"
                    )
                if ballot.identities[name] != identities[name]:
                    raise InputError(
                        f"{where} is of another comparison, whose system {name!r} has other weights or "
                        f"another sampler: {ballot.identities[name][:12]} (votes), {identities[name][:12]} "
                        "(this comparison)"
                    )
                if vote.prompt not in prompts:
                    raise InputError(f"{where} is about the prompt {vote.prompt!r}, which is not compared")
                if (name, vote.prompt, vote.seed) not in images:
                    raise InputError(
                        f"{where} is about seed {vote.seed}, which the prompt {vote.prompt!r} does not have"
                    )


# Counting


def tally(
    ballots: Sequence[Ballot],
    rows: Sequence[Mapping],
    metrics: Mapping[str, Mapping[str, Any]],
    tie: float,
    groups: Mapping[str, str],
) -> dict:
    """What people voted, and how often each headline metric prefers the same image: for summary.json.

    A tie counts one half in a system's `share`. `agreement` leaves out votes that are ties, and those at
    which the metric's scores differ by at most `tie` or one is missing (`undecided`). Intervals resample
    groups of prompts; they are None if there are fewer than two.
    """
    scores = {(row["system"], row["prompt"], row["seed"]): row["scores"] for row in rows}
    place = {name: i for i, name in enumerate(dict.fromkeys(row["system"] for row in rows))}
    pairs: dict[tuple[str, str], list[Vote]] = {}
    for vote in (vote for ballot in ballots for vote in ballot.votes):
        against, system = sorted(vote.systems, key=place.__getitem__)
        pairs.setdefault((system, against), []).append(vote)

    found = []
    for (system, against), votes in pairs.items():
        outcomes = np.array([{system: 1.0, None: 0.5, against: 0.0}[vote.winner] for vote in votes])
        found.append(
            {
                "system": system,
                "against": against,
                "wins": int((outcomes == 1).sum()),
                "ties": int((outcomes == 0.5).sum()),
                "losses": int((outcomes == 0).sum()),
                **_share(outcomes, votes, groups),
            }
        )
    decided = [vote for votes in pairs.values() for vote in votes if vote.winner is not None]
    agreement = {}
    for metric, told in metrics.items():
        if told["is_headline"]:
            gaps = np.array([_gap(vote, metric, scores) for vote in decided], dtype=np.float64)
            signs = signs_of(gaps, tie) * (-1 if told["kind"] == "loss" else 1)
            clear = [vote for vote, sign in zip(decided, signs, strict=True) if sign]
            share = _share(signs[signs != 0] > 0, clear, groups)
            agreement[metric] = share | {"undecided": len(decided) - len(clear)}
    return {
        "people": [{"file": Path(ballot.file).name, "votes": len(ballot.votes)} for ballot in ballots],
        "pairs": found,
        "agreement": agreement,
    }


def _gap(vote: Vote, metric: str, scores: Mapping[tuple, Mapping]) -> float:
    """The score of a vote's winner less that of its loser; 0 if one could not be read."""
    loser = next(name for name in vote.systems if name != vote.winner)
    won, lost = (scores[name, vote.prompt, vote.seed][metric] for name in (vote.winner, loser))
    return 0.0 if won is None or lost is None else float(won) - float(lost)


def _share(outcomes: np.ndarray, votes: Sequence[Vote], groups: Mapping[str, str]) -> dict[str, Any]:
    """The mean of outcomes in 0..1, how many they are and of how many groups, and an interval."""
    of = [groups.get(vote.prompt, vote.prompt) for vote in votes]
    found: dict[str, Any] = {"votes": len(votes), "groups": len(set(of))}
    if found["groups"] < 2:
        return found | {"share": float(np.mean(outcomes)) if votes else None, "low": None, "high": None}
    interval = paired_bootstrap(outcomes, np.zeros(len(outcomes)), of)
    return found | {"share": interval.mean, "low": interval.low, "high": interval.high}
