"""The page without its frame: the states a question leads to, and the HTML and pictures they are written as."""

import re
import tomllib
import xml.etree.ElementTree as ElementTree
from copy import deepcopy
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from command_line import expected_answer, refusal_in_one_line
from families import family
from processors import make_image
from readme import readme_command
from tiny_pair import TEMPLATE, save_pair, tiny_drafter, tiny_processor, tiny_target

from dream_hf import RetrievalDrafter
from dream_hf.cli import main
from dream_hf.demo.pictures import bundled_picture
from dream_hf.load_models import Models
from dream_hf.page import app
from dream_hf.page.answering import NO_PICTURE, NO_QUESTION, PageState, answer
from dream_hf.page.html import STYLE, TIMES, write_state
from dream_hf.page.tree_picture import BOX, MARGIN, WIDTH, draw_tree
from dream_hf.page.watching import Step, WatchedDrafter
from dream_hf.version import __version__

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def models():
    target = tiny_target()
    return Models(target, tiny_processor(), tiny_drafter(target, tree_depth=3, tree_size=8))


@pytest.fixture
def picture(tmp_path):
    make_image(color="blue").save(tmp_path / "blue.png")
    return str(tmp_path / "blue.png")


def text_of(markup):
    return unescape(re.sub("<[^>]*>", "", markup))


# -- states -----------------------------------------------------------------------------------------------------------


def test_both_answers_stream_and_are_compared(models, picture):
    states = list(answer(models, picture, " hello ", 12))
    expected, last = expected_answer("hello", [make_image(color="blue")], 12), states[-1]
    assert "".join(last.plain).strip() == "".join(last.speculative).strip() == expected and last.error == ""
    assert last.report["identical"] and last.report["text"] == expected and last.report["num_tokens"] == 12
    assert len(last.plain) == 1
    assert len(last.speculative) <= 1 + len(last.report["accepted_lengths"])
    assert last.step.gained and len(last.texts) == len(last.step.tokens)
    for earlier, later in pairwise(states):
        assert "".join(later.plain).startswith("".join(earlier.plain))
        assert "".join(later.speculative).startswith("".join(earlier.speculative))
    doing = list(dict.fromkeys(state.doing for state in states))
    assert doing[0] == "reading the question" and doing[-1] == ""
    assert all(state.report is None for state in states if state.doing)


def test_a_text_only_target_is_asked_without_a_picture():
    target = family("llama").make_target()
    tokenizer = deepcopy(tiny_processor().tokenizer)
    tokenizer.chat_template = TEMPLATE
    target.resize_token_embeddings(len(tokenizer))
    *_, last = answer(Models(target, tokenizer, RetrievalDrafter()), None, "hello", 8)
    assert last.report["identical"] and last.error == "" and "".join(last.plain) == "".join(last.speculative)


@pytest.mark.parametrize(
    ("file", "question", "error"),
    [
        (None, "hello", NO_PICTURE),
        ("blue.png", "  ", NO_QUESTION),
        ("blue.png", None, NO_QUESTION),
        ("broken.png", "hello", "The picture cannot be read: it is no picture of a format that is known."),
        ("cut.png", "hello", "The picture cannot be read: "),
        ("missing.png", "hello", "The picture cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_answered_is_said_in_one_line(models, picture, tmp_path, file, question, error):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "blue.png").read_bytes()[:60])
    *_, last = answer(models, file and str(tmp_path / file), question)
    assert last.error.startswith(error) and "\n" not in last.error and str(tmp_path) not in last.error
    assert last == PageState(error=last.error)
    assert text_of(write_state(last)) == last.error and 'role="alert"' in write_state(last)


def test_what_goes_wrong_while_decoding_is_said_too(models, picture, caplog):
    other = replace(models, drafter=tiny_drafter(tiny_target()).with_settings(tree_depth=2))
    other.drafter.plain.config.target = {"model_type": "other", "hidden_size": 99}
    *_, last = answer(other, picture, "hello", 4)
    assert last.error and last.report is None and last.doing == ""
    assert "no answer" in caplog.text


def test_decoding_ends_when_nobody_waits(models, picture):
    calls = []
    hook = models.target.register_forward_hook(lambda *_: calls.append(1))
    states = answer(models, picture, "hello", 400, repeats=50)
    for state in states:
        if state.plain:
            break
    states.close()
    hook.remove()
    assert 0 < len(calls) < 400  # the plain answer alone would have taken as many


def test_it_ends_in_the_timed_runs_too(models, picture):
    states = answer(models, picture, "hello", 4, repeats=10_000)
    while next(states).doing != "timing both":
        pass
    states.close()  # comes back


# -- what is watched --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "drafter", [lambda target: tiny_drafter(target, tree_depth=3, tree_size=8), lambda _: RetrievalDrafter()]
)
def test_steps_tell_the_whole_answer(drafter):
    target = tiny_target()
    steps = []
    ids = tiny_processor().tokenizer("a red circle a red circle a", return_tensors="pt")
    watched = WatchedDrafter(drafter(target), steps.append)
    output = target.generate(**ids, assistant_model=watched, max_new_tokens=20, do_sample=False)
    assert torch.equal(output, target.generate(**ids, max_new_tokens=20, do_sample=False))
    new = output[0, ids["input_ids"].shape[1] :].tolist()
    assert [token for step in steps for token in step.gained] == new[1:]
    before = new[0]
    for step in steps:
        assert step.tokens[0] == before and [step.tokens[node] for node in step.path[1:]] == step.gained[:-1]
        assert all(step.parents[node] == above for above, node in zip(step.path, step.path[1:], strict=False))
        before = step.gained[-1]


# -- HTML -------------------------------------------------------------------------------------------------------------


def test_states_are_written_with_runs_and_figures():
    report = {
        "identical": True, "speedup": 2.5, "num_tokens": 7, "tau": 3.0, "plain_seconds": 5.0, "dream_seconds": 2.0,
        "plain_tokens_per_second": 1.4, "dream_tokens_per_second": 3.5,
    }  # fmt: skip
    step = Step([5, 6, 7], [0, 0, 0], [7, 9])
    state = PageState(("<b>&",), ("<b", ">&"), "", ("x", "a<", "b"), step, report)
    markup = write_state(state)
    assert '<span class="dream-run-0">&lt;b</span><span class="dream-run-1">&gt;&amp;</span>' in markup
    assert "<pre>&lt;b&gt;&amp;</pre>" in markup and "<b>&" not in markup
    shown = text_of(markup)
    for figure in (
        f"2.50{TIMES}as fast",
        "7tokens",
        "3.00",
        "identical answers",
        "5.00 s, 1 tokens/s",
        "2.00 s, 4 tokens/s",
    ):
        assert figure in shown
    assert "width: 100%" in markup and "width: 40%" in markup
    assert "2 tokens were drafted" in shown and "1 of them kept" in shown
    differing = write_state(replace(state, report={**report, "identical": False, "tau": None}))
    assert "NOT identical" in differing and "tau" not in text_of(differing)
    ElementTree.fromstring(markup.replace("&nbsp;", " "))  # well-formed
    begun = write_state(PageState(("a",), doing="decoding plainly"))
    assert "decoding plainly…" in begun and "dream-figures" not in begun and "<svg" not in begun


def test_every_colour_of_a_run_has_a_counterpart_in_the_dark():
    style = STYLE.read_text(encoding="utf-8")
    light, dark = (re.search(rf"{name} {{(.*?)}}", style, re.DOTALL)[1] for name in (":root", r"\.dark"))
    rest = style.replace(light, "").replace(dark, "")
    assert re.findall(r"(--[\w-]+):", light) == re.findall(r"(--[\w-]+):", dark)
    assert not re.findall(r"#[0-9a-f]{3,8}\b|rgb\(|hsl\(", rest)


# -- the tree ---------------------------------------------------------------------------------------------------------


def boxes(svg):
    """Of each node its class, text and the corners of its box."""
    found = []
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        x, y, width, height = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
        found.append((group.get("class"), group.find(f"{SVG}text").text, (x, y, x + width, y + height)))
    return found


def test_a_small_tree():
    #  0 - 1 - 3   the path is 0, 2, 4
    #   \- 2 - 4
    svg = draw_tree(["root", " a", "b<", "c\n", ""], [0, 0, 0, 1, 2], [0, 2, 4], "tint")
    assert [box[:2] for box in boxes(svg)] == [
        ("node kept tint", "root"), ("node", "·a"), ("node kept tint", "b<"), ("node", "c↵"), ("node kept tint", "∅")
    ]  # fmt: skip
    places = [box[2] for box in boxes(svg)]
    tops = [place[1] for place in places]
    assert tops[0] == tops[2] == tops[4] < tops[1] == tops[3]  # the accepted path is a line on top
    assert places[1][0] == places[2][0] > places[0][2] and places[3][0] == places[4][0] > places[2][2]
    assert svg.count('<path class="edge"') == 2 and svg.count('<path class="edge kept"') == 2
    assert "4 drafted tokens, 2 of them kept" in svg


@pytest.mark.parametrize("seed", range(20))
def test_nothing_lies_over_anything_else(seed):
    generator = torch.Generator().manual_seed(seed)
    num_nodes = int(torch.randint(1, 90, (), generator=generator))
    parents = [0]
    for node in range(1, num_nodes):
        least = max(0, node - 4) if seed % 2 else 0  # deep ones and wide ones
        parents.append(int(torch.randint(least, node, (), generator=generator)))
    texts = ["x" * int(torch.randint(0, 20, (), generator=generator)) for _ in parents]
    path = [0]
    for node in range(1, num_nodes):
        if parents[node] == path[-1] and node % 3:
            path.append(node)
    svg = draw_tree(texts, parents, path)
    found = boxes(svg)
    assert [("kept" in name) for name, *_ in found] == [node in path for node in range(num_nodes)]
    rectangles = [place for *_, place in found]
    for number, (left, top, right, bottom) in enumerate(rectangles):
        assert MARGIN <= left < right <= WIDTH and bottom - top == pytest.approx(BOX)
        for other in rectangles[:number]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    root = ElementTree.fromstring(svg)
    assert max(place[3] for place in rectangles) <= float(root.get("height"))
    for node in range(1, num_nodes):
        above, here = rectangles[parents[node]], rectangles[node]
        assert here[1] >= above[3] or here[0] >= above[2]  # further right, or in a later band


# -- the space ---------------------------------------------------------------------------------------------------------


def test_a_space_installs_what_the_extra_does():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wheel, *others = (ROOT / "examples/space/requirements.txt").read_text().split()
    assert wheel == f"dream_hf-{__version__}-py3-none-any.whl" and others == extras["web"]
    pinned = re.search(r"^gradio==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert f"sdk_version: {pinned}\n" in (ROOT / "examples/space/README.md").read_text()


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["demo", "own target"])
def test_the_command_serves_a_page(own, monkeypatch, tmp_path):
    made, launched = {}, []
    monkeypatch.setattr(app, "check_gradio", lambda: None)
    monkeypatch.setattr(app, "make_page", lambda models, **settings: made.update(settings, models=models) or "page")
    monkeypatch.setattr(app, "launch", lambda *arguments: launched.append(arguments))
    pair = []
    if own:
        target, drafter = save_pair(tmp_path)
        pair = ["--target", str(target), "--drafter", str(drafter)]
    command = readme_command("dream-hf", "demo")[1:]
    assert main([*command, "--port", "1234", "--max-new-tokens", "32", *pair]) == 0
    assert launched == [("page", "localhost", 1234)] and made["max_new_tokens"] == 32
    assert made["is_demo"] is not own and (made["picture"] is None) == own
    assert made["question"] == ("" if own else bundled_picture("scene")[1])
    assert made["models"].drafter is not None


def test_the_command_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    assert '`pip install ".[web]"`' in refusal_in_one_line(capsys, "demo", "--web")
    for option in (["--json"], ["--save", "x.png"]):
        assert f"`{option[0]}`" in refusal_in_one_line(capsys, "demo", "--web", *option)
    assert "needs `--drafter`" in refusal_in_one_line(capsys, "demo", "--web", "--target", "x")
