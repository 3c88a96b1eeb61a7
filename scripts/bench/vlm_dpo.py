"""How many pairs a second a DPO step on a LLaVA-1.5 trains: trl's DPOTrainer, and ours.

    python scripts/bench/vlm_dpo.py --size small
    python scripts/bench/vlm_dpo.py --size small --activation_checkpointing --loss_type cpo
    python scripts/bench/vlm_dpo.py --size 7b --dtype bfloat16

Four steps take turns in one run, each with its own copy of the same model, LoRA and optimizer, on the same
pairs:
  trl            trl's DPOTrainer (not for cpo: it has none that reads images)
  duplicated     ours with --no_shared_prefix: each answer in a row of its own, with image and prompt
  shared         ours: one row a pair, each image encoded once, the reference computed in the step
  kept           the same with image features and reference scores from the store
A step is forward, backward and AdamW on a batch that is on the device; reading and tokenising count for
nobody. Prints JSON: pairs a second, and how many times as fast as the first of the steps, turn by turn.
"""

import argparse
import ctypes
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from shapes import LLAVA_15, build_llava_15
from trl import DPOConfig, DPOTrainer
from turns import DTYPES, peak_memory

from prefopt.config import LoraArguments, PreferenceConfig
from prefopt.objectives import ObjectiveOptions, objective_of
from prefopt.runs import versions
from prefopt.trainer import PreferenceTrainer
from prefopt.vlm.batches import Collator
from prefopt.vlm.examples import VisionExamples
from prefopt.vlm.models import add_lora
from prefopt.vlm.scoring import CompletionScore
from prefopt.vlm.trees import PromptPositions

BETA, RATE = 0.1, 1e-4
PROMPT, ANSWER = 35, 45  # tokens, without the image's
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Options(ObjectiveOptions):
    """The menu's options, with the beta of this file."""

    beta = BETA


class Bench:
    """The steps, each with a model of its own, and the pairs that they share."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rows = random_pairs(options.batch * options.turns, LLAVA_15[options.size]["image_size"])
        self.losses: dict[str, list[float]] = {}
        self.encoded: dict[str, int] = {}
        self.steps: dict[str, Callable[[int], None]] = {}
        if options.loss_type == "dpo":
            self.steps["trl"] = self._trl()
        for name in ("duplicated", "shared", "kept"):
            if name != "kept" or options.loss_type == "dpo":
                self.steps[name] = self._ours(name)

    def _policy(self) -> tuple[Any, Any]:
        model, processor = build_llava_15(self.options.size, DTYPES[self.options.dtype], self.device)
        torch.manual_seed(0)
        return add_lora(
            model, LoraArguments(lora_r=16, lora_alpha=16, lora_target_modules=TARGETS)
        ), processor

    def _arguments(self, name: str) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / name),
            "per_device_train_batch_size": self.options.batch,
            "learning_rate": RATE,
            "bf16": self.options.dtype == "bfloat16",
            "activation_checkpointing": self.options.activation_checkpointing,
            "report_to": "none",
            "save_strategy": "no",
        }

    def _trl(self) -> Callable[[int], None]:
        model, processor = self._policy()
        arguments = self._arguments("trl") | {
            "beta": BETA,
            "max_length": None,
            "gradient_checkpointing": False,
        }
        rows = Dataset.from_list(self.rows)
        trainer = DPOTrainer(
            model, args=DPOConfig(**arguments), processing_class=processor, train_dataset=rows
        )
        batches = [trainer.data_collator([dict(row) for row in part]) for part in self._parts(self.rows)]
        return self._stepper("trl", trainer, batches)

    def _ours(self, name: str) -> Callable[[int], None]:
        model, processor = self._policy()
        positions = PromptPositions(model.get_base_model()) if name != "duplicated" else None
        score = CompletionScore(frozen_vision=True)
        examples = VisionExamples(Dataset.from_list(self.rows), "bench", "pairs")
        trainer = PreferenceTrainer(
            model,
            PreferenceConfig(**self._arguments(name)),
            score=score,
            prepare=score.prepare,
            objective=objective_of(Options(loss_type=self.options.loss_type), BETA),
            train_dataset=examples,
            data_collator=Collator(processor, positions=positions),
        )
        items = [examples[index, 0] for index in range(len(examples))]
        batches = [trainer.data_collator(part) for part in self._parts(items)]
        if name == "kept":
            batches = [self._kept(trainer, batch) for batch in batches]
        return self._stepper(name, trainer, batches)

    def _kept(self, trainer: PreferenceTrainer, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as the stores give it: features and reference scores in place of images."""
        prepared = trainer._prepare_inputs(batch)
        return prepared | {"reference": trainer.reference_scores(trainer.model, prepared)}

    def _parts(self, rows: list[Any]) -> list[list[Any]]:
        size = self.options.batch
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _stepper(self, name: str, trainer: Any, batches: list[Any]) -> Callable[[int], None]:
        model = trainer.model.to(self.device)
        if self.options.activation_checkpointing:
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
        trainer.current_gradient_accumulation_steps = 1
        self.losses[name], self.encoded[name] = [], 0
        batches = [trainer._prepare_input(batch) for batch in batches]

        def count(_module: Any, _args: Any, kwargs: Any) -> None:
            self.encoded[name] += len(kwargs.get("pixel_values", _args[0] if _args else ()))

        tower = model.get_base_model().model.vision_tower
        tower.register_forward_pre_hook(count, with_kwargs=True)

        def step(turn: int) -> None:
            loss = trainer.training_step(model, batches[turn])
            optimizer.step()
            optimizer.zero_grad()
            self.losses[name].append(loss.item())

        return step


def random_pairs(count: int, side: int) -> list[dict[str, Any]]:
    """Pairs of random words about random images, in trl's vision preference format."""
    chance = np.random.default_rng(0)

    def words(number: int) -> str:
        return " ".join(map(str, chance.integers(0, 500, number)))

    return [
        {
            "images": [Image.fromarray(chance.integers(0, 256, (side, side, 3), dtype=np.uint8))],
            # BOS, the user's name and the assistant's are tokens, too; and the answer's end.
            "prompt": [{"role": "user", "content": words(PROMPT - 3)}],
            "chosen": [{"role": "assistant", "content": words(ANSWER - 1)}],
            "rejected": [{"role": "assistant", "content": words(ANSWER - 1)}],
        }
        for _ in range(count)
    ]


def measure(bench: Bench) -> dict[str, Any]:
    """Medians over the turns after the first, which warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in bench.steps}
    memory: dict[str, list[float]] = {name: [] for name in bench.steps}
    for turn in range(bench.options.turns):
        for name, step in bench.steps.items():
            before = settled_memory(bench.device)
            with peak_memory(bench.device, memory[name]):
                start = time.perf_counter()
                step(turn)
                if bench.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
            memory[name][-1] -= before
        print(f"turn {turn}", {name: round(s[-1], 2) for name, s in seconds.items()}, file=sys.stderr)
    first, pairs = next(iter(seconds)), bench.options.batch
    return {
        "pairs_per_second": {n: round(pairs / statistics.median(s[1:]), 3) for n, s in seconds.items()},
        f"times_as_fast_as_{first}": {
            name: round(statistics.median(np.divide(seconds[first][1:], taken[1:])), 3)
            for name, taken in seconds.items()
        },
        "peak_memory_of_a_step_gib": {name: round(max(m[1:]), 3) for name, m in memory.items()},
        "images_encoded_per_pair": {
            name: count / pairs / bench.options.turns for name, count in bench.encoded.items()
        },
        "losses": bench.losses,
        "seconds_per_step": {n: [round(value, 3) for value in s[1:]] for n, s in seconds.items()},
    }


def settled_memory(device: torch.device) -> float:
    """GiB in use before a step, once what earlier ones left is given back."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before: list[float] = []
    with peak_memory(device, before):
        time.sleep(0.05)
    return before[0]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=LLAVA_15, default="tiny")
    parser.add_argument("--batch", type=int, default=2, help="pairs a step")
    parser.add_argument("--turns", type=int, default=8, help="turns; the first warms up")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--loss_type", choices=("dpo", "cpo"), default="dpo")
    parser.add_argument("--activation_checkpointing", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        figures = measure(bench)
    cuda = bench.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps({**vars(options), "device": name, **figures, "versions": versions()}, indent=2))


if __name__ == "__main__":
    main()
