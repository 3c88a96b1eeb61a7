"""The options of a builder whose prompts are of classes, written by an LLM or read from a file."""

from dataclasses import dataclass

from prefopt.errors import InputError
from prefopt.options import check_options, check_paths_exist, option, shown


@dataclass
class PromptOptions:
    """The classes, and where their prompts come from."""

    classes: list[str] = option(["elephant", "giraffe"], "What the images are to show.")
    prompts: str | None = option(
        None, "Text file, one prompt a line, each naming one class (default: an LLM writes them)."
    )
    prompts_per_class: int = option(100, "Prompts to write.", within="[1, 1e6]")
    held_out_per_class: int = option(
        25, "Further prompts to write, for comparisons: held_out_prompts.txt.", within="[0, 1e6]"
    )
    writer_model_name_or_path: str | None = option(
        None,
        "LLM that writes the prompts: a folder, a hub id or `pocket` (the default for the model `pocket`).",
    )
    writer_revision: str | None = option(None, "Revision of that LLM on the hub.")
    writer_url: str | None = option(None, "OpenAI-compatible endpoint that serves the LLM.")
    system_prompt: str | None = option(None, "Text file with the LLM's system prompt (default: ours).")
    request_template: str | None = option(
        None, "Text file with the request, with {count} and {class} (default: ours)."
    )
    temperature: float = option(0.7, "Sampling temperature of the LLM; 0 is greedy.", within="[0, 100]")
    top_p: float = option(
        0.95, "Total probability of the likeliest tokens from which the LLM samples.", within="(0, 1]"
    )

    def __post_init__(self) -> None:
        check_options(self)
        # Hours of other work come before these are read.
        check_paths_exist(self, "prompts")
        if not self.classes:
            raise InputError("--classes is empty; name one or more")
        for number, name in enumerate(self.classes):
            if not any(map(str.isalnum, name)) or name != name.strip():
                raise InputError(
                    f"--classes has {shown(name)}; a class is a name, with a letter or digit and no space at "
                    "its ends"
                )
            if name.endswith(tuple(".,;:!?")):  # no prompt would have it before a space
                raise InputError(
                    f"--classes has {shown(name)}; a class is a name as it stands within a prompt: write "
                    f"{name.rstrip('.,;:!?')}"
                )
            if name.casefold() in map(str.casefold, self.classes[:number]):
                raise InputError(f"--classes names {shown(name)} twice; prompts tell classes by their names")
