"""The same DPO as trl: five optimizer steps of both trainers on the same rows, from the same weights."""

from copy import deepcopy
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_vlm import PEFT_ON_TRANSFORMERS_5, tiny_llava, vision_pairs
from torch import nn
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from prefopt.config import LoraArguments, PreferenceConfig
from prefopt.draws import epoch_order
from prefopt.objectives import ObjectiveOptions, objective_of
from prefopt.trainer import PreferenceTrainer
from prefopt.vlm.batches import Collator
from prefopt.vlm.examples import VisionExamples
from prefopt.vlm.models import add_lora, load_vlm
from prefopt.vlm.scoring import CompletionScore
from prefopt.vlm.trees import PromptPositions

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


def ours(model: Any, processor: Any, table: Dataset, folder: Path, loss_type: str, shared: bool, **more: Any):
    """Our trainer, with one row a pair or with the plain duplicated batch."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    score = CompletionScore(frozen_vision=isinstance(model, PeftModel))
    return PreferenceTrainer(
        model,
        PreferenceConfig(**options(folder)),
        score=score,
        prepare=score.prepare,
        objective=objective_of(Options(loss_type=loss_type), BETA),
        train_dataset=VisionExamples(table, "rows", "pairs"),
        data_collator=Collator(processor, positions=PromptPositions(base) if shared else None),
        **more,
    )


def theirs(
    model: Any, processor: Any, table: Dataset, folder: Path, loss_type: str, **more: Any
) -> DPOTrainer:
    """trl's trainer, which reads the rows in the order that ours takes in its first epoch."""
    return DPOTrainer(
        model=model,
        args=DPOConfig(
            **options(folder),
            beta=BETA,
            loss_type=["sigmoid" if loss_type == "dpo" else loss_type],
            max_length=None,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
        ),
        processing_class=processor,
        train_dataset=table.select(epoch_order(SEED, 0, len(table))),
        **more,
    )


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "hinge"])
@pytest.mark.parametrize(
    ("lora", "shared"), [(True, True), (True, False), (False, True)], ids=["shared", "plain", "full-shared"]
)
def test_losses_of_five_steps_equal_trl_s(lora: bool, shared: bool, loss_type: str, tmp_path: Path) -> None:
    folder, table = tiny_llava(tmp_path / "llava"), vision_pairs(ROWS)
    processor = load_vlm(folder)[1]
    model, same = policies(folder, lora)
    reference, other_reference = (None, None) if lora else (deepcopy(model), load_vlm(folder)[0])
    one = ours(model, processor, table, tmp_path / "ours", loss_type, shared, reference_model=reference)
    one.train()
    other = theirs(
        same,
        processor,
        table,
        tmp_path / "theirs",
        loss_type,
        ref_model=other_reference,
    )
    other.train()
    assert len(losses(one)) == STEPS
    assert losses(one) == pytest.approx(losses(other), rel=0, abs=1e-5)
    assert abs(losses(one)[0] - losses(one)[-1]) > 0.01  # the weights have moved


def test_gradients_of_a_batch_equal_trl_s(tmp_path: Path) -> None:
    """Within 1e-5, where the policy has left the reference, so that the pairs weigh differently."""
    folder, table = tiny_llava(tmp_path / "llava"), vision_pairs(12)
    processor = load_vlm(folder)[1]
    model, same = policies(folder, lora=True)
    one = ours(model, processor, table, tmp_path / "ours", "dpo", True)
    batch = one.data_collator([one.train_dataset[i, 0] for i in range(4)])
    other = theirs(same, processor, table, tmp_path / "theirs", "dpo")
    rows = other.data_collator([table[i] for i in range(4)])
    for policy in (model, same):  # trl takes the adapter as it was at first for its reference
        torch.manual_seed(3)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name and ".default." in name:
                parameter.data.normal_(std=0.2)
    found = one.compute_loss(model.train(), one._prepare_inputs(batch))
    wanted = other.compute_loss(same.train(), other._prepare_inputs(rows))
    found.backward()
    wanted.backward()
    assert found.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert abs(found.item() - log(2)) > 0.01
    trained = dict(same.named_parameters())
    pairs = [(p.grad, trained[name].grad) for name, p in model.named_parameters() if p.requires_grad]
    assert all((p - q).abs().max() < 1e-5 for p, q in pairs)
    assert max(p.abs().max() for p, _ in pairs) > 0.01
