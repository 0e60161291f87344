"""The page itself, in gradio (extra `web`): a picture and a question on one side, the state of the answers on the other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..load_models import Models
from .answering import answer, takes_pictures
from .html import STYLE, write_state

TITLE = "dream-hf: the same answer, sooner"
INTRODUCTION = """# The same answer, sooner

The target answers a question about a picture twice: token by token, and with a drafter, whose trees of tokens it verifies at
once. What came in one step has one colour."""
DEMO_NOTE = """**This small target knows drawn scenes, charts and pages of text, and nothing else:** it takes a photo for one
of them. The examples are pictures of its world that it was not trained on."""
NUM_DRAWN = 1  # further examples of each kind, drawn when the page is made
FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # no font comes from the network
MONO_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def check_gradio() -> None:
    """Raise an `ImportError` that says what to install where gradio is missing."""
    if find_spec("gradio") is None:
        raise ImportError(
            'The page needs gradio, which is not installed. It is the extra `web` of dream-hf: `pip install ".[web]"` in a '
            "clone, or `pip install gradio`."
        )


def launch(page: Any, host: str | None = None, port: int | None = None, **options: Any) -> Any:
    """Serve a page of [`make_page`]; `host`, `port` and `options` are those of gradio's `launch`, whose result is returned."""
    import gradio

    theme = gradio.themes.Default(font=FONTS, font_mono=MONO_FONTS)
    return page.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css=STYLE.read_text(encoding="utf-8"),
        ssr_mode=False,
        **options,
    )


def make_page(
    models: Models,
    *,
    picture: Any = None,
    question: str = "",
    max_new_tokens: int = 256,
    repeats: int = 1,
    is_demo: bool = False,
) -> Any:
    """A page that asks `models` about pictures.

    Args:
        models (`Models`): A target, its processor and a drafter, from [`load_models`].
        picture (`PIL.Image.Image` or `str`, *optional*): The picture that is there at first.
        question (`str`): The question that is there at first.
        max_new_tokens (`int`): Longest answer at first.
        repeats (`int`): Timed runs of each way; medians count.
        is_demo (`bool`): The target is the bundled one: say what it knows, and offer pictures of its world.

    Returns:
        `gradio.Blocks`: For [`launch`]. Questions are answered one after the other, so that times stay true.

    Raises:
        ImportError: gradio is not installed.
    """
    check_gradio()
    import gradio

    def respond(path: str | None, asked: str, limit: float) -> Iterator[str]:
        for state in answer(models, path, asked, int(limit), repeats):
            yield write_state(state)

    with gradio.Blocks(title=TITLE, analytics_enabled=False) as page:
        gradio.Markdown(INTRODUCTION + (f"\n\n{DEMO_NOTE}" if is_demo else ""))
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                shown, asked, limit = _fields(picture, question, max_new_tokens, takes_pictures(models))
                button = gradio.Button("Answer", variant="primary", elem_id="answer")
            with gradio.Column(scale=5, min_width=320):
                answers = gradio.HTML(elem_id="answers")
        if is_demo:
            gradio.Examples(
                _examples(), [shown, asked], label="Pictures of its world", cache_examples=False, elem_id="examples"
            )
        gradio.on(
            [button.click, asked.submit],
            respond,
            [shown, asked, limit],
            answers,
            concurrency_limit=1,
            show_progress="hidden",
            trigger_mode="once",
        )
    return page


def _fields(picture: Any, question: str, max_new_tokens: int, takes_pictures: bool) -> tuple[Any, Any, Any]:
    """What is asked about, what is asked, and how long the answer may be."""
    import gradio

    shown: Any = gradio.Image(
        picture,
        label="Picture",
        type="filepath",
        format="png",
        sources=["upload"],
        height=280,
        elem_id="picture",
        visible=takes_pictures,
    )
    shown.preprocess = _path_of
    asked = gradio.Textbox(question, label="Question", lines=2, elem_id="question")
    return shown, asked, gradio.Slider(16, 512, max_new_tokens, step=1, label="Longest answer, in tokens")


def _path_of(payload: Any) -> str | None:
    """The file that came for a picture, not decoded: whether that can be done is said in the page."""
    return None if payload is None else payload.path


def _examples() -> list[list[Any]]:
    """Pictures of the demo world with their questions: the bundled ones, and some drawn anew."""
    from ..demo.pictures import SEED, bundled_picture, draw_picture
    from ..demo.rows import TASKS

    found = [[str(file), request] for file, request in map(bundled_picture, TASKS)]
    folder = Path(tempfile.mkdtemp(prefix="dream-hf-examples-"))
    for task in TASKS:
        for number in range(1, 1 + NUM_DRAWN):
            image, request = draw_picture(task, SEED + number)
            image.save(folder / f"{task}{number}.png")
            found.append([str(folder / f"{task}{number}.png"), request])
    return found
