"""The one loop: a transformers.Trainer that scores candidates, applies an objective, and takes nothing else
over.

Trainer brings accelerate, DDP, FSDP, DeepSpeed, mixed precision, schedules, checkpoints, trackers, hub push,
evaluation and callbacks. What is ours here: the loss (score, then objective), the sampler, checkpoints that
are whole or absent, saving in the format of the model's own library, and metrics averaged over processes and
accumulation.

Left out on purpose: losses normalised over tokens of the step, and objectives on more than two candidates;
the scores are already (batch, k) for them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, default_collate
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from prefopt.adapters import reference as adapters_off
from prefopt.draws import VisitSampler
from prefopt.losses import Pair, PreferenceLoss
from prefopt.records import InputError
from prefopt.reference import with_cached_reference
from prefopt.runs import Ema, Interrupt, MetricsFile, Progress, write_config
from prefopt.store import writing

LATEST = "latest"
STAGING = "unfinished"


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


class PreferenceTrainer(Trainer):
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
        self._staging: Path | None = None
        kwargs.setdefault("data_collator", default_collate)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = (
            False,
            False,
        )  # our losses are means of a batch
        if reference_model is not None:
            reference_model.requires_grad_(False).eval().to(self.args.device)
        self.ema = Ema(args.ema_decay) if args.ema_decay else None
        self.interrupt = Interrupt(self.accelerator)
        for callback in (self.interrupt, self.ema):
            if callback is not None:
                self.add_callback(callback)
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
        if self.interrupt.received:
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
            print(
                f"resuming from {found}"
                if found
                else f"no checkpoint in {self.args.output_dir}: from the beginning"
            )
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
        return FirstVisit(len(eval_dataset))

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
            metrics["rewards/margins"], metrics["rewards/accuracies"] = (
                (chosen - rejected, ones),
                (wins, ones),
            )
        for name, (values, weights) in metrics.items():
            pair = torch.stack([(values * weights).sum(), weights.sum()]).double()
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

    # Saving

    def _get_output_dir(self, trial) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint aside and rename it when it is whole: a killed run leaves none half-written."""
        run_dir, args = Path(super()._get_output_dir(trial)), self.args
        checkpoint = run_dir / f"checkpoint-{self.state.global_step}"
        later = {"push_to_hub": args.push_to_hub, "save_total_limit": args.save_total_limit}
        args.push_to_hub, args.save_total_limit, self._staging = False, None, run_dir / STAGING
        try:
            with writing(checkpoint):
                super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
            args.push_to_hub, args.save_total_limit = later["push_to_hub"], later["save_total_limit"]
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self._publish(run_dir / STAGING / checkpoint.name, checkpoint)
        self.accelerator.wait_for_everyone()
        if args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _publish(self, staged: Path, checkpoint: Path) -> None:
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(checkpoint)
            self.state.save_to_json(str(staged / "trainer_state.json"))
        shutil.rmtree(checkpoint, ignore_errors=True)  # of an earlier run that went on from further back
        os.rename(staged, checkpoint)
        rotate_checkpoints(
            str(checkpoint.parent),
            self.args.save_total_limit,
            self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what was trained, as its library reads it; the final model is the average if one is kept."""
        averaged = self.ema.applied(self.model) if self.ema and not self._staging else nullcontext()
        with writing(output_dir or self.args.output_dir), averaged:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model, keep_torch_compile=False).save_pretrained(
            folder, state_dict=state_dict
        )
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.ema and self._staging:
            self.ema.save(folder)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if hasattr(self.model, "load_weights") and not self.is_fsdp_enabled:
            self.model.load_weights(resume_from_checkpoint)  # pyright: ignore[reportCallIssue]
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class FirstVisit(Sampler[tuple[int, int]]):
    """Every item once, in order, as visit 0: an evaluation always sees the same draws."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((index, 0) for index in range(self.length))


def _step(checkpoint: str | None) -> int:
    return json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"] if checkpoint else 0
