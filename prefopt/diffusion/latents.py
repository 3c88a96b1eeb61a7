"""Encode once: outputs of the frozen VAE and text encoders are cached on disk, not computed in the step.

Cached are the VAE's posterior moments by the image's SHA-256 (mean and log-variance, so that sampling stays
exact; of the mirror image, too, where images are flipped) and the text embeddings by prompt. The crop is the
centre one: it is the same at every visit, so that it can be cached.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from prefopt.diffusion.families import Family, family_of
from prefopt.diffusion.tables import Table
from prefopt.draws import draw, stratified_time
from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.images import open_image
from prefopt.store import TensorStore, tensors_key
from prefopt.visits import VisitDataset

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
    family: Family | None = None  # by default the pipeline's
    batch_size: int = 8
    threads: int = 4

    def __post_init__(self) -> None:
        self.family = self.family or family_of(self.pipeline)

    @torch.no_grad()
    def images(self, table: Table, *, mirrored: bool) -> TensorStore:
        """The moments of every image of the table: `mean`, `logvar` (C, h, w) in float32, `sizes` (6,)."""
        vae = self.pipeline.vae
        identity = {
            "VAE weights": tensors_key(vae.state_dict()),
            "resolution": str(self.resolution),
            "dtype": str(vae.dtype),
        }
        store = TensorStore(self.cache_dir / "images", identity)
        places = {}  # key -> the row and candidate where the image is first seen
        for row, keys in enumerate(table.column("sha256")):
            for candidate, key in enumerate(keys):
                places.setdefault(key, (row, candidate))
        last = MIRRORED if mirrored else ""  # written with the image, so it tells for both
        missing = [key for key in _share(places) if key + last not in store]

        def prepare(key: str) -> Prepared:
            row, candidate = places[key]
            content, where = table.image(row, candidate)
            if content_key(content) != key:
                raise InputError(f"{where}: the image has changed since the table was read; start again")
            return prepare_image(content, where, self.resolution)

        batches = _batched(missing, self.batch_size)
        with ThreadPoolExecutor(self.threads) as pool, _progress(len(missing), "encoding images") as bar:
            for keys, images in zip(batches, _ahead(pool, prepare, batches), strict=True):
                store.write(self._moments(keys, images, mirrored))
                bar.update(len(keys))
        return _shared(store)

    def _moments(
        self, keys: Sequence[str], images: Sequence[Prepared], mirrored: bool
    ) -> dict[str, dict[str, Tensor]]:
        vae = self.pipeline.vae
        pixels = torch.stack([image.pixels for image in images]).to(vae.device, vae.dtype)
        entries = {}
        for suffix, batch in (("", pixels), (MIRRORED, pixels.flip(-1)))[: 2 if mirrored else 1]:
            moments = vae.encode(batch).latent_dist
            for i, (key, image) in enumerate(zip(keys, images, strict=True)):
                mean, logvar = moments.mean[i].float().cpu(), moments.logvar[i].float().cpu()
                if not torch.isfinite(mean).all():
                    raise InputError(
                        f"the VAE makes values that are not finite in {vae.dtype}; use float32 or bfloat16"
                    )
                entries[key + suffix] = {"mean": mean, "logvar": logvar, "sizes": image.sizes}
        return entries

    @torch.no_grad()
    def prompts(self, prompts: Iterable[str]) -> TensorStore:
        """Each prompt and the empty one encoded: `embeddings` (tokens, width), SDXL `pooled` (width,)."""
        family: Any = self.family
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
        texts = {content_key(text): text for text in dict.fromkeys(["", *prompts])}
        missing = store.missing(_share(texts))
        with _progress(len(missing), "encoding prompts") as bar:
            for keys in _batched(missing, self.batch_size):
                store.write(self._embeddings(keys, [texts[key] for key in keys]))
                bar.update(len(keys))
        return _shared(store)

    def _embeddings(self, keys: Sequence[str], texts: list[str]) -> dict[str, dict[str, Tensor]]:
        family: Any = self.family
        values, zeros = family.encode_prompts(self.pipeline, texts), family.empty_is_zeros(self.pipeline)
        return {
            key: {
                name: (value[i] * 0 if zeros and not text else value[i]).cpu()
                for name, value in values.items()
            }
            for i, (key, text) in enumerate(zip(keys, texts, strict=True))
        }


class EncodedCandidates(VisitDataset):
    """Examples of a table from its stored encodings; `dataset[(index, visit)]` is a pure function of both and
    the seed.

    An example is latents (k, C, h, w) with the best candidate first, noise (C, h, w), time (), conditioning,
    ranks and mask (k,), item and visit, and p_chosen () if the table has it. All candidates share the draw,
    the sample of the posterior and the flip. `per_candidate` names conditioning that an image has of its own.
    With `strata`, the seed of the examples' order and the examples of a step, the times of a step are spread
    evenly. k is that of the table's longest list; the last places of a shorter one are empty: rank 0, mask
    False.
    """

    def __init__(
        self,
        table: Table,
        images: TensorStore,
        prompts: TensorStore,
        *,
        scaling: tuple[float, float],
        per_candidate: Sequence[str] = (),
        seed: int,
        flip_probability: float = 0.0,
        drop_probability: float = 0.0,
        strata: tuple[int, int] | None = None,
    ):
        self.table, self.images, self.prompts = table, images, prompts
        self.scaling, self.per_candidate, self.seed = scaling, per_candidate, seed
        self.flip_probability, self.drop_probability = flip_probability, drop_probability
        self.strata = strata
        first = images[table.facts[0]["sha256"][0]]["mean"]
        channels, height, width = first.shape
        self.shape = (channels, height, width)
        self.candidates = max(map(len, table.column("ranks")))

    @property
    def identity(self) -> dict[str, str]:
        """Everything that an example depends on, for what is computed from it and kept."""
        prompts, hashes = self.table.column("prompt"), self.table.column("sha256")
        facts = "\n".join(f"{prompt!r} {keys}" for prompt, keys in zip(prompts, hashes, strict=True))
        chances = f"seed {self.seed}, flip {self.flip_probability}, caption drop {self.drop_probability}"
        chances += f", strata {self.strata}" if self.strata else ""
        encodings = {**self.images.identity, **self.prompts.identity, "scaling": str(self.scaling)}
        return {"rows": content_key(facts), "draws": chances, **encodings}

    def where(self, index: int) -> str:
        """What an error calls the example `index`."""
        return self.table.where(index)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index_and_visit: tuple[int, int]) -> dict[str, Any]:
        index, visit = index_and_visit
        fact = self.table.facts[index]
        chance = draw(
            self.seed,
            index,
            visit,
            shape=self.shape,
            flip_probability=self.flip_probability,
            drop_probability=self.drop_probability,
        )
        time = chance.time
        if self.strata:
            seed, batch = self.strata
            time = stratified_time(time, seed, index, visit, length=len(self), global_batch=batch)
        moments = [self.images[key + (MIRRORED if chance.flip else "")] for key in fact["sha256"]]
        latent_noise, (shift, factor) = torch.from_numpy(chance.latent_noise), self.scaling
        latents = [m["mean"] + (0.5 * m["logvar"]).exp() * latent_noise for m in moments]
        conditioning = self.prompts[content_key("" if chance.drop_caption else fact["prompt"])]
        conditioning |= {name: self._padded([m[name] for m in moments]) for name in self.per_candidate}
        ranks = self._padded([torch.tensor(rank) for rank in fact["ranks"]])
        example = {
            "latents": self._padded([(one - shift) * factor for one in latents]),
            "noise": torch.from_numpy(chance.noise),
            "time": torch.tensor(time),
            "conditioning": conditioning,
            "ranks": ranks,
            "mask": ranks > 0,
            "item": index,
            "visit": visit,
        }
        if self.table.soft_labels:
            example["p_chosen"] = torch.tensor(fact["p_chosen"], dtype=torch.float32)
        return example

    def _padded(self, values: list[Tensor]) -> Tensor:
        """The values of an example's candidates, (k, ...)."""
        return torch.stack(values + [torch.zeros_like(values[0])] * (self.candidates - len(values)))


def encode_table(
    pipeline: Any, family: Family, table: Table, *, cache_dir: Path, resolution: int, **chances: Any
) -> EncodedCandidates:
    """The table's examples, encoded by the pipeline's frozen parts; `chances` go to EncodedCandidates."""
    encoder = Encoder(pipeline, cache_dir, resolution, family)
    return EncodedCandidates(
        table,
        encoder.images(table, mirrored=chances["flip_probability"] > 0),
        encoder.prompts(table.facts.unique("prompt")),
        scaling=family.scaling(pipeline),
        per_candidate=family.per_candidate,
        **chances,
    )


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


def _progress(total: int, what: str) -> tqdm:
    return tqdm(total=total, desc=what, disable=total == 0 or not PartialState().is_local_main_process)


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
