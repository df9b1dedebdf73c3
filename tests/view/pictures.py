"""What pictures show: the values and texts in their artists."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def new_axes() -> Axes:
    """Axes of a figure that pyplot does not keep."""
    return Figure().subplots()


def image_of(ax: Axes) -> np.ndarray:
    """The values of the only image, NaN where they are masked."""
    (image,) = ax.images
    return np.ma.filled(image.get_array().astype(float), np.nan)


def ticks_of(ax: Axes) -> list[str]:
    """The texts along x."""
    return [text.get_text() for text in ax.get_xticklabels()]


def points_of(ax: Axes, number: int = 0) -> np.ndarray:
    """The positions of the points of a scatter, (points, 2)."""
    return np.asarray(ax.collections[number].get_offsets())
