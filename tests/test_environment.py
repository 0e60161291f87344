"""What has to be installed, and where a drafter has to lie: declared, said, and the same in every document."""

import json
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from command_line import refusal_in_one_line
from processors import train_tokenizer
from tiny_pair import tiny_drafter, tiny_processor, tiny_target
from torch import nn

import dream_hf
from dream_hf import dream_chain_generate, dream_generate
from dream_hf.data.prompts import PromptEncoder
from dream_hf.drafters import fit
from dream_hf.drafters.dream import checks
from dream_hf.load_models import _load_processor

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("model_cards/*/README.md")]
DOCUMENTS += [*ROOT.glob("src/dream_hf/templates/usage_*.txt")]


# -- packages ---------------------------------------------------------------------------------------------------------


def test_the_oldest_python_is_declared_once_and_for_all():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = settings["project"]["requires-python"].removeprefix(">=")
    versions = [line.rsplit(" ", 1)[1] for line in settings["project"]["classifiers"] if " :: 3." in line]
    assert min(versions, key=lambda version: tuple(map(int, version.split(".")))) == oldest
    assert settings["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert settings["tool"]["mypy"]["python_version"] == oldest
    assert f"Python {oldest}" in (ROOT / "README.md").read_text()


def test_the_version_is_the_same_wherever_it_is_written():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dream_hf.__version__ and citation["license"] == "Apache-2.0"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["abstract"] == settings["description"]
    assert citation["preferred-citation"]["url"] == settings["urls"]["Paper"]


def test_extras_that_documents_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [*DOCUMENTS, *ROOT.glob("src/**/*.py"), *ROOT.glob("src/**/*.md"), ROOT / "Makefile"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    named = re.findall(r'pip install [^`\n]*"?\.\[(\w+)\]', text)
    assert "vision" in named and set(named) <= set(extras)
    assert not re.findall(r"pip install dream-hf.*", text)  # on no index yet
    assert "torchvision==" in (ROOT / "constraints.txt").read_text()


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "x"], ["regenerate", "--rows", "r.jsonl", "--output", "o.jsonl"]]
)
def test_a_processor_without_torchvision_says_what_to_install(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["<|image_pad|>", "<|video_pad|>"], chat_template="x")
    tokenizer.save_pretrained(tmp_path)
    processor = {"processor_class": "Qwen2VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    message = refusal_in_one_line(capsys, *command, "--target", str(tmp_path), "--device", "cpu", is_last_line=True)
    assert str(tmp_path) in message and 'pip install ".[vision]"' in message and "`pip install torchvision`" in message


def test_other_missing_packages_are_reported_as_they_are():
    class Processor:
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            raise ImportError("needs sentencepiece")

    with pytest.raises(ImportError, match="needs sentencepiece"):
        _load_processor(Processor, "x", None)


# -- places -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def warnings(monkeypatch):
    """What `warning_once` was asked to say, each message once."""
    said = set()
    for module in (checks, fit):
        monkeypatch.setattr(module.logger, "warning_once", said.add)
    return said


@pytest.mark.parametrize("how", ["assistant", "custom_generate", "chain"])
def test_a_drafter_in_another_dtype_is_told_once(how, warnings):
    target = tiny_target()
    drafter = tiny_drafter(target, tree_depth=2, tree_size=3)
    inputs = PromptEncoder(tiny_processor()).encode(
        [([{"role": "user", "content": [{"type": "text", "text": "x"}]}], [])]
    )
    entries = {"custom_generate": dream_generate, "chain": dream_chain_generate}
    options = {"custom_generate": entries[how], "drafter": drafter} if how in entries else {"assistant_model": drafter}
    expected = target.generate(**inputs, max_new_tokens=6)
    assert torch.equal(target.generate(**inputs, max_new_tokens=6, **options), expected) and not warnings
    drafter.to(torch.bfloat16)
    for _ in range(2):
        assert torch.equal(target.generate(**inputs, max_new_tokens=6, **options), expected)
    (message,) = warnings
    assert "torch.bfloat16" in message and "dtype=target.dtype, device_map=target.device" in message


class Model(nn.Module):
    """As much of a model as is asked where it lies."""

    def __init__(self, device, dtype=torch.float32, device_map=None):
        super().__init__()
        self.device, self.dtype = torch.device(device), dtype
        if device_map is not None:
            self.hf_device_map = device_map


@pytest.mark.parametrize(
    ("target", "drafter", "is_told"),
    [
        (Model("cuda:0"), Model("cpu"), True),
        (Model("cuda:0"), Model("cuda:0"), False),
        (Model("cuda:0", torch.bfloat16), Model("cuda:0"), True),
        (Model("cuda:0"), Model("cuda:1"), True),
        (Model("cuda:0", device_map={"model": 0, "lm_head": 1}), Model("cuda:1"), False),
        (Model("cuda:0", device_map={"model": "cuda:0", "lm_head": "cuda:1"}), Model("cuda:1"), False),
        (Model("cuda:0", device_map={"": torch.device("cuda:0")}), Model("cpu"), True),
    ],
)
def test_where_a_drafter_may_lie(target, drafter, is_told, warnings):
    fit.check_place(target, drafter)
    assert len(warnings) == is_told


def test_every_snippet_loads_its_drafter_beside_the_target():
    loads = [
        (path.name, call)
        for path in DOCUMENTS
        for call in re.findall(
            r"drafter = (?:DreamDrafter|AutoModel)\.from_pretrained\((.*?)\)\n", _code(path), re.DOTALL
        )
    ]
    assert len(loads) > 10
    assert [load for load in loads if "dtype=target.dtype, device_map=target.device" not in load[1]] == []


def _code(path):
    text = path.read_text(encoding="utf-8")
    return text if path.suffix == ".txt" else "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
