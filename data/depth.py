"""Depth pictures: reading, resampling, input channels for the ViT, a simulated real camera, refining a contact.

    depth file --read_depth--> depth (H, W) --lift(u, v)--> a point in metres
                                  '--resample--> (S, S) --geometry--> (4, S, S): relative depth and normals, for the ViT
                                                    '--refine(u, v, approach)--> a better contact nearby, no training

Depth is metres along the camera's z; 0 or not finite where nothing was measured. Camera frame: x right, y down,
z forward. Intrinsics are (fx, fy, cx, cy) in pixels, with pixel centres at whole numbers.

`camera_depth` errs as structured-light and stereo cameras do: noise that grows with z^2 (Khoshelham and Elberink 2012:
1.425 mm x (z / 1 m)^2 for the first Kinect), rounding to millimetres, and at a jump either side's depth or none.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image

MM_PER_M = 1000
HOLE = 2  # pixels: `lift` takes the median of (2 HOLE + 1)^2 pixels, which bridges the holes that depth cameras leave
UNIT_M, CLIP = 0.3, 3.0  # scale and clipping of the relative depth
JUMP = 0.03  # share of the depth: neighbours that differ by more lie on different surfaces
NOISE = 0.0015  # camera_depth: standard deviation in metres at 1 m, grows with z^2
HOLES, HOLE_SIDE = 4, 0.03  # up to HOLES blobs, each with a radius up to HOLE_SIDE of the side
EDGE_MIXED, EDGE_LOST = 0.5, 0.2  # shares of the pixels beside a jump that see a random neighbour's depth, or nothing
SIDE, SIGMA, FLAT_REACH, POWER = 128, 7.0, 4, 6  # of `refine`, tuned on validation scenes; in pixels at side SIDE
FLAT_M = 0.002  # flat: up to this far off the plane, plus one standard deviation of the camera's noise there


def read_depth(path: str | Path) -> np.ndarray:
    """.npy in metres or 16-bit grey PNG in millimetres -> (H, W) floats, metres. Raises: ValueError naming the file."""
    try:
        if Path(path).suffix == ".npy":
            depth = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(depth, np.ndarray) or depth.ndim != 2 or depth.dtype.kind != "f" or not depth.size:
                got = f"{depth.dtype} {depth.shape}" if isinstance(depth, np.ndarray) else "an .npz archive"
                raise ValueError(f"expected floats (H, W) in metres, got {got}")
            return depth
        with Image.open(path) as picture:
            if picture.format != "PNG" or not picture.mode.startswith("I"):
                raise ValueError(f"expected a 16-bit grey PNG in millimetres, got {picture.format} {picture.mode}")
            return np.asarray(picture, np.float32) / MM_PER_M
    except Exception as error:  # numpy and Pillow raise a dozen exception types for damaged files
        raise ValueError(f"{path}: cannot be read as depth ({error})") from None


def check_intrinsics(intrinsics) -> tuple[float, float, float, float]:
    """Raises: ValueError unless fx, fy, cx, cy are finite numbers, fx and fy at least 0.001 pixels."""
    values = tuple(float(value) for value in intrinsics)
    if len(values) != 4 or not np.isfinite(values).all() or min(values[:2]) < 1e-3:
        raise ValueError(f"intrinsics {values}: expected finite numbers, fx fy cx cy in pixels, fx and fy above 0.001")
    return values


def lift(u: float, v: float, side: int, depth: np.ndarray, intrinsics) -> np.ndarray:
    """Pixel (u, v) of the model's picture of `side` x `side` pixels -> point (3,) in metres, camera frame.

    depth (H, W), intrinsics: of the same view, at any resolution. ValueError for absurd intrinsics or no depth nearby.
    """
    fx, fy, cx, cy = check_intrinsics(intrinsics)
    H, W = depth.shape
    u, v = (u + 0.5) * W / side - 0.5, (v + 0.5) * H / side - 0.5
    row, column = (min(max(round(at), 0), last - 1) for at, last in ((v, H), (u, W)))
    near = np.array(depth[max(row - HOLE, 0) : row + HOLE + 1, max(column - HOLE, 0) : column + HOLE + 1], float)
    near = near[np.isfinite(near) & (near > 0)]
    if not near.size:
        raise ValueError(f"depth: nothing was measured within {HOLE} pixels of column {column}, row {row}")
    point = np.array([(u - cx) / fx, (v - cy) / fy, 1]) * np.median(near)
    if not np.isfinite(point).all():
        raise ValueError(f"intrinsics {fx:g} {fy:g} {cx:g} {cy:g}: pixel {u:g}, {v:g} has no finite point")
    return point


def resample(depth: np.ndarray, intrinsics, side: int) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Depth (H, W) and its intrinsics -> (depth (side, side) float32, intrinsics) of the model's square picture.

    Nearest neighbour, since the mean of two depths is a surface that does not exist; non-finite values become 0.
    """
    fx, fy, cx, cy = check_intrinsics(intrinsics)
    H, W = depth.shape
    middles = (np.arange(side) + 0.5) / side
    square = depth[(middles * H).astype(int)[:, None], (middles * W).astype(int)[None, :]].astype(np.float32)
    square[~np.isfinite(square) | (square < 0)] = 0
    x, y = side / W, side / H
    return square, (fx * x, fy * y, (cx + 0.5) * x - 0.5, (cy + 0.5) * y - 0.5)


def windows(picture: np.ndarray, reach: int, mode: str = "constant") -> np.ndarray:
    """Picture (H, W) -> (H, W, (2 reach + 1)^2): the neighbours of each pixel, row by row; 0 off the picture."""
    view = np.lib.stride_tricks.sliding_window_view(np.pad(picture, reach, mode), (2 * reach + 1,) * 2)
    return view.reshape(*picture.shape, -1)


def normals(depth: np.ndarray, intrinsics, reach: int = 2) -> np.ndarray:
    """Depth (H, W) -> unit normals (H, W, 3) float32, camera frame, facing the camera (n . X < 0); 0 where unknown.

    With x = (u - cx) / fx and y = (v - cy) / fy a plane n . X = k is 1 / z = (n / k) . (x, y, 1): linear in the pixel.
    A least-squares linear fit to 1 / z in the 5 x 5 window (ignoring pixels across a jump in depth) gives n. Median
    error on validation objects seen by `camera_depth`: 5 degrees; 9 with a 3 x 3 window.
    """
    fx, fy, cx, cy = check_intrinsics(intrinsics)
    measured = np.isfinite(depth) & (depth > 0)
    inverse = np.where(measured, 1 / np.where(measured, depth, 1), 0).astype(np.float32)
    rows, columns = np.nonzero(measured)  # M pixels: most of a picture is background
    middle = inverse[measured]
    difference = windows(inverse, reach)[measured].reshape(len(middle), (2 * reach + 1) ** 2) - middle[:, None]
    near = (np.abs(difference) < JUMP * middle[:, None]).astype(np.float32)
    j, i = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).astype(np.float32)
    n, si, sj, sii, sij, sjj = (near @ np.stack([i**0, i, j, i * i, i * j, j * j], 1)).T
    sd, sdi, sdj = (difference * near @ np.stack([i**0, i, j], 1)).T
    n = np.maximum(n, 1)
    ii, ij, jj = sii - si * si / n, sij - si * sj / n, sjj - sj * sj / n
    di, dj = sdi - si * sd / n, sdj - sj * sd / n
    determinant = ii * jj - ij * ij
    known = determinant > 0.5  # pixels not all in one line; three adjacent ones in an L are too few
    determinant[~known] = 1
    a, b = fx * (jj * di - ij * dj) / determinant, fy * (ii * dj - ij * di) / determinant
    c = middle - a * (columns - cx) / fx - b * (rows - cy) / fy
    normal = np.zeros((*depth.shape, 3), np.float32)
    normal[measured] = -np.stack([a, b, c], -1) * known[:, None]
    return normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), np.float32(1e-12))


def geometry(depth: np.ndarray, intrinsics) -> np.ndarray:
    """(.., S, S) -> (.., 4, S, S) float32 for the ViT: (depth - mean) / UNIT_M within +-CLIP, `normals`; 0: unknown."""
    if depth.ndim > 2:  # one by one: twice as fast as all at once, because a picture fits the processor's cache
        return np.stack([geometry(picture, intrinsics) for picture in depth])
    measured = np.isfinite(depth) & (depth > 0)
    metres = np.where(measured, depth, 0).astype(np.float32)
    relative = np.where(measured, (metres - metres.sum() / max(measured.sum(), 1)) / UNIT_M, 0).clip(-CLIP, CLIP)
    return np.stack([relative, *np.moveaxis(normals(metres, intrinsics), -1, 0)]).astype(np.float32)


def camera_depth(depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Perfect depth (S, S), metres -> a camera's, float32, 0 = none: noise, round holes, ragged edges at jumps."""
    S = len(depth)
    exact = np.where(np.isfinite(depth), depth, 0).astype(np.float32)
    around = windows(exact, 1, "edge")
    edge = np.ptp(around, -1) > JUMP * around.max(-1)
    neighbour = np.take_along_axis(around, rng.integers(9, size=(S, S, 1)), -1)[..., 0]
    seen = np.where(edge & (rng.random((S, S)) < EDGE_MIXED), neighbour, exact)
    seen[edge & (rng.random((S, S)) < EDGE_LOST)] = 0
    for _ in range(rng.integers(HOLES + 1)):
        away = np.hypot(*(np.indices((S, S)) - rng.uniform(0, S, (2, 1, 1))))
        seen[away < rng.uniform(0, HOLE_SIDE * S)] = 0
    noisy = seen + NOISE * seen**2 * rng.standard_normal(exact.shape)
    return (np.round(noisy * MM_PER_M) / MM_PER_M).astype(np.float32)


def refine(u: float, v: float, approach, depth: np.ndarray, intrinsics, turn: float = 180.0) -> tuple:
    """Find a contact near the predicted one that suits a suction cup, from the depth picture alone: no training.

    The pixel with the highest exp(-distance^2 / (2 SIGMA^2)) x flatness x max(0, cos(approach, -normal))^POWER, where
    flatness is the share of the 9 x 9 pixels around it within FLAT_M + NOISE z^2 of the plane through it. The new
    approach goes perpendicularly into the plane fitted to those pixels.
    u, v: pixel of `depth` (S, S), see `resample`. approach: unit (3,), camera frame, or None to ignore it.
    turn: degrees; the contact is rejected if its approach differs from the predicted one by more than this.
    Returns (u, v, approach), unchanged if nothing was found or the contact was rejected.
    """
    fx, fy, cx, cy = check_intrinsics(intrinsics)
    S = len(depth)
    depth = np.where(np.isfinite(depth), depth, 0)
    normal = np.moveaxis(normals(depth, intrinsics, reach=1), -1, 0)
    rows, columns = np.indices((S, S))
    cloud = np.stack([(columns - cx) / fx * depth, (rows - cy) / fy * depth, depth])  # (3, S, S)
    tolerance = FLAT_M + NOISE * depth**2
    reach = round(FLAT_REACH * S / SIDE)
    padded = np.pad(cloud, ((0, 0), (reach, reach), (reach, reach)))
    flat = np.zeros((S, S), int)
    for j, i in np.ndindex(2 * reach + 1, 2 * reach + 1):
        other = padded[:, j : j + S, i : i + S]
        flat += (np.abs(((other - cloud) * normal).sum(0)) < tolerance) & (other[2] > 0)
    away2 = ((rows - v) ** 2 + (columns - u) ** 2) / (2 * (SIGMA * S / SIDE) ** 2)
    score = flat * np.exp(-away2) * normal.any(0)
    if approach is not None:
        score = score * (-np.asarray(approach, float) @ normal.reshape(3, -1)).reshape(S, S).clip(0) ** POWER
    if not score.max() > 0:
        return u, v, approach
    row, column = np.unravel_index(score.argmax(), score.shape)
    near = padded[:, row : row + 2 * reach + 1, column : column + 2 * reach + 1].reshape(3, -1)
    towards = normal[:, row, column]
    near = near[:, (near[2] > 0) & (np.abs(towards @ (near - cloud[:, row, column, None])) < tolerance[row, column])]
    across = np.linalg.svd(near - near.mean(1, keepdims=True))[0][:, 2]  # the direction in which they vary least
    across *= np.sign(across @ -towards)
    if approach is not None and across @ approach < math.cos(math.radians(turn)):
        return u, v, approach
    return float(column), float(row), across
