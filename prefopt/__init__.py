"""Preferences for text-to-image and vision-language models: making them, and training on them.

The names below are the public ones; each is imported with its module when it is first used, so that importing
prefopt takes no time and loads no torch. docs/python-api.md shows how to use them.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt import pocket as pocket
    from prefopt.averaging import average_adapters as average_adapters
    from prefopt.checkpoints import SavesItself as SavesItself
    from prefopt.config import PreferenceConfig as PreferenceConfig
    from prefopt.draws import Draw as Draw
    from prefopt.draws import draw as draw
    from prefopt.draws import generator as generator
    from prefopt.errors import InputError as InputError
    from prefopt.judges.loading import load_critic as load_critic
    from prefopt.judges.loading import load_judge as load_judge
    from prefopt.judges.questions import Answer as Answer
    from prefopt.judges.questions import Case as Case
    from prefopt.judges.questions import Judge as Judge
    from prefopt.judges.questions import Question as Question
    from prefopt.judges.questions import ask as ask
    from prefopt.judges.rubric import Rubric as Rubric
    from prefopt.losses import ListLoss as ListLoss
    from prefopt.losses import Pair as Pair
    from prefopt.losses import PreferenceLoss as PreferenceLoss
    from prefopt.losses import cpo_loss as cpo_loss
    from prefopt.losses import discriminator_loss as discriminator_loss
    from prefopt.losses import dpo_loss as dpo_loss
    from prefopt.losses import every_pair as every_pair
    from prefopt.losses import hinge_loss as hinge_loss
    from prefopt.losses import ipo_loss as ipo_loss
    from prefopt.losses import mapo_loss as mapo_loss
    from prefopt.losses import over_pairs as over_pairs
    from prefopt.losses import plackett_luce_loss as plackett_luce_loss
    from prefopt.losses import rank_dpo_loss as rank_dpo_loss
    from prefopt.losses import realism_loss as realism_loss
    from prefopt.losses import reward_metrics as reward_metrics
    from prefopt.losses import robust_dpo_loss as robust_dpo_loss
    from prefopt.losses import sft_loss as sft_loss
    from prefopt.losses import simpo_loss as simpo_loss
    from prefopt.objectives import Batch as Batch
    from prefopt.objectives import Loss as Loss
    from prefopt.objectives import Objective as Objective
    from prefopt.objectives import ObjectiveOptions as ObjectiveOptions
    from prefopt.objectives import Scored as Scored
    from prefopt.objectives import make_objective as make_objective
    from prefopt.objectives import objective_of as objective_of
    from prefopt.objectives import pairwise as pairwise
    from prefopt.objectives import supervised as supervised
    from prefopt.reference import frozen_copy as frozen_copy
    from prefopt.scores import Score as Score
    from prefopt.trainer import PreferenceTrainer as PreferenceTrainer
    from prefopt.visits import VisitDataset as VisitDataset

# It warns at every import that a 4-bit kernel for CPUs is not installed, used or not.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Module -> its public names.
_PUBLIC = {
    "averaging": "average_adapters",
    "checkpoints": "SavesItself",
    "config": "PreferenceConfig",
    "draws": "Draw draw generator",
    "errors": "InputError",
    "judges.loading": "load_critic load_judge",
    "judges.questions": "Answer Case Judge Question ask",
    "judges.rubric": "Rubric",
    "losses": "ListLoss Pair PreferenceLoss cpo_loss discriminator_loss dpo_loss every_pair hinge_loss "
    "ipo_loss mapo_loss over_pairs plackett_luce_loss rank_dpo_loss realism_loss reward_metrics "
    "robust_dpo_loss sft_loss simpo_loss",
    "objectives": "Batch Loss Objective ObjectiveOptions Scored make_objective objective_of pairwise "
    "supervised",
    "reference": "frozen_copy",
    "scores": "Score",
    "trainer": "PreferenceTrainer",
    "visits": "VisitDataset",
}
_MODULE = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = ["pocket", *_MODULE]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "pocket":
        return import_module("prefopt.pocket")
    if name not in _MODULE:
        raise AttributeError(f"module 'prefopt' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"prefopt.{_MODULE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
