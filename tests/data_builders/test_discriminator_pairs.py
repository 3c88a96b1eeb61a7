"""The discriminator's data: filters, captions, sources, one codec for both classes, resuming, errors."""

import io
import json
import pickle
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from builds import build_of, calls, check_is_a_dataset, contents, header_of, kept, kill_at
from launching import launch, torchrun
from pictures import cell, encoded, picture, png, write_table
from PIL import Image
from tiny import SIZE, tiny_stable_diffusion
from tiny_vlm import tiny_llava
from tqdm import tqdm

from data_builders.discriminator_pairs import SOURCES, DiscriminatorPairsConfig, main
from data_builders.images.generation import candidate_seed
from data_builders.images.graded_passes import Codec, StoreRealImages, native_side, token_limit
from data_builders.images.real import Limits, read_real
from data_builders.prompts.captions import parse_sources, prepare, prepare_for_pocket, sentences
from prefopt.diffusion.generator import Generator
from prefopt.diffusion.latents import prepare_image
from prefopt.diffusion.tables import read_preferences
from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.pocket.world import PHRASINGS, caption, is_held_out, parse, train_scenes
from prefopt.records import in_test

SCRIPT = "data_builders/discriminator_pairs.py"
NAMES = ["turbo1", "turbo4", "prepared4"]
COYO = {"text": "t", "aesthetic_score_laion_v2": 7.0, "watermark_score": 0.1}
COYO |= {"nsfw_score_opennsfw2": 0.0, "nsfw_score_gantman": 0.2, "url": "https://x"}
LIMITS = Limits(6.5, 0.5, 0.5)


# Prepared captions


def at_most(words):
    return lambda text: len(text.split()) <= words


@pytest.mark.parametrize(
    ("said", "prompt"),
    [
        ("Two dogs.", "Two dogs."),
        ("1. The image shows **two cats** on a sofa.", "Two cats on a sofa."),
        ("The image features a woman. In the picture we can see a tree.", "A woman. A tree."),
        ("# Description\nHere is a photo of:\n- a brown dog\n- a ball", "a brown dog. a ball."),
        ("In this image, there is a red car.", "A red car."),
        ("This is an image of St. Paul's at dawn", "St. Paul's at dawn."),
        ("The image is a close-up photograph of a cat.", "A close-up photograph of a cat."),
        ("In the center of the image, a bowl stands on a table.", "A bowl stands on a table."),
        ("The painting depicts a man.", "The painting depicts a man."),
        ("Imagine a picturesque village.", "Imagine a picturesque village."),
        ("A cat sleeps. It is a very sunny day in the garden.", "A cat sleeps."),
        ("one two three four five six seven eight nine ten", "one two three four five six seven eight"),
        ("The image", ""),
        (" \n* \n", ""),
    ],
)
def test_a_description_becomes_a_prompt(said, prompt):
    assert prepare(said, at_most(8)) == prompt
    assert prepare(prompt, at_most(8)) in (prompt, f"{prompt}."), "what is prepared stays as it is"


def test_sentences_are_kept_whole_and_in_order():
    text = "The picture shows a lion! Is it asleep? It is 3.5 m long, e.g. as long as a car."
    assert sentences(text)[:2] == ["A lion!", "Is it asleep?"]
    assert " ".join(sentences(text)).endswith("It is 3.5 m long, e.g. as long as a car.")


def test_the_pocket_s_descriptions_get_the_first_phrasing_of_its_captions():
    scene = train_scenes()[17]
    for phrasing in range(PHRASINGS):
        assert prepare_for_pocket(caption(scene, phrasing), at_most(20)) == caption(scene, 0)
    assert prepare_for_pocket("The image shows two dogs.", at_most(20)) == "Two dogs."


def test_a_text_fits_as_long_as_every_text_encoder_reads_all_of_it(sdxl):
    fits = token_limit(Generator(sdxl))  # tokens are letters there; two more begin and end a text
    assert fits("a" * 75) and not fits("a" * 76)
    assert (
        token_limit(Generator("pocket"))("two red lions at night") and native_side(Generator("pocket")) == 64
    )


# Sources


def test_sources_say_their_caption_and_what_differs_from_the_model():
    one, two, three = parse_sources(SOURCES, Generator("pocket"))
    assert [source.name for source in (one, two, three)] == NAMES
    assert [source.caption for source in (one, two, three)] == ["raw", "vlm", "prepared"]
    assert [source.generator.sampler.num_inference_steps for source in (one, two, three)] == [1, 4, 4]
    assert {source.generator.sampler.guidance_scale for source in (one, two, three)} == {7.5}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            ["a caption=raw colour=red"],
            "'a caption=raw colour=red': unknown 'colour'; known are caption",
        ),
        (["a caption=raw revision=main"], "unknown 'revision'"),
        (["a caption=raw", "b caption=vlm", "a caption=vlm"], "--sources names 'a' twice"),
        (["a steps=4"], "caption is None; say caption= and one of raw, vlm, prepared"),
        (["a caption=best"], "caption is 'best'"),
        (["a caption=raw steps=few"], "steps is 'few', not a number"),
        (["a caption=raw steps=0"], r"steps is 0; it lies in \[1, 10000\]"),
        (["a caption=raw adapter=./nowhere"], "there is no ./nowhere"),
        (["caption=raw steps=1"], "begin with a name"),
        (["real caption=raw"], "other than real"),
        (["../x caption=raw"], "begin with a name"),
        ([""], "--sources is empty"),
        ([], "--sources is empty"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(sources, message):
    with pytest.raises(InputError, match=message):
        DiscriminatorPairsConfig(sources=sources)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_fraction": 1.0}, r"--test_fraction is 1.0; it lies in \[0, 1\)"),
        ({"test_fraction": -0.1}, "--test_fraction"),
        ({"height": 64}, "--height is 64 and --width is None"),
        ({"exports": ["sft"]}, "--exports sft is unknown; known are pairs, ranked"),
        ({"num_images": 0}, "--num_images is 0; it is 1 or more"),
        ({"min_aesthetic": float("nan")}, "--min_aesthetic is nan"),
        ({"model_name_or_path": "my/model"}, "--dataset_name is missing: .* not my/model"),
        (
            {"model_name_or_path": "my/model", "dataset_name": "my/data"},
            "--captioner_model_name_or_path is mis",
        ),
        ({"captioner_prompt": "/dev/null"}, "--captioner_prompt /dev/null is empty"),
        ({"captioner_prompt": "./nowhere.txt"}, "--captioner_prompt: there is no ./nowhere.txt"),
    ],
)
def test_an_option_out_of_range_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        DiscriminatorPairsConfig(**changes)


def test_without_descriptions_no_captioner_is_needed():
    plain = {"sources": ["a caption=raw"], "captions": "raw", "dataset_name": "my/data"}
    assert not DiscriminatorPairsConfig(model_name_or_path="my/model", **plain).described


# Real images


def rows_of(*changes: dict[str, Any], image="image") -> dict[str, list]:
    """The columns of a table of COYO with an image for each row of changes."""
    rows = [COYO | {image: cell(png(i))} | change for i, change in enumerate(changes)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def write_real(folder: Path, *changes: dict[str, Any]) -> str:
    columns = rows_of(*changes)
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "url": datasets.Value("string")}
    features = {name: kinds.get(name, datasets.Value("float64")) for name in columns}
    return write_table(folder, columns, datasets.Features(features))


def test_rows_are_left_out_for_their_scores_and_counted(tmp_path):
    table = write_real(
        tmp_path,
        {},
        {"aesthetic_score_laion_v2": 6.4},
        {"aesthetic_score_laion_v2": None},
        {"watermark_score": 0.6},
        {"nsfw_score_opennsfw2": 0.9},
        {"nsfw_score_gantman": 0.51},
        {"nsfw_score_gantman": None, "nsfw_score_opennsfw2": 0.5},
        {"text": " "},
        {"image": cell(png(0))},
        {"image": None},
        {"image": cell(b"")},
        {"image": cell(b"no image"), "aesthetic_score_laion_v2": 6.5},
    )
    real = read_real(table, LIMITS, with_text=True)
    assert [record["item"] for record in real.records] == [0, 6, 11], "what is broken shows when it is opened"
    assert real.left_out == {
        "aesthetic score too low": 1,
        "no aesthetic score": 1,
        "watermark score too high": 1,
        "nsfw score too high": 2,
        "no text": 1,
        "duplicate": 1,
        "no image": 2,
    }
    first = real.records[0]
    assert first["prompt_id"] == content_key(png(0)) == content_key(real.content(0))
    assert (first["raw"], first["url"], first["aesthetic"], first["nsfw"]) == ("t", "https://x", 7.0, 0.2)
    assert len(read_real(table, Limits()).records) == 9, "scores and texts that nothing needs"
    assert len(read_real(table, LIMITS, number=2).records) == 2


def test_a_plain_table_and_an_imagefolder_are_read(tmp_path):
    plain = write_table(
        tmp_path / "plain",
        {"jpg": [png(0), png(1)], "caption": ["a", "b"], "aesthetic": [7, 5]},
    )
    assert [record["raw"] for record in read_real(plain, Limits(6.0), with_text=True).records] == ["a"]
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    lines = [{"file_name": f"{i}.png", "text": f"t{i}", "aesthetic": 5.0 + i} for i in range(3)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    real = read_real(str(folder), Limits(6.0))
    assert [record["raw"] for record in real.records] == ["t1", "t2"]
    assert real.content(1) == (folder / "1.png").read_bytes()


def write_shard(path: Path, samples: list[dict[str, bytes]], first: int = 0) -> None:
    """A shard as img2dataset writes it: 000000000.jpg, .txt, .json, and so on."""
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples, start=first):
            for ending, content in sample.items():
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def sample(seed: int, **changes: Any) -> dict[str, bytes]:
    known = {"caption": f"t{seed}", "status": "success", "error_message": None, "exif": "{}", "width": 16}
    said = json.dumps(COYO | known | changes).encode()
    return {"jpg": encoded(picture(seed), "JPEG"), "txt": f"t{seed}".encode(), "json": said}


class Bomb:
    """What a pickle does that is loaded."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_shards_of_img2dataset_are_read_and_no_pickle_is(tmp_path):
    whole = {"aesthetic_score_laion_v2": 7}  # an integer in the first samples, a fraction in the later
    samples = [sample(i, **whole) for i in range(6)] + [sample(6, aesthetic_score_laion_v2=6.6)]
    samples[2] |= {"pth": pickle.dumps(Bomb()), "pyd": pickle.dumps(Bomb())}
    samples[3].pop("jpg")
    write_shard(tmp_path / "00000.tar", samples)
    write_shard(tmp_path / "00001.tar", [sample(7, watermark_score=0.9), sample(8)], first=10000)
    write_table(tmp_path, {"url": ["https://x"]}, name="00000.parquet")
    real = read_real(str(tmp_path), LIMITS, with_text=True)
    assert [record["raw"] for record in real.records] == ["t", "t", "t", "t", "t", "t", "t"]
    assert [record["item"] for record in real.records] == [0, 1, 2, 4, 5, 6, 8]
    assert real.left_out == {"watermark score too high": 1, "no image": 1}
    assert real.content(6) == samples[6]["jpg"] and real.records[5]["aesthetic"] == 6.6
    with pytest.raises(InputError, match="shards have no split 'test'"):
        read_real(str(tmp_path), Limits(), split="test")
    (tmp_path / "00001.tar").write_bytes(b"no tar")
    with pytest.raises(InputError, match=r"00001\.tar cannot be read"):
        read_real(str(tmp_path), Limits())


def test_a_table_that_cannot_serve_is_named(tmp_path):
    table = write_real(tmp_path / "low", *[{"aesthetic_score_laion_v2": 5.0}] * 3)
    with pytest.raises(InputError, match=r"none of its 3 rows can be used \(3 aesthetic score too low\)"):
        read_real(table, LIMITS)
    urls = write_table(tmp_path / "urls", {"url": ["https://x"], "text": ["t"]})
    with pytest.raises(InputError, match=r"no column 'image' or 'jpg'.*img2dataset"):
        read_real(urls, Limits())
    plain = write_table(tmp_path / "plain", {"image": [png(0)], "aesthetic": ["high"]})
    with pytest.raises(InputError, match="--max_watermark needs a column 'watermark_score' or 'watermark'"):
        read_real(plain, Limits(max_watermark=0.5))
    with pytest.raises(InputError, match="caption=raw needs a column 'text' or 'caption'"):
        read_real(plain, Limits(), with_text=True)
    with pytest.raises(InputError, match="row 0 has the aesthetic 'high'; a score is a number"):
        read_real(plain, Limits(1.0))


def test_the_pocket_s_real_images_are_training_scenes():
    real = read_real("pocket", Limits(), number=260, seed=3)
    scenes = [parse(record["raw"]) for record in real.records]
    assert not any(map(is_held_out, scenes)) and len(set(scenes[:240])) == 240
    assert len(real.records) == 260 and not real.left_out
    again = read_real("pocket", Limits(), number=5, seed=3)
    assert [one["prompt_id"] for one in again.records] == [one["prompt_id"] for one in real.records[:5]]


# The whole builder, on tiny random models

KEPT = 7  # of the table's images
FEW: dict[str, Any] = {"num_images": 5, "block_size": 2, "test_fraction": 0.4}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Models, real images, and the dataset that one undisturbed process makes of them."""
    folder = tmp_path_factory.mktemp("discriminator")
    tiny_stable_diffusion(folder / "sd")
    tiny_llava(folder / "llava")
    images = [encoded(picture(i, 20 + 3 * i, 31), kind) for i, kind in enumerate(["PNG", "JPEG", "WEBP"] * 2)]
    changes = [{"image": cell(content), "text": "the same"} for content in images]
    changes += [{"aesthetic_score_laion_v2": 1.0}, {"image": cell(images[0])}, {"image": cell(b"broken")}, {}]
    write_real(folder / "table", *changes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what torchrun gives each process
    main(settings(folder, "whole"))
    yield folder
    torch.set_num_threads(threads)


def settings(folder: Path, output: str, **changes: Any) -> DiscriminatorPairsConfig:
    config = DiscriminatorPairsConfig(
        dataset_name=str(folder / "table"),
        min_aesthetic=6.5,
        model_name_or_path=str(folder / "sd"),
        captioner_model_name_or_path=str(folder / "llava"),
        captioner_max_new_tokens=12,
        batch_size=2,
        block_size=3,
        test_fraction=0.5,
        output_dir=str(folder / output),
    )
    return replace(config, **changes)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a table, of both splits, with their split."""
    files = sorted((folder / name).glob("*.parquet"))
    read = [datasets.Dataset.from_parquet(str(file)) for file in files]
    plain = [one.cast(datasets.Features(_encoded(one.features))) for one in read]  # pyright: ignore
    return [row | {"split": file.name[:4]} for file, table in zip(files, plain, strict=True) for row in table]


def _encoded(features: dict[str, Any]) -> dict[str, Any]:
    plain = datasets.Image(decode=False)
    lists = {"images": datasets.List(plain)} if "images" in features else {}
    images = {name: plain for name, kind in features.items() if isinstance(kind, datasets.Image)}
    return features | images | lists


def pixels(image: dict[str, Any]) -> np.ndarray:
    with Image.open(io.BytesIO(image["bytes"])) as opened:
        assert opened.format == "WEBP" and opened.mode == "RGB"
        return np.asarray(opened)


def test_a_build_is_whole_and_says_what_it_left_out(workplace):
    folder = workplace / "whole"
    build, candidates = build_of(folder), rows(folder, "candidates")
    assert build["dropped"] == {
        "rows": {"aesthetic score too low": 1, "duplicate": 1},
        "real": {"broken image": 1},
    }
    assert build["figures"]["images"] == {"real": KEPT, **dict.fromkeys(NAMES, KEPT)}
    assert calls(folder) == [KEPT] * 5 and list(build["run"]["calls"])[1] == "describing"
    assert len(candidates) == 4 * KEPT + 1
    (broken,) = (row for row in candidates if row["invalid_reason"])
    assert (broken["invalid_reason"], broken["item"], broken["image"]) == ("broken image", 8, None)
    card = (folder / "README.md").read_text()
    assert "| real images | 7 (left out: 1 aesthetic score too low, 1 broken image, 1 duplicate) |" in card
    assert (
        "| rank 2 | prepared4 caption=prepared steps=4 |" in card
        and "passed once through the model's VAE" in card
    )


def test_real_images_by_path(tmp_path):
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
    lines = [json.dumps({"image": f"{seed}.png", "text": f"text {seed}"}) for seed in range(3)]
    (tmp_path / "images.jsonl").write_text("\n".join(lines))
    for source, split, seeds in (
        (tmp_path, "train[1:]", [1, 2]),
        (tmp_path / "images.jsonl", "train", [0, 1, 2]),
    ):
        real = read_real(str(source), Limits(), split=split)
        assert [real.content(record["item"]) for record in real.records] == [png(seed) for seed in seeds]
        assert [record["raw"] for record in real.records] == [f"text {seed}" for seed in seeds]
    for options in ({"config": "x"}, {"revision": "x"}):
        with pytest.raises(InputError, match="pocket is on this machine and has no"):
            read_real("pocket", Limits(), **options)


def test_a_build_is_a_dataset_of_the_hub(workplace, tmp_path):
    check_is_a_dataset(workplace / "whole", tmp_path / "copy", "pairs")
    assert header_of(workplace / "whole")["task_categories"] == ["text-to-image", "image-classification"]
    card = (workplace / "whole" / "README.md").read_text()
    assert "## What was asked about each real image\n\n```\n" in card


def test_every_generated_image_has_its_own_caption_seed_and_steps(workplace):
    by_image: dict[str, dict[str, dict]] = {}
    for row in rows(workplace / "whole", "candidates"):
        by_image.setdefault(row["prompt_id"], {})[row["source"]] = row
    for prompt_id, of in by_image.items():
        if of["real"]["invalid_reason"]:
            continue
        assert list(of) == ["real", *NAMES] and {row["prompt"] for row in of.values()} == {
            of["real"]["prepared"]
        }
        for name, kind, steps in zip(NAMES, ("raw", "vlm", "prepared"), (1, 4, 4), strict=True):
            row = of[name]
            assert row["caption"] == row[kind] == of["real"][kind] and row["caption"]
            assert row["seed"] == candidate_seed(0, f"{prompt_id} {name}", 0)
            assert row["num_inference_steps"] == steps and row["model_identity"]
        assert of["real"]["seed"] is None and of["real"]["caption"] == ""
    turbo = [of["turbo1"] for of in by_image.values() if "turbo1" in of]
    same = [row["pixels_sha256"] for row in turbo if row["caption"] == "the same"]
    assert len(same) == len(set(same)) == 6, "two images of one caption differ"


def test_one_codec_for_both_classes(workplace):
    """Guards against a discriminator that learns JPEG, a size, or what a VAE cannot draw."""
    found = rows(workplace / "whole", "candidates")
    valid = [row for row in found if not row["invalid_reason"]]
    assert {pixels(row["image"]).shape for row in valid} == {(SIZE, SIZE, 3)}
    assert {(row["height"], row["width"]) for row in valid} == {(SIZE, SIZE)}
    real = read_real(str(workplace / "table"), Limits(6.5))
    codec = Codec(Generator(str(workplace / "sd")), torch.device("cpu"))
    main(settings(workplace, "plain", through_vae=False, sources=SOURCES[:1], captions="raw"))
    plain = {row["item"]: row for row in rows(workplace / "plain", "candidates") if row["source"] == "real"}
    for row in (row for row in valid if row["source"] == "real"):
        resized = prepare_image(real.content(row["item"]), "", SIZE).pixels
        passed = (codec(resized[None])[0] * 255).round()
        assert np.abs(pixels(row["image"]) - passed).max() <= 1
        exact = ((resized.permute(1, 2, 0).numpy() / 2 + 0.5) * 255).round()
        assert (pixels(plain[row["item"]]["image"]) == exact).all() and np.abs(exact - passed).max() > 20
    assert calls(workplace / "plain") == [0, KEPT], "no VAE, no description, one source"
    assert {row["prompt"] for row in plain.values() if row["image"]} == {"the same", "t"}


def test_an_image_that_would_have_to_be_enlarged_is_left_out(workplace, tmp_path):
    """Guards against a discriminator that takes blur for real."""
    real = read_real(str(workplace / "table"), Limits(6.5))
    storing = StoreRealImages(None, real, tmp_path, side=24, batch_size=2, block_size=9)
    storing.work(0, tqdm(disable=True))
    found = [row["invalid_reason"] for row in storing.blocks.rows(storing.blocks[0])]
    small = "smaller than the generated images"
    assert found == [small, small, "", "", "", "", "broken image", small]


def test_a_vae_decodes_as_the_pipeline_does(workplace):
    """In the pipeline's precision, but for float16, in which many VAEs overflow."""
    for dtype, used in (("bfloat16", torch.bfloat16), ("float16", torch.float32)):
        codec = Codec(Generator(str(workplace / "sd"), dtype=dtype), torch.device("cpu"))
        assert codec.vae.dtype == used
        array = codec(torch.zeros(2, 3, SIZE, SIZE))
        assert array.shape == (2, SIZE, SIZE, 3) and array.min() >= 0 and array.max() <= 1
    assert native_side(Generator(str(workplace / "sd"))) == SIZE
    assert native_side(Generator("pocket")) == 64


def test_pairs_and_ranks_and_splits_by_real_image(workplace):
    folder = workplace / "whole"
    images = {
        (row["prompt_id"], row["source"]): row["image"]["bytes"]
        for row in rows(folder, "candidates")
        if not row["invalid_reason"]
    }
    ranked, pairs = rows(folder, "ranked"), rows(folder, "pairs")
    assert len(ranked) == KEPT and Counter(row["source"] for row in pairs) == dict.fromkeys(NAMES, KEPT)
    for row in ranked:
        assert row["sources"] == ["real", *reversed(NAMES)] and row["ranks"] == [1, 2, 3, 4]
        given = [images[row["prompt_id"], name] for name in row["sources"]]
        assert [image["bytes"] for image in row["images"]] == given
    for row in pairs:
        assert row["chosen"]["bytes"] == images[row["prompt_id"], "real"]
        assert row["rejected"]["bytes"] == images[row["prompt_id"], row["source"]]
    for row in ranked + pairs:
        assert row["split"] == ("test" if in_test(row["prompt_id"], 0.5) else "trai")
    assert {row["split"] for row in ranked} == {"test", "trai"}
    for split in ("train", "test"):
        assert len(read_preferences(str(folder), split=split, config="ranked")) > 0
        assert not read_preferences(str(folder), split=split, config="pairs").dropped


def test_a_killed_build_resumes_to_the_identical_dataset_and_repeats_no_call(workplace):
    """Blocks of real images, a line of descriptions, blocks of two sources, then the tables."""
    folder = workplace / "killed"
    for moment in (1, 3, 4, 4):
        kill_at(moment, main, settings(workplace, "killed"))
    assert not (folder / "ranked").exists()
    main(settings(workplace, "killed"))
    made = calls(folder)
    assert sum(made) < 5 * KEPT and made[0] == made[1] == 0
    assert contents(folder).keys() == contents(workplace / "whole").keys()
    assert all(table.equals(contents(workplace / "whole")[name]) for name, table in contents(folder).items())
    descriptions = kept(folder, "descriptions")
    assert len(descriptions) == len(set(descriptions)) == KEPT
    kill_at(0, main, settings(workplace, "killed"))  # as the tables are about to be written
    main(settings(workplace, "killed"))
    assert calls(folder) == [0] * 5


def test_the_same_command_loads_nothing_and_another_source_generates_its_own(workplace, monkeypatch):
    folder = workplace / "more"
    main(settings(workplace, "more", sources=SOURCES[:2]))
    main(settings(workplace, "more", sources=[SOURCES[2], *SOURCES[:2]]))
    assert calls(folder) == [0, 0, KEPT, 0, 0]
    ranked = rows(folder, "ranked")
    assert {tuple(row["sources"]) for row in ranked} == {("real", "turbo4", "turbo1", "prepared4")}
    monkeypatch.setattr("data_builders.images.generation.load_generator", None)
    monkeypatch.setattr("data_builders.answers.generation.load_vlm", None)
    monkeypatch.setattr("data_builders.images.graded_passes.load_parts", None)
    main(settings(workplace, "more", sources=SOURCES, test_fraction=0.0, exports=["pairs"], captions="vlm"))
    found = rows(folder, "pairs")
    assert calls(folder) == [0] * 5 and len(found) == 3 * KEPT and {row["split"] for row in found} == {"trai"}
    vlm = {row["prompt_id"]: row["vlm"] for row in rows(folder, "candidates")}
    assert all(row["prompt"] == vlm[row["prompt_id"]] for row in found)


def test_other_settings_in_the_folder_are_an_error_that_names_both_sides(workplace):
    for changes, message in (
        ({"seed": 5}, r"seed: 0 \(folder\), 5 \(this run\)"),
        ({"guidance_scale": 1.0}, r"guidance_scale: 3.0 \(folder\), 1.0 \(this run\)"),
        ({"through_vae": False}, r"codec: VAE of .* \(folder\), no VAE \(this run\)"),
        ({"height": 24, "width": 24}, r"side: 16 \(folder\), 24 \(this run\)"),
        ({"min_aesthetic": 0.0}, "blocks of other prompts"),
    ):
        with pytest.raises(InputError, match=f"{message}.*Name another --output_dir"):
            main(settings(workplace, "whole", **changes))


class Silent:
    """A vision-language model that says nothing, or nothing that can be a prompt."""

    def __init__(self, *_: Any):
        pass

    def generate(self, requests):
        from prefopt.vlm.generate import Generated

        return [[Generated("" if i % 2 else "The image", 2, True)] for i, _ in enumerate(requests)]


def test_an_image_without_a_caption_is_counted_and_nothing_left_is_an_error(workplace, monkeypatch):
    monkeypatch.setattr("data_builders.answers.generation.VlmGenerator", Silent)
    with pytest.raises(InputError, match=r"there is no pair .*empty description.*`candidates` says why"):
        main(settings(workplace, "silent"))
    found = Counter(row["invalid_reason"] for row in rows(workplace / "silent", "candidates"))
    assert found.keys() == {"empty description", "empty prepared caption", "broken image"}
    assert found.total() == KEPT + 1 and build_of(workplace / "silent")["dropped"]["real"] == found
    main(settings(workplace, "silent", sources=SOURCES[:1]))
    first = rows(workplace / "silent", "pairs")
    assert len(first) == KEPT and {row["prompt"] for row in first} == {"The image", "the same"}


def test_by_path_the_pocket_describes_its_own_scenes(tmp_path):
    folder = tmp_path / "one"
    run = launch(SCRIPT, {**FEW, "model_name_or_path": "pocket", "output_dir": folder}, tmp_path / "log")
    assert run.wait() == 0, run.text()
    assert "real images: 5 (left out: none)" in run.text() and calls(folder) == [5] * 5
    for row in rows(folder, "candidates"):
        assert parse(row["vlm"]) == parse(row["raw"]) and row["prompt"] == caption(parse(row["raw"]), 0)
        assert (row["height"], row["width"]) == (64, 64)


@pytest.mark.slow
def test_two_processes_make_the_identical_dataset(tmp_path):
    """The world size is the one that the processes saw."""
    torchrun(SCRIPT, {**FEW, "output_dir": tmp_path / "two"})
    torch.set_num_threads(1)
    main(DiscriminatorPairsConfig(output_dir=str(tmp_path / "one"), **FEW))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys() and all(table.equals(two[name]) for name, table in one.items())
    assert build_of(tmp_path / "two")["run"]["processes"] == 2 and calls(tmp_path / "two") == [5] * 5
