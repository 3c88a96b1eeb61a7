"""Uploading a finished build."""

from pathlib import Path

from huggingface_hub import HfApi

from prefopt.files import reporting_write_errors

# What computing left in the folder, and hidden files and folders: locks, tables that are half written.
LEFT_OUT = ["work/*", "cache/*", ".*", "*/.*"]
# Of an earlier upload, whatever this one has no file for: its tables would be read together with these.
REPLACED = ["*.parquet", "imagefolder/*"]


def push(folder: Path, repository: str) -> None:
    """Upload a build's folder as a dataset; its tables are bounded files, so memory stays bounded, too."""
    with reporting_write_errors(f"the hub's {repository}"):
        api = HfApi()
        api.create_repo(repository, repo_type="dataset", exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            repo_type="dataset",
            ignore_patterns=LEFT_OUT,
            delete_patterns=REPLACED,
        )
