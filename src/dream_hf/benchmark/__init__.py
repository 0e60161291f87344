"""Methods side by side on the same prompts -> results.json, a table and plots."""

from .methods import METHODS, Method, make_methods
from .run import run_benchmark
from .runner import Settings
from .tasks import Prompt, load_prompts
from .tuning.choice import Space
from .tuning.store import apply_tuning, save_tuned
from .tuning.tuner import tune

__all__ = [
    "METHODS",
    "Method",
    "Prompt",
    "Settings",
    "Space",
    "apply_tuning",
    "load_prompts",
    "make_methods",
    "run_benchmark",
    "save_tuned",
    "tune",
]
