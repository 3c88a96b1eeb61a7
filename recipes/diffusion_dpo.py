"""Diffusion-DPO: train a text-to-image model on pairs of a preferred and a rejected image (arXiv 2311.12908).

    accelerate launch recipes/diffusion_dpo.py
    accelerate launch recipes/diffusion_dpo.py \\
        --config recipes/configs/diffusion_dpo_sd15.yaml --dataset_name my/pairs

Without arguments it trains a LoRA of the pocket model on the pocket's own pairs. `dataset_name` is a folder
or a hub id with the columns prompt, chosen, rejected; Pick-a-Pic is read as it is. Images and prompts are
encoded once, before the first step; the reference is the model with its adapters off, or a frozen copy when
all weights are trained.

You should see the loss start at 0.6931 (ln 2: policy and reference are equal) and fall slowly,
`rewards/accuracies` rise above 0.5, and `error/chosen` stay about where it was. If `error/chosen` rises by a
tenth and more, images turn to noise: lower the learning rate, or raise `beta_dpo`, which ties the model to
its reference. Values of `beta_dpo` are not portable between models that predict noise and models that predict
v.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from accelerate import PartialState

from prefopt import pocket
from prefopt.cli import run
from prefopt.diffusion.denoiser import denoising_metrics
from prefopt.diffusion.training import DiffusionConfig, denoising_scores, prepare, save_pipeline
from prefopt.losses import dpo_loss, hinge_loss, ipo_loss, robust_dpo_loss
from prefopt.records import InputError, read_pairs
from prefopt.trainer import PreferenceTrainer, pairwise


@dataclass
class DiffusionDPOConfig(DiffusionConfig):
    """The options of this recipe."""

    loss_type: Literal["dpo", "ipo", "hinge", "robust"] = field(
        default="dpo", metadata={"help": "The objective on the two denoising errors and their references."}
    )
    beta_dpo: float = field(
        default=5000.0,
        metadata={"help": "The paper's beta: the logit is half of it times the difference of errors."},
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of labels taken to be wrong, for dpo and robust; in [0, 0.5)."}
    )
    output_dir: str = field(default="runs/diffusion_dpo", metadata={"help": "Where the adapter and logs go."})
    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta_dpo > 0:
            raise InputError(f"--beta_dpo is {self.beta_dpo}; it is a positive number, 5000 in the paper")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"--label_smoothing is {self.label_smoothing}; it lies in [0, 0.5)")
        if self.label_smoothing and self.loss_type not in ("dpo", "robust"):
            raise InputError(f"--label_smoothing is for dpo and robust, not for {self.loss_type}")


def main(config: DiffusionDPOConfig) -> PreferenceTrainer:
    """Read, encode, train, save."""
    with PartialState().main_process_first():
        pairs = read_pairs(
            pocket.resolve(config.dataset_name, "pairs"),
            split=config.dataset_train_split,
            config=config.dataset_config,
            revision=config.dataset_revision,
        )
    PartialState().print(pairs)
    denoiser, examples = prepare(config, pairs)
    beta = 0.5 * config.beta_dpo  # the paper's code halves its beta; ours is plain
    smoothing = config.label_smoothing
    losses = {
        "dpo": partial(dpo_loss, label_smoothing=smoothing),
        "ipo": ipo_loss,
        "hinge": hinge_loss,
        "robust": partial(robust_dpo_loss, label_smoothing=smoothing),
    }
    full_and_live = not config.use_peft and config.reference == "live"
    trainer = PreferenceTrainer(
        denoiser,
        config,
        score=denoising_scores,
        objective=pairwise(losses[config.loss_type], beta=beta),
        metrics=denoising_metrics,
        train_dataset=examples,
        reference_model=deepcopy(denoiser) if full_and_live else None,
        about={"beta": f"{beta:g}, times minus the mean squared error of {denoiser.prediction}"},
    )
    trainer.train()
    trainer.save_model()
    save_pipeline(trainer)
    return trainer


if __name__ == "__main__":
    run(main, DiffusionDPOConfig)
