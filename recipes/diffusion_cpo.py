"""CPO on diffusion: train a text-to-image model on pairs or ranked lists without any reference.

    accelerate launch recipes/diffusion_cpo.py
    accelerate launch recipes/diffusion_cpo.py \\
        --config recipes/configs/diffusion_cpo_sd15.yaml --dataset_name data/lists/ranked

Contrastive preference optimization (arXiv 2401.08417) compares the denoising errors of a better and a worse
image at one timestep and noise, and adds the better one's own error: -log sigmoid(beta (error_l - error_w)) +
likelihood_weight * error_w. There is no reference forward: a step is shorter than DPO's by about a quarter.
`dataset_name` is a table of pairs, or of ranked lists with the columns prompt, images, ranks (1 = best, equal
= tie); each image of a list goes through the network once, in however many pairs it is. `--loss_type mapo`
(arXiv 2406.06424) and `simpo` have no reference, either; losses with one are in diffusion_dpo.py.

You should see `rewards/accuracies` rise above 0.5, where images of one prompt differ less than one noise from
another, slowly, and `error/chosen` fall or stay. Nothing but the likelihood term ties the model to where it
started: if `error/chosen` rises, raise likelihood_weight, or lower the learning rate. With a weight of 1, as
on language, it rose by half on the pocket within 250 steps, and the images were worse than the base's. Left
out: the paper's filtering of pairs, which data_builders/consensus_pairs.py does.
"""

from dataclasses import dataclass
from typing import ClassVar

from prefopt.cli import run
from prefopt.config import LearningRates
from prefopt.diffusion.config import DiffusionConfig
from prefopt.errors import InputError
from prefopt.objectives import ObjectiveOptions, objective_of
from prefopt.options import option


@dataclass
class DiffusionCPOConfig(DiffusionConfig, ObjectiveOptions):
    """The options of this recipe."""

    RATES: ClassVar[LearningRates] = LearningRates(lora=1e-4, full=1e-6, pocket=5e-4)
    loss_type: str = option("cpo", "The objective on pairs of candidates: cpo, simpo or mapo.")
    beta: float = option(1000.0, "Multiplies the difference of mean squared errors.", within="(0, 1e9]")
    likelihood_weight: float = option(
        1000.0,
        "For cpo: weight of the chosen's mean squared error; about beta, or the errors rise.",
        within="[0, 1e9]",
    )
    output_dir: str = option("runs/diffusion_cpo", "Folder for the adapter, checkpoints and logs.")
    learning_rate: float | None = RATES.option()

    def __post_init__(self) -> None:
        DiffusionConfig.__post_init__(self)
        ObjectiveOptions.__post_init__(self)
        if objective_of(self, self.beta).needs_reference:
            raise InputError(f"--loss_type {self.loss_type} has a reference: take recipes/diffusion_dpo.py")


def main(config: DiffusionCPOConfig):
    """Read, encode, train, save; the trainer."""
    from prefopt.diffusion.tables import read_preferences
    from prefopt.diffusion.training import train

    return train(
        config,
        read_preferences,
        objective_of(config, config.beta),
        about=lambda prediction: {
            "beta": f"{config.beta:g}, times minus the mean squared error of {prediction}"
        },
    )


if __name__ == "__main__":
    run(main, DiffusionCPOConfig)
