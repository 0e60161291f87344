"""DFlash drafters compute what the programs that published them compute: contexts, blocks, reading on."""

from __future__ import annotations

import copy
import functools
import json
import shutil

import pytest
import torch
from golden import MISSING, TOLERANCE, Case, cases
from test_eagle_golden import load_target
from test_probe import foretold_by
from transformers.cache_utils import DynamicCache

import dream_hf
from dream_hf.decoding.drafter import Prefill, Verified
from dream_hf.targets.target import Target

CASES = cases("dflash")
KEEPS_DOUBLE = False  # the peers' outputs are float32

if not CASES:
    pytest.skip(MISSING, allow_module_level=True)

every_case = pytest.mark.parametrize("case", CASES, ids=repr)


@functools.cache
def load(case: Case):
    target = load_target(case.target_name)
    return target, dream_hf.load_drafter(case.checkpoint, target)


def features_of(case: Case, drafter, start, stop):
    return torch.cat([case.io[f"hs.{index}"][start:stop] for index in drafter.config.feature_layers], dim=-1)[None]


def blocks(case: Case):
    """For each block that the peer ran: its name, where it starts, and how many tokens had been gained since the last one."""
    start = case.expected["prompt_length"]
    for index, gained in enumerate(case.expected["context_rows_gained_before_each_block"], start=1):
        start += gained
        yield f"block{index}", start, gained


def assert_says(case: Case, session, states, name):
    """All rows (1, B, H) that came out of a block, and the logits of them."""
    torch.testing.assert_close(states[0], case.io[f"{name}.hidden"], **TOLERANCE)
    torch.testing.assert_close(session.drafter.for_head(states)[0], case.io[f"{name}.normed"], **TOLERANCE)
    torch.testing.assert_close(session.head.logits(states)[0], case.io[f"{name}.logits"], **TOLERANCE)


def start_session(case: Case, padding=0):
    """A session that has read the case's prompt behind some padding."""
    target, drafter = load(case)
    length, pad = case.expected["prompt_length"], torch.nn.functional.pad
    ids = case.io["input_ids"][None]
    prefill = Prefill(
        target=Target(target),
        token_ids=pad(ids[:, :length], (padding, 0)),
        real=torch.arange(padding + length)[None] >= padding,
        is_visual=torch.zeros(1, padding + length).bool(),
        first_tokens=ids[:, length : length + 1],
        features=pad(features_of(case, drafter, 0, length), (0, 0, padding, 0), value=torch.nan),
    )
    return drafter.start(prefill, drafter.settings)


@every_case
def test_the_features_are_of_the_layers_that_the_peer_read(case):
    drafter = load(case)[1]
    assert drafter.config.feature_layers == case.expected["hs_indices"]
    assert drafter.config.block_size == case.expected["block_size"]
    assert drafter.config.mask_token_id == case.expected["mask_token_id"]


@every_case
def test_blocks_in_one_pass(case):
    """The whole context and a block at once, in a cache of transformers' own."""
    session = start_session(case)
    drafter = session.drafter
    context = drafter.context(features_of(case, drafter, 0, case.expected["prompt_length"]))
    torch.testing.assert_close(context[0], case.io["prompt.context"], **TOLERANCE)
    for name, start, _ in blocks(case):
        cache = DynamicCache()
        drafter.remember(drafter.context(features_of(case, drafter, 0, start)), torch.arange(start)[None], cache)
        embeds = session.head.embed(case.io[f"{name}.ids"][None])
        assert_says(case, session, drafter(embeds, cache, torch.tensor([start])), name)


@pytest.mark.parametrize("padding", [0, 3])
@every_case
def test_blocks_as_a_session_drafts_them(case, padding, monkeypatch):
    """Step after step, where a step's tokens come in two parts; trees are drafted in between, and leave nothing behind."""
    session, io = start_session(case, padding), case.io
    made, block = [], session.state.block
    monkeypatch.setattr(session.state, "block", lambda embeds: made.append(block(embeds)) or made[-1])
    ids = io["input_ids"][None]
    for name, start, gained in blocks(case):
        if gained:
            tokens, features = (
                ids[:, start - gained + 1 : start + 1],
                features_of(case, session.drafter, start - gained, start),
            )
            for first, last in ((0, 1), (1, gained)) if gained > 1 else ((0, 1),):
                session.read(Verified(tokens[:, first:last], [last - first], features[:, first:last]))
        tree = session.draft(ids[:, start : start + 1])
        assert_says(case, session, made[-1], name)
        first_row = 0 if session.drafter.config.drafts_from_anchor else 1
        log_probs = io[f"{name}.logits"][first_row:].log_softmax(-1)
        columns = {
            int(token): at for at, token in enumerate(io.get("draft_to_target", torch.arange(log_probs.shape[1])))
        }
        for node in range(1, tree.num_nodes):
            path = tree.tokens[0, tree.ancestors[0, node]].tolist()[1:]
            expected = sum(float(log_probs[depth, columns[token]]) for depth, token in enumerate(path))
            assert abs(float(tree.log_probs[0, node].detach()) - expected) < 1e-3


@every_case
def test_through_generate(case):
    """The target makes the features anew, of the layers that `needs` names."""
    target, drafter = load(case)
    length, ids = case.expected["prompt_length"], case.io["input_ids"]
    inputs = {"input_ids": ids[None, :length], "attention_mask": torch.ones(1, length, dtype=torch.long)}
    depth = drafter.config.num_drafted
    said = dream_hf.draft_log_probs(target, drafter, inputs, int(ids[length]), [5] * (depth - 1))
    logits = case.io["block1.logits"][-depth:]
    columns = case.io.get("draft_to_target", torch.arange(logits.shape[1]))
    torch.testing.assert_close(said[:, columns], logits.log_softmax(-1), rtol=0, atol=4e-4)
    assert int(said.isfinite().sum()) == logits.numel()
    behind = dream_hf.draft_log_probs(target, drafter, inputs, int(ids[length]), [5] * depth)
    assert torch.equal(behind[:-1], said) and not behind[-1].isfinite().any()


@every_case
def test_the_probe_finds_the_layers_that_a_config_does_not_name(case, tmp_path):
    target = copy.deepcopy(load_target(case.target_name)).requires_grad_(False)
    length = case.expected["prompt_length"]
    inputs = {
        "input_ids": case.io["input_ids"][None, :length],
        "attention_mask": torch.ones(1, length, dtype=torch.long),
    }
    foretold_by(load(case)[1], target, inputs, levels=1, rounds=20)
    shutil.copytree(case.checkpoint, tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields.pop("aux_hidden_state_layer_ids", None)
    fields.get("dflash_config", {}).pop("target_layer_ids", None)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    probe = dream_hf.probe_drafter(tmp_path, target, [inputs], num_tokens=20)
    assert list(probe.best.wiring["feature_layers"]) == case.expected["hs_indices"] and not probe.is_poor
