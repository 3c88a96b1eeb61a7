"""The pocket's discriminator on scenes that no training saw: real or generated, copies, and as a ranker."""

import io

import numpy as np
import pytest
import torch
from builds import build_of, table
from PIL import Image
from scipy.stats import rankdata

from data_builders.text_to_image_pairs import TextToImagePairsConfig, main
from prefopt import pocket
from prefopt.diffusion.discriminator import load_discriminator
from prefopt.diffusion.generator import Sampler
from prefopt.diffusion.sampling import load_pipeline, sample
from prefopt.errors import InputError
from prefopt.evaluation.discrimination import discrimination
from prefopt.judges.discriminator import DiscriminatorScorer
from prefopt.pocket.world import caption, held_out_scenes, render

SCENES = held_out_scenes()[:60]
RANKS = np.tile([1, 2, 3], (len(SCENES), 1))


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("pocket")


@pytest.fixture(scope="module")
def scorer():
    return DiscriminatorScorer("pocket")


@pytest.fixture(scope="module")
def lists(pipeline):
    """Captions of held-out scenes; of each a render through the VAE, an image of 4 steps, one of 1."""
    prompts = [caption(scene, 0) for scene in SCENES]
    pixels = np.stack([np.asarray(render(scene, 7 + i)) for i, scene in enumerate(SCENES)])
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        copied = pipeline.vae.decode(pipeline.vae.encode(tensor).latent_dist.mean).sample
    arrays = ((copied / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    seeds = list(range(len(SCENES)))
    generated = [
        list(sample(pipeline, prompts, seeds, Sampler(num_inference_steps=steps), batch_size=60))
        for steps in (4, 1)
    ]
    return prompts, [list(images) for images in zip(map(Image.fromarray, arrays), *generated, strict=True)]


def logits(scorer, prompts, lists):
    return np.array(
        [scorer.rewards(images, [p] * len(images)) for p, images in zip(prompts, lists, strict=True)]
    )


def test_a_render_is_real_before_an_image_of_four_steps_before_one_of_one(scorer, lists):
    found = discrimination(logits(scorer, *lists), RANKS)
    assert found["accuracy"]["mean"] >= 0.9 and found["accuracy"]["low"] >= 0.8
    assert found["spearman"] >= 0.8
    assert found["calibration_error"] < 0.15


def test_what_it_learned_is_no_codec_and_no_resampler(scorer, lists):
    """The real images alone are re-encoded or blurred: a detector of clean files would turn them down."""

    def jpeg(image):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=75)
        return Image.open(file).convert("RGB")

    def smaller(image):
        return image.resize((48, 48), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)

    prompts, images = lists
    for copy in (jpeg, smaller):
        copied = [[copy(real), *generated] for real, *generated in images]
        assert discrimination(logits(scorer, prompts, copied), RANKS)["accuracy"]["mean"] >= 0.9, (
            copy.__name__
        )


def test_it_reads_the_text(scorer, lists):
    prompts, images = lists
    wrong = prompts[7:] + prompts[:7]
    real = [one for one, *_ in images]
    assert (scorer.rewards(real, prompts) > scorer.rewards(real, wrong)).mean() > 0.8


def test_candidates_are_ranked_by_judge_and_discriminator_at_once(tmp_path, scorer):
    settings = {"num_prompts": 2, "candidates": 4, "num_inference_steps": 2, "exports": ["ranked", "pairs"]}
    settings |= {"discriminator_name_or_path": "pocket", "gallery": False, "output_dir": str(tmp_path)}
    main(TextToImagePairsConfig(**settings))
    rows = table(tmp_path, "candidates")
    assert len(rows) == 8
    for prompt in {row["prompt"] for row in rows}:
        group = [row for row in rows if row["prompt"] == prompt]
        images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in group]
        own = scorer.rewards(images, [prompt] * 4)
        np.testing.assert_allclose([row["discriminator_score"] for row in group], own, rtol=1e-4, atol=1e-4)
        places = [rankdata([-row[f"{kind}_score"] for row in group]) for kind in ("judge", "discriminator")]
        np.testing.assert_allclose([row["soft_score"] for row in group], -np.mean(places, axis=0))
        assert [row["rank"] for row in group] == rankdata(np.mean(places, axis=0), "min").tolist()
    assert {row["discriminator"] for row in rows} == {"pocket"}
    assert "The discriminator pocket looked at each" in (tmp_path / "README.md").read_text()
    figures = build_of(tmp_path)["figures"]
    expected = np.mean([row["discriminator_score"] for row in rows])
    assert figures["mean_discriminator_score"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", [str(pocket.folder("clip")), "./nowhere"])
def test_another_model_does_not_rank_as_a_discriminator(tmp_path, name):
    settings = {"num_prompts": 2, "discriminator_name_or_path": name, "output_dir": str(tmp_path / "build")}
    with pytest.raises(InputError, match=r"no discriminator could be loaded|there is no \./nowhere"):
        main(TextToImagePairsConfig(**settings))


def test_it_is_loaded_by_the_pocket_s_name_for_the_pocket_s_latents(pipeline):
    assert load_discriminator("pocket", pipeline).config["base_model"] == "pocket"
