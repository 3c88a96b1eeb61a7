"""The options that recipes on vision-language models share."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Literal

from prefopt.config import RecipeConfig
from prefopt.errors import InputError
from prefopt.options import option


@dataclass
class VlmConfig(RecipeConfig):
    """A recipe's options, and how model and pairs are read."""

    HOLD_OUT: ClassVar[str] = "a --dataset_test_split or a --test_size"

    model_name_or_path: str = option(
        "pocket", "A chat model that reads images: a folder, a hub id, or `pocket`."
    )
    attn_implementation: str | None = option(
        None, "eager, sdpa, flash_attention_2, ... (default: the best there is)."
    )
    dataset_name: str | None = option(
        None,
        "Prompts about images with answers, or pairs of answers: a folder, a file (.jsonl, .json, .csv, "
        ".parquet) or a hub id.",
    )
    max_length: int | None = option(
        None,
        "Most tokens of prompt, images and completion: longer ones are cut (default: no limit).",
        within="[1, 1e9]",
    )
    shared_prefix: bool = option(
        True,
        "Read an image and a prompt once for all answers that follow them; --no_shared_prefix repeats them.",
    )
    row_tokens: int | None = option(
        None,
        "Put several examples into a row of up to N tokens (default: no longer than the longest one).",
        within="[1, 1e9]",
    )
    test_size: float | None = option(
        None,
        "Hold out this share of the examples, or from 1 this number, by image: they are not trained on, and "
        "--eval_strategy steps measures them.",
        within="(0, 1e9]",
    )
    split_seed: int = option(
        0,
        "Seed that decides which images --test_size holds out.",
        within="[0, 4294967295]",
        needs="test_size",
    )
    group_by_image: bool = option(
        False,
        "Read the examples of an image one after another, so that a batch reads it once for all of them.",
    )
    vision_features: Literal["live", "cache"] = option(
        "live", "Image features of the frozen vision tower: computed in every step, or once and kept on disk."
    )
    lora_target_modules: list[str] | None = option(
        None, "Layers of the language model that get an adapter (default: all linear ones)."
    )
    load_in_4bit: bool = option(
        False,
        "QLoRA: linear layers of the language model in 4 bits; vision tower, projector, language head and "
        "all the rest have --dtype.",
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "Data type of the 4-bit weights.")
    use_bnb_nested_quant: bool = option(
        True, "Quantise the constants of the 4-bit weights, too (double quantisation)."
    )

    @property
    def holds_out(self) -> bool:
        """Whether there are examples that are not trained on."""
        return super().holds_out or self.test_size is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_4bit()
        if self.use_peft and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every adapter is used in every forward
        if self.test_size is not None and self.dataset_test_split is not None:
            raise InputError("--test_size and --dataset_test_split: leave one of them out")
        if self.vision_features == "cache" and self.dataset_test_split is not None:
            raise InputError("--vision_features cache keeps those of one split; use --test_size to hold out")
        if self.visits not in (None, 1):
            raise InputError(
                "--visits has no effect on language: an epoch reads every example alike; leave it out"
            )
        if self.test_size is not None and self.test_size >= 1 and self.test_size % 1:
            raise InputError(
                f"--test_size is {self.test_size}; from 1 on it is a number of examples, a whole one"
            )
        self.visits = 1  # nothing of an example is random: every epoch reads it alike
        if not self.shared_prefix and (self.vision_features == "cache" or self.row_tokens):
            raise InputError(
                "--vision_features cache and --row_tokens need shared prefixes; leave out --no_shared_prefix"
            )
        if self.vision_features == "cache" and not self.use_peft:
            raise InputError(
                "--vision_features cache: with --no_use_peft the vision tower is trained, and its features "
                "change; leave one of the two out"
            )

    def _check_4bit(self) -> None:
        if not self.load_in_4bit:
            if self.bnb_4bit_quant_type != "nf4" or not self.use_bnb_nested_quant:
                raise InputError(
                    "--bnb_4bit_quant_type and --no_use_bnb_nested_quant are for --load_in_4bit; add it"
                )
            return
        if not self.use_peft:
            raise InputError("--load_in_4bit is for frozen weights; leave out --no_use_peft")
        if self.sharding:
            raise InputError(
                f"--load_in_4bit: {self.sharding} cannot split weights of 4 bits; leave one of the two out"
            )
        if find_spec("bitsandbytes") is None:
            raise InputError('--load_in_4bit needs bitsandbytes: pip install "prefopt[bitsandbytes]"')
