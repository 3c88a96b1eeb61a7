"""A table of scores -> means of every system, and every system compared with the first."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from prefopt.evaluation.stats import paired_bootstrap, rows_for_power, win_rate
from prefopt.runs import versions

POWER = 0.8


def summarise(
    rows: Sequence[Mapping],
    systems: Mapping[str, Mapping],
    metrics: Mapping[str, Mapping[str, Any]],
    tie: float,
) -> dict:
    """The content of summary.json.

    `rows` are results.jsonl's (system, prompt, seed, scores); every system holds the same (prompt, seed) in
    the same order. `metrics` says of each metric its title, its kind (score, proportion, loss) and whether it
    is a headline. Intervals resample prompts; power counts prompts, each with these seeds.
    """
    names = list(systems)
    table = {name: [row for row in rows if row["system"] == name] for name in names}
    prompts = [row["prompt"] for row in table[names[0]]]
    scores = {
        name: {
            metric: np.array([row["scores"][metric] for row in table[name]], dtype=np.float64)
            for metric in metrics
        }
        for name in names
    }
    return {
        "versions": versions(),
        "settings": {
            **_shared([system["settings"] for system in systems.values()]),
            "tie": tie,
            "power": POWER,
        },
        "prompts": len(set(prompts)),
        "seeds": sorted({row["seed"] for row in rows}),
        "metrics": {metric: dict(told) for metric, told in metrics.items()},
        "systems": {
            name: {
                **systems[name],
                "means": {metric: float(values.mean()) for metric, values in scores[name].items()},
            }
            for name in names
        },
        "contrasts": [
            {
                "system": name,
                "against": names[0],
                "metrics": {
                    metric: contrast(
                        scores[name][metric], scores[names[0]][metric], prompts, tie, told["kind"]
                    )
                    for metric, told in metrics.items()
                },
            }
            for name in names[1:]
        ],
    }


def contrast(
    system: np.ndarray, against: np.ndarray, prompts: Sequence[str], tie: float, kind: str = "score"
) -> dict:
    """One metric of two systems, rows paired: means, difference, wins, and the prompts a claim would need.

    `better` is 1 if a positive difference is a gain, -1 if it is a loss.
    """
    ids = np.unique(np.asarray(prompts), return_inverse=True)[1]
    by_prompt = np.bincount(ids, weights=system - against) / np.bincount(ids)
    better = -1 if kind == "loss" else 1
    return {
        "mean": float(system.mean()),
        "mean_against": float(against.mean()),
        "better": better,
        "difference": asdict(paired_bootstrap(system, against, groups=ids)),
        "wins": asdict(win_rate(better * system, better * against, tie)),
        "prompts_for_power": rows_for_power(by_prompt, POWER),
    }


def _shared(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that all systems have in common."""
    return {name: value for name, value in settings[0].items() if all(s[name] == value for s in settings)}
