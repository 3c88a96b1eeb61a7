"""The frozen VAE and text encoders: each image and prompt is encoded once, and the result cached on disk.

Cached are the VAE's posterior moments by the image's SHA-256 (mean and log-variance, so that sampling stays
exact; of the mirror image, too, where images are flipped) and the text embeddings by prompt. The crop is the
centre one: it is the same at every visit, so that it can be cached.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from prefopt.diffusion.families import Family
from prefopt.diffusion.tables import Table
from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.images import open_image
from prefopt.progress import Encoding
from prefopt.store import TensorStore, tensors_key

MIRRORED = "-mirrored"
SMALLEST = 16  # pixels of the shorter side under which an image is taken to be broken

Item = TypeVar("Item")
Result = TypeVar("Result")


class Prepared(NamedTuple):
    """An image ready for the VAE."""

    pixels: Tensor  # (3, resolution, resolution), in [-1, 1]
    sizes: Tensor  # (6,) height and width: original, of the crop's top left, and target: SDXL's conditioning


def prepare_image(content: bytes, where: str, resolution: int) -> Prepared:
    """Decode, resize the shorter side to `resolution` and crop the centre.

    SDXL's size conditioning (arXiv 2307.01952, section 2.2) is this image's own. An image that cannot be
    decoded, or whose shorter side is under 16 pixels, is an InputError that says `where`.
    """
    image = open_image(content, where)
    width, height = image.size
    if min(width, height) < SMALLEST:
        raise InputError(f"{where}: an image of {width} x {height} pixels; the shorter side needs {SMALLEST}")
    return prepare_picture(image, resolution)


def prepare_picture(image: Image.Image, resolution: int) -> Prepared:
    """The same of an RGB picture that is open already."""
    width, height = image.size
    scale = resolution / min(width, height)
    resized = image.resize(
        (max(resolution, round(width * scale)), max(resolution, round(height * scale))),
        Image.Resampling.LANCZOS,
    )
    left, top = (resized.width - resolution) // 2, (resized.height - resolution) // 2
    cropped = np.asarray(resized.crop((left, top, left + resolution, top + resolution)), dtype=np.float32)
    pixels = torch.from_numpy(cropped).permute(2, 0, 1) / 127.5 - 1
    return Prepared(
        pixels, torch.tensor([height, width, top, left, resolution, resolution], dtype=torch.float32)
    )


@dataclass
class Encoder:
    """The frozen parts of a pipeline, encoding into stores under `cache_dir`; each process its share."""

    pipeline: DiffusionPipeline
    cache_dir: Path
    resolution: int
    family: Family
    batch_size: int = 8
    threads: int = 4

    @torch.no_grad()
    def images(self, table: Table, *, mirrored: bool, rows: Sequence[int] | None = None) -> TensorStore:
        """The moments of the images of these rows (default: all): `mean`, `logvar` (C, h, w) in float32,
        `sizes` (6,).
        """
        vae = self.pipeline.vae
        identity = {
            "VAE weights": tensors_key(vae.state_dict()),
            "resolution": str(self.resolution),
            "dtype": str(vae.dtype),
        }
        store = TensorStore(self.cache_dir / "images", identity)
        places: dict[str, tuple[int, int]] = {}  # key -> the row and candidate where the image is first seen
        numbers = range(len(table)) if rows is None else rows
        for row, keys in zip(numbers, table.column("sha256", rows), strict=True):
            for candidate, key in enumerate(keys):
                places.setdefault(key, (row, candidate))
        last = MIRRORED if mirrored else ""  # written with the image, so it tells for both
        missing = [key for key in _share(places) if key + last not in store]

        def prepare(key: str) -> Prepared:
            return prepare_candidate(table, *places[key], self.resolution)

        batches = _batched(missing, self.batch_size)
        with ThreadPoolExecutor(self.threads) as pool, Encoding("images", len(missing), store) as told:
            for keys, images in zip(batches, _ahead(pool, prepare, batches), strict=True):
                told.write(self._moments(keys, images, mirrored), len(keys))
        return _shared(store)

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (n, C, h, w), float32, of images (n, 3, H, W) in [-1, 1]."""
        vae: Any = self.pipeline.vae
        moments = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        if not torch.isfinite(moments.mean).all():
            raise InputError(
                f"the VAE makes values that are not finite in {vae.dtype}; use float32 or bfloat16"
            )
        # In the VAE's own memory layout, the last bits of a product with gradients and without would differ.
        return moments.mean.float().contiguous(), moments.logvar.float().contiguous()

    def _moments(
        self, keys: Sequence[str], images: Sequence[Prepared], mirrored: bool
    ) -> dict[str, dict[str, Tensor]]:
        pixels = torch.stack([image.pixels for image in images])
        entries = {}
        for suffix, batch in (("", pixels), (MIRRORED, pixels.flip(-1)))[: 2 if mirrored else 1]:
            means, logvars = (moment.cpu() for moment in self.posterior(batch))
            for key, mean, logvar, image in zip(keys, means, logvars, images, strict=True):
                entries[key + suffix] = {"mean": mean, "logvar": logvar, "sizes": image.sizes}
        return entries

    @torch.no_grad()
    def prompts(self, prompts: Iterable[str]) -> TensorStore:
        """Each prompt and the empty one encoded: `embeddings` (tokens, width), SDXL `pooled` (width,)."""
        family = self.family
        encoders = {name: getattr(self.pipeline, name) for name in family.text_encoders}
        weights = {
            f"{name}.{key}": value
            for name, part in encoders.items()
            for key, value in part.state_dict().items()
        }
        identity = {
            "text encoder weights": tensors_key(weights),
            "tokenizers": _tokenizers_key([getattr(self.pipeline, name) for name in family.tokenizers]),
            "empty prompt": "zeros" if family.empty_is_zeros(self.pipeline) else "encoded",
            "dtype": str(next(iter(encoders.values())).dtype),
        }
        store = TensorStore(self.cache_dir / "prompts", identity)
        texts = {content_key(text): text for text in dict.fromkeys(chain([""], prompts))}
        missing = store.missing(_share(texts))
        with Encoding("prompts", len(missing), store) as told:
            for keys in _batched(missing, self.batch_size):
                values = {name: v.cpu() for name, v in self.embeddings([texts[key] for key in keys]).items()}
                entries = {key: {name: v[i] for name, v in values.items()} for i, key in enumerate(keys)}
                told.write(entries, len(keys))
        return _shared(store)

    @torch.no_grad()
    def embeddings(self, texts: list[str]) -> dict[str, Tensor]:
        """The conditioning of texts by name, each (texts, ...); an empty one as the model samples without."""
        family = self.family
        values = family.encode_prompts(self.pipeline, texts)
        if family.empty_is_zeros(self.pipeline):
            empty = [place for place, text in enumerate(texts) if not text]
            for value in values.values():
                value[empty] = 0
        return values


def prepare_candidate(table: Table, row: int, candidate: int, resolution: int) -> Prepared:
    """An image of a table ready for the VAE; one that has changed since it was hashed is an InputError."""
    content, where = table.image(row, candidate)
    if content_key(content) != table.facts[row]["sha256"][candidate]:
        raise InputError(f"{where}: the image has changed since the table was read; start again")
    return prepare_image(content, where, resolution)


def _tokenizers_key(tokenizers: Iterable[Any]) -> str:
    """What decides a prompt's tokens: vocabulary and rules, length, padding."""
    parts = []
    for tokenizer in tokenizers:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules |= {"padding": None, "truncation": None}  # which every call sets anew
        parts.append([rules, tokenizer.model_max_length, tokenizer.pad_token_id])
    return content_key(json.dumps(parts, sort_keys=True))


def _batched(keys: list[str], size: int) -> list[list[str]]:
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def _share(keys: Iterable[str]) -> list[str]:
    state = PartialState()
    return sorted(keys)[state.process_index :: state.num_processes]


def _shared(store: TensorStore) -> TensorStore:
    PartialState().wait_for_everyone()
    store.refresh()
    return store


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], batches: Iterable[Sequence[Item]]
) -> Iterator[list[Result]]:
    """The function's results for every item of every batch, computed up to two batches ahead."""
    waiting: deque[list[Future[Result]]] = deque()
    for batch in batches:
        waiting.append([pool.submit(function, item) for item in batch])
        if len(waiting) > 2:
            yield [future.result() for future in waiting.popleft()]
    while waiting:
        yield [future.result() for future in waiting.popleft()]
