"""Depth pictures: read, resampled, as input channels, as a real camera would see them, and as help for a contact.

    python robomamba.py --image rgb.png --act "Open the drawer." --depth depth.png --intrinsics 615 615 320 240

    depth file --read_depth--> depth (H, W) --lift(u, v)--> a point in metres
                                  '--resample--> (S, S) --geometry--> (4, S, S): relative depth and normals, for the ViT
                                                    '--refine(u, v, approach)--> a better contact nearby, no training

Depth is metres along the camera's z; 0 or not finite where nothing was measured. Camera frame: x right, y down,
z forward. Intrinsics are (fx, fy, cx, cy) in pixels, with pixel centres at whole numbers. numpy only.

`camera_depth` makes the simulator's perfect depth imperfect. Its numbers are those of structured-light and stereo
cameras (Khoshelham and Elberink 2012 measured a standard deviation of 1.425 mm x (z / 1 m)^2 for the first Kinect;
time-of-flight and stereo cameras state 1 to 3 mm at 1 m): the noise of a triangulated depth grows with z^2, the files
hold whole millimetres, and at a jump in depth a pixel sees either side or nothing.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

MM_PER_M = 1000
HOLE = 2  # pixels: `lift` takes the median of (2 HOLE + 1)^2 pixels, which bridges the holes that depth cameras leave
UNIT_M = 0.3  # of the relative depth
CLIP = 3.0

# normals: least squares over 5 x 5 pixels that lie within JUMP of the middle one's depth
REACH = 2
JUMP = 0.03  # share of the depth

# camera_depth
NOISE = 0.0015  # standard deviation in metres at 1 m, grows with z^2
HOLES = 4  # at most so many blobs, each of radius up to HOLE_SIDE of the side
HOLE_SIDE = 0.03
EDGE_MIXED = 0.5  # share of the pixels beside a jump that see a random neighbour's depth
EDGE_LOST = 0.2  # share of them that measure nothing

# refine, chosen on validation scenes; pixels of a 128 x 128 picture
SIDE = 128
SIGMA = 7.0
FLAT_REACH = 4  # flatness looks at 9 x 9 pixels
FLAT_M = 0.002  # and so much off the plane, plus one standard deviation of `camera_depth`'s noise there, is flat
POWER = 6


def read_depth(path: str | os.PathLike) -> np.ndarray:
    """Depth file -> (H, W) floats, metres along the camera's z; 0 or not finite where nothing was measured.

    Args     path: .npy of floats in metres, or a 16-bit grey PNG in millimetres (RealSense, Kinect).
    Raises   ValueError naming the file and what is wrong with it.
    """
    try:
        if Path(path).suffix == ".npy":
            depth = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(depth, np.ndarray):
                raise ValueError("expected one array, got an .npz archive")
            if depth.ndim != 2 or not np.issubdtype(depth.dtype, np.floating) or not depth.size:
                raise ValueError(f"expected floats (H, W) in metres, got {depth.dtype} {depth.shape}")
            return depth
        with Image.open(path) as picture:
            if picture.format != "PNG" or not picture.mode.startswith("I"):
                raise ValueError(f"expected a 16-bit grey PNG in millimetres, got {picture.format} {picture.mode}")
            return np.asarray(picture, np.float32) / MM_PER_M
    except Exception as error:  # numpy and Pillow raise a dozen kinds for damaged files
        raise ValueError(f"{path}: cannot be read as depth ({error})") from None


def check_intrinsics(intrinsics) -> tuple[float, float, float, float]:
    """Raises: ValueError unless fx, fy, cx, cy are finite numbers with fx and fy above 0."""
    values = tuple(float(value) for value in intrinsics)
    if len(values) != 4 or not np.isfinite(values).all() or min(values[:2]) <= 0:
        told = " ".join(f"{value:g}" for value in values)
        raise ValueError(f"intrinsics {told}: expected finite numbers of pixels, fx fy cx cy, fx and fy above 0")
    return values


def lift(u: float, v: float, side: int, depth: np.ndarray, intrinsics) -> np.ndarray:
    """Pixel (u, v) of the model's picture -> point (3,) in metres, camera frame.

    Args     u, v: column and row in the picture of `side` x `side` pixels that the model saw, centres at whole numbers.
             depth: as from `read_depth`; it shows what the picture shows, in any resolution.
             intrinsics: fx, fy, cx, cy in pixels of `depth`.
    Raises   ValueError for absurd intrinsics, where nothing was measured near the pixel, and for a point that is not
             finite.
    """
    fx, fy, cx, cy = check_intrinsics(intrinsics)
    H, W = depth.shape
    u = (u + 0.5) * W / side - 0.5
    v = (v + 0.5) * H / side - 0.5
    column = min(max(round(u), 0), W - 1)
    row = min(max(round(v), 0), H - 1)
    near = np.array(depth[max(row - HOLE, 0) : row + HOLE + 1, max(column - HOLE, 0) : column + HOLE + 1], float)
    near = near[np.isfinite(near) & (near > 0)]
    if not len(near):
        raise ValueError(f"depth: nothing was measured within {HOLE} pixels of column {column}, row {row}")
    z = float(np.median(near))
    with np.errstate(over="ignore"):
        point = np.array([(u - cx) / fx * z, (v - cy) / fy * z, z])
    if not np.isfinite(point).all():
        raise ValueError(f"intrinsics {fx:g} {fy:g} {cx:g} {cy:g}: pixel {u:g}, {v:g} has no finite point")
    return point


def resample(depth: np.ndarray, intrinsics, side: int) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Depth (H, W) and its intrinsics -> (depth (side, side) float32, intrinsics) of the model's square picture.

    Nearest neighbour, since a mean of two depths is a surface that is not there; not finite becomes 0.
    """
    fx, fy, cx, cy = check_intrinsics(intrinsics)
    H, W = depth.shape
    middles = (np.arange(side) + 0.5) / side
    square = depth[(middles * H).astype(int)[:, None], (middles * W).astype(int)[None, :]].astype(np.float32)
    square[~np.isfinite(square) | (square < 0)] = 0
    x, y = side / W, side / H
    return square, (fx * x, fy * y, (cx + 0.5) * x - 0.5, (cy + 0.5) * y - 0.5)


def shifted(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """What lies `rows` below and `columns` to the right of each pixel of picture (.., H, W); 0 off the picture."""
    H, W = picture.shape[-2:]
    out = np.zeros_like(picture)
    to_row, to_column = slice(max(-rows, 0), H - max(rows, 0)), slice(max(-columns, 0), W - max(columns, 0))
    at_row, at_column = slice(max(rows, 0), H + min(rows, 0)), slice(max(columns, 0), W + min(columns, 0))
    out[..., to_row, to_column] = picture[..., at_row, at_column]
    return out


def normals(depth: np.ndarray, intrinsics, reach: int = REACH) -> np.ndarray:
    """Depth (H, W) -> unit normals (H, W, 3) float32, camera frame, towards the camera (z < 0); 0 where unknown.

    With x = (u - cx) / fx and y = (v - cy) / fy a plane n . X = k is 1 / z = (n / k) . (x, y, 1): linear in the pixel.
    A line fitted to 1 / z in the 5 x 5 window (least squares; pixels across a jump in depth do not count) gives n. On
    validation objects seen by `camera_depth` the median error is 5 degrees, with a 3 x 3 window 9.
    """
    fx, fy, cx, cy = check_intrinsics(intrinsics)
    H, W = depth.shape
    measured = np.isfinite(depth) & (depth > 0)
    inverse = np.where(measured, 1 / np.where(measured, depth, 1), 0).astype(np.float32)
    side = 2 * reach + 1
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(inverse, reach), (side, side)).reshape(H * W, side * side)
    difference = windows - inverse.reshape(-1, 1)
    near = (np.abs(difference) < JUMP * inverse.reshape(-1, 1)).astype(np.float32)
    difference *= near
    j, i = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).astype(np.float32)
    n, si, sj, sii, sij, sjj = (near @ np.stack([i**0, i, j, i * i, i * j, j * j], 1)).T.reshape(6, H, W)
    sd, sdi, sdj = (difference @ np.stack([i**0, i, j], 1)).T.reshape(3, H, W)
    n = np.maximum(n, 1)
    ii = sii - si * si / n
    ij = sij - si * sj / n
    jj = sjj - sj * sj / n
    di = sdi - si * sd / n
    dj = sdj - sj * sd / n
    determinant = ii * jj - ij * ij
    known = measured & (determinant > 0.5)  # three pixels or more that do not lie in line
    determinant = np.where(known, determinant, 1)
    a = fx * (jj * di - ij * dj) / determinant
    b = fy * (ii * dj - ij * di) / determinant
    rows, columns = np.indices((H, W), np.float32)
    c = inverse - a * (columns - cx) / fx - b * (rows - cy) / fy
    normal = -np.stack([a, b, c], -1) * known[..., None]
    return (normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def geometry(depth: np.ndarray, intrinsics) -> np.ndarray:
    """The four depth channels of the ViT: depth (.., S, S) -> (.., 4, S, S) float32, one picture or a batch.

    Channel 0: (depth - mean of what was measured) / 0.3 m, clipped to +-3; channels 1 to 3: `normals`. 0 where nothing
    was measured, so that a picture without depth is all zeros.
    """
    if depth.ndim > 2:  # one by one: twice as fast as all at once, because a picture fits the processor's cache
        return np.stack([geometry(picture, intrinsics) for picture in depth])
    measured = np.isfinite(depth) & (depth > 0)
    metres = np.where(measured, depth, 0).astype(np.float32)
    mean = metres.sum() / max(measured.sum(), 1)
    relative = np.where(measured, (metres - mean) / UNIT_M, 0).clip(-CLIP, CLIP)
    return np.stack([relative, *np.moveaxis(normals(metres, intrinsics), -1, 0)]).astype(np.float32)


def camera_depth(depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Perfect depth (S, S) in metres -> what a depth camera measures, (S, S) float32, whole millimetres, 0 = nothing.

    Normal noise of 1.5 mm x (z / 1 m)^2, up to 4 round holes, and ragged edges: where depth jumps by more than 3 %
    between neighbours, half of the pixels there measure a random neighbour's depth and one in five nothing.
    """
    S = len(depth)
    exact = np.where(np.isfinite(depth), depth, 0).astype(np.float32)
    padded = np.pad(exact, 1, mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).reshape(S, S, 9)
    edge = around.max(-1) - around.min(-1) > JUMP * around.max(-1)
    neighbour = np.take_along_axis(around, rng.integers(9, size=(S, S, 1)), -1)[..., 0]
    seen = np.where(edge & (rng.random((S, S)) < EDGE_MIXED), neighbour, exact)
    seen[edge & (rng.random((S, S)) < EDGE_LOST)] = 0
    rows, columns = np.indices(exact.shape)
    for _ in range(rng.integers(HOLES + 1)):
        row, column = rng.uniform(0, S, 2)
        seen[np.hypot(rows - row, columns - column) < rng.uniform(0, HOLE_SIDE * S)] = 0
    noisy = seen + NOISE * seen**2 * rng.standard_normal(exact.shape)
    return (np.round(noisy * MM_PER_M) / MM_PER_M).astype(np.float32)


def refine(u: float, v: float, approach, depth: np.ndarray, intrinsics) -> tuple[float, float, np.ndarray | None]:
    """A contact near the predicted one that suits a suction cup, by the depth picture alone: no training.

    The pixel of highest
        exp(-distance^2 / (2 sigma^2)) x flatness x max(0, cos(approach, -normal))^6
    with sigma = 7 pixels of 128, flatness = share of the 9 x 9 pixels around it within 2 mm + 1.5 mm x (z / 1 m)^2 of
    the plane through it. The new approach goes straight against the plane fitted to those pixels.

    Args     u, v: pixel of `depth` (S, S), see `resample`. approach: unit (3,), camera frame, or None: not used.
    Returns  (u, v, approach (3,)); the arguments where the depth picture has nothing to offer.
    """
    fx, fy, cx, cy = check_intrinsics(intrinsics)
    S = len(depth)
    depth = np.where(np.isfinite(depth), depth, 0)
    normal = np.moveaxis(normals(depth, intrinsics, reach=1), -1, 0)
    rows, columns = np.indices((S, S))
    cloud = np.stack([(columns - cx) / fx * depth, (rows - cy) / fy * depth, depth])  # (3, S, S)
    tolerance = FLAT_M + NOISE * depth**2

    def on_plane(j: int, i: int) -> np.ndarray:
        """Does the pixel j below and i to the right lie on the plane through each pixel? (S, S)"""
        off = ((shifted(cloud, j, i) - cloud) * normal).sum(0)
        return (np.abs(off) < tolerance) & (shifted(depth, j, i) > 0)

    reach = round(FLAT_REACH * S / SIDE)
    offsets = [(j, i) for j in range(-reach, reach + 1) for i in range(-reach, reach + 1)]
    flat = sum(on_plane(j, i).astype(int) for j, i in offsets)
    sigma = SIGMA * S / SIDE
    score = flat * np.exp(-((rows - v) ** 2 + (columns - u) ** 2) / (2 * sigma**2)) * normal.any(0)
    if approach is not None:
        score = score * (-np.asarray(approach, float) @ normal.reshape(3, -1)).reshape(S, S).clip(0) ** POWER
    if not score.max() > 0:
        return u, v, approach
    row, column = np.unravel_index(score.argmax(), score.shape)
    near = cloud[:, max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1].reshape(3, -1)
    off = normal[:, row, column] @ (near - cloud[:, row, column, None])
    near = near[:, (near[2] > 0) & (np.abs(off) < tolerance[row, column])]
    across = np.linalg.svd(near - near.mean(1, keepdims=True))[0][:, 2]  # the direction in which they vary least
    return float(column), float(row), across * np.sign(across @ -normal[:, row, column])
