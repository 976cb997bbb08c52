"""What a scanner does to every image: resolution, blur, noise, intensity window, contrast, tone and color."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.ndimage import gaussian_filter

from fedmerge.data.cache import parts
from fedmerge.data.images import Images
from fedmerge.errors import DataError
from fedmerge.registry import Spec
from fedmerge.rng import generator

Float = NDArray[np.float32]

CT_WINDOW = (40.0, 400.0)
"""Level and width of the abdominal soft-tissue window, Hounsfield units."""

Gain = Annotated[float, Field(gt=0, le=4)]
Level = Annotated[float, Field(ge=-2000, le=4000)]
Width = Annotated[float, Field(ge=0.01, le=6000)]


class Scanner(Spec):
    """One scanner. Lengths are pixels of the image as the model sees it; the default takes images as they are."""

    resolution: float = Field(1.0, ge=0.1, le=1, description="resolution of the detector, as a share of the image's")
    blur: float = Field(0.0, ge=0, le=10, description="sigma of the point spread, in pixels")
    noise: float = Field(0.0, ge=0, le=1, description="standard deviation of the noise, as a share of the window's width")
    grain: float = Field(0.0, ge=0, le=10, description="correlation length of the noise, in pixels; 0 is white noise")
    window: tuple[Level, Width] | None = Field(
        None,
        description="level and width: Hounsfield units for CT (default 40, 400), 0 to 1 for photographs (default 0.5, 1)",
    )
    contrast: float = Field(1.0, ge=0.1, le=10, description="gain about middle gray")
    gamma: float = Field(1.0, ge=0.1, le=10, description="exponent applied to intensities in 0..1; above 1 is darker")
    tint: tuple[Gain, Gain, Gain] | None = Field(None, description="gains of red, green and blue; color images only")

    def scan(self, images: Images, owner: str, seed: int) -> Images:
        """The images as this scanner shows them, in memory: pixels (N, H, W, C) uint8, everything else unchanged.

        As of `begin`.
        """
        shown = self.begin(images, owner, seed)
        pixels = [shown(images.pixels[start:stop]) for start, stop in parts(images.pixels.shape)]
        return replace(images, pixels=np.concatenate(pixels) if pixels else images.pixels.astype(np.uint8))

    def begin(self, images: Images, owner: str, seed: int) -> Callable[[NDArray[Any]], NDArray[np.uint8]]:
        """What shows the next pixels (n, H, W, C) of the images, from the first on, as this scanner does: uint8.

        Pixels are int16 Hounsfield units (CT) or uint8 (photographs). Image i gets the i-th noise of (seed, owner), however
        many images there are. Raises DataError if color gains meet images of one channel, or for other pixels.
        """
        if self.tint is not None and images.pixels.shape[-1] != 3:
            told = (
                f"scanner.tint: found images of {images.pixels.shape[-1]} channel; expected 3 channels. "
                "Remove the tint, or give the model in_chans: 3"
            )
            raise DataError(f"site '{owner}': {told}", told)
        level, width = self._window(images.pixels.dtype, owner)
        rng = generator(seed, "scanner", owner)

        def shown(pixels: NDArray[Any]) -> NDArray[np.uint8]:
            x: Float = (pixels.astype(np.float32) - np.float32(level)) / np.float32(width)
            x = self._tone(self._exposure(x, rng) + np.float32(0.5))
            return np.rint(x * 255).astype(np.uint8)

        return shown

    def changes(self, images: Images) -> bool:
        """Whether images look different after it: the default shows those of 8 bits as they are."""
        return images.pixels.dtype != np.uint8 or self != Scanner()

    def _window(self, dtype: np.dtype[Any], owner: str) -> tuple[float, float]:
        """Level and width in the unit of the pixels: Hounsfield units, or 0 to 255."""
        if dtype == np.int16:
            return self.window or CT_WINDOW
        if dtype != np.uint8:
            told = f"found pixels of {dtype}; expected int16 (CT) or uint8 (photographs)"
            raise DataError(f"site '{owner}': {told}", told)
        level, width = self.window or (0.5, 1.0)
        return 255 * level, 255 * width

    def _exposure(self, x: Float, rng: np.random.Generator) -> Float:
        """Detector, point spread and noise, before the window cuts anything off. x: (n, H, W, C) in widths of the window."""
        if self.resolution < 1:
            x = resampled(x, self.resolution)
        if self.blur > 0:
            x = _smooth(x, self.blur)
        if self.noise > 0:
            x = x + np.float32(self.noise) * _texture(x.shape, self.grain, rng)
        return x

    def _tone(self, x: Float) -> Float:
        """The window's ends, contrast, tone curve and color gains; values in 0..1."""
        x = np.clip((np.clip(x, 0, 1) - 0.5) * np.float32(self.contrast) + 0.5, 0, 1)
        if self.gamma != 1:
            x = x ** np.float32(self.gamma)
        return x if self.tint is None else np.clip(x * np.array(self.tint, np.float32), 0, 1)


def _smooth(x: Float, sigma: float) -> Float:
    """Gaussian smoothing of every image and channel by itself; x: (n, H, W, C)."""
    smooth: Float = gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")
    return smooth


def _texture(shape: tuple[int, ...], grain: float, rng: np.random.Generator) -> Float:
    """Noise of standard deviation 1, correlated over `grain` pixels. shape: (n, H, W, C)."""
    white = rng.standard_normal(shape, dtype=np.float32)
    if grain == 0:
        return white
    # The filter's own weights tell by how much it lowers the deviation; one image's noise never depends on another's.
    side = 2 * int(4 * grain + 0.5) + 1
    impulse = np.zeros(side, np.float64)
    impulse[side // 2] = 1
    weights = gaussian_filter(impulse, grain, mode="constant")
    smooth: Float = gaussian_filter(white, (0, grain, grain, 0), mode="wrap")
    return smooth / np.float32(np.square(weights).sum())


def resampled(x: Float, share: float) -> Float:
    """Down to `share` of the pixels with antialiasing, and up again. x: (n, H, W, C)."""
    from torch import from_numpy
    from torch.nn.functional import interpolate

    size = x.shape[1:3]
    planes = from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    small = interpolate(planes, size=[max(1, round(share * side)) for side in size], mode="bilinear", antialias=True)
    large = interpolate(small, size=list(size), mode="bilinear", align_corners=False)
    return np.ascontiguousarray(large.numpy().transpose(0, 2, 3, 1))
