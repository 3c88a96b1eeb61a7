"""The oracle: reads animal, colour, count and place off a picture. Only evaluation may ask it.

Its four classifiers share one small convolutional network, trained apart from the CLIP model (other seed,
other pictures), so that a policy which learns to please CLIP is found out here.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from prefopt.pocket import folder
from prefopt.pocket.world import ATTRIBUTES, SIZE, Scene, parse


class OracleNetwork(nn.Module):
    """(n, 3, 64, 64) in -1..1 to logits, one (n, values) tensor per attribute."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *channels), channels, strict=False):
            layers += [
                nn.Conv2d(before, after, 3, padding=1),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        # 4 x 4 cells stay apart: how many animals there are is a question of where colour is.
        side = SIZE >> len(channels)
        self.hidden = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels[-1] * side * side, 128), nn.ReLU()
        )
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        hidden = self.hidden(self.features(pixels))
        return {name: head(hidden) for name, head in self.heads.items()}


class Oracle:
    """The trained network behind two questions: what does a picture show, and is that what was asked for?"""

    def __init__(self, network: OracleNetwork, device: str = "cpu", batch_size: int = 64):
        self.network, self.device, self.batch_size = network.float().to(device).eval(), device, batch_size

    @classmethod
    def load(cls, device: str = "cpu", path: Path | None = None) -> "Oracle":
        """The pocket's own oracle, in float32; `path` names another saved one."""
        path = path or folder("oracle")
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        network = OracleNetwork(tuple(config["channels"]))
        network.load_state_dict(load_file(path / "model.safetensors"))
        return cls(network, device)

    @torch.inference_mode()
    def attributes(self, images: list[Image.Image]) -> list[Scene]:
        """The likeliest scene of each picture, whatever its size."""
        scenes: list[Scene] = []
        for start in range(0, len(images), self.batch_size):
            small = [_at_size(image) for image in images[start : start + self.batch_size]]
            pixels = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            best = {
                name: logits.argmax(-1).tolist()
                for name, logits in self.network(pixels.to(self.device)).items()
            }
            scenes += [
                Scene(*(ATTRIBUTES[name][best[name][i]] for name in ATTRIBUTES)) for i in range(len(small))
            ]
        return scenes

    def correct(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """For each attribute, and for `all` of them, a bool per picture: does it show what its prompt says?

        Prompts must be captions of the world (InputError otherwise).
        """
        asked, seen = [parse(prompt) for prompt in prompts], self.attributes(images)
        right = {
            name: np.array(
                [getattr(a, name) == getattr(s, name) for a, s in zip(asked, seen, strict=True)], dtype=bool
            )
            for name in ATTRIBUTES
        }
        right["all"] = np.logical_and.reduce(list(right.values()))
        return right


def _at_size(image: Image.Image) -> np.ndarray:
    image = image.convert("RGB")
    return np.asarray(
        image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.BOX)
    )
