"""A user's own RGB-D picture: from a contact pixel to a point in metres, without the simulator.

python robomamba.py --image rgb.png --act "Open the drawer." --depth depth.png --intrinsics 615 615 320 240
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

MM_PER_M = 1000
HOLE = 2  # pixels: depth is the median of (2 HOLE + 1)^2 pixels, which bridges the holes that depth cameras leave


def read_depth(path: str | os.PathLike) -> np.ndarray:
    """Depth file -> (H, W) floats, metres along the camera's z; 0 or not finite where nothing was measured.

    Args     path: .npy of floats in metres, or a 16-bit grey PNG in millimetres (RealSense, Kinect).
    Raises   ValueError naming the file and what is wrong with it.
    """
    try:
        if Path(path).suffix == ".npy":
            depth = np.load(path, mmap_mode="r", allow_pickle=False)
            if depth.ndim != 2 or not np.issubdtype(depth.dtype, np.floating) or not depth.size:
                raise ValueError(f"expected floats (H, W) in metres, got {depth.dtype} {depth.shape}")
            return depth
        with Image.open(path) as picture:
            if picture.format != "PNG" or not picture.mode.startswith("I"):
                raise ValueError(f"expected a 16-bit grey PNG in millimetres, got {picture.format} {picture.mode}")
            return np.asarray(picture, np.float32) / MM_PER_M
    except (OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as depth ({error})") from None


def lift(u: float, v: float, side: int, depth: np.ndarray, intrinsics) -> np.ndarray:
    """Pixel (u, v) of the model's picture -> point (3,) in metres, camera frame: x right, y down, z forward.

    Args     u, v: column and row in the picture of `side` x `side` pixels that the model saw, centres at whole numbers.
             depth: as from `read_depth`; it shows what the picture shows, in any resolution.
             intrinsics: fx, fy, cx, cy in pixels of `depth`.
    Raises   ValueError for absurd intrinsics, and where nothing was measured near the pixel.
    """
    (fx, fy, cx, cy), (H, W) = intrinsics, depth.shape
    if not (np.isfinite([fx, fy, cx, cy]).all() and fx > 0 and fy > 0):
        raise ValueError(
            f"intrinsics {fx:g} {fy:g} {cx:g} {cy:g}: expected finite numbers of pixels, fx and fy above 0"
        )
    u, v = (u + 0.5) * W / side - 0.5, (v + 0.5) * H / side - 0.5
    column, row = min(max(round(u), 0), W - 1), min(max(round(v), 0), H - 1)
    near = np.array(depth[max(row - HOLE, 0) : row + HOLE + 1, max(column - HOLE, 0) : column + HOLE + 1], float)
    near = near[np.isfinite(near) & (near > 0)]
    if not len(near):
        raise ValueError(f"depth: nothing was measured within {HOLE} pixels of column {column}, row {row}")
    z = float(np.median(near))
    return np.array([(u - cx) / fx * z, (v - cy) / fy * z, z])
