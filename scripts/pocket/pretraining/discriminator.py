"""Trains the pocket's discriminator as a person would: by the builder and the recipe."""

import subprocess
import sys
from pathlib import Path

from prefopt.diffusion.discriminator import Discriminator
from pretraining.common import Run

IMAGES = 1200
ROOT = Path(__file__).resolve().parents[3]


def train(run: Run) -> Discriminator:
    """Build the data and train on them, both in the run's folder; model/test.json there has the figures."""
    data, trained = run.work / "data", run.work / "model"
    _call(
        "data_builders/discriminator_pairs.py",
        f"--num_images {IMAGES} --test_fraction 0.15 --exports ranked --output_dir {data}",
    )
    _call(
        "recipes/discriminator.py",
        f"--dataset_name {data} --dataset_config ranked --widths 32 64 96 --max_steps {run.steps} "
        f"--learning_rate {run.learning_rate} --warmup_steps {run.warmup} --lr_scheduler_type cosine "
        f"--per_device_train_batch_size {run.batch} --drop_probability 0.1 --flip_probability 0.5 "
        f"--seed {run.seed} --output_dir {trained} --resume_from_checkpoint",
    )
    return Discriminator.from_pretrained(trained)


def _call(script: str, options: str) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *options.split()], check=True)
