"""Build a dataset that models made and judged: class-conditional self-rewarding (arXiv 2405.13473).

    accelerate launch data_builders/self_rewarding.py
    accelerate launch data_builders/self_rewarding.py --classes Elephant Giraffe --output_dir data/animals \\
        --writer_model_name_or_path mistralai/Mistral-7B-Instruct-v0.3 --dtype bfloat16 \\
        --model_name_or_path stabilityai/stable-diffusion-2-1 --num_inference_steps 50 --guidance_scale 7.5 \\
        --judge_model_name_or_path llava-hf/llava-v1.6-mistral-7b-hf --judge_dtype bfloat16 \\
        --detector google/owlv2-base-patch16-ensemble

An LLM writes prompts for the classes; a text-to-image model draws candidates of each; a VLM answers a rubric
of yes/no questions about each candidate; a detector looks for the class. Of the best scored candidates the
one detected most surely is the prompt's optimal image (`sft/`); soft scores rank them all (`pairs/`,
`ranked/`). Every option is the pocket's by default. Beside the tables, --output_dir holds BUILD.json, a
dataset card, and gallery.html, which shows what was chosen and why.

The same command again repeats no finished call of a model, whatever ended it; another question in the rubric
asks that question alone, another selection asks nothing. The dataset is the same for any number of processes.
"""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from time import perf_counter

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from data_builders.assembly import Build
from data_builders.phases import run_phases
from data_builders.self_rewarding_config import SelfRewardingConfig
from data_builders.writing import prompts_of
from prefopt.cli import run
from prefopt.store import alone


def main(config: SelfRewardingConfig) -> None:
    """Write prompts, draw, judge, detect; then select and export."""
    start = perf_counter()
    # Without `cpu`, processes on CPUs would each believe to be the only one; one that is done waits for all.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=12))
    folder = Path(config.output_dir)
    with alone(folder) if state.is_main_process else nullcontext():
        device = torch.device(str(state.device))
        prompts = [prompts_of(config, folder, device) if state.is_main_process else []]
        build = Build(config, folder, broadcast_object_list(prompts)[0], state)
        mine = range(build.blocks)[state.process_index :: state.num_processes]
        run_phases(build.phases, mine, keep_resident=config.keep_resident, quiet=not state.is_main_process)
        calls = gather_object([{phase.name: phase.calls for phase in build.phases}])
        if state.is_main_process:
            print(build.finish(calls, seconds=perf_counter() - start))
        state.wait_for_everyone()


if __name__ == "__main__":
    run(main, SelfRewardingConfig)
