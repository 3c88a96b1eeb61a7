"""What generates images: a text-to-image model, a LoRA at a scale, and the sampler's settings.

Importing this imports no model library; `sampling` loads and runs what is described here.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from prefopt import pocket
from prefopt.errors import InputError
from prefopt.files import file_key, named_files_key, used_variant, variant_of
from prefopt.hub import ADAPTER_FILE, adapter_place, files_at
from prefopt.model_files import MODEL_FILE, check_files, read_config
from prefopt.options import check_name, check_number, check_options, check_paths_exist, check_revision, option

STEPS, GUIDANCE, SCALE = "[1, 10000]", "[0, 1000]", "[-1000, 1000]"  # ranges
# What a text about a generator may change: the range of a number, None for a text.
CHANGES = {
    "steps": STEPS,
    "guidance": GUIDANCE,
    "adapter": None,
    "scale": SCALE,
    "revision": None,
    "variant": None,
}
_CONFIG_FILES = (".json", ".txt", ".model")


@dataclass(frozen=True)
class Sampler:
    """What decides an image besides model, prompt and seed; sizes in pixels, None: the model's own."""

    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Generator:
    """A text-to-image model with its sampler, by name; `dtype` as torch calls it."""

    model: str
    adapter: str | None = None
    adapter_scale: float = 1.0
    revision: str | None = None
    dtype: str = "float32"
    sampler: Sampler = field(default_factory=Sampler)
    variant: str | None = None

    @property
    def folder(self) -> Path:
        """The local folder of the model; a hub id is downloaded."""
        return pipeline_folder(self.model, revision=self.revision, variant=self.variant)

    @property
    def weights(self) -> dict[str, str | float | None]:
        """SHA-256 of the model's files and of the adapter's, and the scale; at scale 0 those of the model."""
        adapter = file_key(adapter_file(self.adapter)) if self.adapter is not None else None
        counts = adapter is not None and self.adapter_scale != 0
        return {
            "model": named_files_key(_loaded_files(self.folder, self.variant)),
            "adapter": adapter if counts else None,
            "scale": self.adapter_scale if counts else None,
        }

    @property
    def identity(self) -> dict[str, str | float | int | None]:
        """Everything that an image depends on besides prompt and seed."""
        weights = self.weights
        return {
            "model_identity": weights["model"],
            "adapter_identity": weights["adapter"],
            "adapter_scale": weights["scale"],
            **self.settings,
        }

    @property
    def settings(self) -> dict[str, str | float | int | None]:
        """How images are made from the weights."""
        return {**asdict(self.sampler), "dtype": self.dtype}

    @property
    def names(self) -> dict[str, str | None]:
        """What model and adapter are called here; the same weights may have other names elsewhere."""
        return {"model": self.model, "model_revision": self.revision, "adapter": self.adapter}


@dataclass
class GenerationOptions:
    """The options of a program that generates images."""

    model_name_or_path: str = option("pocket", "Text-to-image model: a folder, a hub id or `pocket`.")
    revision: str | None = option(None, "Revision of that model on the hub.")
    variant: str | None = option(None, "Variant of that model's weights, such as fp16 (default: none).")
    num_inference_steps: int = option(30, "Denoising steps.", within=STEPS)
    guidance_scale: float = option(3.0, "Classifier-free guidance; 1 is none.", within=GUIDANCE)
    height: int | None = option(None, "Pixels (default: the model's).", within="[8, 16384]")
    width: int | None = option(None, "Pixels (default: the model's).", within="[8, 16384]")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of that model.")
    batch_size: int = option(16, "Images generated at once.", within="[1, 65536]")

    def __post_init__(self) -> None:
        check_options(self)
        check_paths_exist(self, "model_name_or_path")
        for name in ("height", "width"):
            if (value := getattr(self, name)) is not None and (value < 8 or value % 8):
                raise InputError(f"--{name} is {value}; it is a multiple of 8")

    @property
    def generator(self) -> Generator:
        """The model with these settings, without an adapter."""
        sampler = Sampler(self.num_inference_steps, self.guidance_scale, self.height, self.width)
        return Generator(self.model_name_or_path, None, 1.0, self.revision, self.dtype, sampler, self.variant)


def changed(base: Generator, words: Sequence[str], where: str) -> Generator:
    """The generator with what the words say, as `steps=4`, `guidance=0`, `scale=0.4`, `revision=main`.

    An unknown word, or a value that is no number, is an InputError that says `where`.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in CHANGES:
            raise InputError(f"{where}: unknown {key!r}; known are {', '.join(CHANGES)}")
        if not value or key in values:
            raise InputError(f"{where}: {key} needs one value, as {key}=...; it has {'2' if value else '0'}")
        values[key] = value
        if CHANGES[key] is not None:
            try:
                values[key] = int(value) if key == "steps" else float(value)
            except ValueError as error:
                raise InputError(f"{where}: {key} is {value!r}, not a number") from error
            check_number(f"{where}: {key}", values[key], CHANGES[key])
    check_revision(base.model, values.get("revision"), where)
    sampler = replace(
        base.sampler,
        num_inference_steps=values.get("steps", base.sampler.num_inference_steps),
        guidance_scale=values.get("guidance", base.sampler.guidance_scale),
    )
    return replace(
        base,
        sampler=sampler,
        revision=values.get("revision", base.revision),
        variant=values.get("variant", base.variant),
        adapter=values.get("adapter", base.adapter),
        adapter_scale=values.get("scale", base.adapter_scale),
    )


def pipeline_folder(
    model_name_or_path: str | Path, *, revision: str | None = None, variant: str | None = None
) -> Path:
    """The local folder of a pipeline: the folder named, the pocket's, or the download of a hub id.

    InputError if it has no weights of this variant, or if one of its files is damaged.
    """
    check_name(model_name_or_path, "the model's name")
    name = pocket.resolve(str(model_name_or_path), "text_to_image")
    if Path(name).is_dir():
        if not (Path(name) / MODEL_FILE).is_file():
            raise InputError(f"{name} is no pipeline: it holds no {MODEL_FILE}")
        _check_variant(Path(name), variant)
        return Path(name)
    if Path(name).is_absolute() or name.count("/") != 1:
        raise InputError(
            f"no model folder {name}; give a folder that holds {MODEL_FILE}, a hub id, or pocket"
        )
    from diffusers import DiffusionPipeline  # to download with; a folder needs no model library

    try:
        return Path(
            DiffusionPipeline.download(name, revision=revision, variant=variant, use_safetensors=True)
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name} is no folder here, and as a hub id it cannot be fetched: {error}. If its weights are of "
            "another variant, such as fp16, name it with --variant"
        ) from error


def _parts(folder: Path) -> list[Path]:
    """The folders of a pipeline's parts."""
    return [folder / part for part in read_config(folder, MODEL_FILE) if (folder / part).is_dir()]


def _check_variant(folder: Path, variant: str | None) -> None:
    """InputError if no part has weights of the variant, or a part has weights of other variants alone."""
    parts = [part for part in _parts(folder) if part.name != "safety_checker"]  # which is never loaded
    for part in parts:
        check_files(part)
    found = {part.name: {variant_of(file) for file in part.glob("*.safetensors")} for part in parts}
    known = sorted({name for names in found.values() for name in names if name})
    if variant is not None and variant not in known:
        instead = f"name one of its own, {', '.join(known)}" if known else "leave out --variant"
        raise InputError(f"{folder} has no weights of the variant {variant}: {instead}")
    for part, names in found.items():
        if names and not names & {None, variant}:
            raise InputError(
                f"the weights of {folder / part} are of the variant {' or '.join(sorted(map(str, names)))} "
                f"alone: add --variant {min(map(str, names))}"
            )


def _loaded_files(folder: Path, variant: str | None) -> dict[str, Path]:
    """The files of a pipeline that decide its images, by their names there without the variant.

    Lists of shards are left out: the shards say the same.
    """
    files = {MODEL_FILE: folder / MODEL_FILE}
    for part in _parts(folder):
        used, named = used_variant(part, variant), {}
        for path in part.rglob("*"):
            is_weights = path.suffix == ".safetensors" and variant_of(path) == used
            if is_weights or (path.suffix in _CONFIG_FILES and ".index." not in path.name):
                name = str(path.relative_to(folder))
                named[name.replace(f".{used}", "") if is_weights else name] = path
        files |= {name: named[name] for name in sorted(named)}
    return files


def adapter_file(adapter: str | Path) -> Path:
    """The safetensors file of an adapter that is named by its folder, the file itself, or a hub id.

    Of a folder, or a hub id, it is ADAPTER_FILE if that is there, else the only safetensors file.
    """
    path = adapter_place(adapter, ADAPTER_FILE)
    if not path.is_file():
        standard = path / ADAPTER_FILE
        path = standard if standard.is_file() else adapter_place(f"{adapter}/{_only_file(adapter)}")
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is not safetensors; only safetensors adapters are read")
    return path


def _only_file(adapter: str | Path) -> str:
    """The name of the only safetensors file of a folder or hub id; InputError for none and for several."""
    names = files_at(adapter)
    if MODEL_FILE in names:
        raise InputError(f"{adapter} is a whole pipeline, not an adapter: it holds {MODEL_FILE}")
    found = [name for name in names if name.endswith(".safetensors")]
    if not found:
        raise InputError(f"no adapter in {adapter}: it holds no {ADAPTER_FILE} or other safetensors file")
    if len(found) > 1:
        raise InputError(
            f"{adapter} holds {len(found)} safetensors files, {', '.join(found)}: name the right one, "
            f"such as {adapter}/{found[0]}"
        )
    return found[0]
