"""What `import dream_hf` does and does not do, and that the hook gets in nobody's way."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import family
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.generation.utils import GenerationMixin

import dream_hf
from dream_hf import DreamDrafter

SOURCE = Path(dream_hf.__file__).parents[1]


def run(code: str, **variables: str) -> str:
    """Run code in a fresh interpreter; its output, both streams."""
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | variables
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(autouse=True)
def _registered():
    yield
    dream_hf.register()


@pytest.fixture(scope="module")
def target():
    return family("llama").make_target()


@pytest.fixture(scope="module")
def inputs(target):
    return family("llama").make_inputs(target)


@pytest.fixture
def drafter(target):
    return DreamDrafter.for_target(target)


def generate(target, inputs, **kwargs):
    return target.generate(**inputs, **{"max_new_tokens": 12, "do_sample": False} | kwargs)


def test_import_is_silent_and_light():
    code = (
        "import json, sys; import transformers; before = set(sys.modules); import dream_hf; "
        "new = set(sys.modules) - before; print(json.dumps([sorted(n for n in new if n.startswith('dream_hf')), "
        "'torch' in sys.modules, sorted(n for n in new if n.startswith('transformers'))]))"
    )
    ours, has_torch, theirs = json.loads(run(code))
    assert ours == ["dream_hf", "dream_hf.registration", "dream_hf.version"]
    assert not has_torch and not theirs


ORDERS = [
    "import dream_hf; from transformers import LlamaForCausalLM",  # whose imports lead to the Auto classes midway
    "import dream_hf; from transformers import AutoModelForImageTextToText",
    "import dream_hf; dream_hf.DreamDrafter",
    "from transformers import LlavaForConditionalGeneration; import dream_hf",
    "import transformers.generation.utils, dream_hf",
    "import transformers.models.auto.configuration_auto, dream_hf",
    "import dream_hf, transformers.models.auto.modeling_auto; dream_hf.DreamDrafter",
    "import dream_hf.decoding.drafter",
]


@pytest.mark.parametrize("order", ORDERS)
def test_importing_twice_and_in_any_order_is_harmless(order):
    code = (
        "import importlib, sys; {order}; importlib.reload(dream_hf); import transformers.generation.utils as g; "
        "import transformers.models.auto.modeling_auto; from dream_hf.drafters.dream.configuration import DreamConfig; "
        "from transformers import AutoConfig, AutoModelForCausalLM; "
        "hook = g.GenerationMixin._assisted_decoding; assert hook._is_dream_hook; "
        "assert not getattr(hook.__wrapped__, '_is_dream_hook', False); "
        "assert type(AutoConfig.for_model('dream_drafter')) is DreamConfig; "
        "drafter = AutoModelForCausalLM.from_config(DreamConfig(hidden_size=32, num_attention_heads=2, vocab_size=9)); "
        "assert type(drafter) is dream_hf.DreamDrafter; "
        "assert AutoModelForCausalLM._model_mapping[DreamConfig] is dream_hf.DreamDrafter"
    )
    assert run(code.format(order=order)) == ""


def test_every_public_name_exists():
    for name in dream_hf.__all__:
        assert getattr(dream_hf, name) is not None, name
        assert name in dir(dream_hf)
    with pytest.raises(AttributeError, match="no attribute 'DreamDraughter'"):
        dream_hf.DreamDraughter  # noqa: B018


def test_old_places_of_public_names_stay():
    code = (
        "from dream_hf.compression import compress_text; from dream_hf.conversion import convert_checkpoint; "
        "from dream_hf.hub import PushReport, push_drafter; from dream_hf.benchmark import tune; "
        "from dream_hf.benchmark.rewrite import rewrite; from dream_hf.demo import load_pair, make_rows, score_answer; "
        "from dream_hf.demo.pair import load_pair as same; from dream_hf.load_models import load_models; "
        "from dream_hf.drafters.dream import compression, conversion, push; assert load_pair is same; "
        "assert compress_text is compression.compress_text and convert_checkpoint is conversion.convert_checkpoint; "
        "assert push_drafter is push.push_drafter and PushReport is push.PushReport"
    )
    assert run(code) == ""
    import dream_hf.hub

    with pytest.raises(AttributeError, match=r"'dream_hf.hub' has no attribute 'pull_drafter'"):
        dream_hf.hub.pull_drafter  # noqa: B018
    for name in ("compression", "conversion"):  # each from a fresh process, before anything else of the package
        assert run(f"import dream_hf.{name} as old; [getattr(old, each) for each in old.__all__]") == ""


def test_auto_classes_after_importing_the_package_alone(target, inputs, drafter, tmp_path):
    target.save_pretrained(tmp_path / "target")
    drafter.save_pretrained(tmp_path / "drafter")
    code = (
        "import os, torch, dream_hf; from transformers import AutoConfig, AutoModel, AutoModelForCausalLM; "
        "folder = os.environ['FOLDER']; config = AutoConfig.from_pretrained(folder + '/drafter'); "
        "assert type(config) is dream_hf.DreamConfig; "
        "assert type(AutoModel.from_pretrained(folder + '/drafter')) is dream_hf.DreamDrafter; "
        "drafter = AutoModelForCausalLM.from_pretrained(folder + '/drafter'); "
        "assert type(drafter) is dream_hf.DreamDrafter; "
        "target = AutoModelForCausalLM.from_pretrained(folder + '/target'); "
        "ids = torch.tensor([[1, 7, 8, 9]]); mask = torch.ones_like(ids); "
        "out = target.generate(ids, attention_mask=mask, assistant_model=drafter, max_new_tokens=8, do_sample=False, "
        "return_dict_in_generate=True); assert out.accepted_lengths.sum() == 7; "
        "plain = target.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False); "
        "assert torch.equal(out.sequences, plain)"
    )
    run(code, FOLDER=str(tmp_path))
    for auto_class in (AutoModel, AutoModelForCausalLM):
        assert type(auto_class.from_pretrained(tmp_path / "drafter")) is DreamDrafter
    assert type(AutoConfig.from_pretrained(tmp_path / "drafter")) is dream_hf.DreamConfig


def test_both_ways_to_call_agree_and_one_needs_no_hook(target, inputs, drafter):
    settings = {"return_dict_in_generate": True, "output_scores": True}
    hooked = generate(target, inputs, assistant_model=drafter, **settings)
    custom = {"custom_generate": dream_hf.dream_generate, "drafter": drafter}
    unhooked = generate(target, inputs, **custom, **settings)
    dream_hf.unregister()
    unregistered = generate(target, inputs, **custom, **settings)
    for out in (unhooked, unregistered):
        assert type(out) is dream_hf.DreamGenerateOutput
        assert torch.equal(out.sequences, hooked.sequences)
        assert torch.equal(out.accepted_lengths, hooked.accepted_lengths)
        assert torch.equal(torch.stack(out.scores), torch.stack(hooked.scores))


def test_unregister_takes_the_hook_out_and_register_puts_it_back(target, inputs, drafter):
    names = ("_assisted_decoding", "_validate_generation_mode", "generate_batch")
    hooked = [getattr(GenerationMixin, name) for name in names]
    finders = list(sys.meta_path)
    dream_hf.unregister()
    dream_hf.unregister()
    stock = [getattr(GenerationMixin, name) for name in names]
    assert [hook.__wrapped__ for hook in hooked] == stock
    assert all(function.__module__.startswith("transformers.generation.") for function in stock)
    assert len(sys.meta_path) == len(finders) - 1
    with pytest.raises((ValueError, TypeError, AttributeError)) as caught:
        generate(target, inputs, assistant_model=drafter)  # stock assisted decoding knows no drafters
    assert not any("dream_hf" in str(entry.path) and "generation" in str(entry.path) for entry in caught.traceback)
    dream_hf.register()
    dream_hf.register()
    assert [getattr(GenerationMixin, name).__wrapped__ for name in names] == stock
    assert torch.equal(generate(target, inputs, assistant_model=drafter), generate(target, inputs))


def test_hooks_keep_the_signatures_that_transformers_looks_at():
    # generate() decides by `_assisted_decoding`'s parameters what it passes.
    for name in ("_assisted_decoding", "_validate_generation_mode", "generate_batch"):
        hooked = getattr(GenerationMixin, name)
        assert inspect.signature(hooked) == inspect.signature(hooked.__wrapped__)


def test_someone_elses_hook_is_left_alone(target, inputs, drafter, monkeypatch):
    calls = []
    ours = GenerationMixin._assisted_decoding

    def theirs(self, *args, **kwargs):
        calls.append(1)
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", theirs)
    assert torch.equal(generate(target, inputs, assistant_model=drafter), generate(target, inputs))
    dream_hf.unregister()
    assert GenerationMixin._assisted_decoding is theirs and calls == [1]


@pytest.mark.parametrize("is_registered", [True, False])
def test_other_assistants_keep_working(target, inputs, is_registered):
    if not is_registered:
        dream_hf.unregister()
    expected = generate(target, inputs)
    assistant = family("llama").make_target(seed=1)
    assert torch.equal(generate(target, inputs, assistant_model=assistant), expected)
    assert torch.equal(generate(target, inputs, assistant_model=target), expected)
    assert torch.equal(generate(target, inputs, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(generate(target, inputs, assistant_early_exit=1), expected)
    assert generate(target, inputs, num_beams=2).shape[0] == 1


def test_other_assistants_get_every_argument(target, inputs, monkeypatch):
    seen = {}

    def stock(self, input_ids, **kwargs):
        seen.update(kwargs)
        return input_ids

    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", dream_hf.registration._dispatching(stock))
    assistant = family("llama").make_target(seed=1)
    generate(target, inputs, assistant_model=assistant, tokenizer="a tokenizer")
    assert seen["assistant_model"] is assistant and seen["tokenizer"] == "a tokenizer"


@pytest.mark.parametrize("name", ["some/folder", Path("some/folder")], ids=["str", "path"])
def test_the_name_of_an_assistant_is_no_assistant(target, inputs, name):
    message = r"`assistant_model` \('some/folder'\).*`DreamDrafter.from_pretrained\('some/folder'\)`"
    with pytest.raises(TypeError, match=message):
        generate(target, inputs, assistant_model=name)
    with pytest.raises(TypeError, match=r"`drafter` is a `\w+`; pass a drafter, for example `DreamDrafter"):
        generate(target, inputs, custom_generate=dream_hf.dream_generate, drafter=name)


def test_continuous_batching_refuses_a_drafter(target, inputs, drafter, monkeypatch):
    with pytest.raises(ValueError, match=r"`assistant_model` is a `DreamDrafter`, and `generate_batch`.*`generate\("):
        target.generate_batch([[5, 6, 7]], assistant_model=drafter, max_new_tokens=2)
    assert target.generate_batch([]) == {}  # nobody else notices
    assert target.generate_batch([], assistant_model=family("llama").make_target(seed=1)) == {}
