"""A target's folder with a drafter in it: what loads it decodes with the drafter, in programs and behind a server."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
import transformers.generation.utils
from readme import readme_command
from tiny_pair import save_pair, tiny_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

import dream_hf
from dream_hf.cli.main import main
from dream_hf.hub.attaching import attach
from dream_hf.load_models import BUNDLED

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def trusting(monkeypatch, tmp_path):
    """Code of models goes to a folder of the test's; dream-hf, run from its source, counts as installed."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(transformers.generation.utils, "check_python_requirements", lambda *_, **__: None)


@pytest.mark.parametrize("copies", [False, True], ids=["links", "copies"])
def test_a_target_decodes_with_the_drafter_beside_it(pair, trusting, tmp_path, copies, caplog):
    folder = attach(*pair, tmp_path / "both", copies=copies)
    assert (folder / "model.safetensors").is_symlink() != copies
    prompts = tiny_processor().tokenizer(["a red circle", "a"], return_tensors="pt", padding=True)
    settings = {**prompts, "max_new_tokens": 12, "do_sample": False}
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    expected = plain.generate(**settings)
    target = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    with caplog.at_level("INFO", "dream_hf"):
        assert torch.equal(target.generate(**settings), expected)
        assert torch.equal(target.generate(settings.pop("input_ids"), **settings), expected)
    lines = [record.getMessage() for record in caplog.records if "tau" in record.getMessage()]
    assert len(lines) == 2 and lines[0] == lines[1] and "of 2 rows: tau" in lines[0]
    with pytest.raises(ValueError, match="`assistant_model`"):
        target.generate(expected, assistant_model=dream_hf.DreamDrafter.from_pretrained(pair[1]))
    # Another copy of the target takes the drafter out of that folder, too.
    more = {"max_new_tokens": 4, "do_sample": False}
    elsewhere = plain.generate(expected, custom_generate=str(folder), trust_remote_code=True, **more)
    assert torch.equal(elsewhere, plain.generate(expected, **more))


def test_it_drafts_by_the_settings_that_lie_beside_it(pair, trusting, tmp_path):
    prompts = tiny_processor().tokenizer(["a red circle"], return_tensors="pt")
    settings = {
        **prompts,
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    seen = []
    for depth in (1, 3):
        folder = attach(*pair, tmp_path / f"by {depth}", settings={"tree_depth": depth})
        target = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        seen.append(target.generate(**settings).drafted_lengths.max())
    assert seen[0] < seen[1]
    assert main(["attach", *map(str, pair), str(tmp_path / "compiled"), "--compile"]) == 0
    assert json.loads((tmp_path / "compiled/drafter/draft_settings.json").read_text()) == {"compile": True}
    again = attach(pair[0], tmp_path / "by 1/drafter", tmp_path / "again", settings={"tree_depth": 2})
    files = [folder / "drafter/draft_settings.json" for folder in (tmp_path / "by 1", again)]
    assert [json.loads(file.read_text())["tree_depth"] for file in files] == [1, 2]
    with pytest.raises(ValueError, match="tree_deep"):
        attach(*pair, tmp_path / "wrong", settings={"tree_deep": 1})
    assert not (tmp_path / "wrong").exists()


def test_what_cannot_be_attached_is_refused(pair, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`drafter` .*no config.json"):
        attach(pair[0], tmp_path / "empty", tmp_path / "both")
    assert not (tmp_path / "both").exists()
    assert main(["attach", *map(str, pair), str(tmp_path / "both")]) == 0
    assert "--trust-remote-code" in capsys.readouterr().out
    assert main(["attach", *map(str, pair), str(tmp_path / "both")]) == 2
    assert "holds something already" in capsys.readouterr().err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`dream-hf serve` with the bundled pair, and a client; afterwards it has ended by itself when asked to."""
    openai = pytest.importorskip("openai", reason="the client of the served API is not installed")
    pytest.importorskip("fastapi", reason="transformers' server needs it: pip install dream-hf[serve]")
    place, port = tmp_path_factory.mktemp("served"), free_port()
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HOME": str(place), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dream_hf", *readme_command("dream-hf", "serve")[1:]]
    log = (place / "log").open("w")
    process = subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu"], env=environment, stdout=log, stderr=log
    )
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=120)
    for _ in range(240):
        try:
            client.models.list()
            break
        except openai.OpenAIError:
            assert process.poll() is None, (place / "log").read_text()
            time.sleep(0.5)
    yield client, place / "log"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) in (0, 130)


def question(picture: bytes | None = None):
    """A request about a picture, by default the bundled scene."""
    picture = picture or next((BUNDLED["target"].parent / "pictures").glob("scene*")).read_bytes()
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + b64encode(picture).decode()}}
    content = [image, {"type": "text", "text": "Describe the scene."}]
    return {"model": "demo", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 100}


def test_served_answers_are_those_of_generate(server):
    from PIL import Image

    client, log = server
    request = question()
    answer = client.chat.completions.create(**request)
    text = answer.choices[0].message.content
    target = AutoModelForImageTextToText.from_pretrained(BUNDLED["target"])
    processor = AutoProcessor.from_pretrained(BUNDLED["target"])
    picture = Image.open(next((BUNDLED["target"].parent / "pictures").glob("scene*")))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Describe the scene."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    expected = target.generate(**inputs, max_new_tokens=100, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert text == processor.decode(expected, skip_special_tokens=True)
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1] and answer.usage.completion_tokens == len(
        expected
    )
    assert "tau" in log.read_text()
    chunks = client.chat.completions.create(**request, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text


def test_a_server_survives_its_clients(server):
    """Eight at once, some of whom hang up; wrong models and broken pictures are errors, and the next answer is right."""
    import openai

    client, _ = server
    text = client.chat.completions.create(**question()).choices[0].message.content
    answers: list[str | None] = []

    def ask(leaves: bool) -> None:
        if not leaves:
            answers.append(client.chat.completions.create(**question()).choices[0].message.content)
            return
        stream = client.chat.completions.create(**question(), stream=True)
        next(iter(stream))
        stream.close()

    threads = [threading.Thread(target=ask, args=(number % 4 == 0,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert answers == [text] * 6
    for wrong in ({**question(), "model": "another"}, question(b"no picture at all")):
        with pytest.raises(openai.APIError):
            client.chat.completions.create(**wrong)
    again = client.with_options(max_retries=3)  # the server hangs up where it failed
    assert again.chat.completions.create(**question()).choices[0].message.content == text
