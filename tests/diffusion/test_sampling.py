"""Sampling: an image is a function of its prompt and seed; adapters weigh what they should; CLIP score."""

import json
import logging

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from prefopt.diffusion.generator import Generator, Sampler
from prefopt.diffusion.lora import set_adapter_scale
from prefopt.diffusion.sampling import load_generator, load_pipeline, sample
from prefopt.errors import InputError
from prefopt.hub import ADAPTER_FILE
from prefopt.judges.clip import ClipScorer

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.tiny_stable_diffusion(folder / "sd")
    tiny.tiny_sdxl(folder / "sdxl")
    tiny.tiny_clip(folder / "clip")
    tiny.tiny_adapter(folder / "sd", folder / "lora")
    tiny.tiny_adapter(folder / "sdxl", folder / "lora-sdxl")
    return folder


def draw(pipeline, prompts=("a red lion", "two zebras", "snow"), seeds=(0, 1, 2), **settings):
    batch_size = settings.pop("batch_size", 8)
    sampler = Sampler(**{**SETTINGS, **settings})
    images = sample(pipeline, list(prompts), list(seeds), sampler, batch_size=batch_size)
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_an_image_depends_on_its_own_prompt_and_seed_alone(models, model):
    pipeline = load_pipeline(models / model)
    together = draw(pipeline)
    assert together.shape == (3, 16, 16, 3) and together.dtype == np.uint8
    alone = draw(pipeline, ["two zebras"], [1])
    assert np.abs(alone[0].astype(int) - together[1]).max() <= 1  # the kernels' rounding
    assert np.array_equal(together, draw(pipeline, batch_size=3))
    assert not np.array_equal(alone, draw(pipeline, ["two zebras"], [2]))
    assert not np.array_equal(alone, draw(pipeline, ["a lion"], [1]))


def test_height_and_width_are_obeyed(models):
    assert draw(load_pipeline(models / "sd"), height=32, width=24).shape == (3, 32, 24, 3)


@pytest.mark.parametrize(("model", "lora"), [("sd", "lora"), ("sdxl", "lora-sdxl")])
def test_an_adapter_at_scale_0_is_the_base_bit_for_bit(models, model, lora):
    base = draw(load_pipeline(models / model))
    pipeline = load_generator(Generator(str(models / model), str(models / lora)))
    assert not np.array_equal(base, draw(pipeline))
    set_adapter_scale(pipeline, 0)
    assert np.array_equal(base, draw(pipeline))
    assert np.array_equal(base, draw(load_generator(Generator(str(models / model), str(models / lora), 0.0))))


def test_the_scale_weighs_the_update_and_can_be_changed_back(models):
    pipeline = load_generator(Generator(str(models / "sd"), str(models / "lora"), 0.5))
    half = draw(pipeline)
    set_adapter_scale(pipeline, 1.0)
    whole = draw(pipeline)
    set_adapter_scale(pipeline, 0)
    set_adapter_scale(pipeline, 0.5)
    assert np.array_equal(half, draw(pipeline)) and not np.array_equal(half, whole)
    # An update weighed by 0.5 is the update of an adapter whose second factor is half as large.
    tiny.tiny_adapter(models / "sd", models / "lora-half", size=0.5)
    assert np.array_equal(
        half, draw(load_generator(Generator(str(models / "sd"), str(models / "lora-half"))))
    )


def test_an_adapter_may_be_named_by_its_file_and_may_reach_the_text_encoder(models, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(models / "sd")
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.text_encoder))
    StableDiffusionPipeline.save_lora_weights(tmp_path, text_encoder_lora_layers=state)
    drawn = draw(load_generator(Generator(str(models / "sd"), str(tmp_path / ADAPTER_FILE))))
    assert not np.array_equal(drawn, draw(load_pipeline(models / "sd")))


def test_a_missing_model_or_adapter_is_named(models, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"model_index\.json"):
        load_pipeline(tmp_path)
    with pytest.raises(InputError, match="no-adapter"):
        load_generator(Generator(str(models / "sd"), str(tmp_path / "no-adapter")))
    with pytest.raises(InputError, match=ADAPTER_FILE):
        load_generator(Generator(str(models / "sd"), str(tmp_path)))
    (tmp_path / "lora.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="not safetensors"):
        load_generator(Generator(str(models / "sd"), str(tmp_path / "lora.bin")))


def test_an_adapter_of_another_architecture_names_both(models, tmp_path):
    with pytest.raises(InputError, match=r"lora-sdxl.*does not fit the model .*sd"):
        load_generator(Generator(str(models / "sd"), str(models / "lora-sdxl")))
    (tmp_path / ADAPTER_FILE).write_bytes(b"not a tensor file")
    with pytest.raises(InputError, match="no whole file of safetensors"):
        load_generator(Generator(str(models / "sd"), str(tmp_path)))


def test_a_model_of_pickled_weights_is_refused(models, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(models / "sd")
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match="safetensors"):
        load_pipeline(tmp_path)


def test_the_safety_checker_is_not_loaded(models, tmp_path):
    """Guards against black images that would be scored as the model's own."""
    StableDiffusionPipeline.from_pretrained(models / "sd").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "requires_safety_checker": True,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert load_pipeline(tmp_path).safety_checker is None


def test_bad_prompts_and_images_that_are_not_finite_stop_the_run(models):
    pipeline = load_pipeline(models / "sd")
    with pytest.raises(InputError, match="prompt 1 is int"):
        draw(pipeline, ["a", 7], [0, 0])
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        draw(pipeline, ["a", "b"], [0])
    with pytest.raises(InputError, match=r"2000 denoising steps are more than the 1000 that .* lower --num"):
        draw(pipeline, num_inference_steps=2000)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        draw(pipeline)


def noise_images(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]


def test_the_clip_score_is_the_model_s_cosine(models):
    images, prompts = noise_images(3), ["a red lion", "snow", "a red lion"]
    scores = ClipScorer(models / "clip", batch_size=2)(images, prompts)
    model, processor = (
        CLIPModel.from_pretrained(models / "clip"),
        CLIPProcessor.from_pretrained(models / "clip"),
    )
    with torch.no_grad():
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
        cosine = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
    assert scores.shape == (3,) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, 100 * cosine.numpy(), atol=1e-4)


def test_each_unique_prompt_is_embedded_once(models, monkeypatch):
    scorer = ClipScorer(models / "clip", batch_size=8)
    seen = []
    embed = scorer.model.get_text_features
    monkeypatch.setattr(
        scorer.model,
        "get_text_features",
        lambda **tokens: seen.append(len(tokens["input_ids"])) or embed(**tokens),
    )
    images = noise_images(4)
    first = scorer(images, ["a", "b", "a", "b"])
    assert np.array_equal(first, scorer(images, ["a", "b", "a", "b"])) and seen == [2]


def test_a_long_prompt_is_cut_with_a_count(models, caplog):
    scorer = ClipScorer(models / "clip")
    with caplog.at_level(logging.WARNING):
        scores = scorer(noise_images(1) * 2, ["a" * 100, "a" * 100 + "b"])
    assert "2 of 2 prompts are longer than CLIP's 77 tokens" in caplog.text
    assert scores[0] == scores[1]


def test_the_scorer_s_identity_is_its_weights(models, tmp_path):
    assert ClipScorer(models / "clip").identity == ClipScorer(models / "clip").identity
    assert ClipScorer(tiny.tiny_clip(tmp_path, seed=1)).identity != ClipScorer(models / "clip").identity
    with pytest.raises(InputError, match="nothing-here"):
        ClipScorer(tmp_path / "nothing-here")
