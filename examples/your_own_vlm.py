"""Your own vision-language model, faster, with the same output.

    python examples/your_own_vlm.py TARGET DRAFTER one.png "What is to be seen?"

A drafter is whatever `dream_hf.load_drafter` reads: a folder or a Hub id (docs/drafters.md). Without one for your target put
`drafter = dream_hf.RetrievalDrafter()`, which needs no training.
"""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

import dream_hf

target_name, drafter_name, picture, question = sys.argv[1:]
target = AutoModelForImageTextToText.from_pretrained(target_name, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(target_name)
drafter = dream_hf.load_drafter(drafter_name, target)

content = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
messages = [{"role": "user", "content": content}]
options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, **options)
inputs = inputs.to(target.device, target.dtype)
output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=256)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
