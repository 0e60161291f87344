"""Rows in every form that datasets have them in: colours, arrays, byte order marks, ShareGPT, tools."""

import codecs
import io
import json

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from processors import make_image, make_processor, train_tokenizer
from test_data import FAMILIES, assistant, collate, encoded_png, text_only, two_turns, user

from dream_hf.data import ConversationDataset, count_answer_tokens, open_rows
from dream_hf.data.chat import find_chat_format
from dream_hf.data.conversations import parse_row
from dream_hf.data.images import as_processed, load_image
from dream_hf.data.prompts import PromptEncoder
from dream_hf.regeneration.rows import read_row
from dream_hf.regeneration.store import AnswerStore
from dream_hf.training.feature_cache import fingerprint_rows

# -- pictures ---------------------------------------------------------------------------------------------------------


def pictures():
    """The same picture in every colour mode that files come in, and one that lies on its side."""
    base = make_image(40, 30)
    found = {mode: base.convert(mode) for mode in ("RGBA", "LA", "P", "CMYK", "L", "1", "I")}
    for mode in ("RGBA", "LA"):
        found[mode].putalpha(Image.linear_gradient("L").resize((40, 30)))
    found["P"].info["transparency"] = found["P"].getpixel((20, 15))
    found["I;16"] = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 40)
    found["turned"] = base.copy()
    found["turned"].getexif()[0x0112] = 6
    return found


def question(picture):
    return {"messages": [user("What is in the image?", 1), assistant("A red circle.")], "images": [picture]}


@FAMILIES
def test_pixels_are_those_of_the_processor(family):
    processor = make_processor(family.name)
    for mode, picture in pictures().items():
        text = find_chat_format(processor).render(parse_row(question(picture)).messages)
        expected = processor(text=[text], images=[[picture]], return_tensors="pt")["pixel_values"]
        batch, _ = collate(processor, [question(picture)])
        torch.testing.assert_close(batch["pixel_values"], expected, atol=0, rtol=0, msg=mode)
        prompt = PromptEncoder(processor).encode([([user("?", 1)], [picture])])
        torch.testing.assert_close(prompt["pixel_values"], expected, atol=0, rtol=0, msg=mode)


def test_files_are_upright_and_keep_their_colours(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    buffer = io.BytesIO()
    Image.new("RGBA", (40, 30), (255, 0, 0, 90)).save(buffer, "PNG", exif=exif)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    for value in (buffer.getvalue(), {"bytes": buffer.getvalue(), "path": None}, tmp_path / "a.png"):
        image = load_image(value)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGBA", (30, 40), (255, 0, 0, 90))
    store = AnswerStore(tmp_path / "out.jsonl", {}, str, 1)
    for mode, picture in pictures().items():  # written by `regenerate` as they are
        kept = load_image(tmp_path / store._keep_picture(picture))
        assert kept.size == picture.size and kept.tobytes() == picture.tobytes(), mode


def test_processor_that_converts_nothing_is_given_rgb():
    class Plain:
        image_processor = type("Images", (), {"do_convert_rgb": False})()

    assert {as_processed(picture, Plain()).mode for picture in pictures().values()} == {"RGB"}
    assert as_processed(pictures()["RGBA"], make_processor("llava")).mode == "RGBA"


# -- arrays, byte order marks -----------------------------------------------------------------------------------------


def array(items):
    found = np.empty(len(items), dtype=object)
    found[:] = items
    return found


def arrays(row):
    messages = [
        {**m, "content": array(m["content"]) if isinstance(m["content"], list) else m["content"], "name": float("nan")}
        for m in row["messages"]
    ]
    images = array([encoded_png(image) for image in row.get("images", [])]) if row.get("images") else float("nan")
    return {"messages": array(messages), "images": images, "tools": float("nan")}


def test_arrays_of_pandas_are_lists():
    processor, rows = make_processor("llava"), [two_turns(), text_only()]
    expected, _ = collate(processor, rows)
    made = [arrays(row) for row in rows]
    for source in (made, pandas.DataFrame(made)):
        batch, _ = collate(processor, source)
        for key, value in expected.items():
            torch.testing.assert_close(batch[key], value)
    assert fingerprint_rows([arrays(row) for row in rows], 2) == fingerprint_rows([arrays(row) for row in rows], 2)
    assert len(read_row(0, made[0], None, "").values) == 2


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_byte_order_marks(tmp_path, name):
    rows = [text_only(), text_only()]
    text = json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows))
    for lead in ("", "\n"):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + (lead + text).encode())
        assert list(open_rows(tmp_path / name).rows) == rows
    (tmp_path / name).write_text(text, encoding="utf-16")
    if name.endswith("json"):
        assert open_rows(tmp_path / name).rows == rows
    else:
        with pytest.raises(ValueError, match="UTF-16"):
            open_rows(tmp_path / name)


# -- LLaVA and ShareGPT -----------------------------------------------------------------------------------------------


def test_sharegpt_rows_are_the_same_conversations():
    processor = make_processor("qwen2_vl")
    expected = two_turns()
    said = ["<image>\nWhat is in the image?", "A red circle.", "<image>And here?", "A blue circle, left of a square."]
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]
    roles = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
    wanted, _ = collate(processor, [expected])
    for given in ({"conversations": turns}, {"conversations": roles}, {"messages": turns, "id": 3}):
        row = {"conversations": None, "messages": None} | given | {"images": expected["images"]}
        batch, _ = collate(processor, [row])
        for key, value in wanted.items():
            torch.testing.assert_close(batch[key], value)


def test_sharegpt_placeholders_speakers_and_system():
    turns = [{"from": "human", "value": "One <image> and\n<image>\nanother"}, {"from": "gpt", "value": "Yes."}]
    row = {"conversations": turns, "image": [make_image(), make_image()], "system": "Be brief."}
    messages = parse_row(row).messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    text, picture = (lambda text: {"type": "text", "text": text}), {"type": "image"}
    assert messages[1]["content"] == [text("One "), picture, text(" and"), picture, text("another")]
    bare = parse_row({"conversations": [{"from": "human", "value": "?"}, turns[1]], "image": make_image()})
    assert [part["type"] for part in bare.messages[0]["content"]] == ["image", "text"]
    with pytest.raises(ValueError, match=r"from 'narrator', which is none of"):
        parse_row({"conversations": [{"from": "narrator", "value": "?"}]})
    with pytest.raises(ValueError, match="2 image parts and the row has 0 pictures"):
        parse_row({"conversations": turns})
    assert len(read_row(0, row, None, "").values) == 2


@FAMILIES
def test_placeholder_in_the_text_is_not_passed_on(family):
    processor = make_processor(family.name)
    for content in ("an <image>", [{"type": "image"}, {"type": "text", "text": "What is <image>?"}]):
        row = {"messages": [{"role": "user", "content": content}, assistant("A")]}
        row["images"] = [make_image()] if isinstance(content, list) else []
        with pytest.raises(ValueError, match=r"has '<image>', which is no picture there; write the part"):
            collate(processor, [row])
        with pytest.raises(ValueError, match="which is no picture there"):
            PromptEncoder(processor).text(parse_row(row).messages)
    assert count_answer_tokens([row], processor, 10_000).sum() == 0


def test_placeholder_is_a_word_to_a_text_only_target():
    tokenizer = train_tokenizer([])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    collate(tokenizer, [{"messages": [user("hello <image> world"), assistant("Thanks!")]}])


# -- tools ------------------------------------------------------------------------------------------------------------

TOOL_TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% elif tools is not none and tools is defined %}no tools\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.content is none %}[none]{% elif m.content is not defined %}[undefined]"
    "{% elif m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for call in m.tool_calls or [] %}<call>{{ call | tojson }}</call>{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]


def with_tools(tools=TOOLS, **call):
    messages = [
        {"role": "user", "content": "hello world?"},
        {"role": "assistant", "tool_calls": CALLS, **call},
        {"role": "tool", "name": "weather", "content": "sunny"},
        {"role": "assistant", "content": "Thanks!"},
    ]
    return {"messages": messages, "tools": tools}


@pytest.mark.parametrize("call", [{"content": None}, {}, {"content": ""}, {"content": "hello"}])
@pytest.mark.parametrize("tools", [TOOLS, [], None], ids=["tools", "empty", "none"])
@pytest.mark.parametrize("is_parts", [True, False], ids=["processor", "tokenizer"])
def test_tools_and_their_calls_are_written_as_by_the_template(call, tools, is_parts):
    processor = make_processor("llava") if is_parts else train_tokenizer([])
    before = processor.chat_template
    try:
        processor.chat_template = TOOL_TEMPLATE
        row = with_tools(tools, **call)
        expected = processor.apply_chat_template(row["messages"], tools=tools, tokenize=False)
        rows = [row, {**row, "tools": json.dumps(tools) if tools is not None else ""}]
        rows.append({**row, "messages": array(row["messages"])})
        batch, _ = collate(processor, rows)
        for ids, mask in zip(batch["input_ids"], batch["answer_mask"], strict=True):
            tokenizer = getattr(processor, "tokenizer", processor)
            assert ids.tolist()[: mask.nonzero().max() + 1][-1] == ids[mask].tolist()[-1]
            text = find_chat_format(processor).render(parse_row(row).messages, parse_row(row).tools)
            assert text == expected
            assert torch.equal(ids, batch["input_ids"][0])
            assert tokenizer.decode(ids[mask]).count("weather") == 1  # the call is an answer, the tools are not
        assert count_answer_tokens(rows, processor, 10_000).sum() == batch["answer_mask"].sum()
    finally:
        processor.chat_template = before


def test_unusable_tools_are_named():
    with pytest.raises(ValueError, match=r"`tools` \('\{'\) must be a list of tools, or one as JSON"):
        parse_row(with_tools("{"))
    with pytest.raises(ValueError, match="`tools` must be a list of tools"):
        parse_row(with_tools({"name": "weather"}))
    with pytest.raises(ValueError, match="content of a message must be"):
        parse_row({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]})
    with pytest.raises(ValueError, match="an answer calls tools"):
        read_row(0, with_tools(content=None), None, "")


def test_regenerated_rows_keep_their_tools(tmp_path):
    row = read_row(0, {**text_only(), "tools": TOOLS}, None, "")
    store = AnswerStore(tmp_path / "out.jsonl", {}, str, 1)
    store.add(0, row.messages, row.values, True, row.tools)
    store.merge()
    assert parse_row(ConversationDataset(tmp_path / "out.jsonl").source.rows[0]).tools == TOOLS
