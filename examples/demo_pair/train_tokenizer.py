"""Train the demo target's tokenizer on its own answers and save its processor: `python train_tokenizer.py --help`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from dream_hf.demo import TASKS, make_examples
from dream_hf.demo.canvas import IMAGE_SIZE, PATCH_SIZE

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>"]
# Words and single digits with the space before them, runs of punctuation: a number is always read digit by digit.
PIECES = r" ?[A-Za-z]+| ?\d| ?[^ A-Za-z\d]+| +"
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endgeneration %}{% else %}<|user|>\
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endif %}\
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def training_texts(num_rows: int) -> Iterator[str]:
    """Prompts and answers of the training split."""
    for task in TASKS:
        for kind in ("long", "short"):
            for example in make_examples(task, num_rows, seed=0, kind=kind):
                yield example.turn.prompt
                yield example.turn.answer


def train_tokenizer(num_rows: int, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(num_rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """A stock Llava processor; its image processor works with Pillow alone."""
    image_processor = SiglipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/processor"), help="folder to write the processor to")
    parser.add_argument("--num-rows", type=int, default=3000, help="rows per task and kind to train on")
    parser.add_argument(
        "--vocab-size", type=int, default=1600, help="number of tokens; at 1600 every word of the world is one"
    )
    args = parser.parse_args()
    tokenizer = train_tokenizer(args.num_rows, args.vocab_size)
    build_processor(tokenizer).save_pretrained(args.output)
    print(f"{len(tokenizer)} tokens, written to {args.output}")


if __name__ == "__main__":
    main()
