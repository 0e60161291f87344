"""A draft tree as a picture: a column for each depth, the accepted path on top, long trees broken into bands like text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, MARGIN = 580, 6  # of a picture, in pixels
ROW, BOX, GAP, BAND_GAP = 26, 19, 12, 12  # heights of a row and of a box, between columns, between bands
LETTER, PADDING = 7.2, 5  # a letter of 12 pixels in a font of even width, and room beside the text
LONGEST = 14  # letters shown of a token
SIGNS = {" ": "·", "\n": "↵", "\t": "⇥"}


@dataclass(frozen=True)
class Place:
    """Where a node's box stands, in pixels."""

    x: float
    y: float
    width: float
    band: int


def draw_tree(texts: Sequence[str], parents: Sequence[int], path: Collection[int], tint: str = "") -> str:
    """An SVG of a tree. Its colours are CSS classes: `node`, with `kept` on the accepted path, and `edge`.

    Args:
        texts (`Sequence[str]`): What each node says, the root first.
        parents (`Sequence[int]`): Each node's parent, which comes before it; the root is its own.
        path (`Collection[int]`): The accepted nodes, the root among them.
        tint (`str`): A further class for the accepted path, its colour.
    """
    shown = [_visible(text) for text in texts]
    places = _places(shown, parents, path)
    height = max(place.y for place in places) + BOX + MARGIN
    width = max(place.x + place.width for place in places) + MARGIN
    title = f"{len(texts) - 1} drafted tokens, {len(path) - 1} of them kept"
    lines = [
        f'<svg class="dream-tree" role="img" aria-label="{title}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" xmlns="http://www.w3.org/2000/svg"><title>{title}</title>'
    ]
    for node in range(1, len(texts)):
        name = "edge kept" if node in path else "edge"
        lines += [
            f'<path class="{name}" d="{curve}"/>' for curve in _edges(places[parents[node]], places[node], width)
        ]
    for node, (text, place) in enumerate(zip(shown, places, strict=True)):
        name = f"node kept {tint}".rstrip() if node in path else "node"
        lines.append(_box(text, place, name))
    return "".join([*lines, "</svg>"])


def _visible(text: str) -> str:
    """`text` with signs for what would not be seen, and the middle left out of what is long."""
    text = "".join(SIGNS.get(letter, letter) for letter in text) or "∅"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]}…{text[-3:]}"


def _places(texts: Sequence[str], parents: Sequence[int], path: Collection[int]) -> list[Place]:
    """A place for each node: depths from left to right and band to band, rows from the top of each band."""
    depths = [0] * len(parents)
    for node in range(1, len(parents)):
        depths[node] = depths[parents[node]] + 1
    rows = _rows(parents, depths, path)
    widths = [0.0] * (max(depths) + 1)
    for text, depth in zip(texts, depths, strict=True):
        widths[depth] = max(widths[depth], len(text) * LETTER + 2 * PADDING)
    lefts, bands, x, band = [], [], float(MARGIN), 0
    for width in widths:
        if x + width + GAP > WIDTH and x > MARGIN:
            x, band = MARGIN + GAP, band + 1
        lefts.append(x)
        bands.append(band)
        x += width + GAP
    tops, top = [], float(MARGIN)
    for number in range(band + 1):
        tops.append(top)
        deepest = max(row for row, depth in zip(rows, depths, strict=True) if bands[depth] == number)
        top += (deepest + 1) * ROW + BAND_GAP
    return [
        Place(lefts[depth], tops[bands[depth]] + row * ROW, len(text) * LETTER + 2 * PADDING, bands[depth])
        for text, depth, row in zip(texts, depths, rows, strict=True)
    ]


def _rows(parents: Sequence[int], depths: Sequence[int], path: Collection[int]) -> list[int]:
    """A row for each node: a first child goes on in its parent's, others take the first one below with room for their line."""
    children: list[list[int]] = [[] for _ in parents]
    for node in range(1, len(parents)):
        children[parents[node]].append(node)
    for siblings in children:
        siblings.sort(key=lambda node: (node not in path, node))
    rows = [0] * len(parents)
    taken: list[set[int]] = []  # depths at which each row has something
    starts = [(0, 0)]  # nodes that a line starts with, and the row above which it may not lie
    while starts:
        node, row = starts.pop(0)
        line = [node]
        while children[line[-1]]:
            line.append(children[line[-1]][0])
        columns = {depths[each] for each in line} | {depths[parents[node]]}  # and one for the edge that leads to it
        while row < len(taken) and taken[row] & columns:
            row += 1
        taken += [set() for _ in range(row + 1 - len(taken))]
        taken[row] |= columns
        for each in line:
            rows[each] = row
            starts += [(other, row + 1) for other in children[each][1:]]
    return rows


def _edges(parent: Place, child: Place, width: float) -> list[str]:
    """The line from a parent to a child; in two parts where a new band begins between them."""
    right, middle = parent.x + parent.width, parent.y + BOX / 2
    left, end = child.x, child.y + BOX / 2
    if parent.band == child.band:
        return [_curve(right, middle, left, end)]
    return [_curve(right, middle, min(right + GAP, width), middle), _curve(left - GAP, end, left, end)]


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    start = max(to_x - GAP, x)  # straight to the column before the child's, then down
    bend = (start + to_x) / 2
    return f"M{x:.1f} {y:.1f}H{start:.1f}C{bend:.1f} {y:.1f} {bend:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"


def _box(text: str, place: Place, name: str) -> str:
    room = place.width - 2 * PADDING
    return (
        f'<g class="{name}"><rect x="{place.x:.1f}" y="{place.y:.1f}" width="{place.width:.1f}" height="{BOX}" rx="4"/>'
        f'<text x="{place.x + PADDING:.1f}" y="{place.y + BOX - 5.5:.1f}" textLength="{room:.1f}" '
        f'lengthAdjust="spacingAndGlyphs">{escape(text)}</text></g>'
    )
