"""`dream-hf push`."""

from __future__ import annotations

import argparse

HELP = "Show what publishing a drafter would upload to the Hub; with --yes, upload it."
EXAMPLE = "dream-hf push my-drafter org/dream-llava-v1.6-7b --private --yes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dream-hf push`."""
    parser.add_argument("folder", help="a drafter as written by save_pretrained or `dream-hf train`")
    parser.add_argument("repo_id", help="OWNER/NAME on the Hub, made if it does not exist")
    parser.add_argument("--yes", action="store_true", help="upload; without it nobody is contacted")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repo private")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--message", help="message of the commit")


def run(args: argparse.Namespace) -> None:
    """Upload, or show what would be."""
    from ..drafters.dream.push import push_drafter

    report = push_drafter(
        args.folder,
        args.repo_id,
        private=args.private,
        dry_run=not args.yes,
        create_pr=args.create_pr,
        commit_message=args.message,
    )
    print(report)
    if not args.yes:
        print("Run it again with --yes to upload.")
