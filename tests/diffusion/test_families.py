"""Every family against its stock pipeline, and families that are not known."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from tiny import SIZE, tiny_stable_diffusion

from prefopt.diffusion.denoiser import Denoiser
from prefopt.diffusion.families import family_of
from prefopt.diffusion.sampling import load_pipeline
from prefopt.errors import InputError

PROMPT = "a red lion"
MODELS = ["stable_diffusion", "stable_diffusion_v", "stable_diffusion_sample"]


@pytest.fixture(scope="module")
def stable_diffusion_sample(tmp_path_factory) -> str:
    """The folder of a tiny pipeline that predicts the sample."""
    return tiny_stable_diffusion(tmp_path_factory.mktemp("model"), prediction_type="sample")


@pytest.mark.parametrize(
    "model", ["stable_diffusion", "stable_diffusion_v", "stable_diffusion_sample", "sdxl"]
)
def test_a_stock_step_at_guidance_1_is_ours(model, request):
    """The prediction is recovered from where the scheduler goes: nothing of the pipeline is trusted."""
    pipeline = load_pipeline(request.getfixturevalue(model))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    noise, after = torch.randn(1, 4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(0)), []

    def keep(pipeline, step, timestep, tensors):
        after.append(tensors["latents"].double())
        return tensors

    given = {"latents": noise.clone(), "guidance_scale": 1.0, "num_inference_steps": 5}
    pipeline(PROMPT, callback_on_step_end=keep, output_type="latent", **given)
    time = pipeline.scheduler.timesteps[0]
    now, then = (
        pipeline.scheduler.alphas_cumprod[t].double() for t in (time, pipeline.scheduler.timesteps[1])
    )
    # DDIM (arXiv 2010.02502, eq. 12) at eta 0: both samples are a x + s e of one x and one e.
    a, s, a2, s2 = now.sqrt(), (1 - now).sqrt(), then.sqrt(), (1 - then).sqrt()
    clean = (s2 * noise - s * after[0]) / (a * s2 - a2 * s)
    eps = (a * after[0] - a2 * noise) / (a * s2 - a2 * s)
    denoiser = Denoiser(pipeline)
    expected = {"epsilon": eps, "v_prediction": a * eps - s * clean, "sample": clean}

    conditioning = denoiser.family.encode_prompts(pipeline, [PROMPT])
    sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32)
    conditioning |= dict.fromkeys(denoiser.family.per_candidate, sizes)
    with torch.no_grad():
        output = denoiser.network(
            **denoiser.family.inputs(noise, time[None], conditioning), return_dict=False
        )
    ours = denoiser.family.prediction(output).double()
    torch.testing.assert_close(ours, expected[denoiser.schedule.prediction], rtol=0, atol=1e-4)
    assert ours.std() > 0.1


@pytest.mark.parametrize("model", MODELS)
def test_the_clean_latents_are_those_of_diffusers(model, request):
    """And with the true noise as the prediction, they are the latents themselves."""
    denoiser = Denoiser(load_pipeline(request.getfixturevalue(model)))
    chance = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 3, 4, 8, 8, generator=chance) for _ in range(2))
    noised = denoiser.schedule.add_noise(latents, noise[:, 0], torch.tensor([0.1, 0.7]))
    torch.testing.assert_close(noised.clean(noised.target), latents, rtol=0, atol=1e-5)
    prediction = torch.randn(noised.sample.shape, generator=chance)
    scheduler = DDIMScheduler.from_config(load_pipeline(request.getfixturevalue(model)).scheduler.config)
    scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
    scheduler.set_timesteps(1000)
    for i, step in enumerate((100, 700)):
        theirs = scheduler.step(prediction[i], step, noised.sample[i]).pred_original_sample
        torch.testing.assert_close(noised.clean(prediction)[i], theirs, rtol=1e-4, atol=1e-4)


def test_a_pipeline_of_no_known_family_is_named(stable_diffusion):
    class Derived(StableDiffusionPipeline):
        pass

    known = load_pipeline(stable_diffusion)
    derived = Derived(**known.components)
    assert family_of(derived) is family_of(known), "what derives from a known pipeline is of its family"
    unknown = StableDiffusionControlNetPipeline.__new__(StableDiffusionControlNetPipeline)
    unknown.register_to_config(_name_or_path="somewhere")
    with pytest.raises(InputError, match="somewhere is a StableDiffusionControlNetPipeline; trained can be"):
        family_of(unknown)
