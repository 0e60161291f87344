"""Whether `speculators` makes of an exported EAGLE-3 drafter the logits that it has here, in two environments.

python benchmarks/export_check.py write OUT     # here: tiny drafters, exported, and what they say
pip install torch==2.13.0 speculators==0.9.0    # in an environment of its own, whose transformers is older
python benchmarks/export_check.py read OUT      # there: largest difference of the prompt's logits and of two levels below
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

NUM_LEVELS, LENGTH = 3, 40
SHAPES = {
    "plain": {},
    "norms of features": {"has_fc_norm": True, "norm_before_residual": True},
    "normed feedback": {"has_qk_norm": True, "is_feedback_normed": True},
    "biases": {"norm_before_fc": True, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "a head for all tokens": {"has_head": False},
}


def write(folder: Path) -> None:
    """Export a drafter of each shape, with its logits along a text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dream_hf import EagleDrafter, export_drafter
    from dream_hf.targets.target import Target
    from dream_hf.training.target_features import FeatureExtractor, LayerSelection
    from dream_hf.training.ways import PAIRS

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    target = LlamaForCausalLM(LlamaConfig(vocab_size=104, num_hidden_layers=4, **sizes)).eval()
    target.save_pretrained(folder / "target")
    target = LlamaForCausalLM.from_pretrained(folder / "target").eval()
    inputs, way, view = {"input_ids": torch.randint(0, 104, (1, LENGTH))}, PAIRS, Target(target)
    for name, shape in SHAPES.items():
        drafter = EagleDrafter.for_target(target, initializer_range=0.2, **shape)
        for key, weight in drafter.named_parameters():
            if "norm" in key or "bias" in key:
                weight.data.uniform_(0.5, 1.5)
        if shape.get("has_head", True):
            drafter.set_draft_vocabulary(range(3, 80, 2))
        export_drafter(drafter, folder / name, "speculators", target)
        extractor = FeatureExtractor(
            view, LayerSelection("none"), 1.0, layers=way.layers(drafter), has_placeholders=True
        )
        batch = extractor.drafter_batch(inputs, torch.ones(1, LENGTH, dtype=torch.bool))
        with torch.no_grad():
            logits = way.logits(drafter, view.draft_logits(drafter))
            said = [logits(step.hidden) for step in way.roll_out(drafter, batch, batch.text.features, NUM_LEVELS)]
        rows = way.rows(batch)
        torch.save({"features": rows.features, "ids": rows.token_ids, "said": said}, folder / name / "said.pt")


def read(folder: Path) -> None:
    """Compare with what `speculators` makes of the same features and tokens."""
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    for name in SHAPES:
        config = Eagle3SpeculatorConfig.from_pretrained(folder / name)
        config.transformer_layer_config._attn_implementation = "eager"
        model = Eagle3DraftModel.from_pretrained(folder / name, config=config).float().eval()
        written, made = torch.load(folder / name / "said.pt"), []
        model.lm_head.register_forward_hook(lambda module, given, output, made=made: made.append(output[0]))
        documents = torch.zeros_like(written["ids"])
        with torch.no_grad():
            model(written["features"], written["ids"], documents, ttt_steps=NUM_LEVELS)
        differences = [
            float((theirs[: len(ours)] - ours).abs().max()) for theirs, ours in zip(made, written["said"], strict=True)
        ]
        print(f"{name:24}", " ".join(f"{difference:.1e}" for difference in differences))


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("half", choices=["write", "read"], help="which half, see above")
    parser.add_argument("folder", type=Path, help="where the drafters lie")
    args = parser.parse_args()
    {"write": write, "read": read}[args.half](args.folder)


if __name__ == "__main__":
    main()
