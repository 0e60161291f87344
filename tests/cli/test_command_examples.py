"""Every command line in every help text, document, recipe and script is read by the parser it is for; quick ones are run."""

import argparse
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import peft
import pytest
from accelerate.commands.launch import launch_command_parser
from processors import make_image
from tiny_pair import save_pair

from dream_hf import DreamDrafter
from dream_hf.cli import main
from dream_hf.cli.main import COMMANDS, make_parser
from dream_hf.cli.main import parse as parse_command
from dream_hf.cli.train import parse as parse_train
from dream_hf.cli.train_parser import TrainParser

ROOT = Path(__file__).parents[2]
SOURCES = [
    *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.*"), *ROOT.glob("benchmarks/*.*"),
    *ROOT.glob("model_cards/**/*.*"), *ROOT.glob("src/dream_hf/cli/*.py"),
]  # fmt: skip
STARTS = r"(?:dream-hf(?= |$)|accelerate launch |torchrun |python \S+\.py(?= |$))"
PLACEHOLDERS = ("COMMAND", "...")
CPU = ["--bf16", "false", "--use_cpu", "true", "--report_to", "none"]


def blocks_of(path):
    """The parts of a file where commands stand on lines of their own, and its prose."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        blocks = re.findall(r"```(?:bash|yaml)\n(.*?)```", text, re.DOTALL)
        return "\n".join(blocks), re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    if path.suffix == ".py" and path.parent.name == "cli":
        return getattr(COMMANDS.get(path.stem), "EXAMPLE", ""), ""
    return text, ""


def commands_of(path):
    """Whole commands, and those mentioned in prose."""
    block, prose = blocks_of(path)
    lines = [re.fullmatch(rf"(?:#? +|)({STARTS}.*)", line) for line in block.splitlines()]
    whole = [line[1].split(" #")[0].strip() for line in lines if line]
    spans = [re.fullmatch(rf"(?:\w+=\S+ )*({STARTS}.*)", span) for span in re.findall(r"`([^`\n]+)`", prose)]
    found = [(line, True) for line in whole] + [(span[1], False) for span in spans if span]
    return [(line, is_whole) for line, is_whole in found if not any(word in line for word in PLACEHOLDERS)]


FOUND = {found for path in SOURCES if path.suffix in (".md", ".yaml", ".py") for found in commands_of(path)}
WHOLE = sorted(line for line, is_whole in FOUND if is_whole)
MENTIONED = sorted(line for line, is_whole in FOUND if not is_whole)


def inner(line):
    """What a launcher starts: a command of ours, or a script; what is before it is read by accelerate's own parser."""
    words = shlex.split(line)
    if words[0] not in ("accelerate", "torchrun"):
        return words
    at = words.index("-m") if "-m" in words else next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[0] == "accelerate":
        launch_command_parser().parse_args([*words[2:at], "script.py"])
    return ["dream-hf", *words[at + 2 :]] if words[at] == "-m" else ["python", *words[at:]]


class ReadError(Exception):
    """A script has read its arguments, which is as far as it is to get."""


def raise_read(options):
    raise ReadError(options)


def read(words, monkeypatch):
    """Let the real parser read a command line."""
    if words[0] == "python":
        script = next(
            folder / words[1] for folder in (ROOT, ROOT / "examples/demo_pair") if (folder / words[1]).is_file()
        )
        if "def main(" not in script.read_text(encoding="utf-8"):
            return  # a few lines that take no options; tests/test_examples.py runs them
        monkeypatch.setattr(sys, "argv", words[1:])
        monkeypatch.syspath_prepend(str(script.parent))
        main_of_script = runpy.run_path(str(script), run_name="read")["main"]
        parse_args = argparse.ArgumentParser.parse_args
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *args: raise_read(parse_args(*args)))
        with pytest.raises(ReadError):
            main_of_script()
    elif "--help" in words:
        with pytest.raises(SystemExit) as stop:
            main(words[1:])
        assert stop.value.code == 0
    elif words[1] == "train":
        parse_train([*words[2:], *CPU])
    else:
        parse_command(words[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place with the files that examples name."""
    folder = tmp_path_factory.mktemp("examples")
    target, drafter = save_pair(folder / "pair", tree_depth=2, tree_size=4)
    for name in ("TARGET", "llava-hf/llava-v1.6-vicuna-7b-hf"):
        shutil.copytree(target, folder / name)
    for name in ("DRAFTER", "FOLDER", "my-drafter"):
        shutil.copytree(drafter, folder / name)
    for name in ("chart.png", "one.png", "two.png"):
        make_image().save(folder / name)
    row = '{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]}\n'
    for name in ("rows.jsonl", "answers.jsonl", "held_out_answers.jsonl"):
        (folder / name).write_text(row)
    adapted = peft.get_peft_model(
        DreamDrafter.from_pretrained(drafter), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    adapted.save_pretrained(folder / "my-adapter")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(ROOT / "model_cards", folder / "model_cards")
    shutil.copy(ROOT / "examples/demo_pair/drafter.yaml", folder / "drafter.yaml")
    (folder / "recipe.yaml").write_text(
        "target: TARGET\ntrain_dataset: answers.jsonl\noutput_dir: out\nmax_steps: 1\nuse_cpu: true\n"
    )
    return folder


@pytest.mark.parametrize("line", WHOLE)
def test_examples_are_read(line, folder, monkeypatch):
    monkeypatch.chdir(folder)
    read(inner(line), monkeypatch)


@pytest.mark.parametrize("line", MENTIONED)
def test_commands_mentioned_in_prose_exist_with_their_options(line, monkeypatch):
    words = inner(line)
    if words[0] == "python" or ("--output" in words and "--num-prompts" in words):
        read(words, monkeypatch)
        return
    name = next(iter(words[1:]), "demo")
    options = TrainParser("", "").options if name == "train" else {}
    known = {f"--{each}" for each in options} or set(re.findall(r"--[\w-]+", help_of(name)))
    assert name in COMMANDS and {word for word in words if word.startswith("--")} <= known | {"--help"}


def help_of(name):
    parser = make_parser()
    return parser._subparsers._group_actions[0].choices[name].format_help()


def test_examples_are_found(monkeypatch):
    text = "\n".join(WHOLE)
    for command in COMMANDS:
        assert f"dream-hf {command} " in text
    assert "-m dream_hf regenerate" in text and "python benchmarks/engine.py" in text and "--tune --save" in text
    with pytest.raises(SystemExit):
        read(inner("dream-hf regenerate --target x --data rows.jsonl --output answers.jsonl"), monkeypatch)


QUICK = ("generate", "regenerate", "merge", "push", "train recipe.yaml", "train --target")
LIMITS = {
    "generate": ["--max-new-tokens", "4", "--device", "cpu"],
    "regenerate": ["--max-new-tokens", "4", "--device", "cpu"],
    "train": ["--max_steps", "1", "--warmup_steps", "0", *CPU],
}
RUN = [line for line in WHOLE if line.startswith(tuple(f"dream-hf {start}" for start in QUICK))]


@pytest.mark.parametrize(
    "line", [line for line in RUN if not re.search("--yes|--help|runs/target|--self-prompts", line)]
)
def test_quick_examples_run(line, folder, monkeypatch, capsys):
    """With tiny models in place of those named."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = shlex.split(line)[1:]
    if words[0] == "regenerate":
        Path("answers.jsonl").unlink()
    if words[0] == "merge":
        shutil.rmtree("merged-drafter", ignore_errors=True)
    tiny = {"--target": "TARGET", "--drafter": "DRAFTER"}
    words = [tiny.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    assert main([*words, *LIMITS.get(words[0], [])]) == 0, capsys.readouterr().err
    if words[0] == "regenerate":
        shutil.rmtree("answers_files")
