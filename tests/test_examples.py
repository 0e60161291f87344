"""The examples run: the notebook cell by cell, the scripts as they stand, with what they say being the target's own."""

import json
import re
import runpy
import socket
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from command_line import expected_answer
from processors import make_image
from tiny_pair import save_pair, tiny_drafter, tiny_processor, tiny_target

import dream_hf.demo
from dream_hf.benchmark.comparison import encode
from dream_hf.data.images import load_image
from dream_hf.demo import TASKS, load_pair
from dream_hf.demo.pictures import bundled_picture

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def pair():
    return load_pair()


def plain_answer(pair, question, file):
    target, _, processor = pair
    inputs = encode(processor, question, load_image(file))
    output = target.generate(**inputs, max_new_tokens=256)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def run_script(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_notebook_runs_from_top_to_bottom(pair, capsys):
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    space = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None  # figures are those of whoever runs it
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
    printed = capsys.readouterr().out
    assert plain_answer(pair, space["question"], space["file"]) in printed and "the same tokens: True" in printed
    assert space["tau"] > 2 and space["step"].gained and "<svg" in space["Drawing"]("<svg>")._repr_html_()
    prose = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    named = re.findall(r"`((?:examples|docs)/[\w./]+)`", prose)
    assert len(named) > 3 and all((EXAMPLES.parent / path).is_file() for path in named)


def test_your_own_model(tmp_path, monkeypatch, capsys):
    target, drafter = save_pair(tmp_path, tree_depth=3, tree_size=8)
    make_image(color="blue").save(tmp_path / "blue.png")
    run_script(monkeypatch, "your_own_vlm.py", str(target), str(drafter), str(tmp_path / "blue.png"), "hello")
    assert capsys.readouterr().out.strip() == expected_answer("hello", [make_image(color="blue")], 256)
    code = (EXAMPLES / "your_own_vlm.py").read_text().split('"""')[2].strip().splitlines()
    assert len([line for line in code if line]) <= 15


def test_a_chat_goes_on_from_its_caches(pair, monkeypatch, capsys):
    file, question = bundled_picture("chart")
    pictures_read = []
    target = pair[0]
    hook = target.model.vision_tower.register_forward_hook(lambda *_: pictures_read.append(1))
    monkeypatch.setattr(dream_hf.demo, "load_pair", lambda: pair, raising=False)
    ran = run_script(monkeypatch, "chat.py", str(file), question, "Which value is the largest?")
    hook.remove()
    assert plain_answer(pair, question, file) in capsys.readouterr().out
    first, second = (message["content"][0]["text"] for message in ran["messages"][1::2])
    assert first and second and len(ran["messages"]) == 4
    assert pictures_read == [1]  # the second turn goes on from the first
    afresh = target.generate(**ran["processor"].apply_chat_template(
        ran["messages"][:3], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ), max_new_tokens=256)  # fmt: skip
    assert torch.equal(ran["said"], afresh)


def test_batches(pair, monkeypatch, capsys):
    monkeypatch.setattr(dream_hf.demo, "load_pair", lambda: pair, raising=False)
    ran = run_script(monkeypatch, "batches.py")
    printed = capsys.readouterr().out
    for file, question in map(bundled_picture, TASKS):
        assert plain_answer(pair, question, file) in printed
    assert len(ran["answers"]) == len(TASKS) and printed.count("tokens gained by each step: [") == len(TASKS)


def test_answers_in_a_grammar(pair, monkeypatch, capsys):
    pytest.importorskip("outlines_core", reason="the example's grammar library is not installed")
    monkeypatch.setattr(dream_hf.demo, "load_pair", lambda: pair, raising=False)
    ran = run_script(monkeypatch, "constrained.py")
    printed = capsys.readouterr().out
    answer = json.loads(printed.splitlines()[0].replace("'", '"'))
    named = {shape["shape"] for shape in answer["shapes"]}
    assert len(answer["shapes"]) > 2 and named <= {"circle", "square", "triangle", "star"}
    assert "the same tokens as plain decoding: True" in printed
    assert ran["output"].accepted_lengths.max() > 4  # drafts go on under a grammar
    assert "cross" in plain_answer(pair, ran["question"], ran["picture"])  # which a free answer names


# -- FastAPI ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """The example's server with a tiny pair, at an address of its own; and the forwards of its target so far."""
    pytest.importorskip("fastapi", reason="needs fastapi and uvicorn, which the extra `web` brings")
    import uvicorn

    target = tiny_target()
    tiny = target, tiny_drafter(target, tree_depth=3, tree_size=8), tiny_processor()
    monkeypatch.setattr(dream_hf.demo, "load_pair", lambda: tiny, raising=False)
    app = runpy.run_path(str(EXAMPLES / "fastapi_server.py"))["app"]
    forwards = []
    target.register_forward_hook(lambda *_: forwards.append(1))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=running.run)
    thread.start()
    until(lambda: running.started)
    yield port, forwards
    running.should_exit = True
    thread.join()


def until(is_true, seconds=60):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


def post(port, query, body):
    connection = HTTPConnection("localhost", port, timeout=60)
    connection.request("POST", f"/answer?{query}", body)
    return connection, connection.getresponse()


def test_a_server_of_ones_own(server, tmp_path):
    port, forwards = server
    make_image(color="blue").save(tmp_path / "blue.png")
    picture = (tmp_path / "blue.png").read_bytes()
    _, response = post(port, "question=hello&max_new_tokens=20", picture)
    assert response.status == 200
    assert response.read().decode().strip() == expected_answer("hello", [make_image(color="blue")], 20)
    _, response = post(port, "question=hello", b"no picture")
    assert response.status == 400 and "must be a picture" in response.read().decode()

    # A client that hangs up.
    forwards.clear()
    connection, response = post(port, "question=hello&max_new_tokens=450", picture)
    assert response.read(1)
    response.close()
    connection.close()
    until(lambda: all(thread.name != "answer" for thread in threading.enumerate()))
    stopped_after = len(forwards)
    forwards.clear()
    _, response = post(port, "question=hello&max_new_tokens=450", picture)
    response.read()
    assert 0 < stopped_after < len(forwards)
