"""Averages of the LoRA files that diffusers' pipelines load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_adapters import deltas_of, error
from torch import Tensor

from prefopt.adapters import adapter_layers
from prefopt.averaging import average_adapters
from prefopt.diffusion.lora import LOADED, load_adapter, save_weights
from prefopt.hub import ADAPTER_FILE

MIXED: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 3, "use_rslora": True, "alpha_pattern": {"to_q": 1}},
    {"r": 4, "lora_alpha": 2},
    {"r": 2, "lora_alpha": 8, "alpha_pattern": {"to_q": 1}},
]


def save_random(model: str, folder: Path, seed: int, **options: Any) -> Path:
    """Save a random LoRA of attention and 3 x 3 convolutions, as our training does."""
    network = StableDiffusionPipeline.from_pretrained(model).unet
    torch.manual_seed(seed)
    network.add_adapter(
        LoraConfig(**options, init_lora_weights=False, target_modules=["to_q", "to_out.0", "conv1"])
    )
    save_weights(network, "unet", folder, network.state_dict())
    return folder


def loaded(model: str, file: Path) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    load_adapter(pipeline, file)
    return pipeline


def predictions(network: Any) -> Tensor:
    torch.manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, network.config.cross_attention_dim)
    with torch.no_grad():
        return network(latents, 500, encoder_hidden_states=text).sample


@pytest.mark.parametrize("form", ["with metadata", "without", "kohya"])
def test_a_pipeline_with_the_average_is_the_pipeline_with_merged_weights(
    stable_diffusion: str, tmp_path: Path, form: str
) -> None:
    """Of attention and convolutions; guards a reader that takes alpha = r."""
    files = [
        save_random(stable_diffusion, tmp_path / f"{i}", i, **options) / ADAPTER_FILE
        for i, options in enumerate(MIXED)
    ]
    if form != "with metadata":
        for file in files:
            save_file(dict(renamed(load_file(file)) if form == "kohya" else load_file(file)), file)
    average = average_adapters(files, tmp_path / "average")
    merged = StableDiffusionPipeline.from_pretrained(stable_diffusion).unet
    base = predictions(merged)
    for file in files:
        network = loaded(stable_diffusion, file).unet
        for name, delta in deltas_of(network, LOADED).items():
            merged.get_submodule(name).weight.data += delta / 3
    network = loaded(stable_diffusion, average.file).unet
    assert (
        len(adapter_layers(network))
        == len(average.layers)
        == len(load_file(average.file)) // (3 if form == "kohya" else 2)
    )
    expected = predictions(merged)
    assert error(predictions(network), expected) < 1e-5 and error(base, expected) > 0.01


def renamed(state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors by the names of kohya's trainer, an alpha of 5 in each layer."""
    tensors = []
    for name, value in state.items():
        layer, _, factor = name.partition(".lora_")
        key = f"lora_{layer.replace('.', '_')}"
        tensors.append((f"{key}.lora_{'down' if factor.startswith('A') else 'up'}.weight", value))
        tensors.append((f"{key}.alpha", torch.tensor(5.0)))
    return tensors


def test_a_reader_of_tensors_alone_gets_the_average_too(stable_diffusion: str, tmp_path: Path) -> None:
    """Other programs take alpha = r, and none reads this metadata: the product of the factors is enough."""
    files = [
        save_random(stable_diffusion, tmp_path / f"{i}", i, **options) / ADAPTER_FILE
        for i, options in enumerate(MIXED)
    ]
    average = average_adapters([file.parent for file in files], tmp_path / "average", rank=3)
    with safe_open(average.file, framework="pt") as tensors:
        assert json.loads(tensors.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 3
    with_metadata = loaded(stable_diffusion, average.file).unet
    save_file(load_file(average.file), tmp_path / ADAPTER_FILE)
    assert torch.equal(
        predictions(loaded(stable_diffusion, tmp_path / ADAPTER_FILE).unet), predictions(with_metadata)
    )


def test_components_have_ranks_of_their_own(stable_diffusion: str, tmp_path: Path) -> None:
    files = []
    for i in range(2):
        file = save_random(stable_diffusion, tmp_path / f"{i}", i, r=4, lora_alpha=4) / ADAPTER_FILE
        torch.manual_seed(i)
        layer = "text_encoder.encoder.layers.0.self_attn.q_proj"
        text = {f"{layer}.lora_A.weight": torch.randn(1, 16), f"{layer}.lora_B.weight": torch.randn(16, 1)}
        save_file({**load_file(file), **text}, file)
        files.append(file)
    average = average_adapters(files, tmp_path / "average")
    ranks = {name.split(".")[0]: len(v) for name, v in load_file(average.file).items() if "lora_A" in name}
    assert ranks == {"unet": 8, "text_encoder": 2} and average.rank == 8
    pipelines = [loaded(stable_diffusion, file) for file in (*files, average.file)]
    a, b, both = (deltas_of(pipeline.text_encoder, LOADED) for pipeline in pipelines)
    assert len(both) == 1
    for name, value in both.items():
        assert error(value, (a[name] + b[name]) / 2) < 1e-6
