"""Keep the pairs of a preference table on which judges agree with its labels.

    accelerate launch data_builders/consensus_pairs.py
    accelerate launch data_builders/consensus_pairs.py --dataset_name yuvalkirstain/pickapic_v2 \\
        --judges yuvalkirstain/PickScore_v1 openai/clip-vit-large-patch14 models/image_reward \\
        "llava-hf/llava-1.5-7b-hf rubric=questions.yaml dtype=bfloat16" --output_dir data/consensus

1. The table is read in any of the formats of diffusion/tables.py; a ranked list becomes its pairs.
2. Each judge scores every image of a prompt once: a reward model (CLIP, PickScore, ImageReward), or a VLM
   with a rubric of yes/no questions. It prefers the image of the higher score; equal scores are half a vote.
3. A pair is kept if the share of the judges that prefer its chosen image is at least `--min_agreement`.

In --output_dir: `pairs/`, in the order of the source and with its bytes, which the recipes read with
`p_chosen` as a soft label; BUILD.json and README.md: how many pairs went for which reason, how often each
judge agrees with the labels and with each other judge. You should see a progress bar for each judge, then
these counts. Without arguments the pocket's CLIP judges the pocket's pairs, which it made itself: it agrees
with all 192 of them.

The same command again repeats no finished call of a judge, whatever ended it; another `--min_agreement` or
`--p_chosen` calls no judge, one more judge calls that one alone. One judge is loaded at a time.

Left out: a judge's answers about an empty image, since the two scores of a pair are compared with each other;
a test split, since a table's own splits are filtered one by one; rubrics that need a class or a detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from data_builders.export.config import HubOptions
from prefopt import pocket
from prefopt.cli import run
from prefopt.errors import InputError
from prefopt.judges.rubric import Rubric
from prefopt.options import check_options, check_paths_exist, check_revision, option

if TYPE_CHECKING:
    from prefopt.judges.questions import Judge
    from prefopt.loading import Lazy

# What the words after a judge's name may say, and what holds without them.
WORDS = {"rubric": "reward", "revision": None, "dtype": "float32", "url": None}


@dataclass
class ConsensusConfig(HubOptions):
    """Which pairs are read, what judges them, and which are kept."""

    dataset_name: str | None = option(
        None, "Preferences: a folder, a file, a hub id or `pocket` (the default for the judge `pocket`)."
    )
    dataset_config: str | None = option(
        None, "Configuration of the dataset: of the hub's, or a folder's sub-folder."
    )
    dataset_revision: str | None = option(None, "Revision of the dataset on the hub.")
    dataset_train_split: str = option("train", "The split whose pairs are judged.")

    judges: list[str] = option(
        [],
        "Each a folder, a hub id or `pocket` (the default for the dataset `pocket`), quoted with further "
        f"words about it: `model rubric=file.yaml dtype=bfloat16`. Known are {', '.join(WORDS)}.",
    )
    judge_batch_size: int = option(16, "Images judged at once.", within="[1, 65536]")
    block_size: int = option(
        64, "Images per block; each process works on blocks of its own.", within="[1, 1e6]"
    )

    min_agreement: float = option(
        1.0,
        "Smallest share of the judges that prefer the chosen image of a pair that is kept.",
        within="[0, 1]",
    )
    p_chosen: Literal["votes", "margin"] = option(
        "votes",
        "The soft label: the share of the judges that prefer the chosen image, with the table's own p_chosen "
        "as one more vote (votes), or the mean over the judges of sigmoid(chosen score - rejected score) "
        "(margin), which is a probability for reward models.",
    )
    shard_megabytes: int = option(256, "Largest Parquet file of a table.", within="[1, 1e6]")
    output_dir: str = option("data/consensus", "Folder for the dataset.")

    def __post_init__(self) -> None:
        check_options(self)
        self.check_hub()
        if not self.judges and self.dataset_name not in (None, pocket.NAME):
            raise InputError(
                f"--judges is missing: only the dataset `{pocket.NAME}` has a default for it, not "
                f"{self.dataset_name}"
            )
        self.judges = self.judges or [pocket.NAME]
        if twice := next((text for text in self.judges if self.judges.count(text) > 1), None):
            raise InputError(f"--judges names {twice!r} twice; name each judge once")
        pocket.fill_defaults(self, [judge["name"] for judge in self.panel], "dataset_name")
        check_paths_exist(self, "dataset_name")

    @property
    def panel(self) -> list[dict[str, Any]]:
        """The `name` and the WORDS of each judge, its rubric loaded."""
        return [judge_words(text) for text in self.judges]


def judge_words(text: str) -> dict[str, Any]:
    """The `name` and the WORDS of a text of --judges: `model rubric=file.yaml dtype=bfloat16`."""
    where, (name, *words) = f"--judges {text!r}", text.split() or [""]
    given = {key: value for key, _, value in (word.partition("=") for word in words)}
    if not name or "=" in name:
        raise InputError(f"{where}: write the judge's name first, then rubric=... and so on")
    if unknown := sorted(given.keys() - WORDS.keys()):
        raise InputError(f"{where}: unknown {unknown[0]!r}; known are {', '.join(WORDS)}")
    judge: dict[str, Any] = {"name": name, **WORDS, **given}
    if judge["dtype"] not in (dtypes := ("float32", "bfloat16", "float16")):
        raise InputError(f"{where}: dtype is {judge['dtype']!r}; choose from {', '.join(dtypes)}")
    check_revision(name, judge["revision"], where)
    try:
        rubric = judge["rubric"] = Rubric.load(judge["rubric"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if rubric.checks or rubric.needs_class:
        what = "it asks about {class}"
        if rubric.checks:
            what = f"the question {rubric.checks[0].name!r} needs a detector"
        raise InputError(f"{where}: the rubric {rubric.name} does not fit, {what}; pairs have a prompt alone")
    return judge


def main(config: ConsensusConfig, judges: Sequence[Lazy[Judge]] | None = None) -> None:
    """Build the dataset; the judges are those of the options unless they are given, in the same order."""
    import torch

    from data_builders.engine.passes import processes
    from data_builders.images.agreement import Consensus, Rule
    from prefopt.diffusion.tables import read_preferences
    from prefopt.judges.loading import lazy_judge

    state = processes()
    table = read_preferences(
        pocket.resolve(str(config.dataset_name), "pairs"),
        split=config.dataset_train_split,
        config=config.dataset_config,
        revision=config.dataset_revision,
    )
    judges = judges or [
        lazy_judge(
            judge["name"],
            judge["revision"],
            rubric=judge["rubric"],
            url=judge["url"],
            dtype=getattr(torch, judge["dtype"]),
            device=torch.device(str(state.device)),
            batch_size=config.judge_batch_size,
        )
        for judge in config.panel
    ]
    rubrics = [judge["rubric"] for judge in config.panel]
    consensus = Consensus(
        table,
        dict(zip(config.judges, zip(judges, rubrics, strict=True), strict=True)),
        Rule(config.min_agreement, config.p_chosen),
        asdict(config),
        state,
    )
    if said := consensus.run():
        print(said)


if __name__ == "__main__":
    run(main, ConsensusConfig)
