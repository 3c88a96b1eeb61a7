"""Every diffusion recipe as a user runs it: by path, two steps, on each kind of model, LoRA and full."""

import math
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from launching import ROOT, launch
from running import logged

from prefopt.diffusion.generator import Generator
from prefopt.diffusion.sampling import load_generator, load_pipeline
from prefopt.programs import config_of, find_program

DPO, SFT, VLM_DPO = "recipes/diffusion_dpo.py", "recipes/diffusion_sft.py", "recipes/vlm_dpo.py"


def two_steps(script: str, output: Path, **options) -> list[float]:
    """The losses of two steps."""
    two = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
    running = launch(script, {**two, **options, "output_dir": output}, output.with_suffix(".log"))
    assert running.wait() == 0, running.text()
    return logged(output)


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["stable_diffusion_v", "sdxl"])
def test_dpo_trains_every_kind_of_model(request, pairs, tmp_path, kind, use_peft):
    """Guards: epsilon only; SDXL's second image given the first one's size."""
    model = request.getfixturevalue(kind)
    options = {"model_name_or_path": model, "dataset_name": pairs, "learning_rate": 1e-3}
    first, second = two_steps(DPO, tmp_path / "run", **options, use_peft=use_peft, drop_probability=0.3)
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert second != first and math.isfinite(second)
    base = load_pipeline(model).unet.state_dict()
    if use_peft:
        trained = load_generator(Generator(str(model), str(tmp_path / "run"))).unet
        assert any(value.abs().sum() > 0 for name, value in trained.state_dict().items() if "lora_B" in name)
    else:
        trained = DiffusionPipeline.from_pretrained(tmp_path / "run", use_safetensors=True).unet
        assert any((value != base[name]).any() for name, value in trained.state_dict().items())


def test_sft_trains_on_the_chosen_images(stable_diffusion, pairs, tmp_path):
    options = {"model_name_or_path": stable_diffusion, "dataset_name": pairs}
    first, second = two_steps(SFT, tmp_path / "run", **options, learning_rate=1e-2, max_steps=2)
    assert 0.5 < first < 2, "the mean squared error of a random model about standard normal noise"
    assert second != first


@pytest.mark.parametrize("script", [DPO, SFT, VLM_DPO])
def test_without_arguments_the_pocket_trains(script, tmp_path):
    losses = two_steps(script, tmp_path / "run")
    assert len(losses) == 2
    expected = 0.2 if script == SFT else math.log(2)
    assert losses[0] == pytest.approx(expected, abs=0.2 if script == SFT else 1e-6)


@pytest.mark.parametrize(
    ("name", "lora", "full", "of_pocket"),
    [
        ("diffusion_dpo", 1e-4, 1e-6, 1e-3),
        ("diffusion_sft", 1e-4, 1e-5, 5e-4),
        ("vlm_dpo", 1e-5, 1e-6, 2e-4),
        ("vlm_sft", 1e-4, 2e-5, 5e-3),
    ],
)
def test_the_learning_rate_goes_by_what_is_trained(name, lora, full, of_pocket, tmp_path):
    """Guards: all weights trained at a LoRA's learning rate, which destroys the model."""
    make = config_of(find_program(name))
    options = {"output_dir": str(tmp_path), "dataset_name": "my/data"}
    assert make(model_name_or_path="my/model", **options).learning_rate == lora
    assert make(model_name_or_path="my/model", use_peft=False, **options).learning_rate == full
    assert make(**options).learning_rate == of_pocket
    assert make(learning_rate=0.5, **options).learning_rate == 0.5


@pytest.mark.parametrize(
    "preset", sorted(path.name for path in (ROOT / "recipes/configs").glob("diffusion_*.yaml"))
)
def test_every_preset_is_understood(preset, pairs, tmp_path):
    """With the model and the size of the run overridden, every other key of a preset takes effect."""
    script = f"recipes/{'_'.join(preset.split('_')[:2])}.py"
    small = {
        "gradient_accumulation_steps": 1,
        "fp16": False,
        "dtype": "float32",
        "resolution": 64,
        "warmup_steps": 0,
    }
    if "8bit" in (ROOT / "recipes/configs" / preset).read_text():
        pytest.importorskip("bitsandbytes")
    options = {
        "config": ROOT / "recipes/configs" / preset,
        "model_name_or_path": "pocket",
        "dataset_name": pairs,
    }
    assert len(two_steps(script, tmp_path / "run", **options, **small)) == 2


def test_help_is_short_and_help_all_is_everything(tmp_path):
    short, long = tmp_path / "short", tmp_path / "long"
    for flag, output in (("help", short), ("help-all", long)):
        assert launch(DPO, {flag: None}, output).wait() == 0
    assert "--beta_dpo" in short.read_text() and "--learning_rate" in short.read_text()
    assert "--ddp_timeout" in long.read_text() and "--ddp_timeout" not in short.read_text()
    assert 2 * len(short.read_text().splitlines()) < len(long.read_text().splitlines())
