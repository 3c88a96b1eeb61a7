"""Where a finished dataset goes besides its folder; importing this imports no model library."""

import re
from dataclasses import dataclass

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from prefopt.errors import InputError
from prefopt.options import option, shown

UNKNOWN = "unknown"


@dataclass
class HubOptions:
    """The dataset on the hub, and the license that its card names."""

    push_to_hub: str | None = option(None, "Dataset id on the hub to upload to.")
    license: str = option(
        UNKNOWN,
        "License that the dataset's card names, as the hub calls it: cc-by-4.0, openrail, ... What a model "
        "makes is bound by its license, so none is chosen for you.",
    )

    def check_hub(self) -> None:
        """InputError for a dataset id or a license that the hub would refuse, after hours of building."""
        if self.push_to_hub is not None:
            try:
                validate_repo_id(self.push_to_hub)
            except HFValidationError as error:
                raise InputError(f"--push_to_hub {shown(self.push_to_hub)}: {str(error)[:300]}") from error
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise InputError(
                f"--license {self.license!r}: write it as the hub does, in small letters and without spaces: "
                "cc-by-4.0, apache-2.0, openrail, other"
            )
