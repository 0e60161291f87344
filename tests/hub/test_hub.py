"""The life of a drafter on the Hub, driven by the real client against a server on loopback."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers.dynamic_module_utils
import transformers.generation.utils
import transformers.utils.hub
from hub_server import OWNER_TOKEN, STRANGER_TOKEN, HubServer
from processors import make_processor, train_tokenizer
from published import published_config, published_weights, write_published
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import dream_hf
from dream_hf import DreamConfig, DreamDrafter
from dream_hf.drafters import checkpoint_files
from dream_hf.drafters.checkpoint_files import DamagedFileError
from dream_hf.drafters.dream.conversion import convert_checkpoint
from dream_hf.hub import push_drafter

REPO = "org/dream-tiny"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server, and a client that knows no other and has an empty cache and the owner's token."""
    constants = huggingface_hub.constants
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's pauses between tries
        monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
        yield server


def make_drafter(seed=0, **config):
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DreamDrafter(
            DreamConfig(**shape, target={"name": "org/target", "model_type": "llava"}, **config)
        ).eval()


def assert_same_weights(one, two):
    assert one.state_dict().keys() == two.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


def test_life_cycle(hub, monkeypatch, tmp_path):
    first, second = make_drafter(seed=1), make_drafter(seed=2, tree_depth=3)

    # Publish, and load by id with an empty cache.
    first.push_to_hub(REPO, private=True)
    published = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
    assert {"config.json", "model.safetensors", "README.md", "custom_generate/generate.py"} <= published.keys()
    assert not any(name.endswith(".bin") for name in published)
    assert_same_weights(DreamDrafter.from_pretrained(REPO), first)
    assert isinstance(AutoModel.from_pretrained(REPO), DreamDrafter)
    assert AutoConfig.from_pretrained(REPO).target["name"] == "org/target"

    # Load again without a network: not one request, one way or the other.
    num_requests = hub.num_requests
    assert_same_weights(DreamDrafter.from_pretrained(REPO, local_files_only=True), first)
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert_same_weights(DreamDrafter.from_pretrained(REPO), first)
        assert_same_weights(AutoModel.from_pretrained(REPO), first)
    assert hub.num_requests == num_requests

    # Push a new version, in shards: the old single file must go, and the old revision must still load.
    old = hub.repos[REPO].branches["main"]
    second.push_to_hub(REPO, max_shard_size="20KB", commit_message="More data")
    assert "model.safetensors" not in hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
    loaded = DreamDrafter.from_pretrained(REPO)
    assert_same_weights(loaded, second)
    assert loaded.config.tree_depth == 3
    assert_same_weights(DreamDrafter.from_pretrained(REPO, revision=old), first)
    with pytest.raises(OSError, match=f"{REPO}.*no `revision` 'v9'"):
        DreamDrafter.from_pretrained(REPO, revision="v9")

    # Refused: private, gated without a token, gated for another account, missing.
    with pytest.raises(OSError, match=f"{REPO}.*private.*hf auth login"):
        DreamDrafter.from_pretrained(REPO, token=STRANGER_TOKEN, cache_dir=tmp_path / "refused")
    hub.repos[REPO].is_private, hub.repos[REPO].is_gated = False, True
    for token in (False, STRANGER_TOKEN):
        with pytest.raises(OSError, match=f"{REPO}.*gated. Ask for access at {hub.url}/{REPO}.*token") as caught:
            DreamDrafter.from_pretrained(REPO, token=token, cache_dir=tmp_path / "refused")
        assert isinstance(caught.value.__cause__, huggingface_hub.errors.GatedRepoError)
    hub.repos[REPO].is_gated = False
    with pytest.raises(OSError, match=r"'org/nothing'.*Check the spelling"):
        DreamDrafter.from_pretrained("org/nothing")
    with pytest.raises(OSError, match=r"'org/other'.*not in the cache"):
        DreamDrafter.from_pretrained("org/other", local_files_only=True)

    # Spoiled downloads, each with a clear error; the same cache works as soon as the server does.
    push_drafter(_saved(first, tmp_path), REPO, dry_run=False)
    for fault, error, message in (
        ("cut", OSError, "did not finish.*load again"),
        ("truncated", OSError, "did not finish.*load again"),
        ("tampered", DamagedFileError, "model.safetensors.*SHA-256.*removed: load again"),
    ):
        cache_dir = tmp_path / f"cache of a {fault} download"
        hub.faults[REPO, "model.safetensors"] = fault
        with pytest.raises(error, match=f"(?s){message}") as caught:
            DreamDrafter.from_pretrained(REPO, cache_dir=cache_dir)
        assert f"'{REPO}'" in str(caught.value)
        assert fault == "tampered" or caught.value.__cause__ is not None
        hub.faults.clear()
        assert_same_weights(DreamDrafter.from_pretrained(REPO, cache_dir=cache_dir), first)
        assert_same_weights(DreamDrafter.from_pretrained(REPO, cache_dir=cache_dir, local_files_only=True), first)


def test_a_file_in_the_cache_is_hashed_once_until_it_changes(hub, monkeypatch):
    make_drafter().push_to_hub(REPO)
    hashed, sha256 = [], checkpoint_files._sha256
    monkeypatch.setattr(checkpoint_files, "_sha256", lambda file: hashed.append(file) or sha256(file))
    DreamDrafter.from_pretrained(REPO)
    DreamDrafter.from_pretrained(REPO)
    (blob,) = hashed
    os.utime(blob)
    assert_same_weights(DreamDrafter.from_pretrained(REPO), make_drafter())
    assert hashed == [blob, blob]
    (note,) = blob.parents[1].glob(".dream_hf_verified/*")
    assert note.name == blob.name and huggingface_hub.scan_cache_dir(blob.parents[2]).warnings == []
    blob.write_bytes(blob.read_bytes()[:-1] + b"~")  # of the same size, later
    with pytest.raises(DamagedFileError, match=r"model.safetensors.*SHA-256.*removed: load again"):
        DreamDrafter.from_pretrained(REPO)
    assert_same_weights(DreamDrafter.from_pretrained(REPO), make_drafter())
    note.unlink()
    note.parent.rmdir()
    note.parent.write_text("")  # no folder can be made here, as in a cache that may not be written to
    DreamDrafter.from_pretrained(REPO)


def _saved(drafter, tmp_path):
    drafter.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# -- use --------------------------------------------------------------------------------------------------------------

TARGET, DRAFTER = "org/target", "org/dream-llava"

USES_CUSTOM_GENERATE = """
import sys, huggingface_hub, torch
from transformers import AutoModelForImageTextToText
prompt = torch.arange(300, 310)[None]
arguments = dict(max_new_tokens=12, do_sample=False)
for offline in (False, True):
    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    target = AutoModelForImageTextToText.from_pretrained("org/target")
    assert offline or "dream_hf" not in sys.modules
    plain = target.generate(prompt, **arguments)
    for _ in range(2):
        output = target.generate(prompt, custom_generate="org/dream-llava", trust_remote_code=True, **arguments,
                                 return_dict_in_generate=True)
        assert torch.equal(output.sequences, plain)
        assert output.accepted_lengths.sum() == 11
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny Llava and a drafter for it, saved with everything their repos need: (folder, folder)."""
    processor = make_processor("llava")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = LlavaForConditionalGeneration(
            LlavaConfig(
                text_config=LlamaConfig(
                    vocab_size=len(processor.tokenizer),
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    eos_token_id=None,
                ),
                vision_config=CLIPVisionConfig(
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    image_size=28,
                    patch_size=14,
                ),
                image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
            )
        )
        target.generation_config.eos_token_id = None
        target.config._name_or_path = TARGET
        drafter = DreamDrafter.for_target(target)
    folders = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("drafter")
    target.save_pretrained(folders[0])
    processor.save_pretrained(folders[0])
    drafter.save_pretrained(folders[1])
    return folders


@pytest.fixture
def published_pair(hub, pair):
    for repo_id in (TARGET, "llava-hf/llava-v1.6-vicuna-7b-hf"):
        hub.put(repo_id, pair[0])
    for repo_id in (DRAFTER, "org/dream-llava-v1.6-7b"):
        push_drafter(pair[1], repo_id, dry_run=False)
    return pair


def run_elsewhere(code, hub, tmp_path):
    """Run a program that has only the environment to know the server by."""
    paths = [Path(dream_hf.__file__).parents[1]]
    try:
        version("dream-hf")
    except PackageNotFoundError:  # run from the source: say that it is installed, as transformers asks
        paths.append(tmp_path / "site")
        info = tmp_path / "site" / f"dream_hf-{dream_hf.__version__}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dream-hf\nVersion: {dream_hf.__version__}\n")
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "elsewhere"),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_custom_generate_for_a_program_that_never_imports_dream_hf(hub, published_pair, tmp_path):
    """Online and offline; the weights travel once."""
    run_elsewhere(USES_CUSTOM_GENERATE, hub, tmp_path)
    assert hub.downloads[DRAFTER, "model.safetensors"] == 1


@pytest.fixture
def without_requirements(monkeypatch):
    """Let dream-hf run from its source, where it counts as not installed."""
    monkeypatch.setattr(transformers.generation.utils, "check_python_requirements", lambda *_, **__: None)


def test_custom_generate_loads_once_for_a_target_and_a_version(hub, pair, without_requirements, monkeypatch, tmp_path):
    """From a folder, too; what was saved last is used, and the drafter goes with its target."""
    target = LlavaForConditionalGeneration.from_pretrained(pair[0])
    loaded, load = [], DreamDrafter.from_pretrained

    def counted(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(DreamDrafter, "from_pretrained", counted)
    folder, prompt = shutil.copytree(pair[1], tmp_path / "drafter"), torch.arange(300, 310)[None]
    arguments = {"custom_generate": str(folder), "trust_remote_code": True, "max_new_tokens": 6, "do_sample": False}
    plain = target.generate(prompt, max_new_tokens=6, do_sample=False)
    for num_loaded, saves in ((1, False), (1, False), (2, True), (2, False)):
        if saves:
            DreamDrafter.for_target(target).save_pretrained(folder)
        assert torch.equal(target.generate(prompt, **arguments), plain)
        assert len(loaded) == num_loaded
    alive = weakref.ref(loaded.pop())
    del target
    gc.collect()
    assert alive() is None


def test_custom_generate_takes_a_drafter_but_no_second_assistant(hub, pair, without_requirements):
    target = LlavaForConditionalGeneration.from_pretrained(pair[0])
    arguments = {"custom_generate": str(pair[1]), "trust_remote_code": True, "max_new_tokens": 4, "do_sample": False}
    prompt, drafter = torch.arange(300, 310)[None], DreamDrafter.from_pretrained(pair[1])
    assert target.generate(prompt, drafter=drafter, **arguments).shape == (1, 14)
    with pytest.raises(ValueError, match="`assistant_model`"):
        target.generate(prompt, assistant_model=drafter, **arguments)


def python_blocks(markdown):
    return re.findall(r"```python\n(.*?)```", markdown, flags=re.DOTALL)


def test_snippets_of_the_card_run(hub, published_pair, without_requirements):
    blocks = python_blocks(hub.read(DRAFTER, "README.md").decode())
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
        plain = names["target"].generate(**names["inputs"], max_new_tokens=256)
        assert torch.equal(names["output"], plain)


def test_snippets_of_the_card_of_a_text_only_target_run(hub, without_requirements, tmp_path):
    tokenizer = train_tokenizer([])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    target = LlamaForCausalLM(config)
    target.config._name_or_path = "org/text"
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    hub.put("org/text", tmp_path / "target")
    DreamDrafter.for_target(target).push_to_hub("org/dream-text")
    names: dict = {}
    for block in python_blocks(hub.read("org/dream-text", "README.md").decode()):
        exec(block, names)
        assert torch.equal(names["output"], names["target"].generate(**names["inputs"], max_new_tokens=256))


def test_snippets_of_the_docs_run(hub, published_pair, without_requirements, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in python_blocks((Path(__file__).parents[2] / "docs" / "hub.md").read_text()):
        exec(block, names)
    assert names["output"].shape[1] == names["inputs"]["input_ids"].shape[1] + 20
    assert json.loads(hub.read("org/dream-llava-v1.6-7b", "config.json"))["tree_depth"] == 5


# -- push -------------------------------------------------------------------------------------------------------------


def test_dry_run_asks_nobody_and_shows_what_would_be_uploaded(hub, pair, tmp_path):
    folder = shutil.copytree(pair[1], tmp_path / "drafter")
    (folder / "optimizer.pt").write_bytes(b"not for the Hub")
    report = push_drafter(folder, REPO)
    assert hub.num_requests == 0 and report.url is None
    assert report.left_out == ("optimizer.pt",)
    pushed = push_drafter(folder, REPO, dry_run=False)
    files = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
    assert pushed.files == report.files == {name: len(files[name]) for name in report.files}
    assert files.keys() == {*report.files, ".gitattributes"}
    assert all(name in str(report) for name in (*report.files, "optimizer.pt"))


def test_push_refuses_a_folder_that_would_not_load(hub, pair, tmp_path):
    folder = shutil.copytree(pair[1], tmp_path / "drafter")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 7}))
    with pytest.raises(ValueError, match="mismatched"):
        push_drafter(folder, REPO, dry_run=False)
    with pytest.raises(ValueError, match="`folder`"):
        push_drafter(tmp_path / "nothing", REPO, dry_run=False)
    assert hub.num_requests == 0


def test_every_way_to_upload_says_why_it_failed(hub, pair, tmp_path):
    drafter, name = make_drafter(), "no id at all"
    for upload in (
        lambda: drafter.push_to_hub(name),
        lambda: drafter.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=name),
        lambda: push_drafter(pair[1], name, dry_run=False),
    ):
        with pytest.raises(OSError, match=r"Could not upload to 'no id at all': it is no Hub id.*Check the spelling"):
            upload()


def test_push_as_a_pull_request_leaves_the_branch_alone(hub, pair):
    push_drafter(pair[1], REPO, dry_run=False, private=True)
    assert hub.repos[REPO].is_private
    before = hub.repos[REPO].branches["main"]
    report = push_drafter(pair[1], REPO, dry_run=False, create_pr=True, commit_message="Try")
    assert report.url == f"{hub.url}/{REPO}/discussions/1"
    assert hub.repos[REPO].branches["main"] == before


def test_push_keeps_a_card_that_was_edited(hub, pair, tmp_path):
    """On the Hub, or in the folder: only our own card is written anew."""
    push_drafter(pair[1], REPO, dry_run=False)
    assert f'"{REPO}"' in hub.read(REPO, "README.md").decode()
    files = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
    hub.repos[REPO].commit("main", {**files, "README.md": b"---\nlicense: mit\n---\nOn the Hub"})
    push_drafter(pair[1], REPO, dry_run=False)
    assert hub.read(REPO, "README.md").endswith(b"On the Hub")
    folder = shutil.copytree(pair[1], tmp_path / "drafter")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nIn the folder")
    DreamDrafter.from_pretrained(folder).save_pretrained(folder)
    push_drafter(folder, REPO, dry_run=False)
    assert hub.read(REPO, "README.md").endswith(b"In the folder")


def test_save_pretrained_pushes_and_branches_and_subfolders_load(hub, tmp_path):
    drafter = make_drafter()
    drafter.save_pretrained(tmp_path / "dream-saved", push_to_hub=True, commit_message="First")
    assert_same_weights(DreamDrafter.from_pretrained("org/dream-saved"), drafter)
    other = make_drafter(seed=3)
    other.push_to_hub("org/dream-saved", revision="v2", tags=["test"])
    assert_same_weights(DreamDrafter.from_pretrained("org/dream-saved"), drafter)
    assert_same_weights(DreamDrafter.from_pretrained("org/dream-saved", revision="v2"), other)
    assert b"- test" in hub.read("org/dream-saved", "README.md", "v2")
    drafter.save_pretrained(tmp_path / "parts" / "drafter")
    hub.put("org/parts", tmp_path / "parts")
    loaded = DreamDrafter.from_pretrained("org/parts", subfolder="drafter", dtype="bfloat16", device_map="cpu")
    assert loaded.dtype == torch.bfloat16


def test_published_pickles_are_not_loaded_but_converted(hub, tmp_path):
    source = write_published(tmp_path / "published", published_weights(2), published_config(2))
    hub.put("org/published", source)
    (source / "config.json").write_text(json.dumps({**published_config(2), "model_type": "dream_drafter"}))
    hub.put("org/pickled", source)
    for repo_id in ("org/published", "org/pickled"):
        with pytest.raises(ValueError, match=f"dream-hf convert {repo_id}"):
            DreamDrafter.from_pretrained(repo_id)
        assert hub.downloads[repo_id, "pytorch_model.bin"] == 0
    report = convert_checkpoint("org/published", tmp_path / "converted")
    assert len(report.kept) == len(published_weights(2))
    assert DreamDrafter.from_pretrained(tmp_path / "converted").config.converted_from == "org/published"
    shutil.rmtree(tmp_path / "cache")
    hub.faults["org/published", "pytorch_model.bin"] = "tampered"
    with pytest.raises(DamagedFileError, match=r"pytorch_model.bin of 'org/published'.*SHA-256"):
        convert_checkpoint("org/published", tmp_path / "again")
