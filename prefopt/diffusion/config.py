"""The options that diffusion recipes share."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from prefopt.config import RecipeConfig
from prefopt.errors import InputError
from prefopt.files import text_lines
from prefopt.options import check_paths_exist, option


@dataclass
class ImageArguments:
    """The text-to-image model, and how images are read."""

    model_name_or_path: str = option("pocket", "A diffusers pipeline: a folder, a hub id, or `pocket`.")
    variant: str | None = option(None, "Variant of that model's weights, such as fp16 (default: none).")
    resolution: int | None = option(
        None, "Pixels of a side after resizing and cropping (default: the model's own).", within="[8, 16384]"
    )
    flip_probability: float = option(
        0.0, "Probability that an example's images are mirrored.", within="[0, 1]"
    )
    drop_probability: float = option(
        0.0, "Probability that an example's prompt is left empty.", within="[0, 1]"
    )

    def check_images(self) -> None:
        """InputError for values out of range."""


@dataclass
class TimestepArguments:
    """Which timesteps are trained on."""

    timestep_range: list[float] = option(
        [0.0, 1.0],
        "Part of the noise schedule to train on, from its least noise to its most, in [0, 1].",
        within="[0, 1]",
    )
    timestep_distribution: Literal["uniform", "stratified", "logit_normal"] = option(
        "uniform",
        "How timesteps are drawn: all alike (uniform), all alike and spread evenly over each optimizer step "
        "(stratified), or most often around the middle (logit_normal, arXiv 2403.03206).",
    )
    logit_mean: float = option(
        0.0,
        "For logit_normal: above 0, more noise; below, less.",
        within="[-100, 100]",
        needs="timestep_distribution=logit_normal",
    )
    logit_std: float = option(
        1.0,
        "For logit_normal: the larger, the more often the ends.",
        within="(0, 100]",
        needs="timestep_distribution=logit_normal",
    )

    def check_timesteps(self, visits: int | None) -> None:
        """InputError for values out of range."""
        _check_ends(self, "timestep_range")
        if self.timestep_distribution == "stratified" and visits:
            raise InputError(
                "--timestep_distribution stratified spreads the times of each step evenly, and --visits "
                "repeats times of other steps: leave one of them out"
            )


@dataclass
class DiscriminatorArguments:
    """A discriminator in the loss, as in a GAN."""

    discriminator_name_or_path: str | None = option(
        None,
        "Add a discriminator's term to the loss: what recipes/discriminator.py wrote, a hub id or `pocket` "
        "(default: none).",
    )
    discriminator_weight: float = option(
        2.0,
        "Weight of that term, softplus(-d(predicted clean latents)).",
        within="[0, 1e9]",
    )
    discriminator_window: list[float] = option(
        [0.0, 0.5],
        "Part of the noise schedule in which the term counts, from least noise to most, in [0, 1].",
        within="[0, 1]",
    )
    discriminator_mode: Literal["frozen", "adversarial"] = option(
        "frozen", "The discriminator stays as it is (frozen), or is trained on the predictions (adversarial)."
    )
    discriminator_learning_rate: float = option(
        1e-4,
        "For adversarial: the discriminator's learning rate.",
        within="(0, inf)",
        needs="discriminator_mode=adversarial",
    )

    def check_discriminator(self, *, fp16: bool) -> None:
        """InputError for values out of range, and for options of a discriminator that is not there."""
        _check_ends(self, "discriminator_window")
        check_paths_exist(self, "discriminator_name_or_path")
        adversarial = self.discriminator_mode == "adversarial"
        if adversarial and not self.discriminator_name_or_path:
            raise InputError("--discriminator_mode adversarial: name one with --discriminator_name_or_path")
        if adversarial and fp16:
            raise InputError("--discriminator_mode adversarial with --fp16: take --bf16 in its place")


@dataclass
class ValidationArguments:
    """Images that are generated while the model trains."""

    validation_prompts: str | None = option(
        None,
        "Text file, one prompt a line: an image of each, always of the same seed, is generated at the start, "
        "every --validation_steps and at the end (default: none).",
    )
    validation_steps: int = option(
        100,
        "For --validation_prompts: generate every N steps.",
        within="[1, 1e9]",
        needs="validation_prompts",
    )
    validation_inference_steps: int = option(
        30,
        "For --validation_prompts: denoising steps of an image.",
        within="[1, 10000]",
        needs="validation_prompts",
    )
    validation_guidance_scale: float = option(
        3.0,
        "For --validation_prompts: classifier-free guidance; 1 is none. Real models need about 7.5.",
        within="[0, 1000]",
        needs="validation_prompts",
    )

    def check_validation(self, *, sharded: bool) -> None:
        """InputError for values out of range, and for weights that no one process has."""
        if self.validation_prompts is None:
            return
        list(text_lines(Path(self.validation_prompts)))  # which says what is wrong with the file
        if sharded:
            raise InputError(
                "--validation_prompts: under FSDP and DeepSpeed no process has all weights to generate with; "
                "leave it out, and compare checkpoints with recipes/compare_text_to_image.py"
            )


@dataclass
class DiffusionConfig(
    RecipeConfig, ImageArguments, TimestepArguments, DiscriminatorArguments, ValidationArguments
):
    """The options of a recipe that trains a text-to-image model."""

    model_name_or_path: str = option("pocket", "A diffusers pipeline: a folder, a hub id, or `pocket`.")
    HOLD_OUT: ClassVar[str] = "a --dataset_test_split or a --test_fraction"

    test_fraction: float | None = option(
        None,
        "Hold out this share of the prompts: their examples are not trained on, and --eval_strategy steps "
        "measures them.",
        within="(0, 1)",
    )
    encode: Literal["cache", "live"] = option(
        "cache",
        "Images and prompts: encoded once before training (cache), or in every step (live), which is faster "
        "for a run of less than about one epoch and keeps nothing on disk.",
    )

    @property
    def holds_out(self) -> bool:
        """Whether there are examples that are not trained on."""
        return super().holds_out or self.test_fraction is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_fraction is not None and self.dataset_test_split is not None:
            raise InputError("--test_fraction and --dataset_test_split: leave one of them out")
        if self.encode == "live" and self.reference == "cache":
            raise InputError(
                "--encode live keeps no encodings, and --reference cache needs them: leave one of the two out"
            )
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained weight is used in every forward
        self.check_images()
        self.check_timesteps(self.visits)
        self.check_discriminator(fp16=self.fp16)
        if self.sharding and self.discriminator_mode == "adversarial":
            raise InputError(
                f"--discriminator_mode adversarial clips two parts of the model apart, which {self.sharding} "
                "does not; take a frozen discriminator"
            )
        self.check_validation(sharded=self.sharding is not None)


def _check_ends(config: object, name: str) -> None:
    ends = getattr(config, name)
    if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= 1:
        given = " ".join(map(str, ends))
        raise InputError(f"--{name} {given}: name its two ends, the lower first, in [0, 1]")
