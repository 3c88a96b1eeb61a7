"""The options that every training recipe shares; importing them imports no model library but torch."""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import TrainingArguments

from prefopt import pocket
from prefopt.errors import InputError
from prefopt.options import check_interval, check_paths_exist, option

LATEST = "latest"
LORA = {"lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "use_rslora": False}  # of a fresh adapter


@dataclass
class PreferenceConfig(TrainingArguments):
    """transformers' TrainingArguments, with defaults of this package and the options of its loop."""

    reference: Literal["live", "cache"] = option(
        "live", "Reference scores: computed in every step (live), or once before training (cache)."
    )
    visits: int | None = option(
        None,
        "Reuse timesteps and noise every N epochs (default: always new); with --reference cache, "
        "N draws per example are cached.",
    )
    cache_dir: str | None = option(
        None, "Folder for encodings and reference scores (default: OUTPUT_DIR/cache)."
    )
    ema_decay: float | None = option(
        None, "Save an exponential moving average of the trained weights, e.g. 0.999."
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Continue from this checkpoint; no value: from the last complete one in OUTPUT_DIR.",
        nargs="?",
        const=LATEST,
    )
    output_dir: str = option("runs/preference", "Folder for the trained model, checkpoints and logs.")
    remove_unused_columns: bool | None = option(False, "Has no effect here.")
    logging_steps: float = option(10, "Log every N steps.")
    logging_nan_inf_filter: bool = option(
        False, "Has no effect here: a loss that is not finite stops the run."
    )
    report_to: None | str | list[str] = option(  # noqa: RUF036 - the parser reads the type in the middle
        "none", "Trackers besides metrics.jsonl: tensorboard, wandb, trackio, ..."
    )
    save_total_limit: int | None = option(2, "Keep the last N checkpoints.")

    def __post_init__(self) -> None:
        # Without an accelerator, half precision is the CPU's own affair; transformers wants to be told.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}; a seed lies between 0 and 2^32 - 1")
        check_interval(self, "[1, inf)", "visits")
        check_interval(self, "(0, 1)", "ema_decay")

    @property
    def global_batch(self) -> int:
        """Examples of an optimizer step, over accumulation and processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def order_seed(self) -> int:
        """The seed of the order in which an epoch reads its examples."""
        return self.data_seed if self.data_seed is not None else self.seed


@dataclass
class LoraArguments:
    """The LoRA options, under trl's names."""

    use_peft: bool = option(True, "Train a LoRA adapter; --no_use_peft trains all weights.")
    lora_r: int | None = option(None, "LoRA rank (default: 16).")
    lora_alpha: int | None = option(None, "LoRA alpha: the update is scaled by alpha / r (default: 16).")
    lora_dropout: float | None = option(None, "Dropout of the LoRA input, in the policy only (default: 0).")
    lora_target_modules: list[str] | None = option(
        None, "Names of the layers that get an adapter (default: the attention projections)."
    )
    use_rslora: bool | None = option(
        None, "Scale by alpha / sqrt(r) (arXiv 2312.03732; default: by alpha / r)."
    )
    adapter_name_or_path: str | None = option(
        None,
        "A trained adapter to start from; it is also the reference. Its rank, alpha, dropout and layers are "
        "its own: other values of these options are an error.",
    )

    def __post_init__(self) -> None:
        if self.adapter_name_or_path:
            return
        for name, default in LORA.items():
            if getattr(self, name) is None:
                setattr(self, name, default)


@dataclass
class DatasetArguments:
    """Where the examples come from."""

    dataset_name: str | None = option(
        None, "A folder or a hub id (default: the pocket's own data, for the model pocket alone)."
    )
    dataset_config: str | None = option(
        None, "Configuration of the dataset: of the hub's, or a folder's sub-folder."
    )
    dataset_revision: str | None = option(None, "Revision of the dataset on the hub.")
    dataset_train_split: str = option("train", "The split to train on.")


@dataclass
class RecipeConfig(PreferenceConfig, LoraArguments, DatasetArguments):
    """The options of a recipe that trains a model."""

    model_name_or_path: str = option("", "The model to train: a folder or a hub id.")
    model_revision: str | None = option(None, "Revision of the model on the hub.")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32",
        "Precision of the frozen weights; trained weights stay float32. --bf16 and --fp16 set the precision "
        "of the computation.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        LoraArguments.__post_init__(self)
        if not self.model_name_or_path:
            raise InputError("--model_name_or_path is missing; name a folder or a hub id")
        pocket.fill_defaults(self, [self.model_name_or_path], "dataset_name")
        check_paths_exist(self, "model_name_or_path", "dataset_name", "adapter_name_or_path")
        if self.adapter_name_or_path and not self.use_peft:
            raise InputError("--adapter_name_or_path trains that adapter; leave out --no_use_peft")
        if self.dtype != "float32" and not self.use_peft:
            raise InputError(f"--dtype {self.dtype} is for frozen weights; full fine-tuning keeps float32")
