"""Hub ids become local folders."""

from __future__ import annotations

import re
from pathlib import Path

from isomorph.checkpoint.torch_file import SUFFIXES
from isomorph.errors import InputError

#: `owner/name`, as the Hub allows it.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.py", "*.model", "*.npz", "*.md"]


def is_hub_id(source: str) -> bool:
    """Whether `source` could be a repository of the Hub."""
    return bool(HUB_ID.fullmatch(source)) and ".." not in source and not source.endswith(SUFFIXES)


def fetch(repository: str) -> Path:
    """The local folder of `repository`, downloaded when it is not cached. Raises InputError when it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(repository, allow_patterns=[*SMALL_FILES, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repository, allow_patterns=[*SMALL_FILES, *(f"*{s}" for s in SUFFIXES)]))
        return folder
    except GatedRepoError:
        raise InputError(
            f"expected access to {repository}; found a gated repository; "
            "accept its terms on the Hub and run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"expected an existing path or a Hub id; found {repository!r}, which is neither here nor on the Hub; "
            "check the spelling (a private repository needs `hf auth login`)"
        ) from None
    except HFValidationError:
        raise InputError(
            f"expected an existing path or a Hub id (owner/name); found {repository!r}, which is neither; "
            "check the spelling"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = type(error).__name__
        raise InputError(
            f"expected an existing path or a Hub id within reach; found {repository!r}, not here, and the Hub cannot "
            f"be reached ({reason}); run `hf download {repository}` where there is a network and pass its folder"
        ) from None
    except Exception as error:
        # The HTTP library's own errors (proxy, TLS, name resolution) share no base class with the Hub's.
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise InputError(
            f"expected an existing path or a Hub id within reach; found {repository!r}, not here, and the Hub cannot "
            f"be reached ({type(error).__name__}); pass a local folder"
        ) from None
