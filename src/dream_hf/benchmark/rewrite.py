"""Tables and plots of earlier results, written anew from their `results.json`.

python -m dream_hf.benchmark.rewrite benchmarks/results/demo_2cores
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..regeneration.journal import write_whole
from .plots import write_plots
from .tables import render


def rewrite(folder: Path) -> None:
    """Write a folder's `results.md` and its plots from its `results.json`."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    write_whole(folder / "results.md", render(results).encode())
    write_plots(results, folder)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        rewrite(Path(name))
