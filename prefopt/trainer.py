"""The one loop: a transformers.Trainer that scores candidates and applies an objective.

Trainer brings accelerate, DDP, FSDP, DeepSpeed, mixed precision, schedules, checkpoints, trackers, hub push,
evaluation and callbacks. What is ours here: the loss (score, then objective), the sampler, and metrics
averaged over processes and accumulation; beside it, checkpoints that are whole or absent (checkpoints.py) and
what surrounds a run (runs.py).

Left out on purpose: losses normalised over tokens of the step, and objectives on more than two candidates;
the scores are already (batch, k) for them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from transformers import TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from prefopt.adapters import reference as adapters_off
from prefopt.checkpoints import STAGING, CheckpointingTrainer
from prefopt.draws import VisitSampler
from prefopt.losses import Pair, PreferenceLoss
from prefopt.records import InputError
from prefopt.reference import with_cached_reference
from prefopt.runs import Ema, Interrupt, MetricsFile, Progress, write_config
from prefopt.store import writing

LATEST = "latest"


@dataclass
class PreferenceConfig(TrainingArguments):
    """transformers' TrainingArguments, with defaults of this package and the options of its loop."""

    reference: Literal["live", "cache"] = field(
        default="live",
        metadata={"help": "Reference scores: computed in the step (live), or once and kept on disk (cache)."},
    )
    visits: int | None = field(
        default=None,
        metadata={
            "help": "An item's draws repeat after this many epochs (default: never); a cache serves them."
        },
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where encodings and reference scores are kept (default: OUTPUT_DIR/cache)."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Save an exponential moving average of the trained weights, e.g. 0.999."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": LATEST,
            "help": "Go on from this checkpoint; without a value, from the last whole one in OUTPUT_DIR.",
        },
    )
    output_dir: str = field(default="runs/preference", metadata={"help": "Where the model and logs go."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Has no effect here."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "A loss that is not finite stops the run."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 - the parser reads the type in the middle
        default="none", metadata={"help": "Trackers besides metrics.jsonl: tensorboard, wandb, trackio, ..."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Keep this many checkpoints."})

    def __post_init__(self) -> None:
        # Without an accelerator, half precision is the CPU's own affair; transformers wants to be told.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}; a seed lies between 0 and 2^32 - 1")
        if self.visits is not None and self.visits < 1:
            raise InputError(f"--visits is {self.visits}; an item is visited at least once")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"--ema_decay is {self.ema_decay}; a decay lies between 0 and 1")


class Scores(NamedTuple):
    """The scores that a batch's metrics are made from."""

    policy: Tensor  # (batch, k), detached
    reference: Tensor | None  # (batch, k)


Score = Callable[[nn.Module, Mapping[str, Any]], Tensor]  # (model, batch) -> (batch, k)
Objective = Callable[[Tensor, Tensor | None], PreferenceLoss | Tensor]  # scores -> losses of (batch,)
# A batch and its scores -> for each name the values and their weights, both (batch,).
Metrics = Callable[[Mapping[str, Any], Scores], dict[str, tuple[Tensor, Tensor]]]


def pairwise(loss: Callable[..., PreferenceLoss], **options: Any) -> Objective:
    """The objective on (batch, 2) scores, the chosen first, that a loss on pairs with a reference makes."""

    def objective(policy: Tensor, reference: Tensor | None) -> PreferenceLoss:
        if reference is None:
            return loss(Pair(*policy.unbind(1)), **options)
        return loss(Pair(*policy.unbind(1)), Pair(*reference.unbind(1)), **options)

    return objective


class PreferenceTrainer(CheckpointingTrainer):
    """Trains any scored model on any objective.

    `score(model, batch)` gives (batch, k) scores through the model it is handed; `objective(policy,
    reference)` maps them to losses of (batch,). `reference_model` is the frozen copy for full fine-tuning;
    with adapters the reference is the model itself without them. `needs_reference=False` for objectives that
    take none. `train_dataset[(index, visit)]` gives an example. `about` goes into config.json: conventions
    that the options do not tell. A model that is no transformers model brings `save_pretrained(folder,
    state_dict)` and `load_weights(folder)` itself.
    """

    model: nn.Module
    args: PreferenceConfig
    train_dataset: Any

    def __init__(
        self,
        model: nn.Module,
        args: PreferenceConfig,
        *,
        score: Score,
        objective: Objective,
        train_dataset: Dataset,
        metrics: Metrics | None = None,
        reference_model: nn.Module | None = None,
        needs_reference: bool = True,
        about: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        self.score, self.objective, self.batch_metrics = score, objective, metrics
        self.reference_model, self.needs_reference = reference_model, needs_reference
        self.about = dict(about or {})
        self.metrics_file: MetricsFile | None = None
        self._sums: dict[str, Tensor] = {}  # name -> (sum of values, sum of weights) since the last log
        kwargs.setdefault("data_collator", default_collate)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        # Our losses are means of a batch: the Trainer divides them by the accumulation.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = False
        if reference_model is not None:
            reference_model.requires_grad_(False).eval().to(self.args.device)
        self.interrupt = Interrupt(self.accelerator)
        self.add_callback(self.interrupt)
        if args.ema_decay:
            self.ema = Ema(args.ema_decay)
            self.add_callback(self.ema)
        if self.pop_callback(ProgressCallback):
            self.add_callback(Progress())

    # The run

    @property
    def global_batch(self) -> int:
        """Examples of an optimizer step, over accumulation and processes."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last one is filled up."""
        return math.ceil(len(self.train_dataset) / self.global_batch)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Train, from the start or a checkpoint; `latest` is the last whole one of output_dir, if any."""
        checkpoint = self._checkpoint(resume_from_checkpoint or self.args.resume_from_checkpoint)
        output_dir = Path(self.args.output_dir)
        if self.is_world_process_zero():
            self._open_run(output_dir, checkpoint)
        if self.needs_reference and self.args.reference == "cache":
            self.train_dataset = with_cached_reference(self, self.args.visits or self.epochs)
        if self.ema:
            self.ema.resume_from = checkpoint
        with self.interrupt.listening():
            result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        if self.interrupt.stopping:
            raise KeyboardInterrupt(f"checkpoint kept at step {self.state.global_step} of {output_dir}")
        return result

    @property
    def epochs(self) -> int:
        """Epochs that the run begins."""
        if self.args.max_steps > 0:
            return math.ceil(self.args.max_steps / self.steps_per_epoch)
        return math.ceil(self.args.num_train_epochs)

    def arithmetic(self) -> str:
        """How the examples make steps, in words."""
        args, items, steps = self.args, len(self.train_dataset), self.steps_per_epoch
        extra = steps * self.global_batch - items
        filled = f" ({extra} readings more to fill its last step)" if extra else ""
        total = args.max_steps if args.max_steps > 0 else math.ceil(steps * args.num_train_epochs)
        return (
            f"{items} examples; {args.train_batch_size} a batch x {args.gradient_accumulation_steps} "
            f"accumulated x {args.world_size} processes = {self.global_batch} a step; "
            f"{steps} steps an epoch{filled}, {total} in all"
        )

    def _open_run(self, output_dir: Path, checkpoint: str | None) -> None:
        with writing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(output_dir / STAGING, ignore_errors=True)  # what a killed run left half-written
            earlier = get_last_checkpoint(output_dir)
            if earlier and not checkpoint:
                raise InputError(
                    f"{output_dir} holds {Path(earlier).name} of an earlier run: go on from it with "
                    "--resume_from_checkpoint, or name another --output_dir"
                )
            write_config(output_dir, self.args, arithmetic=self.arithmetic(), about=self.about)
            self.metrics_file = MetricsFile(output_dir, after=_step(checkpoint))
        print(self.arithmetic(), flush=True)

    def _checkpoint(self, wanted: str | bool | None) -> str | None:
        if not wanted:
            return None
        if wanted is not True and wanted != LATEST:
            if not Path(str(wanted), "trainer_state.json").is_file():
                raise InputError(f"{wanted} is no checkpoint: it has no trainer_state.json")
            return str(wanted).rstrip("/")
        found = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
        if self.is_world_process_zero():
            beginning = f"no checkpoint in {self.args.output_dir}: from the beginning"
            print(f"resuming from {found}" if found else beginning)
        return found

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> VisitSampler:
        return VisitSampler(
            len(self.train_dataset),
            global_batch=self.global_batch,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            epoch=lambda: self.state.global_step // self.steps_per_epoch,
            visits=self.args.visits,
        )

    def _get_eval_sampler(self, eval_dataset: Any):
        # An evaluation sees the same draws every time.
        return VisitSampler(len(eval_dataset), global_batch=1, seed=0, epoch=lambda: 0, shuffle=False)

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        """The mean of the objective over a batch, through the model that the Trainer hands over."""
        reference = self.reference_scores(model, inputs) if self.needs_reference else None
        policy = self.score(model, inputs)
        outcome = self.objective(policy, reference)
        losses = outcome.losses if isinstance(outcome, PreferenceLoss) else outcome
        self._check_finite(losses, inputs)
        self._record(inputs, Scores(policy.detach(), reference), outcome)
        return (losses.mean(), {"scores": policy}) if return_outputs else losses.mean()

    def reference_scores(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The reference's scores of a batch, (batch, k): the batch's own if it has them, else computed."""
        if "reference" in inputs:
            return inputs["reference"]
        source = (
            nullcontext(self.reference_model) if self.reference_model is not None else adapters_off(model)
        )
        # A frozen copy is not wrapped by accelerate, so it is given the policy's precision here.
        with torch.no_grad(), source as reference_model, self.accelerator.autocast():
            return self.score(reference_model, inputs)

    def _prepare_input(self, data: Any) -> Any:
        # The Trainer would hand DeepSpeed its floats in half precision: noise, and times of 8 bits.
        if isinstance(data, Tensor):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluation: the same loss and metrics, without gradient."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _check_finite(self, losses: Tensor, inputs: Mapping[str, Any]) -> None:
        if torch.isfinite(losses).all():
            return
        where = getattr(self.train_dataset, "where", str)
        bad = [where(item) for item in inputs["item"][~torch.isfinite(losses)].tolist()]
        raise InputError(
            f"the loss is not finite at step {self.state.global_step + 1}, for {', '.join(bad)} (the batch's "
            f"items are {inputs['item'].tolist()}). The last checkpoint is untouched; look at these rows, or "
            "lower --learning_rate, or use bf16 in place of fp16"
        )

    # Metrics

    def _record(self, inputs: Mapping[str, Any], scores: Scores, outcome: PreferenceLoss | Tensor) -> None:
        metrics = self.batch_metrics(inputs, scores) if self.batch_metrics else {}
        if isinstance(outcome, PreferenceLoss):
            chosen, rejected = outcome.rewards
            ones = torch.ones_like(chosen)
            wins = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()  # a tie counts one half
            metrics["rewards/chosen"], metrics["rewards/rejected"] = (chosen, ones), (rejected, ones)
            metrics["rewards/margins"] = (chosen - rejected, ones)
            metrics["rewards/accuracies"] = (wins, ones)
        for name, (values, weights) in metrics.items():
            pair = torch.stack([(values * weights).sum(), weights.sum()]).float()  # MPS knows no float64
            self._sums[name] = self._sums.get(name, torch.zeros_like(pair)) + pair

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics, averaged over processes and batches since the last log, to metrics.jsonl too."""
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        if self._sums and "train_runtime" not in logs:
            names = sorted(self._sums)
            totals: Any = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]))
            logs |= {
                prefix + name: total / weight
                for name, (total, weight) in zip(names, totals.tolist(), strict=True)
                if weight
            }
            self._sums.clear()
        super().log(logs, start_time)
        if self.metrics_file:
            with writing(self.metrics_file.path):
                self.metrics_file.write({"step": self.state.global_step, **logs})

    def evaluate(self, *args, **kwargs):
        """Evaluate; the training metrics gathered so far are kept apart from those of the evaluation."""
        training, self._sums = self._sums, {}
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._sums = training


def _step(checkpoint: str | None) -> int:
    return json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"] if checkpoint else 0
