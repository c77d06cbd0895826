"""The compiled kernels, or None where numba is not installed: the walks in torch give the same numbers, more slowly."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]  # flat; of bfloat16 and float16 their bits

kernels: Any = import_module("optimizer.merging.methods.kernels") if find_spec("numba") else None
