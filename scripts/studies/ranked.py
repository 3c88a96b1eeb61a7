"""Ranked lists, CPO, a discriminator's term and noisy labels on the pocket, against the base and each other.

    python scripts/studies/ranked.py                    # an hour on two cores, minutes on a GPU
    python scripts/studies/ranked.py --only dpo_lists cpo_lists --dev

The pocket generates candidates for captions of training scenes and its CLIP ranks them; each of `TRIALS`
trains on the result, and all are compared with the base on held-out captions by the oracle, every system at
its best guidance, chosen on other prompts than those it is counted on. The noisy tables are the pairs with
votes that are each wrong with probability 1/4. The discriminator is the pocket's. Prints a line for each
trial and, of all trials, writes docs/ranked.md, with a figure of the discriminator's score and the oracle's
over training.
`--dev` compares on training scenes in other words: settings are chosen there. What is in --work is not done
again.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from calls import ROOT, call
from datasets import Dataset, Features, Image, Value
from ranked_page import EQUAL, row, write_page

from data_builders.prompts.reading import pocket_captions
from prefopt.records import load
from prefopt.runs import versions

GUIDANCE = (1.0, 2.0, 3.0, 4.5, 6.0)
CANDIDATES, PROMPTS, LISTS_A_STEP = 6, 240, 16
PAIRS_A_STEP = LISTS_A_STEP * CANDIDATES // 2  # as many image passes
BUILD: dict[str, Any] = {"candidates": CANDIDATES, "num_prompts": PROMPTS, "guidance_scale": 2.0}
BUILD |= {"num_inference_steps": 20, "pair_rule": "all", "max_pairs_per_prompt": 4, "gallery": False}
TRAINING: dict[str, Any] = {"lora_r": 16, "lora_alpha": 16, "learning_rate": 5e-4, "max_steps": 250}
TRAINING |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10, "save_strategy": "no"}
LISTS = {"per_device_train_batch_size": LISTS_A_STEP}
PAIRS = {"per_device_train_batch_size": PAIRS_A_STEP}
DPO, CPO = {"beta_dpo": 2000}, {"beta": 1000, "likelihood_weight": 1000}
TERM = {"discriminator_name_or_path": "pocket", "discriminator_weight": 2.0}
HEAVY = TERM | {"discriminator_weight": 20.0}
KEPT = {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 9}  # for the curves
WRONG, VOTES, JUDGES = 0.25, 10, 3
CURVES = ("cpo_lists", "cpo_heavy")  # the trials whose checkpoints are compared


@dataclass(frozen=True)
class Trial:
    """A recipe, the table it trains on, and its options."""

    why: str
    recipe: str
    table: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """All that its training depends on but the build."""
        return json.dumps([self.recipe, self.table, TRAINING | self.options])


TRIALS = {
    "sft": Trial("imitation of each list's best image", "diffusion_sft", "ranked", PAIRS),
    "dpo_pairs": Trial("DPO on pairs", "diffusion_dpo", "pairs", PAIRS | DPO),
    "dpo_lists": Trial("DPO on lists, every two of a list", "diffusion_dpo", "ranked", LISTS | DPO),
    "dpo_ranking": Trial(
        "DPO on lists, Plackett-Luce", "diffusion_dpo", "ranked", LISTS | DPO | {"list_loss": "plackett_luce"}
    ),
    "cpo_pairs": Trial("CPO on pairs", "diffusion_cpo", "pairs", PAIRS | CPO),
    "cpo_lists": Trial("CPO on lists, every two of a list", "diffusion_cpo", "ranked", LISTS | CPO | KEPT),
    "cpo_ranking": Trial(
        "CPO on lists, Plackett-Luce", "diffusion_cpo", "ranked", LISTS | CPO | {"list_loss": "plackett_luce"}
    ),
    "dpo_frozen": Trial(
        "dpo_lists and a frozen discriminator", "diffusion_dpo", "ranked", LISTS | DPO | TERM
    ),
    "cpo_frozen": Trial(
        "cpo_lists and a frozen discriminator", "diffusion_cpo", "ranked", LISTS | CPO | TERM
    ),
    "cpo_heavy": Trial(
        "cpo_frozen at ten times the weight", "diffusion_cpo", "ranked", LISTS | CPO | HEAVY | KEPT
    ),
    "cpo_adversarial": Trial(
        "cpo_lists and a discriminator that is trained along",
        "diffusion_cpo",
        "ranked",
        LISTS | CPO | TERM | {"discriminator_mode": "adversarial"},
    ),
    "dpo_guarded": Trial(
        "dpo_pairs with the winner guard", "diffusion_dpo", "pairs", PAIRS | DPO | {"winner_guard": 0.2}
    ),
    "noisy_all": Trial("all pairs, a quarter flipped", "diffusion_dpo", "flipped", PAIRS | DPO),
    "noisy_soft": Trial(f"soft labels of {VOTES} noisy votes", "diffusion_dpo", "votes", PAIRS | DPO),
    "noisy_agreed": Trial(
        f"the pairs on which {JUDGES} noisy votes agree", "diffusion_dpo", "agreed", PAIRS | DPO
    ),
}


@dataclass(frozen=True)
class Study:
    """The trials in one folder; what is there is not done again."""

    folder: Path

    @property
    def data(self) -> Path:
        """The folder of the tables."""
        return self.folder / "data"

    def build(self) -> None:
        """Candidates, ranked lists and pairs, and the tables of noisy labels."""
        if not (self.data / "done").exists():
            options = BUILD | {"exports": ("pairs", "ranked"), "output_dir": self.data}
            call("data_builders/text_to_image_pairs.py", options)
            for name, table in noisy_tables(self.data / "pairs").items():
                (self.data / name).mkdir(exist_ok=True)
                table.to_parquet(self.data / name / "train.parquet")
            (self.data / "done").touch()

    def encode(self) -> None:
        """Encode all images once, for all trials."""
        options = {"dataset_name": self.data / "ranked", "output_dir": self.folder / "encode", "max_steps": 1}
        options |= {"cache_dir": self.folder / "cache", "save_strategy": "no"}
        call("recipes/diffusion_cpo.py", options)

    def adapter(self, name: str, trial: Trial) -> Path:
        """The folder of a trial's trained adapter."""
        folder = self.folder / name
        done, key = folder / "done", trial.key
        if not done.exists():
            options = (
                TRAINING | {"dataset_name": self.data / trial.table, "output_dir": folder} | trial.options
            )
            call(f"recipes/{trial.recipe}.py", options | {"cache_dir": self.folder / "cache"})
            done.write_text(key, encoding="utf-8")
        if done.read_text(encoding="utf-8") != key:
            raise SystemExit(f"{folder} was trained with other options than {name} has now: delete it")
        return folder

    def compare(self, names: Iterable[str], prompts: Path | None, output: Path) -> dict[str, Any]:
        """Every system at every guidance; the comparison's summary."""
        systems = ["base", *(f"{name}={self.folder / name}" for name in names)]
        call("recipes/compare_text_to_image.py", self._comparison(systems, GUIDANCE, prompts, output))
        return json.loads((output / "summary.json").read_text(encoding="utf-8"))

    @staticmethod
    def _comparison(
        systems: list[str], guidance: Sequence[float], prompts: Path | None, output: Path
    ) -> dict[str, Any]:
        options: dict[str, Any] = {"systems": systems, "guidance_scales": guidance, "output_dir": output}
        options |= {"num_inference_steps": 20, "num_prompts": 100, "num_seeds": 2, "batch_size": 200}
        options |= {
            "oracle": "on",
            "discriminator_name_or_path": "pocket",
            "judge_model_name_or_path": "pocket",
        }
        return options | {"oracle": "on", "shown": 8} | ({"prompts": prompts, "seed": 500} if prompts else {})

    def hacking(self) -> dict[str, Any]:
        """The checkpoints of `CURVES`, on training scenes in other words."""
        systems = ["base"]
        for name in CURVES:
            kept = (self.folder / name).glob("checkpoint-*")
            steps = {int(path.name.partition("-")[2]): path for path in kept}
            systems += [f"{name}-{step}={path}" for step, path in sorted(steps.items())]
        output = self.folder / "hacking"
        call(
            "recipes/compare_text_to_image.py", self._comparison(systems, [EQUAL], self.dev_prompts(), output)
        )
        return json.loads((output / "summary.json").read_text(encoding="utf-8"))

    def dev_prompts(self) -> Path:
        """Captions of training scenes that the build does not have."""
        path = self.folder / "dev.txt"
        built = set(load(str(self.data / "ranked"), split="train", config=None, revision=None).rows["prompt"])
        texts = [text for text in pocket_captions(500) if text not in built]
        path.write_text("".join(f"{text}\n" for text in texts[:100]), encoding="utf-8")
        return path


def noisy_tables(pairs: Path) -> dict[str, Dataset]:
    """The pairs with the labels of voters who are each wrong with probability `WRONG`."""
    rows: list[Any] = load(str(pairs), split="train", config=None, revision=None).rows.to_list()
    right = np.random.default_rng(0).random((len(rows), VOTES)) >= WRONG
    names = ("prompt", "chosen", "rejected")
    features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})

    def labelled(row: dict, is_right: bool) -> dict:
        sides = ("chosen", "rejected") if is_right else ("rejected", "chosen")
        return dict(zip(names, (row["prompt"], row[sides[0]], row[sides[1]]), strict=True))

    agreed = [i for i in range(len(rows)) if right[i, :JUDGES].all() or not right[i, :JUDGES].any()]
    counted = [
        {"prompt": row["prompt"], "image1": row["chosen"], "image2": row["rejected"]}
        | {"votes_image1": int(right[i].sum()), "votes_image2": int((~right[i]).sum())}
        for i, row in enumerate(rows)
    ]
    of_votes = Features({"prompt": Value("string"), "image1": Image(), "image2": Image()})
    of_votes |= {"votes_image1": Value("int64"), "votes_image2": Value("int64")}
    return {
        "flipped": Dataset.from_list([labelled(row, right[i, 0]) for i, row in enumerate(rows)], features),
        "votes": Dataset.from_list(counted, Features(of_votes)),
        "agreed": Dataset.from_list([labelled(rows[i], right[i, 0]) for i in agreed], features),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/ranked"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS), help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once; default: %(default)s")
    parser.add_argument("--dev", action="store_true", help="compare on training scenes, to choose settings")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    study = Study(options.work)
    study.build()
    study.encode()
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda name: study.adapter(name, TRIALS[name]), options.only))
    prompts = study.dev_prompts() if options.dev else None
    output = options.work / ("compared-dev" if options.dev else "compared")
    summary = study.compare(options.only, prompts, output)
    rows = [row(name, TRIALS[name].why, study.folder / name, summary) for name in options.only]
    print(*rows, sep="\n")
    if not options.dev and options.only == list(TRIALS):
        facts = {
            "training": told(TRAINING),
            "build": told(BUILD),
            "wrong": WRONG,
            "images": summary["prompts"] * summary["seeds"],
            "prompts": summary["prompts"],
            "seeds": summary["seeds"],
            "guidance": ", ".join(f"{scale:g}" for scale in GUIDANCE),
        }
        write_page(ROOT / "docs", rows, summary, study.hacking(), facts)


def told(options: dict[str, Any]) -> str:
    """Options in words."""
    return ", ".join(f"`{name}: {value}`" for name, value in options.items())


if __name__ == "__main__":
    print(json.dumps(versions()))
    main()
