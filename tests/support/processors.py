"""Tiny stock processors, one per family: tokenizers trained in memory, PIL image processors, no network.

`make_processor(name)` returns a processor of the family's own class, with a chat template in the shape of the one
published for the family. Image sizes are small so that an image takes 4 to 40 tokens.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

CORPUS = [
    "A red circle is left of a blue square. The answer is yes, there are three shapes in the picture.",
    "What is in the image? Describe the second image too. How many triangles are green? Thanks!",
    "user: assistant: USER: ASSISTANT: User: Assistant: system You are a helpful assistant.",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 hello world, over and over again; a longer answer takes more tokens.",
]


def train_tokenizer(
    special: list[str], style: str = "byte", bos: str | None = None, **attributes: Any
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer over `CORPUS`, byte-level (Qwen, SmolLM) or, style "metaspace", like sentencepiece (Llama)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=style == "metaspace"))
    if style == "byte":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<pad>", "<s>", "</s>", *special]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=alphabet if style == "byte" else [],
        special_tokens=special if style == "byte" else [*special, *alphabet],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token=bos or "<s>", eos_token="</s>", **attributes
    )


# -- chat templates ---------------------------------------------------------------------------------------------------

# Marks the answers itself; one space ends every text and no end-of-sequence token is written.
VICUNA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def inst_template(image: str) -> str:
    """The [INST] form of Mistral's models: the answer follows the closing mark after a space."""
    return (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'][0]['text'] + '</s>' }}{% else %}{{ '[INST] ' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '" + image + "' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ ' [/INST]' }}{% endif %}{% endfor %}"
    )


IDEFICS_TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'].capitalize() }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def chatml_template(image: str) -> str:
    """The <|im_start|> form (Qwen-VL, InternVL, LLaVA-OneVision); text may be a string or a list of parts."""
    return (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' or 'image' in part %}"
        "{{ '" + image + "' }}{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


AYA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% else %}"
    "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<image>' }}{% endif %}{% endfor %}{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)

# -- families ---------------------------------------------------------------------------------------------------------


def without_videos(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The family's class minus one type check: video processors need torchvision, and no test here has a video."""

    class WithoutVideos(processor_class):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(argument)
            return super().check_argument_for_proper_class(argument_name, argument)

    WithoutVideos.__name__ = processor_class.__name__
    return WithoutVideos


def llava() -> ProcessorMixin:
    tokenizer = train_tokenizer(["<image>"], style="metaspace", bos="<s>")
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_TEMPLATE,
    )


def llava_pixtral() -> ProcessorMixin:
    tokenizer = train_tokenizer(["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"], bos="<s>")
    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    return transformers.PixtralProcessor(
        images, tokenizer, patch_size=14, chat_template="<s>" + inst_template("[IMG]")
    )


def mistral3() -> ProcessorMixin:
    tokenizer = train_tokenizer(["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"], bos="<s>")
    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    template = "<s>" + inst_template("[IMG]")
    return transformers.PixtralProcessor(
        images, tokenizer, patch_size=14, spatial_merge_size=2, chat_template=template
    )


def llava_next() -> ProcessorMixin:
    tokenizer = train_tokenizer(["<image>", "[INST]", "[/INST]"], style="metaspace", bos="<s>")
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    return transformers.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=inst_template("<image>\n"),
    )


def llava_onevision() -> ProcessorMixin:
    tokenizer = train_tokenizer(["<image>", "<video>", "<|im_start|>", "<|im_end|>"])
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]]
    )
    return without_videos(transformers.LlavaOnevisionProcessor)(
        images,
        tokenizer,
        None,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=chatml_template("<image>"),
    )


def idefics3() -> ProcessorMixin:
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    special += [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    images = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return transformers.Idefics3Processor(
        images, train_tokenizer(special, bos="<s>"), image_seq_len=4, chat_template=IDEFICS_TEMPLATE
    )


def smolvlm() -> ProcessorMixin:
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    special += [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    images = transformers.SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return without_videos(transformers.SmolVLMProcessor)(
        images, train_tokenizer(special, bos="<s>"), None, image_seq_len=4, chat_template=IDEFICS_TEMPLATE
    )


def gemma3() -> ProcessorMixin:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    special = ["<start_of_turn>", "<end_of_turn>", *named.values()]
    tokenizer = train_tokenizer(special, style="metaspace", bos="<s>", extra_special_tokens=named)
    images = transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return transformers.Gemma3Processor(images, tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=4)


def gemma4() -> ProcessorMixin:
    named = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "audio_token": "<|audio|>"}
    named |= {"boa_token": "<|audio>", "eoa_token": "<audio|>"}
    special = ["<start_of_turn>", "<end_of_turn>", *named.values()]
    tokenizer = train_tokenizer(special, style="metaspace", bos="<s>", extra_special_tokens=named)
    images = transformers.Gemma4ImageProcessorPil(patch_size=14, pooling_kernel_size=1)
    template = GEMMA_TEMPLATE.replace("<start_of_image>", "<|image|>")
    return without_videos(transformers.Gemma4Processor)(
        transformers.Gemma4AudioFeatureExtractor(), images, tokenizer, None, chat_template=template
    )


def qwen_vl(processor_class: type[ProcessorMixin]) -> ProcessorMixin:
    special = ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    images = transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 6)
    template = chatml_template("<|vision_start|><|image_pad|><|vision_end|>")
    return without_videos(processor_class)(images, train_tokenizer(special), None, chat_template=template)


def glm4v() -> ProcessorMixin:
    special = ["<|user|>", "<|assistant|>", "<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"]
    images = transformers.Glm4vImageProcessorPil(size={"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 12})
    template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '<|begin_of_image|><|image|><|end_of_image|>' }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    return without_videos(transformers.Glm4vProcessor)(images, train_tokenizer(special), None, chat_template=template)


def internvl() -> ProcessorMixin:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = train_tokenizer(["<|im_start|>", "<|im_end|>", *named.values()], extra_special_tokens=named)
    images = transformers.GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=3
    )
    template = chatml_template("<IMG_CONTEXT>\n")
    return without_videos(transformers.InternVLProcessor)(
        images, tokenizer, None, image_seq_length=4, chat_template=template
    )


def aya_vision() -> ProcessorMixin:
    special = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL"]
    special += ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"]
    images = transformers.GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=3
    )
    return transformers.AyaVisionProcessor(
        images, train_tokenizer(special, bos="<s>"), patch_size=14, img_size=28, chat_template=AYA_TEMPLATE
    )


@dataclass(frozen=True)
class ProcessorFamily:
    """A family's processor and the text that ends each of its answers (what the target generates to stop), if any."""

    name: str
    make: Callable[[], ProcessorMixin]
    end_of_answer: str = ""
    needs: str | None = None  # a package that the processor's module imports and this project does not need


PROCESSOR_FAMILIES = [
    ProcessorFamily("llava", llava),
    ProcessorFamily("llava_pixtral", llava_pixtral, "</s>", needs="torchvision"),
    ProcessorFamily("llava_next", llava_next, "</s>"),
    ProcessorFamily("llava_onevision", llava_onevision, "<|im_end|>"),
    ProcessorFamily("mistral3", mistral3, "</s>", needs="torchvision"),
    ProcessorFamily("idefics3", idefics3, "<end_of_utterance>"),
    ProcessorFamily("smolvlm", smolvlm, "<end_of_utterance>", needs="num2words"),
    ProcessorFamily("gemma3", gemma3, "<end_of_turn>"),
    ProcessorFamily("gemma4", gemma4, "<end_of_turn>"),
    ProcessorFamily("qwen2_vl", lambda: qwen_vl(transformers.Qwen2VLProcessor), "<|im_end|>"),
    ProcessorFamily("qwen2_5_vl", lambda: qwen_vl(transformers.Qwen2_5_VLProcessor), "<|im_end|>"),
    ProcessorFamily("qwen3_vl", lambda: qwen_vl(transformers.Qwen3VLProcessor), "<|im_end|>"),
    ProcessorFamily("glm4v", glm4v),
    ProcessorFamily("internvl", internvl, "<|im_end|>"),
    ProcessorFamily("aya_vision", aya_vision, "<|END_OF_TURN_TOKEN|>"),
]


@functools.cache
def make_processor(name: str) -> ProcessorMixin:
    """The processor of family `name`, built once."""
    return next(family for family in PROCESSOR_FAMILIES if family.name == name).make()


def make_image(width: int = 40, height: int = 30, color: str = "red") -> Image.Image:
    """A picture of one disc."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).ellipse((4, 4, width - 5, height - 5), fill=color)
    return image
