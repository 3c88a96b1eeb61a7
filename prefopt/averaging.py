"""Exact averages of LoRA adapters: of their updates scaling * B A, never of A and B apart.

The average of n adapters on one layer is

    sum_i w_i s_i B_i A_i        s_i = alpha_i / r_i, or alpha_i / sqrt(r_i) with rsLoRA

Side by side, B = [w_1 s_1 B_1, ..., w_n s_n B_n] and A = [A_1; ...; A_n] are this sum, at the sum of the
ranks. The best approximation of a smaller rank (Eckart and Young, 1936) needs no d_out x d_in matrix: with
B = Q R and A^T = Q' R', the singular values of B A are those of the small R R'^T.

Averaging A and B apart gives other updates: (A_1 + A_2) (B_1 + B_2) has cross terms that no adapter has.

Weights trained in full (`modules_to_save`) are averaged, too, which is as exact because the weights sum
to 1: the average of W + D_i is W plus the average of D_i.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefopt.adapter_files import AdapterFile, check_alike, read_adapter, write_adapter
from prefopt.errors import InputError

# The mathematics


class Update(NamedTuple):
    """A change of one layer's weight: scale * B A."""

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    scale: float = 1.0


class Energy(NamedTuple):
    """Sums of squared singular values, which are squared Frobenius norms."""

    kept: float
    total: float

    @property
    def share(self) -> float:
        """Kept over total, in [0, 1]; 1 for an update of zero."""
        return self.kept / self.total if self.total else 1.0


def concatenate(updates: Sequence[Update]) -> Update:
    """The exact sum of updates, in float64, of scale 1 and of the sum of the ranks."""
    A = torch.cat([update.A.double() for update in updates])
    B = torch.cat([update.B.double() * update.scale for update in updates], dim=1)
    return Update(A, B)


def squared_norm(update: Update) -> float:
    """The squared Frobenius norm of an update, from the r x r Gram matrices of its factors."""
    A, B = update.A.double(), update.B.double() * update.scale
    return ((A @ A.T) * (B.T @ B)).sum().item()


def truncate(update: Update, rank: int) -> tuple[Update, Energy]:
    """The update of at most this rank that is nearest in the Frobenius norm, and the energy it keeps.

    The result, in float64, has scale 1 and shares the singular values evenly between A and B. Memory and
    time grow with (d_in + d_out) r^2: no d_out x d_in matrix is made.
    """
    left, upper = torch.linalg.qr(update.B.double() * update.scale)
    right, lower = torch.linalg.qr(update.A.double().T)
    U, S, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = S[:rank].sqrt()
    best = Update((root[:, None] * Vh[:rank]) @ right.T, left @ (U[:, :rank] * root))
    return best, Energy(S[:rank].square().sum().item(), S.square().sum().item())


# Files


class Average(NamedTuple):
    """What was written."""

    file: Path
    size: int  # bytes
    weights: tuple[float, ...]
    rank: int  # the largest, if a pipeline's components have different ones
    energy: float  # the share of all squared singular values that is kept: 1 when exact
    layers: dict[str, float]  # the same by layer


def average_adapters(
    adapters: Sequence[str | Path],
    output_dir: str | Path,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> Average:
    """Write the weighted average of LoRA adapters as one adapter, exactly or as the best of a smaller rank.

    `adapters`: folders or hub ids in peft's format, or files (their folders) that diffusers' pipelines load.
    `weights`: one for each, finite, of any sign, summing to 1; by default equal. `rank`: of the average; by
    default the sum of the adapters' ranks, which is exact.

    The average is in the same format, with the first one's config, alpha = r and no dropout. Layers of a
    smaller rank are filled up with zeros, since not every reader knows rank patterns. Computed in float64
    and rounded once to the adapters' dtype, or to float32 if they differ. What cannot be averaged is an
    InputError: see `adapter_files`.
    """
    files = [read_adapter(adapter) for adapter in adapters]
    shares = _checked_weights(files, weights)
    check_alike(files)
    first, tensors, energies = files[0], {}, {}
    if held := [file.name for file in files if file.path.parent.resolve() == Path(output_dir).resolve()]:
        raise InputError(f"{output_dir} holds the adapter {held[0]}; name another folder for the average")
    ranks = _ranks(files, rank)
    for layer in first.pairs:
        size = ranks[first.component(layer)]
        factors, energies[layer] = _average_layer(files, shares, layer, rank, size)
        tensors |= factors
    for name in first.whole:
        tensors[name] = _average_whole(files, shares, name)
    file = write_adapter(first, output_dir, tensors, ranks)
    total = Energy(*(sum(part) for part in zip(*energies.values(), strict=True)))
    layers = {layer: energy.share for layer, energy in energies.items()}
    return Average(file, file.stat().st_size, shares, max(ranks.values()), total.share, layers)


def _checked_weights(files: Sequence[AdapterFile], weights: Sequence[float] | None) -> tuple[float, ...]:
    if not files:
        raise InputError("no adapters to average; name at least one")
    if weights is None:
        return (1 / len(files),) * len(files)
    if len(weights) != len(files):
        raise InputError(f"{len(weights)} weights for {len(files)} adapters; give one for each")
    total = math.fsum(weights)
    if not all(map(math.isfinite, weights)) or not math.isclose(total, 1, abs_tol=1e-6):
        raise InputError(
            f"the weights {', '.join(map(str, weights))} sum to {total}; an average's are finite and sum to 1"
        )
    return tuple(weights)


def _ranks(files: Sequence[AdapterFile], rank: int | None) -> dict[str, int]:
    """The rank that each component's layers are written with."""
    exact: dict[str, int] = {}
    for layer in files[0].pairs:
        part = files[0].component(layer)
        exact[part] = max(exact.get(part, 0), sum(file.rank(layer) for file in files))
    most = max(exact.values())
    if rank is not None and not 1 <= rank <= most:
        raise InputError(f"the rank is {rank}; it is in [1, {most}], and without one the average is exact")
    return {part: min(rank or most, size) for part, size in exact.items()}


def _average_layer(
    files: Sequence[AdapterFile], weights: Sequence[float], layer: str, rank: int | None, size: int
) -> tuple[dict[str, Tensor], Energy]:
    """The two tensors of a layer's average, filled up to rank `size`, by name, and the energy kept."""
    pairs = [tuple(file.tensor(name) for name in file.pairs[layer]) for file in files]
    # A convolution's factors, (r, d_in, h, w) and (d_out, r, 1, 1), are matrices of d_in * h * w columns.
    exact = concatenate(
        [
            Update(A.flatten(1), B.flatten(1), weight * file.scaling(layer))
            for (A, B), weight, file in zip(pairs, weights, files, strict=True)
        ]
    )
    norm = squared_norm(exact)
    update, energy = truncate(exact, rank) if rank is not None else (exact, Energy(norm, norm))
    missing = size - len(update.A)
    A, B = pairs[0]
    first, second = files[0].pairs[layer]
    values = {
        first: pad(update.A, (0, 0, 0, missing)).unflatten(1, A.shape[1:]),
        second: pad(update.B, (0, missing)).reshape(len(B), size, *B.shape[2:]),
    }
    factors = zip(values.items(), zip(*pairs, strict=True), strict=True)
    return {name: _rounded(value, inputs, name) for (name, value), inputs in factors}, energy


def _average_whole(files: Sequence[AdapterFile], weights: Sequence[float], name: str) -> Tensor:
    """The average of weights that were trained in full; counters and the like have to be equal."""
    values = [file.tensor(name) for file in files]
    if all(torch.equal(value, values[0]) for value in values):
        return values[0]
    if not all(value.is_floating_point() for value in values):
        raise InputError(f"{name} is {values[0].dtype} and differs between the adapters; it has no average")
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value, weight in zip(values, weights, strict=True):
        total += weight * value.double()
    return _rounded(total, values, name)


def _rounded(value: Tensor, inputs: Sequence[Tensor], name: str) -> Tensor:
    """The value in the dtype of the inputs, float32 if they differ."""
    dtypes = {tensor.dtype for tensor in inputs}
    rounded = value.to(dtypes.pop() if len(dtypes) == 1 else torch.float32).contiguous()
    if not rounded.isfinite().all():
        raise InputError(f"the average of {name} is too large for {rounded.dtype}; save them in float32")
    return rounded
