"""The examples of a table of images: encoded once and read from a cache, or encoded in the step."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.diffusion.latents import MIRRORED, Encoder, prepare_candidate
from prefopt.diffusion.tables import Table
from prefopt.draws import Draw, draw, stratified_time
from prefopt.files import content_key, lines_key
from prefopt.store import TensorStore
from prefopt.visits import VisitDataset


class Candidates(VisitDataset):
    """Examples of a table; `dataset[(index, visit)]` is a pure function of both and the seed.

    An example has noise (C, h, w), time (), ranks and mask (k,), item and visit, and p_chosen () if the table
    has it; the best candidate comes first. All candidates share the draw, the sample of the posterior and the
    flip. With `strata`, the seed of the examples' order and the examples of a step, the times of a step are
    spread evenly. k is that of the table's longest list; the last places of a shorter one are empty: rank 0,
    mask False.
    """

    def __init__(
        self,
        table: Table,
        shape: tuple[int, int, int],
        *,
        seed: int,
        flip_probability: float = 0.0,
        drop_probability: float = 0.0,
        strata: tuple[int, int] | None = None,
    ):
        self.table, self.shape, self.seed = table, shape, seed
        self.flip_probability, self.drop_probability = flip_probability, drop_probability
        self.strata = strata
        self.candidates = max(map(len, table.column("ranks")))

    def where(self, index: int) -> str:
        """What an error calls the example `index`."""
        return self.table.where(index)

    def __len__(self) -> int:
        return len(self.table)

    def _draw(self, index: int, visit: int) -> Draw:
        """The example's draw at this visit."""
        chance = draw(
            self.seed,
            index,
            visit,
            shape=self.shape,
            flip_probability=self.flip_probability,
            drop_probability=self.drop_probability,
        )
        if self.strata:
            seed, batch = self.strata
            time = stratified_time(chance.time, seed, index, visit, length=len(self), global_batch=batch)
            chance = chance._replace(time=time)
        return chance

    def _drawn(self, fact: Mapping[str, Any], chance: Draw, index: int, visit: int) -> dict[str, Any]:
        """What an example has beside its images and its prompt."""
        ranks = self._padded([torch.tensor(rank) for rank in fact["ranks"]])
        example = {
            "noise": torch.from_numpy(chance.noise),
            "time": torch.tensor(chance.time),
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


class EncodedCandidates(Candidates):
    """Candidates from stored encodings: examples with latents (k, C, h, w) and conditioning.

    `per_candidate` names conditioning that an image has of its own; `chances` go to Candidates.
    """

    def __init__(
        self,
        table: Table,
        images: TensorStore,
        prompts: TensorStore,
        *,
        scaling: tuple[float, float],
        per_candidate: Sequence[str] = (),
        **chances: Any,
    ):
        first = next(key for keys in table.column("sha256") for key in keys if key in images)
        channels, height, width = images[first]["mean"].shape
        super().__init__(table, (channels, height, width), **chances)
        self.images, self.prompts = images, prompts
        self.scaling, self.per_candidate = scaling, per_candidate

    @property
    def identity(self) -> dict[str, str]:
        """Everything that an example depends on, for what is computed from it and kept."""
        columns = self.table.column("prompt"), self.table.column("sha256")
        rows = lines_key(f"{prompt!r} {keys}" for prompt, keys in zip(*columns, strict=True))
        chances = f"seed {self.seed}, flip {self.flip_probability}, caption drop {self.drop_probability}"
        chances += f", strata {self.strata}" if self.strata else ""
        encodings = {**self.images.identity, **self.prompts.identity, "scaling": str(self.scaling)}
        return {"rows": rows, "draws": chances, **encodings}

    def __getitem__(self, index_and_visit: tuple[int, int]) -> dict[str, Any]:
        index, visit = index_and_visit
        fact, chance = self.table.facts[index], self._draw(index, visit)
        moments = [self.images[key + (MIRRORED if chance.flip else "")] for key in fact["sha256"]]
        latent_noise = torch.from_numpy(chance.latent_noise)
        latents = [latents_of(m["mean"], m["logvar"], latent_noise, self.scaling) for m in moments]
        conditioning = self.prompts[content_key("" if chance.drop_caption else fact["prompt"])]
        conditioning |= {name: self._padded([m[name] for m in moments]) for name in self.per_candidate}
        return {
            "latents": self._padded(latents),
            "conditioning": conditioning,
            **self._drawn(fact, chance, index, visit),
        }


class LiveCandidates(Candidates):
    """Candidates that `EncodeInStep` encodes: examples with pixels (k, 3, H, W) in [-1, 1], latent_noise
    (C, h, w), prompt, and as conditioning what each image has of its own.
    """

    def __init__(self, table: Table, encoder: Encoder, **chances: Any):
        pipeline: Any = encoder.pipeline
        side = encoder.resolution // pipeline.vae_scale_factor
        super().__init__(table, (pipeline.vae.config.latent_channels, side, side), **chances)
        self.resolution, self.per_candidate = encoder.resolution, encoder.family.per_candidate

    def __getitem__(self, index_and_visit: tuple[int, int]) -> dict[str, Any]:
        index, visit = index_and_visit
        fact, chance = self.table.facts[index], self._draw(index, visit)
        images = [
            prepare_candidate(self.table, index, candidate, self.resolution)
            for candidate in range(len(fact["sha256"]))
        ]
        own = {name: self._padded([getattr(one, name) for one in images]) for name in self.per_candidate}
        return {
            "pixels": self._padded([one.pixels.flip(-1) if chance.flip else one.pixels for one in images]),
            "latent_noise": torch.from_numpy(chance.latent_noise),
            "prompt": "" if chance.drop_caption else fact["prompt"],
            "conditioning": own,
            **self._drawn(fact, chance, index, visit),
        }


class EncodeInStep:
    """Makes of a batch of LiveCandidates one of EncodedCandidates."""

    def __init__(self, encoder: Encoder):
        self.encoder, self.scaling = encoder, encoder.family.scaling(encoder.pipeline)

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        rest = dict(batch)
        pixels, texts, noise = rest.pop("pixels"), rest.pop("prompt"), rest.pop("latent_noise")
        unique = list(dict.fromkeys(texts))
        places = torch.tensor([unique.index(text) for text in texts], device=pixels.device)
        with torch.autocast(pixels.device.type, enabled=False):  # the encoders have a precision of their own
            moments = self.encoder.posterior(pixels.flatten(0, 1))
            embedded = self.encoder.embeddings(unique)
        mean, logvar = (moment.unflatten(0, pixels.shape[:2]) for moment in moments)
        conditioning = {name: value[places] for name, value in embedded.items()} | rest["conditioning"]
        latents = latents_of(mean, logvar, noise.unsqueeze(1), self.scaling)
        return {**rest, "latents": latents, "conditioning": conditioning}


def latents_of(mean: Tensor, logvar: Tensor, noise: Tensor, scaling: tuple[float, float]) -> Tensor:
    """A sample of the VAE's posterior, normalised; `noise` is standard normal, `scaling` (shift, factor)."""
    shift, factor = scaling
    return (mean + (0.5 * logvar).exp() * noise - shift) * factor


def encode_candidates(
    encoder: Encoder, table: Table, *, rows: Sequence[int] | None = None, **chances: Any
) -> EncodedCandidates:
    """The table's examples, those of `rows` (default: all) encoded; `chances` go to Candidates."""
    return EncodedCandidates(
        table,
        encoder.images(table, mirrored=chances["flip_probability"] > 0, rows=rows),
        encoder.prompts(table.column("prompt", rows)),
        scaling=encoder.family.scaling(encoder.pipeline),
        per_candidate=encoder.family.per_candidate,
        **chances,
    )
