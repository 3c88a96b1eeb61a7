"""SFT of several LoRA adapters on one vision-language model, and their exact average.

    accelerate launch recipes/vlm_qlora_ensemble.py --config recipes/configs/vlm_qlora_ensemble_llava15.yaml
    accelerate launch recipes/vlm_qlora_ensemble.py --model_name_or_path my/vlm --dataset_name my/answers \\
        --members 'lora_alpha=16 lora_dropout=0.05' 'lora_alpha=8 lora_dropout=0.05'

The base is loaded once; each member is trained on the same examples (`vlm_sft.py` says which formats), with
options of its own where `--members` names them. Into `output_dir` go member-1, member-2, ..., each an adapter
as vlm_sft.py writes it; `average`, exact at the sum of the ranks; and with `--average_rank` the nearest
average of that rank, with the share of energy that it keeps. All load with plain peft.

An average of adapters is the average of their products alpha / r * B A. Averages of B and A apart are
something else: see prefopt/averaging.py.

The same command with `--resume_from_checkpoint` goes on in the member, and at the checkpoint, where it
stopped.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from prefopt.cli import run
from prefopt.config import LearningRates
from prefopt.errors import InputError
from prefopt.options import option
from prefopt.vlm.config import VlmConfig


@dataclass
class VlmEnsembleConfig(VlmConfig):
    """The options of this recipe."""

    RATES: ClassVar[LearningRates] = LearningRates(lora=1e-4, full=2e-5, pocket=5e-3)
    members: list[str] = option(
        [
            "lora_alpha=16 lora_dropout=0.05",
            "lora_alpha=8 lora_dropout=0.05",
            "lora_alpha=16 lora_dropout=0.1",
            "lora_alpha=8 lora_dropout=0.1",
        ],
        "One text for each adapter: where its options differ from the run's.",
    )
    average_rank: int | None = option(None, "Write the best average of this rank, too.", within="[1, 65536]")
    output_dir: str | None = option("runs/vlm_qlora_ensemble", "Folder for adapters, checkpoints and logs.")
    learning_rate: float | None = RATES.option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharding:
            raise InputError(
                f"{self.sharding} does not keep the base for the next member: train each with vlm_sft, "
                "and average them with scripts/average_adapters.py"
            )


def main(config: VlmEnsembleConfig):
    """Read, train, save, average; the averages."""
    from prefopt.vlm.ensemble import parse_members, train_ensemble

    members = parse_members(config.members, Path(str(config.output_dir)))
    return train_ensemble(config, members, config.average_rank)


if __name__ == "__main__":
    run(main, VlmEnsembleConfig)
