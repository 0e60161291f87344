"""Put a saved drafter on the Hub: which files, with which card, in one commit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoConfig
from transformers.utils import logging

from ..version import __version__
from .card_content import RECIPE, RESULTS, read_content
from .downloads import HUB_ERRORS, explain_upload
from .model_card import TEMPLATES, is_generated, render_card

logger = logging.get_logger(__name__)

WEIGHTS = ("model*.safetensors", "model*.safetensors.index*.json")
PUBLISHED = ("config.json", *WEIGHTS, "README.md", RECIPE, RESULTS, "*.png", "*.svg")
CARD, ENTRY_POINT, REQUIREMENTS = "README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"

Contents = dict[str, Path | bytes]


def add_custom_generate(folder: str | os.PathLike) -> None:
    """Write `custom_generate/`, so that `generate(custom_generate=...)` finds the drafter in the folder or the repo."""
    for name, content in custom_generate_files().items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def custom_generate_files() -> dict[str, bytes]:
    """Path in the repo and content of the files that transformers runs for `custom_generate`."""
    return {ENTRY_POINT: (TEMPLATES / "generate.py").read_bytes(), REQUIREMENTS: f"dream-hf>={__version__}\n".encode()}


def collect_files(folder: str | os.PathLike, repo_id: str, tags: Iterable[str] = ()) -> Contents:
    """What is to be uploaded: path in the repo and file or content. The card names `repo_id`, unless written by hand."""
    files: Contents = {
        path.name: path for pattern in PUBLISHED for path in sorted(Path(folder).glob(pattern)) if path.is_file()
    }
    card = files.get(CARD)
    if is_generated(card.read_text(encoding="utf-8") if isinstance(card, Path) else None):
        config = AutoConfig.from_pretrained(folder)
        files[CARD] = render_card(read_content(folder, config, repo_id, tags)).encode()
    return {**files, **custom_generate_files()}


def create_repo(repo_id: str, private: bool | None = None, token: bool | str | None = None) -> str:
    """Create the repo unless it exists; returns its full id. Raises an `OSError` as [`commit_files`] does."""
    with _explained(repo_id):
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def commit_files(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload the files in one commit, and delete the weights of an earlier version that are not among them.

    A card on the Hub that was edited there is kept.

    Returns:
        `str`: Address of the commit, or of the pull request.

    Raises:
        OSError: The Hub refused or could not be reached; the Hub library's own error is the cause.
    """
    with _explained(repo_id):
        return _commit(repo_id, dict(files), commit_message, commit_description, token, revision, create_pr)


def _commit(
    repo_id: str,
    files: Contents,
    commit_message: str | None,
    commit_description: str | None,
    token: bool | str | None,
    revision: str | None,
    create_pr: bool,
) -> str:
    api = HfApi(token=token)
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if CARD in files and isinstance(files[CARD], bytes) and not is_generated(_published_card(repo_id, token)):
        logger.warning(f"The README.md of {repo_id} was edited on the Hub and is kept as it is.")
        del files[CARD]
    present = api.list_repo_files(repo_id, revision=revision)
    stale = [name for name in present if any(Path(name).match(pattern) for pattern in WEIGHTS) and "/" not in name]
    info = api.create_commit(
        repo_id,
        [
            *(
                CommitOperationAdd(name, os.fspath(file) if isinstance(file, Path) else file)
                for name, file in files.items()
            ),
            *(CommitOperationDelete(name) for name in stale if name not in files),
        ],
        commit_message=commit_message or "Upload drafter",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )
    return info.pr_url or info.commit_url


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Let what the Hub library raises say what to do."""
    try:
        yield
    except HUB_ERRORS as error:
        raise OSError(explain_upload(repo_id, error)) from error


def _published_card(repo_id: str, token: bool | str | None) -> str | None:
    try:
        return ModelCard.load(repo_id, token=token).content  # type: ignore[arg-type]
    except EntryNotFoundError:
        return None
