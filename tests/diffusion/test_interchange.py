"""An adapter trained here computes the same in every program that reads it, and training goes on from it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from running import logged, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_adapters import deltas_of, error
from torch import Tensor

from prefopt.adapters import POLICY, lora_config
from prefopt.config import LoraArguments
from prefopt.diffusion.denoiser import Denoiser
from prefopt.diffusion.generator import Generator
from prefopt.diffusion.lora import LOADED, add_lora, make_trainable
from prefopt.diffusion.sampling import load_generator, load_pipeline
from prefopt.errors import InputError
from prefopt.hub import ADAPTER_FILE

STOCK = {"stable_diffusion": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
SCALINGS: dict[str, dict[str, Any]] = {
    "alpha = 4 r": {"lora_r": 2, "lora_alpha": 8},
    "alpha = r / 3": {"lora_r": 3, "lora_alpha": 1},
    "rslora": {"lora_r": 3, "lora_alpha": 7, "use_rslora": True},
}


def random_lora(folder: str, **options: Any) -> Denoiser:
    """A denoiser with a random LoRA on attention and a convolution."""
    denoiser = Denoiser(load_pipeline(folder))
    torch.manual_seed(0)
    targets = [*denoiser.family.lora_targets, "conv1"]
    add_lora(denoiser.network, lora_config(LoraArguments(**options), targets))
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return denoiser.eval()


def predictions(network: Any) -> Tensor:
    torch.manual_seed(0)
    inputs = {"encoder_hidden_states": torch.randn(2, 5, network.config.cross_attention_dim)}
    latents = torch.randn(2, 4, 8, 8)
    if network.config.addition_embed_type:
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 16), "time_ids": torch.rand(2, 6)}
    with torch.no_grad():
        return network(latents, 500, **inputs).sample


def merged(network: Any, kohya: dict[str, Tensor]) -> Any:
    """The network with kohya's tensors added to its weights by hand: alpha / r * up down."""
    for name, module in network.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if f"{key}.alpha" in kohya:
            down, up = kohya.pop(f"{key}.lora_down.weight"), kohya.pop(f"{key}.lora_up.weight")
            update = up.flatten(1) @ down.flatten(1) * (kohya.pop(f"{key}.alpha") / len(down))
            module.weight.data += update.view_as(module.weight)
    assert not kohya
    return network


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("model", STOCK)
def test_every_reader_computes_what_was_trained(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, scaling: str
) -> None:
    """Guards: an adapter wrong by alpha / r wherever a program takes alpha = r."""
    folder = request.getfixturevalue(model)
    denoiser = random_lora(folder, **SCALINGS[scaling])
    denoiser.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / ADAPTER_FILE)
    with safe_open(tmp_path / ADAPTER_FILE, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    rank = SCALINGS[scaling]["lora_r"]
    assert (told["unet.r"], told["unet.lora_alpha"], told["unet.use_rslora"]) == (rank, rank, False)
    kohya = convert_state_dict_to_kohya(dict(tensors))
    for name, state in (("stripped", tensors), ("kohya", kohya)):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / ADAPTER_FILE)

    def stock(place: Path) -> Any:
        pipeline = STOCK[model].from_pretrained(folder)
        pipeline.load_lora_weights(place, weight_name=ADAPTER_FILE)
        return pipeline.unet

    found = {
        "ours": load_generator(Generator(folder, str(tmp_path))).unet,
        "diffusers": stock(tmp_path),
        "diffusers without metadata": stock(tmp_path / "stripped"),
        "diffusers, kohya's file": stock(tmp_path / "kohya"),
        "kohya by hand": merged(load_pipeline(folder).unet, kohya),
    }
    expected = predictions(denoiser.network)
    assert (expected - predictions(load_pipeline(folder).unet)).abs().max() > 1e-2
    for reader, network in found.items():
        torch.testing.assert_close(predictions(network), expected, rtol=0, atol=1e-5, msg=reader)


def test_layers_of_different_ranks_are_folded_each_by_its_own(stable_diffusion: str, tmp_path: Path) -> None:
    denoiser = Denoiser(load_pipeline(stable_diffusion))
    config = lora_config(LoraArguments(lora_r=2, lora_alpha=6), ["to_q", "to_k"], init_lora_weights=False)
    config.rank_pattern, config.alpha_pattern = {"to_k": 4}, {"to_k": 3}
    torch.manual_seed(0)
    add_lora(denoiser.network, config)
    expected = deltas_of(denoiser.network, POLICY)
    denoiser.save_pretrained(tmp_path)
    (tmp_path / "stripped").mkdir()
    save_file(load_file(tmp_path / ADAPTER_FILE), tmp_path / "stripped" / ADAPTER_FILE)
    for folder in (tmp_path, tmp_path / "stripped"):
        found = deltas_of(load_generator(Generator(stable_diffusion, str(folder))).unet, LOADED)
        assert found.keys() == expected.keys() and len(found) > 0
        assert all(error(found[name], expected[name]) < 1e-6 for name in expected)


# Training on


@pytest.fixture(scope="module")
def first_run(
    stable_diffusion: str, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, Path]:
    """Options, and the folder of two steps of SFT with alpha = 4 r: a checkpoint and the saved adapter."""
    setting = {
        "model_name_or_path": stable_diffusion,
        "dataset_name": str(pairs),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    folder = tmp_path_factory.mktemp("first")
    options = {"lora_r": 2, "lora_alpha": 8, "save_strategy": "steps", "save_steps": 2}
    train(setting, folder, "diffusion_sft", **options)
    return setting, folder


def update(model: str, adapter: Path) -> dict[str, Tensor]:
    return deltas_of(load_generator(Generator(model, str(adapter))).unet, LOADED)


def test_a_checkpoint_is_exact_and_the_saved_adapter_folded(first_run: tuple[dict, Path]) -> None:
    folder = first_run[1]
    checkpoint, saved = (load_file(place / ADAPTER_FILE) for place in (folder / "checkpoint-2", folder))
    assert checkpoint.keys() == saved.keys()
    for name, value in checkpoint.items():
        assert torch.equal(value * (4 if "lora_B" in name else 1), saved[name])


def test_training_on_from_a_folded_adapter_is_training_on(
    first_run: tuple[dict, Path], stable_diffusion: str, tmp_path: Path
) -> None:
    """With the options that it was trained with, exactly; without, from the same function."""
    setting, folder = first_run
    starts = {
        "checkpoint": {"adapter_name_or_path": str(folder / "checkpoint-2")},
        "same options": {"adapter_name_or_path": str(folder), "lora_r": 2, "lora_alpha": 8},
        "no options": {"adapter_name_or_path": str(folder)},
        "rslora": {"adapter_name_or_path": str(folder), "lora_alpha": 5, "use_rslora": True},
    }
    for name, options in starts.items():
        train(setting, tmp_path / name, **options)
        assert logged(tmp_path / name)[0] == pytest.approx(math.log(2), abs=1e-6), name
    before = update(stable_diffusion, folder)
    updates = {name: update(stable_diffusion, tmp_path / name) for name in starts}
    for layer, value in updates["checkpoint"].items():
        torch.testing.assert_close(updates["same options"][layer], value, rtol=0, atol=1e-6)
        assert (value - before[layer]).abs().max() > 1e-4
    assert any((updates["no options"][layer] - value).abs().max() > 1e-4 for layer, value in before.items())


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 8}, {"bf16": True}], ids=str)
def test_an_adapter_on_half_precision_weights_is_not_rounded(
    first_run: tuple[dict, Path], options: dict[str, Any], tmp_path: Path
) -> None:
    """Guards: the reference's factors in bfloat16, the policy's in float32: a first loss that is not ln 2."""
    setting, folder = first_run
    start = {"adapter_name_or_path": str(folder), "dtype": "bfloat16", "learning_rate": 1e-30}
    cache = {"cache_dir": str(tmp_path / "cache")}  # encodings of another dtype
    trainer = train(setting, tmp_path / "run", **start, **cache, **options)
    assert logged(tmp_path / "run")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(tmp_path / "run", "rewards/margins")[0] == 0
    network = trainer.model.network
    assert network.conv_in.weight.dtype == torch.bfloat16
    assert {p.dtype for name, p in network.named_parameters() if "lora_" in name} == {torch.float32}
    before, after = load_file(folder / ADAPTER_FILE), load_file(tmp_path / "run" / ADAPTER_FILE)
    assert all(torch.allclose(after[name], value, rtol=1e-6, atol=0) for name, value in before.items())


def test_another_alpha_leaves_the_update_as_it_is(
    first_run: tuple[dict, Path], stable_diffusion: str
) -> None:
    expected = update(stable_diffusion, first_run[1])
    for options in ({}, {"lora_alpha": 8}, {"lora_alpha": 3, "use_rslora": True}, {"use_rslora": True}):
        pipeline = load_pipeline(stable_diffusion)
        arguments = LoraArguments(adapter_name_or_path=str(first_run[1]), **options)
        make_trainable(pipeline.unet, pipeline, arguments, ["to_q"])
        found, config = deltas_of(pipeline.unet, POLICY), pipeline.unet.peft_config[POLICY]
        assert all(error(found[name], expected[name]) < 1e-6 for name in expected)
        assert config.lora_alpha == options.get("lora_alpha", 2)
        assert config.use_rslora == options.get("use_rslora", False)


def test_another_rank_than_the_adapters_is_an_error(
    first_run: tuple[dict, Path], stable_diffusion: str
) -> None:
    pipeline = load_pipeline(stable_diffusion)
    arguments = LoraArguments(adapter_name_or_path=str(first_run[1]), lora_r=4)
    with pytest.raises(InputError, match=r"--lora_r is 4, and the adapter .* has 2, .*leave the option out"):
        make_trainable(pipeline.unet, pipeline, arguments, ["to_q"])
