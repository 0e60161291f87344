"""Values of a row as JSON would have them, whatever library handed the row out."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def as_python(value: Any) -> Any:
    """`value` with the arrays that pandas makes of lists turned back into lists, and its NaN for "missing" into `None`.

    Pictures as arrays of pixels (two dimensions and more, of numbers) stay as they are.
    """
    if isinstance(value, Mapping):
        return {key: as_python(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_python(item) for item in value]
    if isinstance(value, np.ndarray) and (value.dtype == object or value.ndim == 1):
        return [as_python(item) for item in value.tolist()]
    return None if isinstance(value, float) and math.isnan(value) else value
