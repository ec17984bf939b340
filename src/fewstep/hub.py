"""A student's folder on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from fewstep.errors import FewstepError

TOKEN = "HF_TOKEN"


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload everything in `folder` to the model repository `repo`, made if it is not there; returns its address.

    The token comes from the environment variable HF_TOKEN and is written nowhere.

    Raises:
        FewstepError: no token.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=require_token())
    api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo, folder_path=str(folder), repo_type="model", commit_message="Student made by fewstep"
    )
    return f"https://huggingface.co/{repo}"


def require_token() -> str:
    """The token of the environment.

    Raises:
        FewstepError: there is none.
    """
    token = os.environ.get(TOKEN)
    if not token:
        raise FewstepError(
            f"found no {TOKEN} in the environment, expected a Hugging Face token that may write, fix: set {TOKEN}"
        )
    return token
