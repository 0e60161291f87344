"""Write conversations about pictures of the demo world as JSON Lines: `python write_rows.py --help`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dream_hf.demo import make_rows
from dream_hf.demo.rows import TASKS


def write_rows(output: Path, num_rows: int, seed: int) -> int:
    """Write `num_rows` rows, the tasks taking turns, and their pictures next to them; returns how many were written."""
    pictures = output.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    by_task = [make_rows(task, num_rows // len(TASKS), seed) for task in TASKS]
    rows = [row for together in zip(*by_task, strict=True) for row in together]
    with output.open("w") as lines:
        for number, row in enumerate(rows):
            picture = pictures / f"{number:06d}.png"
            row["images"][0].save(picture)
            lines.write(json.dumps({**row, "images": [str(picture.relative_to(output.parent))]}) + "\n")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/rows.jsonl"), help="file to write")
    parser.add_argument("--num-rows", type=int, default=3300, help="rows over all tasks")
    parser.add_argument(
        "--seed", type=int, default=600_000, help="first seed; from 1,000,000 on pictures are held out"
    )
    args = parser.parse_args()
    print(f"{args.output}: {write_rows(args.output, args.num_rows, args.seed)} rows")


if __name__ == "__main__":
    main()
