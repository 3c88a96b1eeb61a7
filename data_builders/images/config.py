"""The options of image builders; importing them imports no model library."""

from dataclasses import dataclass, replace
from typing import Literal

from data_builders.export.config import HubOptions
from data_builders.export.tables import EXPORTS
from data_builders.images.selection import PairOptions, PairRule
from prefopt import pocket
from prefopt.diffusion.generator import SCALE, GenerationOptions, Generator, changed
from prefopt.errors import InputError
from prefopt.judges.rubric import Rubric
from prefopt.options import check_paths_exist, option


@dataclass
class BuilderConfig(HubOptions, GenerationOptions):
    """What generates and judges the candidates, what is selected, and what is written."""

    candidates: int = option(8, "Images per prompt.", within="[2, 10000]")
    seed: int = option(0, "The seeds of the images follow from it.", within="[0, 4294967295]")
    adapter: str | None = option(None, "LoRA for that model: a folder, a file or a hub id.")
    adapter_scale: float = option(1.0, "The LoRA's weight.", within=SCALE, needs="adapter or sources")
    sources: list[str] = option(
        [],
        "Several models in place of one, used in turn for a prompt's candidates; each quoted: "
        "`model steps=4 guidance=0 adapter=folder scale=0.4`.",
    )
    batch_size: int = option(32, "Images generated at once.", within="[1, 65536]")
    block_size: int = option(
        8, "Prompts per block; a crash loses at most the unfinished block of each process.", within="[1, 1e6]"
    )

    judge_model_name_or_path: str | None = option(
        None,
        "Judge: a VLM, or for --rubric reward a CLIP, PickScore or ImageReward; a folder, a hub "
        "id or `pocket` (the default for the model `pocket`).",
    )
    judge_revision: str | None = option(None, "Revision of the judge on the hub.")
    judge_url: str | None = option(
        None, "Endpoint that serves the judge: /v1/systemone or OpenAI-compatible."
    )
    judge_dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of the judge.")
    judge_batch_size: int = option(16, "Images judged at once.", within="[1, 65536]")
    rubric: str = option("reward", "The questions: a YAML file, or one of ours by name.")
    question_weights: list[str] = option(
        [], "Other weights of the rubric's questions than its own: `whole_prompt=4`."
    )
    discriminator_name_or_path: str | None = option(
        None,
        "Rank by a discriminator, too: what recipes/discriminator.py wrote, a hub id or `pocket`. The soft "
        "score is then minus the mean of an image's two ranks, by the judge and by the discriminator; hard "
        "scores stay the judge's. (Default: the judge alone; for a discriminator alone name it as the judge, "
        "with --rubric reward.)",
    )
    discriminator_revision: str | None = option(
        None, "Revision of the discriminator on the hub.", needs="discriminator_name_or_path"
    )
    calibrate: bool = option(True, "Subtract the judge's answers about an empty image.")

    pair_rule: PairRule = option("best_worst", "Which ranked candidates become pairs.")
    min_margin: float = option(
        0.0,
        "Smallest difference between the soft scores of a pair; with --rubric reward, in logits; with a "
        "discriminator, in ranks.",
        within="[0, 1e9]",
    )
    max_pairs_per_prompt: int | None = option(
        None,
        "Maximum pairs per prompt; those with the widest margins are kept (default: all).",
        within="[1, inf)",
    )
    exports: list[str] = option(["pairs"], f"Tables to write: {', '.join(EXPORTS)}.")
    gallery: bool = option(True, "Write gallery.html.")
    test_fraction: float = option(0.0, "Share of the prompts that go to the split `test`.", within="[0, 1)")
    shard_megabytes: int = option(256, "Largest Parquet file of a table.", within="[1, 1e6]")
    keep_resident: bool = option(
        False, "Keep all models loaded and finish block after block, where memory allows."
    )
    output_dir: str = option("data/images", "Folder for the dataset.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_hub()
        pocket.fill_defaults(self, self.models, "judge_model_name_or_path")
        check_paths_exist(self, "adapter", "discriminator_name_or_path")
        if not self.judge_url:
            check_paths_exist(self, "judge_model_name_or_path")
        if unknown := [name for name in self.exports if name not in EXPORTS]:
            raise InputError(f"--exports {unknown[0]} is unknown; known are {', '.join(EXPORTS)}")
        if len(self.sources) > self.candidates:
            raise InputError(
                f"{len(self.sources)} --sources for {self.candidates} --candidates: some generate nothing"
            )
        _ = self.weighed_rubric

    @property
    def weighed_rubric(self) -> Rubric:
        """The rubric with these weights."""
        return Rubric.load(self.rubric).weighed(self.question_weights)

    @property
    def generators(self) -> list[Generator]:
        """The models that generate a prompt's candidates in turn."""
        base = replace(self.generator, adapter=self.adapter, adapter_scale=self.adapter_scale)
        return [parse_source(text, base) for text in self.sources] or [base]

    @property
    def models(self) -> list[str]:
        """What the models are called that generate images."""
        return [generator.model for generator in self.generators]

    @property
    def pair_options(self) -> PairOptions:
        """Which ranked candidates become pairs."""
        return PairOptions(self.pair_rule, self.min_margin, self.max_pairs_per_prompt)


def parse_source(text: str, base: Generator) -> Generator:
    """A generator from a text of --sources: a model (default: the base's), and `key=value` for what differs.

    `stabilityai/sdxl-turbo steps=1 guidance=0` · `adapter=runs/sft scale=0.4`
    """
    words = text.split()
    name = words.pop(0) if words and "=" not in words[0] else base.model
    if name != base.model:
        base = replace(base, model=name, revision=None, variant=None, adapter=None)
    return changed(base, words, f"--sources {text!r}")
