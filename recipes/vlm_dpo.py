"""DPO on a vision-language model: pairs of a better and a worse answer about images (arXiv 2305.18290).

    accelerate launch recipes/vlm_dpo.py --config recipes/configs/vlm_dpo_llava15.yaml
    accelerate launch recipes/vlm_dpo.py --model_name_or_path my/vlm --dataset_name my/pairs --max_length 2048

`dataset_name` is a folder or a hub id in trl's vision preference format: images, prompt, chosen, rejected.
By default a LoRA is trained on the language model; the vision tower and the projector stay as they are. The
reference is the model with its adapter off, or a frozen copy when all weights are trained. The adapter goes
to `output_dir`, a whole model to `output_dir`/model.

You should see the loss start at 0.6931 (ln 2: policy and reference are equal) and `rewards/accuracies` rise
above 0.5. If both rewards fall together by many nats, answers get worse though the margin grows: lower the
learning rate, or raise `beta`.

Left out: caches of vision features and of reference scores, rows that share the prompt of both answers, 4-bit
base weights. Each image is encoded for either side of its pair, in the policy and in the reference.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from accelerate import PartialState

from prefopt.cli import run
from prefopt.losses import dpo_loss, hinge_loss, ipo_loss, robust_dpo_loss
from prefopt.records import InputError
from prefopt.trainer import PreferenceTrainer, pairwise
from prefopt.vlm.chat import PairCollator
from prefopt.vlm.models import check_saved_adapter
from prefopt.vlm.scoring import average_scores, completion_scores
from prefopt.vlm.training import VlmConfig, prepare


@dataclass
class VlmDPOConfig(VlmConfig):
    """The options of this recipe."""

    loss_type: Literal["dpo", "ipo", "hinge", "robust"] = field(
        default="dpo",
        metadata={"help": "The objective on log p of the completions: summed, for ipo averaged over tokens."},
    )
    beta: float = field(default=0.1, metadata={"help": "How closely the policy is tied to its reference."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of labels taken to be wrong, for dpo and robust; in [0, 0.5)."}
    )
    output_dir: str | None = field(
        default="runs/vlm_dpo", metadata={"help": "Where the adapter and logs go."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise InputError(f"--beta is {self.beta}; it is a positive number, 0.1 in most runs")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"--label_smoothing is {self.label_smoothing}; it lies in [0, 0.5)")
        if self.label_smoothing and self.loss_type not in ("dpo", "robust"):
            raise InputError(f"--label_smoothing is for dpo and robust, not for {self.loss_type}")


def main(config: VlmDPOConfig) -> PreferenceTrainer:
    """Read, train, save."""
    model, processor, pairs = prepare(config)
    PartialState().print(pairs)
    losses = {
        "dpo": partial(dpo_loss, label_smoothing=config.label_smoothing),
        "ipo": ipo_loss,
        "hinge": hinge_loss,
        "robust": partial(robust_dpo_loss, label_smoothing=config.label_smoothing),
    }
    average = config.loss_type == "ipo"
    trainer = PreferenceTrainer(
        model,
        config,
        score=average_scores if average else completion_scores,
        objective=pairwise(losses[config.loss_type], beta=config.beta),
        train_dataset=pairs,
        data_collator=PairCollator(processor, max_length=config.max_length),
        processing_class=processor,
        reference_model=None if config.use_peft else deepcopy(model),
        about={"beta": f"{config.beta:g}, times the {'mean' if average else 'sum'} of log p in nats"},
    )
    trainer.train()
    # A whole model brings a config.json of its own, and the run's is not to be lost.
    folder = Path(config.output_dir, "" if config.use_peft else "model")
    trainer.save_model(str(folder))
    if config.use_peft and trainer.is_world_process_zero():
        check_saved_adapter(model, folder)
    return trainer


if __name__ == "__main__":
    run(main, VlmDPOConfig)
