"""data/depth.py: geometry against planes known by formula, the imperfect camera, the read-out, damaged files."""

import numpy as np
import pytest

from data.depth import MM_PER_M, camera_depth, geometry, lift, normals, read_depth, refine, resample

S = 64
K = (90.0, 95.0, 31.0, 33.5)
ROWS, COLUMNS = np.indices((S, S))
RAYS = np.stack([(COLUMNS - K[2]) / K[0], (ROWS - K[3]) / K[1], np.ones((S, S))], -1)


def plane(normal, distance: float) -> np.ndarray:
    """Depth (S, S) of the plane through (0, 0, distance)."""
    return distance * normal[2] / (RAYS @ normal)


def degrees(a, b):
    return np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1)))


def unit(*v):
    return np.array(v) / np.linalg.norm(v)


def test_normals_of_a_plane_are_the_planes():
    normal = unit(0.5, -0.3, -1.0)
    depth = plane(normal, 1.2)
    depth[:, :10] = 0
    depth[5, 40] = np.nan
    found = normals(depth, K)
    unknown = (depth == 0) | np.isnan(depth)
    assert (found[unknown] == 0).all()
    assert degrees(found, normal)[~unknown].max() < 0.2  # float32
    with pytest.raises(ValueError, match="fx and fy above 0.001"):
        normals(depth, (0, 1, 1, 1))


def test_normals_do_not_mix_surfaces_across_a_jump():
    near = unit(0.3, 0.0, -1.0)
    far = unit(0.0, 0.4, -1.0)
    left = COLUMNS < S // 2
    found = normals(np.where(left, plane(near, 1.0), plane(far, 1.5)), K)
    assert degrees(found, np.where(left[..., None], near, far)).max() < 0.2


def test_geometry_of_one_picture_and_of_a_batch():
    normal = unit(0.2, 0.1, -1.0)
    depth = plane(normal, 1.0)
    depth[:20] = np.inf
    depth[-1, -1] = 50
    channels = geometry(depth, K)
    assert channels.shape == (4, S, S) and channels.dtype == np.float32
    measured = np.isfinite(depth)
    expected = ((depth - depth[measured].mean()) / 0.3).clip(-3, 3)
    assert np.allclose(channels[0][measured], expected[measured], atol=1e-4) and channels[0, -1, -1] == 3
    assert (channels[:, ~measured] == 0).all()
    assert np.allclose(channels[1:, 40, 30], normal, atol=1e-3)
    empty = np.zeros((S, S), np.float32)
    batch = geometry(np.stack([empty, depth.astype(np.float32)]), K)
    assert batch.shape == (2, 4, S, S) and not batch[0].any() and np.allclose(batch[1], channels, atol=1e-4)


def test_resampled_depth_lifts_to_the_same_point():
    wide = np.random.default_rng(0).uniform(1, 2, (48, 80))
    wide[3, 7] = np.inf
    wide[30:40, 30:50] = 1.5
    intrinsics = (70.0, 75.0, 41.0, 22.0)
    square, scaled = resample(wide, intrinsics, 32)
    assert square.shape == (32, 32) and square.dtype == np.float32 and np.isfinite(square).all()
    u, v = 16.0, 23.0  # in the even patch
    assert np.allclose(lift(u, v, 32, square, scaled), lift(u, v, 32, wide, intrinsics), atol=1e-6)
    same, unchanged = resample(square, scaled, 32)
    assert np.array_equal(same, square) and np.allclose(unchanged, scaled)


def test_camera_depth_is_imperfect_as_stated():
    exact = plane(np.array([0.0, 0.0, -1.0]), 2.0)
    exact[:, : S // 3] = np.inf
    seen = camera_depth(exact, np.random.default_rng(0))
    again = camera_depth(exact, np.random.default_rng(0))
    assert seen.dtype == np.float32 and np.array_equal(seen, again)
    assert np.allclose(seen * MM_PER_M, np.round(seen * MM_PER_M), atol=1e-3)
    inside = seen[:, S // 3 + 2 :]
    error = inside[inside > 0] - 2.0
    assert abs(error.mean()) < 3e-4 and 0.0055 < error.std() < 0.0065  # 1.5 mm x 2^2
    rim = seen[:, S // 3 - 1 : S // 3 + 1]
    assert (rim[:, 0] > 0).any() and (rim[:, 1] == 0).any()  # ragged: the object grew here and shrank there
    lost = [(camera_depth(exact, np.random.default_rng(i))[:, S // 3 + 2 :] == 0).mean() for i in range(20)]
    assert min(lost) == 0 and 0 < max(lost) < 0.05  # blobs, not in every picture


def test_refine_leaves_the_edge_and_turns_to_the_surface():
    front = unit(0.3, 0.2, -1.0)
    depth = plane(front, 1.0)
    depth[:, S // 2 :] = 0
    u, v, approach = refine(S // 2 + 0.6, 30.0, np.array([0.0, 0.0, 1.0]), depth, K)
    assert u < S // 2 - 1 and abs(v - 30) <= 2
    assert degrees(approach, -front) < 0.2
    without = refine(S // 2 + 0.6, 30.0, None, depth, K)
    assert without[0] < S // 2 - 1 and degrees(without[2], -front) < 0.2
    given = (u, v, unit(0.0, 0.0, 1.0))
    away = degrees(given[2], -front)
    assert refine(*given, depth, K, away - 1) == given and refine(*given, depth, K, away + 1)[2] is not given[2]


def test_refine_prefers_the_surface_that_faces_the_approach_and_may_find_nothing():
    left, right = unit(1.0, 0.0, -1.0), unit(-1.0, 0.0, -1.0)
    ridge = np.maximum(plane(left, 1.0), plane(right, 1.0))  # a fold that runs down the middle
    for normal in (left, right):
        assert degrees(refine(K[2], 30.0, -normal, ridge, K)[2], -normal) < 3, "the approach of the other face"
    approach = np.array([0.0, 0.0, 1.0])
    assert refine(3.5, 4.5, approach, np.zeros((S, S)), K) == (3.5, 4.5, approach)
    away = refine(3.5, 4.5, -approach, plane(-approach, 1.0), K)
    assert away[:2] == (3.5, 4.5) and away[2] is not approach


def test_archive_named_npy_and_points_without_numbers(tmp_path):
    with open(tmp_path / "archive.npy", "wb") as file:
        np.savez(file, depth=np.ones((2, 2)))
    (tmp_path / "half.npz").write_bytes((tmp_path / "archive.npy").read_bytes()[:40])
    (tmp_path / "half.npz").rename(tmp_path / "half.npy")
    for name, reason in {"archive.npy": "npz archive", "half.npy": ""}.items():
        with pytest.raises(ValueError, match=f"{name}: cannot be read as depth .*{reason}"):
            read_depth(tmp_path / name)
    with pytest.raises(ValueError, match="no finite point"):
        lift(1, 1, 2, np.full((2, 2), 1e308), (0.01, 1, -100, 0))
    with pytest.raises(ValueError, match="fx fy cx cy"):
        lift(1, 1, 2, np.ones((2, 2)), (1, 1, 0))
