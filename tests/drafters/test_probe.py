"""How a published drafter is wired is found out by asking the target, where its config says nothing or something wrong."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from eagle_reference import ANGELSLIM, LAYOUTS, SPECFORGE, Layout
from families import family
from lossless import assert_same_tokens, generate, untrained
from torch import nn

import dream_hf
from dream_hf.drafters.agreement import Text, agreements, write_texts
from dream_hf.targets.target import Target

NAMED = {layout.name: layout for layout in LAYOUTS}
LEVELS, ROUNDS = 3, 7


class Recall(nn.Linear):
    """A head that knows what follows after texts whose last features it has seen, and is itself for all other states."""

    def learn(self, features: torch.Tensor, token: int) -> None:
        """After `features` (H,) comes `token`."""
        seen, tokens = getattr(self, "seen", None), getattr(self, "tokens", [])
        self.seen = features[None] if seen is None else torch.cat([seen, features[None]])
        self.tokens = [*tokens, token]

    def forward(self, hidden):
        logits = torch.zeros(*hidden.shape[:-1], self.out_features, dtype=hidden.dtype)
        distances = (hidden[..., None, :] - self.seen).square().sum(-1)
        says = torch.tensor(self.tokens)[distances.argmin(-1)]
        is_known = distances.amin(-1, keepdim=True) < 1e-4
        return torch.where(is_known, logits.scatter(-1, says[..., None], 20.0), super().forward(hidden))


def foretold_by(drafter, target, inputs, levels=LEVELS, rounds=ROUNDS) -> None:
    """Let the target write what the drafter says, some levels ahead each time: on the target's features, then on its own."""
    head = Recall(target.lm_head.in_features, target.lm_head.out_features, bias=False, dtype=target.dtype)
    head.weight = target.lm_head.weight
    text, tokens = dict(inputs), [5]
    for _ in range(rounds):
        path: list[int] = []
        for _ in range(levels):
            said = dream_hf.draft_log_probs(target, drafter, text, tokens[-1], path)
            path.append(int(said[-1].argmax()))
        tokens += path
        text = longer(inputs, tokens[:-1])
    with Target(target).recording() as record, torch.no_grad():
        target(**longer(inputs, tokens))
    features = record.take()[1][0]
    for place, token in enumerate(tokens, start=inputs["input_ids"].shape[1] - 1):
        head.learn(features[place], token)
    target.set_output_embeddings(head)


def longer(inputs, tokens):
    """The same prompt with tokens behind it."""
    new = torch.tensor([tokens], dtype=torch.long)
    ids = torch.cat([inputs["input_ids"], new], dim=1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kinds = {name: nn.functional.pad(inputs[name], (0, len(tokens))) for name in inputs if name.endswith("type_ids")}
    return {**inputs, **more, **kinds}


SHIFTED = {**SPECFORGE, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]}}
IN_BLOCKS = {"rope_theta": 400.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
CASES = {
    # name: the drafter as it is, what its config says instead, what is to be found
    "layers": (
        Layout("layers", SHIFTED, (1, 2)),
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]}},
        {"feature_layers": (1, 2)},
    ),
    "layers the target does not have": (
        Layout("beyond", SPECFORGE),
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}},
        {"feature_layers": (1, 2, 3)},
    ),
    "norm before residual": (NAMED["speculators-residual"], {"norm_before_residual": None}, {"norm_before_residual": True}),
    "normed feedback": (NAMED["speculators-3.1"], {"norm_output": None}, {"is_feedback_normed": True}),
    "head without norm": (NAMED["eagle3-head-without-norm"], {"norm_output": None}, {"has_final_norm": False}),
    "base": (Layout("base", {**ANGELSLIM, "rope_theta": 20.0}, theta=20.0), {}, {"rope_theta": 20.0}),
    "two things": (
        replace(NAMED["speculators-residual"], name="two", theta=10000.0),
        {"norm_before_residual": None},
        {"norm_before_residual": True, "rope_theta": 10000.0},
    ),
    "planes": (
        NAMED["specforge-chunked"],
        {**ANGELSLIM, **IN_BLOCKS, "eagle_config": None},
        {"is_mrope_interleaved": False, "mrope_section": (2, 1, 1)},
    ),
    "pictures": (
        Layout("merged", SPECFORGE, image_rows="merged", family="llava_clip_llama"),
        {},
        {"image_rows": "merged"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_right_wiring_is_found(case, tmp_path):
    layout, instead, found = CASES[case]
    target = family(layout.family).make_target()
    folder = layout.publish(tmp_path / "drafter")
    inputs = family(layout.family).make_inputs(target)
    right = dream_hf.load_drafter(folder, target, wiring=found)
    foretold_by(right, target, inputs)
    fields = {**layout.fields(), **instead}
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in fields.items() if value is not None})
    )

    probe = dream_hf.probe_drafter(folder, target, [inputs], num_tokens=LEVELS * ROUNDS)
    assert found.items() <= probe.best.wiring.items()
    assert probe.best.agreement.gain > max(1.3, probe.trials[-1].agreement.gain)
    assert len({repr(trial.wiring) for trial in probe.trials}) == len(probe.trials) >= 4
    lines = probe.table().splitlines()
    assert len(lines) == 1 + len(probe.trials) and all(name in lines[1] for name in probe.best.changes)
    out = generate(target, inputs, assistant_model=probe.drafter, max_new_tokens=40)
    assert_same_tokens(generate(target, inputs, max_new_tokens=40), out)


def test_load_drafter_asks_the_target(tmp_path, monkeypatch):
    layout = NAMED["speculators-residual"]
    target, folder = family("llama").make_target(), layout.publish(tmp_path)
    inputs = family("llama").make_inputs(target)
    foretold_by(dream_hf.load_drafter(folder, target), target, inputs)
    (folder / "config.json").write_text(json.dumps({**layout.fields(), "norm_before_residual": False}))
    monkeypatch.setattr("dream_hf.drafters.agreement._beginning", lambda target, seed: inputs)
    assert dream_hf.load_drafter(folder, target, wiring="probe").config.norm_before_residual
    assert not dream_hf.load_drafter(folder, target).config.norm_before_residual


def test_a_drafter_that_foretells_nothing_is_told(tmp_path, caplog):
    target, folder = family("llama").make_target(), NAMED["eagle3"].publish(tmp_path)
    with caplog.at_level(logging.WARNING, logger="dream_hf"):
        logging.getLogger("dream_hf").propagate = True
        probe = dream_hf.probe_drafter(folder, target, num_tokens=30)
    assert probe.is_poor and "foretells" in caplog.text


@pytest.mark.parametrize(
    ("layout", "fields", "doubt"),
    [
        ("eagle3", {}, "layers"),
        ("speculators-qwen", {"norm_before_residual": None}, "norm_before_residual"),
        ("angelslim-plain", {}, "rope_theta"),
        ("speculators-qwen", {}, None),
        ("eagle1", {}, None),
    ],
)
def test_what_a_config_leaves_open_is_said(layout, fields, doubt, tmp_path, caplog):
    layout = NAMED[layout]
    target, folder = family(layout.family).make_target(), layout.publish(tmp_path)
    given = {name: value for name, value in {**layout.fields(), **fields}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(given))
    with caplog.at_level(logging.WARNING, logger="dream_hf"):
        dream_hf.load_drafter(folder, target)
        assert (doubt in caplog.text) if doubt else not caplog.text
        caplog.clear()
        dream_hf.load_drafter(folder, target, wiring={"norm_before_residual": False})
    assert not caplog.text


def test_agreement_of_any_drafter_with_log_probabilities():
    """DREAM's own count, too; a text that ends, and levels behind its end."""
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    tokens = tuple(generate(target, inputs, max_new_tokens=12).sequences[0, -12:].tolist())
    drafter = untrained(target)
    [first, again] = agreements(target, [drafter, drafter], [Text(inputs, tokens)])
    assert first == again and first.num_tokens == (11, 10, 9)
    right = [0, 0, 0]
    for place in range(11):
        coming = tokens[place + 1 : place + 4]
        rows = dream_hf.draft_log_probs(target, drafter, longer(inputs, tokens[:place]), tokens[place], coming[:-1])
        for level, token in enumerate(coming):
            right[level] += int(rows[level].argmax()) == token
    assert right == [round(share * count) for share, count in zip(first.shares, first.num_tokens, strict=True)]
    with pytest.raises(TypeError, match="log-probabilities"):
        agreements(target, [dream_hf.RetrievalDrafter()], [Text(inputs, tokens)])


def test_texts_of_the_target_s_own_repeat_and_prompts_of_several_rows_are_refused():
    target = family("llama").make_target()
    first, again = (write_texts(target, None, 40, length=16) for _ in range(2))
    assert [text.tokens for text in first] == [text.tokens for text in again]
    assert len({text.tokens for text in first}) > 1 and sum(len(text.tokens) for text in first) >= 40
    with pytest.raises(ValueError, match="3 rows"):
        write_texts(target, [family("llama").make_inputs(target, 3)], 20)
