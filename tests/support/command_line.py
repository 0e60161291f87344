"""Checks of what commands print."""

from tiny_pair import tiny_processor, tiny_target

from dream_hf.cli import main
from dream_hf.data.prompts import PromptEncoder


def refusal(capsys, *arguments):
    """What the command says when it refuses: the last line of standard error, and exit code 2."""
    try:
        code = main(list(arguments))
    except SystemExit as stop:  # argparse's own refusals
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in captured.err
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith(f"dream-hf {arguments[0]}: error: ")
    return message


def refusal_in_one_line(capsys, *arguments, is_last_line=False):
    """The same for a refusal that says nothing else, on either stream (libraries may, before it, with `is_last_line`)."""
    try:
        code = main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert code == 2 and captured.out == "" and (is_last_line or len(lines) == 1)
    assert lines[-1].startswith(f"dream-hf {arguments[0]}: error: ")
    return lines[-1]


def expected_answer(prompt, images, limit):
    target, encoder = tiny_target(), PromptEncoder(tiny_processor())
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
    inputs = encoder.encode([([{"role": "user", "content": content}], images)])
    output = target.generate(**inputs, do_sample=False, max_new_tokens=limit)
    return encoder.decode(output[0, inputs["input_ids"].shape[1] :].tolist())
