"""The passes of a discriminator's images: real ones are stored, others generated from their captions.

Both come through one codec, so that nothing but what they show tells them apart: a real image gets the size
of the generated ones, passes once through the VAE that decodes these, and is stored by the same function, in
the same lossless format.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from data_builders.engine.blocks import ImageBlocks
from data_builders.engine.passes import ModelPass
from data_builders.engine.stages import (
    INVALID,
    Group,
    Pair,
    Record,
    batched,
    counted,
    flow,
    in_threads,
    is_valid,
    mark_invalid,
)
from data_builders.images.generation import GenerateImages, candidate_seed, encode
from data_builders.images.real import RealImages
from data_builders.prompts.captions import REAL, Source
from prefopt.diffusion.generator import Generator
from prefopt.diffusion.latents import prepare_image
from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.loading import Lazy, load_part, load_parts, own_memory
from prefopt.model_files import CONFIG_FILE, MODEL_FILE, read_config

BROKEN, TOO_SMALL = "broken image", "smaller than the generated images"

# Real images


def native_side(generator: Generator) -> int:
    """The pixels of a side of the images that a model generates unless told otherwise."""
    folder = generator.folder
    for name in ("unet", "transformer"):
        parts = [folder / part for part in (name, "vae")]
        if all((part / CONFIG_FILE).is_file() for part in parts):
            network, vae = map(read_config, parts)
            if isinstance(side := network.get("sample_size"), int) and "block_out_channels" in vae:
                return side * 2 ** (len(vae["block_out_channels"]) - 1)
    raise InputError(f"{generator.model} does not say how large its images are; give --height and --width")


def token_limit(generator: Generator) -> Callable[[str], bool]:
    """Whether each of a model's text encoders reads the whole of a text."""
    folder = generator.folder
    parts = read_config(folder, MODEL_FILE)
    tokenizers: list[Any] = [
        load_part(AutoTokenizer, folder / part, "tokenizer", trust_remote_code=False)
        for part in sorted(parts)
        if part.startswith("tokenizer") and (folder / part).is_dir()
    ]
    return lambda text: all(
        len(one(text, truncation=False, verbose=False).input_ids) <= one.model_max_length
        for one in tokenizers
    )


class Codec:
    """A generator's VAE: from pixels in [-1, 1] to what its decoder makes of their latents."""

    def __init__(self, generator: Generator, device: torch.device):
        folder = generator.folder
        index: Any = DiffusionPipeline.load_config(folder)
        if "vae" not in index:
            raise InputError(
                f"{generator.model} has no VAE to pass real images through; give --no_through_vae"
            )
        dtype = getattr(torch, generator.dtype)
        vae = load_parts({"vae": index["vae"]}, folder, dtype, generator.variant)["vae"]
        # As pipelines do that generate in float16 with a VAE that overflows there.
        overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast")
        self.vae: Any = own_memory(vae.float() if overflows else vae).eval().to(device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> np.ndarray:
        """(n, height, width, 3) in 0..1, of pixels (n, 3, height, width)."""
        latents = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        decoded = self.vae.decode(latents, return_dict=False)[0]
        return np.asarray(VaeImageProcessor().postprocess(decoded, output_type="np"))


def lazy_codec(generator: Generator, device: torch.device) -> Lazy[Codec]:
    """A generator's codec; its identity is that of the model's files and its precision."""
    identity = f"VAE of {generator.weights['model']} in {generator.dtype}"
    return Lazy(identity, partial(Codec, generator, device))


class StoreRealImages(ModelPass[Codec]):
    """Resizes real images to squares, passes them through a codec (None: through none), and stores them.

    They are resized as in training (LANCZOS, the shorter side, then the centre), and stored by the same
    function as generated images. A broken image is stored as an invalid row, and so is one that would have
    to be enlarged: a blur would tell it from generated ones.
    """

    name, unit = "storing real images", "image"

    def __init__(
        self,
        codec: Lazy[Codec] | None,
        real: RealImages,
        folder: Path,
        *,
        side: int,
        batch_size: int,
        block_size: int,
    ):
        super().__init__(codec or Lazy("no VAE", lambda: None))  # pyright: ignore[reportArgumentType]
        self.real, self.side, self.batch_size, self.plain = real, side, batch_size, codec is None
        identity = {"codec": self.identity, "side": side, "batch_size": batch_size, "block_size": block_size}
        # A block is known by its prompts; that of a real image is its content.
        records = [record | {"prompt": record["prompt_id"]} for record in real.records]
        self.blocks = ImageBlocks(folder, identity, records, block_size)

    def todo(self, block: int) -> int:
        """The images of a block that is not written."""
        place = self.blocks[block]
        return 0 if place.file.exists() else len(place.prompts)

    def work(self, block: int, bar: tqdm) -> None:
        """Store a block, whole."""
        place, ahead = self.blocks[block], 2 * self.batch_size
        stages = [
            in_threads(self._prepare, threads=4, ahead=ahead),
            self._through_codec,
            in_threads(lambda row: encode(row) if is_valid(row) else row, threads=4, ahead=ahead),
            counted(bar),
        ]
        self.blocks.write(place, flow(place.prompts, stages))

    def _prepare(self, record: Record) -> Record:
        record, where = record | {INVALID: "", "candidate": 0}, self.real.where(record["item"])
        content = self.real.content(record["item"])
        if content_key(content) != record["prompt_id"]:
            raise InputError(f"{where}: the image has changed since the table was read; start again")
        try:
            pixels, sizes = prepare_image(content, where, self.side)
        except InputError:
            return mark_invalid(record, BROKEN)
        if sizes[:2].min() < self.side:
            return mark_invalid(record, TOO_SMALL)
        return record | {"tensor": pixels}

    def _through_codec(self, records: Iterable[Record]) -> Iterator[Record]:
        for batch in batched(records, self.batch_size):
            start, sound = perf_counter(), [record for record in batch if is_valid(record)]
            arrays: Iterator[np.ndarray] = iter(())
            if sound:
                pixels = torch.stack([record["tensor"] for record in sound])
                self.calls += 0 if self.plain else len(sound)
                arrays = iter(self._plain(pixels) if self.plain else self.model(pixels))
            seconds = (perf_counter() - start) / len(batch)
            for record in batch:
                rest = {name: value for name, value in record.items() if name != "tensor"}
                yield rest | ({"pixels": next(arrays), "seconds": seconds} if is_valid(record) else {})

    @staticmethod
    def _plain(pixels: Tensor) -> np.ndarray:
        return (pixels / 2 + 0.5).permute(0, 2, 3, 1).numpy()


class StoredImages:
    """The valid stored images in blocks, as a vision-language model is asked about them."""

    def __init__(self, stored: ImageBlocks, question: str):
        self.stored = stored
        self.prompt = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.strip()}]}
        ]
        self.blocks = [
            [
                self.asked(row) | {"block": block.index}
                for row in filter(is_valid, stored.rows(block, images=False))
            ]
            for block in stored.blocks
        ]
        self._open: tuple[int, dict[str, bytes]] = -1, {}

    def asked(self, row: Record) -> Record:
        """What the answer about a stored image is kept by."""
        about = content_key(json.dumps([row["pixels_sha256"], self.prompt]))
        return {"prompt": self.prompt, "prompt_id": about, "pixels_sha256": row["pixels_sha256"]}

    def images(self, record: Record) -> list[Image.Image]:
        """The picture of a record."""
        if self._open[0] != record["block"]:
            rows = filter(is_valid, self.stored.rows(self.stored[record["block"]]))
            self._open = record["block"], {row["pixels_sha256"]: row["image"]["bytes"] for row in rows}
        return [Image.open(io.BytesIO(self._open[1][record["pixels_sha256"]])).convert("RGB")]


# Generated images


class GenerateFromCaptions(GenerateImages):
    """Generates one image for each captioned real image, by a source; two images of one caption differ."""

    def __init__(
        self,
        source: Source,
        side: int,
        records: Sequence[Record],
        work: Path,
        *,
        seed: int,
        batch_size: int,
        block_size: int,
        device: Any,
    ):
        sampler = replace(source.generator.sampler, height=side, width=side)
        generator, self.source = replace(source.generator, sampler=sampler), source
        identity = generator.identity | {"seed": seed, "batch_size": batch_size, "block_size": block_size}
        # A block is known by its prompts: here by image and caption, for the seed depends on the image.
        prompts = [
            {
                "prompt": f"{record['prompt_id']} {record[source.caption]}",
                "prompt_id": record["prompt_id"],
                "caption": record[source.caption],
            }
            for record in records
            if is_valid(record)
        ]
        blocks = ImageBlocks(work / f"generated-{source.name}", identity, prompts, block_size)
        name = f"generating {source.name}"
        super().__init__(name, generator, [0], blocks, seed=seed, batch_size=batch_size, device=device)

    def candidates(self, records: Iterable[Record]) -> Iterator[Record]:
        """One of each, with a seed that depends on image and source."""
        for record in records:
            seed = candidate_seed(self.seed, f"{record['prompt_id']} {self.source.name}", 0)
            yield record | {"prompt": record["caption"], "candidate": 0, "seed": seed}

    def rows(self) -> Iterator[Record]:
        """All images, in the order of the records."""
        return (row for block in self.blocks.blocks for row in self.blocks.rows(block))


def grade(
    captioned: Iterable[Record], stored: ImageBlocks, passes: Sequence[GenerateFromCaptions]
) -> Iterator[Group]:
    """Each real image, of rank 1, with those generated from its captions; the last source's has rank 2."""
    generated = [each.rows() for each in passes]
    rows = (row for block in stored.blocks for row in stored.rows(block))
    for about, row in zip(captioned, rows, strict=True):
        candidates: list[Record] = [row | about | {"source": REAL, "caption": "", "candidate": 0, "rank": 1}]
        for number, (each, made) in enumerate(zip(passes, generated, strict=True), start=1):
            if is_valid(about):
                image = next(made)
                its_own = {"source": each.source.name, "caption": image["prompt"], "candidate": number}
                its_own |= {INVALID: image[INVALID], "rank": len(passes) + 2 - number}
                candidates.append(image | about | its_own)
        valid = [one for one in candidates if is_valid(one)]
        pairs = [Pair(valid[0], other, float(other["rank"] - 1)) for other in valid[1:]]
        ranked = sorted(valid, key=lambda one: one["rank"]) if pairs else []
        yield Group([one if is_valid(one) else one | {"rank": None} for one in candidates], ranked, pairs)
