"""Trains the oracle on renders and the VAE's copies of them; nothing of CLIP's training is used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from prefopt.pocket.oracle import OracleNetwork
from prefopt.pocket.world import ATTRIBUTES
from pretraining.common import Run, Training
from pretraining.pictures import Pool

CHANNELS = (24, 48, 64, 64)


def train(run: Run, pool: Pool) -> OracleNetwork:
    """The network with averaged weights, in float32."""
    torch.manual_seed(run.seed)
    network: Any = OracleNetwork(CHANNELS)
    network.to(memory_format=torch.channels_last)
    training = Training(run, torch.nn.ModuleDict({"oracle": network}))
    answers = {
        name: torch.tensor([values.index(getattr(scene, name)) for scene in pool.scenes])
        for name, values in ATTRIBUTES.items()
    }
    for rng in training.batches():
        items = rng.integers(len(pool.scenes), size=run.batch)
        logits = network(pool.draw(rng, items).contiguous(memory_format=torch.channels_last))
        loss = torch.stack([cross_entropy(logits[name], answers[name][items]) for name in ATTRIBUTES]).sum()
        training.update(loss)
    training.finished()
    return network


def save(network: OracleNetwork, path: Path) -> None:
    """config.json and model.safetensors (float16), as `Oracle.load` reads them."""
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "channels": list(CHANNELS),
        "attributes": {name: list(values) for name, values in ATTRIBUTES.items()},
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {
        k: v.half().contiguous() if v.is_floating_point() else v for k, v in network.state_dict().items()
    }
    save_file(tensors, path / "model.safetensors")


def accuracy(seen: list, scenes: list) -> dict[str, float]:
    """The share of right answers, by attribute."""
    return {
        name: float(
            np.mean([getattr(a, name) == getattr(b, name) for a, b in zip(seen, scenes, strict=True)])
        )
        for name in ATTRIBUTES
    }
