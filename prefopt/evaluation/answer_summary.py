"""Answers with their scores -> a figure of every system and metric, and every two systems compared."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from prefopt.evaluation.answer_scorers import PREFERENCE, corpus_bleu
from prefopt.evaluation.stats import holm
from prefopt.evaluation.summary import POWER, contrast, mean, unread
from prefopt.runs import versions

LOSS: dict[str, dict[str, Any]] = {
    "loss": {
        "title": "test loss",
        "about": "the mean of -log p over the tokens of all reference answers, in nats: how unlikely they "
        "are to the model.",
        "kind": "loss",
        "scorer": "loss",
        "part": "",
        "is_headline": True,
        "is_truth": False,
    }
}
BLEU: dict[str, dict[str, Any]] = {
    "bleu": {
        "title": "BLEU",
        "about": "how many of the word sequences of all answers together are those of their references, 0 to "
        "100. It has no value for a single answer: systems are compared by sentence BLEU.",
        "kind": "score",
        "scorer": "bleu",
        "part": "",
        "is_headline": False,
        "is_truth": False,
    }
}


def summarise_answers(
    rows: Sequence[Mapping],
    systems: Mapping[str, Mapping],
    metrics: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    tie: float,
) -> dict:
    """The content of summary.json.

    `rows` are results.jsonl's: system, group, reference, answer, reference_tokens, finished, scores; every
    system holds the same questions in the same order. `metrics` says of each score its title, its kind and
    whether it is a headline. Questions of one group (about one image) are one witness: intervals resample
    groups, p and power count them. The loss is weighted by the tokens of the references.

    `contrasts` compare each system with the first, `further` every other two. Over all of these, the p of
    each headline, and of each scorer's parts together, are corrected for their number (Holm).
    """
    table = {name: [row for row in rows if row["system"] == name] for name in systems}
    scores = {name: _scores(of_one, metrics) for name, of_one in table.items()}
    first, *_ = table
    groups = [row["group"] for row in table[first]]
    tokens = np.array([row["reference_tokens"] for row in table[first]], dtype=np.float64)

    def compared(name: str, against: str) -> dict:
        found = {}
        for metric, told in metrics.items():
            ours, theirs = scores[name][metric], scores[against][metric]
            if metric == PREFERENCE:
                if against != first:
                    continue
                theirs = 1 - ours
            weights = tokens if metric in LOSS else None
            if entry := contrast(ours, theirs, groups, tie, told["kind"], weights):
                found[metric] = entry
        return {"system": name, "against": against, "metrics": found}

    pairs = [compared(name, against) for against, name in combinations(systems, 2)]
    _correct(pairs, metrics)
    # The first system's answers are compared with none.
    own = scores | {first: {metric: scores[first][metric] for metric in metrics if metric != PREFERENCE}}
    bleu = {name: corpus_bleu(*_texts(of_one)) for name, of_one in table.items()}
    return {
        "versions": versions(),
        "settings": {**settings, "tie": tie, "power": POWER, "bleu": bleu[first][1]},
        "rows": len(groups),
        "groups": len(set(groups)),  # that are resampled
        "metrics": {**LOSS, **BLEU, **{metric: dict(told) for metric, told in metrics.items()}},
        "systems": {
            name: {
                **systems[name],
                "means": _means(own[name], tokens) | {"bleu": bleu[name][0]},
                "unread": unread(own[name]),
                **_facts(table[name], table[first]),
            }
            for name in systems
        },
        "contrasts": [pair for pair in pairs if pair["against"] == first],
        "further": [pair for pair in pairs if pair["against"] != first],
    }


def _means(scores: Mapping[str, np.ndarray], tokens: np.ndarray) -> dict[str, float | None]:
    return {metric: mean(values, tokens if metric in LOSS else None) for metric, values in scores.items()}


def _scores(rows: Sequence[Mapping], metrics: Mapping[str, Mapping]) -> dict[str, np.ndarray]:
    """Of each metric (rows,), nan where there is none."""
    return {
        metric: np.array([row["scores"].get(metric) for row in rows], dtype=np.float64) for metric in metrics
    }


def _texts(rows: Sequence[Mapping]) -> tuple[list[str], list[str]]:
    return [row["answer"] for row in rows], [row["reference"] for row in rows]


def _correct(pairs: Sequence[Mapping], metrics: Mapping[str, Mapping]) -> None:
    """Holm's correction over the pairs of systems, of each headline, and of a scorer's parts together."""
    families: dict[tuple[str, bool], list[dict]] = {}
    for pair in pairs:
        for metric, entry in pair["metrics"].items():
            told = metrics[metric]
            families.setdefault((told["scorer"], told["is_headline"]), []).append(entry)
    for entries in families.values():
        for entry, p in zip(entries, holm([entry["p"] for entry in entries]), strict=True):
            entry["p_holm"] = p


def _facts(rows: Sequence[Mapping], first: Sequence[Mapping]) -> dict[str, Any]:
    """What else is to be known of a system's answers."""
    facts: dict[str, Any] = {
        "words": float(np.mean([len(row["answer"].split()) for row in rows])),
        "unfinished": sum(not row["finished"] for row in rows),
        "empty": sum(not row["answer"] for row in rows),
    }
    asked = [
        row["consistent"]
        for row, other in zip(rows, first, strict=True)
        if row.get("consistent") is not None and row["answer"] != other["answer"]
    ]
    if asked:
        facts["consistent"] = float(np.mean(asked))
    longer = [
        len(row["answer"]) > len(other["answer"])
        if row["scores"][PREFERENCE]
        else len(row["answer"]) < len(other["answer"])
        for row, other in zip(rows, first, strict=True)
        if row["scores"].get(PREFERENCE) in (0, 1)
    ]
    if longer:
        facts["preferred_longer"] = float(np.mean(longer))
    return facts
