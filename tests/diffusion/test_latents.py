"""Encode once: images prepared and encoded, kept by content, and read back as training examples."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import cell, encoded, picture, png, write_pairs
from PIL import Image
from tiny import SIZE

from prefopt.diffusion.candidates import EncodedCandidates
from prefopt.diffusion.families import family_of
from prefopt.diffusion.latents import MIRRORED, Encoder, prepare_image
from prefopt.diffusion.sampling import load_pipeline
from prefopt.diffusion.tables import read_preferences
from prefopt.draws import draw
from prefopt.errors import InputError
from prefopt.files import content_key

# Prepared images


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ((40, 20), [20, 40, 0, 8, 16, 16]),  # to 32 x 16, of which 8 columns go on either side
        ((20, 50), [50, 20, 12, 0, 16, 16]),  # to 16 x 40
        ((16, 16), [16, 16, 0, 0, 16, 16]),
        ((37, 100), [100, 37, 13, 0, 16, 16]),  # to 16 x 43: 13 rows above, 14 below
    ],
)
def test_an_image_keeps_its_shape_and_remembers_its_size(size, sizes):
    """Guards: a second image resized to the first one's shape, with the wrong size conditioning."""
    prepared = prepare_image(png(0, *size), "here", 16)
    assert prepared.sizes.tolist() == sizes
    assert prepared.pixels.shape == (3, 16, 16)
    assert prepared.pixels.dtype == torch.float32
    assert -1 <= prepared.pixels.min() < 0 < prepared.pixels.max() <= 1


def test_pixels_reach_both_ends_of_their_range():
    half = Image.new("RGB", (32, 32), (0, 128, 255))
    assert prepare_image(encoded(half), "here", 16).pixels[:, 0, 0].tolist() == pytest.approx(
        [-1, 128 / 127.5 - 1, 1], abs=1e-6
    )
    image = picture(0)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(prepare_image(encoded(image), "here", SIZE).pixels, expected), "no resampling"


def test_an_image_is_turned_upright():
    upright = picture(0, 32, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    found, expected = prepare_image(lying, "here", 16), prepare_image(encoded(upright), "here", 16)
    assert torch.equal(found.pixels, expected.pixels)
    assert found.sizes.tolist() == expected.sizes.tolist() == [24, 32, 0, 2, 16, 16]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_any_mode_becomes_rgb(mode):
    image = Image.new("I;16", (20, 20), 40_000) if mode == "I;16" else picture(0, 20, 20).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    pixels = prepare_image(encoded(image, kind), "here", 16).pixels
    assert pixels.shape == (3, 16, 16)
    assert pixels.abs().max() <= 1


JPEG = encoded(picture(0, 40, 40), "JPEG")


@pytest.mark.parametrize(
    "content",
    [
        b"not an image",
        b"\x89PNG\r\n\x1a\n",
        *(content[: len(content) * part // 10] for content in (png(0), JPEG) for part in (1, 5, 9)),
        png(0)[:40] + b"\xff" * 30 + png(0)[70:],
        encoded(picture(0), "WEBP", lossless=True)[:-40],
        encoded(picture(0), "GIF")[:60],
        encoded(picture(0), "TIFF")[:300],
        b"<svg xmlns='http://www.w3.org/2000/svg'></svg>",
    ],
)
def test_bytes_that_are_no_whole_image_are_an_error(content):
    with pytest.raises(InputError, match=rf"row 3, column chosen: {len(content)} bytes that are no readable"):
        prepare_image(content, "row 3, column chosen", 16)


@pytest.mark.parametrize("size", [(1, 1), (200, 1), (15, 400)])
def test_a_speck_is_an_error(size):
    with pytest.raises(InputError, match=f"here: an image of {size[0]} x {size[1]} pixels"):
        prepare_image(png(0, *size), "here", 16)


def test_a_decompression_bomb_is_an_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="decompression bomb"):
        prepare_image(png(0, 40, 40), "here", 16)


# Stores


def encoder(model: str, folder: Path, resolution: int = SIZE) -> Encoder:
    pipeline = load_pipeline(model)
    return Encoder(pipeline, folder, resolution, family_of(pipeline), batch_size=3, threads=2)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Four pairs of images of different sizes; the second and the last have one in common."""
    images = [cell(png(i, SIZE + 4 * i, SIZE + 2 * (i % 3))) for i in range(8)]
    folder = tmp_path_factory.mktemp("table")
    rejected = [*images[1:7:2], images[2]]
    return read_preferences(write_pairs(folder, 4, chosen=images[::2], rejected=rejected))


@pytest.fixture
def counted(monkeypatch):
    """How many images and prompts pass through models from now on."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    counts: Counter[str] = Counter()

    def count(owner: type, method: str, what: str) -> None:
        original = getattr(owner, method)

        def counting(self, inputs, *args, **kwargs):
            counts[what] += len(inputs)
            return original(self, inputs, *args, **kwargs)

        monkeypatch.setattr(owner, method, counting)

    count(AutoencoderKL, "encode", "images")
    for kind in (CLIPTextModel, CLIPTextModelWithProjection):
        count(kind, "forward", "prompts")
    return counts


def test_each_content_is_encoded_once(stable_diffusion, table, tmp_path, counted):
    ours = encoder(stable_diffusion, tmp_path)
    images = ours.images(table, mirrored=False)
    ours.prompts(table.facts["prompt"])
    assert counted == {"images": 7, "prompts": 5}, (
        "of eight images one is there twice; four prompts and the empty"
    )
    assert len(images) == 7
    counted.clear()
    again = encoder(stable_diffusion, tmp_path)
    again.images(table, mirrored=False)
    again.prompts([*table.facts["prompt"], ""])
    assert not counted, "a second run encodes nothing"
    again.prompts(["one more"])
    assert counted == {"prompts": 1}
    counted.clear()
    again.images(table, mirrored=True)
    assert counted == {"images": 14}
    counted.clear()
    again.images(table, mirrored=True)
    again.images(table, mirrored=False)
    assert not counted


def test_moments_are_the_vaes(stable_diffusion, table, tmp_path):
    ours = encoder(stable_diffusion, tmp_path)
    store = ours.images(table, mirrored=True)
    for row in range(4):
        for key, content in zip(table.facts[row]["sha256"], table.images(row), strict=True):
            pixels, sizes = prepare_image(content, "here", SIZE)
            for suffix, image in (("", pixels), (MIRRORED, pixels.flip(-1))):
                with torch.no_grad():
                    expected = ours.pipeline.vae.encode(image[None]).latent_dist
                torch.testing.assert_close(store[key + suffix]["mean"], expected.mean[0], rtol=0, atol=1e-6)
                torch.testing.assert_close(
                    store[key + suffix]["logvar"], expected.logvar[0], rtol=0, atol=1e-5
                )
                assert torch.equal(store[key + suffix]["sizes"], sizes)
            assert not torch.equal(store[key]["mean"], store[key + MIRRORED]["mean"])


@pytest.mark.parametrize("model", ["stable_diffusion", "sdxl"])
def test_embeddings_are_the_pipelines(model, request, tmp_path):
    ours = encoder(request.getfixturevalue(model), tmp_path)
    prompts = ["a red lion", "zwei Zebras", "x" * 200, "a, b"]
    store = ours.prompts(prompts)
    for prompt in prompts:
        with torch.no_grad():
            expected = ours.pipeline.encode_prompt(
                prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        found = store[content_key(prompt)]
        torch.testing.assert_close(found["embeddings"], expected[0][0], rtol=0, atol=1e-6)
        assert ("pooled" in found) == (model == "sdxl")
        if model == "sdxl":
            torch.testing.assert_close(found["pooled"], expected[2][0], rtol=0, atol=1e-6)
    empty = store[content_key("")]
    assert all(value.eq(0).all() == (model == "sdxl") for value in empty.values()), (
        "SDXL samples unconditionally from zeros, SD from the empty prompt's embeddings"
    )


def test_a_stale_cache_is_an_error(stable_diffusion, stable_diffusion_v, table, tmp_path):
    """Other weights or another resolution: never reused without a word."""
    first = encoder(stable_diffusion, tmp_path)
    first.images(table, mirrored=False)
    first.prompts(["a"])
    with pytest.raises(InputError, match=r"resolution: 16 \(cache\), 32 \(this run\)"):
        encoder(stable_diffusion, tmp_path, 32).images(table, mirrored=False)
    other = encoder(stable_diffusion, tmp_path)
    with torch.no_grad():
        next(other.pipeline.vae.parameters()).view(-1)[0] += 1e-6
        next(other.pipeline.text_encoder.parameters()).view(-1)[0] += 1e-6
    with pytest.raises(InputError, match=r"VAE weights: .* \(cache\), .* \(this run\)"):
        other.images(table, mirrored=False)
    with pytest.raises(InputError, match=r"text encoder weights: .* \(cache\), .* \(this run\)"):
        other.prompts(["a"])
    # The same VAE and text encoder beside another UNet: shared.
    assert len(encoder(stable_diffusion_v, tmp_path).images(table, mirrored=False)) == 7


def test_an_image_that_cannot_be_decoded_is_named(stable_diffusion, tmp_path):
    chosen = [cell(png(0)), cell(png(1)[:50]), cell(png(2))]
    folder = write_pairs(tmp_path / "p", 3, chosen=chosen)
    said = r"p: row 1, column chosen: 50 bytes that are no readable image"
    with pytest.raises(InputError, match=said):
        encoder(stable_diffusion, tmp_path / "cache").images(read_preferences(folder), mirrored=False)


def test_a_vae_that_overflows_is_an_error(stable_diffusion, table, tmp_path):
    """Guards: SDXL's VAE overflows in float16."""
    ours = encoder(stable_diffusion, tmp_path)
    with torch.no_grad():
        next(ours.pipeline.vae.parameters()).fill_(torch.inf)
    with pytest.raises(InputError, match="the VAE makes values that are not finite"):
        ours.images(table, mirrored=False)


# Examples


def examples(model: str, table, folder: Path, **options) -> EncodedCandidates:
    ours = encoder(model, folder)
    return EncodedCandidates(
        table,
        ours.images(table, mirrored=options.get("flip_probability", 0) > 0),
        ours.prompts(table.facts["prompt"]),
        scaling=ours.family.scaling(ours.pipeline),
        per_candidate=ours.family.per_candidate,
        **{"seed": 5, **options},
    )


def test_candidates_share_draw_flip_and_noise(stable_diffusion, table, tmp_path):
    """Guards: the two images of a pair flipped and noised independently."""
    data = examples(stable_diffusion, table, tmp_path, flip_probability=0.5, drop_probability=0.5)
    options = {"shape": (4, 8, 8), "flip_probability": 0.5, "drop_probability": 0.5}
    factor = load_pipeline(stable_diffusion).vae.config.scaling_factor
    flips = set()
    for index in range(4):
        for visit in range(4):
            example, chance = data[index, visit], draw(5, index, visit, **options)
            assert example["latents"].shape == (2, 4, 8, 8)
            assert example["time"] == torch.tensor(chance.time)
            assert np.array_equal(example["noise"].numpy(), chance.noise)
            assert (example["item"], example["visit"]) == (index, visit)
            noise = torch.from_numpy(chance.latent_noise)
            for latents, key in zip(example["latents"], table.facts[index]["sha256"], strict=True):
                moments = data.images[key + (MIRRORED if chance.flip else "")]
                sampled = moments["mean"] + (moments["logvar"] / 2).exp() * noise
                torch.testing.assert_close(latents, sampled * factor, rtol=1e-6, atol=1e-6)
            caption = "" if chance.drop_caption else table.facts[index]["prompt"]
            expected = data.prompts[content_key(caption)]["embeddings"]
            assert torch.equal(example["conditioning"]["embeddings"], expected)
            flips.add((chance.flip, chance.drop_caption))
    assert len(flips) == 4, "every combination came up"


def test_latents_equal_the_plain_path(stable_diffusion, table, tmp_path, monkeypatch):
    """Those of a VAE called in the step, given the same noise."""
    data = examples(stable_diffusion, table, tmp_path)
    pipeline = load_pipeline(stable_diffusion)
    noise = torch.from_numpy(draw(5, 2, 1, shape=(4, 8, 8)).latent_noise)
    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda *_, **__: noise[None])
    for latents, content in zip(data[2, 1]["latents"], table.images(2), strict=True):
        with torch.no_grad():
            sampled = pipeline.vae.encode(prepare_image(content, "", SIZE).pixels[None]).latent_dist.sample()
        expected = sampled[0] * pipeline.vae.config.scaling_factor
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-6)


def test_each_candidate_has_its_own_size_conditioning(sdxl, table, tmp_path):
    """Guards: SDXL's size conditioning taken from the pair's first image."""
    data = examples(sdxl, table, tmp_path)
    sizes = data[1, 0]["conditioning"]["sizes"]
    # Images 2 and 3: 24 x 20 and 28 x 16 pixels.
    assert sizes[:, :2].tolist() == [[20, 24], [16, 28]]
    assert sizes.tolist() == [prepare_image(image, "", SIZE).sizes.tolist() for image in table.images(1)]
    assert data[1, 0]["conditioning"]["pooled"].shape == (SIZE,)


def test_the_identity_tells_runs_apart(stable_diffusion, table, tmp_path):
    """Whatever changes an example changes it, so that no cached reference score is taken for another's."""
    data = examples(stable_diffusion, table, tmp_path)
    variants = [
        examples(stable_diffusion, table, tmp_path, seed=6),
        examples(stable_diffusion, table, tmp_path, flip_probability=0.5),
        examples(stable_diffusion, table, tmp_path, drop_probability=0.5),
    ]
    fewer = read_preferences(table.source)
    fewer.facts = fewer.facts.select(range(3))
    variants.append(examples(stable_diffusion, fewer, tmp_path))
    assert data.identity == examples(stable_diffusion, table, tmp_path).identity
    assert len({str(sorted(each.identity.items())) for each in [data, *variants]}) == 5
