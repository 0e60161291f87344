"""DREAM's ablations (paper, tables 2 and 3, figure 4) at equal budgets: the same rows, steps, batches and seeds for each.

    python benchmarks/ablations.py benchmarks/recipes/ablations_demo.yaml --work WORK --output benchmarks/results/ablations_demo

Every variant of a recipe is trained from nothing and measured on held-out rows: tau, bonus included, of its tree and of its
chain by replaying the target's answers, and the time of `generate()` over plain decoding's on some of these rows.
Stopped, the same command goes on with the next variant; `--work` keeps what was trained. Tau's intervals are of the ratio to
the whole method on the same rows, by bootstrap over rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from ablation_variants import BASE, VARIANTS, Variant
from platforms import describe_platform
from transformers import set_seed

from dream_hf.benchmark.measure import measure as measure_call
from dream_hf.benchmark.methods import drafted, sampling
from dream_hf.benchmark.statistics import bootstrap_interval, ratio_of_totals
from dream_hf.benchmark.tasks import load_prompts
from dream_hf.data.prompts import PromptEncoder
from dream_hf.load_models import Models, load_models
from dream_hf.regeneration.journal import write_whole
from dream_hf.training.acceptance_metrics import AcceptanceCounts, replay_decoding
from dream_hf.training.arguments import DreamTrainingArguments
from dream_hf.training.run import NEW
from dream_hf.training.trainer import DreamTrainer

RECIPE_KEYS = {"target", "dtype", "train_dataset", "eval_dataset", "drafter_config", "arguments", "timed"}


def main() -> None:
    options = parse_options()
    recipe = read_recipe(options.recipe)
    names = options.variants or list(VARIANTS)
    if unknown := sorted(set(names) - set(VARIANTS)):
        raise SystemExit(f"`--variants` ({unknown}) must be out of {list(VARIANTS)}.")
    models = load_models(recipe["target"], dtype=recipe["dtype"], device=options.device)
    has_pictures = hasattr(models.target.config, "vision_config")
    names = [name for name in names if has_pictures or not VARIANTS[name].needs_pictures]
    results = begin(options.output / "results.json", recipe, options.device)
    for seed in options.seeds:
        for name in names:
            if str(seed) in results["variants"].setdefault(name, {}):
                continue
            print(f"{name}, seed {seed}", flush=True)
            results["variants"][name][str(seed)] = measure(models, recipe, name, seed, options.work)
            write_whole(options.output / "results.json", (json.dumps(results) + "\n").encode())
            write_whole(options.output / "results.md", table(results).encode())
    print(table(results))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path, help="what is trained on what, a YAML file of benchmarks/recipes")
    parser.add_argument("--output", type=Path, required=True, help="folder of results.json and results.md")
    parser.add_argument("--work", type=Path, required=True, help="folder for features and trained drafters")
    parser.add_argument("--variants", nargs="+", help="some of them; by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of training (default: 0)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    return parser.parse_args()


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe, checked; see `benchmarks/recipes`."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if set(recipe) != RECIPE_KEYS:
        raise SystemExit(f"{path} has {sorted(recipe)}; a recipe has {sorted(RECIPE_KEYS)}.")
    return recipe


def begin(path: Path, recipe: dict[str, Any], device: str) -> dict[str, Any]:
    """The results so far, or empty ones; other settings belong into another folder."""
    if path.is_file():
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["recipe"] != recipe:
            raise SystemExit(f"{path} was measured with another recipe; name another `--output`.")
        return results
    path.parent.mkdir(parents=True, exist_ok=True)
    return {"recipe": recipe, "platform": describe_platform(device), "variants": {}}


# -- one variant ------------------------------------------------------------------------------------------------------


def measure(models: Models, recipe: dict[str, Any], name: str, seed: int, work: Path) -> dict[str, Any]:
    """Train a variant and measure it."""
    trainer, seconds = train(models, recipe, VARIANTS[name], work, f"{name}_{seed}", seed)
    drafter: Any = trainer.model.eval()
    drafter.save_pretrained(work / f"{name}_{seed}")
    tree = drafter.config.tree_top_k, drafter.config.tree_size
    result = {
        "num_weights": sum(weight.numel() for weight in drafter.parameters()),
        "train_seconds": seconds,
        "loss": next(log["train_loss"] for log in reversed(trainer.state.log_history) if "train_loss" in log),
        "tree": replay(trainer, drafter),
    }
    drafter.config.tree_top_k, drafter.config.tree_size = 1, drafter.config.tree_depth
    result["chain"] = replay(trainer, drafter)
    drafter.config.tree_top_k, drafter.config.tree_size = tree
    result["timed"] = timed(models, drafter.to(models.target.dtype), recipe)
    return result


def train(
    models: Models, recipe: dict[str, Any], variant: Variant, work: Path, run: str, seed: int
) -> tuple[DreamTrainer, float]:
    """A variant's trainer at the end of its training, and the seconds that took, features not counted."""
    set_seed(seed)
    kind = NEW[variant.kind]
    config = {**recipe["drafter_config"], **variant.config}
    if variant.kind != "dream":  # the recipe's fields are DREAM's
        known = {each.name for each in fields(kind.config_class)}
        config = {key: value for key, value in config.items() if key in known}
    arguments = {**recipe["arguments"], **variant.arguments}
    args = DreamTrainingArguments(
        output_dir=str(work / run),
        feature_cache_dir=str(work / "features" / _features_of(variant)),
        seed=seed,
        use_cpu=models.target.device.type == "cpu",
        save_strategy="no",
        report_to="none",
        **arguments,
    )
    trainer = DreamTrainer(
        model=kind.for_target(models.target, **config).float(),
        target=models.target,
        args=args,
        train_dataset=recipe["train_dataset"],
        eval_dataset=recipe["eval_dataset"],
        processing_class=models.processor,
    )
    trainer.get_train_dataloader()  # makes the features
    started = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - started


def _features_of(variant: Variant) -> str:
    """A name for what a variant reads of the target; variants that read the same share a cache."""
    reads = [f"{key}={value}" for key, value in {**variant.config, **variant.arguments}.items()]
    kept = ("visual_", "feature_selection", "static_layer")
    return "-".join([variant.kind, *(each for each in reads if each.startswith(kept))])


@torch.no_grad()
def replay(trainer: DreamTrainer, drafter: Any) -> list[list[int]]:
    """For every held-out row the steps of decoding it anew and the tokens that they gained."""
    head = trainer.draft_head(drafter)
    gains: list[list[int]] = []
    for collated in trainer.get_eval_dataloader():
        inputs = trainer._prepare_inputs(collated)
        batch = trainer.extractor.drafter_batch(inputs, inputs.pop("answer_mask"))
        gains += replay_decoding(drafter, head, batch, AcceptanceCounts(drafter.config.tree_depth))
    return [[len(row), sum(row)] for row in gains]


def timed(models: Models, drafter: Any, recipe: dict[str, Any]) -> dict[str, list[Any]]:
    """Seconds of plain decoding and of decoding with a drafter, in turns, on some of the held-out rows."""
    plainly = {**sampling(0.0), "max_new_tokens": recipe["timed"]["max_new_tokens"]}
    with_drafter = {**plainly, **drafted(drafter)}
    encoder = PromptEncoder(models.processor)
    chosen = load_prompts(recipe["eval_dataset"], recipe["timed"]["rows"])
    prompts = [encoder.encode([(prompt.messages, prompt.images)]) for prompt in chosen]
    pairs = [
        [measure_call(models.target, inputs, arguments) for arguments in (plainly, with_drafter)]
        for inputs in (prompts[0], *prompts)  # the first one twice: what is made once is made
    ][1:]
    return {
        "plain_seconds": [plain.seconds for plain, _ in pairs],
        "seconds": [run.seconds for _, run in pairs],
        "is_same": [run.rows == plain.rows for plain, run in pairs],
    }


# -- the table --------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    recipe, platform, measured = results["recipe"], results["platform"], results["variants"]
    head = [
        "variant",
        "weights",
        "tau, tree",
        "over DREAM's (95%)",
        "paper",
        "tau, chain",
        "speedup",
        "over DREAM's",
        "paper",
    ]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    base = measured.get(BASE)
    for name, variant in VARIANTS.items():
        if runs := list(measured.get(name, {}).values()):
            lines.append(" | ".join(_row(variant, runs, list(base.values()) if base else None)))
    title = f"# Ablations: {Path(recipe['target']).name}\n\n"
    budget = ", ".join(f"{key} {value}" for key, value in recipe["arguments"].items())
    machine = ", ".join(f"{key} {value}" for key, value in platform.items())
    return f"{title}Every drafter: {budget}. {machine}.\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"


def _row(variant: Variant, runs: list[dict[str, Any]], base: list[dict[str, Any]] | None) -> list[str]:
    speed = _speedup(runs)
    cells = [variant.says, f"{runs[0]['num_weights'] / 1e6:.2f}M", f"{_tau(runs, 'tree'):.2f}"]
    if base is None:
        return [*cells, "", "", f"{_tau(runs, 'chain'):.2f}", f"{speed:.2f}x", "", ""]
    low, high = tau_ratio_interval(runs, base)
    paper = ("", "") if variant.paper is None else tuple(f"{value:.2f}" for value in reversed(variant.paper))
    cells += [f"{_tau(runs, 'tree') / _tau(base, 'tree'):.2f} ({low:.2f} to {high:.2f})", paper[0]]
    return [*cells, f"{_tau(runs, 'chain'):.2f}", f"{speed:.2f}x", f"{speed / _speedup(base):.2f}", paper[1]]


def _tau(runs: Sequence[dict[str, Any]], which: str) -> float:
    """Tokens a step over all rows and seeds."""
    steps, tokens = np.sum([run[which] for run in runs], axis=(0, 1))
    return float(tokens / steps)


def tau_ratio_interval(runs: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> list[float]:
    """Interval of a variant's tau over the base's: rows drawn anew, each with all of its seeds, the same for both."""
    steps = [np.sum([run["tree"] for run in each], axis=0)[:, 0] / len(each) for each in (base, runs)]
    return bootstrap_interval(ratio_of_totals, steps[0], steps[1]) or [float("nan")] * 2  # both gain the same tokens


def _speedup(runs: Sequence[dict[str, Any]]) -> float:
    plain, seconds = (sum(sum(run["timed"][name]) for run in runs) for name in ("plain_seconds", "seconds"))
    return plain / seconds


if __name__ == "__main__":
    main()
