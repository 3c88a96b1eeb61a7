"""The options that diffusion recipes share."""

from dataclasses import dataclass

from prefopt.config import RecipeConfig
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained weight is used in every forward
        check_interval(self, "[0, 1]", "flip_probability", "drop_probability")
