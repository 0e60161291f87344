"""Methods side by side on the same prompts -> results.json, a table and plots."""

from .benchmark import run_benchmark
from .methods import METHODS, Method, make_methods
from .runner import Settings
from .tasks import Prompt, load_prompts
from .tune_choice import Space
from .tune_store import apply_tuning, save_tuned
from .tuner import tune

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
