"""Pictures in rows: whatever a dataset stores them as -> a PIL image, with the colours as they are."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

# What Pillow's decoders raise for broken headers, besides OSError, and for sizes that would not fit into memory.
BROKEN = (ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def load_image(value: Any, folder: Path | None = None) -> Image.Image:
    """
    Load one picture of a row. What is decoded here is turned upright, as `datasets` and transformers do; a PIL image stays
    as it is, as in the target's processor, which is also who makes RGB of transparency, palettes and other colours.

    Args:
        value (`PIL.Image.Image`, `str`, `Path`, `bytes` or `dict`):
            The picture, its path, its encoded bytes, or `datasets`' storage form `{"bytes": ..., "path": ...}`.
        folder (`Path`, *optional*): What relative paths are relative to; the working directory by default.

    Raises:
        TypeError: `value` is of another type.
        OSError: There is no such file, or it is not a picture, broken, or far too large to decode.
    """
    if isinstance(value, Image.Image):
        value.load()
        return value
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
            return ImageOps.exif_transpose(image)
    except BROKEN as error:
        raise OSError(f"the picture cannot be decoded: {error}") from error


def as_processed(image: Image.Image, processor: Any) -> Image.Image:
    """`image` as it can be given to `processor`: in RGB if that does not convert pictures itself, and would fail."""
    does_convert = getattr(getattr(processor, "image_processor", None), "do_convert_rgb", None)
    return image if does_convert or image.mode == "RGB" else image.convert("RGB")


def _stored_image(value: Mapping[str, Any]) -> bytes | str:
    for key in ("bytes", "path"):
        if value.get(key) is not None:
            return value[key]
    raise TypeError(f"a picture given as a dict needs 'bytes' or 'path', not {sorted(value)}")
