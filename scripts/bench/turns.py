"""How the benches measure: steps that take turns, so that a machine that slows down slows all of them."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Figures = dict[str, list[float]]


def take_turns(
    steps: Mapping[str, Callable[[int], Any]], repeats: int, device: torch.device
) -> tuple[Figures, Figures]:
    """Seconds and peak memory in GiB of every step, called with the turn's number, in each of `repeats`
    turns; one more turn before them warms up and does not count.
    """
    seconds: Figures = {name: [] for name in steps}
    memory: Figures = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            with peak_memory(device, memory[name]):
                start = time.perf_counter()
                step(turn)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
        print(f"turn {turn} of {repeats}", {n: round(s[-1], 2) for n, s in seconds.items()}, file=sys.stderr)
    return _counted(seconds), _counted(memory)


def _counted(figures: Figures) -> Figures:
    return {name: values[1:] for name, values in figures.items()}


@contextmanager
def peak_memory(device: torch.device, into: list[float]) -> Iterator[None]:
    """Append the highest memory in use in GiB: the device's, or on a CPU the process's, sampled."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield
        into.append(torch.cuda.max_memory_allocated(device) / 2**30)
        return
    process, done, seen = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:  # or an error would leave a thread that keeps the process alive
        done.set()
        thread.join()
    into.append(max(seen) / 2**30)


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the CPU's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
