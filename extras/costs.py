"""What a model costs: parameters, bytes of weights, and bytes per sequence compared with a Transformer's.

    python -m extras.costs      # every preset of common/config.py

Mamba keeps a state of fixed size; a Transformer keeps keys and values of every token it has read (its "KV cache").
"""

import torch

from common.config import PRESETS
from common.training import PARTS
from common.weights import KEEP_FLOAT32, count
from robomamba import RoboMamba

TOKENS = (1024, 8192, 65536)  # sequence lengths at which the KV cache is reported
ASSUMED = """MB are 10^6 bytes. State: at any length; convolution inputs bfloat16, h float32.
KV: a Transformer's cache at so many tokens, with as many layers of the same width, multi-head attention, bfloat16.
(A Transformer with as many parameters has about half as many layers: halve these numbers.)"""


def memory(model: RoboMamba) -> dict[str, int]:
    """Bytes: weights in "float32" and "bfloat16", recurrent "state" per sequence, Transformer "cache" per token."""
    lm = model.config.lm
    kept = sum(p.numel() for name, p in model.named_parameters() if name.endswith(KEEP_FLOAT32))
    return {
        "float32": 4 * count(model),
        "bfloat16": 2 * count(model) + 2 * kept,
        "state": lm.n_layer * lm.d_inner * (2 * (lm.d_conv - 1) + 4 * lm.d_state),
        "cache": 2 * 2 * lm.n_layer * lm.d_model,
    }


def main() -> None:
    parts = (*PARTS, "total")
    columns = [("preset", 16), *((name, 14) for name in parts), ("head %", 8)]
    columns += [(name, 12) for name in ("MB float32", "MB bfloat16", "MB state", *(f"KV {n:,d}" for n in TOKENS))]
    print("".join(f"{name:>{width}s}" for name, width in columns))
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = RoboMamba(config)
        sizes = {part: count(module) for part, module in model.named_children()} | {"total": count(model)}
        *costs, cache = memory(model).values()
        costs += [n * cache for n in TOKENS]
        line = "".join(f"{sizes.get(part, 0):14,d}" for part in parts) + f"{100 * sizes['head'] / sizes['total']:8.3f}"
        print(f"{name:>16s}{line}" + "".join(f"{cost / 1e6:12,.1f}" for cost in costs))
    print(ASSUMED)


if __name__ == "__main__":
    main()
