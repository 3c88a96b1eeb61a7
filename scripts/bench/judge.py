"""How long a judge takes for a rubric's ten questions about one image: all in one row, and one at a time.

    python scripts/bench/judge.py
    python scripts/bench/judge.py --size 7b --device cuda --dtype bfloat16

Three ways take turns in one run, on the same weights, image and words:
  shared prefix  our judge, from the image to the answers: one reading of it, then all questions in one pass
  pipeline       transformers' DecisionPipeline, from the image to the answers
  plain          a forward pass per question on inputs prepared beforehand, logits of the last token only
and with `--generate`, as judges that parse text do,
  generate       `generate()` of four tokens per question, on inputs prepared beforehand
Prints JSON, of medians; a ratio is taken turn by turn. Our judge prepares its inputs within its time, so
 the ratio to the plain passes is rather too small.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from shapes import LANGUAGE, TILE, save_vlm
from transformers.pipelines.decision import DecisionPipeline
from turns import DTYPES, peak_memory

from prefopt.judges.decision import VlmAnswerer, request
from prefopt.judges.questions import Case
from prefopt.judges.rubric import Rubric
from prefopt.judges.shared_prefix import SharedPrefixJudge
from prefopt.runs import versions
from prefopt.vlm.models import load_vlm


class Bench:
    """The ways to ask, each from a case to the log-odds of its questions, and what they share."""

    def __init__(self, folder: str, dtype: torch.dtype, device: torch.device):
        self.answerer = VlmAnswerer(folder, dtype=dtype, device=device, bare_labels=True)
        self.judge = SharedPrefixJudge(self.answerer)
        self.model: Any = self.answerer.model
        _, processor = load_vlm(folder, dtype=dtype)
        self.pipeline = DecisionPipeline(
            model=self.model,
            processor=processor,
            tokenizer=processor.tokenizer,  # pyright: ignore[reportAttributeAccessIssue]
            device=device,
        )
        pixels = np.random.default_rng(0).integers(0, 256, (2 * TILE, 2 * TILE, 3), dtype=np.uint8)
        prompt = "two zebras in the snow at dusk"
        questions = Rubric.load("class_conditional").questions("zebra", prompt)
        self.case = Case(Image.fromarray(pixels), prompt, questions)
        self.prepared = [
            ({name: value.to(device) for name, value in inputs.items() if name != "marks"}, questions)
            for inputs, questions in self.answerer.prompts(self.case)
        ]

    def shared_prefix(self, count: int) -> list[float]:
        """All questions from one reading."""
        return [answer.log_odds for answer in self.judge.answer([self._first(count)])[0]]

    def one_by_one(self, count: int) -> list[float]:
        """DecisionPipeline, as a person would call it."""
        answers: Any = self.pipeline(request(self._first(count)))
        return [log(answer["noul"]) - log(1 - answer["noul"]) for answer in answers.values()]

    @torch.no_grad()
    def plain(self, count: int) -> list[float]:
        """A forward pass per question."""
        found = []
        for question, (inputs, parsed) in zip(self.case.questions, self.prepared[:count], strict=False):
            logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[0]
            found.append(self.answerer.read([question], parsed, logits)[0].log_odds)
        return found

    def generate(self, count: int) -> None:
        """Four tokens of text per question."""
        for inputs, _ in self.prepared[:count]:
            self.model.generate(**inputs, do_sample=False, min_new_tokens=4, max_new_tokens=4)

    def _first(self, count: int) -> Case:
        return replace(self.case, questions=self.case.questions[:count])

    def facts(self) -> dict[str, int]:
        """What was asked of what."""
        tokens = [inputs["input_ids"][0] for inputs, _ in self.prepared]
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "questions": len(tokens),
            "image_tokens": int((tokens[0] == self.model.config.image_token_id).sum()),
            "longest_prompt": max(map(len, tokens)),
        }


def measure(bench: Bench, repeats: int, generate: bool) -> dict[str, Any]:
    """Seconds, ratios, peak memory and the largest difference between answers, of ways that take turns."""
    ways: dict[str, Callable[[int], Any]] = {
        "shared prefix": bench.shared_prefix,
        "pipeline": bench.one_by_one,
        "plain": bench.plain,
    }
    if generate:
        ways["generate"] = bench.generate
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        count = len(bench.prepared) if turn else 1  # one question warms up
        for name, way in ways.items():
            with peak_memory(bench.model.device, memory[name]):
                start = time.perf_counter()
                answers[name] = way(count)
                if bench.model.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
        print(f"turn {turn} of {repeats}", {n: round(s[-1], 2) for n, s in seconds.items()}, file=sys.stderr)
    counted = {name: taken[1:] for name, taken in seconds.items()}
    return {
        "seconds": {name: round(statistics.median(taken), 3) for name, taken in counted.items()},
        "times_faster_with_shared_prefix": {
            name: round(statistics.median(np.divide(taken, counted["shared prefix"])), 2)
            for name, taken in counted.items()
        },
        "largest_log_odds_difference": {
            name: float(np.abs(np.subtract(answers["shared prefix"], answers[name])).max())
            for name in ("pipeline", "plain")
        },
        "log_odds": [round(value, 4) for value in answers["shared prefix"]],
        "seconds_per_turn": {name: [round(value, 3) for value in taken] for name, taken in counted.items()},
        "peak_memory_gib": {name: round(max(peaks[1:]), 2) for name, peaks in memory.items()},
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=LANGUAGE, default="25m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    parser.add_argument("--generate", action="store_true", help="generate() per question, too")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(save_vlm(options.size, Path(folder), dtype, device), dtype, device)
        figures = measure(bench, options.repeats, options.generate)
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    what = {**vars(options), "device": name, **bench.facts()}
    print(json.dumps({**what, **figures, "versions": versions()}, indent=2))


if __name__ == "__main__":
    main()
