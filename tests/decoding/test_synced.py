"""Two processes that wait for each other's forwards (`synced_gpus`): equal numbers of them, or a refusal before any."""

import multiprocessing

import pytest
import torch
from processors import make_image
from tiny_pair import tiny_drafter, tiny_processor, tiny_target

from dream_hf import dream_generate

TREE = {"tree_depth": 4, "tree_top_k": 2, "tree_size": 8}
OPTIONS = [
    {},
    {"return_dict_in_generate": True},
    {"do_sample": True, "temperature": 0.7},
    {"stop_strings": ["e"], "tokenizer": tiny_processor().tokenizer},
]


def in_two_processes(work, folder):
    """What `work(rank)` returns in each of two processes that can talk to each other."""
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    processes = [spawn.Process(target=enter, args=(work, rank, str(folder / "store"), answers)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        return [found for _, found in sorted(answers.get(timeout=120) for _ in processes)]
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def enter(work, rank, store, answers):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    answers.put((rank, work(rank)))
    torch.distributed.barrier()


def prompt(rank, batch):
    """Prompts of a length of this process's own."""
    parts = [{"type": "image"}, {"type": "text", "text": "What is in the image? " * (1 + rank)}]
    text = tiny_processor().apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return tiny_processor()(
        text=[text] * batch, images=[[make_image(color=("red", "blue")[rank])]] * batch, return_tensors="pt"
    )


def decode_unevenly(rank):
    """Forwards of this process and whether the output is plain decoding's, with every forward a meeting of both."""
    target = tiny_target(eos_bias=1.0).double()
    drafters = [tiny_drafter(target, **TREE), tiny_drafter(target, **TREE, pause_below=3.0)]
    forwards = []

    def meet(*_):
        forwards.append(1)
        torch.distributed.all_reduce(torch.ones(1))  # as the pieces of a layer are gathered

    found = []
    for drafter, batch, extra in [(d, b, o) for d in drafters for b in (1, 3) for o in OPTIONS]:
        inputs = prompt(rank, batch)
        inputs["pixel_values"] = inputs["pixel_values"].double()
        options = {"do_sample": False, "max_new_tokens": (6, 31)[rank]} | extra
        plain = target.generate(**inputs, **options)
        forwards.clear()
        hook = target.register_forward_pre_hook(meet)
        drafted = target.generate(**inputs, **options, assistant_model=drafter, synced_gpus=True)
        hook.remove()
        plain, drafted = (getattr(out, "sequences", out) for out in (plain, drafted))
        found.append((len(forwards), options["do_sample"] or torch.equal(plain, drafted)))
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes found out."""
    return in_two_processes(decode, tmp_path_factory.mktemp("store"))


def decode(rank):
    return decode_unevenly(rank), decode_in_pieces(rank)


def test_processes_run_the_same_number_of_forwards(both):
    first, second = (unevenly for unevenly, _ in both)
    assert [count for count, _ in first] == [count for count, _ in second]
    assert all(is_equal for _, is_equal in first + second)


def decode_in_pieces(rank):
    """What happens with all of a target in pieces, and with its layers only."""
    from torch.distributed.fsdp import fully_shard

    found = []
    for is_whole_sharded in (True, False):
        target = tiny_target()
        inputs, forwards = prompt(rank, 1), []
        drafter = tiny_drafter(target, **TREE)
        options = {"do_sample": False, "max_new_tokens": (6, 31)[rank], "synced_gpus": True}
        plain = target.generate(**inputs, **options | {"synced_gpus": False})
        for layer in target.get_decoder().layers:
            fully_shard(layer)
        if is_whole_sharded:
            fully_shard(target)
        target.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(1))
        try:
            drafted = target.generate(**inputs, **options, assistant_model=drafter)
            found.append(torch.equal(plain, drafted))
        except ValueError as error:
            found.append((str(error), len(forwards)))
    return found


def test_target_in_pieces_is_refused_and_layers_in_pieces_are_not(both):
    for _, ((message, num_forwards), is_equal) in both:
        assert "embedding and head are spread over processes (FSDP)" in message and num_forwards == 0
        assert is_equal


@pytest.mark.parametrize("way", ["assistant", "custom"])
@pytest.mark.parametrize("kind", ["DeepSpeed ZeRO-3", "FSDP"])
def test_target_in_pieces_is_refused_before_any_forward(way, kind):
    target = tiny_target()
    if kind == "FSDP":  # what FSDP1 writes on every module it manages
        target.get_input_embeddings()._is_fsdp_managed_module = True
    else:
        target.lm_head.weight.ds_id = 3
    target.register_forward_pre_hook(lambda *_: pytest.fail("a forward was run"))
    drafter = tiny_drafter(target)
    how = {
        "assistant": {"assistant_model": drafter},
        "custom": {"custom_generate": dream_generate, "drafter": drafter},
    }
    with pytest.raises(ValueError, match=f"spread over processes .{kind}.*Load the target whole"):
        target.generate(**prompt(0, 1), **how[way], max_new_tokens=4)
