"""Several questions at once: each row keeps as much of its own tree as the target agrees with.

python examples/batches.py
"""

from dream_hf.demo import TASKS, load_pair
from dream_hf.demo.pictures import bundled_picture

target, drafter, processor = load_pair()  # or a pair of your own, as in your_own_vlm.py
conversations = []
for picture, question in map(bundled_picture, TASKS):
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": question}]
    conversations.append([{"role": "user", "content": content}])
inputs = processor.apply_chat_template(
    conversations,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    processor_kwargs={"padding": True, "padding_side": "left"},
).to(target.device, target.dtype)

output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=256, return_dict_in_generate=True)
answers = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
for answer, gained in zip(answers, output.accepted_lengths.tolist(), strict=True):
    print(f"{answer}\n  [tokens gained by each step: {[number for number in gained if number > 0]}]\n")
