"""Detectors: boxes are in the image's pixels, each image has its own classes, nothing is embedded twice."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_clip
from transformers import (
    AutoTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
)

from prefopt.detectors import Box, yolo_world
from prefopt.detectors.loading import load_detector
from prefopt.detectors.owlv2 import Owlv2
from prefopt.detectors.selecting import by_number_of_classes, select
from prefopt.detectors.text import ClassEmbeddings
from prefopt.detectors.yolo_world import YoloWorld, YoloWorldSettings, build, fit
from prefopt.errors import InputError

ROOT = Path(__file__).parents[2]
ANY = {"min_confidence": 0.0, "max_overlap": 1.0}


def tiny_owlv2(folder: Path, clip: str, seed: int = 0) -> str:
    """Save a random Owlv2ForObjectDetection of 48 x 48 pixels and its processor; return the folder."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(clip)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Owlv2Config(
        text_config=text, vision_config=small | {"image_size": 48, "patch_size": 8}, projection_dim=16
    )
    model = Owlv2ForObjectDetection(config)
    # Random heads of this size saturate; scores and boxes must differ from place to place.
    for parameter in [*model.class_head.parameters(), *model.box_head.parameters()]:
        parameter.data.mul_(0.1)
    model.save_pretrained(folder)
    images = Owlv2ImageProcessor(size={"height": 48, "width": 48})
    Owlv2Processor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


def pictures() -> list[Image.Image]:
    """A square, a wide and a tall image of noise."""
    rng = np.random.default_rng(0)
    sizes = [(40, 40), (60, 30), (20, 50)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def close(a: list[Box], b: list[Box], tolerance: float = 1e-3) -> bool:
    """Whether the boxes are the same up to rounding, which may swap those of about the same confidence."""

    def within(box: Box, others: list[Box]) -> bool:
        same = [other[1:] for other in others if other.label == box.label]
        return bool(same) and np.abs(np.subtract(same, box[1:])).max(1).min() <= tolerance

    return len(a) == len(b) and all(within(box, b) for box in a) and all(within(box, a) for box in b)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return tiny_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory, clip) -> str:
    return tiny_owlv2(tmp_path_factory.mktemp("models") / "owlv2", clip)


@pytest.fixture(scope="module")
def yolo(tmp_path_factory, clip) -> str:
    """A random YOLO-World whose scores are spread over 0..1."""
    folder = tmp_path_factory.mktemp("models") / "yolo_world"
    folder.mkdir()
    settings = YoloWorldSettings(0.33, 0.0625, 256, image_size=64, clip=clip)
    (folder / "config.json").write_text(settings.to_json())
    torch.manual_seed(0)
    model = build(settings)
    for head in model.model[-1].cv4:
        head.bias.data.zero_()
        head.logit_scale.data.fill_(1.0)
    save_file(model.state_dict(), folder / "model.safetensors")
    return str(folder)


def test_selecting_by_hand():
    corners = torch.tensor(
        [[0, 0, 10, 10], [1, 0, 11, 10], [-5, -5, 5, 5], [15, 15, 40, 40], [30, 0, 40, 10], [2, 2, 3, 3]]
    )
    scores = torch.tensor([[0.6, 0.7], [0.8, 0.1], [0.5, 0.0], [0.9, 0.0], [1.0, 0.0], [0.29, 0.0]])
    found = select(corners, scores, ["lion", "zebra"], (20, 30), min_confidence=0.3, max_overlap=0.5)
    assert [(box.label, round(box.confidence, 4), *box[2:]) for box in found] == [
        ("lion", 0.9, 15, 15, 20, 30),  # cut at the image's right and bottom
        ("lion", 0.8, 1, 0, 11, 10),  # the box beside it overlaps by 90/110: gone
        ("zebra", 0.7, 0, 0, 10, 10),  # another class may lie there
        ("lion", 0.5, 0, 0, 5, 5),  # the fifth lies outside, the sixth is under the threshold
    ]
    assert (
        select(corners, scores, ["a", "b"], (20, 30), min_confidence=0.3, max_overlap=1.0, most=2)[1].left
        == 1
    )


def test_images_are_grouped_by_how_much_they_are_asked():
    assert by_number_of_classes([["a"], [], ["a", "b"], ["c"], ["d"]], 2) == [[0, 3], [4], [2]]


@pytest.mark.parametrize("size", [(64, 64), (200, 100), (90, 210), (7, 31)])
def test_fitting_keeps_proportions_and_finds_the_way_back(size):
    image = Image.new("RGB", size, (255, 0, 0))
    pixels, offset, scale = fit(image, 96)
    assert pixels.shape == (3, 96, 96) and max(pixels.unique().tolist()) == 1.0
    red = (pixels[0] == 1) & (pixels[1] == 0)
    rows, columns = torch.where(red)
    edges = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert torch.allclose((edges - offset) / scale, torch.tensor([0.0, 0, *size]), atol=1e-4)
    grey = (pixels - 114 / 255).abs().amax(0) < 1e-6
    assert (grey ^ red).all() and abs(scale[0] / scale[1] - 1) < 0.06


@pytest.mark.parametrize("kind", ["owlv2", "yolo"])
def test_each_image_is_asked_for_its_own_classes(kind, request):
    detector = load_detector(request.getfixturevalue(kind), batch_size=2, **ANY)
    images = pictures()
    classes = [["lion", "zebra"], ["giraffe"], ["zebra", "elephant", "zebra"]]
    together = detector.detect([*images, images[0]], [*classes, []])
    assert together[3] == []
    for image, asked, boxes in zip(images, classes, together, strict=False):
        assert {box.label for box in boxes} == set(asked)
        assert close(boxes, detector.detect([image], [asked])[0])
        confidences = [box.confidence for box in boxes]
        assert confidences == sorted(confidences, reverse=True)
        assert 0 <= min(confidences) < max(confidences) <= 1
        for box in boxes:
            assert 0 <= box.left < box.right <= image.width and 0 <= box.top < box.bottom <= image.height
    assert not close(*detector.detect([images[0]] * 2, [["lion"], ["zebra"]]))
    with pytest.raises(ValueError, match="2 images but 1 lists"):
        detector.detect(images[:2], [["lion"]])


@pytest.mark.parametrize("kind", ["owlv2", "yolo"])
def test_a_class_is_embedded_once(kind, request, monkeypatch):
    detector = load_detector(request.getfixturevalue(kind))
    model = detector.model.owlv2 if kind == "owlv2" else detector.embeddings.model
    texts = []
    original = model.get_text_features

    def counting(**tokens):
        texts.append(len(tokens["input_ids"]))
        return original(**tokens)

    monkeypatch.setattr(model, "get_text_features", counting)
    image = pictures()[0]
    detector.detect([image, image], [["lion"], ["lion", "zebra"]])
    detector.detect([image], [["zebra", "lion"]])
    assert sum(texts) == 2
    detector.detect([image], [["giraffe", "lion"]])
    assert sum(texts) == 3


def test_owlv2_agrees_with_the_whole_model(owlv2):
    detector = Owlv2(owlv2, template="{}", **ANY)
    for image in pictures():
        inputs = detector.processor(text=[["lion", "zebra"]], images=image, return_tensors="pt")
        with torch.no_grad():
            output = detector.model(**inputs)
        (expected,) = detector.processor.image_processor.post_process_object_detection(
            output, threshold=0.0, target_sizes=[(image.height, image.width)]
        )
        found = detector.detect([image], [["lion", "zebra"]])[0]
        # Theirs are each place's better class, not cut; ours are both, cut, without those outside.
        limits = torch.tensor([image.width, image.height] * 2)
        edges = expected["boxes"].clamp(min=0).minimum(limits)
        inside = (edges[:, 2:] > edges[:, :2]).all(1)
        theirs = [
            Box(["lion", "zebra"][label], confidence, *corners)
            for label, confidence, corners in zip(
                expected["labels"][inside].tolist(),
                expected["scores"][inside].tolist(),
                edges[inside].tolist(),
                strict=True,
            )
        ]
        found = detector.detect([image], [["lion", "zebra"]])[0]
        assert len(found) == 2 * len(theirs) > 20
        better = [box for box in found if any(close([box], [other]) for other in theirs)]
        assert close(better, theirs)


def test_yolo_world_agrees_with_ultralytics_own_way(yolo):
    """`set_classes` without its CLIP: the same numbers from the model's own attributes."""
    from ultralytics.utils.nms import non_max_suppression

    detector = YoloWorld(yolo, min_confidence=0.1, max_overlap=1.0)
    image = pictures()[0].resize((64, 64))
    model = detector.model
    model.txt_feats, model.model[-1].nc = detector.embeddings(["lion", "zebra"])[None], 2
    with torch.no_grad():
        output = model(fit(image, 64)[0][None])
    (rows,) = non_max_suppression(output, 0.1, 1.0, multi_label=True)
    theirs = [
        Box(["lion", "zebra"][int(row[5])], float(row[4]), *row[:4].clamp(0, 64).tolist()) for row in rows
    ]
    ours = detector.detect([image], [["lion", "zebra"]])[0]
    # The last of the 100 that we keep may tie.
    sure = [[box for box in boxes if box.confidence > ours[-1].confidence + 1e-3] for boxes in (ours, theirs)]
    assert len(sure[0]) > 10 and close(*sure)


def test_identity_follows_what_boxes_depend_on(yolo, owlv2, clip, tmp_path):
    other = tiny_clip(tmp_path / "clip", seed=1)
    made = [
        YoloWorld(yolo),
        YoloWorld(yolo, min_confidence=0.1),
        YoloWorld(yolo, max_overlap=0.6),
        YoloWorld(yolo, clip_model_name_or_path=other),
        Owlv2(owlv2),
        Owlv2(owlv2, template="{}"),
        Owlv2(tiny_owlv2(tmp_path / "owlv2", clip, seed=1)),
    ]
    assert len({detector.identity for detector in made}) == len(made)
    assert YoloWorld(yolo, batch_size=1).identity == made[0].identity
    assert Owlv2(owlv2, batch_size=1).identity == made[4].identity


def test_embeddings_are_filled_up_and_refused_when_too_long(clip):
    embeddings = ClassEmbeddings(clip, template="one {}")
    features = embeddings(["lion", "zebra", "lion"])
    assert features.shape == (3, 512) and not features[:, 16:].any()
    assert torch.allclose(features.norm(dim=-1), torch.ones(3)) and torch.equal(features[0], features[2])
    with pytest.raises(InputError, match="16 numbers, the detector takes 8"):
        ClassEmbeddings(clip, size=8)


def test_which_detector_a_name_is(yolo, owlv2, clip, tmp_path):
    assert isinstance(load_detector(yolo), YoloWorld) and isinstance(load_detector(owlv2), Owlv2)
    with pytest.raises(InputError, match="is a 'clip'; detectors are"):
        load_detector(clip)
    with pytest.raises(InputError, match=r"no model with a config\.json could be .*nothing is there"):
        load_detector(str(tmp_path / "nothing"))
    for name in (load_detector, YoloWorld):
        with pytest.raises(InputError, match=r"is a pickle.*convert_yolo_world\.py"):
            name("yolov8s-worldv2.pt")


def test_a_broken_folder_is_a_clear_error(yolo, tmp_path):
    config = (Path(yolo) / "config.json").read_text()
    with pytest.raises(InputError, match=r"config\.json is not there"):
        YoloWorld(str(tmp_path))
    for bad, said in (
        (config.replace("yolo_world", "clip"), "describes no YOLO-World"),
        (config.replace(": 64", ": 65"), "describes no YOLO-World"),
        (config.replace(": 64", ': "64"'), "describes no YOLO-World: image_size is '64'"),
        ("[]", r"config\.json holds no JSON object but a list"),
        ("{", r"config\.json is no JSON"),
    ):
        (tmp_path / "config.json").write_text(bad)
        with pytest.raises(InputError, match=said):
            YoloWorld(str(tmp_path))
    (tmp_path / "config.json").write_text(config)
    for content in (None, b"not safetensors"):
        if content:
            (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"model\.safetensors is no"):
            YoloWorld(str(tmp_path))


def test_without_ultralytics_the_error_names_the_extra_and_its_license(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics.nn.tasks", None)
    yolo_world.ultralytics_tasks.cache_clear()
    with pytest.raises(InputError, match=r"(?s)prefopt\[ultralytics\].*AGPL-3\.0.*owlv2"):
        YoloWorld("pocket")
    yolo_world.ultralytics_tasks.cache_clear()


def test_ultralytics_touches_neither_network_nor_home_nor_environment(yolo, tmp_path):
    code = f"""
import os, socket
def refused(*_, **__): raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused
from PIL import Image
from prefopt.detectors.yolo_world import YoloWorld
before = dict(os.environ)
YoloWorld({yolo!r}).detect([Image.new("RGB", (9, 9))], [["lion"]])
assert dict(os.environ) == before
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("YOLO_", "XDG_", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Ultralytics" not in done.stdout and not list(tmp_path.rglob("*ltralytics*"))


def converted(source: Path, folder: Path, clip: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "convert_yolo_world.py", source, folder]
    options = ["--clip", clip, "--image_size", "64"]
    return subprocess.run([*command, *options], capture_output=True, text=True)


def test_an_official_checkpoint_converts(clip, tmp_path):
    tasks = yolo_world.ultralytics_tasks()
    torch.manual_seed(0)
    model = tasks.WorldModel("yolov8n-worldv2.yaml", verbose=False).half()
    torch.save({"model": model, "ema": None, "epoch": -1}, tmp_path / "yolov8n-worldv2.pt")
    done = converted(tmp_path / "yolov8n-worldv2.pt", tmp_path / "folder", clip)
    assert done.returncode == 0, done.stderr
    detector = YoloWorld(str(tmp_path / "folder"))
    assert detector.settings == YoloWorldSettings(0.33, 0.25, 1024, image_size=64, clip=clip)
    for name, tensor in model.state_dict().items():
        assert torch.equal(
            detector.model.state_dict()[name], tensor.float() if tensor.is_floating_point() else tensor
        )


class Trap:
    """What runs a command when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_checkpoint_that_holds_more_is_refused_and_not_run(clip, tmp_path):
    torch.save({"model": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "linear.pt")
    for name in ("trap.pt", "plain.pt", "linear.pt", "missing.pt"):
        done = converted(tmp_path / name, tmp_path / "folder", clip)
        assert done.returncode == 2 and f"error: {tmp_path / name} " in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "folder").exists()


def test_ultralytics_leaves_pil_and_torch_as_they_are():
    """Guards against a picture that cannot be read setting off the installation of a package."""
    yolo_world.ultralytics_tasks()
    assert Image.open.__module__ == "PIL.Image" and torch.save.__module__ == "torch.serialization"
