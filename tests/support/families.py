"""One tiny random-weight target per family, built from stock transformers classes, and inputs for it.

A family is a configuration plus the way its processor lays a picture out: placeholder tokens and tensors. Everything
else (weights, text, left padding, token types) is shared. Inputs are made row by row, each row from its own seed, so that
row `i` of a batch is exactly `make_rows(...)[i]` alone. To add a family, append one `Family(...)` to `FAMILIES`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import family_configs as configs
import hybrid_configs
import torch
import transformers
from double import doubled
from family_configs import BOS, BREAK, END, IMAGE, PAD, PLACEHOLDERS, START, TEXT_IDS, VIDEO
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

Inputs = dict[str, Any]  # tensors; Any, so that `generate(**inputs)` type-checks
Target = Any  # a PreTrainedModel that generates: transformers has no type for it


@dataclass(frozen=True)
class Visual:
    """A picture or a clip: its tokens in the prompt and its tensors, one entry per picture in the first dimension."""

    tokens: list[int]
    tensors: Inputs


DrawVisual = Callable[[int, torch.Generator], Visual]


@dataclass(frozen=True)
class Family:
    """A target family.

    Args:
        name: what tests print.
        make_config: the tiny configuration.
        draw_image: (position in the prompt, generator) -> picture; None for text-only families.
        draw_video: the same for a clip.
        token_types: name of the token-type input and the type of each placeholder (others are 0).
        visuals_at: text tokens before the first picture.
        pictures_axis: axis on which the pictures of one row are joined (rows are joined on axis 0).
        supports_no_image, supports_multi_image: which prompts the family takes.
        batch_is_exact: whether plain `generate()` gives a left-padded row the tokens it gives that row alone.
        supports_sdpa: whether the text model takes sdpa; where not, `make_target` gives it eager attention.
        note: why, where the answer to one of these is no.
    """

    name: str
    make_config: Callable[[], PreTrainedConfig]
    draw_image: DrawVisual | None = None
    draw_video: DrawVisual | None = None
    token_types: tuple[str, Mapping[int, int]] | None = None
    visuals_at: int = 3
    pictures_axis: int = 0
    supports_no_image: bool = True
    supports_multi_image: bool = True
    batch_is_exact: bool = True
    supports_sdpa: bool = True
    note: str = ""

    def __repr__(self) -> str:
        return self.name

    @property
    def takes_images(self) -> bool:
        return self.draw_image is not None

    def make_target(
        self, seed: int = 0, attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float64
    ) -> Target:
        """Build the target in eval mode, without an end-of-sequence token; the global random state is left alone.

        In float64 no tie between tokens hides behind rounding; the weights are those of float32.
        `attn_implementation="sdpa"` is transformers' default: sdpa in every part of the model that supports it.
        """
        config = self.make_config()
        model_class = getattr(transformers, _architecture(config))
        is_double = dtype == torch.float64
        choice = None if attn_implementation == "sdpa" else attn_implementation
        seed = zlib.crc32(f"{self.name} {seed}".encode())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built_in = torch.float32 if is_double else dtype  # random numbers of float64 would be others
            target = model_class._from_config(config, attn_implementation=choice, dtype=built_in)
        if is_double and hasattr(target, "set_experts_implementation"):
            target.set_experts_implementation("eager")  # the grouped product of others takes no float64
        _redraw_weights(target, torch.Generator().manual_seed(seed))
        _quieten_placeholders(target)
        target.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=None, pad_token_id=PAD)
        return (doubled(target) if is_double else target).requires_grad_(False).eval()

    def make_rows(
        self,
        target: Target,
        batch_size: int = 1,
        images: int | Sequence[int] = 1,
        text_len: int = 12,
        seed: int = 0,
        videos: int = 0,
    ) -> list[Inputs]:
        """Make the rows of `make_inputs` one by one, unpadded: the same prompts with a batch size of 1."""
        if isinstance(images, int):
            images = [images if self.takes_images else 0] * batch_size
        rows = []
        for row, num_images in enumerate(images):
            generator = torch.Generator().manual_seed(1000 * seed + row)
            draws = [self.draw_image] * num_images + [self.draw_video] * videos
            visuals = [draw(index, generator) for index, draw in enumerate(draws) if draw is not None]
            if len(visuals) < len(draws):
                raise ValueError(f"family {self.name!r} takes no such visual: images={num_images}, videos={videos}")
            length = max(2, text_len - 3 * (row % 4))
            rows.append(self._make_row(visuals, length, generator, target.dtype))
        return rows

    def make_inputs(
        self,
        target: Target,
        batch_size: int = 1,
        images: int | Sequence[int] = 1,
        text_len: int = 12,
        seed: int = 0,
        videos: int = 0,
    ) -> Inputs:
        """Make ready keyword arguments of `target.generate`, what the family's processor would return.

        Args:
            batch_size: rows; row i has `text_len - 3 * (i % 4)` text tokens, so a batch is ragged and left-padded.
            images: pictures per prompt, one number or one per row.
            text_len: text tokens of the first row, BOS included.
        """
        return self.collate(self.make_rows(target, batch_size, images, text_len, seed, videos))

    @property
    def make_video_inputs(self) -> Callable[..., Inputs] | None:
        """`make_inputs` with one clip and no picture per prompt; None where the family has no easy clip."""
        if self.draw_video is None:
            return None

        def make(target: Target, batch_size: int = 1, text_len: int = 12, seed: int = 0) -> Inputs:
            return self.make_inputs(target, batch_size, images=0, text_len=text_len, seed=seed, videos=1)

        return make

    def collate(self, rows: list[Inputs]) -> Inputs:
        """Left-pad the text of single-row inputs and join their pictures."""
        length = max(row["input_ids"].shape[1] for row in rows)
        text_names = {"input_ids", "attention_mask", *([self.token_types[0]] if self.token_types else [])}
        batch: Inputs = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row[name] for row in rows if name in row]
            if name in text_names:
                values = [nn.functional.pad(value, (length - value.shape[1], 0), value=PAD) for value in values]
            elif self.pictures_axis == 1:
                values = _pad_pictures(values)
            batch[name] = torch.cat(values)
        return batch

    def _make_row(
        self, visuals: list[Visual], text_len: int, generator: torch.Generator, dtype: torch.dtype
    ) -> Inputs:
        text = [BOS, *torch.randint(*TEXT_IDS, (text_len - 1,), generator=generator).tolist()]
        tokens = [token for visual in visuals for token in visual.tokens]
        ids = torch.tensor([[*text[: self.visuals_at], *tokens, *text[self.visuals_at :]]])
        row: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.token_types is not None:
            name, types = self.token_types
            row[name] = torch.tensor([[types.get(token, 0) for token in ids[0].tolist()]])
        for name in dict.fromkeys(name for visual in visuals for name in visual.tensors):
            value = torch.cat([v.tensors[name] for v in visuals if name in v.tensors], dim=self.pictures_axis)
            row[name] = value.to(dtype) if value.is_floating_point() else value
        return row


def _architecture(config: PreTrainedConfig) -> str:
    mapping = transformers.models.auto.modeling_auto
    names = mapping.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | mapping.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return names[config.model_type]


def _pad_pictures(values: list[Tensor]) -> list[Tensor]:
    """Pad (1, pictures, ...) tensors with all-zero pictures, which Idefics3 and SmolVLM skip."""
    most = max(value.shape[1] for value in values)
    return [torch.cat([v, v.new_zeros(1, most - v.shape[1], *v.shape[2:])], dim=1) for v in values]


@torch.no_grad()
def _redraw_weights(target: Target, generator: torch.Generator) -> None:
    """Draw weights with far more spread than a usual initialisation, so that tokens vary and logits are well apart."""
    embeddings = {id(module.weight) for module in target.modules() if isinstance(module, nn.Embedding)}
    head = target.get_output_embeddings().weight
    is_tied = head is target.get_input_embeddings().weight
    for name, parameter in target.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter is head and is_tied:
            # A large tied embedding would make every token predict itself; the final norm makes up for a small one.
            parameter.copy_(0.03 * noise)
        elif parameter is head or id(parameter) in embeddings:
            parameter.copy_(0.5 * noise)
        elif parameter.ndim < 2:
            parameter.add_((0.1 * noise).to(parameter.dtype))
        else:
            fan_in = parameter[0].numel() if name.endswith("weight") else parameter.shape[-2]
            parameter.copy_(2.0 * noise / fan_in**0.5)
    if is_tied:
        target.get_decoder().norm.weight.add_(15.0)


@torch.no_grad()
def _quieten_placeholders(target: Target) -> None:
    """Shrink the head's rows of placeholder tokens: a real target does not write them, and a picture cannot be made of one."""
    target.get_output_embeddings().weight[list(PLACEHOLDERS)] *= 0.01


# --- what pictures look like -----------------------------------------------------------------------------------------


def _square(
    size: int, num_tokens: int, before: Sequence[int] = (), after: Sequence[int] = (), masked: bool = False
) -> DrawVisual:
    """Pictures of one fixed size; `masked` adds Idefics3's axis of pictures and its pixel mask."""

    def draw(index: int, generator: torch.Generator) -> Visual:
        tensors = {"pixel_values": torch.randn(1, 3, size, size, generator=generator)}
        if masked:
            tensors = {"pixel_values": tensors["pixel_values"][None]}
            tensors["pixel_attention_mask"] = torch.ones(1, 1, size, size, dtype=torch.long)
        return Visual([*before, *[IMAGE] * num_tokens, *after], tensors)

    return draw


def _rows_of_patches(patch_size: int) -> DrawVisual:
    """Pixtral: pictures of differing sizes on one canvas, a break after each row of patches."""

    def draw(index: int, generator: torch.Generator) -> Visual:
        height, width = [(16, 24), (24, 16)][index % 2]
        pixels = torch.zeros(1, 3, 32, 32)
        pixels[..., :height, :width] = torch.randn(3, height, width, generator=generator)
        tokens = [*[IMAGE] * (width // patch_size), BREAK] * (height // patch_size)
        return Visual([*tokens[:-1], END], {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])})

    return draw


def _anyres(index: int, generator: torch.Generator) -> Visual:
    """LLaVA-NeXT: an overview and two tiles of 2x2 patches, a newline after each row of the joined tiles."""
    height, width = [(16, 32), (32, 16)][index % 2]
    num_tokens = 4 + (height // 8) * (width // 8 + 1)
    pixels = torch.randn(1, 3, 3, 16, 16, generator=generator)
    return Visual([IMAGE] * num_tokens, {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])})


def _anyres_video(index: int, generator: torch.Generator) -> Visual:
    """LLaVA-OneVision: each frame pooled to one token, and one newline for the clip."""
    return Visual([VIDEO] * 4, {"pixel_values_videos": torch.randn(1, 3, 3, 16, 16, generator=generator)})


def _positioned_patches(index: int, generator: torch.Generator) -> Visual:
    """Gemma4: flat patches with their (x, y); the smaller of two pictures is padded; 2x2 patches share a token."""
    width, height = [(8, 4), (4, 4)][index % 2]
    positions = torch.full((1, 32, 2), -1)
    positions[0, : width * height] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
    pixels = torch.zeros(1, 32, 3 * 4 * 4)
    pixels[0, : width * height] = torch.rand(width * height, 3 * 4 * 4, generator=generator)
    tokens = [START, *[IMAGE] * (width * height // 4), END]
    return Visual(tokens, {"pixel_values": pixels, "image_position_ids": positions})


def _grid_image(index: int, generator: torch.Generator) -> Visual:
    """Qwen-VL and GLM-4V: flat patches (two copies of the frame) and their grid; 2x2 patches share a token."""
    grid = torch.tensor([[(1, 8, 8), (1, 4, 8)][index % 2]])
    patches = torch.randn(int(grid.prod()), 3 * 2 * 4 * 4, generator=generator)
    return Visual([START, *[IMAGE] * (len(patches) // 4), END], {"pixel_values": patches, "image_grid_thw": grid})


def _grid_video(frames_apart: bool) -> DrawVisual:
    """Qwen-VL: a clip of three pairs of frames; Qwen3-VL writes them apart, each after a timestamp (one token here)."""

    def draw(index: int, generator: torch.Generator) -> Visual:
        grid = torch.tensor([[3, 4, 4]])
        patches = torch.randn(int(grid.prod()), 3 * 2 * 4 * 4, generator=generator)
        tokens = [START, *[VIDEO] * 12, END]
        if frames_apart:
            tokens = [token for time in (10, 20, 30) for token in (time, START, *[VIDEO] * 4, END)]
        return Visual(tokens, {"pixel_values_videos": patches, "video_grid_thw": grid})

    return draw


def _shaped_patches(index: int, generator: torch.Generator) -> Visual:
    """LFM2-VL: flat patches, their grid and mask; 2x2 patches share a token."""
    tensors = {
        "pixel_values": torch.randn(1, 64, 3 * 4 * 4, generator=generator),
        "spatial_shapes": torch.tensor([[8, 8]]),
        "pixel_attention_mask": torch.ones(1, 64, dtype=torch.long),
    }
    return Visual([START, *[IMAGE] * 16, END], tensors)


GRID: dict[str, Any] = {"draw_image": _grid_image, "token_types": ("mm_token_type_ids", {IMAGE: 1, VIDEO: 2})}
FRAMED = _square(32, 16, before=[START], after=[END])
IDEFICS: dict[str, Any] = {
    "draw_image": _square(32, 16, before=[START, BREAK], after=[START], masked=True),
    "pictures_axis": 1,
}
PALIGEMMA: dict[str, Any] = {"draw_image": _square(16, 16), "visuals_at": 0, "token_types": ("token_type_ids", {})}
EAGER: dict[str, Any] = {
    "supports_sdpa": False,
    "note": "transformers' Gemma2 refuses sdpa, which cannot cap attention scores",
}
GEMMA4: dict[str, Any] = {
    "draw_image": _positioned_patches,
    "token_types": ("mm_token_type_ids", {IMAGE: 1, VIDEO: 2}),
}

LLAMA4_PICTURE = FRAMED if configs.LLAMA4_TAKES_PICTURES else None
FAMILIES: list[Family] = [
    Family("llava_clip_llama", configs.llava_clip_llama, _square(16, 16)),
    Family("llava_pixtral_mistral", configs.llava_pixtral_mistral, _rows_of_patches(4)),
    Family("llava_next", configs.llava_next, _anyres),
    Family("llava_onevision", configs.llava_onevision, _anyres, _anyres_video),
    Family("mistral3", configs.mistral3, _rows_of_patches(8)),
    Family("idefics3", configs.idefics3, **IDEFICS),
    Family("smolvlm", configs.smolvlm, **IDEFICS),
    Family("gemma3", configs.gemma3, FRAMED, token_types=("token_type_ids", {IMAGE: 1})),
    Family("gemma4", configs.gemma4, **GEMMA4),
    Family("gemma4_shared", configs.gemma4_shared, **GEMMA4),
    Family("paligemma", configs.paligemma, **PALIGEMMA),
    Family("paligemma2", configs.paligemma2, **PALIGEMMA, **EAGER),
    Family("qwen2_vl", configs.qwen2_vl, draw_video=_grid_video(False), **GRID),
    Family("qwen2_vl_sliding", configs.qwen2_vl_sliding, draw_video=_grid_video(False), **GRID),
    Family("qwen2_5_vl", configs.qwen2_5_vl, draw_video=_grid_video(False), **GRID),
    Family("qwen3_vl", configs.qwen3_vl, draw_video=_grid_video(True), **GRID),
    Family("glm4v", configs.glm4v, **GRID),
    Family("internvl", configs.internvl, FRAMED),
    Family("aya_vision", configs.aya_vision, FRAMED),
    Family("llama4", configs.llama4, LLAMA4_PICTURE),
    Family("llama", configs.llama),
    Family("gemma2", configs.gemma2, **EAGER),
    Family("cohere", configs.cohere),
]

# Families whose own padded batches are not exact, kept apart from FAMILIES.
INEXACT: list[Family] = [
    Family(
        "llama4_scaled", configs.llama4_scaled, LLAMA4_PICTURE, batch_is_exact=False,
        note="Llama4 scales the queries of layers without positions by cache slot, not by position_ids, so padding"
        " changes the scale once a slot passes `floor_scale` (8192 in real models, 16 here).",
    ),
]  # fmt: skip

# Families whose layers keep a state.
HYBRIDS: list[Family] = [
    Family("qwen3_5", hybrid_configs.qwen3_5, draw_video=_grid_video(True), **GRID),
    Family("qwen3_5_moe", hybrid_configs.qwen3_5_moe, **GRID),
    Family("qwen3_next", hybrid_configs.qwen3_next),
    Family("olmo_hybrid", hybrid_configs.olmo_hybrid),
    Family("kimi_linear", hybrid_configs.kimi_linear),
    Family("lfm2_vl", hybrid_configs.lfm2_vl, _shaped_patches),
    Family("lfm2", hybrid_configs.lfm2),
    Family("lfm2_moe", hybrid_configs.lfm2_moe),
    Family("bamba", hybrid_configs.bamba),
    Family("falcon_h1", hybrid_configs.falcon_h1),
    Family("granite_hybrid", hybrid_configs.granite_hybrid),
    Family("nemotron_h", hybrid_configs.nemotron_h),
    Family("zamba2", hybrid_configs.zamba2),
    Family("jamba", hybrid_configs.jamba),
    Family("zamba", hybrid_configs.zamba),
]

REFUSED: list[Family] = [
    Family("mamba2", hybrid_configs.mamba2),
]


def family(name: str) -> Family:
    """Look a family up by name, in all three lists."""
    families = {candidate.name: candidate for candidate in FAMILIES + HYBRIDS + INEXACT + REFUSED}
    if name not in families:
        raise KeyError(f"no family {name!r}; there are {list(families)}")
    return families[name]
