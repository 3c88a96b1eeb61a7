"""What trials begin from: tiny models, tables and finished runs, made once, and options of runs that work."""

from pathlib import Path
from typing import Any

from trial import ACCEPTED, Trial, program, run_trials

SMALL_RUN = {
    "per_device_train_batch_size": 2,
    "max_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "lora_r": 2,
}


class World:
    """Folders that exist; trials read them, or copy them to change something."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.diffusion = folder / "diffusion"  # a tiny Stable Diffusion pipeline, 16 x 16
        self.vlm = folder / "vlm"  # a tiny LLaVA, images of 32 x 32
        self.pairs = folder / "pairs"  # eight pairs of images, one Parquet file
        self.ranked = folder / "ranked"  # lists of three images with their ranks
        self.vision_pairs = folder / "vision-pairs"  # twelve vision preference rows, a saved dataset
        # Finished runs of diffusion_dpo.py, its cache inside, and vlm_dpo.py: an adapter, two checkpoints.
        self.run, self.vlm_run = folder / "run", folder / "vlm-run"
        self.build = folder / "build"  # of text_to_image_pairs.py: two prompts, two images each
        self.comparison = folder / "comparison"  # of the base with `run`: two prompts, one seed

    def options(self, name: str) -> dict[str, Any]:
        """Options of the smallest run of a program that works."""
        if name.startswith("vlm_"):
            return {"model_name_or_path": self.vlm, "dataset_name": self.vision_pairs} | SMALL_RUN
        if name.startswith("diffusion_"):
            return {
                "model_name_or_path": self.diffusion,
                "dataset_name": self.pairs,
                "cache_dir": self.folder / "run" / "cache",
            } | SMALL_RUN
        if name == "text_to_image_pairs":
            return {
                "model_name_or_path": self.diffusion,
                "judge_model_name_or_path": "pocket",
                "rubric": "whole_prompt",
                "prompts": self.folder / "prompts.txt",
                "candidates": 2,
                "no_gallery": None,
                "num_inference_steps": 2,
                "height": 16,
                "width": 16,
            }
        if name == "compare_text_to_image":
            return {
                "model_name_or_path": self.diffusion,
                "clip_model_name_or_path": "pocket",
                "systems": ["base", f"dpo={self.run}"],
                "prompts": self.folder / "prompts.txt",
                "num_seeds": 1,
                "num_inference_steps": 2,
            }
        raise KeyError(name)


def make_world(folder: Path) -> World:
    """Make everything, in a process of its own, whose threads die with it."""
    world = World(folder)
    folder.mkdir(parents=True)
    *_, outcome = run_trials([Trial("the world", lambda _: _make(world))], folder / "making", 1)
    if outcome.ending != ACCEPTED:
        raise RuntimeError(f"what the trials begin from could not be made: {outcome.printed}")
    return world


def _make(world: World) -> None:
    from pictures import write_pairs, write_ranked
    from tiny import tiny_stable_diffusion
    from tiny_vlm import LLAVA_1_5, tiny_llava, vision_pairs

    tiny_stable_diffusion(world.diffusion)
    tiny_llava(world.vlm, template=LLAVA_1_5)
    write_pairs(world.pairs, 8)
    write_ranked(world.ranked, [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [2, 1, 1]])
    vision_pairs().save_to_disk(world.vision_pairs)
    (world.folder / "prompts.txt").write_text("a red lion\ntwo blue birds\n")
    two_steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    for name, output in (("diffusion_dpo", world.run), ("vlm_dpo", world.vlm_run)):
        program(name, {**world.options(name), **two_steps, "output_dir": output})(world.folder)
    for name, output in (("text_to_image_pairs", world.build), ("compare_text_to_image", world.comparison)):
        program(name, {**world.options(name), "output_dir": output})(world.folder)
