"""A table of scores -> means of every system, and every system compared with the first."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from prefopt.evaluation.stats import (
    best_elsewhere,
    by_group,
    holm,
    p_value,
    paired_bootstrap,
    rows_for_power,
    win_rate,
)
from prefopt.evaluation.votes import Ballot, tally
from prefopt.runs import versions

POWER = 0.8


def summarise(
    rows: Sequence[Mapping],
    systems: Mapping[str, Mapping],
    metrics: Mapping[str, Mapping[str, Any]],
    tie: float,
    groups: Mapping[str, str] | None = None,
    ballots: Sequence[Ballot] = (),
) -> dict:
    """The content of summary.json.

    `rows` are results.jsonl's (system, prompt, seed, scores); every system holds the same (prompt, seed) in
    the same order. `groups` names of each prompt what it asks for, where several ask for the same: together
    they are one witness. `systems` says of each its settings, and of which `family` it is a variant: the same
    weights at another guidance or LoRA scale. `metrics` says of each metric its title, its kind (score,
    proportion, loss) and whether it is a headline. Intervals resample prompts; power counts prompts, each
    with these seeds. A score of None is one that could not be read: it is counted, and left out.

    `contrasts` compare each system with the first family's variant of the same settings, or with the first
    system. Where families have several variants, `best` compares every two families, each at the variant that
    is best on other prompts; where they have one, `further` compares every other two systems. `votes` is what
    people voted, None without `ballots`.
    """
    names = list(systems)
    table = {name: [row for row in rows if row["system"] == name] for name in names}
    texts: list[str] = [row["prompt"] for row in table[names[0]]]
    same = groups or {}
    prompts = [same.get(text, text) for text in texts]
    scores = {
        name: {
            metric: np.array([row["scores"][metric] for row in table[name]], dtype=np.float64)
            for metric in metrics
        }
        for name in names
    }

    def compared(name: str, against: str) -> dict:
        found = _contrasts(scores[name], scores[against], prompts, tie, metrics)
        return {"system": name, "against": against, "metrics": found}

    best = _best(systems, scores, prompts, tie, metrics)
    return {
        "versions": versions(),
        "settings": {
            **_shared([system["settings"] for system in systems.values()]),
            "tie": tie,
            "power": POWER,
        },
        "prompts": len(set(texts)),
        "groups": len(set(prompts)),  # that are resampled
        "seeds": len(texts) // len(set(texts)),  # of each prompt
        "metrics": {metric: dict(told) for metric, told in metrics.items()},
        "systems": {name: {**systems[name], **_means(scores[name])} for name in names},
        "contrasts": [compared(name, against) for name, against in _opponents(systems).items()],
        "further": [] if best else [compared(name, against) for against, name in combinations(names[1:], 2)],
        "best": best,
        "votes": tally(ballots, rows, metrics, tie, same) if ballots else None,
    }


def _means(scores: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """A system's means by metric, and how many scores could not be read."""
    means = {metric: mean(values) for metric, values in scores.items()}
    return {"means": means, "unread": unread(scores)}


def headlines(summary: Mapping) -> dict[str, dict]:
    """What the summary says of the metrics that stand for their scorers."""
    return {metric: told for metric, told in summary["metrics"].items() if told["is_headline"]}


def deciding_metric(metrics: Mapping[str, Mapping]) -> str:
    """The headline metric by which the best is chosen: the ground truth if there is one, else the first."""
    headline = [metric for metric, told in metrics.items() if told["is_headline"]]
    return next((metric for metric in headline if metrics[metric]["is_truth"]), headline[0])


def gaps_to_first(summary: Mapping) -> dict[str, Mapping]:
    """Each further system compared with the first, by metric."""
    return {contrast["system"]: contrast["metrics"] for contrast in summary["contrasts"]}


def _opponents(systems: Mapping[str, Mapping]) -> dict[str, str]:
    """What each system is compared with; the first family's own variants are compared with nothing."""
    first = next(iter(systems))
    base = {name: system for name, system in systems.items() if system["family"] == systems[first]["family"]}
    return {
        name: next((other for other in base if base[other]["settings"] == system["settings"]), first)
        for name, system in systems.items()
        if name not in base
    }


def _best(
    systems: Mapping[str, Mapping],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    prompts: Sequence[str],
    tie: float,
    metrics: Mapping[str, Mapping[str, Any]],
) -> dict | None:
    """Every two families, each at its best, those against the first first; None if none has several variants.

    What is best is chosen by the ground truth, where there is one, on other prompts than those of the row.
    """
    families: dict[str, list[str]] = {}
    for name, system in systems.items():
        families.setdefault(system["family"], []).append(name)
    if all(len(variants) == 1 for variants in families.values()):
        return None
    by = deciding_metric(metrics)
    better = -1 if metrics[by]["kind"] == "loss" else 1
    chosen, at_best = {}, {}
    for family, variants in families.items():
        places = best_elsewhere(better * np.stack([scores[name][by] for name in variants]), prompts)
        chosen[family] = {
            name: round(float((places == i).mean()), 4)
            for i, name in enumerate(variants)
            if (places == i).any()
        }
        at_best[family] = {
            metric: np.stack([scores[name][metric] for name in variants])[places, np.arange(len(prompts))]
            for metric in metrics
        }
    return {
        "chosen_by": by,
        "chosen": chosen,  # family -> its variants, with the share of rows at which each was chosen
        "at_edge": [family for family in families if _is_at_edge(systems, families[family], chosen[family])],
        "contrasts": [
            {
                "system": family,
                "against": against,
                "metrics": _contrasts(at_best[family], at_best[against], prompts, tie, metrics),
            }
            for against, family in combinations(families, 2)
        ],
    }


def _is_at_edge(systems: Mapping[str, Mapping], variants: Sequence[str], chosen: Mapping[str, float]) -> bool:
    """Whether a family's best is the least or the most guidance of its sweep."""
    guidance = {name: systems[name]["settings"].get("guidance_scale") for name in variants}
    ends = {min(guidance.values()), max(guidance.values())} if len(set(guidance.values())) > 1 else set()
    return guidance[max(chosen, key=lambda name: chosen[name])] in ends


def _contrasts(
    system: Mapping[str, np.ndarray],
    against: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    tie: float,
    metrics: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict]:
    """Every metric of two systems; the p values of a scorer's parts are corrected for their number."""
    found = {
        metric: entry
        for metric, told in metrics.items()
        if (entry := contrast(system[metric], against[metric], prompts, tie, told["kind"])) is not None
    }
    for scorer in {told["scorer"] for told in metrics.values()}:
        parts = [m for m in found if metrics[m]["scorer"] == scorer and not metrics[m]["is_headline"]]
        for metric, p in zip(parts, holm([found[metric]["p"] for metric in parts]), strict=True):
            found[metric]["p_holm"] = p
    return found


def contrast(
    system: np.ndarray,
    against: np.ndarray,
    groups: Sequence[str],
    tie: float,
    kind: str = "score",
    weights: np.ndarray | None = None,
) -> dict | None:
    """One metric of two systems, rows paired: means, difference, wins, and the groups a claim would need.

    `better` is 1 if a positive difference is a gain, -1 if it is a loss. Rows without a score (nan) on a side
    are left out; None if those that are left are of fewer than two groups. `weights` are those of the means,
    such as the tokens of each row.
    """
    read = np.isfinite(system) & np.isfinite(against)
    ids = np.unique(np.asarray(groups)[read], return_inverse=True)[1]
    if len(set(ids.tolist())) < 2:
        return None
    system, against, weights = system[read], against[read], None if weights is None else weights[read]
    witnesses = by_group(system - against, ids, weights)
    better = -1 if kind == "loss" else 1
    return {
        "mean": mean(system, weights),
        "mean_against": mean(against, weights),
        "better": better,
        "difference": asdict(paired_bootstrap(system, against, groups=ids, weights=weights)),
        "p": p_value(witnesses),
        "wins": asdict(win_rate(better * system, better * against, tie)),
        "groups_for_power": rows_for_power(witnesses, POWER),
    }


def mean(values: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """The (weighted) mean of the scores that are there; None if there are none."""
    read = np.isfinite(values)
    if not read.any():
        return None
    return float(np.average(values[read], weights=None if weights is None else weights[read]))


def unread(scores: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many scores of each metric are missing, of metrics that miss some."""
    counts = {metric: int((~np.isfinite(values)).sum()) for metric, values in scores.items()}
    return {metric: count for metric, count in counts.items() if count}


def _shared(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that all systems have in common."""
    return {name: value for name, value in settings[0].items() if all(s[name] == value for s in settings)}
