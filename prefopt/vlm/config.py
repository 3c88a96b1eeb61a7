"""The options that recipes on vision-language models share."""

from dataclasses import dataclass

from prefopt.config import RecipeConfig
from prefopt.errors import InputError
from prefopt.options import check_interval, option


@dataclass
class VlmConfig(RecipeConfig):
    """A recipe's options, and how model and pairs are read."""

    attn_implementation: str | None = option(
        None, "eager, sdpa, flash_attention_2, ... (default: the best there is)."
    )
    dataset_name: str | None = option(None, "Vision preference pairs: a folder or a hub id.")
    max_length: int | None = option(
        None, "Most tokens of prompt, images and completion: longer ones are cut (default: no limit)."
    )
    lora_target_modules: list[str] | None = option(
        None, "Layers of the language model that get an adapter (default: all linear ones)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_peft and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every adapter is used in every forward
        check_interval(self, "[1, inf)", "max_length")
        if self.reference == "cache":
            raise InputError(
                "--reference cache is for diffusion models; on this side reference scores are computed live"
            )
