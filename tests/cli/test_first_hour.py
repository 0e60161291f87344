"""What the README tells a newcomer to type, typed. Its server answers in test_attaching.py, its page in test_page.py."""

import json
import re
import shutil
import subprocess
import tomllib

import pytest
from command_line import expected_answer
from processors import make_image
from readme import ROOT, readme_commands
from tiny_pair import save_pair

from dream_hf.cli import main

ELSEWHERE = [["dream-hf", "demo", "--web"], ["dream-hf", "serve", "--target", "demo", "--drafter", "demo"]]


def test_what_is_installed_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    lines = [words for words in readme_commands() if words[0] == "pip"]
    assert len(lines) > 3
    for *pip, what in lines:
        assert pip == ["pip", "install"] and (what == "." or re.fullmatch(r"\.\[(\w+)\]", what)[1] in extras)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_what_is_made_exists():
    targets = [words[1] for words in readme_commands() if words[0] == "make"]
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_a_drafter_of_ones_own(tmp_path, monkeypatch, capsys):
    """From rows to answers with the drafter trained on them, by the commands as they stand."""
    target, _ = save_pair(tmp_path / "pair")
    shutil.copytree(target, tmp_path / "TARGET")
    make_image().save(tmp_path / "one.png")
    content = [{"type": "image"}, {"type": "text", "text": "hello"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "world"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "images": ["one.png"]}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    lines = [words for words in readme_commands() if words[0] == "dream-hf" and words not in ELSEWHERE]
    assert [words[1] for words in lines] == ["regenerate", "train", "generate"]
    for words in lines:
        capsys.readouterr()
        assert main(words[1:]) == 0
    question = lines[-1][lines[-1].index("--prompt") + 1]
    assert expected_answer(question, [make_image()], 256) in capsys.readouterr().out
