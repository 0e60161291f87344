"""The page of `dream-hf demo --web` as a Space on the Hub; other models by its variables TARGET and DRAFTER."""

import os

from dream_hf.load_models import DEMO, load_models
from dream_hf.page.app import launch, make_page

if __name__ == "__main__":
    target, drafter = os.environ.get("TARGET", DEMO), os.environ.get("DRAFTER", DEMO)
    is_demo = target == DEMO
    models = load_models(target, drafter, dtype="float32" if is_demo else "auto", device="cpu" if is_demo else None)
    launch(make_page(models, question="Describe the picture.", is_demo=is_demo))
