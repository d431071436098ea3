"""The values of an image's pixels: numbers that are brought to [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNREADABLE = "expected an undamaged image such as PNG, JPEG, TIFF or DICOM"

ValueRange = Sequence[float] | None  # the values that become 0 and 1


def require_finite(path: str | Path, values: NDArray[Any]) -> None:
    """Raises ValueError, which names the file, where not all values are finite."""
    if count := values.size - np.count_nonzero(np.isfinite(values)):
        raise ValueError(
            f"{path}: expected numbers, got {count} of {values.size} values that are infinite or not a number; "
            "replace those"
        )


def unit(values: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    """``low`` as 0, ``high`` as 1, and what lies beyond as these."""
    scaled = (values.astype(np.float32) - low) / max(high - low, 1e-6)
    return scaled.clip(0, 1)
