"""Regeneration: the target's own answers, every row once whatever happens, files that the training data code reads."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from folders import FOLDERS
from processors import make_image
from tiny_pair import picture_row, tiny_drafter, tiny_processor, tiny_target

from dream_hf.data import ConversationCollator, ConversationDataset, open_rows
from dream_hf.data.conversations import parse_row
from dream_hf.data.prompts import PromptEncoder
from dream_hf.regeneration import journal
from dream_hf.regeneration.regenerate import regenerate
from dream_hf.regeneration.store import AnswerStore

QUESTIONS = ["What is in the image?", "hello world", "How many triangles are green?", "x", "Describe the second image"]
EOS_BIAS = 2.6  # some answers of at most 12 tokens end by themselves, some do not
LIMIT = 12
TEXTS = [{"messages": [{"role": "user", "content": question}]} for question in QUESTIONS]


@pytest.fixture(scope="module")
def target():
    return tiny_target(EOS_BIAS)


def rows():
    colors = ["red", "blue", "green", "black", "orange"]
    return [picture_row(question, color=color) for question, color in zip(QUESTIONS, colors, strict=True)]


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def text_of(message):
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def run(target, source, output, **options):
    return regenerate(
        target, tiny_processor(), source, output, **{"batch_size": 2, "max_new_tokens": LIMIT, **options}
    )


def answer_alone(target, messages, images):
    """What plain `generate()` answers to one prompt, and whether it ended it itself."""
    encoder = PromptEncoder(tiny_processor())
    inputs = encoder.encode([(messages, images)])
    tokens = target.generate(**inputs, do_sample=False, max_new_tokens=LIMIT)[0, inputs["input_ids"].shape[1] :]
    is_end = tokens == tiny_processor().tokenizer.eos_token_id
    return encoder.decode(tokens.tolist()), bool(is_end.any())


def test_answers_are_those_of_plain_generate_in_the_order_of_the_source(target, tmp_path):
    report = run(target, rows(), tmp_path / "out.jsonl")
    made = read(tmp_path / "out.jsonl")
    assert [row["row"] for row in made] == list(range(len(QUESTIONS)))
    for row, source in zip(made, rows(), strict=True):
        conversation = parse_row(source)
        expected, is_finished = answer_alone(target, conversation.messages[:1], conversation.images)
        assert text_of(row["messages"][1]) == expected
        assert row["finished"] == is_finished
        assert text_of(row["messages"][0]) == text_of(source["messages"][0])
    finished = [row["finished"] for row in made]
    assert any(finished) and not all(finished)  # otherwise this test says little
    assert (report.num_rows, report.num_unfinished, report.num_bad) == (5, finished.count(False), 0)


def test_the_output_is_training_data(target, tmp_path):
    run(target, rows(), tmp_path / "out.jsonl")
    dataset = ConversationDataset(tmp_path / "out.jsonl")
    for index, source in enumerate(rows()):
        assert dataset[index].conversation.images[0].tobytes() == source["images"][0].tobytes()
    batch = ConversationCollator(tiny_processor())([dataset[index] for index in range(len(dataset))])
    assert batch["answer_mask"].any(1).all()


def test_a_drafter_changes_nothing(target, tmp_path):
    run(target, rows(), tmp_path / "plain.jsonl")
    run(target, rows(), tmp_path / "drafted.jsonl", drafter=tiny_drafter(target, tree_depth=2, tree_size=6))
    answers = [
        [text_of(row["messages"][1]) for row in read(tmp_path / f"{name}.jsonl")] for name in ("plain", "drafted")
    ]
    assert answers[0] == answers[1]


def test_turns_are_answered_in_order_after_regenerated_ones(target, tmp_path):
    two_turns = picture_row("What is in the image?")
    two_turns["messages"] += [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Thanks!"}]
    open_ended = picture_row("x")
    open_ended["messages"] = open_ended["messages"][:1]  # no answer yet
    run(target, [two_turns, open_ended], tmp_path / "out.jsonl")
    made = read(tmp_path / "out.jsonl")
    history = made[0]["messages"][:3]
    second, _ = answer_alone(target, history, [make_image()])
    assert text_of(made[0]["messages"][3]) == second
    assert text_of(made[0]["messages"][1]) != "a red circle"
    assert [message["role"] for message in made[1]["messages"]] == ["user", "assistant"]


def test_the_suffix_is_asked_and_kept(target, tmp_path):
    run(target, rows()[:1], tmp_path / "out.jsonl", prompt_suffix="Answer in detail.")
    made = read(tmp_path / "out.jsonl")[0]
    assert text_of(made["messages"][0]) == f"{QUESTIONS[0]} Answer in detail."
    expected, _ = answer_alone(target, made["messages"][:1], rows()[0]["images"])
    assert text_of(made["messages"][1]) == expected


def test_sampling_is_reproducible_and_differs_from_greedy(target, tmp_path):
    answers = []
    for name, options in {"one": {"temperature": 1.0}, "two": {"temperature": 1.0}, "greedy": {}}.items():
        run(target, rows(), tmp_path / f"{name}.jsonl", **options)
        answers.append([text_of(row["messages"][1]) for row in read(tmp_path / f"{name}.jsonl")])
    assert answers[0] == answers[1] != answers[2]


# -- stopping and starting --------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_without_losing_or_repeating_a_row(target, tmp_path, monkeypatch):
    run(target, rows(), tmp_path / "whole.jsonl")
    calls = []
    generate = type(target).generate

    def failing(self, **inputs):
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, **inputs)

    monkeypatch.setattr(type(target), "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        run(target, rows(), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    piece = tmp_path / "out_files" / "rows-00000.jsonl"
    assert len(read(piece)) == 4
    with piece.open("a") as file:
        file.write('{"row": 4, "mess')  # killed in the middle of a line
    run(target, rows(), tmp_path / "out.jsonl")
    assert calls == [2, 2, 1, 1]
    written = (tmp_path / "out.jsonl").read_text().replace("out_files", "whole_files")
    assert written == (tmp_path / "whole.jsonl").read_text()
    assert run(target, rows(), tmp_path / "out.jsonl").num_rows == 5  # complete: nothing is generated
    assert len(calls) == 4


def test_other_settings_are_refused(target, tmp_path):
    run(target, rows()[:2], tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"`temperature` 0.0 and now it is 1.0"):
        run(target, rows()[:2], tmp_path / "out.jsonl", temperature=1.0)
    with pytest.raises(ValueError, match="first_row"):
        run(target, rows()[1:3], tmp_path / "out.jsonl")
    (tmp_path / "mine.jsonl").write_text("precious")
    with pytest.raises(ValueError, match="exists and was not begun by this command"):
        run(target, rows()[:2], tmp_path / "mine.jsonl")


@pytest.mark.parametrize("kind", ["list", "file", "dataset", "max_rows"])
def test_rows_may_be_added_and_the_others_keep_their_answers(target, tmp_path, monkeypatch, kind):
    def source(count):
        if kind == "list":
            return rows()[:count]
        if kind == "dataset":
            return datasets.Dataset.from_list([{"messages": row["messages"]} for row in TEXTS[:count]])
        (tmp_path / "rows.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in TEXTS[: 5 if kind == "max_rows" else count])
        )
        return tmp_path / "rows.jsonl"

    def options(count):
        return {"max_rows": count} if kind == "max_rows" else {}

    output = tmp_path / "out.jsonl"
    run(target, source(2), output, **options(2))
    first = read(output)
    add, added = AnswerStore.add, []
    monkeypatch.setattr(AnswerStore, "add", lambda self, index, *row: (added.append(index), add(self, index, *row)))
    report = run(target, source(5), output, **options(5))
    assert sorted(added) == [2, 3, 4] and (report.num_rows, report.num_bad) == (5, 0)
    assert read(output)[:2] == first and [row["row"] for row in read(output)] == [0, 1, 2, 3, 4]
    run(target, source(5), output, **options(5))
    assert len(added) == 3
    with pytest.raises(ValueError, match="`num_rows` 5 and now it is 4"):
        run(target, source(4), output, **options(4))


def test_changed_rows_are_refused_whether_or_not_more_are_added(target, tmp_path):
    run(target, TEXTS[:3], tmp_path / "out.jsonl")
    changed = [TEXTS[0], TEXTS[2], *TEXTS[2:]]
    for source in (changed[:3], changed):
        with pytest.raises(ValueError, match="other rows among the first 3"):
            run(target, source, tmp_path / "out.jsonl")


def test_a_run_that_was_stopped_goes_on_with_added_rows(target, tmp_path, monkeypatch):
    add = AnswerStore.add
    monkeypatch.setattr(
        AnswerStore, "add", lambda self, index, *row: killed() if index == 1 else add(self, index, *row)
    )
    with pytest.raises(KeyboardInterrupt):
        run(target, TEXTS[:3], tmp_path / "out.jsonl")
    monkeypatch.undo()
    assert run(target, TEXTS, tmp_path / "out.jsonl").num_rows == 5
    run(target, TEXTS, tmp_path / "at_once.jsonl")
    assert read(tmp_path / "out.jsonl") == read(tmp_path / "at_once.jsonl")


def killed():
    raise KeyboardInterrupt


WORKER = """
import os, sys
sys.path[:0] = {paths!r}
from test_regenerate import EOS_BIAS, rows, run
from tiny_pair import tiny_target
from dream_hf.regeneration import store as answer_store

add, kill_at = answer_store.AnswerStore.add, int(sys.argv[2])
def killing(self, index, *row):
    add(self, index, *row)
    if len(self.done()) == kill_at:
        os.kill(os.getpid(), 9)
answer_store.AnswerStore.add = killing
run(tiny_target(EOS_BIAS), rows(), sys.argv[1])
os._exit(0)  # gloo's threads now and then abort an interpreter that is shutting down, when all work is done
"""


def start(output, kill_at=-1, **environment):
    code = WORKER.format(paths=FOLDERS)
    return subprocess.Popen([sys.executable, "-c", code, str(output), str(kill_at)], env={**os.environ, **environment})


def test_kill_nine_then_two_processes(target, tmp_path):
    assert start(tmp_path / "out.jsonl", kill_at=1).wait(120) == -signal.SIGKILL
    assert not (tmp_path / "out.jsonl").exists()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [start(tmp_path / "out.jsonl", RANK=str(r), LOCAL_RANK=str(r), **group) for r in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    run(target, rows(), tmp_path / "whole.jsonl")
    written = (tmp_path / "out.jsonl").read_text().replace("out_files", "whole_files")
    assert written == (tmp_path / "whole.jsonl").read_text()


def test_the_journal_keeps_whole_lines_only(tmp_path):
    file = tmp_path / "journal.jsonl"
    journal.cut_unfinished_line(file)
    assert list(journal.entries(file)) == []
    for number in range(3):
        journal.append(file, {"number": number, "text": "x" * 70_000})
    whole = file.read_bytes()
    for rest in (b"", b'{"number": 3', b'{"number": 3, "text": "' + b"x" * 200_000):
        file.write_bytes(whole + rest)
        assert [entry["number"] for _, entry in journal.entries(file)] == [0, 1, 2]
        journal.cut_unfinished_line(file)
        assert file.read_bytes() == whole
    offset, last = list(journal.entries(file))[-1]
    assert json.loads(journal.line_at(file, offset)) == last
    file.write_bytes(b"no line at all")
    journal.cut_unfinished_line(file)
    assert file.read_bytes() == b""


# -- sources and faults -----------------------------------------------------------------------------------------------


def test_picture_files_stay_where_they_are(target, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "made").mkdir()
    make_image(color="blue").save(tmp_path / "data" / "blue.png")
    row = {**picture_row("x"), "images": ["blue.png"]}
    (tmp_path / "data" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    run(target, tmp_path / "data" / "rows.jsonl", tmp_path / "made" / "out.jsonl")
    assert read(tmp_path / "made" / "out.jsonl")[0]["images"] == ["../data/blue.png"]
    assert ConversationDataset(tmp_path / "made" / "out.jsonl")[0].conversation is not None


def test_pictures_of_a_dataset_are_written_as_they_are_stored(target, tmp_path):
    jpeg = tmp_path / "picture.jpg"
    make_image().save(jpeg)
    content = [{"type": "text", "text": "x"}]
    messages = [{"role": "user", "content": [{"type": "image", "text": None}, *content]}]
    text = datasets.Value("string")
    features = datasets.Features(
        {
            "messages": [{"role": text, "content": [{"type": text, "text": text}]}],
            "images": datasets.List(datasets.Image()),
        }
    )
    source = datasets.Dataset.from_list(
        [{"messages": messages, "images": [{"bytes": jpeg.read_bytes(), "path": None}]}] * 2, features=features
    )
    run(target, source, tmp_path / "out.jsonl")
    files = list((tmp_path / "out_files" / "images").iterdir())
    assert [file.read_bytes() for file in files] == [jpeg.read_bytes()]  # one file for two rows
    assert len(open_rows(tmp_path / "out.jsonl").rows) == 2


def test_bad_rows_are_left_out_up_to_a_limit(target, tmp_path, monkeypatch):
    broken = {**picture_row("x"), "images": [b"no picture"]}
    mismatched = {"messages": picture_row("x")["messages"], "images": []}
    source = [rows()[0], broken, rows()[1], mismatched]
    report = run(target, source, tmp_path / "out.jsonl", max_bad_rows=2)
    assert (report.num_rows, report.num_bad) == (2, 2)
    assert [row["row"] for row in read(tmp_path / "out.jsonl")] == [0, 2]
    with pytest.raises(ValueError, match=r"2 of 4 rows of `rows` cannot be used.*max_bad_rows"):
        run(target, source, tmp_path / "strict.jsonl", max_bad_rows=1)


def test_a_row_the_processor_cannot_take_costs_only_itself(target, tmp_path):
    stray = picture_row("hello <image>")  # one placeholder too many
    report = run(target, [rows()[0], stray, rows()[1]], tmp_path / "out.jsonl", batch_size=3)
    assert (report.num_rows, report.num_bad) == (2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"`batch_size` \(0\)"),
        ({"max_new_tokens": 0}, r"`max_new_tokens` \(0\)"),
        ({"temperature": -1.0}, r"`temperature` \(-1.0\)"),
        ({"max_rows": 0}, r"`max_rows` \(0\)"),
    ],
)
def test_arguments_out_of_range(target, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(target, rows(), tmp_path / "out.jsonl", **options)


def test_other_faults(target, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        run(target, rows(), tmp_path / "out.parquet")
    with pytest.raises(ValueError, match="`rows` is empty"):
        run(target, [], tmp_path / "out.jsonl")
