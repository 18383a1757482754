"""Where the tests of the exercises meet your code: one typed function each. The tests import nothing else of yours.

As it stands, every function calls the place in this repository that is marked for its exercise. Fill in those places,
or write a design of your own and call it from here: only the contract in the docstring counts. Imports stand inside the
functions, so that a file that does not load costs its own exercises and no others.

Tensors are float32 on the CPU, in and out; letters are those of the symbol key in selective_scan.py.
"""

import numpy as np
from torch import Tensor


def discretise(u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Exercise 1. What a token leaves of the state, and what it writes into it.

    Args: u, dt (.., E), dt >= 0; A (E, N), < 0; B (.., N). The leading axes are (B,) or (B, L).
    Returns: decay (.., E, N), write (.., E, N), so that h_t = decay h_{t-1} + write.
    """
    import selective_scan

    return selective_scan.discretise(u, dt, A, B)


def reference_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Exercise 2. The recurrence over a sequence, in any way that autograd can differentiate.

    Args: u, dt (B, L, E); A (E, N); B, C (B, L, N); D (E,); state (B, E, N), the one before the first token.
    Returns: y (B, L, E), the state after the last token (B, E, N).
    """
    import selective_scan

    return selective_scan.scan_reference(u, dt, A, B, C, D, state)


def chunked_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Exercise 3. The same as exercise 2 in chunks of `chunk` tokens, the last one perhaps shorter.

    For the backward pass it may keep its inputs and the state before each chunk, but not the state of every token.
    """
    import selective_scan

    return selective_scan.scan_chunked(u, dt, A, B, C, D, state, chunk=chunk)


def step(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Exercise 4. One token: u, dt (B, E); B, C (B, N); the rest as in exercise 2. `state` itself stays as it is.

    Returns: y (B, E), the state after the token (B, E, N).
    """
    import selective_scan

    return selective_scan.scan_step(u, dt, A, B, C, D, state)


def mamba_block(x: Tensor, weights: dict[str, Tensor], conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exercise 5. The mixer of a Mamba block (Mamba paper, Fig. 3), without the norm and the residual around it.

    Args: x (B, L, D); conv (B, K-1, E), the convolution's inputs before the first token; ssm (B, E, N), the scan's
        state; weights, under their published names: in_proj.weight (2 E, D), whose first half makes the input of the
        convolution and whose second the gate; conv1d.weight (E, 1, K), last tap on the present token; conv1d.bias (E,);
        x_proj.weight (R + 2 N, E), for dt, B, C in this order; dt_proj.weight (E, R), dt_proj.bias (E,); A_log (E, N);
        D (E,); out_proj.weight (D, E). B and C are not normalised.
    Returns: y (B, L, D), conv and ssm after the last token.
    """
    import robomamba

    (twice_E, D), (_, R) = weights["in_proj.weight"].shape, weights["dt_proj.weight"].shape
    N, K = ssm.shape[2], conv.shape[1] + 1
    config = robomamba.LMConfig(D, 1, d_state=N, d_conv=K, expand=twice_E // 2 // D, dt_rank=R, bc_norm=False)
    mixer = robomamba.MambaMixer(config)
    mixer.load_state_dict(weights)
    y, state = mixer(x, robomamba.LayerState(conv, ssm))
    return y, state.conv, state.ssm


def pack_conversations(
    conversations: list[list[tuple[list[int], list[int]]]], end: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exercise 6. Conversations as one batch for the next-token loss, each a row; its turns follow each other.

    Args: conversations: each a list of turns (prompt ids, reply ids); a reply ends with `end`, which is also the id to
        pad with, on the right, up to the longest conversation.
    Returns: all int64: tokens (n, T); labels (n, T), the token itself where it is to be predicted (replies with their
        `end`) and -100 elsewhere, not shifted; lengths (n,) without padding; prompts (n,), that of the first prompt.
    """
    from data import dataset

    return dataset.pad([dataset.pack(turns) for turns in conversations], end)


def rotation_and_angle(r6: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Exercise 7. Rotations from six numbers, and how far they are from others.

    Args: r6 (n, 6): the approach, then the forward direction, of any length and not orthogonal; target (n, 3, 3).
    Returns: rotation (n, 3, 3), columns [forward, left, approach]; angle (n,) between rotation and target in radians,
        whose gradient is finite even where the two are equal.
    """
    import finetune_policy
    import robomamba

    rotation = robomamba.rotation_from_6d(r6)
    return rotation, finetune_policy.geodesic(rotation, target)


def backproject(
    u: float,
    v: float,
    depth: np.ndarray,
    intrinsics: tuple[float, float, float],
    eye: np.ndarray,
    camera_rotation: np.ndarray,
) -> np.ndarray | None:
    """Exercise 8. The point that a pixel shows.

    Args: u, v: column and row, the nearest pixel counts; depth (S, S) metres along the camera's z, inf where nothing
        is; intrinsics (f, cx, cy) in pixels: a point (x, y, z) of the camera's frame (x right, y down, z forward) is
        seen at (f x / z + cx, f y / z + cy); eye (3,) the camera in the world, metres; camera_rotation (3, 3), world ->
        camera.
    Returns: (3,) world, metres; None where nothing is, and outside the picture.
    """
    from sim import scene as world

    class Picture(world.Scene):  # a Scene without a simulator: no more than what back-projection reads
        def __init__(self):
            self.depth, self.eye, self.camera_rotation, self.image_size = depth, eye, camera_rotation, len(depth)
            self.links = np.where(np.isfinite(depth), 0, world.BACKGROUND)

    Picture.intrinsics = intrinsics
    return Picture().backproject(u, v)
