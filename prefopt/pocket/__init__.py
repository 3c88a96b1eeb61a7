"""The embedded default, `pocket` where a model is named: a drawn world and models for a laptop's CPU.

This file imports no torch. `world` renders and captions the scenes, `oracle` judges them for evaluation
alone; how the weights were trained is in PROVENANCE.json and scripts/pocket/.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from prefopt.errors import InputError

Part = Literal["text_to_image", "clip", "oracle", "pairs", "yolo_world", "llava", "critic", "discriminator"]

NAME = "pocket"
_HERE = Path(__file__).parent


def folder(part: str) -> Path:
    """The folder of a part: a pipeline, a CLIP, the oracle, a dataset of pairs, ..."""
    if part not in get_args(Part):
        raise InputError(f"the pocket has no part {part!r}; its parts are {', '.join(get_args(Part))}")
    return _HERE / "weights" / part


def resolve(name_or_path: str, part: str) -> str:
    """`pocket` becomes the folder of its `part`; any other name stays as it is."""
    return str(folder(part)) if name_or_path == NAME else name_or_path


def fill_defaults(config: object, models: Iterable[str], *options: str) -> None:
    """Set options that were left out to `pocket`, if all models are that, too; else they are required.

    InputError that names the missing option: a real model is never trained on the pocket's pictures unasked.
    """
    for option in options:
        if getattr(config, option) is None:
            if other := next((model for model in models if model != NAME), None):
                raise InputError(
                    f"--{option} is missing: only the model `{NAME}` has a default for it, not {other}"
                )
            setattr(config, option, NAME)
