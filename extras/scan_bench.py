"""The scans side by side: error against float64, time, memory; and the two classic failures.

    python -m extras.scan_bench [--quick] [--out FILE]     # six shapes with one and two threads; --quick: one, 20 s
    python -m extras.scan_bench --device cuda              # the shapes on a GPU, and a larger one
    python -m extras.scan_bench --figure FILE.png          # what is local to a chunk, and what is carried

The methods are timed in turn, round after round, because the speed of a machine drifts; ratios are computed within a
round and reported as the minimum and maximum over all rounds. mambapy's column needs the extra `[bench]`.
"""

import importlib.metadata
import importlib.util
import itertools
import os
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from common.files import write_json
from common.plots import new_figure
from common.scripts import cli, environment, flag, run_main
from common.training import Processes
from selective_scan import DT_RANGE, LARGE_DT_RANGE, example_inputs, scan_chunked, scan_parallel, scan_reference

SHAPES = [(4, 256, 512, 16), (8, 128, 512, 16), (1, 1024, 1024, 16), (1, 4096, 256, 16)]  # (B, L, E, N)
TRAINING_SHAPES = [(64, 65, 384, 8), (256, 24, 384, 8)]  # from this project's own training
GPU_SHAPES = [(8, 2048, 2048, 16)]  # a layer of a Mamba with 790 million parameters
QUICK_SHAPES = [(2, 128, 256, 16)]
INDEXED = "Classic failure: indexing inside the loop is quadratic; (1, L, 128, 16), forward + backward"


@dataclass
class Config:
    quick: bool = flag(False, "one small shape, one thread, few rounds")
    rounds: int = flag(5, "number of timed rounds", low=2, high=1000)
    device: str = flag("cpu", "where to compute", choices=("cpu", "cuda"))
    out: str = flag("", "write the numbers to this JSON file")
    figure: str = flag("", "only draw chunk boundaries to this PNG file")


# --- the two classic failures, and the package to compare with ---


def scan_indexed(u, dt, A, B, C, D, state):
    """CLASSIC FAILURE, as a demo: correct, but `decay[:, t]` under autograd makes the backward pass quadratic in L."""
    decay = torch.exp(dt[..., None] * A)  # (B, L, E, N)
    write = (dt * u)[..., None] * B[:, :, None]
    ys = []
    for t in range(u.shape[1]):
        state = decay[:, t] * state + write[:, t]
        ys.append((state * C[:, t, None]).sum(-1))
    return torch.stack(ys, 1) + D * u, state


def scan_cumprod(u, dt, A, B, C, D, state):
    """CLASSIC FAILURE, as a demo: no loop, but the product of decays underflows, and 0 / 0 or x / 0 follows."""
    product = torch.exp(torch.cumsum(dt, 1)[..., None] * A)  # (B, L, E, N)
    h = product * (state[:, None] + torch.cumsum((dt * u)[..., None] * B[:, :, None] / product, 1))
    return (h * C[:, :, None]).sum(-1) + D * u, h[:, -1]


def scan_mambapy(u, dt, A, B, C, D, state):
    """The parallel scan of the package mambapy, as its own block calls it. It starts at zero and returns no state."""
    from mambapy.pscan import pscan

    h = pscan(torch.exp(dt[..., None] * A), (dt[..., None] * B[:, :, None]) * u[..., None])
    return (h @ C[..., None]).squeeze(3) + D * u, state


# --- measuring ---


def train(scan, inputs):
    """y and all gradients: forward and backward"""
    y, _ = scan(*inputs)
    return [y, *torch.autograd.grad(y.sum(), inputs, allow_unused=True)]


def forward(scan, inputs):
    with torch.no_grad():
        scan(*inputs)


def peak_mib(function, *args):
    """Peak memory, MiB, of tensors made by the call, as recorded by CUDA's allocator or PyTorch's profiler."""
    if args[-1][0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*args)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler's notes out of the tables
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(*args)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / 2**20


def errors(scan, inputs, exact):
    """Largest difference from the definition in float64, as a share of the largest value: of y, of any gradient."""
    pairs = list(zip(train(scan, inputs), exact, strict=True))[:-1]  # without the gradient of the state
    gaps = [((got.double() - wanted).abs().max() / wanted.abs().max()).item() for got, wanted in pairs]
    return {"error": gaps[0], "grad_error": max(gaps[1:])}


def take_turns(call, scans, inputs, rounds):
    """{name: [ms of call(scan, inputs) in every round]}; the scans take turns; a warm-up round is not counted."""
    times = {name: [] for name in scans}
    for _ in range(1 + rounds):
        for name, scan in scans.items():
            start = time.perf_counter()
            call(scan, inputs)
            if inputs[0].is_cuda:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: ms[1:] for name, ms in times.items()}


def ladder(shape, methods, threads, rounds, device):
    """{shape, threads, methods: one row each}. `times`: this method's time over that of chunked, min and max."""
    torch.set_num_threads(threads)
    inputs = [x.detach().to(device).requires_grad_() for x in example_inputs(*shape)]
    inputs[-1] = torch.zeros_like(inputs[-1], requires_grad=True)  # mambapy can only start from zero
    exact = train(scan_reference, [x.detach().double().requires_grad_() for x in inputs])
    alone = take_turns(forward, methods, inputs, rounds)
    both = take_turns(train, methods, inputs, rounds)
    rows = []
    for name, scan in methods.items():
        ratios = [ms / base for ms, base in zip(both[name], both["chunked"], strict=True)]
        row = {"method": name} | errors(scan, inputs, exact)
        row |= {"forward_ms": statistics.median(alone[name]), "train_ms": statistics.median(both[name])}
        row |= {"train_range_ms": [min(both[name]), max(both[name])], "times": [min(ratios), max(ratios)]}
        rows.append(row | {"peak_mib": peak_mib(train, scan, inputs)})
    print_rows(f"(B, L, E, N) = {shape}, threads: {threads}", rows)
    return {"shape": shape, "threads": threads, "methods": rows}


def print_rows(title, rows):
    """Print dicts with the same keys."""
    print(f"\n{title}\n" + "".join(f"{key:>15}" for key in rows[0]))
    for row in rows:
        print("".join(f"{cell(x):>15}" for x in row.values()), flush=True)


def cell(x):
    if isinstance(x, list):
        return f"{x[0]:.3g}..{x[1]:.3g}"
    return f"{x:.3g}" if isinstance(x, float) else str(x)


def linear(L, rounds):
    """The time of chunked at (1, L, 256, 16), forward and backward."""
    ms = statistics.median(take_turns(train, {"": scan_chunked}, example_inputs(1, L, 256, 16), rounds)[""])
    return {"L": L, "train_ms": ms, "ns per L*E*N": ms * 1e6 / (L * 256 * 16)}


def indexed(L):
    """The times of a loop with indexing and of one without, at (1, L, 128, 16)."""
    scans = {"indexed_ms": scan_indexed, "unbind_ms": scan_reference}
    times = take_turns(train, scans, example_inputs(1, L, 128, 16), 2)
    return {"L": L} | {name: statistics.median(ms) for name, ms in times.items()}


def cumprod(L):
    """The share of y that is inf or nan after dividing by the cumulative product, with small and large steps."""
    row = {"L": L}
    for name, dt_range in (("dt .001 to .1", DT_RANGE), ("dt .1 to 1", LARGE_DT_RANGE)):
        y, _ = scan_cumprod(*example_inputs(1, L, 64, 16, dt_range))
        row[name] = 1 - y.isfinite().double().mean().item()
    return row


# --- the drawing ---


def figure(path):
    """Plots one channel and state over 32 tokens in chunks of 8: local states, what is carried in, their sum."""
    drawing = new_figure(7, 2.8)
    L, T = 32, 8
    u, dt, A, B, C, _, _ = (x.detach() for x in example_inputs(1, L, 1, 1, (0.05, 0.3), seed=3))
    one = torch.ones_like(C)
    u, B = u.abs(), one
    whole = scan_reference(u, dt, A, B, one)[0].flatten()  # C = 1, no skip: y is the state
    chunks = [slice(k, k + T) for k in range(0, L, T)]
    local = torch.cat([scan_reference(u[:, c], dt[:, c], A, B[:, c], one[:, c])[0].flatten() for c in chunks])
    axes = drawing.subplots()
    tokens = range(1, L + 1)
    axes.bar(tokens, local.tolist(), color="#4477aa", label="local: the chunk alone, from a zero state")
    carried_label = "carried: $P_t$ times the state before the chunk"
    axes.bar(tokens, (whole - local).tolist(), bottom=local.tolist(), color="#ee9944", label=carried_label)
    axes.plot(tokens, whole.tolist(), "k.-", linewidth=0.8, label="state $h_t$ of the sequence")
    for k in range(T, L, T):
        axes.axvline(k + 0.5, color="grey", linestyle=":")
        axes.annotate("", (k + 1, whole[k - 1].item()), (k, whole[k - 1].item()), arrowprops={"arrowstyle": "->"})
    axes.set(xlabel=f"token; dotted: a chunk of {T} ends, its last state (arrow) enters the next", ylabel="state")
    axes.legend(fontsize=8)
    drawing.savefig(path, dpi=100)


def main(short=False):
    """short: the same as --quick, for `python selective_scan.py`."""
    cfg = Config(quick=True) if short else cli(Config, __doc__)
    if cfg.figure:
        return figure(cfg.figure)
    device = Processes(cfg.device).device
    methods = {"reference": scan_reference, "chunked": scan_chunked, "parallel": scan_parallel}
    result = {"command": " ".join(["python -m extras.scan_bench", *sys.argv[1:]])} | environment()
    if importlib.util.find_spec("mambapy"):
        result["versions"]["mambapy"] = importlib.metadata.version("mambapy")
        methods["mambapy"] = scan_mambapy
    shapes = QUICK_SHAPES if cfg.quick else SHAPES + TRAINING_SHAPES
    if device.type == "cuda":
        result["hardware"] = f"{torch.cuda.get_device_name()}; {result['hardware']}"
        shapes = shapes + GPU_SHAPES
    print(f"{result['hardware']}; torch {result['versions']['torch']}, float32; medians of {cfg.rounds} rounds")
    print("forward_ms; train_ms: forward + backward, times: least and most it took of chunked's in the same round;")
    print("peak_mib: tensors made by forward + backward; errors: against the definition in float64")
    threads = (1,) if cfg.quick or device.type == "cuda" else (1, 2)
    before = torch.get_num_threads()
    result["shapes"] = [ladder(shape, methods, n, cfg.rounds, device) for shape in shapes for n in threads]
    torch.set_num_threads(before)
    if device.type == "cpu":
        most = 2 if cfg.quick else 4  # number of lengths
        result["linear"] = [linear(L, cfg.rounds) for L in (256, 1024, 4096, 16384)[:most]]
        print_rows("Linear in L: chunked at (1, L, 256, 16)", result["linear"])
        result["indexed"] = [indexed(L) for L in (64, 256, 1024)[:most]]
        print_rows(INDEXED, result["indexed"])
        result["cumprod"] = [cumprod(L) for L in (16, 64, 256, 1024)]
        print_rows("Classic failure: dividing by the cumulative product; share of y inf or nan", result["cumprod"])
    if cfg.out:
        write_json(cfg.out, result)


if __name__ == "__main__":
    run_main(main)
