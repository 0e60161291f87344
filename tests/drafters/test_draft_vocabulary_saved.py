"""A draft vocabulary travels with the weights, is chosen in training, and what cannot be is refused."""

import json

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from test_hub import hub  # noqa: F401 - a fixture
from test_trainer_distributed import FSDP, UNEVEN, run
from trainable import make_drafter, make_rows, make_target, make_trainer, processor
from transformers import AutoModel

from dream_hf import DreamConfig, DreamDrafter, choose_draft_vocabulary, count_answer_tokens
from dream_hf.data import ConversationCollator, ConversationDataset

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
IDS = [3, 5, 8, 13, 21]
REPO = "org/dream-reduced"


def reduced_drafter() -> DreamDrafter:
    torch.manual_seed(0)
    drafter = DreamDrafter(DreamConfig(**SHAPE))
    drafter.set_draft_vocabulary([21, 3, 13, 5, 8])
    return drafter


@pytest.fixture
def folder(tmp_path):
    reduced_drafter().save_pretrained(tmp_path / "drafter")
    return tmp_path / "drafter"


# --- saved and loaded ---


@pytest.mark.parametrize("auto_class", [DreamDrafter, AutoModel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_loaded_as_it_was_saved(folder, tmp_path, auto_class, dtype):
    assert "5 of the 64 tokens may be drafted" in (folder / "README.md").read_text()
    loaded = auto_class.from_pretrained(folder, dtype=dtype)
    assert loaded.draft_token_ids.tolist() == IDS and loaded.draft_token_ids.dtype == torch.int64
    assert loaded.config.draft_vocab_size == 5 and loaded.dtype == dtype
    loaded.half().save_pretrained(tmp_path / "again", max_shard_size="10KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = auto_class.from_pretrained(tmp_path / "again")
    assert again.draft_token_ids.tolist() == IDS and again.draft_token_ids.dtype == torch.int64


def test_a_drafter_of_the_whole_vocabulary_is_saved_as_ever(tmp_path):
    drafter = reduced_drafter()
    drafter.set_draft_vocabulary(None)
    drafter.save_pretrained(tmp_path)
    assert "may be drafted" not in (tmp_path / "README.md").read_text()
    assert "draft_token_ids" not in load_file(tmp_path / "model.safetensors")
    loaded = DreamDrafter.from_pretrained(tmp_path)
    assert loaded.draft_token_ids is None and loaded.config.draft_vocab_size is None


def test_it_is_published_with_the_drafter(hub: HubServer):  # noqa: F811 - the fixture
    reduced_drafter().push_to_hub(REPO)
    assert DreamDrafter.from_pretrained(REPO).draft_token_ids.tolist() == IDS


def int64(*ids: int) -> torch.Tensor:
    return torch.tensor(ids)


DAMAGES = {
    "missing": (None, "missing: draft_token_ids"),
    "too few": (int64(3, 5, 8, 13), r"draft_token_ids is \(4,\) in the file and \(5,\) by the config"),
    "int32": (int64(*IDS).int(), r"draft_token_ids .* is I32; it must be int64"),
    "float": (int64(*IDS).float(), r"draft_token_ids .* is F32; it must be int64"),
    "beyond": (int64(3, 5, 8, 13, 64), r"from 3 to 64; tokens lie in \[0, 64\)"),
    "negative": (int64(-5, 5, 8, 13, 21), r"from -5 to 21"),
    "twice": (int64(3, 5, 5, 13, 21), "must rise without repeats"),
    "unsorted": (int64(5, 3, 8, 13, 21), "must rise without repeats"),
    "never set": (torch.full((5,), -1), "was never set"),
}


@pytest.mark.parametrize(("token_ids", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_one_is_not_loaded(folder, token_ids, message):
    weights = load_file(folder / "model.safetensors")
    weights.pop("draft_token_ids")
    if token_ids is not None:
        weights["draft_token_ids"] = token_ids
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        DreamDrafter.from_pretrained(folder)


@pytest.mark.parametrize(
    ("size", "message"),
    [(None, "unexpected: draft_token_ids"), (6, "mismatched"), (0, "draft_vocab_size"), (65, "draft_vocab_size")],
)
def test_a_config_that_says_otherwise_is_refused(folder, size, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "draft_vocab_size": size}))
    with pytest.raises(ValueError, match=message):
        DreamDrafter.from_pretrained(folder)


# --- chosen in training ---


def test_counts_are_those_of_the_batches_answer_masks():
    rows = [*make_rows(5), {"messages": "broken"}]
    dataset = ConversationDataset(rows, max_bad_rows=1)
    batch = ConversationCollator(processor())([dataset[index] for index in range(5)])
    expected = torch.bincount(batch["input_ids"][batch["answer_mask"]], minlength=len(processor().tokenizer))
    counts = count_answer_tokens(rows, processor(), len(expected))
    assert torch.equal(counts, expected) and counts.sum() > 50
    parts = [count_answer_tokens(rows, processor(), len(expected), range(part, 6, 2)) for part in range(2)]
    assert torch.equal(sum(parts), expected)
    with torch.device("meta"):  # another default device, which holds nothing
        assert torch.equal(count_answer_tokens(rows, processor(), len(expected)), expected)
    with pytest.raises(ValueError, match="`vocab_size` is 10"):
        count_answer_tokens(rows, processor(), 10)


def test_training_chooses_it_and_the_checkpoint_has_it(tmp_path):
    target = make_target()
    target.generation_config.eos_token_id = [7, 11]
    rows = make_rows()
    trainer = make_trainer(
        tmp_path, target, eval_dataset=rows, draft_vocab_size=24, max_steps=1, save_strategy="steps", save_steps=1
    )
    counts = count_answer_tokens(rows, processor(), trainer.model.config.vocab_size)
    required = {7, 11, processor().tokenizer.eos_token_id} | {trainer.model.config.eos_token_id} - {None}
    expected = choose_draft_vocabulary(counts, 24, required)
    assert torch.equal(trainer.model.draft_token_ids, expected) and required <= set(expected.tolist())
    trainer.train()
    trainer.save_model(tmp_path / "final")
    for saved in (tmp_path / "final", tmp_path / "checkpoint-1"):
        assert torch.equal(DreamDrafter.from_pretrained(saved).draft_token_ids, expected)
    assert trainer.evaluate()["eval_tau"] >= 1.0
    resumed = make_trainer(tmp_path, target, draft_vocab_size=24, max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(resumed.model.draft_token_ids, expected)


def test_evaluation_drafts_from_it(tmp_path):
    """A drafter that may draft nothing of the answers has none of its drafts accepted."""
    target = make_target()
    rows = make_rows(3)
    drafter = make_drafter(target, tree_top_k=8, tree_size=64)
    counts = count_answer_tokens(rows, processor(), drafter.config.vocab_size)
    trainer = make_trainer(tmp_path, target, drafter, eval_dataset=rows)
    drafter.set_draft_vocabulary((counts == 0).nonzero().flatten())
    metrics = trainer.evaluate()
    assert metrics["eval_tau"] == 1.0 and metrics["eval_top_k_depth_1"] == 0.0
    drafter.set_draft_vocabulary((counts > 0).nonzero().flatten())
    metrics = trainer.evaluate()
    assert metrics["eval_tau"] > 1.0 and metrics["eval_top_k_depth_1"] > 0.0


def test_losses_are_those_of_the_whole_vocabulary(tmp_path):
    target = make_target()
    losses = []
    for size in (None, 20):
        trainer = make_trainer(tmp_path, target, make_drafter(target), draft_vocab_size=size, max_steps=2)
        trainer.train()
        losses.append([entry["loss_kl"] for entry in trainer.state.log_history if "loss_kl" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_requests_that_cannot_be_served_are_refused(tmp_path):
    from peft import LoraConfig

    target = make_target()
    lora = LoraConfig(r=2, target_modules="all-linear")
    with pytest.raises(ValueError, match="adapters"):
        make_trainer(tmp_path, target, draft_vocab_size=20, peft_config=lora)
    with pytest.raises(ValueError, match="pass `train_dataset`"):
        make_trainer(tmp_path, target, draft_vocab_size=20, train_dataset=None, eval_dataset=make_rows(2))
    with pytest.raises(ValueError, match=r"`draft_vocab_size` \(999999\) exceeds"):
        make_trainer(tmp_path, target, draft_vocab_size=999_999)
    with pytest.raises(ValueError, match=r"`draft_vocab_size` \(0\)"):
        make_trainer(tmp_path, target, draft_vocab_size=0)
    with pytest.raises(ValueError, match="never set"):
        make_trainer(tmp_path, target, make_drafter(target, draft_vocab_size=20))


def test_two_processes_choose_what_one_does(tmp_path):
    """Under FSDP2, whose evaluation puts a whole drafter together."""
    options = {"draft_vocab_size": 24, "max_steps": 1, "per_device_train_batch_size": 2}
    weights, metrics, _ = run(tmp_path / "two", 2, FSDP, **options)
    one = make_trainer(tmp_path, make_target(), train_dataset=UNEVEN[:4], eval_dataset=UNEVEN, draft_vocab_size=24)
    assert torch.equal(weights["draft_token_ids"], one.model.draft_token_ids)
    one.model.load_state_dict(weights)
    found = one.evaluate()
    assert metrics["eval_tau"] == pytest.approx(found["eval_tau"]) and "eval_top_k_depth_1" in found
