"""model.py: one trunk for every modality; per slot a map in (embed) and out (head); one label head.

    python train.py sample_configs/letters_text.py           # trains it on pictures and names, never paired
    python train.py sample_configs/letters_text.py --text=   # the same model on pictures alone
    python -m pytest -q -k "padding or future or rebuilds"   # what it promises

    tokens of image --embed.image--> |       | --head.image-------------> the image's own tokens
    tokens of text  --embed.text --> | trunk | --embed.text, transposed-> the text's own tokens
                                     |       | --label_head-------------> classes, SAME rows for every slot

The trunk and the label head are where modalities meet (Gupta et al. 2025, arXiv 2510.08492,
section 3). Nothing here knows which slot is the target, how many slots there are, or where data comes from.

Sections: the conv stem, the trunk, the model, initialisation, the linear probe.
"""
import math
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

OBJECTIVES = ("next", "reconstruct", "label")

# ------------------------------------------------------------------------------------------------------------
# the conv stem: a picture's patches, or a recording's log-mel frames -> one vector

FLOOR = 2.3  # in standard deviations of a mel, about 40 dB


class ConvStem(nn.Module):
    """A small ConvNet whose last positions are joined into ONE vector: to the trunk a picture is like a word.

    A stage is two 3x3 convolutions with norm and ReLU, then 2x2 pooling; as many stages as bring the picture
    down to one position a patch. Joining positions keeps where a stroke was, which their mean would forget.
    A recording is the picture (frames, mels) of its log-mels, halved by the first convolution, then 3 stages.
    """

    def __init__(self, slot, width):
        super().__init__()
        self.patch, self.mels = slot.get("patch"), slot.get("mels")
        if self.patch:
            if self.patch < 2 or self.patch & (self.patch - 1):
                raise ValueError("image_embed='conv' needs a patch_size that is a power of two, found "
                                 f"{self.patch}")
            stages, stride = int(math.log2(self.patch)), 1
            channels = slot["dim"] // self.patch**2
            rows = columns = math.isqrt(slot["length"]) * self.patch
        else:
            stages, stride, channels = 3, 2, 1
            rows, columns = slot["length"] * slot["dim"] // self.mels, self.mels
            if min(rows, columns) < 16:
                raise ValueError("audio_embed='conv' needs audio_mels and audio_frames of at least 16")
        sizes = [channels] + [max(8, width // 2 ** (stages - i)) for i in range(stages)]  # of 128: 16, 32, 64
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for before, after in zip(sizes, sizes[1:]):
            for inputs in (before, after):
                first = not self.convs
                self.convs.append(nn.Conv2d(inputs, after, 3, stride if first else 1, padding=1, bias=False))
                # groups, not batches: no picture enters another's, and no running average is state
                self.norms.append(nn.GroupNorm(math.gcd(8, after), after))
        positions = [-(-side // stride) // 2**stages for side in (rows, columns)]
        self.join = nn.Linear(math.prod(positions) * sizes[-1], width)

    def forward(self, tokens):  # (B, T, D): patches in reading order, or frames
        B, T, D = tokens.shape
        if self.patch:
            grid, p = math.isqrt(T), self.patch
            picture = tokens.view(B, grid, grid, p, p, D // p**2).permute(0, 5, 1, 3, 2, 4)
            picture = picture.reshape(B, -1, grid * p, grid * p)  # (B, c, S, S)
        else:
            picture = tokens.reshape(B, 1, -1, self.mels)  # (B, 1, frames, mels)
            # what lies FLOOR below the loudest is silence, like padding: hiss is not what is said
            picture = picture.maximum(picture.amax((2, 3), keepdim=True) - FLOOR)
        # every picture at the same brightness and contrast: ink and paper are not what a letter is; every mel
        # of a recording at the same mean: what voice and microphone add all along is not what is said
        mean = picture.mean((1, 2, 3) if self.patch else 2, keepdim=True)
        picture = (picture - mean) / (picture.std((1, 2, 3), keepdim=True) + 1e-3)
        # the channels of a pixel side by side: 9% less a step on one CPU thread, since pooling reads them in
        # one go; .to, because .contiguous() takes a single channel for done
        picture = picture.to(memory_format=torch.channels_last)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            picture = norm(conv(picture))
            if i % 2:
                picture = F.max_pool2d(picture, 2)  # before ReLU: the same numbers for less
            picture = F.relu(picture)
        return self.join(picture.flatten(1))[:, None]  # (B, 1, C)


# ------------------------------------------------------------------------------------------------------------
# the trunk


class Block(nn.Module):
    """Pre-norm attention and feed-forward, as in GPT-2, with ReLU and no biases in the matrices."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, h, causal, real):  # h (B, T, C); real (B, T) bool or None
        B, T, C = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        # padding stands on the right, so a causal query never reaches it: only the other kind needs a mask
        mask = None if causal or real is None else real[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        h = h + self.proj(attended.transpose(1, 2).reshape(B, T, C))
        return h + self.down(F.relu(self.up(self.norm2(h))))


class Trunk(nn.Module):
    """Blocks and a last norm."""

    def __init__(self, width, layers, heads):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, h, causal, real):
        """h (B, T, C) -> [h, the states after every block], the last one normed."""
        layers = [h]
        for block in self.blocks:
            layers.append(block(layers[-1], causal, real))
        layers[-1] = self.norm(layers[-1])
        return layers


# ------------------------------------------------------------------------------------------------------------
# the model


def at_least_float32(scores):
    """Losses are summed in float32 where autocast computed in half precision."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


class UML(nn.Module):
    """The unpaired multimodal learner.

    slots: {name: dict}, any number of them. Every slot has kind ("discrete" or "continuous"), length (in
        tokens) and loss (its objectives, joined by "+"). A discrete slot has vocab; a continuous one dim,
        mean and std (lists, repeated up to dim), a picture slot patch, a recording mels, and perhaps
        embed="conv". A slot with "label" has rows: those of the label head that it has examples of.
    classes: rows of the label head (0: none).
    temperature: learn one per slot with "label". label_smoothing: share of the target spread over a slot's
    classes. apart: every slot but the first has a trunk of its own; then only the label head is common.
    Raises ValueError, in one sentence, for a combination that cannot work.
    """

    def __init__(self, slots, classes=0, width=128, layers=4, heads=4, temperature=False,
                 label_smoothing=0.0, apart=False, seed=0):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.slots, self.label_smoothing = slots, label_smoothing
        self.embed, self.head = nn.ModuleDict(), nn.ModuleDict()
        self.position, self.hidden = nn.ParameterDict(), nn.ParameterDict()
        self.temperature = nn.ParameterDict()
        self.trunk = Trunk(width, layers, heads)
        self.own_trunk = nn.ModuleDict()
        self.label_head = nn.Linear(width, classes) if classes else None
        for number, (name, slot) in enumerate(slots.items()):
            self.add_slot(name, slot, width)
            if temperature and "label" in slot["loss"]:
                self.temperature[name] = nn.Parameter(torch.empty(1))  # its logarithm
            if apart and number > 0:
                self.own_trunk[name] = Trunk(width, layers, heads)
        self.init_parameters(seed)

    def add_slot(self, name, slot, width):
        """Embed, head, positions and buffers of one slot."""
        loss, objectives = f"{name}_loss='{slot['loss']}'", slot["loss"].split("+")
        if unknown := set(objectives) - set(OBJECTIVES):
            raise ValueError(f"{loss}: '{unknown.pop()}' is none of {', '.join(OBJECTIVES)}")
        if "next" in objectives and slot["length"] < 2:
            raise ValueError(f"{loss}: 'next' needs more than one token a sequence")
        conv = slot.get("embed") == "conv"
        if slot["kind"] == "discrete":  # one table in and out: the head is the embed, transposed
            self.embed[name] = nn.Embedding(slot["vocab"], width)
        else:
            for key in ("mean", "std"):  # buffers, so that they move to the GPU with the model
                value = torch.tensor(slot[key]).repeat(slot["dim"] // len(slot[key]))
                self.register_buffer(f"{name}_{key}", value)
            if conv and objectives != ["label"]:
                raise ValueError(f"embed 'conv' joins an item into one token, so {loss} can only be 'label': "
                                 "choose image_embed='linear' (audio_embed for recordings)")
            self.embed[name] = ConvStem(slot, width) if conv else nn.Linear(slot["dim"], width)
            if objectives != ["label"]:
                self.head[name] = nn.Linear(width, slot["dim"])
        if not conv:
            self.position[name] = nn.Parameter(torch.empty(slot["length"], width))
        if "label" in objectives:
            # rows (k,) of the label head, and for every row its place among them
            rows = torch.tensor(slot["rows"], dtype=torch.long)
            place = torch.zeros(self.label_head.out_features, dtype=torch.long)
            place[rows] = torch.arange(len(rows))
            self.register_buffer(f"{name}_rows", rows)
            self.register_buffer(f"{name}_place", place)
        if "reconstruct" in objectives:
            self.hidden[name] = nn.Parameter(torch.empty(width))  # stands in for a hidden token

    # -- forward ---------------------------------------------------------------------------------------------

    def normalise(self, slot, tokens):
        """Tokens as stored -> what embeds read and regressions predict: ids as they are, numbers scaled."""
        if self.slots[slot]["kind"] == "discrete":
            return tokens
        mean, std = getattr(self, f"{slot}_mean"), getattr(self, f"{slot}_std")
        return (tokens.to(mean.dtype) - mean) / std

    def states(self, slot, tokens, real=None, causal=False, hidden=None):
        """Trunk states of every layer, the last one normed: list of layers + 1 tensors (B, T, C).

        tokens: normalised (B, T, D), or ids (B, T). real: (B, T) bool, False on padding (None: no padding).
        hidden: (B, T) bool, True where "reconstruct" hides a token. Behind the conv stem T is 1.
        """
        h = self.embed[slot](tokens)
        if hidden is not None:
            h = torch.where(hidden[..., None], self.hidden[slot].to(h.dtype), h)
        if slot in self.position:
            h = h + self.position[slot][:h.shape[1]]
        trunk = self.own_trunk[slot] if slot in self.own_trunk else self.trunk
        return trunk(h, causal, real)

    def pooled_states(self, slot, tokens, real=None, layer=-1):
        """A layer's states, mean over the real tokens (B, C), under the attention the slot trains with."""
        h = self.states(slot, tokens, real, causal=self.slots[slot]["loss"] == "next")[layer]  # (B, T, C)
        if real is None:
            return h.mean(1)
        return (h * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    def label_scores(self, slot, pooled):
        """Pooled states (B, C) -> scores of all classes (B, classes)."""
        scores = at_least_float32(self.label_head(pooled))
        return scores * self.temperature[slot].exp() if slot in self.temperature else scores

    def token_loss(self, slot, h, wanted, where, count=None):
        """Cross-entropy or mean squared error of the tokens `wanted` predicted from h: summed over the places
        `where` (B, T), divided by `count` of them (None: by as many as there are)."""
        h, wanted = h[where], wanted[where]  # (n, C), (n,) or (n, D): only these pay for the vocabulary
        count = max(1, len(wanted)) if count is None else count
        if self.slots[slot]["kind"] == "discrete":
            logits = at_least_float32(F.linear(h, self.embed[slot].weight))  # the embed, transposed
            return F.cross_entropy(logits, wanted, reduction="sum") / count
        rebuilt = at_least_float32(self.head[slot](h))
        return F.mse_loss(rebuilt, wanted, reduction="sum") / (count * wanted.shape[-1])

    def label_loss(self, slot, tokens, real, labels, count=None):
        """Cross-entropy of the labels over the slot's own classes, summed and divided by `count`.

        Its own only: a class that only the text knows must not be unlearned by every picture.
        """
        rows, place = getattr(self, f"{slot}_rows"), getattr(self, f"{slot}_place")
        scores = self.label_scores(slot, self.pooled_states(slot, tokens, real))[:, rows]  # (B, k)
        loss = F.cross_entropy(scores, place[labels], reduction="sum", label_smoothing=self.label_smoothing)
        return loss / (len(labels) if count is None else count)

    def forward(self, slot, tokens, real=None, labels=None, hidden=None, counts=None):
        """The slot's loss on a batch, a scalar: the sum of its objectives.

        tokens (B, T, D) or (B, T) as stored; real (B, T) bool or None; labels (B,) rows of the label head;
        hidden (B, T) bool, the places that "reconstruct" hides and rebuilds.
        counts {objective: places}: what to divide by where this is one process's part of a larger batch.
        """
        objectives, counts, total = self.slots[slot]["loss"].split("+"), counts or {}, 0.0
        tokens = self.normalise(slot, tokens)
        every = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)  # (B, T)
        is_real = every if real is None else real
        if "next" in objectives:  # causal: state t predicts token t + 1
            h = self.states(slot, tokens[:, :-1], causal=True)[-1]  # (B, T - 1, C)
            total = total + self.token_loss(slot, h, tokens[:, 1:], is_real[:, 1:], counts.get("next"))
        if "label" in objectives:
            total = total + self.label_loss(slot, tokens, real, labels, counts.get("label"))
        if "reconstruct" in objectives:
            h = self.states(slot, tokens, real, hidden=hidden)[-1]  # (B, T, C)
            total = total + self.token_loss(slot, h, tokens, hidden & is_real, counts.get("reconstruct"))
        return total

    def features(self, slot, tokens, real=None, layer=-1):
        """What a probe reads of a raw batch: the pooled trunk output (B, C).

        Attention is causal if "next" is the slot's only loss. layer: 0 the embed, 1 ... after each block; -1
        (the default) the last, normed.
        """
        return self.pooled_states(slot, self.normalise(slot, tokens), real, layer)

    # -- initialisation --------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_parameters(self, seed):
        """Every value is drawn from (seed, the parameter's name) alone.

        So the trunk starts the same whatever slots stand around it, and the first rows of a longer label head
        equal those of a shorter one: all arms of a comparison share their start. (numpy's generator, because
        its first numbers stay the same when more are drawn, and torch's do not.)
        """
        for name, parameter in self.named_parameters():
            kind = name.split(".")[0]
            if parameter.dim() == 1 and kind != "hidden":  # norms are 1, biases and log temperatures 0
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            # parameter[0] is all inputs of one unit of a matrix or convolution, or one entry of a table
            std = 0.02 if kind == "hidden" else 1 / math.sqrt(parameter[0].numel())
            if "blocks" in name and name.endswith(("proj.weight", "down.weight")):
                std /= math.sqrt(2 * len(self.trunk.blocks))  # 2 writes a block: their sum keeps its size
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            values = rng.standard_normal(parameter.shape, np.float32) * np.float32(std)
            parameter.copy_(torch.from_numpy(values))


# ------------------------------------------------------------------------------------------------------------
# the linear probe: how well a straight cut through frozen features tells the classes apart


def linear_probe(features, labels, classes, l2=1.0):
    """Multinomial logistic regression on frozen features, solved to convergence by L-BFGS.

    features (n, D) float, labels (n,) int in 0..classes-1. Minimises the summed cross-entropy + l2/2 *
    |weight|^2 on standardised features (scikit-learn's C is 1/l2); the bias is free. Returns (weight
    (classes, D), bias (classes,)) for the features as given: scores = features @ weight.T + bias. Raises
    ValueError for fewer than two classes.
    """
    if len(labels) == 0 or classes < 2:
        raise ValueError("a linear probe needs examples of two classes at least, found "
                         f"{len(labels)} examples, {classes} classes")
    features, labels = features.float(), labels.long()
    mean, std = features.mean(0), features.std(0, unbiased=False).clamp_min(1e-6)
    standard = (features - mean) / std
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-5, tolerance_change=1e-9,
                               history_size=10, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(standard @ weight.T + bias, labels)
        loss = loss + 0.5 * l2 / len(labels) * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    weight = weight.detach() / std
    return weight, bias.detach() - weight @ mean
