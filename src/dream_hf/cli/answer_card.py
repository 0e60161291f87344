"""A picture of what happened: the image, the answer with a colour for each accepted path, and what each step gained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .comparison import Comparison

WIDTH, MARGIN, PICTURE, LINE = 1000, 24, 320, 24
TEXT_SIZE = 15
BAR_HEIGHT = 16  # pixels for each token gained
TINTS = ("#cdeaf2", "#f7e9b8", "#d3efcf", "#ead6ef", "#d6ddf7")
INK, PAPER = "#202024", "#ffffff"


def check_card(path: str, font: str | None) -> None:
    """Raise a `ValueError` for a file that could not be written as a picture, or a font that cannot be read."""
    known = Image.registered_extensions()
    if Path(path).suffix.lower() not in known:
        raise ValueError(f"`--save` ({path!r}) must end as a picture does, in .png for instance.")
    if not Path(path).expanduser().resolve().parent.is_dir():
        raise ValueError(f"`--save` ({path!r}) is in a folder that does not exist.")
    load_font(font)


def load_font(path: str | None) -> Any:
    """The font of a file, or Pillow's own; tried out, because broken files can be opened."""
    try:
        font = ImageFont.load_default(TEXT_SIZE) if path is None else ImageFont.truetype(path, TEXT_SIZE)
        font.getmask("Ag09.,%")
    except (OSError, ImportError, ValueError) as error:
        if path is None:
            raise ValueError(
                f"`--save` draws text with Pillow's own font, which this Pillow cannot load ({error}): reinstall it with "
                "`pip install --force-reinstall pillow`, or leave `--save` out."
            ) from error
        raise ValueError(f"`--font` ({path!r}) cannot be read as a font: {error}") from error
    return font


def draw_card(image: Image.Image, result: Comparison, font_path: str | None = None) -> Image.Image:
    """Draw the image, the answer and the acceptance per step."""
    font = load_font(font_path)
    report = result.report()
    words = list(_layout(result.pieces, font))
    text_height = (max((y for _, y, _, _ in words), default=0)) + LINE
    top = max(PICTURE, text_height) + 2 * MARGIN + LINE
    most = max(report["accepted_lengths"], default=1)
    card = Image.new("RGB", (WIDTH, top + most * BAR_HEIGHT + 2 * MARGIN + LINE), PAPER)
    draw = ImageDraw.Draw(card)
    card.paste(_fitted(image), (MARGIN, MARGIN))
    left = PICTURE + 2 * MARGIN
    for x, y, step, word in words:
        place = (left + x, MARGIN + y)
        draw.rectangle((*place, place[0] + font.getlength(word), place[1] + LINE - 4), fill=TINTS[step % len(TINTS)])
        draw.text(place, word, fill=INK, font=font)
    draw.text((MARGIN, top - LINE), _headline(report), fill=INK, font=font)
    _draw_bars(draw, report["accepted_lengths"], top + MARGIN // 2, most, font)
    return card


def _headline(report: dict[str, Any]) -> str:
    tau = "" if report["tau"] is None else f", tau {report['tau']:.2f} (bonus included)"
    same = "identical to plain decoding" if report["identical"] else "NOT identical to plain decoding"
    return (
        f"{report['speedup']:.2f}x: {report['dream_seconds']:.2f} s instead of {report['plain_seconds']:.2f} s, "
        f"{report['num_tokens']} tokens, {same}{tau}. Tokens gained by each step:"
    )


def _layout(pieces: list[str], font: Any) -> Iterator[tuple[float, int, int, str]]:
    """Words with their places and steps, broken into lines."""
    x, y = 0.0, 0
    room = WIDTH - PICTURE - 3 * MARGIN
    for step, piece in enumerate(pieces):
        for word in re.findall(r"\n| *[^ \n]+| +", piece):
            if word == "\n":
                x, y = 0.0, y + LINE
                continue
            width = font.getlength(word)
            if x + width > room and x > 0:
                x, y = 0.0, y + LINE
            yield x, y, step, word
            x += width


def _fitted(image: Image.Image) -> Image.Image:
    """The image at the size it is shown in; small ones are magnified without blurring."""
    scale = PICTURE / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _draw_bars(draw: Any, gains: list[int], top: int, most: int, font: Any) -> None:
    room = WIDTH - 2 * MARGIN
    width = min(room / max(len(gains), 1), 28.0)
    bottom = top + most * BAR_HEIGHT
    for step, gain in enumerate(gains, start=1):
        left = MARGIN + (step - 1) * width
        tint = TINTS[step % len(TINTS)]
        draw.rectangle((left, bottom - gain * BAR_HEIGHT, left + width - 2, bottom), fill=tint, outline=INK)
        if width >= 14:
            draw.text((left + width / 2 - 4, bottom + 2), str(gain), fill=INK, font=font)
