"""The same DPO as trl: five optimizer steps of both trainers on the same rows, from the same weights."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_vlm import PEFT_ON_TRANSFORMERS_5, tiny_llava, vision_pairs
from torch import nn
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from prefopt.config import LoraArguments, PreferenceConfig
from prefopt.draws import epoch_order
from prefopt.objectives import ObjectiveOptions, objective_of
from prefopt.trainer import PreferenceTrainer
from prefopt.vlm.chat import PairCollator
from prefopt.vlm.models import add_lora, load_vlm
from prefopt.vlm.pairs import VisionPairs
from prefopt.vlm.scoring import CompletionScore

pytestmark = [
    pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5),
    pytest.mark.filterwarnings(
        "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
    ),  # trl's default
]

STEPS, BATCH, ACCUMULATION, BETA, SEED = 5, 2, 2, 0.3, 7
ROWS = STEPS * BATCH * ACCUMULATION


class Options(ObjectiveOptions):
    """The menu's options, with the beta of this file."""

    beta = BETA


def options(folder: Path) -> dict:
    """What both trainers are told."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "disable_tqdm": True,
        "seed": SEED,
    }


def losses(trainer: Trainer) -> list[float]:
    """The loss of every optimizer step, unrounded."""
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def policies(folder: str, lora: bool) -> tuple[nn.Module, nn.Module]:
    """Two copies of the same policy."""
    model, _ = load_vlm(folder)
    if lora:
        torch.manual_seed(1)
        model = add_lora(model, LoraArguments(lora_r=4, lora_alpha=8, lora_dropout=0.0))
    return model, deepcopy(model)


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "hinge"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_losses_of_five_steps_equal_trl_s(lora: bool, loss_type: str, tmp_path: Path) -> None:
    folder, table = tiny_llava(tmp_path / "llava"), vision_pairs(ROWS)
    processor = load_vlm(folder)[1]
    model, same = policies(folder, lora)
    reference = None if lora else deepcopy(model)

    ours = PreferenceTrainer(
        model,
        PreferenceConfig(**options(tmp_path / "ours")),
        score=CompletionScore(),
        objective=objective_of(Options(loss_type=loss_type), BETA),
        train_dataset=VisionPairs(table, "rows"),
        data_collator=PairCollator(processor),
        reference_model=reference,
    )
    ours.train()

    theirs = DPOTrainer(
        model=same,
        ref_model=None if lora else load_vlm(folder)[0],
        args=DPOConfig(
            **options(tmp_path / "theirs"),
            beta=BETA,
            loss_type=["sigmoid" if loss_type == "dpo" else loss_type],
            max_length=None,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
        ),
        processing_class=processor,
        train_dataset=in_our_order(table),
    )
    theirs.train()

    assert len(losses(ours)) == STEPS
    assert losses(ours) == pytest.approx(losses(theirs), rel=0, abs=1e-5)
    assert abs(losses(ours)[0] - losses(ours)[-1]) > 0.01  # the weights have moved


def in_our_order(table: Dataset) -> Dataset:
    """The rows as our sampler visits them in the first epoch."""
    return table.select(epoch_order(SEED, 0, len(table)))
