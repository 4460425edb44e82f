"""Where a model's files are: a local folder as it stands, or a snapshot of a hub repository. No torch."""

from __future__ import annotations

import os
from os.path import expanduser
from pathlib import Path

from align import gguf
from align.errors import ModelError

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_REST = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken", "chat_template*")


def resolve_model_folder(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder that holds a model or a peft adapter.

    Args:
        path: a local folder; a GGUF file, which becomes one (`align.gguf`); or a hub id (`owner/name`), which is
            downloaded into huggingface_hub's cache.
        revision: branch, tag or commit of a hub id; a local folder has none.
        weights: also the weight files; without them only configuration and tokenizer travel.

    Raises ModelError: a file that cannot be read, no such folder or repository, not downloadable (offline, gated), a
    revision for a folder.
    """
    text = str(path)
    local = Path(expanduser(text))
    if local.exists() and revision is not None:
        what = "folder" if local.is_dir() else "file"
        raise ModelError(
            f"`revision: {revision}` was given, and this is a local {what}", where=local, remedy="leave it out"
        )
    if local.is_dir():
        return local.absolute()
    if local.is_file() and local.suffix == gguf.SUFFIX:
        return gguf.folder_of(local)
    if local.exists():
        raise ModelError("this is a file; a model is a folder with config.json, or a .gguf file", where=local)
    if not looks_like_hub_id(text):
        raise ModelError("no such folder", where=local, remedy="check the path; a hub id is owner/name")
    return _snapshot(text, revision, weights)


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` has the shape of a hub id: `name` or `owner/name`, and no path."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if os.sep != "/" and os.sep in text:
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _snapshot(repo: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*_REST, *(_WEIGHTS if weights else ())]
    where = f"{repo}@{revision}" if revision else repo
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        remedy = f"accept its terms at https://huggingface.co/{repo} and run `hf auth login`"
        raise ModelError("the hub does not let you read this repository", where=where, remedy=remedy) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"the repository has no revision {revision!r}", where=where) from error
    except RepositoryNotFoundError as error:
        remedy = "check the spelling; for a local folder, check the path; for a private one, run `hf auth login`"
        raise ModelError("no such folder, and no such repository on the hub", where=where, remedy=remedy) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        remedy = "no such folder here; to use the hub, download it where there is a network: `hf download " + repo + "`"
        raise ModelError(f"cannot be fetched from the hub: {_first_line(error)}", where=where, remedy=remedy) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
