"""What a scanner does to every image: resolution, blur, noise, intensity window, gamma, colour."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage

from fedmerge.data.images import Images
from fedmerge.errors import DataError
from fedmerge.folder import Spec
from fedmerge.seeds import generator

CHUNK = 512
"""Images filtered at a time: bounds the float copies in memory."""

CT_WINDOW = (40.0, 400.0)
"""Level and width of the abdominal soft-tissue window, Hounsfield units."""

Gain = Annotated[float, Field(gt=0, le=4)]


class Scanner(Spec):
    """One scanner. Lengths are pixels of the image as the model sees it; the default takes images as they are."""

    window: tuple[float, float] | None = Field(
        None,
        description="level and width, in Hounsfield units for CT, in 0..1 for photographs; default: the whole range",
    )
    resolution: float = Field(1.0, gt=0.1, le=1, description="detector's resolution, as a share of the image's")
    blur: float = Field(0.0, ge=0, le=10, description="sigma of the point spread, pixels")
    noise: float = Field(0.0, ge=0, le=1, description="standard deviation of the noise, as a share of the window's width")
    grain: float = Field(0.0, ge=0, le=10, description="correlation length of the noise, pixels; 0 is white noise")
    gamma: float = Field(1.0, gt=0.1, le=10, description="exponent applied to windowed intensities in 0..1")
    tint: tuple[Gain, Gain, Gain] | None = Field(None, description="gains of red, green and blue")

    def scan(self, images: Images, owner: str, seed: int) -> Images:
        """The images as this scanner shows them, uint8. An image's noise depends on seed, owner and its position alone.

        Raises DataError if colour gains meet images of one channel.
        """
        if self.tint and images.pixels.shape[-1] != 3:
            raise DataError(f"site '{owner}': scanner.tint needs three channels; found {images.pixels.shape[-1]}")
        rng = generator(seed, "scanner", owner)
        level, width = self.window or _whole_range(images.pixels)
        taken = np.empty(images.pixels.shape, np.uint8)
        for start in range(0, len(images), CHUNK):
            raw = images.pixels[start : start + CHUNK].astype(np.float32)
            raw = raw / np.float32(255) if images.pixels.dtype == np.uint8 else raw
            x: NDArray[Any] = self._optics(raw) + width * self._noise(raw.shape, rng)
            x = np.clip((x - level) / width + 0.5, 0, 1) ** self.gamma
            x = np.clip(x * np.array(self.tint or (1.0,), np.float32), 0, 1)
            taken[start : start + CHUNK] = np.rint(x * 255).astype(np.uint8)
        return replace(images, pixels=taken)

    def _optics(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Lower resolution, then blur; x: (n, H, W, C)."""
        if self.resolution < 1:
            height, width = x.shape[1:3]
            small = ndimage.zoom(x, (1, self.resolution, self.resolution, 1), order=1, grid_mode=True, mode="nearest")
            back = (1, height / small.shape[1], width / small.shape[2], 1)
            x = ndimage.zoom(small, back, order=1, grid_mode=True, mode="nearest")
        if self.blur > 0:
            x = ndimage.gaussian_filter(x, (0, self.blur, self.blur, 0), mode="nearest")
        return x

    def _noise(self, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
        """Noise of standard deviation `noise`; the same in all channels when it has a grain, as in a grain of film."""
        if self.noise == 0:
            return np.float32(0)
        white = rng.standard_normal(shape, dtype=np.float32)
        if self.grain > 0:
            white = ndimage.gaussian_filter(white, (0, self.grain, self.grain, 0), mode="wrap")
            white *= 2 * self.grain * np.sqrt(np.pi)  # a Gaussian filter of sigma s divides the deviation by 2 s sqrt(pi)
        return white * np.float32(self.noise)


def _whole_range(pixels: NDArray[Any]) -> tuple[float, float]:
    return (0.5, 1.0) if pixels.dtype == np.uint8 else CT_WINDOW
