"""Targets with few bits, and spread over devices: what every command hands on, how it refuses, and that trees stay exact."""

from importlib.util import find_spec

import pytest
import torch
from command_line import refusal_in_one_line
from tiny_pair import save_pair
from transformers import LlavaForConditionalGeneration

from dream_hf.benchmark.comparison import encode
from dream_hf.cli import main
from dream_hf.data.images import load_image
from dream_hf.demo.pictures import bundled_picture
from dream_hf.load_models import DEMO, load_models
from dream_hf.targets import quantized

COMMANDS = {
    "generate": ["--prompt", "x"],
    "demo": ["--drafter", "retrieval"],
    "bench": ["--output", "o", "--tasks", "scene", "--num-prompts", "1"],
    "regenerate": ["--self-prompts", "1", "--output", "o.jsonl"],
    "info": ["DRAFTER"],
    "probe": ["DRAFTER"],
    "serve": ["--drafter", "DRAFTER"],
    "train": ["--train_dataset", "rows.jsonl", "--output_dir", "o", "--use_cpu", "true", "--report_to", "none"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), tree_depth=3, tree_size=8)


def words_of(command, folders, option, value):
    option = option.replace("-", "_").replace("__", "--", 1) if command == "train" else option
    rest = [str(folders[1]) if word == "DRAFTER" else word for word in COMMANDS[command]]
    return [command, *rest, "--target", str(folders[0]), option, value]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_is_missing_or_unknown(command, folders, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    message = refusal_in_one_line(
        capsys, *words_of(command, folders, "--target-quantization", "4bit"), is_last_line=True
    )
    assert '`pip install ".[quantization]"`' in message
    message = refusal_in_one_line(
        capsys, *words_of(command, folders, "--target-quantization", "3bit"), is_last_line=True
    )
    assert "use '4bit' or '8bit'" in message
    if command != "serve":  # transformers' server hands it on
        message = refusal_in_one_line(
            capsys, *words_of(command, folders, "--target-device-map", "x"), is_last_line=True
        )
        assert "use 'auto', 'balanced'" in message


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_what_the_target_is_loaded_with(folders, monkeypatch, bits):
    monkeypatch.setattr(quantized, "find_spec", lambda name: "there")
    given = {}
    load = LlavaForConditionalGeneration.from_pretrained.__func__

    def loading(cls, *args, quantization_config=None, **kwargs):
        given.update(kwargs, quantization_config=quantization_config)
        return load(cls, *args, **kwargs | {"device_map": {"": "cpu"}})

    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", classmethod(loading))
    models = load_models(*map(str, folders), dtype="float16", quantization=bits, device_map="balanced")
    config = given["quantization_config"]
    assert given["device_map"] == "balanced" and models.drafter.dtype == torch.float16
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == "4bit", bits == "8bit")
    assert bits == "8bit" or config.bnb_4bit_compute_dtype == torch.float16
    with pytest.raises(ValueError, match="give one of the two"):
        load_models(str(folders[0]), device="cpu", device_map="auto")


def test_a_spread_target_decodes(folders, capsys):
    arguments = ["generate", "--prompt", "hello", "--max-new-tokens", "8", "--json"]
    texts = []
    for place in (["--device", "cpu"], ["--target-device-map", "auto"]):
        if torch.accelerator.is_available():
            pytest.skip("would be spread over accelerators, which round differently")
        assert main([*arguments, "--target", str(folders[0]), "--drafter", str(folders[1]), *place]) == 0
        texts.append(capsys.readouterr().out.split('"num_tokens"')[0])
    assert texts[0] == texts[1]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes, extra `quantization`")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_answers_are_those_of_the_rounded_target(bits):
    """Of the bundled pair, which is sure of what it says: in 8 bits a row's products depend on the other rows of a forward."""
    models = load_models(DEMO, DEMO, dtype="float32", device="cpu", quantization=bits)
    assert models.target.is_quantized
    file, question = bundled_picture("scene")
    inputs = encode(models.processor, question, load_image(file))
    options = {"max_new_tokens": 200, "do_sample": False}
    output = models.target.generate(**inputs, **options, assistant_model=models.drafter, return_dict_in_generate=True)
    assert torch.equal(output.sequences, models.target.generate(**inputs, **options))
    assert output.accepted_lengths.float().mean() > 1.2
