"""Build the data of a discriminator: real images, and images generated from descriptions of them.

    accelerate launch data_builders/discriminator_pairs.py
    accelerate launch data_builders/discriminator_pairs.py --dataset_name data/coyo_shards \\
        --min_aesthetic 6.5 --max_watermark 0.5 --max_nsfw 0.5 --model_name_or_path stabilityai/sdxl-turbo \\
        --guidance_scale 0 --dtype float16 --captioner_model_name_or_path llava-hf/llava-1.5-7b-hf \\
        --captioner_dtype bfloat16 --output_dir data/coyo

1. The real images of a table (img2dataset's shards, a folder of Parquet, Arrow or images, a hub id) that its
   scores allow are stored. Without arguments they are renders of the pocket's training scenes.
2. A vision-language model describes each stored image. `raw` is the caption that the table has, `vlm` the
   description, `prepared` its first sentences that the text encoder reads whole, without list markers and
   "The image shows".
3. Each source generates one image from one of these captions. By default: turbo1, 1 step from the raw
   caption; turbo4, 4 steps from the description; prepared4, 4 steps from the prepared one.

One codec for both classes, so that a discriminator cannot tell them by JPEG or by a resizing filter: real
images get the size of the generated ones (LANCZOS, the shorter side, then the centre; those that are smaller
are left out), pass once through the generator's VAE, which every generated image came out of
(`--no_through_vae` leaves that out), and all are stored by one writer as lossless WebP. So all sources are of
one model: two VAEs would tell them apart, too.

In --output_dir: `pairs/`, a real image and a generated one, for each source; `ranked/`, a real image at rank
1, then the sources, the last one best; `candidates/`, every image with its source, seed, captions, and why it
is invalid; BUILD.json and README.md: what was left out for which reason. Splits are by real image. The prompt
is the prepared caption, for the real image and the generated ones alike (`--captions`). You should see a
progress bar for each model, then the counts.

The same command again repeats no finished call of a model, whatever ended it; the dataset is the same for any
number of processes. A further source generates its own images alone.

Left out: a gallery; downloading (img2dataset does it; COYO's scores come into the shards with its option
--save_additional_columns); captions by an endpoint. Shards are copied to datasets' cache when first read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from data_builders.export.config import HubOptions
from data_builders.prompts.captions import Caption, Source, parse_sources, prepare, prepare_for_pocket
from prefopt import pocket
from prefopt.cli import run
from prefopt.diffusion.generator import GenerationOptions
from prefopt.errors import InputError
from prefopt.options import check_paths_exist, option

SOURCES = ["turbo1 caption=raw steps=1", "turbo4 caption=vlm steps=4", "prepared4 caption=prepared steps=4"]
TABLES = ("pairs", "ranked")
QUESTION = "Describe this picture."


@dataclass
class DiscriminatorPairsConfig(HubOptions, GenerationOptions):
    """The real images, what describes them, what is generated, and what is written."""

    dataset_name: str | None = option(
        None,
        "Real images: a folder of shards (.tar), Parquet, Arrow or images, a hub id, or `pocket` (the "
        "default for the model `pocket`).",
    )
    dataset_config: str | None = option(
        None, "Configuration of the dataset: of the hub's, or a folder's sub-folder."
    )
    dataset_revision: str | None = option(None, "Revision of the dataset on the hub.")
    dataset_split: str = option("train", "The split that is read.")
    num_images: int | None = option(
        None,
        "Use the first N images that the scores allow (default: a table's all, the pocket's 240).",
        within="[1, inf)",
    )
    min_aesthetic: float | None = option(
        None,
        "Smallest aesthetic_score_laion_v2, or `aesthetic`; 6.5 for the best of COYO (default: any).",
        within="(-inf, inf)",
    )
    max_watermark: float | None = option(
        None, "Largest watermark_score (default: any).", within="(-inf, inf)"
    )
    max_nsfw: float | None = option(
        None, "Largest nsfw_score_opennsfw2 and nsfw_score_gantman (default: any).", within="(-inf, inf)"
    )
    through_vae: bool = option(True, "Pass real images once through the generator's VAE.")

    captioner_model_name_or_path: str | None = option(
        None,
        "Vision-language model that describes the real images: a folder, a hub id or `pocket` (the default "
        "for the model `pocket`).",
    )
    captioner_revision: str | None = option(None, "Revision of that model on the hub.")
    captioner_dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of that model.")
    captioner_prompt: str | None = option(None, f"Text file with the request (default: {QUESTION!r}).")
    captioner_max_new_tokens: int = option(128, "Longest description, in tokens.", within="[1, 1e6]")
    captioner_batch_size: int = option(8, "Images described at once.", within="[1, 65536]")

    sources: list[str] = option(
        SOURCES,
        "What generates an image for each real one, from worst to best; each quoted: `name caption=raw|vlm|"
        "prepared steps=4 guidance=0 adapter=folder scale=0.4`.",
    )
    captions: Caption = option("prepared", "The caption of the real image that becomes the tables' prompt.")
    seed: int = option(
        0, "The seeds of the images, and the pocket's renders, follow from it.", within="[0, 4294967295]"
    )
    block_size: int = option(
        32,
        "Real images per block; a crash loses at most the unfinished block of each process.",
        within="[1, 1e6]",
    )
    exports: list[str] = option(list(TABLES), f"Tables to write beside candidates: {', '.join(TABLES)}.")
    test_fraction: float = option(
        0.1, "Share of the real images that go to the split `test`.", within="[0, 1)"
    )
    shard_megabytes: int = option(256, "Largest Parquet file of a table.", within="[1, 1e6]")
    output_dir: str = option("data/discriminator", "Folder for the dataset.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_hub()
        described = ["captioner_model_name_or_path"] if self.described else []
        pocket.fill_defaults(self, [self.model_name_or_path], "dataset_name", *described)
        check_paths_exist(self, "dataset_name", "captioner_model_name_or_path", "captioner_prompt")
        _ = self.question
        if unknown := [name for name in self.exports if name not in TABLES]:
            raise InputError(f"--exports {unknown[0]} is unknown; known are {', '.join(TABLES)}")
        if self.height != self.width:
            raise InputError(
                f"--height is {self.height} and --width is {self.width}: real images are cropped to squares, "
                "so give both the same value, or neither"
            )

    @property
    def parsed_sources(self) -> list[Source]:
        """The sources, from worst to best."""
        return parse_sources(self.sources, self.generator)

    @property
    def described(self) -> bool:
        """Whether any caption needs a description."""
        return {self.captions, *(source.caption for source in self.parsed_sources)} != {"raw"}

    @property
    def question(self) -> str:
        """What the vision-language model is asked about each image."""
        if not self.captioner_prompt:
            return QUESTION
        try:
            text = Path(self.captioner_prompt).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--captioner_prompt {self.captioner_prompt} is no text file: {error}"
            ) from error
        if not text:
            raise InputError(f"--captioner_prompt {self.captioner_prompt} is empty; write a request into it")
        return text

    @property
    def captioner(self) -> Any:
        """That model's options, as data_builders.answers takes them: one answer, of the likeliest tokens."""
        return SimpleNamespace(
            model_name_or_path=self.captioner_model_name_or_path,
            model_revision=self.captioner_revision,
            adapter=None,
            dtype=self.captioner_dtype,
            answers=1,
            temperature=0.0,
            top_p=1.0,
            max_new_tokens=self.captioner_max_new_tokens,
            seed=self.seed,
            batch_size=self.captioner_batch_size,
        )


def main(config: DiscriminatorPairsConfig) -> None:
    """Build the dataset."""
    import torch

    from data_builders.answers.generation import AnswerPrompts, generator_of
    from data_builders.engine.passes import processes
    from data_builders.images.graded import build
    from data_builders.images.real import Limits, read_real
    from prefopt.ledger import Ledger

    state = processes()
    with state.main_process_first():
        real = read_real(
            str(config.dataset_name),
            Limits(config.min_aesthetic, config.max_watermark, config.max_nsfw),
            split=config.dataset_split,
            config=config.dataset_config,
            revision=config.dataset_revision,
            number=config.num_images,
            seed=config.seed,
            with_text=any(source.caption == "raw" for source in config.parsed_sources),
        )

    def describing(stored: Any, ledger: Ledger) -> AnswerPrompts:
        captioner = generator_of(config.captioner, torch.device(str(state.device)))
        answering = AnswerPrompts(
            captioner, stored, ledger, answers=1, batch_size=config.captioner_batch_size
        )
        answering.name, answering.unit = "describing", "image"
        return answering

    said = build(
        config,
        real,
        config.question,
        describing if config.described else None,
        prepare_for_pocket if config.model_name_or_path == pocket.NAME else prepare,
        state,
    )
    if said:
        print(said)


if __name__ == "__main__":
    run(main, DiscriminatorPairsConfig)
