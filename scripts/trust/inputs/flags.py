"""Values that options do not take: every number of every program by its declared range, and words by hand."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from running import recipe
from trial import Trial, program
from world import World

from prefopt import cli
from prefopt.errors import InputError
from prefopt.options import check_number, option_types, range_of
from prefopt.programs import BUILDERS, RECIPES, programs

VALUES = ("nan", "inf", "-1", "0", "1e30", "9" * 400, "much", "", "1 2")
# Options whose numbers need other options, or more than one value, or have no effect.
WITH_OTHERS = {
    "likelihood_weight",
    "simpo_gamma",
    "winner_guard",
    "timestep_range",
    "discriminator_window",
    "neftune_noise_alpha",
    "eval_accumulation_steps",
    "eval_delay",
    "eval_steps",
    "visits",
}


def trials(world: World) -> Iterator[Trial]:
    """Every trial of this table."""
    yield from _numbers(world)
    yield from _words(world)
    yield from _runs(world)


@cache
def config_class(name: str) -> Any:
    """The class of a program's options."""
    module = recipe(name) if name in programs(RECIPES) else import_module(f"data_builders.{name}")
    named = inspect.signature(module.main).parameters["config"].annotation
    return getattr(module, named) if isinstance(named, str) else named


def parsing(name: str, world: World, *words: str, **options: Any) -> Callable[[Path], object]:
    """Make a program's config as its command line does, and no more."""

    def act(folder: Path) -> object:
        given = {"output_dir": folder / "run", **working(name, world), **options}
        line = []
        for option, value in given.items():
            line += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
        return cli.parse(config_class(name), [*line, *words])

    return act


def working(name: str, world: World) -> dict[str, Any]:
    """Options with which a program's config is made."""
    if name == "discriminator":
        return {"dataset_name": world.pairs}
    if name == "compare_text_to_image":
        return {"systems": ["base", f"dpo={world.run}"]}
    if name == "compare_vlm":
        return {"systems": ["base", f"dpo={world.vlm_run}"]}
    return {}


# Numbers


def _numbers(world: World) -> Iterator[Trial]:
    """Every value for each option where it is declared; nan for each program that has it."""
    tried = set()
    for name in (*programs(RECIPES), *programs(BUILDERS)):
        config = config_class(name)
        hints = get_type_hints(config)
        for field in dataclasses.fields(config):
            types = option_types(hints[field.name])
            if not types & {int, float} or bool in types:
                continue
            key = (field.name, range_of(field), float in types)
            for value in VALUES[:1] if key in tried else VALUES:
                says = value != str(field.default) and _refused(
                    value, range_of(field), whole=float not in types
                )
                alone = field.name not in WITH_OTHERS and not field.metadata.get("needs")
                if says or alone or value == str(field.default):
                    act = parsing(name, world, f"--{field.name}={value}")
                    shown = value if len(value) < 10 else f"{len(value)} digits"
                    says = (rf"--{field.name}\b",) if says else ()
                    yield Trial(f"{name} --{field.name} {shown!r}", act, says)
            tried.add(key)


def _refused(value: str, interval: str | None, *, whole: bool) -> bool:
    """Whether a value is none of an option's."""
    try:
        check_number("", int(value) if whole else float(value), interval, whole=whole)
    except (ValueError, InputError):
        return True
    return False


# Words

MEASURED = {"test_fraction": 0.5, "eval_strategy": "epoch", "metric_for_best_model": "fid"}

LONG, NUL = "x" * 5000, "a\0b"
WORDS: Mapping[str, tuple[str, ...]] = {
    "output_dir": ("", " ", NUL, LONG, "a/" * 3000, "file", "file/below", "link"),
    "cache_dir": ("", NUL, LONG, "file"),
    "dataset_name": ("", NUL, LONG, "./nowhere"),
    "model_name_or_path": ("", NUL, LONG, "./nowhere"),
    "adapter_name_or_path": ("", NUL, LONG, "./nowhere"),
    "report_to": ("", "nothing", NUL, LONG),
    "lr_scheduler_type": ("", "linea", "cosine_with_min_lr", "warmup_stable_decay", LONG),
    "lr_scheduler_kwargs": ("", "{", "[]", "{]", "file", '{"a": 1}', LONG, "{" * 5000, '{"a":' * 3000),
    "optim": ("", "adam", "galore_adamw", "apex", LONG),
    "optim_args": ("", "a", "a=1", LONG),
    "optim_target_modules": ("", "all"),
    "accelerator_config": ("", "{", "file", '{"a": 1}', LONG),
    "fsdp_config": ("{", "nowhere.json"),
    "deepspeed": ("{", "nowhere.json", LONG),
    "activation_checkpointing_kwargs": ("{", "nowhere.json"),
    "save_strategy": ("best", "sometimes"),
    "eval_strategy": ("steps", "sometimes"),
    "logging_strategy": ("sometimes",),
    "hub_strategy": ("sometimes",),
    "log_level": ("loud",),
    "debug": ("everything",),
    "ddp_backend": ("pigeon",),
    "torch_compile_backend": ("pigeon",),
    "torch_compile_mode": ("pigeon",),
    "dataloader_multiprocessing_context": ("thread",),
    "dtype": ("float8", "", LONG),
    "reference": ("none",),
    "encode": ("never",),
    "loss_type": ("ppo", "", LONG),
    "list_loss": ("every",),
    "timestep_range": ("0", "1"),
    "discriminator_mode": ("adversarial", "kind"),
    "dataset_test_split": ("train", ""),
    "metric_for_best_model": ("fid",),
    "load_best_model_at_end": ("true",),
    "eval_steps": ("5",),
    "label_smoothing_factor": ("0.1",),
    "remove_unused_columns": ("true",),
    "logit_mean": ("1",),
    "validation_steps": ("5",),
    "discriminator_learning_rate": ("0.1",),
    "hub_model_id": ("me/mine",),
    "dataloader_persistent_workers": ("true",),
    "eval_on_start": ("true",),
    "warmup_steps": ("3 --lr_scheduler_type=constant",),
    "use_peft": ("perhaps",),
    "bf16": ("perhaps",),
    "config": ("", NUL, LONG, "nowhere.yaml", ".", "/dev/null"),
    "visits": ("1.5",),
    "resolution": ("16.0",),
    "nothing": ("1",),
    LONG: ("1",),
}
OTHERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "self_rewarding": {
        "classes": ("", " ", "!", "lion ", NUL),
        "sources": ("steps=0", "steps=1e9", "guidance=nan", "steps=4 steps=5", "adapter="),
        "exports": ("pears", ""),
        "question_weights": ("a", "a=1", "realistic=nan", "realistic=0"),
        "rubric": ("", "nowhere", LONG, NUL, "."),
        "license": ("", "My License", LONG),
        "height": ("12", "7"),
        "detector": ("",),
        "temperature": ("101",),
    },
    "consensus_pairs": {
        "judges": ("", "rubric=reward", "pocket rubric=nowhere", "pocket dtype=int8", "pocket a=1"),
        "p_chosen": ("all",),
    },
    "self_critique": {"critic_url": ("http://localhost",), "answers": ("1", "17"), "margin": ("0.5",)},
    "discriminator_pairs": {"sources": ("a", "caption=raw", ""), "exports": ("sft",), "height": ("16",)},
    "vlm_qlora_ensemble": {"average_rank": ("0",)},
    "vlm_dpo": {
        "split_seed": ("4",),
        "visits": ("5",),
        "test_size": ("0", "nan", "2.5"),
        "bnb_4bit_quant_type": ("fp4",),
        "beta": ("0",),
    },
    "diffusion_cpo": {"loss_type": ("dpo", "hinge")},
    "diffusion_methods": {"methods": ("rlhf", ""), "build": ("nowhere.yaml",), "compare": ("",)},
    "self_rewarding_rounds": {"rounds": ("0",), "sft": ("nowhere.yaml",), "classes": ("",)},
    "compare_text_to_image": {"systems": ("",), "prompts": ("nowhere.txt", ""), "votes": ("nowhere.json",)},
    "compare_vlm": {"systems": ("", "one"), "rubric": ("answers",), "critic_url": ("http://localhost",)},
    "discriminator": {
        "r1_gamma": ("5 --regulariser=none",),
        "reference": ("cache",),
        "widths": ("0", "-1", "9000"),
        "eval_strategy": ("steps",),
        "dataset_test_split": ("train",),
    },
}


def _words(world: World) -> Iterator[Trial]:
    for name, options in {"diffusion_dpo": WORDS, **OTHERS}.items():
        for option, values in options.items():
            for value in values:
                shown = value if len(value) < 40 else f"{value[:3]}... ({len(value)})"
                says = (f"{re.escape(option[:100])}|/dev/null",)
                yield Trial(f"{name} --{option[:40]}={shown!r}", _in_folder(name, world, option, value), says)


def _in_folder(name: str, world: World, option: str, value: str) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        (folder / "file").write_text("[1]")
        (folder / "link").symlink_to("link")
        first, *more = f"{option}={value}".split(" --")
        return parsing(name, world, f"--{first}", *(f"--{word}" for word in more))(folder)

    return act


# Runs


def _runs(world: World) -> Iterator[Trial]:
    """What only a run can tell."""
    yield Trial("diffusion_dpo works", program("diffusion_dpo", world.options("diffusion_dpo")))
    for name, changes, says in (
        ("diffusion_dpo", {"lora_target_modules": "nothing"}, "lora_target_modules"),
        ("diffusion_dpo", {"resolution": 15}, "resolution"),
        ("diffusion_dpo", {"learning_rate": 1e38}, "finite"),
        ("diffusion_dpo", {"push_to_hub": None}, "push_to_hub"),
        ("diffusion_dpo", {"push_to_hub": None, "hub_model_id": "!!"}, "push_to_hub"),
        ("diffusion_dpo", MEASURED | {"save_strategy": "best"}, "metric_for_best_model.*loss"),
        ("diffusion_dpo", {"resume_from_checkpoint": "nowhere"}, "nowhere"),
        ("diffusion_dpo", {"dataset_train_split": "nowhere"}, "nowhere"),
        ("diffusion_dpo", {"test_fraction": 0.001, "eval_strategy": "steps"}, "test_fraction"),
        ("vlm_dpo", {"max_length": 1}, "max_length"),
        ("vlm_dpo", {"test_size": 1000, "eval_strategy": "steps"}, "test_size"),
        ("vlm_dpo", {"attn_implementation": "nothing"}, "attn_implementation"),
        ("text_to_image_pairs", {"num_inference_steps": 2000}, "num_inference_steps"),
        ("text_to_image_pairs", {"num_prompts": 1000}, "num_prompts"),
        ("text_to_image_pairs", {"min_margin": 1e6}, "margin"),
    ):
        given = world.options(name) | changes
        yield Trial(f"{name} runs with {changes}", program(name, given), (says,))
    for member in ("a", "a=1", "lora_r=0", "lora_alpha=-3", "lora_dropout=1", "learning_rate=nan", "seed=-1"):
        given = world.options("vlm_sft") | {"members": ["lora_r=2", member]}
        yield Trial(f"members {member}", program("vlm_qlora_ensemble", given), (member.partition("=")[0],))
