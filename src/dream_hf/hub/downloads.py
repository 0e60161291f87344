"""Fetch a checkpoint's files from a folder or from the Hub, and say plainly what went wrong when that fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # type: ignore[attr-defined]  # the HTTP client's own base class, whichever client the Hub library uses
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

# Whatever the Hub library and its HTTP client raise.
HUB_ERRORS = (OSError, HFValidationError, HTTPError, XetDownloadError)
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def fetch_file(source: str | os.PathLike, name: str, is_optional: bool = False, **hub: Any) -> Path | None:
    """Find one file of a folder or a Hub repo, downloading it into the cache where needed.

    Args:
        source (`str` or `os.PathLike`): A folder or a Hub id.
        name (`str`): The file's name.
        is_optional (`bool`): Whether a file that is not in the cache counts as missing when the Hub can't be asked.
        **hub: Any of `HUB_ARGUMENTS`, as in `from_pretrained`.

    Returns:
        `Path` or `None`: None where the source has no such file.

    Raises:
        OSError: The Hub refused, could not be reached, or broke off; the message names the repo and the remedy, and
            the Hub library's own error is the cause.
    """
    source = os.fspath(source)
    if os.path.isdir(source):
        path = Path(source, hub.get("subfolder") or "", name)
        return path if path.is_file() else None
    hub = {**hub, "subfolder": hub.get("subfolder") or None}
    try:
        return Path(hf_hub_download(source, name, **hub))
    except LocalEntryNotFoundError as error:
        if is_optional:
            return None
        raise OSError(explain_failure(source, name, error, hub.get("revision"))) from error
    except EntryNotFoundError:
        return None
    except HUB_ERRORS as error:
        raise OSError(explain_failure(source, name, error, hub.get("revision"))) from error


def explain_failure(source: str, name: str, error: BaseException, revision: str | None = None) -> str:
    """What failed, for which repo, and what to do about it."""
    return f"Could not get {name!r} of {source!r}: {_remedy(source, error, revision)} ({_first_line(error)})"


def explain_upload(repo_id: str, error: BaseException) -> str:
    """Why a repo could not be written to, and what to do about it."""
    statuses = _statuses(error)
    if _is_due_to(error, HFValidationError):
        remedy = "it is no Hub id of the form 'owner/name'. Check the spelling."
    elif statuses & {401, 403, 404} or _is_due_to(error, LocalTokenNotFoundError):
        remedy = "the Hub refused. Log in with `hf auth login` or pass `token=`; the token has to be one that may write there."
    elif statuses:
        remedy = "the Hub refused."
    else:
        remedy = "the Hub could not be reached. Check the connection and `HF_HUB_OFFLINE`, then run it again."
    return f"Could not upload to {repo_id!r}: {remedy} ({_first_line(error)})"


def _remedy(source: str, error: BaseException, revision: str | None) -> str:
    page, token = f"{constants.ENDPOINT}/{source}", "log in with `hf auth login` or pass `token=`"
    remedies = {
        HFValidationError: "it is neither a folder on this machine nor a Hub id of the form 'owner/name'. Check the spelling.",
        GatedRepoError: f"the repo is gated. Ask for access at {page}, then {token}.",
        RevisionNotFoundError: f"the repo has no `revision` {revision!r}. See {page}/tree/main for branches, tags and commits.",
        RepositoryNotFoundError: f"there is no such repo, or it is private. Check the spelling; for a private repo {token}.",
    }
    for kind, remedy in remedies.items():
        if _is_due_to(error, kind):
            return remedy
    if refused := _statuses(error) & {401, 403}:
        return f"the Hub refused access (HTTP {max(refused)}). Check that your token may read {page}, or {token}."
    if _is_due_to(error, LocalEntryNotFoundError):
        return (
            "it is not in the cache and the Hub could not be reached. Check the connection, or load it once without "
            "`local_files_only` and `HF_HUB_OFFLINE`."
        )
    return "the download did not finish. What was complete is kept; load again to fetch the rest."


def _is_due_to(error: BaseException, kind: type[BaseException]) -> bool:
    return any(isinstance(cause, kind) for cause in _causes(error))


def _statuses(error: BaseException) -> set[int]:
    """The HTTP statuses that led to an error."""
    return {cause.response.status_code for cause in _causes(error) if isinstance(cause, HfHubHTTPError)}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
