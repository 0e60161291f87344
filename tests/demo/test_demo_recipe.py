"""The demo pair's recipe: packed training sequences are what users' inputs are, and deepening changes nothing."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from double import tolerance

from dream_hf.demo import make_examples, make_rows
from dream_hf.demo.rows import TASKS, sample_truth, to_messages

RECIPE = Path(__file__).parents[2] / "examples" / "demo_pair"


@pytest.fixture(scope="module", autouse=True)
def recipe_on_path():
    sys.path.insert(0, str(RECIPE))
    yield
    sys.path.remove(str(RECIPE))


@pytest.fixture(scope="module")
def processor(recipe_on_path):
    from train_tokenizer import build_processor, train_tokenizer

    return build_processor(train_tokenizer(num_rows=300, vocab_size=1200))


@pytest.fixture(scope="module")
def target(processor):
    from model import build_target

    torch.manual_seed(0)
    return build_target(processor.tokenizer, num_text_layers=2).eval()


def test_the_processor_is_a_stock_one_and_survives_saving(processor, tmp_path):
    from transformers import AutoProcessor

    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    row = make_rows("scene", 1, seed=0)[0]
    texts = [p.apply_chat_template(row["messages"]) for p in (processor, loaded)]
    assert texts[0] == texts[1]
    inputs = loaded(text=texts[:1], images=[row["images"]], return_tensors="pt", padding=True)
    assert (inputs["input_ids"] == loaded.image_token_id).sum() == 64
    assert inputs["pixel_values"].shape == (1, 3, 128, 128)
    answer = row["messages"][1]["content"][0]["text"]
    assert loaded.tokenizer.decode(inputs["input_ids"][0]).endswith(f"<|assistant|>{answer}</s>")


def test_the_template_marks_the_answer(processor):
    row = make_rows("scene", 1, seed=2)[0]
    row["messages"][0]["content"][0]["image"] = row["images"][0]
    marked = processor.apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    is_answer = torch.as_tensor(marked["assistant_masks"])[0].bool()
    answer = row["messages"][1]["content"][0]["text"]
    assert processor.decode(marked["input_ids"][0][is_answer]) == f"{answer}</s>"


def test_numbers_are_read_digit_by_digit(processor):
    tokens = processor.tokenizer.tokenize("Total 12.45, 2019")
    assert [token for token in tokens if any(c.isdigit() for c in token)] == ["Ġ1", "2", "4", "5", "Ġ2", "0", "1", "9"]


@pytest.mark.parametrize("task", ["scene", "chart", "text"])
def test_a_packed_turn_is_the_turn_alone(processor, target, task):
    """Features of every packed turn equal those of the processor's own input, so no turn sees another."""
    from conversation import IGNORE, NUM_PREFIX, _pick_turns, make_batch
    from train_text import read_slots

    tokenizer = processor.tokenizer
    batch = make_batch(tokenizer, seed=7, num_pictures=1, task=task)
    truth, rng = sample_truth(task, 7, 0)
    image = TASKS[task].draw(truth)
    bos_and_user = torch.tensor([tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")])
    slot_ids, labels = batch.slot_ids[0].tolist(), batch.labels[0]
    num_found = 0
    with torch.no_grad():
        packed = read_slots(target, batch, bos_and_user)[0]
        for turn in _pick_turns(task, truth, rng):
            text = processor.apply_chat_template(to_messages(turn.prompt, turn.answer))
            inputs = processor(text=[text], images=[[image]], return_tensors="pt")
            ids = inputs["input_ids"][0, NUM_PREFIX:].tolist()
            starts = [k for k in range(len(slot_ids)) if slot_ids[k : k + len(ids) - 1] == ids[:-1]]
            if not starts:
                continue
            num_found += 1
            alone = target.model(**inputs).last_hidden_state[0, NUM_PREFIX:-1]
            here = slice(starts[0], starts[0] + len(ids) - 1)
            torch.testing.assert_close(packed[here], alone, **tolerance(alone, roundings=32))
            answer = [*tokenizer(turn.answer).input_ids, tokenizer.eos_token_id]
            assert labels[here][labels[here] != IGNORE].tolist() == answer
    assert num_found >= 3


def test_every_label_points_at_the_patches_its_value_is_read_from(processor):
    from conversation import encode_answer

    for example in make_examples("text", 20, seed=1):
        ids, sources = encode_answer(processor.tokenizer, example.turn)
        assert len(ids) == len(sources)
        pointed = {patch for source in sources for patch in source}
        starts = {
            example.truth.patch_of(r, w, 0) for r, line in enumerate(example.truth.lines) for w in range(len(line))
        }
        assert starts <= pointed


def test_deepening_changes_nothing_but_the_depth(processor, target):
    from model import deepen

    deep = deepen(target, 6).eval()
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        assert torch.equal(target(input_ids=ids).logits, deep(input_ids=ids).logits)
    assert deep.config.text_config.num_hidden_layers == 6 and target.config.text_config.num_hidden_layers == 2
    with pytest.raises(ValueError, match=r"`num_text_layers` \(5\)"):
        deepen(target, 5)


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    from muon import orthogonalize

    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
    assert values.min() > 0.5 and values.max() < 1.4


def test_every_trainable_parameter_gets_a_gradient_and_the_encoder_none(processor, target):
    from conversation import make_batch
    from train_text import answer_losses

    tokenizer = processor.tokenizer
    bos_and_user = torch.tensor([tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")])
    answer, pointers, is_right = answer_losses(
        target, make_batch(tokenizer, seed=3, num_pictures=2), bos_and_user, pointer_layers=(1,)
    )
    (answer + pointers).backward()
    for name, parameter in target.named_parameters():
        has_gradient = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert has_gradient == ("vision_tower" not in name), name
    assert is_right.shape[1] == 2 and is_right[:, 1].any()


def test_patch_labels_name_what_is_drawn():
    import labels

    for index in range(20):
        truth, _ = sample_truth("text", 5, index)
        table = dict(zip(labels.NUM_CLASSES, labels.patch_labels(truth), strict=True))
        for row, line in enumerate(truth.lines):
            for word, text in enumerate(line):
                patch = truth.patch_of(row, word, 0)
                assert labels.CHARACTERS[table["left"][patch]] == text[0]
                assert labels.CHARACTERS[table["right"][patch]] == text[1]


def test_a_resumed_training_goes_on_as_if_never_stopped(processor, target, tmp_path):
    from train_text import Training

    target.save_pretrained(tmp_path / "target")
    args = Namespace(output=tmp_path / "text.pt", init_from=tmp_path / "target", device="cpu", batch_size=1)
    args = Namespace(**vars(args), first_seed=0, matrix_lr=0.02, other_lr=3e-3)
    training = Training(processor.tokenizer, args)
    training.update(progress=0.1, rank=0)
    training.save(minutes=1.0)
    training.update(progress=0.2, rank=0)
    resumed = Training(processor.tokenizer, args)
    assert (resumed.step, resumed.minutes) == (1, 1.0)
    resumed.update(progress=0.2, rank=0)
    for (name, left), right in zip(training.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right), name
        is_moved = not torch.equal(left, target.get_parameter(name))
        assert is_moved == ("vision_tower" not in name), name
