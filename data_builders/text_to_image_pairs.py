"""Build preference pairs: a model draws several candidates of each prompt, and a CLIP score picks two.

    accelerate launch data_builders/text_to_image_pairs.py
    accelerate launch data_builders/text_to_image_pairs.py --prompts prompts.txt --output_dir data/sd21 \\
        --model_name_or_path stabilityai/stable-diffusion-2-1 --num_inference_steps 50 --guidance_scale 7.5 \\
        --dtype bfloat16 --clip_model_name_or_path openai/clip-vit-large-patch14

Without arguments the pocket model draws the captions of its world. In --output_dir: `candidates/`, every
image with its seed, score and rank; `pairs/`, the best against the worst of each prompt, which the recipes
read; BUILD.json and README.md, what was built, and what was dropped for which reason. The same command again,
after a crash or with another --min_margin or --test_fraction, draws nothing twice. You should see one
progress bar, then the counts.

Every image can be drawn again from its row, and the dataset is the same for any number of processes on one
kind of machine. Left out: judges beside CLIP, and selections beside best against worst.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from time import perf_counter

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from data_builders.blocks import Block, CandidatesTable
from data_builders.candidates import draw, encode, expand, rank, score, select
from data_builders.config import DrawingConfig, at_least
from data_builders.export import export_pairs, write_build
from data_builders.prompts import POCKET, distinct, identify, read_prompts
from data_builders.sources import Source, settle
from data_builders.stages import flow, watched
from prefopt.cli import run
from prefopt.judges.clip import ClipScorer
from prefopt.records import InputError


@dataclass
class TextToImagePairsConfig(DrawingConfig):
    """The options of this builder."""

    prompts: str | None = field(
        default=None, metadata={"help": "Text file, one prompt a line; or `pocket`, its training captions."}
    )
    num_prompts: int | None = field(
        default=None, metadata={"help": "Use the first so many (default: a file's all, the pocket's 160)."}
    )
    clip_model_name_or_path: str = field(
        default="pocket", metadata={"help": "CLIP that scores: a folder, a hub id or pocket."}
    )
    min_margin: float = field(
        default=0.0, metadata={"help": "Prompts whose best and worst score differ by less give no pair."}
    )
    output_dir: str = field(default="data/pairs", metadata={"help": "Where the dataset goes."})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_prompts")
        at_least(self, 0, "min_margin")
        if self.prompts is None and self.model_name_or_path != POCKET:
            raise InputError("--prompts is missing: name a text file, one prompt a line")
        self.prompts = self.prompts or POCKET
        if self.prompts == POCKET:
            self.num_prompts = self.num_prompts or 160


def main(config: TextToImagePairsConfig) -> None:
    """Draw and judge the blocks that are missing, then write the pairs of all."""
    start = perf_counter()
    # Without `cpu`, processes on CPUs would each believe to be the only one; one that is done waits for all.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=12))
    texts = read_prompts(str(config.prompts), config.num_prompts, config.seed)
    source = config.source
    clip = ClipScorer(config.clip_model_name_or_path, device=torch.device(str(state.device)))
    settle(clip.model)
    made_with = source.identity() | {"scorer_identity": clip.identity}
    facts = made_with | source.names() | {"scorer": config.clip_model_name_or_path}
    duplicates: Counter[str] = Counter()
    prompts = [prompt | facts for prompt in flow(identify(texts), [distinct(duplicates)])]

    folder = Path(config.output_dir)
    splitting = {name: getattr(config, name) for name in ("seed", "candidates", "batch_size", "block_size")}
    table = CandidatesTable(folder / "candidates", made_with | splitting, prompts, config.block_size)
    missing = table.missing(state.process_index, state.num_processes)
    draw_blocks(config, source, clip, table, missing)
    drawn = gather_object([block.file.name for block in missing])
    if state.is_main_process:
        table.clean()
        figures = export_pairs(
            table.read(select(config.min_margin)),
            folder / "pairs",
            test_fraction=config.test_fraction,
            max_bytes=config.shard_megabytes * 2**20,
        )
        figures.dropped_prompts += duplicates
        run_facts = {
            "processes": state.num_processes,
            "blocks": len(table.blocks),
            "blocks_drawn": len(drawn),
            "seconds": round(perf_counter() - start, 1),
        }
        print(write_build(folder, asdict(config), table.identity, figures, run_facts))
    state.wait_for_everyone()


def draw_blocks(
    config: TextToImagePairsConfig,
    source: Source,
    clip: ClipScorer,
    table: CandidatesTable,
    blocks: list[Block],
) -> None:
    """The builder itself: from a block's prompts to its candidates, scored, ranked and selected."""
    if not blocks:
        return
    images = config.candidates * sum(len(block.prompts) for block in blocks)
    quiet = not PartialState().is_main_process
    with tqdm(total=images, desc="candidates", unit="image", disable=quiet) as bar:
        stages = [
            expand(range(config.candidates), config.seed),
            draw(source.load(clip.device), source.sampler, config.batch_size),
            encode(threads=4, ahead=2 * config.batch_size),
            score(clip, config.batch_size),
            rank,
            select(config.min_margin),
            watched(bar),
        ]
        for block in blocks:
            table.write(block, flow(block.prompts, stages))


if __name__ == "__main__":
    run(main, TextToImagePairsConfig)
