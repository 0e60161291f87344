"""Pictures in rows: whatever a dataset stores them as -> a PIL image in RGB."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

# What Pillow's decoders raise for broken headers, besides OSError, and for sizes that would not fit into memory.
BROKEN = (ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def load_image(value: Any, folder: Path | None = None) -> Image.Image:
    """
    Load one picture of a row and turn it upright.

    Args:
        value (`PIL.Image.Image`, `str`, `Path`, `bytes` or `dict`):
            The picture, its path, its encoded bytes, or `datasets`' storage form `{"bytes": ..., "path": ...}`.
        folder (`Path`, *optional*): What relative paths are relative to; the working directory by default.

    Raises:
        TypeError: `value` is of another type.
        OSError: There is no such file, or it is not a picture, broken, or far too large to decode.
    """
    if isinstance(value, Image.Image):
        return upright(value)
    if isinstance(value, bytes):
        return _decode(io.BytesIO(value))
    if isinstance(value, Mapping):
        return load_image(_stored_image(value), folder)
    if isinstance(value, str | Path):
        if str(value).startswith(("http://", "https://")):
            raise TypeError(f"the picture {str(value)!r} is an address; download it and give its path")
        return _decode((folder or Path()) / Path(value).expanduser())
    raise TypeError(f"a picture must be a PIL image, a path, bytes or {{'bytes', 'path'}}, not {type(value).__name__}")


def _decode(source: io.BytesIO | Path) -> Image.Image:
    try:
        with Image.open(source) as image:
            return upright(image)
    except BROKEN as error:
        raise OSError(f"the picture cannot be decoded: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """Decode `image`, apply its orientation tag and convert it to RGB."""
    return ImageOps.exif_transpose(image).convert("RGB")


def _stored_image(value: Mapping[str, Any]) -> bytes | str:
    for key in ("bytes", "path"):
        if value.get(key) is not None:
            return value[key]
    raise TypeError(f"a picture given as a dict needs 'bytes' or 'path', not {sorted(value)}")
