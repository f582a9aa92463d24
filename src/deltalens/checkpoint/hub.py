"""Checkpoints on the Hugging Face Hub: only the files that are needed."""

from __future__ import annotations

import re
from pathlib import Path

from deltalens.errors import CheckpointError

__all__ = ["download", "needed_files", "split_hub_id"]

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_SMALL = ("config.json", "tokenizer.json", "adapter_config.json")


def split_hub_id(spec: str) -> tuple[str, str | None] | None:
    """`owner/name` and the revision after an `@`; None where the text is no Hub id."""
    match = _ID.fullmatch(spec)
    return (match["repo"], match["revision"]) if match else None


def needed_files(names: list[str]) -> list[str]:
    """Which of a repository's files make up its checkpoint: one set of weights, config and tokenizer."""
    top = [name for name in names if "/" not in name]
    safetensors = [name for name in top if name.endswith(".safetensors")]
    shards = [name for name in safetensors if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    bins = [name for name in top if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", name)]
    if "adapter_config.json" in top and "config.json" not in top:
        weights = [name for name in top if name in ("adapter_model.safetensors", "adapter_model.bin")][:1]
    elif "model.safetensors.index.json" in top and shards:
        weights = ["model.safetensors.index.json", *shards]
    elif "model.safetensors" in top:
        weights = ["model.safetensors"]
    elif safetensors:
        weights = safetensors
    else:
        index = [name for name in top if name == "pytorch_model.bin.index.json"]
        weights = index + bins
    return weights + [name for name in _SMALL if name in top] if weights else []


def download(repo: str, revision: str | None) -> Path:
    """The folder of a repository's snapshot, its checkpoint downloaded unless the cache has it.

    Raises:
        CheckpointError: there is no such repository or revision, access is refused, the network cannot be reached
            and the cache lacks it, or it holds no checkpoint.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    called = f"{repo}@{revision}" if revision else repo
    try:
        listed = HfApi().model_info(repo, revision=revision, timeout=20).siblings or []
        files = needed_files([sibling.rfilename for sibling in listed])
        if files:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except GatedRepoError:
        raise CheckpointError(
            f"{called}: access is gated; accept its terms on the Hub and run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{called}: the Hub has the repository but not this revision") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{called}: neither a local path nor a repository on the Hub (or it is private)"
        ) from None
    except HFValidationError as error:
        raise CheckpointError(f"{called}: neither a local path nor a valid Hub id ({error})") from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"{called}: the Hub answered {error}") from None
    except Exception as error:
        # Offline. The class is that of the HTTP library, which differs between versions of huggingface_hub
        # (requests, httpx, httpx2) and is no part of its interface; the message passes it on.
        return _cached(repo, revision, called, error)
    raise CheckpointError(f"{called}: the repository holds no safetensors or torch checkpoint at its top level")


def _cached(repo: str, revision: str | None, called: str, cause: Exception) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        raise CheckpointError(
            f"{called}: there is no such file or directory, and the Hub cannot be reached to look for a repository of "
            f"this name ({type(cause).__name__}: {str(cause).partition(chr(10))[0]}); check the path, or connect "
            "(or unset HF_HUB_OFFLINE) and try again"
        ) from cause
