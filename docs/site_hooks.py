"""What the site does to a page: links out of `docs/` become the path's name, since the site holds only that folder."""

import re
from pathlib import Path

from mkdocs.plugins import get_plugin_logger

OUTWARD = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]*)(?:#[^)]*)?\)")
log = get_plugin_logger("links")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Replaces `[text](../path)` by the text and the path; a path that is not in the repository is a warning."""
    repository = Path(config.config_file_path).parent

    def named(link: re.Match) -> str:
        text, path = link.groups()
        if not (repository / path).exists():
            log.warning("%s links to %s, which is not in the repository", page.file.src_uri, path)
        return text if path in text else f"{text} (`{path}`)"

    return OUTWARD.sub(named, markdown)
