"""Diffusion-DPO: train a text-to-image model on pairs of a preferred and a rejected image (arXiv 2311.12908).

    accelerate launch recipes/diffusion_dpo.py
    accelerate launch recipes/diffusion_dpo.py \\
        --config recipes/configs/diffusion_dpo_sd15.yaml --dataset_name my/pairs

Without arguments it trains a LoRA of the pocket model on the pocket's own pairs. `dataset_name` is a folder
or a hub id with the columns prompt, chosen, rejected; Pick-a-Pic is read as it is. Images and prompts are
encoded once, before the first step; the reference is the model with its adapters off, or a frozen copy when
all weights are trained. `--loss_type cpo` and `simpo` need no reference: a step is then shorter by one
forward pass.

You should see the loss start at 0.6931 (ln 2: policy and reference are equal) and fall slowly,
`rewards/accuracies` rise above 0.5, and `error/chosen` stay about where it was. If `error/chosen` rises by a
tenth and more, images turn to noise: lower the learning rate, or raise `beta_dpo`, which ties the model to
its reference. Values of `beta_dpo` are not portable between models that predict noise and models that predict
v.
"""

from dataclasses import dataclass
from typing import ClassVar

from prefopt.cli import run
from prefopt.config import LearningRates
from prefopt.diffusion.config import DiffusionConfig
from prefopt.objectives import ObjectiveOptions, objective_of
from prefopt.options import option


@dataclass
class DiffusionDPOConfig(DiffusionConfig, ObjectiveOptions):
    """The options of this recipe."""

    RATES: ClassVar[LearningRates] = LearningRates(lora=1e-4, full=1e-6, pocket=1e-3)
    BETA: ClassVar[str] = "beta_dpo"

    beta_dpo: float = option(
        5000.0,
        "The paper's beta: the logit is half of it times the difference of errors. diffusers' script does "
        "not halve its own: its 2500 is 5000 here.",
        within="(0, 1e9]",
    )
    output_dir: str = option("runs/diffusion_dpo", "Folder for the adapter, checkpoints and logs.")
    learning_rate: float | None = RATES.option()

    def __post_init__(self) -> None:
        DiffusionConfig.__post_init__(self)
        ObjectiveOptions.__post_init__(self)


def main(config: DiffusionDPOConfig):
    """Read, encode, train, save; the trainer."""
    from prefopt.diffusion.tables import read_preferences
    from prefopt.diffusion.training import train

    beta = 0.5 * config.beta_dpo  # the paper's code halves its beta; ours is plain
    return train(
        config,
        read_preferences,
        objective_of(config, beta),
        about=lambda prediction: {"beta": f"{beta:g}, times minus the mean squared error of {prediction}"},
    )


if __name__ == "__main__":
    run(main, DiffusionDPOConfig)
