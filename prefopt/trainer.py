"""The one loop: a transformers.Trainer that scores candidates and applies an objective.

Trainer brings accelerate, DDP, FSDP, DeepSpeed, mixed precision, schedules, checkpoints, trackers, hub push,
evaluation and callbacks. What is ours here: the loss (score, then objective), the sampler, and metrics
averaged over processes and accumulation; beside it, checkpoints that are whole or absent (checkpoints.py) and
what surrounds a run (runs.py).
"""

import math
import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import set_seed

from prefopt.adapters import adapter_layers
from prefopt.checkpoints import STAGING, CheckpointingTrainer, check_saves
from prefopt.config import PreferenceConfig
from prefopt.draws import VisitSampler
from prefopt.errors import InputError
from prefopt.files import exclusive_lock, reporting_write_errors
from prefopt.interrupts import Interrupted, begin_worker
from prefopt.losses import reward_metrics
from prefopt.model_card import write_card
from prefopt.objectives import Batch, Loss, Objective, Scored
from prefopt.reference import cache_reference, reference_model
from prefopt.resuming import find_checkpoint, read_state
from prefopt.runs import Ema, Interrupt, MetricsFile, Progress, refuse_earlier_run, write_config
from prefopt.same_run import base_key, check_made_of, check_options
from prefopt.scores import AnyScore, check_extras, check_scored, not_finite
from prefopt.sharding import check_sharding, load_whole_models, prepare_fsdp
from prefopt.visits import by_visit, collate

# A batch and its scores (batch, k), detached -> for each name the values and their weights, both (batch,).
Metrics = Callable[[Batch, Tensor], dict[str, tuple[Tensor, Tensor]]]


class PreferenceTrainer(CheckpointingTrainer):
    """Trains any scored model on any objective.

    `train_dataset` is anything that is read by index and whose examples are dicts, which get `item` and
    `visit`; a `VisitDataset` is read by (index, visit). The reference, if the objective needs one, is the
    model without its adapters, or `reference_model`, a frozen copy for full fine-tuning.
    `prepare(model, batch)` computes what both need of a batch and no training changes. Examples with equal
    entries in `groups` are read one after another. `apart` gives parts of the model, by their names in it, a
    learning rate of their own; their gradients are clipped apart, too. `about` goes into config.json:
    conventions that the options do not tell. `made_of` are texts by name that change with what the weights
    depend on besides, as the content of the dataset: a run that is resumed with others is an InputError. A
    plain torch module is saved as model.safetensors, a model of transformers or peft as its library does, and
    any other implements `checkpoints.SavesItself`. InputError for a dataset that cannot be read so, a model
    that cannot be saved, or an objective that needs what `score` cannot give.
    """

    model: nn.Module
    args: PreferenceConfig
    train_dataset: Any

    def __init__(
        self,
        model: nn.Module,
        args: PreferenceConfig,
        *,
        score: AnyScore,
        objective: Objective,
        train_dataset: Any,
        eval_dataset: Any = None,
        prepare: Callable[[nn.Module, Batch], Batch] | None = None,
        metrics: Metrics | None = None,
        reference_model: nn.Module | None = None,
        groups: Sequence[Hashable] | None = None,
        apart: Mapping[str, float] | None = None,
        about: Mapping[str, str] | None = None,
        made_of: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        check_extras(objective, score, model)
        check_saves(model)
        self.score, self.objective, self.batch_metrics = score, objective, metrics
        self.prepare_batch, self.groups = prepare, groups
        self.reference_model, self.apart = reference_model, dict(apart or {})
        self.about = dict(about or {})
        base = base_key(model, reference_model, needs_reference=objective.needs_reference)
        self.made_of = {"weights at the start (SHA-256)": base, **(made_of or {})}
        self.metrics_file: MetricsFile | None = None
        self._sums: dict[str, Tensor] = {}  # name -> (sum of values, sum of weights) since the last log
        kwargs.setdefault("data_collator", collate)
        train = by_visit(train_dataset, "train_dataset")
        self._examples: Any = train  # those that are read now, for errors
        super().__init__(model, args, train_dataset=train, eval_dataset=_held_out(eval_dataset), **kwargs)
        # Our losses are means of a batch: the Trainer divides them by the accumulation.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = False
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator.state.fsdp_plugin, model)
        elif self.is_deepspeed_enabled:
            load_whole_models()  # those that are loaded after the training as well
        if reference_model is not None:
            reference_model.to(self.args.device)
        self.interrupt = Interrupt(self.accelerator)
        self.add_callback(self.interrupt)
        if args.ema_decay:
            self.ema = Ema(args.ema_decay)
            self.add_callback(self.ema)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if self.pop_callback(ProgressCallback):
            self.add_callback(Progress())

    # The run

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last one is filled up."""
        return self.args.steps_per_epoch(len(self.train_dataset))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.args.total_steps(len(self.train_dataset))

    @property
    def epochs(self) -> int:
        """Epochs that the run begins."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Train, from the start or a checkpoint; `latest` is the last whole one of output_dir, if any.

        A run that is finished already trains nothing: its weights are loaded from the checkpoint.
        """
        output_dir = Path(str(self.args.output_dir))
        with exclusive_lock(output_dir) if self.is_world_process_zero() else nullcontext():
            wanted = resume_from_checkpoint or self.args.resume_from_checkpoint
            if checkpoint := self._checkpoint(output_dir, wanted):
                check_sharding(checkpoint, self.args.sharding)
            if self.is_world_process_zero():
                self._open_run(output_dir, checkpoint)
            return self._train(output_dir, checkpoint, **kwargs)

    def _train(self, output_dir: Path, checkpoint: str | None, **kwargs: Any):
        if checkpoint and read_state(checkpoint).global_step >= self.total_steps:
            return self._load_finished(checkpoint)
        if self.objective.needs_reference and self.args.reference == "cache":
            self.train_dataset = self._with_cached_reference()
        if self.ema:
            self.ema.resume_from = checkpoint
        set_seed(self.args.seed)  # what was computed before, or found in a cache, leaves dropout alone
        with self.interrupt.listening():
            result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        if self.interrupt.agreed:
            kept = f"checkpoint kept at step {self.state.global_step} of {output_dir}"
            raise Interrupted(self.interrupt.agreed, kept)
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what was trained, and a card beside it."""
        super().save_model(output_dir, _internal_call)
        if not self._staging:
            self.create_model_card(folder=output_dir)
            if self.is_world_process_zero():
                print(f"saved in {output_dir or self.args.output_dir}", flush=True)

    def create_model_card(self, *args: Any, folder: str | None = None, **kwargs: Any) -> None:
        """Write README.md, which the hub shows, in place of transformers' own."""
        if self.is_world_process_zero():
            run = Path(str(self.args.output_dir))
            target = Path(folder) if folder else run
            with reporting_write_errors(target):
                write_card(target, run, self.args, arithmetic=self.arithmetic(), about=self.about)

    def arithmetic(self) -> str:
        """How the examples make steps, in words."""
        args, items, steps = self.args, len(self.train_dataset), self.steps_per_epoch
        extra = steps * self.args.global_batch - items
        filled = f" ({extra} read twice to fill its last step)" if extra else ""
        return (
            f"{items} examples; {args.train_batch_size} a batch x {args.gradient_accumulation_steps} "
            f"accumulated x {args.world_size} processes = {self.args.global_batch} a step; "
            f"{steps} steps an epoch{filled}, {self.total_steps} in all"
        )

    def _open_run(self, output_dir: Path, checkpoint: str | None) -> None:
        with reporting_write_errors(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(output_dir / STAGING, ignore_errors=True)  # what a killed run left half-written
            made_of = {"examples a step": self.args.global_batch, **self.made_of}
            if checkpoint:
                check_made_of(checkpoint, made_of)
            else:
                refuse_earlier_run(output_dir)
            facts = {"arithmetic": self.arithmetic(), "about": self.about, "made_of": made_of}
            write_config(output_dir, self.args, **facts)
            steps = read_state(checkpoint).global_step if checkpoint else 0
            self.metrics_file = MetricsFile(output_dir, after=steps)
        print(self.arithmetic(), flush=True)

    def _checkpoint(self, output_dir: Path, wanted: str | bool | None) -> str | None:
        if not wanted:
            return None
        found = find_checkpoint(output_dir, wanted)
        if found:
            check_options(found, self.args)
            self._best(found)  # before anything is computed: it may be gone
        if self.is_world_process_zero():
            beginning = f"no checkpoint in {output_dir}: from the beginning"
            print(f"resuming from {found}" if found else beginning)
        return found

    def _load_finished(self, checkpoint: str) -> None:
        self.state = read_state(checkpoint)
        self.state.best_model_checkpoint = best = self._best(checkpoint)
        self._load_from_checkpoint(best if best and self.args.load_best_model_at_end else checkpoint)
        if self.ema:
            self.ema.resume_from = checkpoint
            self.ema.start(self.model)
        if self.is_world_process_zero():
            with reporting_write_errors(output_dir := str(self.args.output_dir)):
                self._rotate(Path(output_dir))
            print(f"all {self.total_steps} steps are done: nothing is trained", flush=True)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> VisitSampler:
        return VisitSampler(
            len(self.train_dataset),
            global_batch=self.args.global_batch,
            seed=self.args.order_seed,
            epoch=lambda: self.state.global_step // self.steps_per_epoch,
            visits=self.args.visits,
            groups=self.groups,
            read=self.args.first_rows(len(self.train_dataset), self.groups),
        )

    def _get_eval_sampler(self, eval_dataset: Any):
        # An evaluation sees the same draws every time.
        return VisitSampler(len(eval_dataset), global_batch=1, seed=0, epoch=lambda: 0, shuffle=False)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The batches of an evaluation: of the trainer's dataset, of one by its name, or of another."""
        is_another = eval_dataset is not None and not isinstance(eval_dataset, str)
        return super().get_eval_dataloader(_held_out(eval_dataset) if is_another else eval_dataset)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader: Any = super()._get_dataloader(*args, **kwargs)
        # A signal that comes to all processes would end the workers, and with them the step.
        loader.base_dataloader.worker_init_fn = partial(begin_worker, loader.worker_init_fn)
        return loader

    # The optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with parameter groups for the parts that have their own learning rate."""
        optimizer: Any = super().create_optimizer(model)
        for name, rate in self.apart.items():
            own = {id(parameter) for parameter in self.model.get_submodule(name).parameters()}
            for group in list(optimizer.param_groups):
                mine = [parameter for parameter in group["params"] if id(parameter) in own]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                optimizer.add_param_group({**group, "params": mine, "lr": rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        parts = [list(self.model.get_submodule(name).parameters()) for name in self.apart]
        gradients = {parameter: parameter.grad for part in parts for parameter in part}
        for parameter in gradients:
            parameter.grad = None
        norm = super()._clip_grad_norm(model)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for part in parts:
            nn.utils.clip_grad_norm_(part, self.args.max_grad_norm)
        return norm

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        """The mean of the objective over a batch, through the model that the Trainer hands over."""
        if num_items_in_batch is not None:
            inputs = {**inputs, "tokens_per_example": num_items_in_batch}
        reference = self.reference_scores(model, inputs) if self.objective.needs_reference else None
        scored = self._scored(model, inputs)
        loss = self.objective(scored, reference, inputs)
        if not torch.isfinite(loss.losses).all():
            raise not_finite(loss.losses, inputs, self.state.global_step + 1, self._examples)
        self._record(inputs, scored.scores.detach(), loss)
        mean = loss.losses.mean()
        return (mean, {"scores": scored.scores}) if return_outputs else mean

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """The mean number of tokens of a chosen completion over the optimizer step, if there are tokens."""
        if not batch_samples or "tokens" not in batch_samples[0]:
            return None
        tokens = torch.cat([batch["tokens"][:, 0] for batch in batch_samples]).to(device).float()
        tokens_and_examples: Any = self.accelerator.reduce(
            torch.stack([tokens, torch.ones_like(tokens)]).sum(1)
        )
        return tokens_and_examples[0] / tokens_and_examples[1]

    def reference_scores(self, model: nn.Module, inputs: Batch) -> Tensor:
        """The reference's scores of a batch, (batch, k): the batch's own if it has them, else computed."""
        if "reference" in inputs:
            return inputs["reference"]
        return self._scores_of_reference(model, self.reference_model, inputs)

    def _scores_of_reference(self, model: nn.Module, frozen: nn.Module | None, inputs: Batch) -> Tensor:
        # A frozen copy is not wrapped by accelerate, so it is given the policy's precision here.
        with torch.no_grad(), reference_model(model, frozen) as reference, self.accelerator.autocast():
            return self._scored(reference, inputs).scores

    def _scored(self, model: nn.Module, inputs: Batch) -> Scored:
        scored = self.score(model, inputs)
        check_scored(scored, inputs, self.objective)
        return scored

    def _with_cached_reference(self) -> Any:
        args = self.args
        if self.args.sharding:  # what shards the model moves it to its device later
            self.model.to(args.device)
        # Before the first step, all weights of full fine-tuning are still the reference's.
        frozen = self.reference_model or (None if adapter_layers(self.model) else self.model.eval())
        return cache_reference(
            self.train_dataset,
            self.model,
            lambda inputs: self._scores_of_reference(self.model, frozen, self._prepare_inputs(dict(inputs))),
            folder=Path(args.cache_dir or Path(str(args.output_dir), "cache"), "reference"),
            visits=args.visits or self.epochs,
            rows=args.first_rows(len(self.train_dataset), self.groups),
            precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            loader={"collate_fn": self.data_collator, "num_workers": args.dataloader_num_workers},
            batch_size=args.train_batch_size,
        )

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        if self.prepare_batch is None:
            return inputs
        with torch.no_grad(), self.accelerator.autocast():
            return self.prepare_batch(self.model, inputs)

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

    # Metrics

    def _record(self, inputs: Batch, scores: Tensor, loss: Loss) -> None:
        metrics = self.batch_metrics(inputs, scores) if self.batch_metrics else {}
        metrics |= {name: (values, torch.ones_like(values)) for name, values in loss.terms.items()}
        if loss.rewards is not None:
            rewards = reward_metrics(loss.rewards, inputs["ranks"])
            metrics |= {name: (values, torch.ones_like(values)) for name, values in rewards.items()}
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
            with reporting_write_errors(self.metrics_file.path):
                self.metrics_file.write({"step": self.state.global_step, **logs})

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this evaluation is the best one; InputError for a metric that none measures."""
        best = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        if self.args.metric_for_best_model is not None and best not in metrics:
            raise InputError(
                f"--metric_for_best_model {self.args.metric_for_best_model} is not measured; choose from "
                + ", ".join(sorted(name.removeprefix("eval_") for name in metrics))
            )
        return super()._determine_best_metric(metrics, trial)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; the training metrics gathered so far are kept apart from those of the evaluation."""
        training, self._sums = self._sums, {}
        self._examples = _named(self.eval_dataset, eval_dataset)
        try:
            return super().evaluate(eval_dataset, *args, **kwargs)
        finally:
            self._sums, self._examples = training, self.train_dataset


def _named(own: Any, wanted: Any) -> Any:
    """What an evaluation reads: the trainer's own dataset, one of several by its name, or another."""
    if wanted is None:
        return own
    return own[wanted] if isinstance(wanted, str) else wanted


def _held_out(dataset: Any) -> Any:
    """The dataset of an evaluation, or several by their names, each to be read by (index, visit)."""
    if isinstance(dataset, dict):
        return {name: by_visit(one, f"eval_dataset {name!r}") for name, one in dataset.items()}
    return None if dataset is None else by_visit(dataset, "eval_dataset")
