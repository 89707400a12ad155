"""Checkpoints on the Hugging Face Hub by repository id, such as "somebody/hmdiff-base".

Only JSON, safetensors and the card are downloaded, nothing executable. The Hub's own cache stores them.
"""

from __future__ import annotations

import re
from pathlib import Path

from hmdiff.errors import UserError
from hmdiff.files.resources import asset_path

FILES = ("*.json", "*.safetensors", "README.md")
_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")


def is_repository_id(name: str) -> bool:
    """Whether the name is OWNER/NAME and neither the path nor its first part exists locally."""
    return bool(_ID.fullmatch(name)) and not Path(name).exists() and not Path(name).parent.is_dir()


def checkpoint_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a saved pipeline: a folder, the one of its training, a shipped one, or OWNER/NAME on the Hub.

    The pipeline may be incomplete. Raises `UserError` if there is none.
    """
    place = Path(name)
    if is_repository_id(name):
        return download(name, revision)
    if not place.exists():
        if len(place.parts) > 1:
            raise UserError(
                f"{name}: not a saved hmdiff pipeline: no such folder; give one, such as runs/NAME/pipeline"
            )
        try:
            return asset_path(name)
        except UserError:
            raise UserError(f"{name}: neither a folder nor a shipped checkpoint (hmdiff_small, direct_small)") from None
    if not (place / "hmdiff.json").is_file() and (place / "pipeline" / "hmdiff.json").is_file():
        return place / "pipeline"
    return place


def download(repository: str, revision: str | None = None) -> Path:
    """The checkpoint's folder, from the cache if present. Raises `UserError` if it cannot be downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise UserError(
            f"{repository}: no such folder, and it cannot be had from the Hugging Face Hub ({reason}); check the name, "
            "the connection and, for a private repository, HF_TOKEN"
        ) from None


def upload(folder: Path, repository: str, private: bool = False, message: str = "Upload an hmdiff pipeline") -> str:
    """Upload a saved pipeline and its card to a repository, created if missing; returns its URL."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not _ID.fullmatch(repository):
        raise UserError(f"{repository}: not a repository id; give OWNER/NAME")
    hub = HfApi()
    try:
        address = str(hub.create_repo(repository, private=private, exist_ok=True))
        hub.upload_folder(folder_path=folder, repo_id=repository, allow_patterns=list(FILES), commit_message=message)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise UserError(
            f"{repository}: the Hugging Face Hub did not take it ({reason}); set HF_TOKEN to a token that may write"
        ) from None
    return address
