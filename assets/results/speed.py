"""How fast is a training step? Of this trunk beside others, or of any config beside what the machine can do.

    python assets/results/speed.py                # four trunks at the reference shape, about two minutes
    python assets/results/speed.py --width=256
    python assets/results/speed.py sample_configs/benchmark.py              # where the time of a step goes
    python assets/results/speed.py sample_configs/letters_text.py --compile=True --repeats=50

Without a config: four trunks in ONE process, step by step in turn, because absolute times drift on a shared
machine and ratios of neighbouring steps do not. A step is forward, backward, clipping and AdamW on the same
batch: next-token regression on 64 tokens of 16 numbers, batch 64, 4 layers, 4 heads, fp32. The other trunks
are in trunks.py.

With a config (and any key of train.py): ms a step of every slot, GFLOP/s, their share of what a large matrix
product reaches here, and how the time divides into data, forward, backward and optimizer. Nothing is kept.
"""
import json
import os
import sys
import time

import numpy as np
import torch
import torch.nn as nn

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(os.path.dirname(HERE))]
from prepare import at_least, exit_on_user_error, peak_memory, print_help, read_config, tell, write_json
from train import KEYS, count_flops, make_optimizer, read_clock, read_run_config, resolve, set_up
from trunks import B, D, T, make_trunks

STEPS, WARM_UP = 60, 5  # timed steps a trunk, and untimed ones before them
TRUNK_KEYS = dict(width=(128, "channels of the trunk", at_least(4)),
                  threads=(0, "torch CPU threads (0: torch's choice)", at_least(0)))
CONFIG_KEYS = dict(KEYS, repeats=(20, "timed steps a slot", at_least(1)))
PARTS = ("waiting for data", "forward", "backward", "optimizer")


def compare_trunks(argv):
    """Time the four trunks in turn -> where the medians and the ratios to ours are written."""
    cfg = read_config(argv, TRUNK_KEYS)
    if cfg["threads"]:
        torch.set_num_threads(cfg["threads"])
    torch.manual_seed(0)
    models = make_trunks(cfg["width"])
    defaults = {key: default for key, (default, *_) in KEYS.items()}
    optimizers = {name: make_optimizer(model, defaults) for name, model in models.items()}
    tokens, times = torch.randn(B, T, D), {name: [] for name in models}
    for _ in range(WARM_UP + STEPS):
        for name, model in models.items():
            start = time.perf_counter()
            optimizers[name].zero_grad(set_to_none=True)
            model("image", tokens).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            times[name].append(1e3 * (time.perf_counter() - start))
    ours, out = np.array(times["ours"][WARM_UP:]), {}
    for name, values in times.items():
        ms = np.array(values[WARM_UP:])
        # of ratios step by step: a step and its neighbour are slowed alike by what else the machine does
        low, ratio, high = np.percentile(ms / ours, (10, 50, 90))
        out[name] = dict(ms=float(np.median(ms)), ratio=ratio, ratio_p10=low, ratio_p90=high)
        print(f"{name:26} {out[name]['ms']:7.1f} ms a step, {ratio:.2f} of ours ({low:.2f} to {high:.2f})")
    path = os.path.join("out", f"speed_{cfg['width']}.json")
    os.makedirs("out", exist_ok=True)
    write_json(path, dict(kind="speed", width=cfg["width"], threads=torch.get_num_threads(), steps=STEPS,
                          models=out, hardware=f"{os.cpu_count()} cores, torch {torch.__version__}",
                          command=" ".join(["python", "assets/results/speed.py", *argv])))
    return dict(written=path, peak_memory=peak_memory())


def matmul_peak(device, autocast):
    """GFLOP/s of the fastest of 20 products of two square matrices (2 n^3 FLOPs each)."""
    n, times = 2048, []
    matrix = torch.randn(n, n, device=device)
    for _ in range(21):
        times.append(read_clock(device))
        with autocast:
            matrix @ matrix
    return 2 * n**3 / np.diff(times).min() / 1e9


def time_step(run, slot, update):
    """One training step -> seconds of each of PARTS (4,); the first is the time it waits for its batch."""
    times = [read_clock(run.device)]
    batch = slot.batch(update)
    times.append(read_clock(run.device))
    with run.autocast:
        loss = run.engine(slot.name, **batch)
    times.append(read_clock(run.device))
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    times.append(read_clock(run.device))
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    times.append(read_clock(run.device))
    return np.diff(times)


def benchmark(argv, say=tell):
    """Time the steps of every slot of a config -> ms, GFLOP/s and shares of the target, and of all slots."""
    cfg = read_run_config(argv, CONFIG_KEYS)
    repeats = cfg.pop("repeats")
    run = set_up(resolve(cfg, say), say)
    peak, slots = matmul_peak(run.device, run.autocast), {}
    say(f"matmul peak {peak:,.0f} GFLOP/s")
    for name, slot in run.slots.items():
        steps = [time_step(run, slot, update) for update in range(WARM_UP + repeats)]
        steps = np.array(steps[WARM_UP:])  # (repeats, 4); the first ones compile and warm up
        ms = 1e3 * np.median(steps.sum(1))
        # counted on the first batch; others differ a little, as a CPU cuts texts to the longest of a batch
        gflops = count_flops(run.model, name, slot.batch(0)) / ms / 1e6
        share = dict(zip(PARTS, (steps.sum(0) / steps.sum()).round(4).tolist()))
        slots[name] = dict(ms_per_step=ms, gflops=gflops, fraction_of_peak=gflops / peak, share=share)
        shown = ", ".join(f"{part} {value:.1%}" for part, value in share.items())
        say(f"{name}: {ms:.1f} ms/step, {gflops:,.0f} GFLOP/s = {gflops / peak:.0%} of peak; {shown}")
    return dict(slots[cfg["target"]], peak_gflops=peak, peak_memory=peak_memory(), slots=slots)


def main():
    argv = sys.argv[1:]
    if "--help" in argv:
        return print_help(__doc__, dict(TRUNK_KEYS, repeats=CONFIG_KEYS["repeats"]), "Keys of its own:")
    has_config = any(not arg.startswith("--") for arg in argv)
    print(json.dumps(benchmark(argv) if has_config else compare_trunks(argv)))


if __name__ == "__main__":
    exit_on_user_error(main)
