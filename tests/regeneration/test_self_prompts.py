"""Prompts that a model writes itself: only the user's words, each once, the same after a kill, and answered like any others."""

import json

import pytest
import torch
from processors import train_tokenizer
from tiny_pair import tiny_processor, tiny_target

from dream_hf.data.reader import ChatReader
from dream_hf.regeneration import self_prompts
from dream_hf.regeneration.regenerate import regenerate
from dream_hf.regeneration.self_prompts import UserTurn, is_usable, same, write_prompts

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<s>Be kind.\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def target():
    """Speaks in letters and spaces alone, and comes to an end."""
    target, tokenizer = tiny_target(1.8), tiny_processor().tokenizer
    texts = [tokenizer.decode([token_id]) for token_id in range(len(tokenizer))]
    other = [index for index, text in enumerate(texts) if not text.replace(" ", "a").isalpha() or not text.isascii()]
    other.remove(tokenizer.eos_token_id)
    target.generation_config.suppress_tokens = other
    return target


def write(target, folder, num_prompts=6, **options):
    return write_prompts(target, tiny_processor(), folder, num_prompts, **{"batch_size": 8, **options})


def words(rows):
    return [row["messages"][0]["content"] for row in rows]


def test_user_turn_of_a_template():
    tokenizer = train_tokenizer(["<|start|>", "<|end|>"], chat_template=CHATML)
    turn = UserTurn.of(ChatReader(tokenizer))
    assert turn == UserTurn("<s>Be kind.\n<|start|>user\n", "<|end|>")
    assert UserTurn.of(ChatReader(tiny_processor())) == UserTurn("user: ", "assistant:")


def test_prompts_are_usable_different_and_seeded(target, tmp_path):
    rows = write(target, tmp_path / "one")
    assert len(rows) == 6 and all(row["messages"][0]["role"] == "user" for row in rows)
    assert len({same(prompt) for prompt in words(rows)}) == 6 and all(map(is_usable, words(rows)))
    special = tiny_processor().tokenizer.all_special_tokens
    assert not [prompt for prompt in words(rows) if any(token in prompt for token in [*special, "assistant:"])]
    assert rows == write(target, tmp_path / "two") != write(target, tmp_path / "other", seed=7)


def test_a_killed_run_goes_on_and_grows(target, tmp_path, monkeypatch):
    whole = write(target, tmp_path / "whole", 12)
    assert write(target, tmp_path / "cut") == whole[:6]
    file = tmp_path / "cut" / "batches.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed while writing
    assert write(target, tmp_path / "cut", 12) == whole
    monkeypatch.setattr(self_prompts, "_Writer", None)  # nothing is left to be written
    assert write(target, tmp_path / "cut", 12) == whole
    with pytest.raises(ValueError, match="`seed` 42 and now it is 1"):
        write(target, tmp_path / "cut", 12, seed=1)


def test_a_user_ends_where_the_template_ends_turns(target, tmp_path, monkeypatch):
    """A token of the template's that is not the model's own end."""
    tokenizer = train_tokenizer(["<|start|>", "<|end|>"], chat_template=CHATML)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    asked = {}

    def generate(**inputs):
        asked.update(inputs)
        said = tokenizer("What is in the image?<|end|>\n<|start|>", add_special_tokens=False, return_tensors="pt")
        return torch.cat([inputs["input_ids"], said["input_ids"].expand(len(inputs["input_ids"]), -1)], dim=1)

    monkeypatch.setattr(target, "generate", generate)
    writer = self_prompts._Writer(target, ChatReader(tokenizer))
    written = list(writer.write(4, seed=0))
    assert end in asked["eos_token_id"] and all(prompt.endswith("What is in the image?") for prompt in written)
    firsts = asked["input_ids"][:, -1].tolist()
    assert all(tokenizer.decode([first])[:1].isalnum() for first in firsts) and len(set(firsts)) > 1


def test_a_model_that_says_nothing_is_refused(target, tmp_path, monkeypatch):
    monkeypatch.setattr(
        self_prompts._Writer, "write", lambda *_: ["Hm.", "?", "a \N{REPLACEMENT CHARACTER} b c d e f g"]
    )
    with pytest.raises(ValueError, match=r"`num_prompts` \(6\): the target wrote no usable prompt"):
        write(target, tmp_path)
    with pytest.raises(ValueError, match=r"`num_prompts` \(0\)"):
        write(target, tmp_path, 0)


def test_prompts_are_answered(target, tmp_path):
    rows = write(target, tmp_path / "prompts")
    report = regenerate(target, tiny_processor(), rows, tmp_path / "a.jsonl", max_new_tokens=8, batch_size=4)
    answered = [json.loads(line) for line in report.output.read_text().splitlines()]
    assert report.num_rows + report.num_bad == 6 and report.num_rows > 1
    assert {row["messages"][0]["content"][0]["text"] for row in answered} <= set(words(rows))
