"""Answers that a grammar allows, with a drafter and without: here JSON by a schema.

    pip install outlines-core
    python examples/constrained.py

The grammar becomes a `prefix_allowed_tokens_fn`; any other logits processor does as well. Each node of a draft tree is shown
its own prefix, and no prefix that plain decoding would not have reached, so the answers are the same.
"""

import json

import torch
from outlines_core import Index, Vocabulary
from outlines_core.json_schema import build_regex_from_schema

from dream_hf.demo import load_pair
from dream_hf.demo.pictures import bundled_picture

PLACE = {"type": "integer", "minimum": 1, "maximum": 4}
SHAPE = {
    "row": PLACE,
    "column": PLACE,
    "size": {"enum": ["small", "large"]},
    "color": {"enum": ["red", "green", "blue", "yellow", "black"]},
    "shape": {"enum": ["circle", "square", "triangle", "star"]},  # the picture's cross is none of these
}
SHAPES = {"type": "array", "items": {"type": "object", "properties": SHAPE, "required": list(SHAPE)}}
SCHEMA = {
    "type": "object",
    "properties": {"background": {"enum": ["white", "gray"]}, "shapes": SHAPES},
    "required": ["background", "shapes"],
}

target, drafter, processor = load_pair()  # or a pair of your own, as in your_own_vlm.py
tokenizer = processor.tokenizer
picture, question = bundled_picture("scene")
content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": question}]
messages = [{"role": "user", "content": content}]
options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, **options)
inputs = inputs.to(target.device, target.dtype)
prompt_length = inputs["input_ids"].shape[1]

vocabulary = Vocabulary(tokenizer.eos_token_id, {})
for token_id in set(range(len(tokenizer))) - set(tokenizer.all_special_ids):
    if "\N{REPLACEMENT CHARACTER}" not in (text := tokenizer.decode([token_id])):  # part of a character
        vocabulary.insert(text, token_id)
index = Index(build_regex_from_schema(json.dumps(SCHEMA)), vocabulary)


def allowed(_: int, ids: torch.Tensor) -> list[int]:
    """What the schema allows behind the answer in `ids`."""
    state = index.get_initial_state()
    for token_id in ids[prompt_length:].tolist():
        state = index.get_next_state(state, token_id)
    return index.get_allowed_tokens(state)


options = {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": 256}
plain = target.generate(**inputs, **options)
output = target.generate(**inputs, **options, assistant_model=drafter, return_dict_in_generate=True)
print(json.loads(processor.decode(output.sequences[0, prompt_length:], skip_special_tokens=True)))
print("the same tokens as plain decoding:", torch.equal(output.sequences, plain))
print("tokens gained by each step:", output.accepted_lengths[0].tolist())
