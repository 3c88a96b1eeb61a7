"""Train a text-to-image model by several methods on one table, and compare all of them on one page.

    python recipes/diffusion_methods.py
    python recipes/diffusion_methods.py --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --dataset_name data/lists --dataset_config ranked --sft sft.yaml --dpo dpo.yaml --cpo cpo.yaml \\
        --compare compare.yaml --discriminator_name_or_path runs/discriminator --num_processes 4

The methods are SFT on the best images, Diffusion-DPO, CPO, and CPO with a discriminator's term in its loss;
each starts from the same model and reads the same pairs or ranked lists. The YAML files hold the options of
the single recipes, which this one calls and prints, so that any can be run alone. Without any it is the
pocket, half an hour on two cores, on ranked lists that it builds first.

The same command again, after a crash or Ctrl-C, goes on where it stopped. You should see in --output_dir a
folder for each method, and compared/report.html: each system at its best guidance scale, by the scorers that
the comparison's options name. Trust a scorer that chose no data and is in no loss: here the discriminator is
in one, and the CLIP that ranked the pocket's lists chose the data.

Launch it by plain python: it launches its steps by accelerate, on --num_processes each.
"""

from dataclasses import dataclass
from pathlib import Path

from prefopt import pocket
from prefopt.cli import run
from prefopt.errors import InputError
from prefopt.options import check_options, check_paths_exist, option
from prefopt.steps import fill_presets, run_steps
from prefopt.yaml_files import read_yaml

HERE = Path(__file__).resolve().parent
CONFIGS = HERE / "configs"
METHODS = ("sft", "dpo", "cpo", "cpo_discriminator")


@dataclass
class MethodsConfig:
    """The methods, what they train on, and where the options of each step are."""

    model_name_or_path: str = option("pocket", "Base model: a folder, a hub id or `pocket`.")
    dataset_name: str | None = option(
        None,
        "Pairs or ranked lists: a folder or hub id (default, for the model `pocket` alone: ranked lists that "
        "are built first).",
    )
    dataset_config: str | None = option(None, "Configuration of the dataset: of the hub's, or a sub-folder.")
    methods: list[str] = option(list(METHODS), f"What is trained: {', '.join(METHODS)}.")
    build: str | None = option(
        None,
        "YAML file with the builder's options, in place of --dataset_name (default, for the model `pocket` "
        "alone: its preset).",
    )
    sft: str | None = option(None, "YAML file with the options of SFT (default: as of --build).")
    dpo: str | None = option(None, "YAML file with the options of Diffusion-DPO (default: as of --build).")
    cpo: str | None = option(None, "YAML file with the options of CPO (default: as of --build).")
    compare: str | None = option(
        None, "YAML file with the options of the comparison (default: as of --build)."
    )
    discriminator_name_or_path: str | None = option(
        None,
        "The discriminator in the loss of cpo_discriminator; the comparison scores by it, too: a folder, a "
        "hub id, or `pocket` (the default for that model).",
    )
    discriminator_weight: float | None = option(
        None,
        "For cpo_discriminator: weight of its term in the loss (default: what the options of CPO say).",
        within="[0, 1e9]",
    )
    num_processes: int = option(1, "Processes of each step.", within="[1, 1024]")
    output_dir: str = option("runs/methods", "Folder for data, adapters and report.")

    def __post_init__(self) -> None:
        check_options(self)
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or len(set(self.methods)) < len(self.methods) or not self.methods:
            raise InputError(
                f"--methods {' '.join(self.methods)}: name each once, of {', '.join(METHODS)}, at least one"
            )
        files = ["compare", *dict.fromkeys(_recipe(name) for name in self.methods)]
        if self.dataset_name is None:
            files.append("build")
            if self.model_name_or_path != pocket.NAME and self.build is None:
                raise InputError("name a --dataset_name, or with --build the options of a builder")
            if self.dataset_config is not None:
                raise InputError("--dataset_config belongs to a --dataset_name: name that, too")
        elif self.build is not None:
            raise InputError("--build makes what --dataset_name names: leave one of them out")
        presets = {name: CONFIGS / f"methods_{name}_pocket.yaml" for name in files}
        fill_presets(self, presets, self.model_name_or_path)
        if self.cpo and "discriminator_name_or_path" in read_yaml(self.cpo):
            raise InputError(
                f"{self.cpo} names a discriminator, so that cpo would have one, too: name it here, with "
                "--discriminator_name_or_path"
            )
        if "cpo_discriminator" in self.methods:
            pocket.fill_defaults(self, [self.model_name_or_path], "discriminator_name_or_path")
        check_paths_exist(self, "dataset_name", "discriminator_name_or_path")


def main(config: MethodsConfig) -> None:
    """The data, the methods, the comparison."""
    folder = Path(config.output_dir)
    run_steps(steps_of(config, folder), folder, config.num_processes)


def steps_of(config: MethodsConfig, folder: Path) -> dict[str, list[str]]:
    """The script of each step and its options."""
    steps, model = {}, ["--model_name_or_path", config.model_name_or_path]
    table = ["--dataset_name", str(config.dataset_name)]
    table += ["--dataset_config", config.dataset_config] if config.dataset_config else []
    if config.dataset_name is None:
        data = folder / "data"
        table = ["--dataset_name", str(data), "--dataset_config", "ranked"]
        builder = str(HERE.parent / "data_builders" / "text_to_image_pairs.py")
        steps["data"] = [builder, "--config", str(config.build), *model, "--exports", "ranked"]
        steps["data"] += ["--output_dir", str(data)]
    weight: list[str] = []
    discriminator = ["--discriminator_name_or_path", str(config.discriminator_name_or_path)]
    if config.discriminator_weight is not None:
        weight = ["--discriminator_weight", str(config.discriminator_weight)]
    for name in config.methods:
        recipe = _recipe(name)
        steps[name] = [str(HERE / f"diffusion_{recipe}.py"), "--config", getattr(config, recipe), *model]
        steps[name] += [*table, "--output_dir", str(folder / name), "--cache_dir", str(folder / "cache")]
        steps[name] += [*(discriminator + weight if name != recipe else []), "--resume_from_checkpoint"]
    trained = [f"{name}={folder / name}" for name in config.methods]
    steps["compare"] = [str(HERE / "compare_text_to_image.py"), "--config", str(config.compare), *model]
    steps["compare"] += ["--systems", "base", *trained]
    steps["compare"] += [*(discriminator if config.discriminator_name_or_path else [])]
    steps["compare"] += ["--output_dir", str(folder / "compared")]
    return steps


def _recipe(method: str) -> str:
    return method.partition("_")[0]


if __name__ == "__main__":
    run(main, MethodsConfig)
