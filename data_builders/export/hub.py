"""Uploading a finished build."""

from pathlib import Path

from huggingface_hub import HfApi

from prefopt.files import reporting_write_errors


def push(folder: Path, repository: str) -> None:
    """Upload a build's folder as a dataset; its tables are bounded files, so memory stays bounded, too."""
    with reporting_write_errors(f"the hub's {repository}"):
        api = HfApi()
        api.create_repo(repository, repo_type="dataset", exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, repo_type="dataset", ignore_patterns=["work/**", ".lock"]
        )
