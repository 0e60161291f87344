"""Training on rows that come one after the other."""

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from trainable import make_rows, make_trainer, processor

from dream_hf.data import ConversationCollator, ConversationStream, is_stream, open_rows


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        yield from self.rows


def streamed(rows):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("make_stream", [Stream, streamed], ids=["torch", "datasets"])
def test_streamed_rows_train_as_the_same_rows_in_a_list(tmp_path, make_stream):
    rows = make_rows(4)  # two epochs of two batches
    options = {"train_sampling_strategy": "sequential", "max_steps": 4}
    expected = make_trainer(tmp_path, train_dataset=rows, **options)
    expected.train()
    trainer = make_trainer(tmp_path, train_dataset=make_stream(rows), eval_dataset=rows[:1], **options)
    trainer.train()
    for name, value in expected.model.named_parameters():
        assert torch.equal(trainer.model.get_parameter(name), value), name
    assert trainer.state.global_step == 4 and trainer.evaluate()["eval_tau"] >= 1


def test_unusable_rows_of_a_stream_are_skipped_up_to_a_number(tmp_path):
    rows = [{}, *make_rows(3)]
    make_trainer(tmp_path, train_dataset=Stream(rows), max_steps=3, max_bad_rows=1).train()
    with pytest.raises(ValueError, match=r"1 rows of `train_dataset` cannot be used.*row 0"):
        make_trainer(tmp_path, train_dataset=Stream(rows), max_bad_rows=0)


def test_workers_share_a_stream_out():
    stream = ConversationStream(Stream(make_rows(7)))
    assert [item.index for item in stream] == list(range(7))
    loader = DataLoader(stream, batch_size=2, num_workers=2, collate_fn=lambda items: [item.index for item in items])
    assert sorted(index for batch in loader for index in batch) == list(range(7))
    batch = ConversationCollator(processor())(list(stream))
    assert batch["input_ids"].shape[0] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1}, "max_steps"),
        ({"feature_cache_dir": "features"}, r"`feature_cache_dir` \('features'\) needs all rows"),
        ({"draft_vocab_size": 8}, r"`draft_vocab_size` \(8\) needs all rows"),
        ({"train_dataset": iter(make_rows(1))}, "cannot be read in any order"),
        ({"train_dataset": None, "eval_dataset": Stream(make_rows(1))}, r"`eval_dataset` is a Stream.*stream.take"),
    ],
)
def test_what_a_stream_cannot_serve_is_refused(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_trainer(tmp_path, **({"train_dataset": Stream(make_rows(2))} | options))


def test_what_is_a_stream():
    rows = make_rows(1)
    assert is_stream(Stream(rows)) and is_stream(streamed(rows))
    assert not any(map(is_stream, (rows, iter(rows), (row for row in rows), "rows.jsonl", {"a": rows}, None)))
    with pytest.raises(TypeError, match=r"streaming=True"):
        open_rows(Stream(rows))
