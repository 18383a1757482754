"""pytest tests/test_extras_published_memory.py

Published weights are loaded without a second copy of them in memory.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import sys, threading
from pathlib import Path
import torch
from extras.published import read_mamba, save_mamba
from robomamba import LMConfig, MambaLM

def own():  # bytes of this process that are not mapped files
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def peak(call):
    start, seen, done = own(), [0], threading.Event()
    def watch():
        while not done.wait(0.0005):
            seen.append(own() - start)
    thread = threading.Thread(target=watch)
    thread.start()
    kept = call()
    seen.append(own() - start)
    done.set()
    thread.join()
    return max(seen)

with torch.device("meta"):
    big = MambaLM(LMConfig(512, 8, 8192, d_state=16, bc_norm=False))
big = big.to_empty(device="cpu")
big.tie()
for p in big.parameters():
    torch.nn.init.constant_(p, 0.01)
size = sum(4 * p.numel() for p in big.parameters())
shares = [peak(lambda: [p.detach().clone() for p in big.parameters()])]
for naming in ("hf", "original"):
    save_mamba(big, f"{sys.argv[1]}/{naming}", naming)
    for dtype in (torch.float32, torch.bfloat16):
        shares.append(peak(lambda: read_mamba(f"{sys.argv[1]}/{naming}", dtype)))
print(size, *(share / size for share in shares))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory through Linux's /proc")
def test_loading_never_holds_a_second_copy_of_the_weights(tmp_path):
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back to the system at once
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    size, copied, *shares = map(float, done.stdout.split())
    print(f"of {size / 1e6:.0f} MB: a copy {copied:.2f}, loading in float32 and bfloat16 {shares}")
    assert size > 60e6 and 0.9 < copied < 1.2  # the instrument sees a copy
    for share, wanted in zip(shares, (1.0, 0.5) * 2, strict=True):
        assert 0.9 * wanted < share < wanted + 0.35  # the largest single tensor is a quarter of all
