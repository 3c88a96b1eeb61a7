"""From a config to a trained model: what every recipe on vision-language models does."""

import logging
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, ProcessorMixin

from prefopt import pocket
from prefopt.adapters import apply_options
from prefopt.errors import InputError
from prefopt.objectives import Objective
from prefopt.reference import frozen_copy
from prefopt.resuming import check_start
from prefopt.trainer import PreferenceTrainer
from prefopt.vlm.batches import Collator
from prefopt.vlm.config import VlmConfig
from prefopt.vlm.examples import VisionExamples, read_vision_examples
from prefopt.vlm.formats import Kind
from prefopt.vlm.models import add_lora, check_saved_adapter, four_bits, load_vlm, start_from_lora
from prefopt.vlm.rows import unshareable
from prefopt.vlm.scoring import CompletionScore, check_head, completion_metrics
from prefopt.vlm.splits import split_by_image
from prefopt.vlm.trees import PromptPositions
from prefopt.vlm.vision import cache_features

logger = logging.getLogger(__name__)


def train(config: VlmConfig, kind: Kind, objective: Objective, about: Mapping[str, str]) -> PreferenceTrainer:
    """Load, train on `pairs` or `sft` examples, save; `about` are facts for config.json.

    InputError for labels or options that the objective cannot use.
    """
    if config.reference == "cache" and not objective.needs_reference:
        raise InputError("--reference cache: this objective has no reference")
    check_start(config)
    loaded, processor = load(config)
    examples = read_examples(config, kind, processor)
    PartialState().print(examples)
    objective.check_labels(examples.soft_labels)
    model = to_train(loaded, config)
    held_out = read_held_out(config, kind, processor)
    trainer = trainer_of(config, loaded, model, processor, examples, objective, about, held_out)
    trainer.train()
    save(trainer, config)
    return trainer


def load(config: VlmConfig) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The base model and its processor, as the options ask for them."""
    return load_vlm(
        pocket.resolve(config.model_name_or_path, "llava"),
        revision=config.model_revision,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
        quantization=quantization(config),
    )


def read_examples(
    config: VlmConfig, kind: Kind, processor: ProcessorMixin, split: str | None = None
) -> VisionExamples:
    """The examples that the options name, of the training split or another one."""
    return read_vision_examples(
        str(config.dataset_name),
        kind,
        split=split or config.dataset_train_split,
        config=config.dataset_config,
        revision=config.dataset_revision,
        image_token=getattr(processor, "image_token", "<image>"),
    )


def read_held_out(config: VlmConfig, kind: Kind, processor: ProcessorMixin) -> VisionExamples | None:
    """The examples of the split that is measured, if the options name one."""
    if config.dataset_test_split is None:
        return None
    examples = read_examples(config, kind, processor, config.dataset_test_split)
    PartialState().print(examples)
    return examples


def trainer_of(
    config: VlmConfig,
    base: PreTrainedModel,
    model: nn.Module,
    processor: ProcessorMixin,
    examples: VisionExamples,
    objective: Objective,
    about: Mapping[str, str],
    held_out: VisionExamples | None = None,
) -> PreferenceTrainer:
    """The trainer of a model, which is `base` or has its adapters on it.

    `held_out` are measured; without them, those of `examples` that the options hold out.
    """
    check_head(base.config)
    train_examples, by_image = split(config, examples)
    groups = _groups(train_examples) if config.group_by_image else None
    frozen = objective.needs_reference and not config.use_peft and config.reference == "live"
    score = CompletionScore(frozen_vision=config.use_peft)
    collator = Collator(
        processor,
        max_length=config.max_length,
        positions=PromptPositions(base) if shares_prefix(config, base) else None,
        row_tokens=config.row_tokens or 0,
    )
    if config.vision_features == "cache":
        cache = Path(config.cache_dir or Path(str(config.output_dir), "cache"), "features")
        base.to(PartialState().device)  # pyright: ignore[reportArgumentType] (its decorator hides it)
        rows = config.first_rows(len(train_examples), groups)
        read = train_examples if rows is None else train_examples.select(rows)
        for part in (read, *([by_image] if by_image else [])):
            collator.features = cache_features(
                base,
                part,
                collator.encode,
                folder=cache,
                batch_size=config.per_device_train_batch_size,
                workers=config.dataloader_num_workers,
            )
    trainer = PreferenceTrainer(
        model,
        config,
        score=score,
        prepare=score.prepare,
        objective=objective,
        metrics=completion_metrics,
        train_dataset=train_examples,
        data_collator=collator,
        processing_class=processor,
        eval_dataset=held_out or by_image,
        reference_model=frozen_copy(model) if frozen else None,
        groups=groups,
        about=about,
        made_of={"texts of the rows (SHA-256)": train_examples.texts_key()},
    )
    if trainer.is_fsdp_enabled:  # which has the tower's weights at hand in the model's own forward alone
        score.frozen_vision = False
    return trainer


def split(config: VlmConfig, examples: VisionExamples) -> tuple[VisionExamples, VisionExamples | None]:
    """The examples to train on, and those that the options hold out, by image."""
    if config.test_size is None:
        return _first(examples, config.max_train_samples), None
    size = config.test_size if config.test_size < 1 else int(config.test_size)
    train, test = split_by_image(examples, size, config.split_seed)
    PartialState().print(f"{len(train)} examples to train on, {len(test)} held out by image")
    return _first(examples.select(train), config.max_train_samples), examples.select(test)


def _first(examples: VisionExamples, number: int | None) -> VisionExamples:
    if number is None or number >= len(examples):
        return examples
    return examples.select(range(number))


def _groups(examples: VisionExamples) -> list[Hashable]:
    """Of each example what it shares with others: its images, or without any nothing."""
    return [key or number for number, key in enumerate(examples.image_keys())]


def shares_prefix(config: VlmConfig, model: PreTrainedModel) -> bool:
    """Whether prompts are read once for all of their completions; if the model cannot, the log says why."""
    if not config.shared_prefix:
        return False
    reason = unshareable(model.config)
    if reason is None:
        return True
    if config.vision_features == "cache" or config.row_tokens:
        raise InputError(
            f"--vision_features cache and --row_tokens need shared prefixes, and {config.model_name_or_path} "
            f"cannot have them: {reason}"
        )
    logger.warning("each answer is read with a prompt of its own: %s", reason)
    return False


def save(trainer: PreferenceTrainer, config: VlmConfig) -> None:
    """Save what was trained: the adapter to the output folder, a whole model to `model` in it."""
    # A whole model brings a config.json of its own, and the run's is not to be lost.
    folder = Path(str(config.output_dir), "" if config.use_peft else "model")
    trainer.save_model(str(folder))
    if not isinstance(trainer.model, PeftModel):
        return
    state: Any = trainer.accelerator.get_state_dict(trainer.model_wrapped) if config.sharding else None
    if trainer.is_world_process_zero():
        check_saved_adapter(trainer.model, folder, state)


def quantization(config: VlmConfig) -> BitsAndBytesConfig | None:
    """The quantisation that the options name; its layers compute in the precision of the run."""
    if not config.load_in_4bit:
        return None
    precision = "bfloat16" if config.bf16 else "float16" if config.fp16 else config.dtype
    return four_bits(
        getattr(torch, precision),
        config.bnb_4bit_quant_type,
        double_quantization=config.use_bnb_nested_quant,
    )


def to_train(model: PreTrainedModel, config: VlmConfig) -> nn.Module:
    """The model with the adapter of the options: a trained one, a fresh one, or none.

    A model whose weights are quantised so that they, or adapters on them, cannot be trained is an InputError.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not (config.use_peft and quantizer.is_trainable):
        method = quantizer.quantization_config.quant_method.value
        remedy = "name the model that it was made from" if config.use_peft else "leave out --no_use_peft"
        raise InputError(f"the weights of {config.model_name_or_path} are quantised ({method}): {remedy}")
    if not config.use_peft:
        return model
    if config.adapter_name_or_path:
        policy: Any = start_from_lora(model, config.adapter_name_or_path)
        apply_options(config, policy)
        return policy
    torch.manual_seed(config.seed)  # the adapter's random factor is the same on every process
    return add_lora(model, config)
