"""EAGLE drafters compute what the programs that published them compute: prompts, chains, trees, and reading on."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from golden import MISSING, ROOT, TOLERANCE, Case, cases
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import dream_hf
from dream_hf.decoding.drafter import Prefill, Verified
from dream_hf.decoding.settings import DraftSettings
from dream_hf.drafters.paired_state import PairedState
from dream_hf.drafters.visibility import bias_of
from dream_hf.targets.target import Target

CASES = cases("eagle") + cases("vispec") + cases("msd")
KEEPS_DOUBLE = False  # the peers' outputs are float32

if not CASES:
    pytest.skip(MISSING, allow_module_level=True)

every_case = pytest.mark.parametrize("case", CASES, ids=repr)
# Prompts with a picture, and those of text alone where the peer has read one.
PROMPTS = [(case, kind) for case in CASES for kind in ("", "text.") if f"{kind}chain.tokens" in case.io]
every_prompt = pytest.mark.parametrize(("case", "kind"), PROMPTS, ids=lambda value: repr(value).strip("'."))


@functools.cache
def load_target(name):
    config = transformers.AutoConfig.from_pretrained(ROOT / "targets" / name)
    takes_images = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto = transformers.AutoModelForImageTextToText if takes_images else transformers.AutoModelForCausalLM
    return auto.from_pretrained(ROOT / "targets" / name, dtype=torch.float32).eval()


@functools.cache
def load(case: Case):
    target = load_target(case.target_name)
    return target, dream_hf.load_drafter(case.checkpoint, target)


def features_of(case: Case, drafter, start, stop, kind=""):
    io = case.io
    layers = [io.get(f"{kind}hs.{index}", io.get(f"{kind}features")) for index in drafter.config.feature_layers]
    layers = [layer[start:stop] for layer in layers]
    return torch.cat(layers, dim=-1)[None]


def prompt_length(case: Case, kind=""):
    return case.expected[f"{kind.replace('.', '_')}prompt_length"]


def start_session(case: Case, settings=None, padding=0, length=None, kind=""):
    """A session that has read the case's prompt, or `length` tokens of it, behind some padding."""
    target, drafter = load(case)
    io, length = case.io, length or prompt_length(case, kind)
    ids, pad = io[f"{kind}input_ids"], torch.nn.functional.pad
    positions = io["position_ids_3d"][:, None, :length] if "position_ids_3d" in io and not kind else None
    is_visual = io["image_mask"][None, :length] if "image_mask" in io and not kind else torch.zeros(1, length).bool()
    features = features_of(case, drafter, 0, length, kind)
    embeds = io["inputs_embeds"][None, :length] if "inputs_embeds" in io and not kind else features
    prefill = Prefill(
        target=Target(target),
        token_ids=pad(ids[None, :length], (padding, 0)),
        real=torch.arange(padding + length)[None] >= padding,
        is_visual=pad(is_visual, (padding, 0), value=True),
        embeds=pad(embeds, (0, 0, padding, 0), value=7.0),
        first_tokens=ids[None, length : length + 1],
        features=pad(features, (0, 0, padding, 0), value=7.0),
        positions=None if positions is None else pad(positions, (padding, 0)),
    )
    return drafter.start(prefill, settings or drafter.settings)


def assert_says(case: Case, session, states, name):
    """States (1, T, H) and the logits of them are what the peer has under this name."""
    drafter, io = session.drafter, case.io
    read = drafter.for_head(states)
    torch.testing.assert_close(read[0], io.get(f"{name}.normed", io[f"{name}.hidden"]), **TOLERANCE)
    torch.testing.assert_close(session.head.logits(states)[0], io[f"{name}.logits"], **TOLERANCE)


@every_case
def test_the_features_are_of_the_layers_that_the_peer_read(case):
    assert load(case)[1].config.feature_layers == case.expected["hs_indices"]


@every_prompt
def test_a_prompt_as_a_session_reads_it(case, kind, monkeypatch):
    """Rows, positions, pictures: all that came out of the prompt, as compressed as the drafter reads it."""
    made, read = [], PairedState.read
    monkeypatch.setattr(PairedState, "read", lambda *args: made.append(read(*args)) or made[-1])
    session = start_session(case, kind=kind, padding=2)
    assert_says(case, session, made[0][:, : session.state.slots.longest], f"{kind}prompt")


@every_case
def test_a_prompt_in_one_pass(case):
    if case in cases("vispec") + cases("msd"):
        pytest.skip("the session knows which rows are of pictures")
    session, io, length = start_session(case), case.io, case.expected["prompt_length"]
    drafter = session.drafter
    positions = io["prompt.position_ids"]
    embeds = session.head.embed(io["input_ids"][None, 1 : length + 1])
    fused = drafter.fuse(features_of(case, drafter, 0, length))
    if "prompt.fused" in io:
        torch.testing.assert_close(fused[0], io["prompt.fused"], **TOLERANCE)
    planes = positions[:, None] if positions.ndim == 2 else positions[None]
    assert_says(case, session, drafter(embeds, fused, position_ids=planes).last_hidden_state, "prompt")


@pytest.mark.parametrize("padding", [0, 3])
@every_prompt
def test_a_chain_with_a_cache(case, kind, padding):
    session, io = start_session(case, padding=padding, kind=kind), case.io
    levels = session.levels()
    root = session.head.logits(levels.state.root_states)
    torch.testing.assert_close(root[0, 0], io[f"{kind}prompt.logits"][-1], **TOLERANCE)
    states, chain = levels.state.root_states, []
    length = levels.state.slots.longest
    for depth, token in enumerate(io[f"{kind}chain.tokens"], start=1):
        sees = (torch.arange(length + depth) < length + depth)[None, None]
        states = levels.state.beams(
            session.head.embed(token.reshape(1, 1)), states, bias_of(sees, states.dtype), depth
        )
        chain.append(states)
    assert_says(case, session, torch.cat(chain, dim=1), f"{kind}chain")


@every_prompt
def test_a_tree(case, kind):
    session = start_session(case, kind=kind)
    io = {name.removeprefix(kind): value for name, value in case.io.items() if name.startswith(kind)}
    state = session.levels().state
    parents, depths, num_read = io["tree.parents"].tolist(), io["tree.depth"].tolist(), state.slots.longest
    first = min(depths)
    made = {-1: state.root_states}
    for depth in sorted(set(depths)):
        nodes = [node for node, at in enumerate(depths) if at == depth]
        sees = torch.zeros(1, len(nodes), num_read + len(parents), dtype=torch.bool)
        sees[..., :num_read] = True
        sees[0, :, num_read:] = io["tree.mask"][nodes].bool()
        states = torch.cat([made[parents[node]] for node in nodes], dim=1)
        sees = bias_of(sees[..., : num_read + nodes[-1] + 1], states.dtype)
        out = state.beams(session.head.embed(io["tree.tokens"][nodes][None]), states, sees, depth - first + 1)
        made |= {node: out[:, [place]] for place, node in enumerate(nodes)}
    assert_says(case, session, torch.cat([made[node] for node in range(len(parents))], dim=1), f"{kind}tree")


@every_prompt
def test_reading_on_after_a_tree(case, kind):
    if f"{kind}resume.hidden" not in case.io:
        pytest.skip("the peer did not read on")
    session, length = start_session(case, kind=kind), prompt_length(case, kind)
    ids = case.io[f"{kind}input_ids"][None]
    session.draft(ids[:, length : length + 1])
    tokens = ids[:, length + 1 : length + 4]
    features = features_of(case, session.drafter, length, length + 3, kind)
    states = session.state.read_on(session.head.embed(tokens), features, [3])
    assert_says(case, session, states, f"{kind}resume")
    other = start_session(case, kind=kind)  # step by step, and lazily
    other.draft(ids[:, length : length + 1])
    for first, last in ((0, 1), (1, 3)):
        other.read(Verified(tokens[:, first:last], [last - first], features[:, first:last]))
    torch.testing.assert_close(other.levels().state.root_states, states[:, -1:], **TOLERANCE)


@every_prompt
def test_the_tree_that_the_peer_builds(case, kind):
    if f"{kind}builder.draft_tokens" not in case.io:
        pytest.skip("the peer builds no tree")
    io, sizes, length = case.io, case.expected["builder"], prompt_length(case, kind)
    settings = DraftSettings(
        tree_depth=sizes["depth"] + 1, tree_top_k=sizes["top_k"], tree_size=sizes["total_token"] - 1
    )
    tree = start_session(case, settings, kind=kind).draft(io[f"{kind}input_ids"][None, length : length + 1])
    tokens, mask = io[f"{kind}builder.draft_tokens"], io[f"{kind}builder.tree_mask"].bool()
    theirs = sorted(tokens[row].tolist() for row in mask)
    assert sorted(tree.tokens[0, row].tolist() for row in tree.ancestors[0]) == theirs


@every_prompt
def test_through_generate(case, kind):
    target, drafter = load(case)
    io, length, ids = case.io, prompt_length(case, kind), case.io[f"{kind}input_ids"]
    inputs = {"input_ids": ids[None, :length], "attention_mask": torch.ones(1, length, dtype=torch.long)}
    for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids"):
        if f"extra.{name}" in io and not kind:
            value = io[f"extra.{name}"]
            inputs[name] = value[:, :length] if name == "mm_token_type_ids" else value
    path = io[f"{kind}chain.tokens"].tolist()
    said = dream_hf.draft_log_probs(target, drafter, inputs, int(ids[length]), path)
    logits = torch.cat([io[f"{kind}prompt.logits"][-1:], io[f"{kind}chain.logits"]])
    ids = io.get("draft_to_target", torch.arange(logits.shape[1]))
    torch.testing.assert_close(said[:, ids], logits.log_softmax(-1)[: len(said)], rtol=0, atol=4e-4)
    assert int(said.isfinite().sum()) == logits.numel()


@pytest.mark.parametrize("kind", ["", "text."])
@every_case
def test_every_row_as_a_root(case, kind):
    """The peer's training loop: step s below row p reads token p + 1 + s, on its own features from step 1 on."""
    if f"{kind}ttt.logits" not in case.io:
        pytest.skip("the peer has none of it")
    ids, logits = case.io[f"{kind}input_ids"], case.io[f"{kind}ttt.logits"]
    for row in (0, 3, logits.shape[1] - 1):
        session = start_session(case, length=row + 1, kind=kind)
        levels = session.levels()
        states, said = levels.state.root_states, []
        for step in range(logits.shape[0]):
            if step:
                sees = states.new_zeros(1, 1, row + 1 + step)  # all
                states = levels.state.beams(session.head.embed(ids[None, [row + 1 + step]]), states, sees, step)
            said.append(session.head.logits(states)[0, 0])
        torch.testing.assert_close(torch.stack(said), logits[:, row], **TOLERANCE)
