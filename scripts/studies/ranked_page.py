"""docs/ranked.md and its figure, from what the study of ranked lists left in its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prefopt.evaluation import words
from prefopt.runs import read_metrics, versions

EQUAL = 3.0  # the guidance scale of the columns beside the best
OWN = ("clip", "discriminator", "judge")  # the scorers beside the truth
PAIRED = (  # what is compared with what, besides the base
    ("dpo_lists", "dpo_pairs", "lists or pairs, as many image passes"),
    ("cpo_lists", "cpo_pairs", "lists or pairs, as many image passes"),
    ("dpo_ranking", "dpo_lists", "the likelihood of the ranking, or every two"),
    ("cpo_ranking", "cpo_lists", "the likelihood of the ranking, or every two"),
    ("dpo_frozen", "dpo_lists", "with the discriminator's term"),
    ("cpo_frozen", "cpo_lists", "with the discriminator's term"),
    ("cpo_heavy", "cpo_lists", "with ten times that term"),
    ("cpo_adversarial", "cpo_lists", "with a discriminator that is trained along"),
    ("dpo_guarded", "dpo_pairs", "with the winner guard"),
    ("noisy_all", "dpo_pairs", "a quarter of the labels flipped"),
    ("noisy_soft", "noisy_all", "soft labels of noisy votes, or one noisy label"),
    ("noisy_agreed", "noisy_all", "the agreed pairs, or all"),
)
PAGE = """# Ranked lists, CPO and a discriminator's term

Written by `python scripts/studies/ranked.py` on the pocket, {versions}.
Every trial starts from the pocket model and trains {training} on one build: {build}.
`_pairs` have as many images in a step as `_lists`. Noisy labels are wrong with probability {wrong:g}.

{images} images a system and guidance ({guidance}): {prompts} captions of scenes that no training saw,
{seeds} seeds each. Each system is at its best guidance, chosen on other prompts than those it is counted on,
and so is the base, which the differences are to (in the column of guidance {equal:g} both are at that); those
of the oracle are in points; in parentheses 95 % intervals. The oracle is the truth. CLIP ranked the lists,
the discriminator is in the loss of some trials, and the judge, the pocket's LLaVA, took no part. The last
column is the chosen's denoising error in the first and the last fifth of the steps.

| trial | what | all right | oracle | oracle at guidance {equal:g} | CLIP | discriminator | judge | error |
|---|---|---|---|---|---|---|---|---|
{rows}

The base has {base} all right. With {trials} trials a few points between two of them are chance.

## One against another

| trial | against | what differs | oracle, points |
|---|---|---|---|
{paired}

## Does the discriminator's score mean anything?

![the discriminator's logit and the oracle's accuracy over training](ranked.png)

The discriminator's mean logit and the oracle's accuracy on {hacked} captions of training scenes at guidance
{equal:g}, over the steps of CPO without its term and with a heavy one. Where the logit rises and the oracle
does not, the model has learned to please the discriminator, not to show what is asked.

| checkpoint | discriminator | oracle: all right | judge |
|---|---|---|---|
{curves}
"""


def write_page(
    folder: Path, rows: Sequence[str], summary: Mapping, hacking: Mapping, facts: Mapping[str, Any]
) -> None:
    """Write ranked.md and ranked.png to `folder`; `hacking` is the summary of the checkpoints."""
    best = summary["best"]["contrasts"]
    found = [(pair, _against(best, *pair[:2])) for pair in PAIRED]
    paired = [
        f"| {name} | {against} | {what} | {difference(contrast['metrics']['oracle/all'])} |"
        for (name, against, what), contrast in found
        if contrast
    ]
    series = curves(hacking)
    draw(folder / "ranked.png", series)
    steps = [
        f"| {name}, step {step} | {logit:+.2f} | {words.percent(right)} | {judged:+.3f} |"
        for name, points in series.items()
        for step, logit, right, judged in points
    ]
    first = best[0]["metrics"]["oracle/all"]["mean_against"]
    page = PAGE.format(
        versions=", ".join(f"{name} {value}" for name, value in versions().items()),
        rows="\n".join(rows),
        trials=len(rows),
        base=words.percent(first),
        paired="\n".join(paired),
        curves="\n".join(steps),
        equal=EQUAL,
        hacked=hacking["prompts"],
        **facts,
    )
    (folder / "ranked.md").write_text(page, encoding="utf-8")


def row(name: str, why: str, run: Path, summary: Mapping) -> str:
    """A trial's line in the table; its training is in the folder `run`."""
    best = _against(summary["best"]["contrasts"], name, "base")["metrics"]
    equal = next(c for c in summary["contrasts"] if c["system"] == f"{name}, guidance {EQUAL:g}")["metrics"]
    cells = [name, why, words.percent(best["oracle/all"]["mean"])]
    cells += [difference(best["oracle/all"]), difference(equal["oracle/all"])]
    cells += [f"{best[own]['difference']['mean']:+.2f}" for own in OWN]
    return f"| {' | '.join([*cells, errors_of(run)])} |"


def difference(contrast: Mapping) -> str:
    """A difference of proportions in points, with its interval."""
    low, high = (100 * contrast["difference"][end] for end in ("low", "high"))
    return f"{100 * contrast['difference']['mean']:+.1f} ({low:.1f} to {high:.1f})"


def curves(hacking: Mapping) -> dict[str, list[tuple[int, float, float, float]]]:
    """Of each trial its (step, discriminator, oracle, judge); step 0 is the base."""
    values = {
        system["family"]: tuple(
            system["means"][metric] for metric in ("discriminator", "oracle/all", "judge")
        )
        for system in hacking["systems"].values()
    }
    found: dict[str, list] = {}
    for name, told in values.items():
        trial, _, step = name.rpartition("-")
        if trial:
            found.setdefault(trial, [(0, *values["base"])]).append((int(step), *told))
    return {trial: sorted(points) for trial, points in found.items()}


def draw(path: Path, series: Mapping[str, Sequence[tuple]]) -> None:
    """The discriminator's logit and the oracle's accuracy over the steps, a panel each."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, place, title in zip(
        figure.subplots(1, 2), (1, 2), ("discriminator's mean logit", "oracle: all right"), strict=True
    ):
        for name, points in series.items():
            values = np.array(points)
            axes.plot(values[:, 0], values[:, place], marker="o", markersize=3, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(linewidth=0.4)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def errors_of(run: Path) -> str:
    """The chosen's denoising error in the first and the last fifth of a run."""
    errors = [row["error/chosen"] for row in read_metrics(run) if "error/chosen" in row]
    if not errors:
        return ""
    fifth = max(1, len(errors) // 5)
    return f"{np.mean(errors[:fifth]):.4f}, {np.mean(errors[-fifth:]):.4f}"


def _against(contrasts: Sequence[Mapping], name: str, against: str) -> Any:
    """The contrast of a system with an earlier one; None if there is none."""
    for contrast in contrasts:
        if (contrast["system"], contrast["against"]) == (name, against):
            return contrast
    return None
