"""An ensemble of LoRA adapters: one after the other trained on one loaded base, and their exact average."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState

from prefopt.averaging import Average, average_adapters
from prefopt.config import LATEST, LoraArguments
from prefopt.errors import InputError
from prefopt.files import read_object, write_atomically
from prefopt.objectives import supervised
from prefopt.options import check_number, range_of
from prefopt.vlm.config import VlmConfig
from prefopt.vlm.training import load, read_examples, read_held_out, save, to_train, trainer_of

DONE = "member.json"  # of a finished member: the options that it was trained with
ABOUT = {"loss": "mean of -log p over the tokens of the step's answers, in nats"}
# What a member may have of its own.
OWN = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "learning_rate", "seed")


class Member(NamedTuple):
    """One adapter of an ensemble."""

    folder: Path
    options: Mapping[str, Any]  # those in which it differs from the run


def parse_members(texts: Sequence[str], output_dir: Path) -> list[Member]:
    """Members from texts such as `lora_alpha=16 lora_dropout=0.05`; InputError for one that cannot be read.

    Their folders are `member-1` and so on, below `output_dir`.
    """
    kinds = {"use_rslora": _truth, "lora_r": int, "lora_alpha": int, "seed": int}
    ranges = {field.name: range_of(field) for field in fields(VlmConfig)}
    members = []
    for number, text in enumerate(texts, start=1):
        options = {}
        for part in text.replace(",", " ").split():
            name, _, value = part.partition("=")
            if name not in OWN or name in options:
                raise InputError(
                    f"--members: {part!r} in {text!r}; a member has options such as lora_alpha=16, each "
                    f"once, of {', '.join(OWN)}"
                )
            try:
                options[name] = kinds.get(name, float)(value)
            except ValueError as error:
                raise InputError(f"--members: {part!r} in {text!r} has no such value: {error}") from error
            if name != "use_rslora":
                check_number(f"--members {text!r}: {name}", options[name], ranges[name])
        members.append(Member(output_dir / f"member-{number}", options))
    if len(members) < 2:
        raise InputError("--members: an ensemble has two or more, each a text such as 'lora_alpha=16'")
    return members


def train_ensemble(config: VlmConfig, members: Sequence[Member], rank: int | None) -> dict[str, Average]:
    """Train the members that are not finished yet, and average all: exactly, and to a rank if one is given.

    The base is loaded once, for a member's adapter leaves it as it was. Without `--resume_from_checkpoint`,
    an output folder that holds members is an InputError.
    """
    started = [member.folder for member in members if any(member.folder.glob("*"))]
    if started and not config.resume_from_checkpoint:
        raise InputError(
            f"{started[0]} is there already: continue with --resume_from_checkpoint, or name another "
            "--output_dir"
        )
    waiting = [member for member in members if not _is_done(config, member)]
    if waiting:
        _train(config, waiting)
    state, averages = PartialState(), {}
    if state.is_main_process:
        folders, output = [member.folder for member in members], Path(str(config.output_dir))
        averages["average"] = average_adapters(folders, output / "average")
        if rank is not None:
            averages[f"average-rank-{rank}"] = average_adapters(
                folders, output / f"average-rank-{rank}", rank=rank
            )
        for name, average in averages.items():
            print(f"{name}: rank {average.rank}, {average.energy:.2%} of the energy kept", flush=True)
    state.wait_for_everyone()
    return averages


def _train(config: VlmConfig, members: Sequence[Member]) -> None:
    base, processor = load(config)
    examples, held_out = read_examples(config, "sft", processor), read_held_out(config, "sft", processor)
    PartialState().print(examples)
    for member in members:
        options = _options_of(config, member)
        model: Any = to_train(base, options)
        trainer = trainer_of(options, base, model, processor, examples, supervised(), ABOUT, held_out)
        PartialState().print(f"{member.folder.name}: {dict(member.options)}")
        trainer.train()
        save(trainer, options)
        if trainer.is_world_process_zero():
            write_atomically(member.folder / DONE, json.dumps(_facts(options), indent=2))
        model.unload()
        trainer.accelerator.free_memory()


def _options_of(config: VlmConfig, member: Member) -> VlmConfig:
    """The run's options with the member's own."""
    options = copy.copy(config)
    for name, value in member.options.items():
        setattr(options, name, value)
    options.output_dir = str(member.folder)
    options.cache_dir = config.cache_dir or str(Path(str(config.output_dir), "cache"))
    has_checkpoint = any(member.folder.glob("checkpoint-*"))
    options.resume_from_checkpoint = LATEST if has_checkpoint else None
    return options


def _is_done(config: VlmConfig, member: Member) -> bool:
    """Whether the member is finished; InputError if it was trained with other options."""
    path = member.folder / DONE
    if not path.exists():
        return False
    trained = read_object(path, f"Delete the folder {member.folder}, and run the same command again")
    wanted = _facts(_options_of(config, member))
    for name, value in wanted.items():
        if trained.get(name) != value:
            raise InputError(
                f"{member.folder} was trained with {name} {trained.get(name)}, and now it is {value}; name "
                "another --output_dir"
            )
    return True


def _facts(options: VlmConfig) -> dict[str, Any]:
    """The options that a member's weights depend on."""
    lora = [field.name for field in fields(LoraArguments)]
    names = (
        *(name for name in lora if name != "adapter_name_or_path"),
        "model_name_or_path",
        "dataset_name",
        "learning_rate",
        "lr_scheduler_type",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_length",
        "load_in_4bit",
        "seed",
    )
    return {name: _plain(getattr(options, name)) for name in names}


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # of an enumeration


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is not true or false")
    return text == "true"
