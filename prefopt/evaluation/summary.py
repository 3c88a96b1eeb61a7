"""A table of scores -> means of every system, and every system set against the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from prefopt.evaluation.stats import paired_bootstrap, rows_for_power, win_rate
from prefopt.runs import versions

POWER = 0.8


def summarise(
    rows: Sequence[Mapping], systems: Mapping[str, Mapping], settings: Mapping[str, object], tie: float
) -> dict:
    """The content of summary.json.

    `rows` are results.jsonl's (system, prompt, seed, scores); every system holds the same (prompt, seed) in
    the same order. A metric of booleans is a proportion, in 0..1. Intervals resample prompts; power counts
    prompts, each with these seeds.
    """
    names = list(systems)
    table = {name: [row for row in rows if row["system"] == name] for name in names}
    prompts = [row["prompt"] for row in table[names[0]]]
    proportions = {metric: isinstance(score, bool) for metric, score in table[names[0]][0]["scores"].items()}
    scores = {
        name: {
            metric: np.array([row["scores"][metric] for row in table[name]], dtype=np.float64)
            for metric in proportions
        }
        for name in names
    }
    return {
        "versions": versions(),
        "settings": {**settings, "tie": tie, "power": POWER},
        "prompts": len(set(prompts)),
        "seeds": sorted({row["seed"] for row in rows}),
        "metrics": {
            metric: "proportion" if is_proportion else "score"
            for metric, is_proportion in proportions.items()
        },
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
                    metric: contrast(scores[name][metric], scores[names[0]][metric], prompts, tie)
                    for metric in proportions
                },
            }
            for name in names[1:]
        ],
    }


def contrast(system: np.ndarray, against: np.ndarray, prompts: Sequence[str], tie: float) -> dict:
    """One metric of two systems, rows paired: means, difference, wins, and the prompts a claim would need."""
    ids = np.unique(np.asarray(prompts), return_inverse=True)[1]
    by_prompt = np.bincount(ids, weights=system - against) / np.bincount(ids)
    return {
        "mean": float(system.mean()),
        "mean_against": float(against.mean()),
        "difference": asdict(paired_bootstrap(system, against, groups=ids)),
        "wins": asdict(win_rate(system, against, tie)),
        "prompts_for_power": rows_for_power(by_prompt, POWER),
    }
