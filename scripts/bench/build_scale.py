"""Time and memory of builds of more and more candidates, the models replaced by ones that answer at once.

    python scripts/bench/build_scale.py --candidates 10000 100000 1000000
    python scripts/bench/build_scale.py --candidates 10000 100000 --plot benchmarks/build_scale.png

Each build runs in a new process: prompts from a file, tiny images, a judge and a detector whose answers are
hashes; then the tables `candidates`, `pairs`, `sft` and `ranked`, the card and the gallery, all by the code
that every build runs. With `--again` the same command is also timed on finished work. Prints JSON; with
`--plot` also draws it.
"""

import argparse
import json
import shutil
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from children import in_process, memory_mb

ANIMALS = ("lion", "zebra", "elephant", "giraffe")
PER_PROMPT = 4
SIZE = 8  # pixels
AT_ONCE = 256  # of a model's calls, and prompts of a block


class Noise:
    """A pipeline that makes images of noise from their seeds."""

    components: Mapping[str, Any] = {}
    scheduler = SimpleNamespace(config={})

    def __call__(self, generator: list, **_: Any) -> Any:
        """As a pipeline of diffusers is called."""
        import numpy as np

        seeds = [each.initial_seed() for each in generator]
        return SimpleNamespace(
            images=[np.random.default_rng(seed).random((SIZE, SIZE, 3), np.float32) for seed in seeds]
        )


class Hashes:
    """A judge and a detector whose answers are hashes of the images."""

    def answer(self, cases: Any) -> list:
        """As a judge answers."""
        from prefopt.judges.questions import NO, YES, Answer

        return [
            [Answer({YES: p, NO: 1 - p}) for _ in case.questions]
            for case in cases
            for p in [_share(case.image, 1)]
        ]

    def detect(self, images: Any, classes: Any) -> list:
        """As a detector does."""
        from prefopt.detectors import Box

        return [
            [Box(names[0], _share(image, 2), 1, 1, 6, 6)]
            for image, names in zip(images, classes, strict=True)
        ]


def _share(image: Any, seed: int) -> float:
    return (1 + zlib.crc32(image.tobytes(), seed) % 998) / 1000


def build(folder: Path, candidates: int) -> dict[str, Any]:
    """Build in a folder that may hold a finished build."""
    import torch

    from data_builders import self_rewarding
    from data_builders.images import generation
    from prefopt.loading import Lazy

    prompts = folder / "prompts.txt"
    texts = (f"{ANIMALS[i % len(ANIMALS)]} number {i} in the snow" for i in range(candidates // PER_PROMPT))
    prompts.write_text("".join(text + "\n" for text in texts))
    torch.set_num_threads(1)
    generation.load_generator = lambda *_: Noise()
    config = self_rewarding.SelfRewardingConfig(
        classes=list(ANIMALS),
        prompts=str(prompts),
        candidates=PER_PROMPT,
        batch_size=AT_ONCE,
        block_size=AT_ONCE,
        judge_batch_size=AT_ONCE,
        rubric="reward",
        calibrate=False,
        exports=["sft", "pairs", "ranked"],
        output_dir=str(folder / "out"),
    )
    start_mb, start, used = memory_mb()["peak"], time.perf_counter(), time.process_time()
    model: Any = Lazy("hashes", Hashes)
    self_rewarding.main(config, model, model)
    seconds = round(time.perf_counter() - start, 1)
    figures = json.loads((folder / "out" / "BUILD.json").read_text())
    return {
        "seconds": seconds,
        "processor_seconds": round(time.process_time() - used, 1),
        "start_mb": start_mb,
        "peak_mb": memory_mb()["peak"],
        "rows": figures["rows"],
    }


def measure(candidates: int, parent: Path | None, again: bool) -> dict[str, Any]:
    """A build, and the same command again if wanted."""
    folder = Path(tempfile.mkdtemp(prefix="build-", dir=parent))
    try:
        first, _ = in_process(build, folder, candidates)
        repeated = in_process(build, folder, candidates)[0] if again else None
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    finally:
        shutil.rmtree(folder)
    rows = first.pop("rows")
    assert sum(rows["candidates"].values()) == candidates
    found = {"candidates": candidates, **first, "disk_mb": round(size / 2**20, 1)}
    if repeated:
        assert rows == repeated.pop("rows")
        found["again"] = repeated
    return found


def draw(builds: list[dict[str, Any]], file: Path) -> None:
    """Seconds and peak memory over the number of candidates."""
    import matplotlib.pyplot as plt

    sizes = [one["candidates"] for one in builds]
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    time_axes.loglog(sizes, [one["seconds"] for one in builds], "o-", label="build")
    again = [one for one in builds if "again" in one]
    repeated = [one["again"]["seconds"] for one in again]
    time_axes.loglog([one["candidates"] for one in again], repeated, "o-", label="same command again")
    linear = [builds[0]["seconds"] * size / sizes[0] for size in sizes]
    time_axes.loglog(sizes, linear, "--", color="grey", label="linear")
    time_axes.set(xlabel="candidates", ylabel="seconds")
    time_axes.legend()
    memory_axes.semilogx(sizes, [one["peak_mb"] for one in builds], "o-", label="peak of the process")
    memory_axes.semilogx(sizes, [one["start_mb"] for one in builds], "--", color="grey", label="at the start")
    memory_axes.set(xlabel="candidates", ylabel="MB", ylim=(0, None))
    memory_axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Build each size, print, and draw."""
    parser = argparse.ArgumentParser(description="Build more and more candidates by stand-in models.")
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=[10_000, 100_000], help="sizes of builds"
    )
    parser.add_argument("--again", action="store_true", help="also time the same command on finished work")
    parser.add_argument("--folder", type=Path, help="on the disk to be used (default: a temporary one)")
    parser.add_argument("--plot", type=Path, help="picture to draw")
    parser.add_argument("--drawn_from", type=Path, help="JSON of an earlier run, to draw without building")
    options = parser.parse_args()
    if options.drawn_from:
        found = json.loads(options.drawn_from.read_text())
    else:
        builds = [measure(candidates, options.folder, options.again) for candidates in options.candidates]
        most, least = builds[-1], builds[0]
        grown = (
            (most["peak_mb"] - least["peak_mb"]) * 2**20 / max(1, most["candidates"] - least["candidates"])
        )
        found = {"per_prompt": PER_PROMPT, "builds": builds, "bytes_per_candidate": round(grown)}
        from prefopt.runs import versions  # not above: the other processes shall not import it

        print(json.dumps(found | {"versions": versions()}, indent=2))
    if options.plot:
        draw(found["builds"], options.plot)


if __name__ == "__main__":
    main()
