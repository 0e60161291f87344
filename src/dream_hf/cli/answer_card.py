"""A picture of what happened: the image, the answer with a colour for each accepted path, and what each step gained."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..benchmark.comparison import Comparison

WIDTH, MARGIN, PICTURE, LINE = 1000, 24, 320, 24
TEXT_SIZE = 15
BAR = 18  # height of a bar
LABELS = 110  # room for what stands left of the bars
TINTS = ("#cdeaf2", "#f7e9b8", "#d3efcf", "#ead6ef", "#d6ddf7")
INK, FAINT, PAPER, STRONG = "#202024", "#6b6b74", "#ffffff", "#3b7ea1"


def check_card(path: str, font: str | None) -> None:
    """Raise a `ValueError` for a file that could not be written as a picture, or a font that cannot be read."""
    known, file = Image.registered_extensions(), Path(path).expanduser()
    if known.get(file.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"`--save` ({path!r}) must end as a picture does, in .png for instance.")
    if not file.resolve().parent.is_dir():
        raise ValueError(f"`--save` ({path!r}) is in a folder that does not exist.")
    if file.is_dir():
        raise ValueError(f"`--save` ({path!r}) is a folder; name a file.")
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


def draw_card(image: Image.Image, prompt: str, result: Comparison, font_path: str | None = None) -> Image.Image:
    """Draw the image, the prompt and the answer, the time both ways took, and what each step gained."""
    font = load_font(font_path)
    report = result.report()
    room = WIDTH - PICTURE - 3 * MARGIN
    asked = list(_layout([prompt], font, room))
    answer = list(_layout(result.pieces, font, room))
    picture = _fitted(image)
    answer_top = MARGIN + _height(asked) + LINE // 2
    times_top = max(MARGIN + picture.height, answer_top + _height(answer)) + MARGIN
    gains_top = times_top + 3 * LINE + MARGIN
    card = Image.new("RGB", (WIDTH, gains_top + 2 * LINE + MARGIN), PAPER)
    draw = ImageDraw.Draw(card)
    card.paste(picture, (MARGIN, MARGIN))
    left = PICTURE + 2 * MARGIN
    for x, y, _, word in asked:
        draw.text((left + x, MARGIN + y), word, fill=FAINT, font=font)
    for x, y, step, word in answer:
        place = (left + x, answer_top + y)
        draw.rectangle((*place, place[0] + font.getlength(word), place[1] + LINE - 4), fill=TINTS[step % len(TINTS)])
        draw.text(place, word, fill=INK, font=font)
    _draw_times(draw, report, times_top, font)
    _draw_gains(draw, report, gains_top, font)
    return card


def _layout(pieces: list[str], font: Any, room: int) -> Iterator[tuple[float, int, int, str]]:
    """Words with their places and steps, broken into lines."""
    x, y = 0.0, 0
    for step, piece in enumerate(pieces):
        for word in _words(piece, font, room):
            if word == "\n":
                x, y = 0.0, y + LINE
                continue
            shown = word
            if x + font.getlength(word) > room and x > 0:
                x, y, shown = 0.0, y + LINE, word.lstrip(" ")
            if shown:
                yield x, y, step, shown
                x += font.getlength(shown)


def _words(text: str, font: Any, room: int) -> Iterator[str]:
    """Words with the spaces before them, and line breaks; words wider than a line in parts that are not."""
    for word in re.findall(r"\n| *[^ \n]+| +", text.replace("\t", "    ")):
        start = 0
        while font.getlength(word[start:]) > room:
            widths = [font.getlength(word[start:end]) for end in range(start + 1, len(word) + 1)]
            fitting = max(bisect_right(widths, room), 1)
            yield word[start : start + fitting]
            start += fitting
        yield word[start:]


def _height(words: list[tuple[float, int, int, str]]) -> int:
    return max((y for _, y, _, _ in words), default=0) + LINE


def _fitted(image: Image.Image) -> Image.Image:
    """The image at the size it is shown in; small ones are magnified without blurring."""
    scale = PICTURE / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _draw_times(draw: Any, report: dict[str, Any], top: int, font: Any) -> None:
    """A bar for the time of each way, to one scale, and what came out."""
    same = "identical answers" if report["identical"] else "the answers are NOT identical"
    draw.text((MARGIN, top), f"{report['speedup']:.2f}x as fast, {same}", fill=INK, font=font)
    seconds = {"plain": report["plain_seconds"], "speculative": report["dream_seconds"]}
    room = WIDTH - 2 * MARGIN - LABELS - 4 * LINE
    for row, (name, value) in enumerate(seconds.items(), start=1):
        y, end = top + row * LINE + 4, MARGIN + LABELS + room * value / max(seconds.values())
        draw.text((MARGIN, y), name, fill=FAINT, font=font)
        draw.rectangle((MARGIN + LABELS, y, end, y + BAR), fill=STRONG if name == "speculative" else FAINT)
        draw.text((end + 8, y), f"{value:.2f} s", fill=INK, font=font)


def _draw_gains(draw: Any, report: dict[str, Any], top: int, font: Any) -> None:
    """A bar of all tokens but the first, cut into steps: each as wide as the tokens it gained, which stand in it."""
    gains = report["accepted_lengths"]
    tau = "" if report["tau"] is None else f", {report['tau']:.2f} on average (tau, bonus included)"
    title = f"Tokens gained, step by step{tau}:" if gains else "One token, and no step after it."
    draw.text((MARGIN, top), title, fill=INK, font=font)
    width, y, before = (WIDTH - 2 * MARGIN) / max(sum(gains), 1), top + LINE + 4, 0
    for step, gain in enumerate(gains, start=1):
        left, right = round(MARGIN + before * width), round(MARGIN + (before + gain) * width)
        before += gain
        gap = 2 if right - left >= 6 else 1
        draw.rectangle((left, y, max(right - gap, left), y + BAR), fill=TINTS[step % len(TINTS)])
        if right - left >= font.getlength(str(gain)) + 4:
            draw.text(((left + right - gap) / 2, y + BAR // 2), str(gain), fill=INK, font=font, anchor="mm")
