"""The demo world: rows repeat, right answers score perfectly, wrong ones do not, answers point at what is drawn."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dream_hf.demo import TASKS, make_examples, make_rows, score_answer
from dream_hf.demo.canvas import IMAGE_SIZE, NUM_PATCHES, PATCH_SIZE
from dream_hf.demo.charts import LABELS, VALUES
from dream_hf.demo.rows import to_messages
from dream_hf.demo.scenes import FORMS, SHAPE_COLORS, SIZES
from dream_hf.demo.scoring import edit_distance, read_transcription

NUM_ROWS = 60


def replace_once(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


def other(value, choices):
    return next(choice for choice in choices if choice != value)


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_the_public_form(task):
    for row in make_rows(task, 3, seed=7):
        user, assistant = row["messages"]
        assert [part["type"] for part in user["content"]] == ["image", "text"]
        assert user["role"] == "user" and assistant["role"] == "assistant"
        assert assistant["content"][0]["text"]
        (image,) = row["images"]
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE) and image.mode == "RGB"
        assert row["messages"][:1] == to_messages(user["content"][1]["text"])


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides_everything(task):
    first, again = make_rows(task, 4, seed=11), make_rows(task, 6, seed=11)
    for left, right in zip(first, again, strict=False):
        assert left["messages"] == right["messages"]
        assert left["images"][0].tobytes() == right["images"][0].tobytes()
    others = make_rows(task, 4, seed=12)
    assert all(
        left["images"][0].tobytes() != right["images"][0].tobytes() for left, right in zip(first, others, strict=False)
    )


@pytest.mark.parametrize("kind", ["long", "short"])
@pytest.mark.parametrize("task", TASKS)
def test_right_answers_score_perfectly(task, kind):
    for example in make_examples(task, NUM_ROWS, seed=3, kind=kind):
        score = score_answer(example, example.turn.answer)
        assert score.is_perfect and score.expected > 0, example.turn.answer


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_about_another_picture_scores_badly(task):
    examples = make_examples(task, NUM_ROWS, seed=4)
    answers = {}
    for example in examples:
        answers.setdefault(example.turn.prompt, []).append(example.turn.answer)
    scores = [
        score_answer(example, answers[example.turn.prompt][0])
        for example in examples
        if example.turn.answer != answers[example.turn.prompt][0]
    ]
    assert len(scores) > 10
    assert sum(score.right for score in scores) < 0.6 * sum(score.stated for score in scores)


def test_every_shape_attribute_is_checked():
    for example in make_examples("scene", NUM_ROWS, seed=5):
        shape, answer = example.truth.shapes[0], example.turn.answer
        for value, choices in ((shape.size, SIZES), (shape.color, SHAPE_COLORS), (shape.form, FORMS)):
            wrong = re.sub(rf"\b{value}\b", other(value, choices), answer, count=1)
            if answer.startswith(("| row", '{"background"')):
                table, records = answer.partition('"shapes"')[::2]
                head, body = (table + '"shapes"', records) if records else (answer[:76], answer[76:])
                wrong = head + re.sub(rf"\b{value}\b", other(value, choices), body, count=1)
            score = score_answer(example, wrong)
            assert score.right == score.stated - 1 == score.expected - 1, wrong


def test_a_shape_in_the_wrong_place_or_left_out_costs_all_its_facts():
    example = next(e for e in make_examples("scene", NUM_ROWS, seed=6) if e.turn.answer.startswith("The picture"))
    shape, answer = example.truth.shapes[0], example.turn.answer
    sentence = re.search(r" In row .*?\.", answer)[0]
    free = next(c for c in range(1, 5) if all((s.row, s.column) != (shape.row, c) for s in example.truth.shapes))
    moved = score_answer(example, replace_once(answer, f"column {shape.column}", f"column {free}"))
    assert moved.stated - moved.right == 4
    left_out = score_answer(example, replace_once(answer, sentence, ""))
    assert left_out.right == left_out.stated == left_out.expected - 4 and not left_out.is_perfect
    twice = score_answer(example, replace_once(answer, sentence, sentence * 2))
    assert twice.stated - twice.right == 4


def test_every_chart_value_is_checked():
    for example in make_examples("chart", NUM_ROWS, seed=5):
        chart, answer = example.truth, example.turn.answer
        middle = next(i for i in range(1, len(chart.values)) if i not in (chart.highest, chart.lowest))
        label, value = chart.labels[middle], chart.values[middle]
        wrong_value = other(value, VALUES)
        pattern = rf"({label}\W+(?:has a value of )?){value}\b|\b{value}( for {label})"
        wrong = re.sub(pattern, lambda m, new=wrong_value: f"{m[1] or ''}{new}{m[2] or ''}", answer, count=1)
        score = score_answer(example, wrong)
        assert wrong != answer and score.right == score.stated - 1, wrong
        elsewhere = other(label, [x for x in sum(LABELS.values(), ()) if x not in chart.labels])
        renamed = score_answer(example, re.sub(rf"\b{label}\b", elsewhere, answer, count=1))
        assert renamed.right < example_perfect(example)


def test_highest_and_lowest_are_checked():
    for example in make_examples("chart", NUM_ROWS, seed=6):
        chart, answer = example.truth, example.turn.answer
        high, low = chart.labels[chart.highest], chart.labels[chart.lowest]
        head, name, tail = re.split(r"(?i)(highest)(?=\W)", answer, maxsplit=1)
        swapped = tail.replace(high, "??").replace(low, high).replace("??", low)
        score = score_answer(example, head + name + swapped)
        assert score.right <= score.stated - 2, answer


def example_perfect(example) -> int:
    return score_answer(example, example.turn.answer).right


def test_transcriptions_are_scored_by_characters():
    for example in make_examples("text", NUM_ROWS, seed=5):
        text, answer = example.truth.text, example.turn.answer
        assert read_transcription(answer) == text
        first = example.truth.lines[0][0]
        score = score_answer(example, replace_once(answer, first, first[:-1]))
        assert score.right == score.stated - 1
        assert score_answer(example, "The note reads:\nnothing").right < 0.3 * len(text)
    assert edit_distance("kitten", "sitting") == 3


def test_short_questions_want_the_right_value():
    for task in TASKS:
        examples = make_examples(task, NUM_ROWS, seed=9, kind="short")
        assert all(score_answer(example, example.turn.answer.upper()).right == 1 for example in examples)
        assert all(score_answer(example, example.turn.answer[:-3]).right == 0 for example in examples)


@pytest.mark.parametrize("task", TASKS)
def test_answers_point_at_what_is_drawn(task):
    """Where an answer says it looks, the picture is not blank, but for the background itself."""
    for example in make_examples(task, NUM_ROWS, seed=8):
        pixels = np.asarray(example.row["images"][0])
        patches = pixels.reshape(8, PATCH_SIZE, 8, PATCH_SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(NUM_PATCHES, -1, 3)
        is_blank = [len(np.unique(patch, axis=0)) == 1 for patch in patches]
        for span in example.turn.spans:
            if span.patches and len(span.patches) < 32:
                assert not all(is_blank[patch] for patch in span.patches), span


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_long_and_varied(task):
    examples = make_examples(task, NUM_ROWS, seed=10)
    assert len({example.turn.answer for example in examples}) == NUM_ROWS
    assert len({example.turn.prompt for example in examples}) >= 8
    assert np.median([len(example.turn.answer) for example in examples]) > 120


def test_mixed_rows_hold_both_kinds():
    kinds = [example.turn.kind for example in make_examples("chart", 200, seed=1, kind="mixed")]
    assert 20 < kinds.count("short") < 80


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("video", 1, 0), "`task` is 'video'.*'scene', 'chart', 'text'"),
        (("scene", -1, 0), "`num_rows` is -1"),
        (("scene", 1.5, 0), "`num_rows` is 1.5"),
        (("scene", 1, -3), "`seed` is -3"),
        (("scene", 1, 0, "huge"), "`kind` is 'huge'.*'long'"),
    ],
)
def test_refusals_name_the_argument(arguments, named):
    with pytest.raises(ValueError, match=named):
        make_rows(*arguments)
