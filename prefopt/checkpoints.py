"""Checkpoints that are whole or absent, and models saved in the format of their own library."""

import inspect
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from peft import PeftModel
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from prefopt.adapters import ADAPTER_FILE, difference_of_adapter
from prefopt.errors import InputError
from prefopt.files import make_readable, reporting_write_errors
from prefopt.loading import check_finite
from prefopt.resuming import find_best, reading
from prefopt.runs import Ema
from prefopt.sharding import complete_states

STAGING = "unfinished"  # no name that transformers takes for a checkpoint


@runtime_checkable
class SavesItself(Protocol):
    """A model that is no transformers model, with the file format of its own library."""

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None: ...
    def load_weights(self, folder: str | Path) -> None: ...


@runtime_checkable
class SavesExactly(SavesItself, Protocol):
    """One that writes checkpoints in another way: what `load_weights` reads bit for bit."""

    def save_weights(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None: ...


def check_saves(model: nn.Module) -> None:
    """InputError for a model that could not be saved, or loaded again, at the end of its training."""
    has_half = hasattr(model, "save_pretrained") or hasattr(model, "load_weights")
    if isinstance(model, PreTrainedModel | PeftModel) or not has_half:
        return
    name, remedy = type(model).__name__, "or neither: a plain module is saved as model.safetensors"
    if not isinstance(model, SavesItself):
        raise InputError(
            f"{name} has one of the methods save_pretrained and load_weights, and needs both to be saved and "
            f"resumed (prefopt.SavesItself), {remedy}"
        )
    try:
        inspect.signature(model.save_pretrained).bind("folder", state_dict=None)
        inspect.signature(model.load_weights).bind("folder")
    except TypeError as error:
        raise InputError(
            f"{name} cannot be saved: give it save_pretrained(folder, state_dict=None) and "
            f"load_weights(folder) (prefopt.SavesItself; {error}), {remedy}"
        ) from error


def _is_plain(model: nn.Module) -> bool:
    return not isinstance(model, PreTrainedModel | PeftModel | SavesItself)


class CheckpointingTrainer(Trainer):
    """A Trainer that writes each checkpoint aside and renames it when it is whole.

    A killed run, or a full disk, leaves the earlier checkpoints and nothing half-written beside them.
    """

    model: nn.Module
    ema: Ema | None = None
    _staging: Path | None = None

    def _get_output_dir(self, trial) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        args: Any = self.args
        run_dir = Path(super()._get_output_dir(trial))
        checkpoint = run_dir / f"checkpoint-{self.state.global_step}"
        # Pushing and deleting old ones wait until the new one has its name.
        pushes, limit = args.push_to_hub, args.save_total_limit
        args.push_to_hub, args.save_total_limit, self._staging = False, None, run_dir / STAGING
        try:
            with reporting_write_errors(checkpoint):
                super()._save_checkpoint(model, trial)
        finally:
            args.push_to_hub, args.save_total_limit, self._staging = pushes, limit, None
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(checkpoint)  # not where it was staged; in every process
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            with reporting_write_errors(checkpoint):
                self._publish(run_dir / STAGING / checkpoint.name, checkpoint)
        self.accelerator.wait_for_everyone()
        if pushes:
            self._push_from_checkpoint(str(checkpoint))

    def _publish(self, staged: Path, checkpoint: Path) -> None:
        if self.state.best_model_checkpoint == str(checkpoint):
            self.state.save_to_json(str(staged / "trainer_state.json"))
        if checkpoint.exists():  # of an earlier run; deleted in its place, it could be left in halves
            os.rename(checkpoint, staged.with_name("replaced"))
        os.rename(staged, checkpoint)
        self._rotate(checkpoint.parent)

    def _rotate(self, run_dir: Path) -> None:
        """Remove the oldest checkpoints beyond save_total_limit, and what was staged.

        Out of sight first: a removal that is cut short leaves nothing that looks like a checkpoint.
        """
        staging, found = run_dir / STAGING, sort_checkpoints(str(run_dir))
        staging.mkdir(exist_ok=True)
        best = self.state.best_model_checkpoint  # it may be spelled in another way, as from the root on
        others = [one for one in found[:-1] if not best or Path(one).resolve() != Path(best).resolve()]
        limit = self.args.save_total_limit or len(found)
        for checkpoint in others[: max(0, len(found) - limit)]:
            os.rename(checkpoint, staging / Path(checkpoint).name)
        shutil.rmtree(staging)

    def _best(self, checkpoint: str) -> str | None:
        return find_best(checkpoint, needed=self.args.load_best_model_at_end)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        log = logging.getLogger(Trainer.__module__)
        log.addFilter(_is_not_of_the_best)
        try:
            done = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
            )
        finally:
            log.removeFilter(_is_not_of_the_best)
        if resume_from_checkpoint:  # The Trainer forgets the best one of a run whose folder was moved.
            self.state.best_model_checkpoint = self._best(resume_from_checkpoint)
        return done

    def _finalize_training(self, trial, num_train_samples, start_time):
        # With a limit of 1 the Trainer deletes the last checkpoint, in its place: a rerun would train again.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what was trained, as its library reads it; the final model is the average if one is kept.

        Weights that are not finite are an InputError, and nothing is written.
        """
        averaged = self.ema.applied(self.model) if self.ema and not self._staging else nullcontext()
        with reporting_write_errors(output_dir or self.args.output_dir), averaged:
            self._check_weights()
            if self.is_fsdp_enabled and self._has_shards() and not self._staging:
                # The Trainer saves no model whose checkpoints are in shards, and says nothing.
                self._save(output_dir, self.accelerator.get_state_dict(self.model))
            super().save_model(output_dir, _internal_call)

    def _has_shards(self) -> bool:
        plugin: Any = self.accelerator.state.fsdp_plugin
        return "FULL_STATE_DICT" not in str(plugin.state_dict_type)

    def _check_weights(self) -> None:
        # Under DeepSpeed a process has its share of a weight beside an empty tensor.
        named = self.model.named_parameters()
        trained = [(name, getattr(p, "ds_tensor", p)) for name, p in named if p.requires_grad]
        bad = [name for name, parameter in trained if not torch.isfinite(parameter).all()]
        # Of weights in shards a process sees its own; all of them have to stop.
        count: Any = self.accelerator.reduce(torch.tensor(len(bad), device=self.accelerator.device))
        if count:
            raise InputError(
                f"after step {self.state.global_step} {len(bad)} of {len(trained)} trained tensors are not "
                f"finite{f', {bad[0]} the first' if bad else ''}: nothing was saved. The last checkpoint is "
                "untouched; lower --learning_rate, or use bf16 in place of fp16"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self._staging and isinstance(model, SavesExactly):
            model.save_weights(folder, state_dict=state_dict)
        elif not _is_plain(model):
            model.save_pretrained(folder, state_dict=state_dict)
        elif state_dict is None:
            save_model(model, str(folder / SAFE_WEIGHTS_NAME))  # which stores shared weights once
        else:
            save_file(state_dict, folder / SAFE_WEIGHTS_NAME)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.ema and self._staging:
            self.ema.save(folder)
        make_readable(*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors"))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the trained weights; what does not fit the model, or is not finite, is an InputError."""
        with reading(resume_from_checkpoint, "model"):
            self._load_weights(resume_from_checkpoint, model)
            if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:  # of which a process sees a part
                self._check_loaded(resume_from_checkpoint)

    def _check_loaded(self, checkpoint: str) -> None:
        trained = {name: value.data for name, value in self.model.named_parameters() if value.requires_grad}
        check_finite(trained, f"the model in {checkpoint}", "It is damaged")
        file = Path(checkpoint, ADAPTER_FILE)
        if isinstance(self.model, PeftModel) and (found := difference_of_adapter(self.model, file)):
            raise InputError(f"{file} is not the adapter of this model: {found}")

    def _load_weights(self, resume_from_checkpoint: str, model: nn.Module | None) -> None:
        if isinstance(self.model, SavesItself) and not self.is_fsdp_enabled:
            self.model.load_weights(resume_from_checkpoint)
        elif _is_plain(self.model) and not self.is_fsdp_enabled:
            file = Path(resume_from_checkpoint, SAFE_WEIGHTS_NAME)
            with reading(file, f"weights of a {type(self.model).__name__}"):
                load_model(self.model, file)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The Trainer would go on with the weights that the model had before.
        values = self.model.state_dict(keep_vars=True)
        tied = {id(value) for name, value in values.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if id(values.get(name)) not in tied]
        for what, names in (("lack", missing), ("have beyond it", load_result.unexpected_keys)):
            if names:
                raise InputError(
                    f"the checkpoint's weights do not fit this {type(self.model).__name__}: they {what} "
                    f"{len(names)} tensors, {names[0]} among them"
                )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            complete_states(self.optimizer)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint), "state of the optimizer or its schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint), "state of the gradient scaler"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint), "state of the random numbers"):
            super()._load_rng_state(checkpoint)


def _is_not_of_the_best(record: logging.LogRecord) -> bool:
    return "best checkpoint" not in str(record.msg)
