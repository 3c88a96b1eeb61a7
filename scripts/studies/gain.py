"""What decides whether Diffusion-DPO gains anything on the pocket: one setting after the other is changed.

    python scripts/studies/gain.py                      # hours on two cores; goes on where it stopped
    python scripts/studies/gain.py --only first rank_4  # some of the trials

A trial is a build of candidates, Diffusion-DPO on its pairs, and a comparison with the base, each at its best
guidance, best being chosen on other prompts. `TRIALS` says what each changes of the first, which has the
settings BUILD and TRAINING and else those of recipes/configs. They are measured on training scenes, in other
words than the builds had and with seeds of their own: the held-out scenes of the demo and the README take no
part in choosing. Writes docs/gain.md, of all trials that are in --work. What is there is trusted: empty it
after a change of the settings or the code.
"""

import argparse
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calls import ROOT, call
from pairs import PARTS, Judged, rate

from data_builders.prompts.reading import pocket_captions
from prefopt.evaluation import words
from prefopt.pocket.world import ATTRIBUTES, parse
from prefopt.runs import versions

CONFIGS = ROOT / "recipes" / "configs"
CLASSES = ("elephant", "giraffe")
GUIDANCE = (2.0, 3.0, 5.0, 8.0)
EQUAL = 3.0  # at which systems are also compared with each other
PROMPTS, SEEDS, FIRST_SEED = 60, 2, 500
BUILD = {"guidance_scale": 3.0, "question_weights": ["whole_prompt=4"], "pair_rule": "all"}
BUILD |= {"max_pairs_per_prompt": 4}
TRAINING = {"lora_r": 16, "lora_alpha": 16, "learning_rate": 5e-4, "max_steps": 250}
DPO = {"beta_dpo": 2000}


@dataclass(frozen=True)
class Trial:
    """What is changed of the first trial, and why one might."""

    why: str
    build: dict[str, Any] = field(default_factory=dict)  # options of the builder
    recipe: str = "diffusion_dpo"
    training: dict[str, Any] = field(default_factory=dict)  # options of the recipe
    scale: float = 1.0  # of the LoRA, when it is compared


TRIALS = {
    "first": Trial("where the others start from"),
    "guidance_2": Trial("candidates at weaker guidance", {"guidance_scale": 2.0}),
    "guidance_5": Trial("candidates at stronger guidance", {"guidance_scale": 5.0}),
    "asked_1": Trial("the whole prompt counts as any question", {"question_weights": ["whole_prompt=1"]}),
    "asked_8": Trial("the whole prompt counts eight times", {"question_weights": ["whole_prompt=8"]}),
    "prompts_80": Trial(
        "as asked_8; twice the prompts, half the candidates of each",
        {"question_weights": ["whole_prompt=8"], "prompts_per_class": 80, "candidates": 5},
    ),
    "steps_500": Trial("twice the steps", training={"max_steps": 500}),
    "asked_8_steps_500": Trial(
        "as asked_8; twice the steps", {"question_weights": ["whole_prompt=8"]}, training={"max_steps": 500}
    ),
    "asked_8_cosine": Trial(
        "as asked_8; a learning rate that falls to 0",
        {"question_weights": ["whole_prompt=8"]},
        training={"lr_scheduler_type": "cosine"},
    ),
    "best_worst": Trial("one pair a prompt", {"pair_rule": "best_worst"}),
    "all_pairs": Trial("every pair, not the four of widest margin", {"max_pairs_per_prompt": 45}),
    "rank_4": Trial("a smaller adapter", training={"lora_r": 4, "lora_alpha": 4}),
    "rank_64": Trial("a larger adapter", training={"lora_r": 64, "lora_alpha": 64}),
    "beta_500": Trial("further from the base", training={"beta_dpo": 500}),
    "beta_8000": Trial("closer to the base", training={"beta_dpo": 8000}),
    "rate_half": Trial("half the learning rate", training={"learning_rate": 2.5e-4}),
    "rate_double": Trial("twice the learning rate", training={"learning_rate": 1e-3}),
    "steps_125": Trial("half the steps", training={"max_steps": 125}),
    "high_noise": Trial("the noisier half of times alone", training={"timestep_range": [0.5, 1.0]}),
    "scale_0.7": Trial("the adapter at 0.7", scale=0.7),
    "sft": Trial("imitation of the selected images", recipe="diffusion_sft"),
}


@dataclass(frozen=True)
class Study:
    """The trials in one folder; what is there is not done again."""

    folder: Path

    def run(self, name: str, trial: Trial) -> dict:
        """The trial's build, training and comparison; the comparison's summary."""
        build = self.build(trial)
        adapter = self._adapter(trial, build)
        return self._compared(name, trial, adapter)

    def build(self, trial: Trial) -> Path:
        """The folder of the trial's candidates and pairs."""
        folder = self._named("build", trial.build)
        first = self.folder / "build"
        if folder != first and not folder.exists() and self._reuses(trial):
            # The same candidates and answers, counted otherwise.
            shutil.copytree(self.build(TRIALS["first"]), folder, ignore=lambda *_: {"done"})
        if not (folder / "done").exists():
            options = BUILD | {"gallery": False, "output_dir": folder, "classes": CLASSES} | trial.build
            config = CONFIGS / "self_rewarding_build_pocket.yaml"
            call("data_builders/self_rewarding.py", options, config)
            (folder / "done").touch()
        return folder

    def _reuses(self, trial: Trial) -> bool:
        return not {"guidance_scale", "candidates", "prompts_per_class"} & trial.build.keys()

    def _adapter(self, trial: Trial, build: Path) -> Path:
        folder = self._named(f"{trial.recipe}-{build.name}", trial.training)
        if not (folder / "done").exists():
            kind = trial.recipe.removeprefix("diffusion_")
            table = build / ("sft" if kind == "sft" else "pairs")
            options = TRAINING | {"dataset_name": table, "output_dir": folder, "save_strategy": "no"}
            options |= ({} if kind == "sft" else DPO) | trial.training
            call(f"recipes/{trial.recipe}.py", options, CONFIGS / f"self_rewarding_{kind}_pocket.yaml")
            (folder / "done").touch()
        return folder

    def _compared(self, name: str, trial: Trial, adapter: Path) -> dict:
        """All comparisons share a folder, so the base's images are generated once; each has its summary."""
        kept = self.folder / f"{name}.json"
        if not kept.exists():
            options = {
                "systems": ["base", f"{name}={adapter} scale={trial.scale}"],
                "guidance_scales": GUIDANCE,
                "prompts": self._prompts(),
                "oracle": "on",
                "num_prompts": PROMPTS,
                "num_seeds": SEEDS,
                "seed": FIRST_SEED,
                "output_dir": self.folder / "compared",
            }
            config = CONFIGS / "self_rewarding_compare_pocket.yaml"
            call("recipes/compare_text_to_image.py", options, config)
            shutil.copy(self.folder / "compared" / "summary.json", kept)
        return json.loads(kept.read_text(encoding="utf-8"))

    def _prompts(self) -> Path:
        """Captions of training scenes of the classes that no build has; the scenes they may have."""
        path = self.folder / "prompts.txt"
        if not path.exists():
            # All builds of as many prompts have the same ones.
            builds = [self.build(TRIALS[name]) for name in ("first", "prompts_80")]
            built = {row["prompt"] for build in builds for row in Judged(build).candidates}
            texts = [t for t in pocket_captions(FIRST_SEED) if parse(t).animal in CLASSES and t not in built]
            path.write_text("".join(f"{text}\n" for text in texts[:PROMPTS]), encoding="utf-8")
        return path

    def _named(self, kind: str, settings: dict[str, Any]) -> Path:
        """A folder whose name says what is changed."""
        changes = (f"{k}={'+'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in settings.items())
        return self.folder / "-".join([kind, *changes])


def row(name: str, trial: Trial, summary: dict) -> str:
    """A trial's line in the table."""
    best = summary["best"]["contrasts"][0]["metrics"]
    equal = next(c for c in summary["contrasts"] if c["against"].endswith(f"guidance {EQUAL:g}"))["metrics"]
    cells = [name, trial.why, words.value(best["oracle/all"]["mean"], "proportion")]
    cells += [_difference(best["oracle/all"]), _difference(equal["oracle/all"])]
    cells += [_change(best[f"oracle/{part}"]) for part in ATTRIBUTES]
    return f"| {' | '.join(cells)} |"


def _difference(contrast: dict) -> str:
    low, high = (100 * contrast["difference"][end] for end in ("low", "high"))
    return f"{100 * contrast['difference']['mean']:+.1f} ({low:.1f} to {high:.1f})"


def _change(contrast: dict) -> str:
    sure = "*" if contrast["p_holm"] < 0.05 else ""
    return f"{100 * contrast['difference']['mean']:+.1f}{sure}"


def judged_rows(name: str, judged: Judged) -> list[str]:
    """A build's lines in the table of what decided its pairs."""
    lines = []
    for part in PARTS:
        found = judged.agreement(part)
        shares = [float(judged.right[part].mean()), *judged.decided(part)]
        right, chosen, rejected = map(words.percent, shares)
        agrees = rate(found) if found else "nothing to compare"
        lines.append(f"| {name} | {part} | {right} | {agrees} | {chosen} | {rejected} |")
    return lines


PAGE = """# What decides whether Diffusion-DPO gains anything

Written by `python scripts/studies/gain.py` on the pocket, {versions}. Each trial changes one thing of the
first, which has the options {first}; those "as asked_8" change one thing of that.

{images} images a system and guidance ({guidance}), of training scenes in other words than the builds had, by
the oracle: it serves to choose settings, and says too much about new scenes. Differences are in points, to
the base at its best guidance, each system at its own, chosen on other prompts; in parentheses 95 % intervals;
* is a change of an attribute with p < 0.05 after Holm's correction for the four. With {trials} trials, a few
points between two of them and a star or two are chance.

| trial | why | all right | against the base, each at its best | both at guidance {equal} | {attributes} |
|---|---|---|---|---|{dashes}|
{rows}

## What decided the pairs

Of each build: how many candidates show the attribute as asked; how often the judge's score prefers the right
one of two candidates of a prompt; the share of pairs in which only the chosen image has it right, and in
which only the rejected one has.

| build | attribute | candidates right | the judge agrees | only the chosen | only the rejected |
|---|---|---|---|---|---|
{judged}

Of the first build, the share of the pairs' mean margin that each question makes: {shares}. The images of a
pair differ in {differences}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/gain"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS), help="default: all")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    study, rows, judged = Study(options.work), [], []
    for name in options.only:
        print(row(name, TRIALS[name], study.run(name, TRIALS[name])), flush=True)
    builds: dict[Path, str] = {}
    for name, trial in TRIALS.items():
        if (options.work / f"{name}.json").exists():
            rows.append(row(name, trial, study.run(name, trial)))
            builds.setdefault(study.build(trial), name)
    for build, name in builds.items():
        judged += judged_rows(name, Judged(build))
    first = Judged(study.build(TRIALS["first"]))
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "gain.md").write_text(
        PAGE.format(
            versions=", ".join(f"{k} {v}" for k, v in versions().items()),
            first=", ".join(f"`{name}: {value}`" for name, value in (BUILD | TRAINING | DPO).items()),
            images=PROMPTS * SEEDS,
            guidance=", ".join(f"{scale:g}" for scale in GUIDANCE),
            equal=f"{EQUAL:g}",
            trials=len(rows),
            attributes=" | ".join(ATTRIBUTES),
            dashes="|".join("---" for _ in ATTRIBUTES),
            rows="\n".join(rows),
            judged="\n".join(judged),
            shares=", ".join(f"{name} {share:.0%}" for name, share in first.shares().items()),
            differences=", ".join(
                f"{n} attributes: {c} pairs" for n, c in sorted(first.differences().items())
            ),
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
