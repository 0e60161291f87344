"""`dream-hf demo`: what it prints and draws, its bundled pictures, and how it refuses."""

import json
import re

import pytest
import torch
from command_line import expected_answer, refusal, refusal_in_one_line
from PIL import Image, ImageFont
from processors import make_image
from tiny_pair import save_pair

from dream_hf.benchmark.comparison import Comparison
from dream_hf.benchmark.measure import Measurement
from dream_hf.cli import answer_card, main
from dream_hf.decoding import loop
from dream_hf.demo import TASKS, load_pair, make_rows, pictures
from dream_hf.load_models import BUNDLED

COLOR = re.compile(r"\x1b\[\d*m")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), tree_depth=3, tree_size=8)


@pytest.fixture
def bundled(folders, monkeypatch):
    monkeypatch.setitem(BUNDLED, "target", folders[0])
    monkeypatch.setitem(BUNDLED, "drafter", folders[1])


@pytest.fixture
def picture(tmp_path):
    make_image(color="blue").save(tmp_path / "blue.png")
    return str(tmp_path / "blue.png")


# -- demo -------------------------------------------------------------------------------------------------------------


def test_demo_json(bundled, folders, capsys):
    assert main(["demo", "--json", "--max-new-tokens", "12", "--repeats", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    row = make_rows("scene", 1, 1_000_000)[0]
    prompt = row["messages"][0]["content"][1]["text"]
    assert report["identical"] is True and report["prompt"] == prompt and report["repeats"] == 2
    assert report["text"] == expected_answer(prompt, row["images"], 12)
    assert report["speedup"] == pytest.approx(report["plain_seconds"] / report["dream_seconds"])
    gains = report["accepted_lengths"]
    assert report["tau"] == pytest.approx(sum(gains) / len(gains)) and sum(gains) == report["num_tokens"] - 1


def test_demo_compiled(bundled, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        loop, "compile_settings", lambda target, drafter, *_: compiled.append(drafter.settings.compile)
    )
    for option in ([], ["--compile"]):
        assert main(["demo", "--json", "--max-new-tokens", "6", "--repeats", "1", *option]) == 0
        assert json.loads(capsys.readouterr().out)["identical"] is True
        assert set(compiled) == {bool(option)}
        compiled.clear()


def test_demo_streams_both_answers_and_sums_up(bundled, folders, capsys):
    assert main(["demo", "--task", "chart", "--max-new-tokens", "10", "--repeats", "1", "--color", "always"]) == 0
    output = capsys.readouterr().out
    row = make_rows("chart", 1, 1_000_000)[0]
    answer = expected_answer(row["messages"][0]["content"][1]["text"], row["images"], 10)
    plain, speculative = (output.split(f"{title}: ")[1] for title in ("plain", "speculative"))
    assert COLOR.sub("", speculative).strip().startswith(answer) and plain.strip().startswith(answer)
    assert COLOR.search(speculative) and not COLOR.search(plain.split("speculative")[0])
    assert all(word in output for word in ("identical    yes", "speedup", "tokens/s", "tau"))


def test_demo_without_color_separates_steps(bundled, capsys):
    arguments = ["demo", "--max-new-tokens", "6", "--repeats", "1", "--color", "never"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert not COLOR.search(output)
    assert "|" in output.split("speculative: ")[1].split("identical")[0]


def test_demo_reports_a_difference(bundled, capsys, monkeypatch):
    from dream_hf.decoding import loop as generation

    pick = generation.Sampler.verify

    def wrong(self, tree, logits, texts, *args):
        verdict = pick(self, tree, logits, texts, *args)
        texts.ids[:, texts.prompt_length :] = 5
        return verdict

    monkeypatch.setattr(generation.Sampler, "verify", wrong)
    assert main(["demo", "--json", "--max-new-tokens", "8", "--repeats", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is False


def test_demo_with_a_picture_of_ones_own_and_a_card(bundled, folders, picture, tmp_path, capsys):
    saved = tmp_path / "out.png"
    arguments = ["--image", picture, "--prompt", "hello", "--max-new-tokens", "10", "--repeats", "1"]
    assert main(["demo", "--json", *arguments, "--save", str(saved)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == expected_answer("hello", [make_image(color="blue")], 10)
    with Image.open(saved) as card:
        assert card.width > card.height > 100
        assert len(card.getcolors(1_000_000)) > 10  # something is drawn


def test_demo_draws_another_picture_for_a_seed(bundled, capsys):
    assert main(["demo", "--json", "--task", "text", "--seed", "7", "--max-new-tokens", "8", "--repeats", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    row = make_rows("text", 1, 1_000_007)[0]
    assert report["prompt"] == row["messages"][0]["content"][1]["text"]
    assert report["text"] == expected_answer(report["prompt"], row["images"], 8)


# -- bundled pictures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_bundled_pictures_are_what_the_world_draws(task):
    file, request = pictures.bundled_picture(task)
    row = make_rows(task, 1, 1_000_000)[0]
    with Image.open(file) as bundled_image:
        assert bundled_image.convert("RGB").tobytes() == row["images"][0].tobytes()
    assert request == row["messages"][0]["content"][1]["text"]
    assert file.stat().st_size < 5000


def test_the_pictures_can_be_drawn_again(tmp_path):
    written = list(pictures.write_pictures(tmp_path / "new"))
    assert [file.name for file in written] == ["scene.png", "chart.png", "text.png", "requests.json"]
    for file in written:
        bundled_file = pictures.FOLDER / file.name
        if file.suffix == ".json":
            assert file.read_text() == bundled_file.read_text()
        else:  # pixels: compression may differ between versions of zlib
            assert Image.open(file).convert("RGB").tobytes() == Image.open(bundled_file).convert("RGB").tobytes()


def test_demo_asks_about_the_bundled_file(bundled, tmp_path, monkeypatch, capsys):
    list(pictures.write_pictures(tmp_path))
    make_image(color="green").save(tmp_path / "chart.png")
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    assert main(["demo", "--json", "--task", "chart", "--max-new-tokens", "8", "--repeats", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == expected_answer(report["prompt"], [make_image(color="green")], 8)


def test_bundled_pictures_that_are_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    assert "pictures/scene.png. Draw it with" in refusal_in_one_line(capsys, "demo")
    make_image().save(tmp_path / "scene.png")
    assert "pictures/requests.json" in refusal_in_one_line(capsys, "demo")
    with pytest.raises(ValueError, match=r"`task` \('poem'\) is unknown: use 'scene', 'chart', 'text'"):
        pictures.bundled_picture("poem")


# -- the card ---------------------------------------------------------------------------------------------------------


def made_comparison(pieces, gains):
    tokens = list(range(sum(gains) + 1))
    plain = Measurement([tokens], 3.0, 0.1, 1, [1] * sum(gains))
    return Comparison([plain], [Measurement([tokens], 1.0, 0.1, 1, gains)], pieces)


def pixels_of(card, color, top):
    """Places (x, y) of a colour in the rows from `top` on."""
    wanted = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
    return [(x, y) for y in range(top, card.height) for x in range(card.width) if card.getpixel((x, y)) == wanted]


def test_the_card_shows_picture_answer_times_and_gains():
    result = made_comparison(["The", " shape is", " blue."], [1, 3])
    card = answer_card.draw_card(Image.new("RGB", (30, 30), "blue"), "hello", result)
    assert card.getpixel((40, 40)) == (0, 0, 255)
    beside = card.crop((answer_card.PICTURE + answer_card.MARGIN, 0, card.width, answer_card.PICTURE))
    assert all(pixels_of(beside, color, 0) for color in answer_card.TINTS[:3])
    assert not pixels_of(beside, answer_card.TINTS[3], 0)
    bars = {color: pixels_of(card, color, answer_card.PICTURE + 60) for color in answer_card.TINTS[:4]}
    width = {color: max(x for x, _ in places) - min(x for x, _ in places) for color, places in bars.items() if places}
    assert width[answer_card.TINTS[2]] == pytest.approx(3 * width[answer_card.TINTS[1]], rel=0.02)
    assert not bars[answer_card.TINTS[0]] and not bars[answer_card.TINTS[3]]  # the prefill gains no bar
    plain, dream = (
        len({x for x, _ in pixels_of(card.crop((answer_card.LABELS, 0, card.width, card.height)), color, 360)})
        for color in (answer_card.FAINT, answer_card.STRONG)
    )
    assert plain == pytest.approx(3 * dream, rel=0.1)


@pytest.mark.parametrize(
    ("pieces", "gains"),
    [
        (["x", *["y "] * 300], [1] * 300),
        (["W" * 400], []),
        (["a\n\n\tb\n", "\n" * 30 + "c"], [5]),
        ([""], []),
        (["The", " answer" * 120], [120]),
        (["The", " answer" * 60, " is" * 20], [60, 20]),
        (["x", *["y "] * 1500], [1] * 1500),
    ],
)
def test_cards_of_unusual_answers(pieces, gains):
    card = answer_card.draw_card(Image.new("RGB", (3, 500), "blue"), "why " * 100, made_comparison(pieces, gains))
    paper = answer_card.PAPER
    margins = [
        card.crop((card.width - 20, 0, card.width, card.height)),
        card.crop((0, card.height - 8, card.width, card.height)),
    ]
    assert all(len(pixels_of(part, paper, 0)) == part.width * part.height for part in margins)  # nothing runs over


@pytest.mark.parametrize("gains", [[60], [128, 128], [60, 1, 3], [1, 1]])
@pytest.mark.parametrize("size", [(200, 200), (500, 60)])
def test_the_card_grows_with_the_text_and_not_with_what_a_step_gains(gains, size):
    pieces = ["The", *[" shape"] * len(gains)]
    card = answer_card.draw_card(Image.new("RGB", size, "blue"), "hello", made_comparison(pieces, gains))
    picture = answer_card.PICTURE * size[1] // size[0]
    assert card.height <= max(picture, 120) + 250
    lines = [card.crop((0, y, card.width, y + 1)).getcolors() for y in range(card.height)]
    empty = "".join("_" if len(colors) == 1 else "x" for colors in lines)
    assert max(map(len, empty.split("x"))) <= 2 * answer_card.MARGIN  # nowhere is it blank


# -- refusals ---------------------------------------------------------------------------------------------------------


def broken_pictures(folder):
    """Files that are no pictures, each in its own way."""
    whole = folder / "whole.png"
    make_rows("scene", 1, 1_000_000)[0]["images"][0].save(whole)
    data = whole.read_bytes()
    header = (
        b"BM"
        + bytes(16)
        + (200_000).to_bytes(4, "little") * 2
        + (1).to_bytes(2, "little")
        + (24).to_bytes(2, "little")
    )
    contents = {
        "nothing.png": b"",
        "text.png": b"This is a letter, not a picture.",
        "cut.png": data[: len(data) // 2],
        "head.png": data[:20],
        "garbled.png": data[:60] + bytes(len(data) - 60),
        "number.ppm": b"P6\n1x8 128\n255\n",
        "huge.bmp": header[:10] + (54).to_bytes(4, "little") + (40).to_bytes(4, "little") + header[18:] + bytes(24),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    return [*contents, "folder.png", "missing.png"]


def test_demo_refuses_broken_pictures(tmp_path, capsys):
    for name in broken_pictures(tmp_path):
        file = str(tmp_path / name)
        message = refusal_in_one_line(capsys, "demo", "--image", file, "--prompt", "x")
        assert f"`--image` ({file!r}) cannot be read as a picture: " in message, name
    assert "exceeds limit" in refusal_in_one_line(
        capsys, "demo", "--image", str(tmp_path / "huge.bmp"), "--prompt", "x"
    )
    generate = ["generate", "--target", "demo", "--image", str(tmp_path / "cut.png"), "--prompt", "x"]
    assert "cannot be read as a picture" in refusal_in_one_line(capsys, *generate)
    address = ["--image", "https://example.org/a.png", "--prompt", "x"]
    assert "download it and give its path" in refusal_in_one_line(capsys, "demo", *address)


def test_demo_refuses_fonts_that_cannot_be_read(picture, tmp_path, monkeypatch, capsys):
    saved = ["--save", str(tmp_path / "out.png")]
    (tmp_path / "empty.ttf").write_bytes(b"")
    for font in (picture, str(tmp_path / "empty.ttf"), str(tmp_path), "no-such-font.ttf"):
        message = refusal_in_one_line(capsys, "demo", *saved, "--font", font)
        assert f"`--font` ({font!r}) cannot be read as a font: " in message

    def broken(*_):
        raise OSError("invalid reference")  # what FreeType says when the tables of glyphs are damaged

    monkeypatch.setattr(ImageFont.FreeTypeFont, "getmask", broken)
    own = tmp_path / "own.ttf"
    own.write_bytes(ImageFont.load_default(15).font_bytes)
    assert "cannot be read as a font: invalid ref" in refusal_in_one_line(capsys, "demo", *saved, "--font", str(own))
    assert "Pillow's own font, which this Pillow cannot load" in refusal_in_one_line(capsys, "demo", *saved)


def test_demo_refuses_options_that_make_no_sense(bundled, picture, tmp_path, capsys):
    assert "`--image` needs `--prompt`" in refusal_in_one_line(capsys, "demo", "--image", picture)
    both = ["--image", picture, "--prompt", "x", "--seed", "3"]
    assert "give one of the two" in refusal_in_one_line(capsys, "demo", *both)
    assert "invalid choice: 'poem'" in refusal_in_one_line(capsys, "demo", "--task", "poem")
    assert "does not exist" in refusal_in_one_line(capsys, "demo", "--save", str(tmp_path / "nowhere" / "out.png"))
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in refusal_in_one_line(capsys, "demo", "--save", str(tmp_path / "folder.png"))
    for name in ("out.txt", "out", "out.psd"):  # Pillow can read the last, and not write it
        assert "must end as a picture does" in refusal_in_one_line(capsys, "demo", "--save", str(tmp_path / name))
    assert "`--target` needs `--drafter`" in refusal_in_one_line(capsys, "demo", "--target", "demo")
    assert "no floating-point dtype" in refusal(capsys, "demo", "--dtype", "int8")
    assert "cannot be used here" in refusal(capsys, "demo", "--device", "nonsense")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_only_what_is_needed_of_the_bundled_pair_has_to_be_there(folders, file, monkeypatch, tmp_path, capsys):
    (tmp_path / "drafter").mkdir()
    for name in {"config.json", "model.safetensors"} - {file}:
        (tmp_path / "drafter" / name).write_bytes((folders[1] / name).read_bytes())
    monkeypatch.setitem(BUNDLED, "target", folders[0])
    monkeypatch.setitem(BUNDLED, "drafter", tmp_path / "drafter")
    alone = ["generate", "--target", "demo", "--device", "cpu", "--prompt", "x", "--max-new-tokens", "4", "--json"]
    assert main(alone) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 4
    needed = f"demo drafter is incomplete: this copy of the package came without demo/drafter/{file}. Install"
    for arguments in (["demo"], [*alone, "--drafter", "demo"]):
        message = refusal(capsys, *arguments)
        assert needed in message and "or name your own with --drafter" in message
    with pytest.raises(OSError, match="demo drafter is incomplete"):
        load_pair()
    monkeypatch.setitem(BUNDLED, "drafter", folders[1])
    monkeypatch.setitem(BUNDLED, "target", tmp_path / "drafter")
    assert f"demo target is incomplete: this copy of the package came without demo/target/{file}" in refusal(
        capsys, *alone
    )


def test_load_pair(bundled):
    target, drafter, processor = load_pair()
    assert target.dtype == drafter.dtype == torch.float32
    assert not target.training and not drafter.training
    assert processor.chat_template
