"""Features on disk: the same training, nothing reused that was made from something else, a limit that holds."""

import errno
import json
import logging
import multiprocessing

import pytest
import torch
from double import tolerance
from trainable import make_drafter, make_rows, make_target, make_trainer

from dream_hf.training import feature_cache
from dream_hf.training.feature_cache import FeatureCache, collate_rows, fingerprint_rows


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_cache, "ROWS_PER_SHARD", 3)


def train(folder, target=None, **options):
    target = make_target() if target is None else target
    drafter = make_drafter(target)
    options = {"visual_keep_ratio": 0.5, "rollout_steps": 2, "feature_noise": 0.1} | options
    trainer = make_trainer(folder, target, drafter, **options)
    trainer.train()
    return trainer


def test_training_from_disk_is_training_online(tmp_path):
    descent = {"optim": "sgd", "learning_rate": 0.1}  # Adam makes as large a step of a gradient that is mere rounding
    online = train(tmp_path / "online", **descent)
    cached = train(tmp_path / "cached", **descent, feature_cache_dir=str(tmp_path / "features"))
    for name, value in online.model.named_parameters():
        torch.testing.assert_close(
            cached.model.get_parameter(name).detach(),
            value.detach(),
            **tolerance(value.detach(), roundings=16),
            msg=name,
        )
    for one, other in zip(online.state.log_history[:-1], cached.state.log_history[:-1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    shards = sorted(path.name for path in (tmp_path / "features").iterdir())
    assert shards == ["build.lock", "cache.json", *(f"shard-0000{index}.safetensors" for index in range(3))]


def test_features_are_not_made_twice(tmp_path):
    options = {"feature_cache_dir": str(tmp_path / "features")}
    first = train(tmp_path / "first", **options)
    target, calls = make_target(), []
    target.register_forward_hook(lambda *_: calls.append(1))
    second = train(tmp_path / "second", target, **options)
    assert len(calls) == 1  # to learn what the target does to its head's output
    for name, value in first.model.named_parameters():
        assert torch.equal(value, second.model.get_parameter(name)), name


def test_interrupted_build_goes_on(tmp_path):
    made = []

    def make_row(index):
        made.append(index)
        if len(made) == 8 + 5:  # eight rows are measured before
            raise KeyboardInterrupt
        return {"token_ids": torch.full((index + 1,), index), "predicts": torch.ones(index + 1, dtype=torch.bool)}

    def build():
        cache = FeatureCache(tmp_path / "features", {"data": "x"}, 8, 1.0)
        cache.build(make_row, 0, 1, lambda: None)
        return cache

    with pytest.raises(KeyboardInterrupt):
        build()
    assert [path.name for path in (tmp_path / "features").glob("shard*")] == ["shard-00000.safetensors"]
    made.extend(range(100))
    del made[100:]
    cache = build()
    assert set(made[100 - 13 :]) >= {3, 4, 5, 6, 7} and len(cache) == 8
    assert [row["token_ids"].tolist() for row in cache] == [[index] * (index + 1) for index in range(8)]


def build_in_a_process(folder, rank, world_size, barrier, made, fingerprint):
    torch.set_num_threads(1)

    def make_row(index):
        with made.get_lock():
            made.value += 1
        return {"token_ids": torch.full((3,), index), "predicts": torch.ones(3, dtype=torch.bool)}

    cache = FeatureCache(folder, fingerprint, 300, 1.0)
    cache.build(make_row, rank, world_size, barrier)
    assert [int(row["token_ids"][0]) for row in cache] == list(range(300))


@pytest.mark.parametrize("is_one_run", [True, False], ids=["four_processes_of_a_run", "four_runs"])
def test_four_processes_build_at_once(tmp_path, monkeypatch, is_one_run):
    monkeypatch.setattr(feature_cache, "ROWS_PER_SHARD", 1)
    fork = multiprocessing.get_context("fork")
    barrier, made = fork.Barrier(4), fork.Value("i", 0)
    if is_one_run:
        places = [(rank, 4, barrier.wait, made, {"data": "x"}) for rank in range(4)]
    else:
        places = [(0, 1, lambda: None, made, {"data": "x"}) for _ in range(4)]
    processes = [fork.Process(target=build_in_a_process, args=(tmp_path / "features", *place)) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert made.value <= 300 + 4 * 8  # every row once, and those that are measured
    assert not list((tmp_path / "features").glob("incomplete-*"))


def test_folder_that_another_run_began_meanwhile_is_refused(tmp_path):
    caches = [FeatureCache(tmp_path / "features", {"data": name}, 1, 1.0) for name in "xy"]
    row = {"token_ids": torch.arange(3), "predicts": torch.ones(3, dtype=torch.bool)}
    caches[0].build(lambda index: row, 0, 1, lambda: None)
    with pytest.raises(ValueError, match="another data"):
        caches[1].build(lambda index: row, 0, 1, lambda: None)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"train_dataset": make_rows(8, answer="Another {color} answer {index}.")}, "data"),
        ({"visual_keep_ratio": 0.25}, "visual_keep_ratio"),
        ({"feature_selection": "static", "static_layer_index": 3}, "feature_selection"),
        ({"max_length": 4000}, "max_length"),
    ],
    ids=["data", "ratio", "selection", "length"],
)
def test_mismatch_is_refused(tmp_path, changed, named):
    options = {"feature_cache_dir": str(tmp_path / "features"), "max_steps": 1}
    train(tmp_path, **options)
    with pytest.raises(ValueError, match=f"feature_cache_dir.*another {named}"):
        train(tmp_path, **options | changed)


def test_other_weights_are_refused(tmp_path):
    options = {"feature_cache_dir": str(tmp_path / "features"), "max_steps": 1}
    train(tmp_path, **options)
    target = make_target()
    target.get_decoder().layers[0].mlp.up_proj.weight.data += 0.01
    with pytest.raises(ValueError, match="another target"):
        train(tmp_path, target, **options)


def test_limit_is_kept_before_and_while_writing(tmp_path, caplog, monkeypatch):
    logging.getLogger("dream_hf").propagate = True
    options = {"feature_cache_dir": str(tmp_path / "features"), "max_steps": 1}
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="feature_cache_max_gb"):
        train(tmp_path, feature_cache_max_gb=1e-5, **options)
    assert "will take about" in caplog.text and not (tmp_path / "features").exists()
    monkeypatch.setattr(FeatureCache, "_check_size", lambda self, make_row: None)
    with pytest.raises(ValueError, match="used up at shard 0"):
        train(tmp_path, feature_cache_max_gb=1e-5, **options)
    assert not list((tmp_path / "features").glob("*.safetensors"))


def test_full_disk_is_said(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_cache, "save_file", full)
    with pytest.raises(OSError, match="no space left for features"):
        train(tmp_path, feature_cache_dir=str(tmp_path / "features"))
    assert sorted(path.name for path in (tmp_path / "features").iterdir()) == ["build.lock", "cache.json"]
    assert json.loads((tmp_path / "features" / "cache.json").read_text())["target"]["model_type"] == "llava"


def test_unusable_rows_are_left_out(tmp_path):
    rows = make_rows(5)
    rows[1] = {"messages": [{"role": "user", "content": "no answer"}]}
    trainer = make_trainer(tmp_path, train_dataset=rows, feature_cache_dir=str(tmp_path / "features"))
    assert len(trainer._cached_features()) == 4


def test_rows_of_different_lengths_are_padded(tmp_path):
    rows = [
        {
            "token_ids": torch.arange(length),
            "predicts": torch.arange(length) > 1,
            "positions": torch.arange(length),
            "embeds": torch.ones(length, 2),
            "features": torch.ones(length, 2),
            "mid": torch.full((length - 2, 2), float(length)),
        }
        for length in (5, 3)
    ]
    with torch.device("meta"):  # another default device, which holds nothing
        batch = collate_rows(rows)
    assert batch["counts"].tolist() == [5, 3] and batch["predicts"].sum() == len(batch["mid"]) == 4
    assert batch["token_ids"][1].tolist() == [0, 1, 2, 0, 0]


def test_fingerprint_sees_pictures_and_files(tmp_path):
    (tmp_path / "a.png").write_bytes(b"one")
    rows = [{"messages": ["x"], "images": [str(tmp_path / "a.png")]}]
    first = fingerprint_rows(rows, 1)
    (tmp_path / "a.png").write_bytes(b"other")
    assert fingerprint_rows(rows, 1) != first
    assert fingerprint_rows(make_rows(2), 2) == fingerprint_rows(make_rows(2), 2)
    recolored = make_rows(2)
    recolored[1]["images"][0].putpixel((3, 3), (1, 2, 3))
    assert fingerprint_rows(recolored, 2) != fingerprint_rows(make_rows(2), 2)
    palettes = [{"images": [make_rows(1)[0]["images"][0].convert("P")]} for _ in range(2)]
    palettes[1]["images"][0].putpalette([0, 0, 255] * 256)
    assert fingerprint_rows(palettes[:1], 1) != fingerprint_rows(palettes[1:], 1)
