"""The denoiser: its targets are diffusers', its candidates do not touch, what it saves others can load."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from tiny import WIDTH, tiny_adapter, tiny_stable_diffusion
from torch import Tensor

from prefopt.adapters import POLICY, REFERENCE, adapter_layers, lora_config
from prefopt.config import LoraArguments
from prefopt.diffusion.denoiser import Denoiser, denoising_metrics
from prefopt.diffusion.generator import Generator
from prefopt.diffusion.lora import add_lora, set_adapter_scale, start_from_lora
from prefopt.diffusion.sampling import load_generator, load_pipeline
from prefopt.diffusion.schedule import DiscreteSchedule, Times
from prefopt.errors import InputError
from prefopt.hub import ADAPTER_FILE

STEPS = 1000


def inputs(batch: int = 3, candidates: int = 2, *, sdxl: bool = False) -> dict:
    """Random inputs of a denoiser's forward."""
    chance = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance)

    conditioning = {"embeddings": normal(batch, 7, WIDTH * (1 + sdxl))}
    if sdxl:
        conditioning["pooled"] = normal(batch, WIDTH)
        conditioning["sizes"] = torch.rand(batch, candidates, 6, generator=chance) * 100
    return {
        "latents": normal(batch, candidates, 4, 8, 8),
        "noise": normal(batch, 4, 8, 8),
        "time": torch.tensor([0.0, 0.4321, 0.99999994, 0.75])[:batch],
        "conditioning": conditioning,
    }


def lora(denoiser: Denoiser, seed: int = 0, **options) -> Denoiser:
    """The denoiser with an adapter whose second factors are not zero."""
    torch.manual_seed(seed)
    add_lora(denoiser.network, lora_config(LoraArguments(**options), list(denoiser.family.lora_targets)))
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return denoiser


# Scores


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_targets_are_those_of_diffusers(prediction, tmp_path):
    """Guards: epsilon only, where SD 2.1 needs v-prediction."""
    model = tiny_stable_diffusion(tmp_path, prediction_type=prediction)
    denoiser, given = Denoiser(load_pipeline(model)), inputs()
    seen: dict = {}

    def see(unet, args, kwargs, output):
        seen.update(**kwargs, output=output[0])

    denoiser.network.register_forward_hook(see, with_kwargs=True)
    with torch.no_grad():
        scores = denoiser(**given).scores
    schedule = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    timesteps = torch.tensor([0, 0, 432, 432, 999, 999])
    assert torch.equal(seen["timestep"], timesteps)
    latents, noise = given["latents"].flatten(0, 1), given["noise"].repeat_interleave(2, dim=0)
    noised = schedule.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(seen["sample"], noised, rtol=0, atol=1e-6)
    target = {
        "epsilon": noise,
        "v_prediction": schedule.get_velocity(latents, noise, timesteps),
        "sample": latents,
    }[prediction]
    expected = -(seen["output"] - target).square().mean(dim=(1, 2, 3)).view(3, 2)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert scores.dtype == torch.float32
    embeddings = given["conditioning"]["embeddings"].repeat_interleave(2, dim=0)
    assert torch.equal(seen["encoder_hidden_states"], embeddings)


@pytest.mark.parametrize("model", ["stable_diffusion", "stable_diffusion_v", "sdxl"])
def test_candidates_do_not_touch_one_another(model, request):
    denoiser = Denoiser(load_pipeline(request.getfixturevalue(model)))
    given = inputs(sdxl=model == "sdxl")
    with torch.no_grad():
        together = denoiser(**given).scores
        for k in range(2):
            conditioning = dict(given["conditioning"])
            if model == "sdxl":
                conditioning["sizes"] = conditioning["sizes"][:, k : k + 1]
            one = given["latents"][:, k : k + 1]
            alone = denoiser(one, given["noise"], given["time"], conditioning).scores
            assert alone.shape == (3, 1)
            torch.testing.assert_close(alone[:, 0], together[:, k], rtol=1e-6, atol=1e-6)
    assert together.shape == (3, 2)
    assert together.unique().numel() == 6


def test_sdxl_is_conditioned_on_pooled_text_and_sizes(sdxl):
    """Against a call of the UNet by hand, one candidate at a time."""
    pipeline = load_pipeline(sdxl)
    denoiser, given = Denoiser(pipeline), inputs(sdxl=True)
    alphas = pipeline.scheduler.alphas_cumprod
    with torch.no_grad():
        scores = denoiser(**given).scores
        for i, step in enumerate((0, 432, 999)):
            for k in range(2):
                noised = alphas[step].sqrt() * given["latents"][i, k]
                noised = noised + (1 - alphas[step]).sqrt() * given["noise"][i]
                added = {
                    "text_embeds": given["conditioning"]["pooled"][i : i + 1],
                    "time_ids": given["conditioning"]["sizes"][i, k][None],
                }
                output = pipeline.unet(
                    noised[None],
                    step,
                    encoder_hidden_states=given["conditioning"]["embeddings"][i : i + 1],
                    added_cond_kwargs=added,
                ).sample
                expected = -(output[0] - given["noise"][i]).square().mean()
                torch.testing.assert_close(scores[i, k], expected, rtol=1e-5, atol=1e-6)


def test_its_identity_tells_noise_schedules_and_targets_apart(stable_diffusion, stable_diffusion_v):
    """Neither is among the weights, and cached reference scores depend on both."""
    pipeline = load_pipeline(stable_diffusion)
    pipeline.scheduler.register_to_config(beta_end=0.02)
    plain, other = Denoiser(load_pipeline(stable_diffusion)), Denoiser(pipeline)
    assert plain.identity == Denoiser(load_pipeline(stable_diffusion)).identity
    assert plain.identity["noise schedule"] != other.identity["noise schedule"]
    assert plain.identity["prediction"] == "epsilon"
    assert Denoiser(load_pipeline(stable_diffusion_v)).identity["prediction"] == "v_prediction"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_reduced_in_float32(stable_diffusion, dtype):
    denoiser = Denoiser(load_pipeline(stable_diffusion, dtype=dtype))
    whole = Denoiser(load_pipeline(stable_diffusion))
    with torch.no_grad():
        scores = denoiser(**inputs()).scores
        torch.testing.assert_close(scores, whole(**inputs()).scores, rtol=0.05, atol=0.05)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.to(dtype).float())


def test_a_pipeline_that_it_cannot_train_is_an_error(stable_diffusion, tmp_path):
    pipeline = load_pipeline(stable_diffusion)
    pipeline.unet = None
    with pytest.raises(InputError, match="a StableDiffusionPipeline has no conditional UNet"):
        Denoiser(pipeline)
    pipeline = load_pipeline(stable_diffusion)
    pipeline.scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(InputError, match="predicts 'flow_prediction'; known are"):
        Denoiser(pipeline)


# What it saves


ADAPTERS = [
    {"lora_r": 2, "lora_alpha": 2},
    {"lora_r": 2, "lora_alpha": 8},
    {"lora_r": 4, "lora_alpha": 8, "use_rslora": True},
]


@pytest.mark.parametrize("options", ADAPTERS, ids=["alpha = r", "alpha = 4r", "rslora"])
@pytest.mark.parametrize(
    ("model", "stock"), [("stable_diffusion", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)]
)
def test_a_stock_pipeline_loads_the_adapter(model, stock, options, request, tmp_path):
    """Guards: an adapter that comes out alpha / r times too weak where it is loaded."""
    folder, sdxl = request.getfixturevalue(model), model == "sdxl"
    denoiser, given = lora(Denoiser(load_pipeline(folder)), **options), inputs(sdxl=sdxl)
    base = Denoiser(load_pipeline(folder))
    denoiser.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [ADAPTER_FILE]
    pipeline = stock.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path)
    with torch.no_grad():
        ours, theirs, without = (model(**given).scores for model in (denoiser, Denoiser(pipeline), base))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - without).abs().max() > 1e-3


def picture(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a lion", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images[0]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_at_scale_0_the_image_is_the_bases_exactly(stable_diffusion, tmp_path):
    lora(Denoiser(load_pipeline(stable_diffusion)), lora_alpha=64).save_pretrained(tmp_path)
    base = picture(StableDiffusionPipeline.from_pretrained(stable_diffusion))
    stock = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    stock.load_lora_weights(tmp_path, adapter_name="a")
    assert not np.array_equal(picture(stock), base)
    stock.set_adapters(["a"], [0.0])
    assert np.array_equal(picture(stock), base)
    ours = load_generator(Generator(str(stable_diffusion), str(tmp_path)))
    set_adapter_scale(ours, 0)
    assert np.array_equal(picture(ours), base)


@pytest.mark.parametrize(("write", "alpha"), [("save_weights", 8), ("save_pretrained", 2)])
def test_the_files_metadata_tells_alpha(stable_diffusion, tmp_path, write, alpha):
    """Of a checkpoint the run's own, of a saved adapter the rank: its scaling is in its tensors."""
    denoiser = lora(Denoiser(load_pipeline(stable_diffusion)), lora_r=2, lora_alpha=8)
    getattr(denoiser, write)(tmp_path)
    with safe_open(tmp_path / ADAPTER_FILE, "pt") as file:
        assert f'"unet.lora_alpha": {alpha}' in file.metadata()["lora_adapter_metadata"]
        assert all(name.startswith("unet.") for name in file.keys())  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize("model", ["stable_diffusion", "sdxl"])
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_a_round_trip_is_bit_exact(model, adapter, request, tmp_path):
    folder = request.getfixturevalue(model)
    denoiser, other = Denoiser(load_pipeline(folder)), Denoiser(load_pipeline(folder))
    if adapter:
        lora(denoiser, seed=0, lora_alpha=5), lora(other, seed=1, lora_alpha=5)
    else:
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(torch.randn_like(parameter))
    (tmp_path / "unet").mkdir()
    denoiser.save_weights(tmp_path)
    other.load_weights(tmp_path)
    saved, loaded = denoiser.state_dict(), other.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_a_full_model_reloads_from_its_folder(stable_diffusion, tmp_path):
    denoiser = Denoiser(load_pipeline(stable_diffusion))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(1.5)
    denoiser.save_pretrained(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet", use_safetensors=True)
    expected = denoiser.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in unet.state_dict().items())
    assert unet.config["cross_attention_dim"] == WIDTH


@pytest.mark.parametrize(("saved", "there"), [(4, 2), (None, 2), (2, None)])
def test_weights_of_another_kind_are_an_error(stable_diffusion, tmp_path, saved, there):
    """A checkpoint of another rank, or of all weights where an adapter is trained."""
    first, second = (
        lora(denoiser, lora_r=rank) if rank else denoiser
        for rank in (saved, there)
        for denoiser in [Denoiser(load_pipeline(stable_diffusion))]
    )
    first.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=str(tmp_path)):
        second.load_weights(tmp_path)


# Adapters


def test_no_layer_by_these_names_is_an_error(stable_diffusion):
    with pytest.raises(InputError, match=r"--lora_target_modules.*no_such_layer"):
        lora(Denoiser(load_pipeline(stable_diffusion)), lora_target_modules=["no_such_layer"])


def test_only_the_adapter_is_trained(stable_diffusion):
    denoiser = lora(Denoiser(load_pipeline(stable_diffusion, dtype=torch.bfloat16)), lora_r=2)
    trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(adapter_layers(denoiser)) > 0
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    frozen = {p.dtype for p in denoiser.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_training_on_from_an_adapter_starts_as_that_adapter(stable_diffusion, tmp_path):
    """Its frozen copy is the reference, since what was trained before is what is compared with."""
    adapter = tiny_adapter(stable_diffusion, tmp_path / "lora")
    pipeline = load_pipeline(stable_diffusion)
    denoiser, given = Denoiser(pipeline), inputs()
    start_from_lora(denoiser.network, pipeline, adapter)
    with torch.no_grad():
        found = denoiser(**given).scores
        expected = Denoiser(load_generator(Generator(str(stable_diffusion), str(adapter))))(**given).scores
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    trained = [name for name, p in denoiser.named_parameters() if p.requires_grad]
    assert trained and all(f".{POLICY}." in name for name in trained)
    assert any(f".{REFERENCE}." in name for name, _ in denoiser.named_parameters())
    denoiser.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / ADAPTER_FILE, "pt") as file:
        assert len(file.keys()) == len(trained), "the reference is not saved with it"


# Metrics


def test_errors_by_quartile_of_the_schedule():
    policy = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0], [-7.0, -8.0]])
    batch = {
        "time": torch.tensor([0.0, 0.24, 0.5, 0.99]),
        "ranks": torch.tensor([[1, 2], [1, 2], [1, 2], [1, 2]]),
    }
    schedule = DiscreteSchedule(torch.linspace(1, 0, 1000), "epsilon")
    metrics = denoising_metrics(batch, policy, schedule)
    means = {name: (v * w).sum().item() / w.sum().item() for name, (v, w) in metrics.items() if w.any()}
    assert means == {
        "error/chosen": 4.0,
        "error/chosen/q1": 2.0,
        "error/chosen/q3": 5.0,
        "error/chosen/q4": 7.0,
        "error/rejected": 5.0,
        "error/rejected/q1": 3.0,
        "error/rejected/q3": 6.0,
        "error/rejected/q4": 8.0,
    }
    batch["ranks"] = batch["ranks"][:, :1]
    single = denoising_metrics(batch, policy[:, :1], schedule)
    assert not any("rejected" in name for name in single)
    assert math.isclose(single["error/chosen"][0].mean(), 4)
    schedule.times = Times(0.5, 1.0)
    assert {"error/chosen/q3", "error/chosen/q4"} == {
        name
        for name, (_, weight) in denoising_metrics(batch, policy[:, :1], schedule).items()
        if "/q" in name and weight.any()
    }


def test_errors_of_a_list_are_those_of_its_best_and_its_worst():
    scores = torch.tensor([[-1.0, -2.0, -4.0, -9.0], [-3.0, -5.0, -7.0, 0.0]])
    batch = {"time": torch.tensor([0.1, 0.1]), "ranks": torch.tensor([[1, 1, 3, 4], [1, 2, 3, 0]])}
    metrics = denoising_metrics(batch, scores, DiscreteSchedule(torch.linspace(1, 0, 1000), "epsilon"))
    assert metrics["error/chosen"][0].tolist() == [1.5, 3.0]
    assert metrics["error/rejected"][0].tolist() == [9.0, 7.0], "not that of the empty place"


def test_an_empty_place_is_not_run(stable_diffusion):
    """A list of two beside one of three: the same scores as alone, and the network sees five images."""
    denoiser = Denoiser(load_pipeline(stable_diffusion)).eval()
    chance = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 4, 8, 8, generator=chance)
    noise, time = torch.randn(2, 4, 8, 8, generator=chance), torch.tensor([0.2, 0.7])
    conditioning = {"embeddings": torch.randn(2, 77, WIDTH, generator=chance)}
    seen = []
    denoiser.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["sample"])), with_kwargs=True
    )
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = denoiser(latents, noise, time, conditioning, mask)
    whole = denoiser(latents, noise, time, conditioning)
    assert seen == [5, 6]
    torch.testing.assert_close(found.scores[mask], whole.scores[mask])
    assert found.scores[1, 2] == 0 and not found.residual[1, 2].any()


@pytest.mark.parametrize("mean", [-1.0, 0.0, 1.5])
def test_logit_normal_times_have_their_mean_and_their_deviation(mean):
    times = Times(logit_normal=(mean, 0.8)).share(torch.arange(100_000).add(0.5).div(100_000))
    logits = torch.logit(times.double())
    assert logits.mean().item() == pytest.approx(mean, abs=1e-3)
    assert logits.std().item() == pytest.approx(0.8, abs=1e-3)
    part = Times(0.5, 1.0, (mean, 0.8)).share(torch.tensor([0.0, 0.5, 0.999]))
    assert part[0] == 0.5 and 0.5 < part[1] < part[2] < 1


def test_times_cover_the_timestep_range_alone(stable_diffusion):
    whole, part = (
        Denoiser(load_pipeline(stable_diffusion), times=times) for times in (Times(), Times(0.5, 1.0))
    )
    latents, noise, time = torch.zeros(3, 1, 4, 2, 2), torch.zeros(3, 4, 2, 2), torch.tensor([0, 0.5, 0.999])
    assert whole.schedule.add_noise(latents, noise, time).timestep.tolist() == [0, 500, 999]
    assert part.schedule.add_noise(latents, noise, time).timestep.tolist() == [500, 750, 999]
    assert whole.identity != part.identity, "kept scores of the one are none of the other"
