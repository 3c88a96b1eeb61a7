"""Uploading a finished build."""

from pathlib import Path

from huggingface_hub import HfApi

from prefopt.files import reporting_write_errors
from prefopt.local_tables import table_names

# What computing left in the folder, and hidden files and folders: locks, tables that are half written.
LEFT_OUT = ["work/*", "cache/*", ".*", "*/.*"]


def push(folder: Path, repository: str) -> None:
    """Upload a build's folder as a dataset; its tables are bounded files, so memory stays bounded, too."""
    # Files of an earlier upload in the folders of this one would be read together with its files.
    replaced = [f"{table}/*.parquet" for table in table_names(folder)]
    if (folder / "imagefolder").is_dir():
        replaced.append("imagefolder/*")
    with reporting_write_errors(f"the hub's {repository}"):
        api = HfApi()
        api.create_repo(repository, repo_type="dataset", exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            repo_type="dataset",
            ignore_patterns=LEFT_OUT,
            delete_patterns=replaced,
        )
