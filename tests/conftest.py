"""What every test needs: no network, few threads, and `--slow`."""

# ruff: noqa: E402 (the environment comes first)

import os
import tempfile

# Tables read by the tests are prepared in a folder of their own, not in the user's cache.
CACHE = tempfile.TemporaryDirectory(prefix="prefopt-datasets-")

# Before any library reads them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_DATASETS_CACHE=CACHE.name,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from pictures import write_pairs
from tiny import tiny_sdxl, tiny_stable_diffusion

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_unconfigure() -> None:
    CACHE.cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory) -> str:
    """The folder of a tiny pipeline that predicts epsilon."""
    return tiny_stable_diffusion(tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture(scope="session")
def stable_diffusion_v(tmp_path_factory) -> str:
    """The folder of a tiny pipeline that predicts v."""
    return tiny_stable_diffusion(tmp_path_factory.mktemp("models") / "sd21", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory) -> str:
    """The folder of a tiny SDXL pipeline."""
    return tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def setting(stable_diffusion, tmp_path_factory) -> dict:
    """Options of a training run: a tiny model and twelve pairs, a step of four."""
    folder = tmp_path_factory.mktemp("setting")
    return {
        "model_name_or_path": stable_diffusion,
        "dataset_name": write_pairs(folder / "pairs", 12),
        "per_device_train_batch_size": 4,
        "max_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "cache_dir": str(folder / "cache"),
        "flip_probability": 0.5,
        "drop_probability": 0.2,
    }


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> str:
    """The folder of a table of eight pairs of random images."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), 8)
