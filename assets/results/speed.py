"""Time this trunk against others in ONE process, step by step in turn: medians, and medians of ratios.

    python assets/results/speed.py                # the reference shape, about two minutes
    python assets/results/speed.py --width=256

A step is forward, backward, clipping and AdamW on the same batch: next-token regression on 64 tokens of 16
numbers, batch 64, 4 layers, 4 heads, fp32. Absolute times drift on a shared machine; ratios of neighbouring
steps do not. The others are written here as their authors build them: GPT-2's block as nanoGPT has it (GELU,
no dropout, no biases), and PyTorch's own encoder layer, which the method's release uses, as wide as ours and
at its default of 2,048.
"""
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from model import UML
from prepare import at_least, exit_on_user_error, peak_memory, read_config, write_json
from train import KEYS, make_optimizer

B, T, D, LAYERS, HEADS = 64, 64, 16, 4, 4
STEPS = 60


class GPTBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attend = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, h):
        B, T, C = h.shape
        q, k, v = self.attend(self.norm1(h)).split(C, dim=2)
        q, k, v = (part.view(B, T, HEADS, C // HEADS).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.project(attended.transpose(1, 2).contiguous().view(B, T, C))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class Other(nn.Module):
    """Embed, positions, somebody's blocks, norm, head; called like UML on one slot."""

    def __init__(self, width, block, **how):
        super().__init__()
        self.embed, self.head = nn.Linear(D, width), nn.Linear(width, D)
        self.position = nn.Parameter(torch.randn(T, width) / math.sqrt(width))
        self.blocks = nn.ModuleList(block() for _ in range(LAYERS))
        self.norm, self.how = nn.LayerNorm(width), how

    def forward(self, _, tokens):
        h = self.embed(tokens[:, :-1]) + self.position[:T - 1]
        for block in self.blocks:
            h = block(h, **self.how)
        return F.mse_loss(self.head(self.norm(h)), tokens[:, 1:])


def main():
    keys = dict(width=(128, "channels of the trunk", at_least(4)),
                threads=(0, "torch CPU threads (0: torch's choice)", at_least(0)))
    cfg = read_config(sys.argv[1:], keys)
    if cfg["threads"]:
        torch.set_num_threads(cfg["threads"])
    torch.manual_seed(0)
    width, mask = cfg["width"], nn.Transformer.generate_square_subsequent_mask(T - 1)
    slot = dict(kind="continuous", length=T, dim=D, mean=[0.0], std=[1.0], loss="next")

    def encoder(wide):
        return lambda: nn.TransformerEncoderLayer(width, HEADS, wide, dropout=0.0, batch_first=True)

    models = {
        "ours": UML({"image": slot}, width=width, layers=LAYERS, heads=HEADS),
        "GPT-2 block": Other(width, lambda: GPTBlock(width)),
        "TransformerEncoder": Other(width, encoder(4 * width), src_mask=mask, is_causal=True),
        "TransformerEncoder, 2048": Other(width, encoder(2048), src_mask=mask, is_causal=True)}
    defaults = {key: default for key, (default, *_) in KEYS.items()}
    cpu = torch.device("cpu")
    optimizers = {name: make_optimizer(model, defaults, cpu) for name, model in models.items()}
    tokens, times = torch.randn(B, T, D), {name: [] for name in models}
    for step in range(5 + STEPS):
        for name, model in models.items():
            start = time.perf_counter()
            optimizers[name].zero_grad(set_to_none=True)
            model("image", tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            times[name].append(1e3 * (time.perf_counter() - start))
    ours, out = np.array(times["ours"][5:]), {}
    for name, values in times.items():
        low, ratio, high = np.percentile(np.array(values[5:]) / ours, (10, 50, 90))
        out[name] = dict(ms=float(np.median(values[5:])), ratio=ratio, ratio_p10=low, ratio_p90=high)
        print(f"{name:26} {out[name]['ms']:7.1f} ms a step, {ratio:.2f} of ours ({low:.2f} to {high:.2f})")
    path = os.path.join("out", f"speed_{width}.json")
    os.makedirs("out", exist_ok=True)
    write_json(path, dict(kind="speed", width=width, threads=torch.get_num_threads(), steps=STEPS, models=out,
                          hardware=f"{os.cpu_count()} cores, torch {torch.__version__}",
                          command="python assets/results/speed.py " + " ".join(sys.argv[1:])))
    print(json.dumps(dict(written=path, peak_memory=peak_memory())))


if __name__ == "__main__":
    exit_on_user_error(main)
