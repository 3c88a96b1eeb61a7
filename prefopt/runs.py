"""What surrounds a training run: config.json, metrics.jsonl, progress, weight averaging, signals."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from prefopt.errors import InputError
from prefopt.files import write_atomically
from prefopt.interrupts import Interrupted, on_signal
from prefopt.progress import progress_bar

LIBRARIES = (
    "prefopt",
    "torch",
    "transformers",
    "diffusers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that matter, and the working tree's commit if there is one."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    if not shutil.which("git"):
        return found
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found | ({"commit": commit.stdout.strip()} if commit.returncode == 0 else {})


CONFIG_FILE = "config.json"  # in a run's folder


def write_config(folder: Path, args: TrainingArguments, **more: Any) -> None:
    """Write config.json: every option as resolved, the versions, and `more` facts about the run."""
    config = {**more, "versions": versions(), "options": args.to_dict()}
    write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2, default=str) + "\n")


def refuse_earlier_run(output_dir: Path) -> None:
    """InputError if a run's folder holds checkpoints of an earlier one."""
    if output_dir.is_dir() and (earlier := get_last_checkpoint(output_dir)):
        raise InputError(
            f"{output_dir} holds {Path(earlier).name} of an earlier run: continue it with "
            "--resume_from_checkpoint (in Python, train(resume_from_checkpoint=True)), or name another "
            "--output_dir"
        )


METRICS_FILE = "metrics.jsonl"  # in a run's folder
VALIDATION_STRIPS = Path("validation", "strips.png")  # the same, if it generated images


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl, one for each log; none if there is no such file."""
    path = run / METRICS_FILE
    return _metrics(path) if path.is_file() else []


def _metrics(path: Path) -> list[dict[str, Any]]:
    *lines, _ = path.read_bytes().split(b"\n")  # a killed run, or a full disk, tears the last
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is no JSON: {error}; delete that line") from error
        if not isinstance(found[-1], dict):
            raise InputError(f"{path}: line {number} holds no metrics by their names; delete that line")
    return found


class MetricsFile:
    """metrics.jsonl: one object for each log; on resuming, lines after the checkpoint's step are removed."""

    def __init__(self, folder: Path, *, after: int):
        self.path = folder / METRICS_FILE
        earlier = read_metrics(folder) if after else []
        lines = [json.dumps(line) for line in earlier if line.get("step", 0) <= after]
        write_atomically(self.path, "".join(line + "\n" for line in lines))

    def write(self, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")


class Progress(ProgressCallback):
    """transformers' progress bar, with one short line for each log; all figures are in metrics.jsonl."""

    SHOWN = (
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "error/chosen",
        "error/rejected",
        "learning_rate",
    )

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Begin the bar."""
        self.current_step = 0
        if state.is_world_process_zero:
            self.training_bar = progress_bar(total=state.max_steps, desc="training", unit="step")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        """Count a batch of an evaluation."""
        if state.is_world_process_zero:
            if self.prediction_bar is None:
                total = len(eval_dataloader) if eval_dataloader else None
                self.prediction_bar = progress_bar(total=total, desc="evaluation", unit="batch", leave=False)
            self.prediction_bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Print the most important figures."""
        if (
            state.is_world_process_zero
            and self.training_bar is not None
            and logs
            and "train_runtime" not in logs
        ):
            values = {name.removeprefix("eval_"): value for name, value in logs.items()}
            figures = [f"{name} {values[name]:.4g}" for name in self.SHOWN if name in values]
            kind = "evaluation, " if "eval_loss" in logs else ""
            self.training_bar.write(f"{kind}step {state.global_step}: {', '.join(figures)}")


class Ema(TrainerCallback):
    """An exponential moving average of the trained weights, kept through resuming; `decay` in (0, 1)."""

    FILE = "ema.safetensors"

    def __init__(self, decay: float):
        self.update = get_ema_multi_avg_fn(decay)
        self.average: dict[str, torch.Tensor] = {}
        self.resume_from: str | None = None

    def on_train_begin(self, args, state, control, *, model, **kwargs) -> None:
        """Start with the training."""
        self.start(model)

    def start(self, model: torch.nn.Module) -> None:
        """Start from the model's weights, or from the checkpoint's average."""
        self.average = {name: value.detach().clone() for name, value in _trained(model).items()}
        if self.resume_from:
            file = Path(self.resume_from, self.FILE)
            if not file.is_file():
                raise InputError(f"{self.resume_from} has no {self.FILE}: continue without --ema_decay")
            kept = load_file(file)
            shapes = [{name: one.shape for name, one in values.items()} for values in (kept, self.average)]
            if shapes[0] != shapes[1]:
                raise InputError(
                    f"{file} holds no average of this model: its {len(kept)} tensors are not the "
                    f"{len(self.average)} that are trained. Continue with the options of that run"
                )
            for name, value in kept.items():
                self.average[name].copy_(value)

    def on_step_end(self, args, state, control, *, model, **kwargs) -> None:
        """Update the average with the weights of this step."""
        trained = _trained(model)
        self.update(
            list(self.average.values()), [trained[name].detach() for name in self.average], state.global_step
        )

    def save(self, folder: str | Path) -> None:
        """Write the average beside a checkpoint's weights."""
        save_file(self.average, Path(folder, self.FILE))

    @contextmanager
    def applied(self, model: torch.nn.Module) -> Iterator[None]:
        """The model with the averaged weights, for saving; the trained ones are put back on leaving."""
        trained = _trained(model)
        kept = {name: value.detach().clone() for name, value in trained.items()}
        try:
            for name, value in self.average.items():
                trained[name].data.copy_(value)
            yield
        finally:
            for name, value in kept.items():
                trained[name].data.copy_(value)


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


class Interrupt(TrainerCallback):
    """Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint; a second one ends it at once.

    All processes stop after the same step, whichever of them received the signal.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = 0  # the number of the signal that this process received
        self.agreed = 0  # that which any of the processes received

    def listening(self) -> AbstractContextManager[None]:
        """Handle the signals while training."""
        return on_signal(self._note)

    def _note(self, number: int) -> None:
        if self.received:
            raise Interrupted(number, "at once, without a new checkpoint")
        self.received = number
        os.write(
            2, b"\nstopping after this step, with a checkpoint; a signal after 5 seconds stops at once\n"
        )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Request a checkpoint and the end of training once any process was interrupted."""
        self.agreed = self.received
        if self.accelerator.num_processes > 1:
            received: Any = self.accelerator.gather(torch.tensor([self.received], device=args.device))
            self.agreed = int(received.max())
        if self.agreed:
            control.should_save = control.should_training_stop = True
