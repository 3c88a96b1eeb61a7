"""Build preference pairs from a vision-language model's own answers, compared by itself: self-critique.

    python data_builders/self_critique.py
    accelerate launch data_builders/self_critique.py --dataset_name my/lrv_chart --dtype bfloat16 \\
        --model_name_or_path llava-hf/llava-1.5-7b-hf --adapter runs/vlm_qlora_ensemble/average

1. The model, with its adapter, answers each [images, prompt] of a table `--answers` times. Image and prompt
   are read once for all of them; an answer is a function of prompt, images, seed and its number.
2. A critic, by default the same model with the same adapter, is asked which of two different answers is
   better: a choice, read by the log-odds of its letters, in both orders of the two. Both are averaged.
3. The best answer of a prompt against its worst becomes a pair, if the critic is sure enough (`--margin`).
   With two answers that is the one comparison there is; of more, every two are compared, and an answer's
   rank is by the mean of its probabilities.

In --output_dir: `pairs/` in trl's vision preference format, with `p_chosen`, which the recipes read as a soft
label; `candidates/`, every answer with what it was made by, its comparisons, and why it is in no pair;
BUILD.json, a dataset card, and gallery.html. You should see two progress bars, then the counts: each reason
with its prompts, how often both orders agree, and how often the chosen answer is the longer one.

The same command again repeats no finished call of a model, whatever ended it; another margin, rule or balance
of lengths calls no model. The dataset is the same for any number of processes.

Averaging log-odds cancels what the critic likes about one place, and leaves what it says of the answers. The
default margin of 0.1 is far above rounding; what little a pair just above it says, p_chosen tells the loss. A
pair's `consistent` says whether both orders agree.

Left out: pairs from scores of single answers, which are coarser than comparisons; a test split, since a
table's own splits are answered one by one; answers generated behind an endpoint, where a seed need not mean
anything; 4-bit weights. A critic by log-odds is shown one image: prompts with none or several need one that
writes (`--critic_url` with `--critic_writes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_builders.answers.config import SelfCritiqueConfig
from prefopt.cli import run

if TYPE_CHECKING:
    from data_builders.answers.criticism import AnyCritic
    from data_builders.answers.generation import Generator
    from prefopt.loading import Lazy


def main(
    config: SelfCritiqueConfig,
    generator: Lazy[Generator] | None = None,
    critic: Lazy[AnyCritic] | None = None,
) -> None:
    """Build the dataset; generator and critic are those of the options unless they are given."""
    import torch

    from data_builders.answers.build import Build
    from data_builders.answers.criticism import critic_of
    from data_builders.answers.generation import generator_of
    from data_builders.answers.source import read_source
    from data_builders.engine.passes import processes

    state = processes()
    device = torch.device(str(state.device))
    build = Build(
        config,
        read_source(config),
        generator or generator_of(config, device),
        critic or critic_of(config, device),
        state,
    )
    if said := build.run():
        print(said)


if __name__ == "__main__":
    run(main, SelfCritiqueConfig)
