"""Self-rewarding in rounds: a model draws and judges its own images, is trained on them, and is compared.

    python recipes/self_reward.py
    python recipes/self_reward.py --model_name_or_path stabilityai/stable-diffusion-2-1 --num_processes 4 \\
        --classes Elephant Giraffe --build build.yaml --sft sft.yaml --dpo dpo.yaml --compare compare.yaml

A round is four commands, each printed before it runs, so that any can be run alone: the self-rewarding
builder, SFT on the optimal images, Diffusion-DPO on the pairs, and the comparison of both with the base. The
next round's candidates are drawn by what this round trained (`--next_round`), and its training goes on from
there, that adapter being the reference. The YAML files hold the options of the four; without any it is the
pocket, in minutes. Method: arXiv 2405.13473.

The same command again, after a crash or Ctrl-C, goes on where it stopped. You should see in
--output_dir/round-1 the folders data, sft, dpo, and report.html.

Launched by plain python: it launches its steps by accelerate, on --num_processes each.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from accelerate.commands.config.config_args import default_config_file

from prefopt.cli import run
from prefopt.records import InputError
from prefopt.store import alone, write_atomically

HERE = Path(__file__).resolve().parent
CONFIGS = HERE / "configs"


@dataclass
class SelfRewardConfig:
    """The rounds, and where the options of each step are."""

    model_name_or_path: str = field(
        default="pocket", metadata={"help": "Base model: a folder, a hub id or pocket."}
    )
    classes: list[str] = field(
        default_factory=lambda: ["elephant", "giraffe"], metadata={"help": "What the images are to show."}
    )
    rounds: int = field(default=1, metadata={"help": "How often to build, train and compare."})
    next_round: Literal["sft", "dpo"] = field(
        default="dpo", metadata={"help": "Whose adapter draws the next round's candidates."}
    )
    build: str = field(
        default=str(CONFIGS / "self_reward_build_pocket.yaml"), metadata={"help": "Options of the builder."}
    )
    sft: str = field(
        default=str(CONFIGS / "self_reward_sft_pocket.yaml"), metadata={"help": "Options of SFT, or none."}
    )
    dpo: str = field(
        default=str(CONFIGS / "self_reward_dpo_pocket.yaml"), metadata={"help": "Options of DPO, or none."}
    )
    compare: str = field(
        default=str(CONFIGS / "self_reward_compare_pocket.yaml"),
        metadata={"help": "Options of the comparison."},
    )
    num_processes: int = field(default=1, metadata={"help": "Processes of each step."})
    output_dir: str = field(default="runs/self_reward", metadata={"help": "Where the rounds go."})

    def __post_init__(self) -> None:
        for name in ("rounds", "num_processes"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; it is 1 or more")
        for name in ("build", "sft", "dpo", "compare"):
            spared = getattr(self, name) == "none" and name in ("sft", "dpo")
            if not spared and not Path(getattr(self, name)).is_file():
                raise InputError(f"--{name}: no file {getattr(self, name)}; name a YAML file of its options")
        if getattr(self, self.next_round) == "none" and self.rounds > 1:
            raise InputError(f"--next_round {self.next_round} is not trained: --{self.next_round} is none")


def main(config: SelfRewardConfig) -> None:
    """All rounds, one after the other."""
    with alone(Path(config.output_dir)):
        adapter = None
        for number in range(1, config.rounds + 1):
            folder = Path(config.output_dir, f"round-{number}")
            steps = round_steps(config, folder, adapter, seed=number - 1)
            for name, command in steps.items():
                step(name, command, folder, config.num_processes)
            adapter = folder / config.next_round


def round_steps(
    config: SelfRewardConfig, folder: Path, adapter: Path | None, *, seed: int
) -> dict[str, list[str]]:
    """The script of each step and its options."""
    model, start = ["--model_name_or_path", config.model_name_or_path], []
    drawer = [] if adapter is None else ["--adapter", str(adapter)]
    if adapter is not None:
        start = ["--adapter_name_or_path", str(adapter)]
    data = folder / "data"
    trained = [name for name in ("sft", "dpo") if getattr(config, name) != "none"]
    tables = {"sft": data / "sft", "dpo": data / "pairs"}
    builder = [str(HERE.parent / "data_builders" / "self_rewarding.py"), "--config", config.build]
    builder += [*model, *drawer, "--classes", *config.classes, "--seed", str(seed), "--output_dir", str(data)]
    steps = {"data": builder}
    for name in trained:
        steps[name] = [str(HERE / f"diffusion_{name}.py"), "--config", getattr(config, name), *model, *start]
        steps[name] += ["--dataset_name", str(tables[name]), "--output_dir", str(folder / name)]
        steps[name] += ["--resume_from_checkpoint"]
    before = [] if adapter is None else [f"before={adapter}"]
    systems = ["base", *before, *(f"{name}={folder / name}" for name in trained)]
    steps["compare"] = [str(HERE / "compare_text_to_image.py"), "--config", config.compare, *model]
    steps["compare"] += ["--systems", *systems, "--runs", *(str(folder / name) for name in trained)]
    steps["compare"] += ["--output_dir", str(folder)]
    return steps


def step(name: str, command: list[str], folder: Path, processes: int) -> None:
    """Run one command, unless it has already ended well with the same options."""
    words = [*launcher(processes), *command]
    config = command[command.index("--config") + 1]
    key = hashlib.sha256(json.dumps([words, Path(config).read_text()]).encode()).hexdigest()
    record = folder / f"{name}.done"
    if record.is_file() and record.read_text() == key:
        print(f"{folder}: {name} is done", flush=True)
        return
    print(f"\n{shlex.join(words)}", flush=True)
    if code := subprocess.run(words, check=False).returncode:
        raise InputError(
            f"the step {name} ended with exit code {code}, its message is above; mend it and run this again"
        )
    write_atomically(record, key)


def launcher(processes: int) -> list[str]:
    """accelerate's launcher, of the Python that runs this, with its own config file if there is one."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--num_processes", str(processes)]
    if not Path(default_config_file).is_file():  # its defaults, or it warns of each
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return launch


if __name__ == "__main__":
    run(main, SelfRewardConfig)
