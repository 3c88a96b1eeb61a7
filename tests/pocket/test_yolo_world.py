"""The pocket's detector: its boxes' truth, how it is measured, and that it is as good as it should be."""

import json
import time

import numpy as np
import pytest
from PIL import Image
from pretraining.boxes import average_precision, boxes, mean_average_precision, overlap

from prefopt import pocket
from prefopt.detectors import Box
from prefopt.detectors.loading import load_detector
from prefopt.detectors.yolo_world import YoloWorld
from prefopt.pocket import world
from prefopt.pocket.drawing import ANIMALS

FOLDER = pocket.folder("yolo_world")
PROVENANCE = json.loads((FOLDER.parent.parent / "PROVENANCE.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def detector() -> YoloWorld:
    return YoloWorld()


def held_out(number: int) -> tuple[list[world.Scene], list[Image.Image], list[list[Box]]]:
    """Every second held-out scene, a new picture of it, and its boxes."""
    items = [(scene, 20_000 + i) for i, scene in enumerate((world.held_out_scenes() * 2)[: 2 * number : 2])]
    return [scene for scene, _ in items], [world.render(*i) for i in items], [boxes(*i) for i in items]


def test_boxes_hold_the_silhouette_and_nothing_less():
    for seed, scene in enumerate(world.all_scenes()[::5]):
        found = boxes(scene, seed)
        assert [box.label for box in found] == [scene.animal] * scene.count
        mask = np.asarray(world.silhouette(scene, seed)) > 0
        covered = np.zeros_like(mask)
        for box in found:
            left, top, right, bottom = box[2:]
            covered[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = True
        assert not (mask & ~covered).any()
        rows, columns = np.where(mask)
        union = [f(getattr(b, e) for b in found) for f, e in ((min, "left"), (min, "top"))]
        union += [max(getattr(b, e) for b in found) for e in ("right", "bottom")]
        tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(np.array(union) - tight).max() < 1


def test_overlap_by_hand():
    a = Box("lion", 1, 0, 0, 4, 4)
    assert overlap(a, a) == 1 and overlap(a, Box("lion", 1, 4, 0, 8, 4)) == 0
    assert overlap(a, Box("lion", 1, 2, 2, 6, 4)) == pytest.approx(4 / 20)


def test_average_precision_by_hand():
    def lion(left: float, confidence: float = 1.0) -> Box:
        return Box("lion", confidence, left, 0, left + 10, 10)

    truth = [[lion(0), lion(20)], [lion(0)], [lion(0)]]
    # By confidence: right, wrong place, right, a second time, right; one lion is never found.
    found = [[lion(1, 0.9), lion(0, 0.6)], [lion(40, 0.8), lion(2, 0.7)], [lion(0, 0.5)]]
    # Precision at the hits: 1, 2/3, 3/5, each for a quarter of the truth.
    assert average_precision(found, truth, "lion") == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)
    assert average_precision([[], [], []], truth, "lion") == 0
    assert np.isnan(average_precision(found, truth, "zebra"))
    zebras = [[Box("zebra", 1, 0, 0, 5, 5)], [], []]
    both = [[*some, *others] for some, others in zip(truth, zebras, strict=True)]
    assert mean_average_precision(truth, both) == pytest.approx(0.5)
    assert mean_average_precision(both, both) == 1


def test_monotone_precision_counts_what_comes_later():
    truth = [[Box("lion", 1, 0, 0, 9, 9)], [Box("lion", 1, 0, 0, 9, 9)]]
    found = [[Box("lion", 0.9, 50, 0, 59, 9), Box("lion", 0.8, 0, 0, 9, 9)], [Box("lion", 0.7, 0, 0, 9, 9)]]
    # Precision is 1/2 at the first hit and 2/3 at the second, so 2/3 at both.
    assert average_precision(found, truth, "lion") == pytest.approx(2 / 3)


def test_it_finds_the_animals_of_scenes_that_no_training_saw(detector):
    began = time.process_time()
    _, images, truth = held_out(60)
    found = detector.detect(images, [list(ANIMALS)] * len(images))
    assert mean_average_precision(found, truth) >= 0.9
    assert time.process_time() - began < 20


def test_asked_for_one_class_as_a_builder_asks(detector):
    scenes, images, truth = held_out(60)
    own = detector.detect(images, [[scene.animal] for scene in scenes])
    sure = [[box for box in found if box.confidence >= 0.6] for found in own]
    assert np.mean([len(found) > 0 for found in sure]) >= 0.95
    assert np.mean([len(a) == len(b) for a, b in zip(sure, truth, strict=True)]) >= 0.8
    other = [ANIMALS[(ANIMALS.index(scene.animal) + 1) % 4] for scene in scenes]
    wrong = detector.detect(images, [[name] for name in other])
    assert np.mean([any(box.confidence >= 0.6 for box in found) for found in wrong]) <= 0.05


def test_larger_pictures_and_bars_change_little(detector):
    (scene,), (image,), (truth,) = held_out(1)
    wide = Image.new("RGB", (512, 256), (114, 114, 114))
    wide.paste(image.resize((256, 256), Image.Resampling.BILINEAR), (100, 0))
    found = [box for box in detector.detect([wide], [[scene.animal]])[0] if box.confidence >= 0.4]
    assert len(found) == scene.count == 1
    expected = Box(
        scene.animal, 1, *(4 * edge + shift for edge, shift in zip(truth[0][2:], (100, 0) * 2, strict=True))
    )
    assert overlap(found[0], expected) >= 0.7


def test_its_name_is_pocket(detector):
    named = load_detector("pocket")
    assert isinstance(named, YoloWorld) and named.identity == detector.identity
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000


def test_provenance_says_what_it_finds_in_drawn_pictures():
    quality = PROVENANCE["yolo_world"]["quality"]
    assert min(quality["held_out_renders_map50"], quality["held_out_vae_copies_map50"]) >= 0.9
    assert quality["generated"]["found"] >= 0.8 and quality["generated"]["found_wrongly"] <= 0.1
