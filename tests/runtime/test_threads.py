"""Drafting on few CPU threads leaves the number of threads as it was, in every thread."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import family
from lossless import generate

from dream_hf import DreamConfig, DreamDrafter
from dream_hf.drafters.dream.state import DrafterState
from dream_hf.runtime.threads import cpu_threads


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_the_number_holds_in_the_block_only(three_threads):
    with pytest.raises(KeyError), cpu_threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 3
    with cpu_threads(None):
        assert torch.get_num_threads() == 3


def test_a_thread_born_in_the_block_gets_the_number_of_the_process(three_threads):
    def born() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: (torch.ones(9).sum(), torch.get_num_threads())[1]).result()

    with cpu_threads(1):
        assert born() == 3
        with cpu_threads(2):
            assert born() == 3 and torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    assert born() == 3


def test_blocks_that_overlap_in_several_threads(three_threads):
    barrier = threading.Barrier(3, timeout=60)

    def work(count: int) -> list[int]:
        seen = []
        for turn in range(4):
            barrier.wait()
            with cpu_threads(count):
                barrier.wait()
                seen.append(torch.get_num_threads())
                if turn == count:
                    barrier.wait()  # one leaves before the others
            if turn != count:
                barrier.wait()
            seen.append(torch.get_num_threads())
        return seen

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, (1, 2, 3))) == [[1, 3] * 4, [2, 3] * 4, [3, 3] * 4]
    assert torch.get_num_threads() == 3


def test_products_of_matrices_run_on_as_many_threads(three_threads):
    def mkl() -> str:
        return next((line for line in torch.__config__.parallel_info().splitlines() if "mkl_get_max" in line), ": 1")

    before = mkl()
    with cpu_threads(1):
        assert mkl().endswith(": 1")
    assert mkl() == before


def test_the_drafter_runs_on_draft_threads_and_the_target_does_not(three_threads, monkeypatch):
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target, 1)
    seen = {"prompt": set(), "drafter": set(), "target": set()}
    for name in ("_forward", "_read_start"):  # what runs the drafter
        forward = getattr(DrafterState, name)

        def watched(state, *args, forward=forward, **kwargs):
            seen["drafter" if state.features.longest else "prompt"].add(torch.get_num_threads())
            return forward(state, *args, **kwargs)

        monkeypatch.setattr(DrafterState, name, watched)
    target.model.register_forward_hook(lambda *_: seen["target"].add(torch.get_num_threads()))
    drafter = DreamDrafter.for_target(target, draft_threads=1)
    generate(target, inputs, assistant_model=drafter, max_new_tokens=8)
    assert seen == {"prompt": {3}, "drafter": {1}, "target": {3}}
    assert torch.get_num_threads() == 3


def test_a_number_below_one_is_refused():
    with pytest.raises(ValueError, match=r"`draft_threads` \(0\)"):
        DreamConfig(draft_threads=0)
