"""Supervised fine-tuning of a text-to-image model on images worth imitating: the ordinary diffusion loss.

    accelerate launch recipes/diffusion_sft.py --dataset_name my/images
    accelerate launch recipes/diffusion_sft.py \\
        --config recipes/configs/diffusion_sft_sd21.yaml --dataset_name my/images

`dataset_name` is a folder or a hub id with the columns prompt and image (an imagefolder's metadata may call
the prompt `text` or `caption`); of a table of pairs, the chosen images are taken, as with the pocket's, the
default. The loss is the mean squared error of the model's prediction at a random timestep: it is noisy from
step to step and falls little; compare samples, not losses.
"""

from dataclasses import dataclass
from typing import ClassVar

from prefopt.cli import run
from prefopt.config import LearningRates
from prefopt.diffusion.config import DiffusionConfig
from prefopt.objectives import supervised
from prefopt.options import option


@dataclass
class DiffusionSFTConfig(DiffusionConfig):
    """The options of this recipe."""

    RATES: ClassVar[LearningRates] = LearningRates(lora=1e-4, full=1e-5, pocket=5e-4)
    output_dir: str = option("runs/diffusion_sft", "Folder for the adapter, checkpoints and logs.")
    learning_rate: float | None = RATES.option()


def main(config: DiffusionSFTConfig):
    """Read, encode, train, save; the trainer."""
    from prefopt.diffusion.tables import read_sft
    from prefopt.diffusion.training import train

    return train(
        config,
        read_sft,
        supervised(),
        about=lambda prediction: {"loss": f"mean squared error of {prediction}"},
    )


if __name__ == "__main__":
    run(main, DiffusionSFTConfig)
