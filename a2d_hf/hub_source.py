"""A parent on the Hub: found whole in the local cache, fetched on request, or the command that fetches it.

Owns which files of a repository a conversion needs. Writes only the Hub's own cache, and only when asked to download.
"""

import shlex
from fnmatch import fnmatch
from pathlib import Path

from .errors import BadInput, first_sentence
from .source import TOKENIZER_FILES, find_weights


# Configuration, tokenizer, code, licence and card.
DESCRIPTION = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.md", "LICENSE*")
SAFETENSORS_WEIGHTS, PICKLED_WEIGHTS = ("model*.safetensors",), ("pytorch_model*.bin",)
# Other frameworks' copies of the same weights, each as large again.
LEFT_OUT = ("*/*",)


def wanted_files(names: list[str]) -> tuple[str, ...]:
    """
    Patterns of the files to fetch: safetensors where the repository has them, pickles only where it does not.

    Args:
        names (`list[str]`): what the repository holds.
    """
    safe = any(fnmatch(name, pattern) for name in names for pattern in SAFETENSORS_WEIGHTS)
    return (*DESCRIPTION, *(SAFETENSORS_WEIGHTS if safe else PICKLED_WEIGHTS))


def download_line(repo_id: str) -> str:
    """The command that fetches what a conversion needs of a repository."""
    include = " ".join(f"--include {shlex.quote(pattern)}" for pattern in (*DESCRIPTION, *SAFETENSORS_WEIGHTS))
    return f"hf download {repo_id} {include} --exclude {shlex.quote(LEFT_OUT[0])}"


def cached_snapshot(repo_id: str, argument: str = "SRC") -> Path:
    """
    The folder of a Hub id in the local cache.

    Raises:
        [`BadInput`]: it is not there; with the command that fetches it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise BadInput(
            f"{argument} {repo_id} is neither a folder nor in the local Hub cache: pass --download, or run "
            f"`{download_line(repo_id)}` first."
        ) from error


def download_snapshot(repo_id: str, argument: str = "SRC") -> Path:
    """
    The folder of a Hub id, after fetching what the local cache lacks of it; without a request where it lacks nothing.

    Raises:
        [`BadInput`]: no such repository, no access to it, or no network.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        cached = cached_snapshot(repo_id, argument)
        find_weights(cached)
        if any((cached / name).is_file() for name in TOKENIZER_FILES):
            return cached
    except BadInput:
        pass  # not there, or in part
    try:
        patterns = wanted_files(HfApi().list_repo_files(repo_id))
        return Path(snapshot_download(repo_id, allow_patterns=list(patterns), ignore_patterns=list(LEFT_OUT)))
    except GatedRepoError as error:
        raise BadInput(
            f"{argument} {repo_id} is gated: accept its terms at https://huggingface.co/{repo_id} and log in with "
            "`hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise BadInput(
            f"{argument} {repo_id} is not on the Hub, or private: check the id, or `hf auth login`."
        ) from error
    except Exception as error:  # no network, offline mode, a full disk: each layer below has exceptions of its own
        raise BadInput(f"{argument} {repo_id} could not be downloaded: {first_sentence(error)}") from error
