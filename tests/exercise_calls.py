"""Calls a function of adapters.py with plain numbers and returns plain numbers: the checks never hold your objects.

    answer("step", [u, dt, A, B, C, D, state])         in your own process: what `pytest -m ex4` does
    serve(tree, seconds)                               one JSON line a question, one a reply: what the grader starts

There is nothing to solve here; test_exercises.py has the checks.
"""

import contextlib
import json
import os
import resource
import sys
import traceback

import numpy as np
import torch


def plain(x):
    """A tensor or an array as nested lists; None as itself."""
    return None if x is None else torch.as_tensor(x).detach().tolist()


def as_tensor(x, differentiate: bool = False):
    """Numbers as a float32 tensor, or a dict of such; an int (the size of a chunk) stays."""
    if isinstance(x, dict):
        return {name: as_tensor(value) for name, value in x.items()}
    return x if isinstance(x, int) else torch.tensor(np.asarray(x), dtype=torch.float32, requires_grad=differentiate)


def backproject(function, pixels, depth, intrinsics, eye, camera_rotation) -> list:
    """(n, 3) points of (n, 2) pixels, NaN where the function says None."""
    arrays = [np.array(x, float) for x in (depth, eye, camera_rotation)]
    points = [function(float(u), float(v), arrays[0], tuple(intrinsics), *arrays[1:]) for u, v in pixels]
    return [[float("nan")] * 3 if point is None else plain(point) for point in points]


def answer(name: str, arguments: list, weights: list | None = None, count: bool = False) -> dict:
    """{"outputs"} of an adapter; of those that take tensors also {"arguments"}, as they are after the call.

    Args: weights, one array an output: also {"gradients"} of sum(weights * outputs) to every argument.
        count: also {"kept"}, how many numbers autograd keeps for a backward pass.
    """
    import adapters

    function = getattr(adapters, name)
    if name == "pack_conversations":
        talks = [[(list(prompt), list(reply)) for prompt, reply in turns] for turns in arguments[0]]
        return {"outputs": [plain(x) for x in function(talks, arguments[1])]}
    if name == "backproject":
        return {"outputs": [backproject(function, *arguments)]}
    tensors = [as_tensor(x, weights is not None or count) for x in arguments]
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x)
    with hooks if count else contextlib.nullcontext():
        outputs = function(*tensors)
    leaves = [x for x in tensors if isinstance(x, torch.Tensor)]
    reply = {"outputs": [plain(x) for x in outputs], "arguments": [plain(x) for x in leaves], "kept": sum(kept)}
    if weights is not None:
        loss = sum((as_tensor(w) * x).sum() for w, x in zip(weights, outputs, strict=True))
        reply["gradients"] = [plain(g) for g in torch.autograd.grad(loss, leaves, allow_unused=True)]
    return reply


def addresses() -> int:
    """Bytes of addresses that this process has taken: 0.7 GB with a torch for CPUs, 3 GB with CUDA; Linux only."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def serve(tree: str, seconds: int) -> None:
    """Limit this process, take the code of `tree`, and answer the questions of stdin until it ends."""
    questions = os.fdopen(os.dup(0))
    replies = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)
    limits = {"CPU": seconds, "FSIZE": 2**20, "NPROC": 0, "CORE": 0}  # seconds; bytes of a file; no other process
    with contextlib.suppress(OSError):  # macOS has no limit on the address space
        limits["AS"] = addresses() + 2 * 2**30
    for limit, value in limits.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
    sys.path[:0] = [f"{tree}/tests", tree]
    os.chdir(tree)
    print('{"ready": true}', file=replies, flush=True)
    for question in questions:
        try:
            reply = json.dumps(answer(**json.loads(question)))
        except BaseException as error:  # exit(), pytest.skip() and Ctrl-C of a submission too
            places = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(tree)]
            where = f" ({os.path.relpath(places[-1].filename, tree)}:{places[-1].lineno})" if places else ""
            reply = json.dumps({"error": f"{type(error).__name__}: {str(error)[:400]}{where}"})
        print(reply, file=replies, flush=True)
