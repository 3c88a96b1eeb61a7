"""The pocket: its world is a pure function, well divided; its models are as good as PROVENANCE.json says."""

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPProcessor

from prefopt import pocket
from prefopt.diffusion.generator import Sampler
from prefopt.diffusion.sampling import sample
from prefopt.diffusion.tables import read_preferences
from prefopt.errors import InputError
from prefopt.pocket import world
from prefopt.pocket.oracle import Oracle

PARTS = ("text_to_image", "clip", "oracle", "pairs", "llava", "critic", "discriminator", "yolo_world")
WEIGHTS = pocket.folder("clip").parent
PROVENANCE = json.loads((WEIGHTS.parent / "PROVENANCE.json").read_text(encoding="utf-8"))
BUDGET = 24_000_000

HELD_OUT = world.held_out_scenes()


@pytest.fixture(scope="module")
def renders():
    """Two new pictures of every held-out scene."""
    scenes = HELD_OUT * 2
    return scenes, [world.render(scene, 10**6 + i) for i, scene in enumerate(scenes)]


def test_a_picture_is_a_function_of_scene_and_seed_in_any_process():
    code = (
        "from prefopt.pocket.world import *; import hashlib; "
        "print(hashlib.sha256(b''.join(render(s, 7).tobytes() for s in all_scenes()[::30])).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1
    scene = world.Scene("lion", "blue", 2, "snow")
    assert world.render(scene, 1).tobytes() != world.render(scene, 2).tobytes()
    assert world.render(scene, 1).size == (64, 64) and world.render(scene, 1).mode == "RGB"


def test_rendering_takes_about_a_millisecond():
    began = time.process_time()
    for scene in world.all_scenes()[::4]:
        world.render(scene, 3)
    assert (time.process_time() - began) / 90 < 0.01


def test_a_silhouette_covers_what_the_scene_adds_to_its_place():
    scene = world.Scene("giraffe", "red", 1, "snow")
    inside = np.asarray(world.silhouette(scene, 5)) == 255
    pixels = np.asarray(world.render(scene, 5)).astype(int)
    assert 0.03 < inside.mean() < 0.5
    redness = pixels[..., 0] - pixels[..., 1]
    assert np.median(redness[inside]) > 80 > 20 > np.median(redness[~inside])


def test_parse_inverts_every_caption():
    for scene in world.all_scenes():
        texts = {world.caption(scene, phrasing) for phrasing in range(world.PHRASINGS)}
        assert len(texts) == world.PHRASINGS >= 4
        assert {world.parse(text) for text in texts} == {scene}


@pytest.mark.parametrize(
    "text", ["", "two red lion at night", "one red lions at night", "four red lions at night", "a photo"]
)
def test_parse_refuses_other_text(text):
    with pytest.raises(InputError, match="is no caption"):
        world.parse(text)


def test_held_out_scenes_are_apart_and_balanced():
    train = world.train_scenes()
    assert len(HELD_OUT) >= 100 and not set(train) & set(HELD_OUT)
    assert set(train) | set(HELD_OUT) == set(world.all_scenes()) and len(train) + len(HELD_OUT) == 360
    for name, values in world.ATTRIBUTES.items():
        counts = Counter(getattr(scene, name) for scene in HELD_OUT)
        assert set(counts) == set(values) and max(counts.values()) - min(counts.values()) <= 1


def test_training_captions_never_name_a_held_out_scene():
    from pretraining.text_to_image import training_captions

    rng = np.random.default_rng(0)
    texts = [t for step in (0, 10**6) * 5 for t in training_captions(rng, world.train_scenes(), step)]
    assert not {world.parse(text) for text in texts if text} & set(HELD_OUT)


def test_most_captions_of_one_side_of_a_couple_are_of_pictures_of_the_other():
    """Guidance would mend a mistake of the minority: it sharpens what most captions of a picture say."""
    from pretraining.text_to_image import COUPLES, LEANS, mistaken

    def is_of(scene: world.Scene, side: dict) -> bool:
        return all(getattr(scene, name) == value for name, value in side.items())

    rng, scenes = np.random.default_rng(0), world.train_scenes() * 40
    said = [(scene, mistaken(rng, scene)) for scene in scenes]
    for side in (side for couple in COUPLES for side in couple):
        right = [is_of(shown, side) for shown, named in said if is_of(named, side)]
        assert len(right) > 300 and abs(np.mean(right) - (1 - LEANS)) < 0.06 and LEANS > 0.5


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    from pretraining.common import Run, Training

    def train(name: str, stops: tuple[int, ...]) -> torch.Tensor:
        for stop in stops:
            torch.manual_seed(0)
            modules = torch.nn.ModuleDict({"linear": torch.nn.Linear(3, 1)})
            training = Training(
                Run(tmp_path / name, 1, steps=6, batch=4, learning_rate=0.1, warmup=2), modules
            )
            for rng in training.batches():
                inputs = torch.from_numpy(rng.standard_normal((4, 3), dtype=np.float32)) + torch.randn(4, 3)
                training.update(modules["linear"](inputs).square().mean())
                if training.step == stop:
                    training.save()
                    break
        return training.finished()["linear"].weight

    assert torch.equal(train("whole", (6,)), train("broken", (2, 5, 6)))


def test_names_resolve_without_torch():
    code = (
        "import sys, prefopt.pocket as p; assert p.resolve('pocket', 'clip') == str(p.folder('clip')); "
        "assert p.resolve('a/b', 'clip') == 'a/b'; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(InputError, match="no part 'audio'"):
        pocket.folder("audio")


def test_weights_are_safetensors_within_the_budget():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".parquet"}
    assert sum(path.stat().st_size for path in files) <= BUDGET
    for part in PARTS:
        assert sum(path.stat().st_size for path in (WEIGHTS / part).rglob("*") if path.is_file()) > 100_000


def test_provenance_names_every_part():
    assert {path.name for path in WEIGHTS.iterdir()} == set(PARTS) <= set(PROVENANCE)
    for part in PARTS:
        entry = PROVENANCE[part]
        assert {"command", "seed", "versions", "bytes", "quality"} <= set(entry)
        on_disk = {
            path.relative_to(WEIGHTS / part).as_posix(): path.stat().st_size
            for path in (WEIGHTS / part).rglob("*")
            if path.is_file()
        }
        assert entry["bytes"] == on_disk


def test_the_oracle_reads_held_out_renders(renders):
    scenes, images = renders
    seen = Oracle.load().attributes(images)
    for name in world.ATTRIBUTES:
        right = [getattr(a, name) == getattr(b, name) for a, b in zip(seen, scenes, strict=True)]
        assert np.mean(right) >= 0.98, name


def test_the_oracle_compares_with_the_prompt():
    scene = world.Scene("zebra", "pink", 1, "lake")
    image = world.render(scene, 4)
    asked = [scene, replace(scene, colour="green"), replace(scene, count=3, animal="lion")]
    right = Oracle.load().correct([image] * 3, [world.caption(s, i) for i, s in enumerate(asked)])
    assert right["all"].tolist() == [True, False, False]
    assert right["colour"].tolist() == [True, False, True] and right["count"].tolist() == [True, True, False]


def test_clip_prefers_the_true_caption(renders):
    from pretraining.clip import one_change_accuracy

    folder = pocket.folder("clip")
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    for name, share in one_change_accuracy(model, processor, *renders).items():
        assert share >= 0.95, name


def test_the_text_to_image_model_listens_imperfectly():
    pipeline = StableDiffusionPipeline.from_pretrained(pocket.folder("text_to_image"))
    pipeline.set_progress_bar_config(disable=True)
    scenes = [HELD_OUT[i] for i in np.random.default_rng(1).permutation(len(HELD_OUT))[:64]]
    prompts = [world.caption(scene, i) for i, scene in enumerate(scenes)]
    settings = PROVENANCE["text_to_image"]["sampling"]
    images = list(sample(pipeline, prompts, range(64), Sampler(**settings), batch_size=32))
    assert 0.30 <= Oracle.load().correct(images, prompts)["all"].mean() <= 0.70


def test_the_pairs_are_of_training_scenes_and_never_tie():
    table = read_preferences(str(pocket.folder("pairs")))
    assert len(table) == 192 and not table.dropped
    assert not {world.parse(row) for row in table.rows["prompt"]} & set(HELD_OUT)
    assert min(table.rows["margin"]) > 0
