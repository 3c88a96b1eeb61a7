"""The options that diffusion recipes share."""

from dataclasses import dataclass
from typing import Literal

from prefopt.config import RecipeConfig
from prefopt.errors import InputError
from prefopt.options import check_interval, option


@dataclass
class DiffusionConfig(RecipeConfig):
    """A recipe's options, and how images are read."""

    model_name_or_path: str = option("pocket", "A diffusers pipeline: a folder, a hub id, or `pocket`.")
    resolution: int | None = option(
        None, "Pixels of a side after resizing and cropping (default: the model's own)."
    )
    flip_probability: float = option(0.0, "Probability that an example's images are mirrored.")
    drop_probability: float = option(0.0, "Probability that an example's prompt is left empty.")

    timestep_range: list[float] = option(
        [0.0, 1.0], "Part of the noise schedule to train on, from its least noise to its most, in [0, 1]."
    )
    timestep_distribution: Literal["uniform", "stratified", "logit_normal"] = option(
        "uniform",
        "How timesteps are drawn: all alike (uniform), all alike and spread evenly over each optimizer step "
        "(stratified), or most often around the middle (logit_normal, arXiv 2403.03206).",
    )
    logit_mean: float = option(0.0, "For logit_normal: above 0, more noise; below, less.")
    logit_std: float = option(1.0, "For logit_normal: the larger, the more often the ends.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained weight is used in every forward
        check_interval(self, "(-inf, inf)", "logit_mean")
        check_interval(self, "(0, inf)", "logit_std")
        if self.timestep_distribution == "stratified" and self.visits:
            raise InputError(
                "--timestep_distribution stratified spreads the times over each step of an epoch, and --visits "
                "repeats those of other steps: leave one of them out"
            )
        check_interval(self, "[0, 1]", "flip_probability", "drop_probability")
        ends = self.timestep_range
        if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= 1:
            given = " ".join(map(str, self.timestep_range))
            raise InputError(f"--timestep_range {given}: name its two ends, the lower first, in [0, 1]")
