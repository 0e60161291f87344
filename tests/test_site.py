"""The documentation's site names what the library exports, and every page (its links: `make docs`)."""

import re
from pathlib import Path

import dream_hf

ROOT = Path(__file__).parents[1]


def test_the_page_of_public_names_has_all_of_them():
    named = re.findall(r"^::: dream_hf\.(\w+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(set(dream_hf.__all__) - {"__version__"})


def test_every_page_is_in_the_navigation():
    pages = re.findall(r"\b(\w+\.md)\b", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
