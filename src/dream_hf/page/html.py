"""States of the page as HTML. Colours are in style.css, for light and dark."""

from __future__ import annotations

from html import escape
from pathlib import Path

from .answering import PageState
from .tree_picture import draw_tree

STYLE = Path(__file__).with_name("style.css")
NUM_TINTS = 5
TIMES = "\N{MULTIPLICATION SIGN}"


def write_state(state: PageState) -> str:
    """All that the page shows of a state; an error alone where there is one."""
    if state.error:
        return f'<div class="dream-error" role="alert">{escape(state.error)}</div>'
    parts = [f'<div class="dream-doing" role="status">{escape(state.doing)}…</div>'] if state.doing else []
    if state.report is not None:
        parts.append(_summary(state))
    if state.plain or state.speculative:
        parts.append(f'<div class="dream-answers">{_plain(state)}{_speculative(state)}</div>')
    if state.step is not None:
        parts.append(_tree(state))
    return f'<div class="dream-page">{"".join(parts)}</div>'


def _summary(state: PageState) -> str:
    report = state.report or {}
    same = "identical answers" if report["identical"] else "the answers are NOT identical"
    figures = [(f"{report['speedup']:.2f}{TIMES}", "as fast"), (str(report["num_tokens"]), "tokens")]
    if report["tau"] is not None:
        figures.append((f"{report['tau']:.2f}", "tokens a step (tau)"))
    shown = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in figures)
    return f'<div class="dream-figures">{shown}<div><b>{"=" if report["identical"] else "≠"}</b><span>{same}</span></div></div>'


def _plain(state: PageState) -> str:
    return _answer("plain", "Plain decoding", _timing(state, "plain"), escape("".join(state.plain)))


def _speculative(state: PageState) -> str:
    text = "".join(
        f'<span class="{_tint(number)}">{escape(piece)}</span>' for number, piece in enumerate(state.speculative)
    )
    return _answer("speculative", "With the drafter", _timing(state, "dream"), text)


def _answer(name: str, title: str, timing: str, text: str) -> str:
    return (
        f'<section class="dream-answer" id="dream-{name}"><h3>{title}</h3><div class="dream-timing">{timing}</div>'
        f"<pre>{text}</pre></section>"
    )


def _timing(state: PageState, name: str) -> str:
    """Seconds and tokens a second, and a bar as long as the time took beside the longer of both."""
    if state.report is None:
        return "&nbsp;"
    seconds = state.report[f"{name}_seconds"]
    share = seconds / max(state.report["plain_seconds"], state.report["dream_seconds"])
    rate = state.report[f"{name}_tokens_per_second"]
    return f'{seconds:.2f} s, {rate:.0f} tokens/s<div class="dream-bar" style="width: {100 * share:.0f}%"></div>'


def _tree(state: PageState) -> str:
    assert state.step is not None
    path = state.step.path
    drawn = draw_tree(state.texts, state.step.parents, path, _tint(len(state.speculative) - 1))
    return (
        f'<section class="dream-step"><h3>The tree of the last step</h3><p>{len(state.texts) - 1} tokens were drafted below '
        f"the last token of the text, {len(path) - 1} of them kept (coloured), and the target added one of its own.</p>"
        f'<div class="dream-scroll">{drawn}</div></section>'
    )


def _tint(number: int) -> str:
    return f"dream-run-{number % NUM_TINTS}"
