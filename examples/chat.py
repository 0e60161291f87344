"""A chat about a picture: each turn goes on from what the target and the drafter have read in those before.

python examples/chat.py one.png "What kind of chart is this?" "List the values of the chart." "Which value is the largest?"
"""

import sys

import torch

from dream_hf.compat import CACHE  # "cache", or "past_key_values" before transformers 5.24
from dream_hf.demo import load_pair

target, drafter, processor = load_pair()  # or a pair of your own, as in your_own_vlm.py
picture, *questions = sys.argv[1:]
messages, said, cache = [], torch.empty(1, 0, dtype=torch.long), None

for question in questions:
    content = [{"type": "text", "text": question}]
    messages.append(
        {"role": "user", "content": content if messages else [{"type": "image", "path": picture}, *content]}
    )
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(target.device, target.dtype)
    prompt = inputs["input_ids"]
    if cache is not None and torch.equal(prompt[:, : said.shape[1]], said):
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}  # the picture has been read
    else:
        cache = None  # the first turn, or a template that writes earlier turns in another way
    options = {CACHE: cache, "assistant_model": drafter, "max_new_tokens": 256, "return_dict_in_generate": True}
    output = target.generate(**inputs, **options)
    said, cache = output.sequences, output[CACHE]
    answer = processor.decode(said[0, prompt.shape[1] :], skip_special_tokens=True)
    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    print(f"{question}\n  {answer}\n  [{len(output.accepted_lengths[0])} steps]")
