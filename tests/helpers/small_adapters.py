"""Random LoRA adapters of a small module with one layer of each kind, saved as peft saves them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefopt.adapters import ADAPTER_FILE, CONFIG_FILE


class Small(nn.Module):
    """One layer of each kind that LoRA goes to, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 8)
        self.narrow = nn.Linear(8, 6)
        self.wide = nn.Linear(6, 12)
        self.convolution = nn.Conv2d(3, 5, (3, 1))
        self.head = nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.wide(self.narrow(self.words(ids))))


TARGETS = ["words", "narrow", "wide", "convolution"]
# Ranks, alphas and scalings differ between adapters and layers; an average has the first one's config.
MIXED: list[dict[str, Any]] = [
    {
        "r": 3,
        "lora_alpha": 7,
        "use_rslora": True,
        "lora_dropout": 0.1,
        "rank_pattern": {"wide": 5, "words": 1},
        "alpha_pattern": {"^narrow": 1},
    },
    {"r": 2, "lora_alpha": 3, "use_rslora": True},
    {"r": 4, "lora_alpha": 16, "alpha_pattern": {"convolution": 2}},
]


def save_random(folder: Path, seed: int = 0, dtype: torch.dtype | None = None, **options: Any) -> Path:
    """Save a random adapter of Small, as peft does."""
    config = LoraConfig(**{"target_modules": TARGETS, "init_lora_weights": False, **options})
    model = Small().to(dtype)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def save_mixed(folder: Path) -> list[Path]:
    return [save_random(folder / f"{i}", seed=i, **options) for i, options in enumerate(MIXED)]


def deltas(folder: Path) -> dict[str, Tensor]:
    """Each layer's change of weight, as peft computes it."""
    return deltas_of(PeftModel.from_pretrained(Small(), str(folder)))


def deltas_of(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    named = {key: module for key, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {key: module.get_delta_weight(name).detach() for key, module in named.items()}  # pyright: ignore


def error(value: Tensor, expected: Tensor) -> float:
    """The relative error in the Frobenius norm."""
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def edit_config(folder: Path, **options: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **options}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / ADAPTER_FILE)), folder / ADAPTER_FILE)
