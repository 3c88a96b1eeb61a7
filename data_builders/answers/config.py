"""The options of the self-critique builder; importing them imports no model library."""

from dataclasses import dataclass
from typing import Literal

from data_builders.export.config import HubOptions
from data_builders.images.selection import PairRule
from prefopt import pocket
from prefopt.errors import InputError
from prefopt.options import check_options, check_paths_exist, option


@dataclass
class SelfCritiqueConfig(HubOptions):
    """What is asked, what answers, what compares the answers, and what is written."""

    dataset_name: str | None = option(
        None,
        "Prompts with images, of a vision-language table with answers or pairs: a folder, a hub id, or "
        "`pocket` (the default for the model `pocket`).",
    )
    dataset_config: str | None = option(
        None, "Configuration of the dataset: of the hub's, or a folder's sub-folder."
    )
    dataset_revision: str | None = option(None, "Revision of the dataset on the hub.")
    dataset_split: str = option("train", "The split whose prompts are answered.")
    max_rows: int | None = option(None, "Use the first N rows (default: all).", within="[1, inf)")

    model_name_or_path: str = option("pocket", "Model that answers: a folder, a hub id or `pocket`.")
    model_revision: str | None = option(None, "Revision of the model on the hub.")
    adapter: str | None = option(None, "LoRA for that model, in peft's format: a folder or a hub id.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of the models.")
    answers: int = option(
        2, "Answers per prompt; k of them take k * (k - 1) questions to the critic.", within="[2, 16]"
    )
    temperature: float = option(1.0, "Sampling temperature.", within="(0, 100]")
    top_p: float = option(
        1.0, "Total probability of the likeliest tokens that are sampled from.", within="(0, 1]"
    )
    max_new_tokens: int = option(
        512, "Longest answer; one that has not ended by then is not used.", within="[1, 1e6]"
    )
    seed: int = option(0, "The answers follow from it.", within="[0, 4294967295]")
    batch_size: int = option(8, "Prompts answered at once.", within="[1, 65536]")
    block_size: int = option(
        64, "Prompts per block; each process works on blocks of its own.", within="[1, 1e6]"
    )

    critic_name_or_path: str | None = option(
        None,
        "Critic: a folder, a hub id, `pocket` for the pocket's critic, or a model's name at --critic_url "
        "(default: the model that answers, with its adapter).",
    )
    critic_revision: str | None = option(None, "Revision of the critic on the hub.")
    critic_adapter: str | None = option(
        None, "LoRA for the critic; without --critic_name_or_path, in place of the answering model's."
    )
    critic_url: str | None = option(
        None, "Endpoint that serves the critic: /v1/systemone or OpenAI-compatible."
    )
    critic_writes: bool = option(
        False, "The critic at --critic_url writes its verdict, in place of a choice that is read by log-odds."
    )
    critic_templates: str | None = option(None, "Folder with the critic's words (default: ours).")
    critic_batch_size: int = option(8, "Prompts whose answers are compared at once.", within="[1, 65536]")
    with_reference: bool = option(False, "Show the critic the table's own answer as a correct one.")

    margin: float = option(
        0.1,
        "Abstain unless the better answer's probability, by the mean log-odds of both orders, exceeds 0.5 "
        "by this much.",
        within="[0, 0.5)",
    )
    pair_rule: PairRule = option("best_worst", "Which ranked answers become pairs, if there are more than 2.")
    balance_length: bool = option(
        False,
        "Leave out pairs, those with the least margin, until as many chosen answers are longer as shorter.",
    )
    gallery: bool = option(True, "Write gallery.html.")
    shard_megabytes: int = option(256, "Largest Parquet file of a table.", within="[1, 1e6]")
    output_dir: str = option("data/self_critique", "Folder for the dataset.")

    def __post_init__(self) -> None:
        check_options(self)
        self.check_hub()
        check_paths_exist(self, "model_name_or_path")
        pocket.fill_defaults(self, [self.model_name_or_path], "dataset_name")
        check_paths_exist(self, "dataset_name", "adapter", "critic_adapter")
        check_paths_exist(self, "critic_templates")
        if not self.critic_url:
            check_paths_exist(self, "critic_name_or_path")
        self._check_critic()

    def _check_critic(self) -> None:
        if self.critic_url and not self.critic_name_or_path:
            raise InputError(
                "--critic_name_or_path is missing; name the model that --critic_url is to answer with"
            )
        if self.critic_url and (self.critic_adapter or self.critic_revision):
            raise InputError(
                "--critic_adapter and --critic_revision are for a critic that is loaded here; the server at "
                "--critic_url has its own"
            )
        if self.critic_writes and not self.critic_url:
            raise InputError("--critic_writes is for a server; name it with --critic_url, or leave it out")

    @property
    def critic(self) -> tuple[str, str | None, str | None]:
        """The critic's name, revision and adapter: by default those of the model that answers."""
        if self.critic_name_or_path:
            return self.critic_name_or_path, self.critic_revision, self.critic_adapter
        return (
            self.model_name_or_path,
            self.critic_revision or self.model_revision,
            self.critic_adapter or self.adapter,
        )
