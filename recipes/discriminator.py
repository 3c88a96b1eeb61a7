"""Train a discriminator: it tells real images from generated ones, given their text.

    accelerate launch data_builders/discriminator_pairs.py --output_dir data/discriminator
    accelerate launch recipes/discriminator.py --dataset_name data/discriminator --dataset_config ranked
    accelerate launch recipes/discriminator.py --model_name_or_path stabilityai/sdxl-turbo \\
        --dataset_name data/coyo --dataset_config pairs --resolution 512 --drop_probability 0.1

`dataset_name` is what data_builders/discriminator_pairs.py writes: pairs, or ranked lists, whose images of
rank 1 are real and all others generated. It reads the latents of the text-to-image model's VAE, so it serves
as a term in the loss of the diffusion recipes (`--discriminator_name_or_path`), and as a judge of images
(`--judge_model_name_or_path`). After the last step its logits are calibrated on the split `test` (scale and
shift, after Platt), and test.json says of it: how often it prefers the real image, with a 95 % interval, the
rank correlation with the lists' own order, and how far its probabilities are from the shares that are real.
test.png shows lists in the discriminator's order.

You should see `rewards/accuracies` rise towards 1: a discriminator on a GPU's worth of images learns fast.
That it is near 1 is no proof that it looks at what you want: scripts/studies/shortcut.py tests it on copies.
Left out: pixels. A discriminator of latents cannot see what the VAE hides.
"""

from dataclasses import dataclass
from typing import Any, Literal

from prefopt.cli import run
from prefopt.config import DatasetArguments, PreferenceConfig
from prefopt.diffusion.config import ImageArguments
from prefopt.errors import InputError
from prefopt.options import check_paths_exist, option

SHOWN = 8  # lists in test.png


@dataclass
class DiscriminatorConfig(PreferenceConfig, DatasetArguments, ImageArguments):
    """The options of this recipe."""

    model_revision: str | None = option(None, "Revision of the model on the hub.")
    dataset_test_split: str = option("test", "The split that it is calibrated and tested on.")
    widths: list[int] = option(
        [64, 128, 256], "Channels of its stages; each but the first halves the size.", within="[1, 8192]"
    )
    regulariser: Literal["r1", "spectral", "none"] = option(
        "r1",
        "Against overfitting: a penalty on its gradient at real images (r1, arXiv 1801.04406), weights "
        "divided by their largest singular value (spectral, arXiv 1802.05957), or none.",
    )
    r1_gamma: float = option(0.1, "For r1: weight of the penalty.", within="(0, 1e9]", needs="regulariser=r1")
    output_dir: str = option("runs/discriminator", "Folder for the discriminator, checkpoints and logs.")
    learning_rate: float = option(3e-4, "The initial learning rate.", within="(0, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dataset_name:
            raise InputError(
                "--dataset_name is missing: name what data_builders/discriminator_pairs.py wrote"
            )
        if self.reference != "live":
            raise InputError("--reference cache: a discriminator has no reference; leave it out")
        if self.eval_strategy != "no":
            raise InputError("--eval_strategy: a discriminator is measured after its last step; leave it out")
        if self.sharding:
            raise InputError(
                f"a discriminator is small: every process has all of it, so leave {self.sharding} out"
            )
        check_paths_exist(self, "model_name_or_path", "dataset_name")
        self.check_splits()
        self.check_images()


def main(config: DiscriminatorConfig):
    """Read, encode, train, calibrate, save, test; the trainer."""
    import json
    from pathlib import Path

    from accelerate import PartialState

    from prefopt.diffusion.discriminating import calibrate, logits_of, train_discriminator
    from prefopt.diffusion.tables import read_preferences
    from prefopt.evaluation.discrimination import discrimination, ordered_strip
    from prefopt.images import open_image
    from prefopt.strips import draw_strips

    source: Any = {"config": config.dataset_config, "revision": config.dataset_revision}
    with PartialState().main_process_first():  # then the others read its cache
        training, held_out = (
            read_preferences(str(config.dataset_name), split=split, **source)
            for split in (config.dataset_train_split, config.dataset_test_split)
        )
    trainer, held_out = train_discriminator(
        config,
        config,
        (training, held_out),
        widths=config.widths,
        spectral=config.regulariser == "spectral",
        r1_gamma=config.r1_gamma if config.regulariser == "r1" else None,
        revision=config.model_revision,
    )
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    logits, ranks = logits_of(model.eval(), held_out)
    half = len(ranks) // 2  # one half calibrates, the other tests
    calibrate(model, logits[:half], ranks[:half])
    logits, ranks = logits_of(model, held_out)
    trainer.save_model()
    if trainer.is_world_process_zero():
        figures = discrimination(logits[half:].numpy(), ranks[half:].numpy())
        Path(str(config.output_dir), "test.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(json.dumps(figures, indent=2))
        table, shown = held_out.table, range(len(ranks))[half : half + SHOWN]  # none that calibrated
        strips = [
            ordered_strip(
                [open_image(*table.image(index, place)) for place in range(int((ranks[index] > 0).sum()))],
                logits[index].numpy(),
                ranks[index].numpy(),
            )
            for index in shown
        ]
        prompts = list(table.column("prompt", shown))
        draw_strips(Path(str(config.output_dir), "test.png"), prompts, strips)
    return trainer


if __name__ == "__main__":
    run(main, DiscriminatorConfig)
