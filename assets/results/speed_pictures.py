"""Time pictures against torchvision: the conv stem against its ConvNets, prepare.py against its ImageFolder.

    pip install torchvision                          # only this script needs it
    python assets/results/speed_pictures.py          # two minutes

The stem (as in letters_text.py, but three colours) and torchvision's small ConvNets take the same 64 pictures
of 32 x 32, forward and backward in turn. They differ in size, so GFLOP/s are compared: do the operations run
as fast? ImageFolder + DataLoader reads 3,000 generated JPEGs of 320 x 280 once, resized and cropped;
prepare.py does so too and writes them as a checksummed shard.
"""
import os
import sys
import tempfile
import time

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from model import ConvStem
from prepare import (PREPARE_KEYS, at_least, exit_on_user_error, patchify, prepare, print_help, read_config,
                     write_json)
from probe import quiet

NETS, STEPS, PICTURES, SIZES = ("squeezenet1_1", "shufflenet_v2_x0_5", "resnet18"), 30, 3000, (32, 224)


def time_stem():
    """{name: GFLOP, ms and GFLOP/s of a step, medians}."""
    pictures = torch.randn(64, 3, 32, 32)
    tokens = torch.from_numpy(patchify(pictures.permute(0, 2, 3, 1).numpy(), 8))  # (64, 16, 192)
    nets = {"ours": (ConvStem(dict(patch=8, dim=192, length=16), 128), tokens)}
    nets |= {name: (torchvision.models.get_model(name, num_classes=10), pictures) for name in NETS}
    times, out = {name: [] for name in nets}, {}
    for _ in range(5 + STEPS):
        for name, (net, items) in nets.items():
            start = time.perf_counter()
            net(items).sum().backward()
            times[name].append(1e3 * (time.perf_counter() - start))
    for name, (net, items) in nets.items():
        with FlopCounterMode(display=False) as counter:
            net(items).sum().backward()
        gflop, ms = counter.get_total_flops() / 1e9, float(np.median(times[name][5:]))
        out[name] = dict(gflop=gflop, ms=ms, gflops=1e3 * gflop / ms)
        print(f"{name:20} {gflop:6.1f} GFLOP, {ms:6.1f} ms, {1e3 * gflop / ms:6.0f} GFLOP/s")
    return out


def make_folder(root):
    """PICTURES JPEGs in ten class folders, smooth as photographs are."""
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        path = os.path.join(root, f"class{i % 10}", f"{i}.jpg")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # noise of few pixels, enlarged: no flat areas, which would be read too fast, and no fine grain
        coarse = Image.fromarray(rng.integers(0, 256, (35, 40, 3), dtype=np.uint8))
        coarse.resize((320, 280), Image.Resampling.BICUBIC).save(path, quality=90)


def read_with_torchvision(root, size, workers):
    """Read every picture once, in batches, as a training loop would."""
    bicubic = torchvision.transforms.InterpolationMode.BICUBIC  # prepare.py's filter
    transform = torchvision.transforms.Compose([
        torchvision.transforms.Resize(size, bicubic), torchvision.transforms.CenterCrop(size),
        torchvision.transforms.PILToTensor()])
    pictures = torchvision.datasets.ImageFolder(root, transform)
    return sum(len(batch) for batch, _ in torch.utils.data.DataLoader(pictures, 64, num_workers=workers))


def time_reading(rounds=3):
    """{size: {reader: pictures a second, median}}."""
    out = {}
    with tempfile.TemporaryDirectory() as root:
        make_folder(os.path.join(root, "pictures"))
        for size in SIZES:
            rates = {}
            for turn in range(rounds):
                for workers in (1, os.cpu_count()):
                    others = 0 if workers == 1 else workers  # of a DataLoader: 0 reads in the main process
                    start = time.perf_counter()
                    read_with_torchvision(os.path.join(root, "pictures"), size, others)
                    middle = time.perf_counter()
                    flags = [f"--image=folder:{root}/pictures", f"--image_size={size}", "--patch_size=8",
                             f"--data_dir={root}/shards{turn}_{workers}", f"--workers={workers}"]
                    prepare(read_config(flags, PREPARE_KEYS), "image", quiet)
                    end = time.perf_counter()
                    for reader, seconds in (("ImageFolder", middle - start), ("prepare.py", end - middle)):
                        rates.setdefault(f"{reader}, {workers} workers", []).append(PICTURES / seconds)
            out[size] = {name: float(np.median(values)) for name, values in rates.items()}
            for name, rate in out[size].items():
                print(f"{size:4} pixels, {name:24} {rate:6.0f} pictures a second")
    return out


def main():
    keys = dict(threads=(0, "torch CPU threads (0: torch's choice)", at_least(0)))
    if "--help" in sys.argv:
        return print_help(__doc__, keys)
    cfg = read_config(sys.argv[1:], keys)
    if cfg["threads"]:
        torch.set_num_threads(cfg["threads"])
    os.makedirs("out", exist_ok=True)
    write_json("out/speed_pictures.json", dict(
        kind="speed", stem=time_stem(), reading=time_reading(), threads=torch.get_num_threads(),
        hardware=f"{os.cpu_count()} cores, torch {torch.__version__}, torchvision {torchvision.__version__}",
        command="python assets/results/speed_pictures.py"))
    print("wrote out/speed_pictures.json")


if __name__ == "__main__":
    exit_on_user_error(main)
