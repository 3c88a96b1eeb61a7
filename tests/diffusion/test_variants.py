"""Pipelines that were saved with `save_pretrained(variant="fp16")` are loaded, and known by their weights."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from running import recipe

from data_builders.images.config import parse_source
from data_builders.images.graded_passes import Codec
from prefopt.cli import parse
from prefopt.diffusion.generator import GenerationOptions, Generator, pipeline_folder
from prefopt.diffusion.sampling import load_generator, load_pipeline
from prefopt.errors import InputError


@pytest.fixture(scope="module")
def folders(stable_diffusion: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights, plain and as a variant; other weights as that variant; and plain with the variant."""
    root = tmp_path_factory.mktemp("variants")
    plain = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    other = StableDiffusionPipeline.from_pretrained(tiny.tiny_stable_diffusion(root / "seed1", seed=1))
    plain.save_pretrained(root / "plain")
    plain.save_pretrained(root / "fp16", variant="fp16")
    plain.save_pretrained(root / "sharded", variant="fp16", max_shard_size="20KB")
    other.save_pretrained(root / "others", variant="fp16")
    for source, folder in (("fp16", root / "other"), ("plain", root / "both")):
        shutil.copytree(root / source, folder)
        for file in (root / "others").glob("*/*.safetensors"):
            shutil.copy(file, folder / file.parent.name)
    return {path.name: path for path in root.iterdir()}


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("saved", ["fp16", "sharded"])
def test_a_variant_is_loaded_weights_equal(folders: dict[str, Path], saved: str) -> None:
    assert not (folders[saved] / "unet/diffusion_pytorch_model.safetensors").exists()
    plain = load_pipeline(folders["plain"])
    generator = Generator(str(folders[saved]), variant="fp16")
    for part in ("unet", "vae", "text_encoder"):
        assert equal(getattr(plain, part), getattr(load_generator(generator), part)), part
    codec = Codec(generator, torch.device("cpu"))
    assert equal(codec.vae, plain.vae)


def test_sdxl_in_half_precision_keeps_its_values(sdxl: str, tmp_path: Path) -> None:
    stock = StableDiffusionXLPipeline.from_pretrained(sdxl, dtype=torch.float16)
    stock.save_pretrained(tmp_path, variant="fp16")
    pipeline = load_pipeline(tmp_path, variant="fp16")
    assert pipeline.unet.dtype == torch.float32 and equal(pipeline.unet.half(), stock.unet)
    assert equal(pipeline.text_encoder_2.half(), stock.text_encoder_2)


def test_of_a_folder_with_both_the_one_named_is_loaded(folders: dict[str, Path]) -> None:
    both = folders["both"]
    assert equal(load_pipeline(both).unet, load_pipeline(folders["plain"]).unet)
    named = load_pipeline(both, variant="fp16")
    assert equal(named.unet, load_pipeline(folders["seed1"]).unet) and not equal(
        named.unet, load_pipeline(both).unet
    )


def test_a_part_without_the_variant_has_its_plain_weights_loaded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["fp16"], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "vae/diffusion_pytorch_model.fp16.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.safetensors"))
    assert equal(load_pipeline(tmp_path, variant="fp16").vae, load_pipeline(folders["plain"]).vae)


def test_an_identity_is_that_of_the_weights_not_of_their_names(folders: dict[str, Path]) -> None:
    """Guards: images generated again for another file name, or kept though the weights are others."""
    plain, fp16, other, both, both_fp16 = (
        Generator(str(folders[name]), variant=variant).weights["model"]
        for name, variant in [
            ("plain", None),
            ("fp16", "fp16"),
            ("other", "fp16"),
            ("both", None),
            ("both", "fp16"),
        ]
    )
    assert plain == fp16 == both
    assert other == both_fp16 != plain


def test_a_variant_that_is_missing_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"text_encoder are of the variant fp16 alone: add --variant fp16"):
        pipeline_folder(folders["fp16"])
    with pytest.raises(InputError, match=r"plain has no weights of the variant bf16: leave out --variant"):
        load_pipeline(folders["plain"], variant="bf16")
    with pytest.raises(
        InputError, match=r"both has no weights of the variant bf16: name one of its own, fp16"
    ):
        load_pipeline(folders["both"], variant="bf16")
    with pytest.raises(InputError, match=r"as a hub id it cannot be fetched.*name it with --variant"):
        pipeline_folder("org/no-such-model")
    shutil.copytree(folders["plain"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(InputError, match=r"model_index.json is no JSON"):
        load_pipeline(tmp_path)


def test_the_hub_is_asked_for_the_variant(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(folders["fp16"])

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    pipeline = load_pipeline("org/model", revision="v1", variant="fp16")
    assert asked == {"name": "org/model", "revision": "v1", "variant": "fp16", "use_safetensors": True}
    assert equal(pipeline.unet, load_pipeline(folders["plain"]).unet)


def test_every_option_and_text_that_names_a_model_names_its_variant(folders: dict[str, Path]) -> None:
    model = str(folders["fp16"])
    base = GenerationOptions(model_name_or_path=model, variant="fp16").generator
    assert (base.model, base.variant) == (model, "fp16")
    # A variant belongs to its model: another model has none unless it says so.
    assert parse_source("steps=4", base).variant == "fp16"
    assert parse_source("org/model", base).variant is None
    assert parse_source("org/model variant=bf16", base).variant == "bf16"
    compare = recipe("compare_text_to_image").CompareConfig(
        model_name_or_path=model,
        variant="fp16",
        systems=["base", f"whole={folders['both']} variant=fp16", f"plain={folders['plain']}"],
        prompts=__file__,
        clip_model_name_or_path="org/clip",
    )
    variants = [generator.variant for family in compare.families.values() for generator in family.values()]
    assert variants == ["fp16", "fp16", None]
    for name, config in [
        ("diffusion_dpo", "DiffusionDPOConfig"),
        ("diffusion_cpo", "DiffusionCPOConfig"),
        ("diffusion_sft", "DiffusionSFTConfig"),
        ("discriminator", "DiscriminatorConfig"),
    ]:
        words = ["--model_name_or_path", model, "--variant", "fp16", "--dataset_name", "org/data"]
        assert parse(getattr(recipe(name), config), words).variant == "fp16"


def test_a_model_trained_in_full_from_a_variant_is_a_plain_pipeline(
    folders: dict[str, Path], pairs: str, tmp_path: Path
) -> None:
    module = recipe("diffusion_sft")
    options = {
        "model_name_or_path": str(folders["fp16"]),
        "variant": "fp16",
        "dataset_name": pairs,
        "output_dir": str(tmp_path / "run"),
        "use_peft": False,
        "max_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-3,
    }
    module.main(module.DiffusionSFTConfig(**options))
    trained, base = load_pipeline(tmp_path / "run"), load_pipeline(folders["plain"])
    assert equal(trained.vae, base.vae) and equal(trained.text_encoder, base.text_encoder)
    assert not equal(trained.unet, base.unet)
    assert json.loads((tmp_path / "run/config.json").read_text())["options"]["variant"] == "fp16"
