"""Rows -> batches: answer masks per family, truncation, rows that cannot be used, sources."""

import importlib.util
import io
import json
from pathlib import Path

import datasets
import pytest
import torch
from processors import PROCESSOR_FAMILIES, ProcessorFamily, make_image, make_processor, train_tokenizer
from torch.utils.data import DataLoader

from dream_hf.data import ConversationCollator, ConversationDataset, open_rows
from dream_hf.data.alignment import check_text_kept, expand_spans, tokens_in_spans
from dream_hf.data.chat import find_chat_format

ANSWERS = ["A red circle.", "A blue circle, left of a square."]


def available(family: ProcessorFamily):
    missing = family.needs is not None and importlib.util.find_spec(family.needs) is None
    return pytest.param(family, id=family.name, marks=pytest.mark.skipif(missing, reason=f"needs {family.needs}"))


FAMILIES = pytest.mark.parametrize("family", [available(family) for family in PROCESSOR_FAMILIES])


def user(text, num_images=0):
    return {"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": text}


def two_turns():
    messages = [user("What is in the image?", 1), assistant(ANSWERS[0]), user("And here?", 1), assistant(ANSWERS[1])]
    return {"messages": messages, "images": [make_image(40, 30), make_image(60, 20, "blue")]}


def two_images():
    return {
        "messages": [user("What are these?", 2), assistant(ANSWERS[0])],
        "images": [make_image(), make_image(30, 64)],
    }


def text_only():
    return {"messages": [user("hello world?"), assistant("Thanks!")]}


def collate(processor, rows, max_length=None, max_bad_rows=0):
    dataset = ConversationDataset(rows, max_bad_rows=max_bad_rows)
    batch = ConversationCollator(processor, max_length=max_length)([dataset[index] for index in range(len(dataset))])
    return batch, dataset


def answers_of(processor, batch, row):
    """The text of each run of answer tokens in a row."""
    mask, ids, runs = batch["answer_mask"][row].tolist(), batch["input_ids"][row].tolist(), []
    for place, is_answer in enumerate(mask):
        if is_answer and (place == 0 or not mask[place - 1]):
            runs.append([])
        if is_answer:
            runs[-1].append(ids[place])
    return [processor.tokenizer.decode(run).strip() for run in runs]


# -- answer masks, per family -----------------------------------------------------------------------------------------


@FAMILIES
def test_mask_covers_every_answer_and_nothing_else(family):
    processor = make_processor(family.name)
    batch, _ = collate(processor, [text_only(), two_turns(), two_images()])
    end = family.end_of_answer
    assert answers_of(processor, batch, 0) == ["Thanks!" + end]
    if family.name == "llava":  # its template marks the answers, and nothing separates them from the next question
        assert answers_of(processor, batch, 1) == ANSWERS
    else:
        assert answers_of(processor, batch, 1) == [answer + end for answer in ANSWERS]
    assert answers_of(processor, batch, 2) == [ANSWERS[0] + end]
    assert not (batch["answer_mask"] & (batch["attention_mask"] == 0)).any()
    assert batch["attention_mask"][:, 0].all(), "padding belongs on the right"


@FAMILIES
def test_first_answer_starts_where_decoding_would(family):
    """The tokens before the first answer are those of the prompt that generate() is given."""
    processor = make_processor(family.name)
    row = two_images()
    batch, _ = collate(processor, [row])
    messages = [row["messages"][0]]
    prompt = find_chat_format(processor).render(messages, add_generation_prompt=True)
    has_bos = prompt.startswith(processor.tokenizer.bos_token)
    inputs = processor(text=[prompt], images=[row["images"]], return_tensors="pt", add_special_tokens=not has_bos)
    length = inputs["input_ids"].shape[1]
    assert int(batch["answer_mask"][0].nonzero()[0]) == length
    torch.testing.assert_close(batch["input_ids"][0, :length], inputs["input_ids"][0])
    assert set(batch) == {*inputs, "answer_mask"}
    torch.testing.assert_close(batch["pixel_values"], inputs["pixel_values"])


@FAMILIES
def test_rows_of_a_batch_are_the_rows_alone(family):
    processor = make_processor(family.name)
    rows = [two_turns(), text_only()]
    batch, _ = collate(processor, rows)
    for place, row in enumerate(rows):
        alone, _ = collate(processor, [row])
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(batch["input_ids"][place, :length], alone["input_ids"][0])
        assert torch.equal(batch["answer_mask"][place, :length], alone["answer_mask"][0])
        assert not batch["answer_mask"][place, length:].any()


def test_markers_and_prefixes_agree():
    processor = make_processor("qwen2_vl")
    template = processor.chat_template
    marked = template.replace(
        "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}",
        "{% elif 'text' in part and message['role'] == 'assistant' %}{% generation %}{{ part['text'] + '<|im_end|>' }}"
        "{% endgeneration %}{% elif 'text' in part %}{{ part['text'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% endif %}{{ '\n' }}",
    )
    assert marked != template
    by_prefix, _ = collate(processor, [two_turns(), text_only()])
    try:
        processor.chat_template = marked
        by_marker, _ = collate(processor, [two_turns(), text_only()])
    finally:
        processor.chat_template = template
    torch.testing.assert_close(by_marker["input_ids"], by_prefix["input_ids"])
    assert torch.equal(by_marker["answer_mask"], by_prefix["answer_mask"])


def test_generation_prompt_that_opens_a_thinking_block():
    """What a generation prompt has and a finished turn has not is no part of the answer's start."""
    processor = make_processor("qwen2_vl")
    template = processor.chat_template
    try:
        processor.chat_template = template.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
        batch, _ = collate(processor, [two_turns()])
    finally:
        processor.chat_template = template
    assert answers_of(processor, batch, 0) == [answer + "<|im_end|>" for answer in ANSWERS]


def test_template_that_rewrites_earlier_turns_is_named():
    tokenizer = train_tokenizer([])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
        "{{ '!' if loop.last else '.' }}\n{% endfor %}"
    )
    row = {"messages": [*text_only()["messages"], *text_only()["messages"]]}
    with pytest.raises(ValueError, match=r"row 0: ValueError: the chat template writes turn 1 differently"):
        collate(tokenizer, [row])


def test_text_only_target_with_a_template_for_strings():
    tokenizer = train_tokenizer([])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '</s>' }}{% endfor %}"
    )
    batch, _ = collate(tokenizer, [text_only()])
    assert tokenizer.decode(batch["input_ids"][0][batch["answer_mask"][0]]) == "assistant: Thanks!</s>"
    with pytest.raises(ValueError, match="pass the target's processor"):
        collate(tokenizer, [two_images()])


def test_row_that_is_one_answer_from_its_first_token():
    tokenizer = train_tokenizer([])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    batch, _ = collate(tokenizer, [{"messages": [assistant("hello world")]}], max_length=2)
    assert batch["answer_mask"].tolist() == [[True, True]]


def test_spans_move_past_each_placeholder():
    # "I q a I q bb": placeholders at 0 and 6 become 4 and 3 characters.
    replacements = [{"span": (0, 1), "new_span": (0, 4)}, {"span": (6, 7), "new_span": (9, 12)}]
    assert expand_spans([(4, 5), (10, 12)], replacements) == [(7, 8), (15, 17)]
    offsets = torch.tensor([[0, 4], [5, 6], [7, 8], [9, 12], [13, 14], [15, 16], [16, 17], [0, 0]])
    mask = tokens_in_spans(offsets, [(7, 8), (15, 17)])
    assert mask.tolist() == [False, False, True, False, False, True, True, False]
    check_text_kept("I q a I q bb", replacements, offsets)
    with pytest.raises(ValueError, match="changes the text"):
        check_text_kept("I q a I q", replacements, offsets)


# -- truncation -------------------------------------------------------------------------------------------------------


@FAMILIES
def test_truncation_never_cuts_an_image(family):
    processor = make_processor(family.name)
    row = two_turns()
    whole, _ = collate(processor, [row])
    one_turn, _ = collate(processor, [{"messages": row["messages"][:2], "images": row["images"][:1]}])
    length, first_length = whole["input_ids"].shape[1], one_turn["input_ids"].shape[1]
    first_answer = int(one_turn["answer_mask"][0].nonzero()[0])
    last_answer = int(whole["answer_mask"][0].diff().nonzero()[2]) + 1  # where the second run starts
    seen = set()
    for max_length in range(first_answer - 1, length + 1):
        dataset = ConversationDataset([row, text_only()], max_bad_rows=1)
        batch = ConversationCollator(processor, max_length=max_length)([dataset[0]])
        if len(dataset.bad_rows):
            seen.add("dropped")
            assert max_length <= first_answer and not batch["answer_mask"].any()
            continue
        uncut = whole if max_length > last_answer else one_turn
        seen.add("whole" if uncut is whole else "one turn")
        kept = min(max_length, length if uncut is whole else first_length)
        assert batch["input_ids"].shape[1] == batch["answer_mask"].shape[1] == kept
        torch.testing.assert_close(batch["input_ids"][0], uncut["input_ids"][0, :kept])
        torch.testing.assert_close(batch["pixel_values"], uncut["pixel_values"])
        assert batch["answer_mask"][0].any()
    assert seen == {"dropped", "one turn", "whole"}


# -- rows that cannot be used -----------------------------------------------------------------------------------------


def encoded_png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


BAD_ROWS = {
    "missing file": ({"messages": [user("?", 1), assistant("A")], "images": ["nowhere.png"]}, "FileNotFoundError"),
    "truncated picture": (
        {"messages": [user("?", 1), assistant("A")], "images": [encoded_png(make_image())[:60]]},
        "Error",
    ),
    "not a picture": (
        {"messages": [user("?", 1), assistant("A")], "images": [b"no picture"]},
        "UnidentifiedImageError",
    ),
    "too few pictures": (
        {"messages": [user("?", 2), assistant("A")], "images": [make_image()]},
        "2 image parts .* 1 pictures",
    ),
    "no pictures": ({"messages": [user("?", 1), assistant("A")]}, "1 image parts .* 0 pictures"),
    "no assistant": ({"messages": [user("?")]}, "no assistant message"),
    "empty answer": ({"messages": [user("?"), assistant("  ")]}, "its assistant messages are empty"),
    "no messages": ({"text": "hello"}, r"`messages` must be a list.*\['text'\]"),
    "image in an answer": (
        {"messages": [user("?"), {"role": "assistant", "content": [{"type": "image"}]}], "images": [make_image()]},
        "an assistant message has an image part",
    ),
    "unknown part": ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a part must be"),
    "no content": ({"messages": [{"role": "user"}]}, "content of a message"),
    "not a row": ("hello", "a row must be a dict"),
    "address": ({"messages": [user("?", 1), assistant("A")], "images": ["https://x/y.png"]}, "download it"),
    "number as picture": ({"messages": [user("?", 1), assistant("A")], "images": [3]}, "not int"),
    "placeholder in the text": (
        {"messages": [user("an <image> in text"), assistant("A")]},
        r"has '<image>', which is no picture",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named_and_skipped(case):
    processor = make_processor("llava")
    bad, cause = BAD_ROWS[case]
    batch, dataset = collate(processor, [text_only(), bad, two_images()], max_bad_rows=1)
    assert dataset.bad_rows.seen.tolist() == [False, True, False]
    assert batch["input_ids"].shape[0] == 2
    assert answers_of(processor, batch, 0) == ["Thanks!"] and answers_of(processor, batch, 1) == [ANSWERS[0]]
    with pytest.raises(
        ValueError, match=rf"(?s)1 of 3 rows of `train_dataset`.*`max_bad_rows` \(0\).*row 1: .*{cause}"
    ):
        collate(processor, [text_only(), bad, two_images()], max_bad_rows=0)


def test_row_met_again_counts_once():
    _, dataset = collate(make_processor("llava"), [text_only(), {}], max_bad_rows=1)
    for _ in range(3):
        assert dataset[1].conversation is None
    assert len(dataset.bad_rows) == 1


def test_all_rows_bad_is_an_error_whatever_the_limit():
    with pytest.raises(ValueError, match="None of the 2 rows of `train_dataset` can be used"):
        collate(make_processor("llava"), [{}, {}], max_bad_rows=100)


@FAMILIES
def test_batch_without_usable_rows_still_runs(family):
    processor = make_processor(family.name)
    dataset = ConversationDataset([{}, text_only()], max_bad_rows=1)
    batch = ConversationCollator(processor)([dataset[0]])
    assert batch["input_ids"].shape[0] == 1 and not batch["answer_mask"].any()
    assert batch["attention_mask"].all()


def test_worker_processes_count_together():
    rows = [text_only() if index % 2 else {} for index in range(8)]
    dataset = ConversationDataset(rows, max_bad_rows=4)
    collator = ConversationCollator(make_processor("llava"))
    loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=collator)
    assert sum(len(batch["input_ids"]) for batch in loader) == 4
    assert dataset.bad_rows.seen.tolist() == [True, False] * 4
    dataset = ConversationDataset(rows, max_bad_rows=3)
    with pytest.raises(ValueError, match="4 of 8 rows"):
        list(DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=collator))


def test_fault_of_the_batch_is_not_blamed_on_a_row():
    class Picky(type(make_processor("llava"))):
        def __call__(self, text=None, **kwargs):
            if len(text) > 1:
                raise RuntimeError("one at a time")
            return super().__call__(text=text, **kwargs)

    processor = make_processor("llava")
    picky = Picky.__new__(Picky)
    picky.__dict__.update(processor.__dict__)
    with pytest.raises(RuntimeError, match="one at a time"):
        collate(picky, [text_only(), text_only()])


# -- rows and their pictures ------------------------------------------------------------------------------------------


def test_pictures_without_image_parts_start_the_first_user_message():
    row = {
        "messages": [{"role": "user", "content": "What are these?"}, assistant("A")],
        "images": two_images()["images"],
    }
    conversation = ConversationDataset([row])[0].conversation
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["image", "image", "text"]


def test_pictures_inside_messages_and_keys_that_are_none():
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "image", "text": None, "image": make_image()}]
    row = {"messages": [{"role": "user", "content": parts, "name": None}, assistant("A")], "images": None}
    conversation = ConversationDataset([row])[0].conversation
    assert conversation.messages[0] == {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}
    assert len(conversation.images) == 1


# -- sources ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    for name, image in zip("ab", two_turns()["images"], strict=True):
        image.save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path


def stored_rows():
    paths = {**two_turns(), "images": ["pictures/a.png", "pictures/b.png"]}
    return [paths, {**text_only(), "images": []}]


def json_lines(folder):
    lines = [json.dumps(row) for row in stored_rows()]
    (folder / "rows.jsonl").write_text(lines[0] + "\n\n" + lines[1], encoding="utf-8")
    return folder / "rows.jsonl"


def json_list(folder):
    (folder / "rows.json").write_text(json.dumps(stored_rows()), encoding="utf-8")
    return str(folder / "rows.json")


def as_parts(rows):
    """Tables want one type for all contents."""
    for row in rows:
        row["messages"] = [
            {
                **m,
                "content": [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"],
            }
            for m in row["messages"]
        ]
    return rows


def parquet_paths(folder):
    datasets.Dataset.from_list(as_parts(stored_rows())).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def parquet_bytes(folder):
    rows = as_parts(stored_rows())
    for row in rows:
        row["images"] = [{"bytes": (folder / path).read_bytes(), "path": path} for path in row["images"]]
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def image_feature(folder):
    rows = as_parts(stored_rows())
    for row in rows:
        row["images"] = [str(folder / path) for path in row["images"]]
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


def saved_to_disk(folder):
    image_feature(folder).save_to_disk(folder / "saved")
    return folder / "saved"


SOURCES = [json_lines, json_list, parquet_paths, parquet_bytes, image_feature, saved_to_disk]


@pytest.mark.parametrize("make_source", SOURCES)
def test_every_source_gives_the_same_batch(folder, make_source):
    processor = make_processor("llava")
    expected, _ = collate(processor, [two_turns(), text_only()])
    batch, _ = collate(processor, make_source(folder))
    assert set(batch) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(batch[key], value)


def test_broken_line_costs_one_row(folder):
    path = json_lines(folder)
    path.write_text(path.read_text() + "\n{broken\n" + json.dumps(text_only()), encoding="utf-8")
    _, dataset = collate(make_processor("llava"), path, max_bad_rows=1)
    assert dataset.bad_rows.seen.tolist() == [False, False, True, False]


def test_hub_dataset_is_loaded_by_id_and_split(folder, monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return image_feature(folder)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(ConversationDataset("org/pictures", split="validation")) == 2
    assert asked == [("org/pictures", "validation")]


def test_unusable_sources_are_refused_at_once(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="`eval_dataset` is empty"):
        ConversationDataset([], name="eval_dataset")
    with pytest.raises(ValueError, match=r"`train_dataset` \('nowhere.jsonl'\) does not exist"):
        open_rows("nowhere.jsonl")
    with pytest.raises(TypeError, match="streaming=True"):
        open_rows(row for row in [text_only()])
    with pytest.raises(TypeError, match=r"several splits \(\['test', 'train'\]\)"):
        open_rows(
            datasets.DatasetDict({"train": datasets.Dataset.from_list([{}]), "test": datasets.Dataset.from_list([{}])})
        )
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a list of rows, not a dict"):
        open_rows(tmp_path / "rows.json")

    def load_dataset(name, split):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"'org/nothing'.*neither a file.*doesn't exist on the Hub"):
        open_rows("org/nothing")


# -- processors that cannot serve -------------------------------------------------------------------------------------


def test_unusable_processors_are_refused_at_once():
    tokenizer = train_tokenizer([])
    with pytest.raises(
        ValueError, match=r"`processing_class` \(.*\) has no chat template.*Set `processor.chat_template`"
    ):
        ConversationCollator(tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="does not write the text"):
        ConversationCollator(tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no padding token.*Set `tokenizer.pad_token`"):
        ConversationCollator(tokenizer)
