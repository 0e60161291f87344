"""Write the README.md of every drafter planned here from its recipe.yaml, paper.json and the card template.

python model_cards/render.py
"""

import json
from pathlib import Path

from dream_hf.hub.card_content import CardContent, parse_recipe
from dream_hf.hub.model_card import render_card

HERE = Path(__file__).parent
MODEL_TYPES = {
    "llava-v1.6-vicuna-7b": "llava_next",
    "llava-v1.6-vicuna-13b": "llava_next",
    "pixtral-12b": "llava",
    "smolvlm-2b": "idefics3",
    "gemma-3-12b": "gemma3",
    "qwen2.5-vl-7b": "qwen2_5_vl",
    "qwen3-vl-8b": "qwen3_vl",
}


def render(name: str) -> str:
    """The card of `model_cards/<name>`."""
    recipe = (HERE / name / "recipe.yaml").read_text(encoding="utf-8")
    target = parse_recipe(recipe)["target"]
    return render_card(
        CardContent(
            target={"name": target, "model_type": MODEL_TYPES[name]},
            drafter=f"your-name/dream-{name}",
            recipe=recipe,
            paper=quote_paper(target),
        )
    )


def quote_paper(target: str) -> str:
    """The published figures of a target as the paper's, or that there are none."""
    paper = json.loads((HERE / "paper.json").read_text(encoding="utf-8"))
    rows = paper["targets"].get(target)
    if rows is None:
        return f"{paper['source']} has no figures for this target."
    lines = ["| method | speedup | tau, bonus included |", "| --- | --- | --- |"]
    lines += [f"| {method} | {row['speedup']:.2f} | {row['tau']:.2f} |" for method, row in rows.items()]
    return "\n".join(
        [
            f"Published by {paper['source']}: {paper['conditions']}. The authors measured them with their own code "
            "and weights; dream-hf has not repeated them.",
            "",
            *lines,
        ]
    )


if __name__ == "__main__":
    for card_name in MODEL_TYPES:
        (HERE / card_name / "README.md").write_text(render(card_name), encoding="utf-8")
        print(f"model_cards/{card_name}/README.md")
