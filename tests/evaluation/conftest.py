"""Tiny vision-language models, and a comparison of them."""

from pathlib import Path

import pytest
from vlm_answers import Scripted, critic, read_rows, run, write_models, write_words

from prefopt.judges.critic_cases import Templates


@pytest.fixture(scope="session")
def vlms(tmp_path_factory) -> Path:
    """A tiny model, two random adapters on it, another model, and questions about images."""
    return write_models(tmp_path_factory.mktemp("vlms"))


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> Templates:
    """The words of the scripted critic."""
    return write_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="session")
def compared_vlms(vlms, words, tmp_path_factory) -> tuple[Path, dict, list[dict]]:
    """The folder of a comparison of the model and its adapters, its summary and its rows."""
    folder = tmp_path_factory.mktemp("compared")
    summary = run(vlms, folder, critic(Scripted(), words), 0, 1)
    return folder, summary, read_rows(folder)
