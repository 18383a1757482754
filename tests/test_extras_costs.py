"""Parameters and memory of the presets.

pytest tests/test_extras_costs.py
"""

import torch

from common.config import PRESETS
from extras import costs
from robomamba import RoboMamba


@torch.no_grad()
def test_told_memory_is_what_tensors_take(mini):
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    told = costs.memory(mini)
    assert told["float32"] == size(mini.parameters())
    mini.to(torch.bfloat16)
    assert told["bfloat16"] == size(mini.parameters())
    states = mini.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert told["state"] == size(t for state in states for t in state)
    with torch.device("meta"):
        paper = costs.memory(RoboMamba(PRESETS["robomamba-2.8b"]))
    assert paper["state"] == 64 * (3 * 5120 * 2 + 16 * 5120 * 4)  # 22.9 MB, whatever the length
    assert paper["cache"] * 1024 == 2 * 64 * 1024 * 2560 * 2  # keys and values, layers, tokens, width, bytes: 671 MB


def test_presets_are_printed(capsys):
    costs.main()
    text = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1 : 1 + len(PRESETS)]}
    assert list(lines) == list(PRESETS) == ["tiny", "tiny-rgbd", "small", "mamba-130m", "robomamba-2.8b"]
    assert {"303,179,776", "2,768,345,600", "3,690,880", "22.9", "671.1"} <= set(lines["robomamba-2.8b"])
    assert {"3,580", "3,392,076"} <= set(lines["tiny-rgbd"])  # the pointing head, and all parts together
    assert "multi-head attention, bfloat16" in text
