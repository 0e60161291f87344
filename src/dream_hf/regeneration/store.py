"""Where regenerated rows go: JSON Lines that survive a kill, and picture files next to them.

While rows are made, every process appends to a file of its own in `<output>_files/`; a line is written at once when its
row is complete, so a kill can only leave an unfinished last line, which is cut off at the next start. When all rows are
there, the lines are merged into `<output>` in the order of the source. When the source has got
longer, they become one of the pieces again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.images import load_image
from .journal import SETTINGS, append, cut_unfinished_line, difference, entries, line_at, write_whole

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
MERGED = "rows-merged.jsonl"  # what was complete until the source got longer


def folder_of(output: Path) -> Path:
    """Where what is unfinished is kept beside the file to end with."""
    return output.with_name(f"{output.stem}_files")


class AnswerStore:
    """
    The rows of one `<output>.jsonl`.

    Args:
        output (`Path`): The file to end with, `*.jsonl`.
        settings (`dict`): What the answers depend on; a store with other settings is refused.
        digest (`Callable`): Digest of the first rows of the source, given how many.
        num_rows (`int`): Rows of the source. A store begun with fewer is opened again, if those have not changed.
        process_index (`int`): Which of the processes this is; the first one is to be made before the others.

    Raises:
        ValueError: `output` has another suffix, or was begun with other settings or other rows.
    """

    def __init__(
        self,
        output: str | Path,
        settings: Mapping[str, Any],
        digest: Callable[[int], str],
        num_rows: int,
        process_index: int = 0,
    ) -> None:
        self.output = Path(output).expanduser()
        if self.output.suffix != ".jsonl":
            raise ValueError(f"`output` ({str(output)!r}) must end in .jsonl.")
        self.folder = folder_of(self.output)
        self.piece = self.folder / f"rows-{process_index:05d}.jsonl"
        begun = self._begun()
        self._check_settings(begun, settings)
        self._check_rows(begun, digest, num_rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        if process_index == 0:
            if begun.get("num_rows", num_rows) < num_rows and self.is_complete:
                os.replace(self.output, self.folder / MERGED)
            settings = {**settings, "num_rows": num_rows, "rows": digest(num_rows)}
            write_whole(self.folder / SETTINGS, json.dumps(settings, indent=2).encode())
        cut_unfinished_line(self.piece)

    @property
    def is_complete(self) -> bool:
        """Whether the merged file is there."""
        return self.output.is_file()

    def done(self) -> set[int]:
        """Source indices of the rows that are there, whichever process made them."""
        return {row["row"] for piece in self._pieces() for _, row in entries(piece)}

    def add(
        self,
        index: int,
        messages: Sequence[Any],
        images: Sequence[Any],
        is_finished: bool,
        tools: Sequence[Any] | None = None,
    ) -> None:
        """Append row `index`. `images` are the values its source had, whatever form they were in."""
        names = [self._keep_picture(value) for value in images]
        row = {"messages": list(messages), "images": names, "row": index, "finished": is_finished}
        if not names:
            del row["images"]
        if tools is not None:
            row["tools"] = list(tools)
        append(self.piece, row)

    def merge(self) -> int:
        """Write all rows to `output` in the order of the source; returns how many answers were not finished."""
        places, num_unfinished = {}, 0
        for piece in self._pieces():
            for offset, row in entries(piece):
                places[row["row"]] = piece, offset
        temporary = self.output.with_name(self.output.name + ".tmp")
        with temporary.open("wb") as merged:
            for index in sorted(places):
                line = line_at(*places[index])
                num_unfinished += not json.loads(line)["finished"]
                merged.write(line)
            merged.flush()
            os.fsync(merged.fileno())
        os.replace(temporary, self.output)
        for piece in self._pieces():
            piece.unlink()
        return num_unfinished

    def counts(self) -> tuple[int, int]:
        """Rows in the merged file, and how many of them were not finished."""
        finished = [row["finished"] for _, row in entries(self.output)]
        return len(finished), finished.count(False)

    def _pieces(self) -> list[Path]:
        return sorted(self.folder.glob("rows-*.jsonl"))

    def _begun(self) -> dict[str, Any]:
        """What an earlier start wrote down; nothing at the first."""
        file = self.folder / SETTINGS
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        if self.output.exists():
            raise ValueError(
                f"`output` ({str(self.output)!r}) exists and was not begun by this command; name another."
            )
        return {}

    def _check_settings(self, begun: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        of_rows = {name: begun[name] for name in ("num_rows", "rows") if name in begun}  # judged by themselves
        changed = difference(begun, {**settings, **of_rows}) if begun else None
        if changed is not None:
            self._refuse(changed)

    def _check_rows(self, begun: Mapping[str, Any], digest: Callable[[int], str], num_rows: int) -> None:
        """Refuse other rows; further ones behind the same are welcome."""
        before = begun.get("num_rows", num_rows)
        if before > num_rows:
            self._refuse(f"`num_rows` {before} and now it is {num_rows}")
        is_known = "rows" in begun  # earlier versions did not write it down
        if (is_known and begun["rows"] != digest(before)) or (not is_known and before != num_rows):
            self._refuse(f"other rows among the first {before}")

    def _refuse(self, difference: str) -> None:
        raise ValueError(
            f"`output` ({str(self.output)!r}) was begun with {difference}. Name another `output`, or remove it and "
            f"{self.folder.name}/."
        )

    def _keep_picture(self, value: Any) -> str:
        """Path of the picture relative to `output`: a file stays where it is, anything else becomes one."""
        if isinstance(value, Mapping):
            value = value["path"] if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str | Path):
            return Path(os.path.relpath(Path(value).expanduser(), self.output.parent.resolve())).as_posix()
        content = value if isinstance(value, bytes) else _encoded(value)
        with Image.open(io.BytesIO(content)) as image:
            suffix = (image.format or "png").lower()
        file = self.folder / "images" / f"{hashlib.sha256(content).hexdigest()[:32]}.{suffix}"
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            write_whole(file, content)
        return file.relative_to(self.output.parent).as_posix()


def _encoded(value: Any) -> bytes:
    """A picture in a file of its own colours, pixel by pixel: PNG, or TIFF where PNG does not know them."""
    buffer, picture = io.BytesIO(), load_image(value)
    picture.save(buffer, format="PNG" if picture.mode in PNG_MODES else "TIFF")
    return buffer.getvalue()
