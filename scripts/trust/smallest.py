"""Every recipe and builder at its smallest size on the pocket, launched in a fork, and what it wrote.

A program runs in a folder that is always called the same, `run/NAME`, for paths are part of results. Finished
runs that others build on (an adapter to compare, a dataset to train on) lie in `whole/NAME`.
"""

import functools
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
# Before any library reads them: no network, one thread in each process.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1", MPLBACKEND="Agg")
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")

import pyarrow.parquet as pq
import yaml
from launching import FORKS, Launch, launch

from prefopt.files import content_key
from prefopt.programs import BUILDERS, RECIPES, find_program, programs

# For all programs that the fork server starts: whatever they import most.
LIBRARIES = [
    "prefopt",
    "bitsandbytes",
    "peft",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers.models.clip",
    "prefopt.cli",
    "prefopt.diffusion.training",
    "prefopt.vlm.training",
    "prefopt.evaluation.text_to_image",
    "prefopt.evaluation.vision_language",
    "data_builders.images.build",
    "data_builders.answers.build",
]
FORKS.set_forkserver_preload(LIBRARIES)

TRAINING: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
    "disable_tqdm": True,
    "resume_from_checkpoint": None,
}
LORA = TRAINING | {"lora_r": 2, "dataset_train_split": "train[:6]"}
IMAGES = {"num_inference_steps": 1, "candidates": 2, "batch_size": 2, "block_size": 2, "judge_batch_size": 2}
COMPARED = {"num_prompts": 3, "num_seeds": 1, "num_inference_steps": 1, "shown": 2}
PRESET = {name: value for name, value in LORA.items() if name in ("max_steps", "save_steps", "lora_r")}
PRESET |= {"per_device_train_batch_size": 2, "save_strategy": "steps", "logging_steps": 1}

# {whole} is the folder of finished runs; a dict is written to a YAML file, whose path the option gets.
PROGRAMS: dict[str, dict[str, Any]] = {
    "diffusion_sft": LORA,
    "diffusion_dpo": LORA | {"reference": "cache", "ema_decay": 0.9},
    "diffusion_cpo": LORA,
    "vlm_sft": LORA | {"dataset_name": "pocket"},
    "vlm_dpo": LORA | {"dataset_name": "pocket", "vision_features": "cache"},
    "vlm_qlora_ensemble": LORA
    | {"dataset_name": "pocket", "max_steps": 2, "members": ["lora_alpha=4", "lora_r=3"], "average_rank": 2},
    "text_to_image_pairs": IMAGES
    | {
        "num_prompts": 4,
        "test_fraction": 0.5,
        "exports": ["pairs", "sft", "ranked", "pickapic", "imagefolder"],
    },
    "self_rewarding": IMAGES | {"prompts_per_class": 2, "held_out_per_class": 1},
    "self_critique": {
        "dataset_name": "pocket",
        "critic_name_or_path": "pocket",
        "max_rows": 8,
        "max_new_tokens": 16,
        "batch_size": 2,
        "block_size": 4,
        "critic_batch_size": 2,
    },
    "consensus_pairs": {
        "dataset_name": "pocket",
        "judges": "pocket",
        "dataset_train_split": "train[:6]",
        "judge_batch_size": 2,
        "block_size": 4,
    },
    "discriminator_pairs": {"num_images": 6, "block_size": 2, "batch_size": 2, "test_fraction": 0.5},
    "discriminator": TRAINING
    | {"dataset_name": "{whole}/discriminator_pairs", "dataset_config": "ranked", "widths": [8, 12]},
    "compare_text_to_image": COMPARED
    | {
        "systems": ["base", "dpo={whole}/diffusion_dpo"],
        "guidance_scales": [1, 2],
        "batch_size": 2,
        "judge_model_name_or_path": "pocket",
    },
    "compare_vlm": {
        "systems": ["base", "sft={whole}/vlm_sft"],
        "max_rows": 6,
        "max_new_tokens": 16,
        "batch_size": 2,
        "critic": "pocket",
        "critic_typed": None,
    },
    "self_rewarding_rounds": {
        "build": IMAGES | {"prompts_per_class": 2, "held_out_per_class": 0},
        "sft": PRESET,
        "dpo": PRESET,
        "compare": COMPARED,
    },
    "diffusion_methods": {
        "methods": ["sft", "cpo_discriminator"],
        "build": IMAGES | {"num_prompts": 4, "gallery": False},
        "sft": PRESET,
        "cpo": PRESET | {"discriminator_weight": 2.0},
        "compare": COMPARED,
    },
}


def check_complete() -> None:
    """Every recipe and builder there is has its smallest run."""
    missing = (programs(RECIPES) | programs(BUILDERS)).keys() - PROGRAMS.keys()
    assert not missing, f"scripts/trust/smallest.py has no run of {', '.join(sorted(missing))}"


class Workplace:
    """A folder in which programs run, and their uninterrupted results."""

    def __init__(self, folder: Path):
        self.folder, self.whole = folder, folder / "whole"
        self.whole.mkdir(parents=True, exist_ok=True)
        self.log, self.events = folder / "log", folder / "events.jsonl"

    def run(self, name: str) -> Path:
        """The folder that a program writes to."""
        return self.folder / "run" / name

    def launch(self, name: str) -> Launch:
        """Start a program as its command line does, in a process group of its own."""
        for file in (self.log, self.events):
            file.unlink(missing_ok=True)
        options = {option: self._value(name, option, value) for option, value in PROGRAMS[name].items()}
        script = str(find_program(name))
        hook = functools.partial(_prepare, self.events)
        return launch(script, options | {"output_dir": self.run(name)}, self.log, hook)

    def finish(self, name: str, seconds: float = 600) -> str:
        """Run a program to its end; what it printed."""
        running = self.launch(name)
        code = running.wait(seconds)
        assert code == 0, f"{name} ended with {code}:\n{running.text()}"
        return running.text()

    def make_whole(self, name: str) -> Path:
        """The uninterrupted run of a program, made once, and after those that it builds on."""
        folder = self.whole / name
        if not folder.exists():
            for source in self.sources(name):
                self.make_whole(source)
            self.empty(name)
            self.finish(name)
            self.run(name).rename(folder)
        return folder

    def sources(self, name: str) -> list[str]:
        """The programs whose whole runs this one reads."""
        return re.findall(r"\{whole\}/(\w+)", str(PROGRAMS[name]))

    def empty(self, name: str) -> None:
        """Remove what earlier runs of a program left."""
        shutil.rmtree(self.run(name), ignore_errors=True)

    def happened(self) -> list[dict[str, Any]]:
        """The calls of models and the kept results of the last launch, in order."""
        return (
            [json.loads(line) for line in self.events.read_text().splitlines()]
            if self.events.exists()
            else []
        )

    def _value(self, name: str, option: str, value: Any) -> Any:
        if isinstance(value, dict):
            file = self.folder / f"{name}-{option}.yaml"
            file.write_text(yaml.safe_dump(value))
            return file
        if isinstance(value, list):
            return [self._value(name, option, part) for part in value]
        return value.format(whole=self.whole) if isinstance(value, str) else value


# What was kept


def _prepare(events: Path) -> None:
    """In the program: a process group of its own, and a log of every result of a model that it keeps."""
    os.setsid()
    from data_builders.engine.blocks import ImageBlocks
    from data_builders.engine.passes import ModelPass
    from prefopt.evaluation import text_to_image
    from prefopt.ledger import Ledger
    from prefopt.store import TensorStore

    def log(**event: Any) -> None:
        with events.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def logged(owner: Any, method: str, keys: Any) -> None:
        original = getattr(owner, method)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            log(kept=keys(*args))
            return found

        setattr(owner, method, wrapper)

    logged(Ledger, "add", lambda ledger, results: [f"{ledger.folder}/{ledger.name} {key}" for key in results])
    logged(TensorStore, "write", lambda store, entries: [f"{store.folder} {key}" for key in entries])
    logged(ImageBlocks, "write", lambda blocks, block, rows: [str(block.file)])
    logged(text_to_image, "save_image", lambda image, path: [str(path)])

    def counted(self: ModelPass, name: str, value: Any) -> None:
        if name == "calls" and value > self.__dict__.get(name, 0):
            log(calls=value - self.__dict__.get(name, 0))
        object.__setattr__(self, name, value)

    ModelPass.__setattr__ = counted  # pyright: ignore


# What was written

# What may differ between two runs: durations, how many calls a rerun still made, whether it was resumed.
TIMES = re.compile(r"seconds.*|calls.*|.*_runtime|.*_per_second|resume_from_checkpoint")
# What is kept for reruns alone: caches, ledgers.
KEPT = re.compile(r"(^|.*/)(work|cache)/.*|(.*/)?\.lock|(.*/)?(scores|answers)\b[^/]*")


def contents(folder: Path) -> dict[str, str]:
    """The hash of each result's content but for times."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: content_key(_without_times(path)) for name, path in files.items() if not KEPT.fullmatch(name)
    }


def _without_times(path: Path) -> bytes:
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return repr(
            table.drop_columns(list(filter(TIMES.fullmatch, table.column_names))).to_pylist()
        ).encode()
    if path.suffix == ".json":
        return json.dumps(_timeless(json.loads(path.read_text()))).encode()
    if path.suffix == ".jsonl":
        lines = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        # The Trainer's closing line counts the steps of its own process alone.
        return json.dumps([line for line in lines if "train_loss" not in line]).encode()
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(part) for key, part in value.items() if not TIMES.fullmatch(key)}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The files that two runs do not have alike, in name or content."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
