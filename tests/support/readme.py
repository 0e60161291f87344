"""The shell commands of the README, as a newcomer copies them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]


def readme_commands():
    """Each line of the README's shell blocks as words, comments left out."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line]


def readme_command(*start):
    """The one command that begins with these words."""
    (found,) = (words for words in readme_commands() if words[: len(start)] == list(start))
    return found
