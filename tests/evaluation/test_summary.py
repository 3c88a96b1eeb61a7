"""From a table of scores to means and contrasts: systems at equal settings, and each at its best."""

import numpy as np
import pytest

from prefopt.evaluation import words
from prefopt.evaluation.summary import summarise

TRUTH = {
    "oracle/all": {"title": "oracle", "kind": "proportion", "scorer": "oracle", "part": "all"},
    "oracle/place": {"title": "oracle: place", "kind": "proportion", "scorer": "oracle", "part": "place"},
}
for _metric, _told in TRUTH.items():
    _told |= {"is_headline": _metric == "oracle/all", "is_truth": True, "about": "what is right"}


def swept(curves: dict, prompts: int = 120) -> dict:
    """The summary of families that are right as often as their curves say at each guidance."""
    rng = np.random.default_rng(0)
    luck = rng.random((prompts, 2))  # a prompt is as hard for each
    systems, rows = {}, []
    for family, rates in curves.items():
        for guidance, rate in rates.items():
            name = f"{family}, guidance {guidance:g}"
            settings = {"guidance_scale": guidance, "dtype": "float32"}
            systems[name] = {"name": name, "family": family, "settings": settings}
            for i in range(prompts):
                for seed in range(2):
                    right = bool(luck[i, seed] + rng.normal(0, 0.05) < rate)
                    scores = {"oracle/all": right, "oracle/place": right or i % 2 == 0}
                    rows.append({"system": name, "prompt": f"prompt {i}", "seed": seed, "scores": scores})
    return summarise(rows, systems, TRUTH, 0.0)


def test_a_base_under_more_guidance_gains_nothing():
    """Guards: a trained model that is the base at twice the guidance, and at 2 looks 20 points better."""
    curve = {1: 0.22, 2: 0.48, 3: 0.63, 4: 0.68, 4.5: 0.69, 6: 0.68, 9: 0.6, 12: 0.5}
    base = {g: curve[g] for g in (1, 2, 3, 4.5, 6)}
    trained = {g: curve[2 * g] for g in (1, 2, 3, 4.5, 6)}
    summary = swept({"base": base, "trained": trained})
    equal = {c["system"]: c for c in summary["contrasts"]}["trained, guidance 2"]
    assert equal["against"] == "base, guidance 2"
    assert equal["metrics"]["oracle/all"]["difference"]["low"] > 0.1
    [best] = summary["best"]["contrasts"]
    gap = best["metrics"]["oracle/all"]["difference"]
    assert gap["low"] <= 0 <= gap["high"] and abs(gap["mean"]) < 0.05
    assert words.verdict(best["metrics"]["oracle/all"], summary["prompts"]).startswith("No")
    assert set(summary["best"]["chosen"]["base"]) <= {"base, guidance 4.5", "base, guidance 6"}


def test_a_gain_at_each_ones_best_is_one_and_its_parts_are_corrected():
    summary = swept({"base": {2: 0.4, 4: 0.5}, "dpo": {2: 0.6, 4: 0.7}})
    [best] = summary["best"]["contrasts"]
    assert best["metrics"]["oracle/all"]["difference"]["mean"] == pytest.approx(0.2, abs=0.05)
    assert best["metrics"]["oracle/place"]["p_holm"] < 0.05 and "p_holm" not in best["metrics"]["oracle/all"]
    assert summary["best"]["chosen_by"] == "oracle/all"
    assert sum(summary["best"]["chosen"]["dpo"].values()) == pytest.approx(1, abs=1e-3)
    assert [c["against"] for c in summary["contrasts"]] == ["base, guidance 2", "base, guidance 4"]


def test_every_two_families_are_compared_each_at_its_best():
    summary = swept({"base": {2: 0.4, 4: 0.5}, "sft": {2: 0.6, 4: 0.5}, "dpo": {2: 0.6, 4: 0.9}})
    contrasts = summary["best"]["contrasts"]
    assert [(c["system"], c["against"]) for c in contrasts] == [
        ("sft", "base"),
        ("dpo", "base"),
        ("dpo", "sft"),
    ]
    assert contrasts[2]["metrics"]["oracle/all"]["difference"]["mean"] == pytest.approx(0.3, abs=0.05)


def test_prompts_that_ask_for_the_same_are_one_witness():
    """Or an interval over two wordings of each scene is too narrow by up to the square root of 2."""
    rng = np.random.default_rng(1)
    settings = {"guidance_scale": 2, "dtype": "float32"}
    systems = {n: {"name": n, "family": n, "settings": settings} for n in ("base", "dpo")}
    gains = rng.integers(0, 2, 60)  # of a scene, however it is worded
    prompts = [(f"scene {i}, wording {j}", i) for j in range(2) for i in range(60)]
    rows = [
        {"system": n, "prompt": text, "seed": 0, "scores": {"oracle/all": bool(n == "dpo" and gains[i])}}
        for n in systems
        for text, i in prompts
    ]
    metrics = {"oracle/all": TRUTH["oracle/all"]}
    scenes = {text: f"scene {i}" for text, i in prompts}
    widths = []
    for groups in (None, scenes):
        found = summarise(rows, systems, metrics, 0.0, groups)
        gap = found["contrasts"][0]["metrics"]["oracle/all"]["difference"]
        widths.append(gap["high"] - gap["low"])
        assert found["prompts"] == 120 and found["groups"] == gap["groups"] == (60 if groups else 120)
    assert widths[1] / widths[0] == pytest.approx(2**0.5, rel=0.1)


def test_few_prompts_claim_nothing():
    summary = swept({"base": {2: 0.1}, "dpo": {2: 0.9}}, prompts=19)
    assert summary["best"] is None
    entry = summary["contrasts"][0]["metrics"]["oracle/all"]
    assert words.verdict(entry, 19).startswith("Too few to claim: 19 prompts")
    assert words.verdict(entry, 20).startswith("A gain")
