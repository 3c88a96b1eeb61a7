"""The options that every training recipe shares; importing them imports no model library but torch."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from prefopt import pocket
from prefopt.draws import visit_order
from prefopt.errors import InputError
from prefopt.options import check_options, check_paths_exist, option
from prefopt.sharding import check_fsdp, load_whole_models
from prefopt.trainer_options import check_trainer_options, check_training

LATEST = "latest"
LORA = {"lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "use_rslora": False}  # of a fresh adapter


@dataclass(frozen=True)
class LearningRates:
    """A recipe's default learning rates, by what is trained."""

    lora: float
    full: float  # all weights
    pocket: float  # a LoRA of the pocket's model

    def option(self) -> Any:
        """The option that takes them."""
        return option(
            None,
            f"The initial learning rate (default: {self.lora:g} for a LoRA, {self.full:g} for all weights, "
            f"{self.pocket:g} for a LoRA of the pocket).",
        )

    def of(self, model: str, *, use_peft: bool) -> float:
        """The default for a model."""
        if not use_peft:
            return self.full
        return self.pocket if model == pocket.NAME else self.lora


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
        within="[1, 1e9]",
    )
    cache_dir: str | None = option(
        None, "Folder for encodings and reference scores (default: OUTPUT_DIR/cache)."
    )
    ema_decay: float | None = option(
        None, "Save an exponential moving average of the trained weights, e.g. 0.999.", within="(0, 1)"
    )
    early_stopping_patience: int | None = option(
        None,
        "Stop after N measurements without a lower eval_loss, and keep the weights of the lowest; measure "
        "and save at the same steps (default: never).",
        within="[1, 1e9]",
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Continue from this checkpoint; no value: from the last complete one in OUTPUT_DIR.",
        nargs="?",
        const=LATEST,
    )
    output_dir: str = option("runs/preference", "Folder for the trained model, checkpoints and logs.")
    remove_unused_columns: bool | None = option(False, "Cannot be true here.")
    logging_steps: float = option(10, "Log every N steps.", within="(0, 1e9]")
    logging_first_step: bool = option(True, "Log the first step, too: for dpo its loss is ln 2, 0.6931.")
    logging_nan_inf_filter: bool = option(
        False, "Has no effect here: a loss that is not finite stops the run."
    )
    report_to: None | str | list[str] = option(  # noqa: RUF036 - the parser reads the type in the middle
        "none", "Trackers besides metrics.jsonl: tensorboard, wandb, trackio, ..."
    )
    save_total_limit: int | None = option(2, "Keep the last N checkpoints.", within="[1, inf)")

    def __post_init__(self) -> None:
        check_options(self)
        check_trainer_options(self)
        self.report_to = self.report_to or "none"
        # Without an accelerator, half precision is the CPU's own affair; transformers wants to be told.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.early_stopping_patience is not None:
            if self.eval_strategy == "no":
                raise InputError("--early_stopping_patience goes by eval_loss; add --eval_strategy steps")
            self.load_best_model_at_end = True
        try:
            super().__post_init__()
        except (ValueError, ImportError) as error:
            raise InputError(" ".join(str(error).split())) from error
        # An accelerate config file may set the precision, too.
        self.bf16, self.fp16 = self.mixed_precision == "bf16", self.mixed_precision == "fp16"
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
        check_training(self)
        self.check_shards()

    @property
    def sharding(self) -> str | None:
        """What splits the model among the processes, FSDP or DeepSpeed; None: each process has all of it."""
        if self.deepspeed_plugin is not None:
            return "DeepSpeed"
        return "FSDP" if self.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP") else None

    def check_shards(self) -> None:
        """InputError for what FSDP and DeepSpeed cannot do here, or would do in silence."""
        if self.sharding and self.ema_decay is not None:
            raise InputError(
                f"--ema_decay: under {self.sharding} no process has all weights to average; leave it out"
            )
        if self.sharding == "DeepSpeed":
            load_whole_models()
        elif self.sharding == "FSDP":
            check_fsdp(self.fsdp_config if self.fsdp else None, use_cpu=self.use_cpu)

    @property
    def global_batch(self) -> int:
        """Examples of an optimizer step, over accumulation and processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def steps_per_epoch(self, examples: int) -> int:
        """Optimizer steps of an epoch; the last one is filled up."""
        return math.ceil(examples / self.global_batch)

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole run."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.steps_per_epoch(examples) * self.num_train_epochs)

    def first_rows(self, examples: int, groups: Sequence[Hashable] | None = None) -> list[int] | None:
        """The rows that a run of less than an epoch reads, in this order; None: it reads them all."""
        read = self.total_steps(examples) * self.global_batch
        if read >= examples:
            return None
        return visit_order(self.order_seed, 0, examples, groups)[:read].tolist()

    @property
    def order_seed(self) -> int:
        """The seed of the order in which an epoch reads its examples."""
        return self.data_seed if self.data_seed is not None else self.seed


@dataclass
class LoraArguments:
    """The LoRA options, under trl's names."""

    use_peft: bool = option(True, "Train a LoRA adapter; --no_use_peft trains all weights.")
    lora_r: int | None = option(None, "LoRA rank (default: 16).", within="[1, 65536]")
    lora_alpha: int | None = option(
        None, "LoRA alpha: the update is scaled by alpha / r (default: 16).", within="[1, 1e6]"
    )
    lora_dropout: float | None = option(
        None, "Dropout of the LoRA input, in the policy only (default: 0).", within="[0, 1)"
    )
    lora_target_modules: list[str] | None = option(
        None, "Names of the layers that get an adapter (default: the attention projections)."
    )
    use_rslora: bool | None = option(
        None, "Scale by alpha / sqrt(r) (arXiv 2312.03732; default: by alpha / r)."
    )
    adapter_name_or_path: str | None = option(
        None,
        "A trained adapter to start from: a folder, a file or a hub id; it is also the reference. Its rank, "
        "dropout and layers are its own: other values of these options are an error. Another alpha changes "
        "how fast it is trained on, not what it computes.",
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
        None,
        "A folder, a file (.jsonl, .json, .csv, .parquet) or a hub id (default: the pocket's own data, for "
        "the model pocket alone).",
    )
    dataset_config: str | None = option(
        None,
        "Configuration of the dataset: of the hub's, or a folder's sub-folder (default: that of its "
        "card, README.md).",
    )
    dataset_revision: str | None = option(None, "Revision of the dataset on the hub.")
    dataset_train_split: str = option(
        "train", "The split to train on, or a slice: train[:500], train[500:], train[10%%:20%%]."
    )
    dataset_test_split: str | None = option(
        None, "A split that is not trained on, which --eval_strategy steps or epoch measures (default: none)."
    )

    def check_splits(self) -> None:
        """InputError for a test split that is, or may be, trained on."""
        train, test = self.dataset_train_split, self.dataset_test_split
        if test is None:
            return
        from prefopt.records import may_share_rows  # it imports datasets, which takes a second

        if may_share_rows(train, test):
            raise InputError(
                f"--dataset_test_split {test} and --dataset_train_split {train} share rows, or may share "
                "some; name another split, or slices that do not overlap, both in shares or both in row "
                "numbers, as train[:90%] and train[90%:]"
            )


@dataclass
class RecipeConfig(PreferenceConfig, LoraArguments, DatasetArguments):
    """The options of a recipe that trains a model."""

    RATES: ClassVar[LearningRates]  # a recipe has its own
    HOLD_OUT: ClassVar[str] = "a --dataset_test_split"  # how examples are held out

    model_name_or_path: str = option("", "The model to train: a folder or a hub id.")
    learning_rate: float | None = None
    model_revision: str | None = option(None, "Revision of the model on the hub.")
    max_train_samples: int | None = option(
        None, "Train on the first N examples (default: all).", within="[1, inf)"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32",
        "Precision of the frozen weights; trained weights stay float32. --bf16 and --fp16 set the precision "
        "of the computation.",
    )

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = self.RATES.of(self.model_name_or_path, use_peft=self.use_peft)
        super().__post_init__()
        LoraArguments.__post_init__(self)
        if not self.model_name_or_path:
            raise InputError("--model_name_or_path is missing; name a folder or a hub id")
        check_paths_exist(self, "model_name_or_path")
        pocket.fill_defaults(self, [self.model_name_or_path], "dataset_name")
        check_paths_exist(self, "dataset_name", "adapter_name_or_path")
        self._check_evaluation()
        if self.adapter_name_or_path and not self.use_peft:
            raise InputError("--adapter_name_or_path trains that adapter; leave out --no_use_peft")
        if self.dtype != "float32" and not self.use_peft:
            raise InputError(f"--dtype {self.dtype} is for frozen weights; full fine-tuning keeps float32")

    @property
    def holds_out(self) -> bool:
        """Whether there are examples that are not trained on."""
        return self.dataset_test_split is not None

    def _check_evaluation(self) -> None:
        if self.eval_strategy != "no" and not self.holds_out:
            raise InputError(f"--eval_strategy measures examples that are held out; name {self.HOLD_OUT}")
        if self.eval_strategy == "no" and self.holds_out:
            raise InputError(
                f"what {self.HOLD_OUT} holds out is there to be measured; add --eval_strategy steps, or epoch"
            )
        self.check_splits()
