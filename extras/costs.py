"""What a model costs: parameters, bytes of weights, and bytes that one sequence needs beside a Transformer's.

    python robomamba.py --presets

A Mamba keeps a state of one size; a Transformer keeps keys and values of every token it has read (its "KV cache").
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from common.weights import KEEP_FLOAT32

TOKENS = (1024, 8192, 65536)  # lengths at which the cache is told
ASSUMED = """MB are 10^6 bytes. State: at any length; convolution inputs bfloat16, h float32.
KV: a Transformer's cache at so many tokens, with as many layers of the same width, multi-head attention, bfloat16.
(A Transformer with as many parameters has about half as many layers: halve these numbers.)"""


def memory(model: nn.Module) -> dict[str, int]:
    """Bytes: weights "float32" and "bfloat16", recurrent "state" of one sequence, Transformer "cache" of one token."""
    lm, parameters = model.config.lm, dict(model.named_parameters())  # tied ones once
    full = sum(4 * p.numel() for p in parameters.values())
    half = sum(p.numel() * (4 if name.endswith(KEEP_FLOAT32) else 2) for name, p in parameters.items())
    state = lm.n_layer * lm.d_inner * (2 * (lm.d_conv - 1) + 4 * lm.d_state) if lm.mixer == "mamba" else 0
    return {"float32": full, "bfloat16": half, "state": state, "cache": 2 * 2 * lm.n_block * lm.d_model}


def print_presets(presets: dict, build: Callable) -> None:
    """One line a preset: parameters of every part and the head's share, then MB. Nothing is allocated."""
    names = ("vision", "projector", "lm", "head")
    columns = [("preset", 16), *((name, 14) for name in (*names, "total")), ("head %", 8)]
    columns += [(name, 12) for name in ("MB float32", "MB bfloat16", "MB state", *(f"KV {n:,d}" for n in TOKENS))]
    print("".join(f"{name:>{width}s}" for name, width in columns))
    for name, config in presets.items():
        with torch.device("meta"):
            model = build(dataclasses.replace(config))
        parts = [sum(p.numel() for p in getattr(model, part).parameters()) for part in names]
        bytes_ = memory(model)
        costs = [bytes_[k] for k in ("float32", "bfloat16", "state")] + [n * bytes_["cache"] for n in TOKENS]
        line = "".join(f"{n:14,d}" for n in (*parts, sum(parts))) + f"{100 * parts[-1] / sum(parts):8.3f}"
        print(f"{name:>16s}{line}" + "".join(f"{cost / 1e6:12,.1f}" for cost in costs))
    print(ASSUMED)
