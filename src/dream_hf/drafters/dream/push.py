"""`push_drafter`: show what would be uploaded, then upload it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ...hub.publishing import collect_files, commit_files, create_repo
from ..checkpoint_files import check_shapes, load_config, open_checkpoint
from .configuration import DreamConfig
from .drafter import DreamDrafter


@dataclass(frozen=True)
class PushReport:
    """What was uploaded, or would be.

    Args:
        repo_id: The repo.
        files: Size in bytes by path in the repo.
        left_out: Files of the folder that are not uploaded.
        url: Address of the commit or pull request; None for a dry run.
    """

    repo_id: str
    files: dict[str, int]
    left_out: tuple[str, ...]
    url: str | None = None

    def __str__(self) -> str:
        head = (
            f"Uploaded to {self.url}" if self.url else f"Dry run, nothing was uploaded to {self.repo_id}. It would get"
        )
        lines = [f"  {size:>14,} bytes  {name}" for name, size in self.files.items()]
        return "\n".join([f"{head}:", *lines, *(f"  left out              {name}" for name in self.left_out)])


def push_drafter(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    dry_run: bool = True,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: bool | str | None = None,
) -> PushReport:
    """Upload a saved drafter with its card and `custom_generate/`; by default only show what that would upload.

    Args:
        folder (`str` or `os.PathLike`): As written by `save_pretrained` or the trainer. `results.json` of
            `dream-hf bench` and `recipe.yaml` in it go into the card.
        repo_id (`str`): The repo, created where it does not exist.
        private (`bool`, *optional*): Visibility of a new repo; the account's default if left out.
        dry_run (`bool`): Contact nobody.
        create_pr (`bool`): Open a pull request instead of committing.
        commit_message (`str`, *optional*): Defaults to "Upload drafter".
        token (`str` or `bool`, *optional*): As in the Hub library.

    Returns:
        `PushReport`

    Raises:
        ValueError: The folder does not hold a drafter that `DreamDrafter.from_pretrained` would load.
        OSError: The Hub refused or could not be reached; the Hub library's own error is the cause.
    """
    if not os.path.isdir(folder):
        raise ValueError(
            f"`folder` ({os.fspath(folder)!r}) is no folder. Save the drafter with `save_pretrained` first."
        )
    checkpoint = open_checkpoint(folder, DreamConfig.model_type)
    check_shapes(folder, checkpoint.shapes, DreamDrafter.expected_shapes(load_config(DreamConfig, folder)))
    if not dry_run:
        repo_id = create_repo(repo_id, private=private, token=token)
    files = collect_files(folder, repo_id)
    report = PushReport(
        repo_id,
        {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()},
        tuple(sorted(path.name for path in Path(folder).iterdir() if _is_left_out(path, files))),
    )
    if dry_run:
        return report
    url = commit_files(repo_id, files, commit_message=commit_message, token=token, create_pr=create_pr)
    return PushReport(report.repo_id, report.files, report.left_out, url)


def _is_left_out(path: Path, files: dict) -> bool:
    return not any(name.split("/")[0] == path.name for name in files)
