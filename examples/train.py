"""Train a drafter for a vision-language or text model and see what it gains. Public API only.

    python examples/train.py --target llava-hf/llava-v1.6-vicuna-7b-hf --train answers.jsonl --eval held_out.jsonl

Rows are lines of `{"messages": [...], "images": ["picture.png"]}`, their answers the target's own (`dream-hf regenerate`).
The same file runs on several devices: accelerate launch --config_file examples/accelerate/ddp.yaml examples/train.py ...
"""

import argparse

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from dream_hf import DreamDrafter, DreamTrainer, DreamTrainingArguments


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="folder or Hub id of the target")
    parser.add_argument(
        "--train", required=True, help="rows to train on: a .jsonl, .json or .parquet file, or a Hub id"
    )
    parser.add_argument("--eval", help="rows to measure simulated tau on")
    parser.add_argument("--output", default="dream-drafter")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch_size", type=int, default=1, help="rows per device")
    parser.add_argument("--learning_rate", type=float, default=3e-5)
    parser.add_argument("--rollout_steps", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    takes_images = AutoConfig.from_pretrained(options.target).model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    model_class = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
    target = model_class.from_pretrained(options.target, dtype="auto")
    processor = (AutoProcessor if takes_images else AutoTokenizer).from_pretrained(options.target)
    drafter = DreamDrafter.for_target(target)
    rhythm = "epoch" if options.eval else "no"
    args = DreamTrainingArguments(
        output_dir=options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=0.03,
        rollout_steps=options.rollout_steps,
        logging_steps=10,
        eval_strategy=rhythm,
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=bool(options.eval),
    )
    trainer = DreamTrainer(
        model=drafter,
        target=target,
        args=args,
        train_dataset=options.train,
        eval_dataset=options.eval,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    if options.eval:
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            print(f"simulated tau, bonus included: {metrics['eval_tau']:.2f}")


if __name__ == "__main__":
    main()
