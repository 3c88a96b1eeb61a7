"""Which figures a comparison's report has."""

import json
import re
from collections.abc import Mapping, Sequence

from prefopt.evaluation import figures
from prefopt.evaluation.figures import Chart, Curve
from prefopt.evaluation.summary import gaps_to_first, headlines


def charts_of(summary: Mapping, runs: Mapping[str, Sequence[Mapping]]) -> list[Chart]:
    """Win bars, means over LoRA scales and over guidance, and the curves of training runs, by their names."""
    metrics, contrasts = headlines(summary), summary["contrasts"]
    if summary["best"]:
        first = next(iter(summary["best"]["chosen"]))
        contrasts = [each for each in summary["best"]["contrasts"] if each["against"] == first]
    charts = win_charts(contrasts, metrics)
    for over, sweep in (("LoRA scale", _scale_panels), ("guidance", _guidance_panels)):
        charts += [
            figures.sweep_curves(panels, over, metric, told["title"], told["kind"])
            for metric, told in metrics.items()
            if all(system["means"][metric] is not None for system in summary["systems"].values())
            and (panels := sweep(summary, metric))
        ]
    return charts + (figures.training_curves(runs) if runs else [])


def win_charts(contrasts: Sequence[Mapping], metrics: Mapping[str, Mapping]) -> list[Chart]:
    """Wins, ties and losses by each metric, of the contrasts that have it."""
    return [
        figures.win_bars(having, metric, told["title"])
        for metric, told in metrics.items()
        if (having := [contrast for contrast in contrasts if metric in contrast["metrics"]])
    ]


def _scale_panels(summary: Mapping, metric: str) -> dict[str, list[Curve]]:
    """The adapters that were compared at several scales, and what they are compared with, by guidance."""
    adapters: dict[tuple, list[Mapping]] = {}
    for contrast in summary["contrasts"]:
        system = summary["systems"][contrast["system"]]
        if system["adapter"] is not None:
            key = (contrast["against"], json.dumps(system["settings"]), system["model"], system["adapter"])
            adapters.setdefault(key, []).append(system)
    panels: dict[float, list[Curve]] = {}
    for (against, *_), systems in adapters.items():
        if len(systems) == 1:
            continue
        guidance = systems[0]["settings"].get("guidance_scale")
        points = [(system["scale"], *_interval(summary, system["name"], metric)) for system in systems]
        if guidance not in panels:
            base = summary["systems"][against]
            level = _interval(summary, against, metric)
            panels[guidance] = [Curve(base["family"], True, [(scale, *level) for scale, *_ in points])]
        names = dict.fromkeys(re.split(" at |, guidance ", system["name"])[0] for system in systems)
        panels[guidance].append(Curve(", ".join(names), False, points))
    if len(panels) == 1:
        return {"": next(iter(panels.values()))}
    return {f"guidance {guidance:g}": curves for guidance, curves in sorted(panels.items())}


def _guidance_panels(summary: Mapping, metric: str) -> dict[str, list[Curve]]:
    """The systems that differ in their guidance alone, by what else they are called, in one panel."""
    sweeps: dict[tuple, list[Mapping]] = {}
    for system in summary["systems"].values():
        others = {name: value for name, value in system["settings"].items() if name != "guidance_scale"}
        sweeps.setdefault((system["family"], system["scale"], json.dumps(others)), []).append(system)
    base = next(iter(summary["systems"].values()))["family"]
    curves = [
        Curve(
            systems[0]["name"].partition(", guidance ")[0],
            family == base,
            [
                (system["settings"]["guidance_scale"], *_interval(summary, system["name"], metric))
                for system in systems
            ],
        )
        for (family, *_), systems in sweeps.items()
        if len(systems) > 1
    ]
    return {"": curves} if curves else {}


def _interval(summary: Mapping, name: str, metric: str) -> tuple[float, float, float]:
    """A system's mean, and where it lies by the interval of its difference to the first system."""
    mean = summary["systems"][name]["means"][metric]
    entry = gaps_to_first(summary).get(name, {}).get(metric)
    if entry is None:
        return mean, mean, mean
    gap = entry["difference"]
    return mean, entry["mean_against"] + gap["low"], entry["mean_against"] + gap["high"]
