"""The embedded default, `pocket` where a model is named: a drawn world and models for a laptop's CPU.

This file imports no torch; `world` draws and words the scenes, `oracle` judges them for evaluation alone, and
`pretraining` is how the weights were made (PROVENANCE.json).
"""

from pathlib import Path
from typing import Literal, get_args

from prefopt.records import InputError

Part = Literal["text_to_image", "clip", "oracle", "pairs", "yolo_world", "llava"]

_HERE = Path(__file__).parent


def folder(part: str) -> Path:
    """Where a part lies: a pipeline, a CLIP, the oracle, or a dataset of pairs."""
    if part not in get_args(Part):
        raise InputError(f"the pocket has no part {part!r}; its parts are {', '.join(get_args(Part))}")
    return _HERE / "weights" / part


def resolve(name_or_path: str, part: str) -> str:
    """`pocket` becomes the folder of its `part`; any other name stays as it is."""
    return str(folder(part)) if name_or_path == "pocket" else name_or_path
