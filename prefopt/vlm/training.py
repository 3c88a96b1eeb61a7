"""From a config to a trained model: what every recipe on vision-language models does."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from prefopt.objectives import Objective
from prefopt.reference import frozen_copy
from prefopt.trainer import PreferenceTrainer
from prefopt.vlm.chat import PairCollator
from prefopt.vlm.config import VlmConfig
from prefopt.vlm.models import add_lora, check_saved_adapter, load_vlm, start_from_lora
from prefopt.vlm.pairs import read_vision_pairs
from prefopt.vlm.scoring import CompletionScore


def train(config: VlmConfig, objective: Objective, about: Mapping[str, str]) -> PreferenceTrainer:
    """Load, train, save; `about` are facts for config.json."""
    loaded, processor = load_vlm(
        config.model_name_or_path,
        revision=config.model_revision,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
    )
    pairs = read_vision_pairs(
        str(config.dataset_name),
        split=config.dataset_train_split,
        config=config.dataset_config,
        revision=config.dataset_revision,
        image_token=getattr(processor, "image_token", "<image>"),
    )
    PartialState().print(pairs)
    objective.check_labels(pairs.soft_labels)
    model = to_train(loaded, config)
    frozen = objective.needs_reference and not config.use_peft
    trainer = PreferenceTrainer(
        model,
        config,
        score=CompletionScore(),
        objective=objective,
        train_dataset=pairs,
        data_collator=PairCollator(processor, max_length=config.max_length),
        processing_class=processor,
        reference_model=frozen_copy(model) if frozen else None,
        about=about,
    )
    trainer.train()
    # A whole model brings a config.json of its own, and the run's is not to be lost.
    folder = Path(str(config.output_dir), "" if config.use_peft else "model")
    trainer.save_model(str(folder))
    if isinstance(model, PeftModel) and trainer.is_world_process_zero():
        check_saved_adapter(model, folder)
    return trainer


def to_train(model: PreTrainedModel, config: VlmConfig) -> nn.Module:
    """The model with the adapter of the options: a trained one, a fresh one, or none."""
    if not config.use_peft:
        return model
    if config.adapter_name_or_path:
        return start_from_lora(model, config.adapter_name_or_path)
    torch.manual_seed(config.seed)  # the adapter's random factor is the same on every process
    return add_lora(model, config)
