"""Supervised fine-tuning of a text-to-image model on images worth imitating: the ordinary diffusion loss.

    accelerate launch recipes/diffusion_sft.py --dataset_name my/images
    accelerate launch recipes/diffusion_sft.py \\
        --config recipes/configs/diffusion_sft_sd21.yaml --dataset_name my/images

`dataset_name` is a folder or a hub id with the columns prompt and image (an imagefolder's metadata may call
the prompt `text` or `caption`); of a table of pairs, the chosen images are taken, as with the pocket's, the
default. The loss is the mean squared error of the model's prediction at a random timestep: it is noisy from
step to step and falls little; compare samples, not losses.
"""

from dataclasses import dataclass, field

from accelerate import PartialState
from torch import Tensor

from prefopt import pocket
from prefopt.cli import run
from prefopt.diffusion.denoiser import denoising_metrics
from prefopt.diffusion.training import DiffusionConfig, denoising_scores, prepare, save_pipeline
from prefopt.losses import sft_loss
from prefopt.records import InputError, read_sft
from prefopt.trainer import PreferenceTrainer


@dataclass
class DiffusionSFTConfig(DiffusionConfig):
    """The options of this recipe."""

    output_dir: str = field(default="runs/diffusion_sft", metadata={"help": "Where the adapter and logs go."})
    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference == "cache":
            raise InputError("--reference cache: supervised fine-tuning has no reference")


def denoising_loss(policy: Tensor, reference: Tensor | None) -> Tensor:
    """The denoising error of the image, (batch,): minus its score."""
    return sft_loss(-policy[:, 0])


def main(config: DiffusionSFTConfig) -> PreferenceTrainer:
    """Read, encode, train, save."""
    with PartialState().main_process_first():
        images = read_sft(
            pocket.resolve(config.dataset_name, "pairs"),
            split=config.dataset_train_split,
            config=config.dataset_config,
            revision=config.dataset_revision,
        )
    PartialState().print(images)
    denoiser, examples = prepare(config, images)
    trainer = PreferenceTrainer(
        denoiser,
        config,
        score=denoising_scores,
        objective=denoising_loss,
        metrics=denoising_metrics,
        train_dataset=examples,
        needs_reference=False,
        about={"loss": f"mean squared error of {denoiser.prediction}"},
    )
    trainer.train()
    trainer.save_model()
    save_pipeline(trainer)
    return trainer


if __name__ == "__main__":
    run(main, DiffusionSFTConfig)
