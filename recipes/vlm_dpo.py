"""DPO on a vision-language model: pairs of a better and a worse answer about images (arXiv 2305.18290).

    accelerate launch recipes/vlm_dpo.py --config recipes/configs/vlm_dpo_llava15.yaml
    accelerate launch recipes/vlm_dpo.py --model_name_or_path my/vlm --dataset_name my/pairs --load_in_4bit

`dataset_name` is a folder or a hub id with images, prompt, chosen and rejected in trl's vision preference
format, RLAIF-V's or LLaMA-Factory's. By default a LoRA is trained on the language model; the vision tower and
the projector stay as they are. The reference is the model with its adapter off, or a frozen copy when all
weights are trained; `--loss_type cpo` and `simpo` need none. The adapter goes to `output_dir`, a whole model
to `output_dir`/model.

An image and its prompt are read once for both answers, and an image is encoded once for policy and reference.
`--reference cache` computes the reference's scores once for all epochs, `--vision_features cache` the images'
features. Where a model's attention cannot share a prompt, the log says so.

You should see the loss start at 0.6931 (ln 2: policy and reference are equal) and `rewards/accuracies` rise
above 0.5. If both rewards fall together by many nats, answers get worse though the margin grows: lower the
learning rate, or raise `beta`.
"""

from dataclasses import dataclass
from typing import ClassVar

from prefopt.cli import run
from prefopt.config import LearningRates
from prefopt.objectives import ObjectiveOptions, objective_of
from prefopt.options import option
from prefopt.vlm.config import VlmConfig


@dataclass
class VlmDPOConfig(VlmConfig, ObjectiveOptions):
    """The options of this recipe."""

    RATES: ClassVar[LearningRates] = LearningRates(lora=1e-5, full=1e-6, pocket=2e-4)
    beta: float = option(
        0.1,
        "Factor on log p: of whole completions, for ipo and simpo averaged over tokens.",
        within="(0, 1e9]",
    )
    output_dir: str | None = option("runs/vlm_dpo", "Folder for the adapter, checkpoints and logs.")
    learning_rate: float | None = RATES.option()

    def __post_init__(self) -> None:
        VlmConfig.__post_init__(self)
        ObjectiveOptions.__post_init__(self)


def main(config: VlmDPOConfig):
    """Read, train, save; the trainer."""
    from prefopt.vlm.training import train

    unit = "mean" if config.loss_type in ("ipo", "simpo") else "sum"
    about = {"beta": f"{config.beta:g}, times the {unit} of log p in nats"}
    return train(config, "pairs", objective_of(config, config.beta), about)


if __name__ == "__main__":
    run(main, VlmDPOConfig)
