"""Supervised fine-tuning of a vision-language model on answers worth imitating.

    accelerate launch recipes/vlm_sft.py --model_name_or_path my/vlm --dataset_name my/answers
    accelerate launch recipes/vlm_sft.py --config recipes/configs/vlm_sft_llava15.yaml

`dataset_name` is a folder or a hub id in trl's vision SFT format (images with messages, or with prompt and
completion), LLaVA's JSON or LLaMA-Factory's; of a table of pairs, the chosen answers are taken. All turns of
a conversation are learned in one row. By default a LoRA is trained on the language model; with
`--load_in_4bit` on 4-bit weights (QLoRA, arXiv 2305.14314).

The loss is the mean negative log-likelihood of the answers' tokens, each answer's end among them, over the
whole optimizer step: it does not depend on how a step is split into batches and processes. You should see it
fall within the first epoch; when it falls in later ones alone, answers are being learned by heart.
"""

from dataclasses import dataclass
from typing import ClassVar

from prefopt.cli import run
from prefopt.config import LearningRates
from prefopt.objectives import supervised
from prefopt.options import option
from prefopt.vlm.config import VlmConfig


@dataclass
class VlmSFTConfig(VlmConfig):
    """The options of this recipe."""

    RATES: ClassVar[LearningRates] = LearningRates(lora=1e-4, full=2e-5, pocket=5e-3)
    output_dir: str | None = option("runs/vlm_sft", "Folder for the adapter, checkpoints and logs.")
    learning_rate: float | None = RATES.option()


def main(config: VlmSFTConfig):
    """Read, train, save; the trainer."""
    from prefopt.vlm.training import train

    about = {"loss": "mean of -log p over the tokens of the step's answers, in nats"}
    return train(config, "sft", supervised(), about)


if __name__ == "__main__":
    run(main, VlmSFTConfig)
