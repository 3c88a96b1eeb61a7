"""Trains the YOLO-World on boxes of renders and of their VAE copies, each asked for classes of its own.

The network and its loss (task-aligned assignment, as in YOLOv8) are ultralytics'; the text is the pocket
CLIP's, which stays as it is.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from prefopt.detectors import Detector
from prefopt.detectors.text import ClassEmbeddings
from prefopt.detectors.yolo_world import YoloWorld, YoloWorldSettings, build, predict, ultralytics_tasks
from prefopt.diffusion.generator import Sampler
from prefopt.diffusion.sampling import load_pipeline, sample
from prefopt.pocket.drawing import ANIMALS
from prefopt.pocket.oracle import Oracle
from prefopt.pocket.world import SIZE, Scene, caption, held_out_scenes, parse, render
from pretraining.boxes import boxes, mean_average_precision
from pretraining.common import Run, Training, fresh_items, to_images, to_tensor
from pretraining.pictures import copy_through
from pretraining.text_to_image import SAMPLING

# Half as large again as the pictures: at their own size, small animals would be two places wide.
SETTINGS = YoloWorldSettings(0.33, 0.25, 256, image_size=96, clip="pocket", template="one {}")
CONFIDENT = 0.6  # the builder's threshold
_PRESENT = 0.6  # the share of pictures that are asked for their animal, unless for all four
_VISIBLE = 0.4  # the share of a box that must stay in the picture for it to count
_GAINS = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)


@dataclass
class Pool:
    """Training scenes with a render of each, the VAE's copy of it, and the animals' boxes."""

    scenes: list[Scene]
    renders: Tensor  # (n, 3, 64, 64) in -1..1
    copies: Tensor  # (n, 3, 64, 64) in -1..1
    boxes: list[Tensor]  # (count, 4): left, top, right, bottom in -1..1


def make_pool(seed: int, size: int, vae: Any) -> Pool:
    """`size` renders of training scenes, and copies with latent noise of up to 0.25."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2**31])
    items = fresh_items(rng, size)
    renders = to_tensor([render(*item) for item in items])
    copies = [copy_through(vae, some, 0.25 * rng.random()) for some in renders.split(100)]
    edges = [torch.tensor([box[2:] for box in boxes(*item)]) / (SIZE / 2) - 1 for item in items]
    return Pool([scene for scene, _ in items], renders, torch.cat(copies), edges)


def train(run: Run, pool: Pool, stop: int) -> Any:
    """The network with averaged weights, in float32, after `stop` of the schedule's steps."""
    torch.manual_seed(run.seed)
    model = build(SETTINGS)
    model.args = _GAINS
    losses = {}
    for number in range(1, len(ANIMALS) + 1):
        model.model[-1].nc = number
        losses[number] = ultralytics_tasks().v8DetectionLoss(model)
    embed = ClassEmbeddings(SETTINGS.clip, template=SETTINGS.template)
    training = Training(run, torch.nn.ModuleDict({"yolo_world": model}))
    for rng in training.batches():
        if training.step >= stop:
            break
        items = rng.integers(len(pool.scenes), size=run.batch)
        number = int(rng.integers(1, len(ANIMALS) + 1))
        pixels, edges = _moved(pool, rng, items)
        asked = [_asked(rng, pool.scenes[i].animal, number) for i in items]
        targets = _targets([pool.scenes[i].animal for i in items], asked, edges)
        text = torch.stack([embed(names) for names in asked])
        loss, parts = losses[number](predict(model, _shaded(pixels, rng), text), targets)
        training.update(loss.sum() / run.batch, **{name: float(part) for name, part in parts.items()})
    training.finished()
    return model


def _asked(rng: np.random.Generator, animal: str, number: int) -> list[str]:
    """`number` classes to look for in a picture of `animal`."""
    others = list(rng.permutation([name for name in ANIMALS if name != animal]))
    present = number > len(others) or rng.random() < _PRESENT
    return [str(name) for name in rng.permutation([animal, *others][:number] if present else others[:number])]


def _targets(animals: list[str], asked: list[list[str]], edges: list[Tensor]) -> dict[str, Tensor]:
    """The boxes of a batch as the loss wants them: image, class, centre and size in 0..1."""
    rows = []
    for image, (animal, names, corners) in enumerate(zip(animals, asked, edges, strict=True)):
        if animal in names:
            low, high = (corners[:, :2] + 1) / 2, (corners[:, 2:] + 1) / 2
            who = torch.tensor([[image, names.index(animal)]]).expand(len(corners), 2)
            rows.append(torch.cat([who, (low + high) / 2, high - low], dim=1))
    table = torch.cat([torch.zeros(0, 6), *rows])
    return {"batch_idx": table[:, 0], "cls": table[:, 1], "bboxes": table[:, 2:]}


def _moved(pool: Pool, rng: np.random.Generator, items: np.ndarray) -> tuple[Tensor, list[Tensor]]:
    """Pictures (n, 3, side, side) in -1..1, mirrored, zoomed and shifted by luck, and their boxes.

    A place p of the picture was at zoom * p + shift; half of the pictures are copies.
    """
    n = len(items)
    chosen = torch.from_numpy(items)
    copied = torch.from_numpy(rng.random(n) < 0.5)[:, None, None, None]
    pixels = torch.where(copied, pool.copies[chosen], pool.renders[chosen])
    zoom = np.exp(rng.uniform(-0.25, 0.25, size=(n, 1))) * np.where(rng.random((n, 2)) < (0.5, 0), -1, 1)
    matrix = np.zeros((n, 2, 3), dtype=np.float32)
    matrix[:, 0, 0], matrix[:, 1, 1] = zoom.T
    matrix[:, :, 2] = rng.uniform(-0.2, 0.2, size=(n, 2))
    side = SETTINGS.image_size
    grid = affine_grid(torch.from_numpy(matrix), [n, 3, side, side], align_corners=False)
    moved = grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved, [_carried(pool.boxes[i], transform) for i, transform in zip(items, matrix, strict=True)]


def _carried(edges: Tensor, transform: np.ndarray) -> Tensor:
    """Boxes in the moved picture, cut at its edges; those mostly outside are gone."""
    zoom, shift = torch.from_numpy(np.diag(transform[:, :2]).copy()), torch.from_numpy(transform[:, 2])
    corners = (edges.view(-1, 2, 2) - shift) / zoom
    low, high = corners.amin(1), corners.amax(1)
    cut_low, cut_high = low.clamp(-1, 1), high.clamp(-1, 1)
    seen = (cut_high - cut_low).prod(1) >= _VISIBLE * (high - low).prod(1)
    return torch.cat([cut_low, cut_high], dim=1)[seen]


def _shaded(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Lighter, darker, noisier by luck; from -1..1 to 0..1."""

    def draws(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, size=(len(pixels), channels, 1, 1)).astype(np.float32))

    noise = draws(0, 0.12) * torch.randn_like(pixels)
    return ((pixels * draws(0.85, 1.1) + draws(-0.08, 0.08, 3) + noise).clamp(-1, 1) + 1) / 2


def save(model: Any, path: Path) -> None:
    """config.json and model.safetensors (float16), as `YoloWorld` reads them."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(SETTINGS.to_json(), encoding="utf-8")
    tensors = {
        k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()
    }
    save_file(tensors, path / "model.safetensors")


def quality(vae: Any) -> dict[str, Any]:
    """What the saved detector finds on held-out renders, their copies, and pictures that the pocket draws."""
    detector = YoloWorld()
    items = [(scene, 4_000 + i) for i, scene in enumerate(held_out_scenes())]
    images, truth = [render(*item) for item in items], [boxes(*item) for item in items]
    copies = to_images(copy_through(vae, to_tensor(images)))
    every = [list(ANIMALS)] * len(items)
    return {
        "held_out_renders_map50": mean_average_precision(detector.detect(images, every), truth),
        "held_out_vae_copies_map50": mean_average_precision(detector.detect(copies, every), truth),
        "generated": drawn_quality(detector, *drawn()),
    }


def drawn() -> tuple[list[Image.Image], list[str]]:
    """Pictures that the pocket draws of every second held-out scene, and their prompts."""
    prompts = [caption(scene, i) for i, scene in enumerate(held_out_scenes()[::2])]
    pictures = sample(
        load_pipeline("pocket"), prompts, range(len(prompts)), Sampler(**SAMPLING), batch_size=60
    )
    return list(pictures), prompts


def drawn_quality(detector: Detector, images: list[Image.Image], prompts: list[str]) -> dict[str, float]:
    """The builder's question, one class from a confidence of 0.6, against what the oracle sees.

    `found`: the prompt's animal, where the oracle sees it; `found_wrongly`: another animal than the oracle
    sees; `counted`: as many boxes as the oracle counts, where it sees the prompt's animal and count.
    """
    asked, seen = [parse(prompt) for prompt in prompts], Oracle.load().attributes(images)
    there = np.array([a.animal == s.animal for a, s in zip(asked, seen, strict=True)])
    exact = there & np.array([a.count == s.count for a, s in zip(asked, seen, strict=True)])
    absent = [ANIMALS[(ANIMALS.index(scene.animal) + 1) % len(ANIMALS)] for scene in seen]
    counts, wrong = (
        np.array(
            [sum(box.confidence >= CONFIDENT for box in found) for found in detector.detect(images, names)]
        )
        for names in ([[scene.animal] for scene in asked], [[name] for name in absent])
    )
    return {
        "pictures": len(images),
        "seen_by_oracle": float(there.mean()),
        "found": float((counts > 0)[there].mean()),
        "found_wrongly": float((wrong > 0).mean()),
        "counted": float((counts == [scene.count for scene in seen])[exact].mean()),
    }
