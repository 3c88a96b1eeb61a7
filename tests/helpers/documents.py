"""The pages of docs/, and the blocks in them."""

import re
from pathlib import Path

from launching import ROOT

DOCS = ROOT / "docs"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def fenced(page: Path, language: str) -> list[str]:
    """The blocks of a page that are marked as of this language."""
    return [text for kind, text in FENCED.findall(page.read_text(encoding="utf-8")) if kind == language]
