"""The trunks that speed.py times beside ours, written as their authors build them.

    python assets/results/speed.py

GPT-2's block as nanoGPT has it (GELU, no dropout, no biases), and PyTorch's own encoder layer, which the
method's release uses, as wide as ours and at its default width of 2,048.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import UML

B, T, D, LAYERS, HEADS = 64, 64, 16, 4, 4


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
        h = self.embed(tokens[:, :-1]) + self.position[:T - 1]  # (B, T - 1, C)
        for block in self.blocks:
            h = block(h, **self.how)
        return F.mse_loss(self.head(self.norm(h)), tokens[:, 1:])


def make_trunks(width):
    """{name: model}, each called as model("image", tokens) -> loss."""
    slot = dict(kind="continuous", length=T, dim=D, mean=[0.0], std=[1.0], loss=("next",))
    mask = nn.Transformer.generate_square_subsequent_mask(T - 1)

    def encoder(wide):
        return lambda: nn.TransformerEncoderLayer(width, HEADS, wide, dropout=0.0, batch_first=True)

    return {
        "ours": UML({"image": slot}, width=width, layers=LAYERS, heads=HEADS),
        "GPT-2 block": Other(width, lambda: GPTBlock(width)),
        "TransformerEncoder": Other(width, encoder(4 * width), src_mask=mask, is_causal=True),
        "TransformerEncoder, 2048": Other(width, encoder(2048), src_mask=mask, is_causal=True)}
