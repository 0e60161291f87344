"""`push_to_hub=True` uploads a drafter that loads, with our card."""

import torch
from test_hub import hub  # noqa: F401 - a fixture
from tiny_pair import picture_row, tiny_processor, tiny_target

from dream_hf import DreamDrafter, DreamTrainer, DreamTrainingArguments
from dream_hf.hub.model_card import MARKER


def test_pushed_drafter_has_our_card_and_loads(hub, tmp_path):  # noqa: F811
    target = tiny_target()
    rows = [picture_row(f"What is it {number}?") for number in range(4)]
    args = DreamTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        push_to_hub=True,
        hub_model_id="org/trained",
        report_to=[],
        use_cpu=True,
        per_device_train_batch_size=2,
        warmup_steps=0,
    )
    trainer = DreamTrainer(
        model=DreamDrafter.for_target(target),
        target=target,
        args=args,
        train_dataset=rows,
        processing_class=tiny_processor(),
    )
    trainer.train()
    trainer.push_to_hub()
    repo = hub.repos["org/trained"]
    files = repo.commits[repo.branches["main"]]
    assert MARKER.encode() in files["README.md"]
    loaded = DreamDrafter.from_pretrained("org/trained")
    trained = trainer.model.state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in loaded.state_dict().items())
