"""model.py: one transformer trunk for every modality; per slot a small map in (embed) and out (head); one label head.

    python train.py sample_configs/shapes_text.py                 # trains it on pictures and sentences, never paired
    python train.py sample_configs/shapes_text.py --text=         # the same model on pictures alone
    python -m pytest -q -k "padding or future or rebuilds or shared"  # what it promises

        tokens of image --embed.image--> |       | --head.image-----------> the image's own tokens
        tokens of text  --embed.text --> | trunk | --embed.text, transposed--> the text's own tokens
                                         |       | --label_head-----------> classes, the SAME rows for every slot

The trunk, its last norm, the label head and the bottleneck are where modalities meet (Gupta et al. 2025, arXiv
2510.08492, section 3). Nothing here knows which slot is the target, how many slots there are, or where data comes from.

Sections: embeds, trunk, the model, initialisation, linear probe.
"""
import math
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# embeds: tokens -> (B, T, C)


class PatchStem(nn.Module):
    """A small convolutional embed: patches are put back together into the picture, and convolved down to one vector each.

    Neighbouring patches see each other, which makes a stronger picture model than a linear map of each patch alone.
    """

    def __init__(self, patch, channels, width):
        super().__init__()
        halvings = int(math.log2(patch))
        sizes = [channels] + [max(16, width // 2 ** (halvings - 1 - i)) for i in range(halvings)]
        self.patch = patch
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(sizes, sizes[1:]))
        self.out = nn.Linear(sizes[-1], width)

    def forward(self, tokens):  # (B, T, p*p*c) normalised patches in reading order
        B, T, D = tokens.shape
        grid, p = math.isqrt(T), self.patch
        picture = tokens.view(B, grid, grid, p, p, D // p**2).permute(0, 5, 1, 3, 2, 4).reshape(B, -1, grid * p, grid * p)
        for conv in self.convs:
            picture = F.relu(conv(picture))
        return self.out(picture.flatten(2).transpose(1, 2))  # (B, T, C)


# ---------------------------------------------------------------------------------------------------------------------
# trunk


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
        # Padding stands on the right, so a causal query never reaches it: only the bidirectional pass needs a key mask.
        mask = None if causal or real is None else real[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        h = h + self.proj(attended.transpose(1, 2).reshape(B, T, C))
        return h + self.down(F.relu(self.up(self.norm2(h))))


# ---------------------------------------------------------------------------------------------------------------------
# the model


def at_least_float32(scores):
    """Losses are summed in float32 where autocast computed in half precision."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


class UML(nn.Module):
    """The unpaired multimodal learner.

    slots: {name: dict}, any number of them. Every slot has kind ("discrete" or "continuous"), length (in tokens) and loss (its
        objectives, joined by "+"). A discrete slot has vocab; a continuous one dim, mean and std (lists, repeated up to dim), a
        picture slot patch besides. A slot with "label" has rows: those of the label head that it trains.
    classes: rows of the shared label head (0: none). image_embed: "linear" or "conv", for slots with a patch.
    mask_ratio=0: "reconstruct" hides nothing. bottleneck=k > 0 sends "reconstruct" through k numbers an item; they are the
    features of a slot that has no other objective. temperature: learn one per slot with "label".
    Raises ValueError, in one sentence, for a combination that cannot work.
    """

    def __init__(self, slots, classes=0, width=128, layers=4, heads=4, bottleneck=0, mask_ratio=0.5, image_embed="linear",
                 temperature=False, seed=0):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.slots = slots
        self.embed, self.head = nn.ModuleDict(), nn.ModuleDict()
        self.position, self.hidden, self.temperature = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name, slot in slots.items():
            objectives = slot["loss"].split("+")
            if unknown := set(objectives) - {"next", "reconstruct", "label"}:
                raise ValueError(f"{name}_loss='{slot['loss']}': '{unknown.pop()}' is none of next, reconstruct, label")
            if "next" in objectives and slot["length"] < 2:
                raise ValueError(f"{name}_loss='{slot['loss']}': 'next' needs more than one token a sequence")
            if "reconstruct" in objectives and not mask_ratio and not bottleneck:
                raise ValueError(f"{name}_loss='{slot['loss']}': set mask_ratio or bottleneck, else 'reconstruct' only copies")
            if slot["kind"] == "discrete":  # one table in and out: the head is the embed, transposed
                self.embed[name] = nn.Embedding(slot["vocab"], width)
            else:
                for key in ("mean", "std"):  # buffers, so that they move to the GPU with the model
                    value = torch.tensor(slot[key]).repeat(slot["dim"] // len(slot[key]))
                    self.register_buffer(f"{name}_{key}", value)
                if image_embed == "conv" and "patch" in slot:
                    if "next" in objectives:
                        raise ValueError(f"image_embed='conv' shows each patch its neighbours, so {name}_loss cannot hold 'next': "
                                         "set image_embed='linear'")
                    if 2 ** int(math.log2(slot["patch"])) != slot["patch"] or slot["patch"] < 2:
                        raise ValueError(f"image_embed='conv' needs a patch_size that is a power of two, found {slot['patch']}")
                    self.embed[name] = PatchStem(slot["patch"], slot["dim"] // slot["patch"] ** 2, width)
                else:
                    self.embed[name] = nn.Linear(slot["dim"], width)
                if objectives != ["label"]:
                    self.head[name] = nn.Linear(width, slot["dim"])
            if "label" in objectives:  # the rows this slot has examples of; it leaves other slots' classes alone
                mask = torch.zeros(classes, dtype=torch.bool)
                mask[slot["rows"]] = True
                self.register_buffer(f"{name}_rows", mask)
                if temperature:
                    self.temperature[name] = nn.Parameter(torch.empty(1))  # its logarithm
            self.position[name] = nn.Parameter(torch.empty(slot["length"], width))
            if "reconstruct" in objectives and mask_ratio:
                self.hidden[name] = nn.Parameter(torch.empty(width))  # stands in for a hidden token
            if "reconstruct" in objectives and bottleneck:
                self.position[f"{name}_decoder"] = nn.Parameter(torch.empty(slot["length"], width))
        self.trunk = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.label_head = nn.Linear(width, classes) if classes else None
        self.bottleneck = None
        if bottleneck:  # shared like the trunk: C -> k, and back through one feed-forward
            self.bottleneck = nn.ModuleDict(dict(down=nn.Linear(width, bottleneck), back=nn.Linear(bottleneck, width),
                                                 up=nn.Linear(width, 4 * width), out=nn.Linear(4 * width, width)))
        self.init_parameters(seed)

    # -- forward ------------------------------------------------------------------------------------------------------

    def normalise(self, slot, tokens):
        """Raw tokens as stored -> what embeds read and regressions predict: ids as they are, numbers standardised."""
        if self.slots[slot]["kind"] == "discrete":
            return tokens
        mean, std = getattr(self, f"{slot}_mean"), getattr(self, f"{slot}_std")
        return (tokens.to(mean.dtype) - mean) / std

    def states(self, slot, tokens, real=None, causal=False, hidden=None):
        """Trunk states of every layer, the last one normed: list of layers + 1 tensors (B, T, C).

        tokens: normalised (B, T, D), or ids (B, T). real: (B, T) bool, False on padding (None: no padding).
        hidden: (B, T) bool, True where "reconstruct" hides a token.
        """
        if hidden is not None and tokens.dim() == 3:
            tokens = tokens.masked_fill(hidden[..., None], 0.0)  # before the embed: a convolution would leak it to neighbours
        h = self.embed[slot](tokens)
        if hidden is not None:
            h = torch.where(hidden[..., None], self.hidden[slot].to(h.dtype), h)
        h = h + self.position[slot][:h.shape[1]]
        layers = [h]
        for block in self.trunk:
            h = block(h, causal, real)
            layers.append(h)
        layers[-1] = self.norm(h)
        return layers

    def pool(self, h, real=None):
        """Mean over the real tokens: (B, T, C) -> (B, C)."""
        if real is None:
            return h.mean(1)
        return (h * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    def pooled_states(self, slot, tokens, real=None, layer=-1):
        """Pooled states of a layer for normalised tokens, under the attention the slot is trained with; (B, C)."""
        return self.pool(self.states(slot, tokens, real, causal=self.slots[slot]["loss"] == "next")[layer], real)

    def predict_tokens(self, slot, h):
        """The slot's own head: states (..., C) -> logits over its vocabulary, or normalised tokens (..., D)."""
        return F.linear(h, self.embed[slot].weight) if self.slots[slot]["kind"] == "discrete" else self.head[slot](h)

    def token_loss(self, slot, h, wanted, where, count=None):
        """Cross-entropy or mean squared error of the tokens `wanted` predicted from h: summed over the places `where` (B, T),
        divided by `count` of them (None: by as many as there are)."""
        predicted, wanted = at_least_float32(self.predict_tokens(slot, h[where])), wanted[where]  # only these pay for the vocabulary
        count = max(1, len(wanted)) if count is None else count
        if self.slots[slot]["kind"] == "discrete":
            return F.cross_entropy(predicted, wanted, reduction="sum") / count
        return F.mse_loss(predicted, wanted, reduction="sum") / (count * wanted.shape[-1])

    def forward(self, slot, tokens, real=None, labels=None, hidden=None, counts=None):
        """The slot's loss on a batch, a scalar: the sum of its objectives.

        tokens (B, T, D) or (B, T) as stored; real (B, T) bool or None; labels (B,) rows of the label head;
        hidden (B, T) bool, the places that "reconstruct" hides and rebuilds (None: it rebuilds all and hides none).
        counts {objective: places}: what to divide by where this is one process's part of a larger batch; None: the whole.
        """
        objectives, counts, total = self.slots[slot]["loss"].split("+"), counts or {}, 0.0
        tokens = self.normalise(slot, tokens)
        is_real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if real is None else real
        if "next" in objectives:  # causal: state t predicts token t + 1
            h = self.states(slot, tokens[:, :-1], causal=True)[-1]  # (B, T - 1, C)
            total = total + self.token_loss(slot, h, tokens[:, 1:], is_real[:, 1:], counts.get("next"))
        if "label" in objectives:
            # over the slot's own classes: a class that only the text knows must not be unlearned by every picture
            scores = at_least_float32(self.label_head(self.pooled_states(slot, tokens, real)))  # (B, classes)
            if slot in self.temperature:
                scores = scores * self.temperature[slot].exp()
            scores = scores.masked_fill(~getattr(self, f"{slot}_rows"), -torch.inf)
            total = total + F.cross_entropy(scores, labels, reduction="sum") / counts.get("label", len(labels))
        if "reconstruct" in objectives:
            h = self.states(slot, tokens, real, hidden=hidden)[-1]  # (B, T, C)
            if self.bottleneck is not None:  # all the decoder learns of the sequence are k numbers
                h = self.bottleneck.back(self.bottleneck.down(self.pool(h, real)))[:, None]  # (B, 1, C), through (B, k)
                h = h + self.position[f"{slot}_decoder"][:tokens.shape[1]]
                h = h + self.bottleneck.out(F.relu(self.bottleneck.up(h)))
            rebuilt = is_real if hidden is None else hidden & is_real
            total = total + self.token_loss(slot, h, tokens, rebuilt, counts.get("reconstruct"))
        return total

    def features(self, slot, tokens, real=None, layer=-1):
        """What a probe reads of a raw batch: the pooled trunk output (B, C); (B, k), what passes the bottleneck, where there is one
        and "reconstruct" is the slot's only loss.

        Attention is causal if "next" is the slot's only loss, else bidirectional. layer: 0 the embed, 1 ... after each
        block; -1 (the default) the last, normed.
        """
        h = self.pooled_states(slot, self.normalise(slot, tokens), real, layer)
        through = self.bottleneck is not None and self.slots[slot]["loss"] == "reconstruct" and layer == -1
        return self.bottleneck.down(h) if through else h

    # -- initialisation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_parameters(self, seed):
        """Every value is drawn from (seed, the parameter's name) alone.

        So the trunk starts the same whatever slots stand around it, and the first rows of a longer label head equal those
        of a shorter one: all arms of a comparison share their start. (numpy's, because its first numbers stay the same when more
        are drawn, and torch's do not.)
        """
        for name, parameter in self.named_parameters():
            kind = name.split(".")[0]
            if parameter.dim() == 1 and kind != "hidden":  # LayerNorm weights are 1, biases and log temperatures 0
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            # parameter[0] is one row: all inputs of one unit of a matrix or convolution, or one entry of a table
            std = 0.02 if kind in ("hidden", "label_head") else 1 / math.sqrt(parameter[0].numel())
            if name.endswith(("proj.weight", "down.weight")) and kind == "trunk":
                std /= math.sqrt(2 * len(self.trunk))  # 2 residual writes a block, so that their sum keeps its size
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            parameter.copy_(torch.from_numpy(rng.standard_normal(parameter.shape, np.float32) * np.float32(std)))


# ---------------------------------------------------------------------------------------------------------------------
# linear probe: how well a straight cut through frozen features tells the classes apart


def linear_probe(features, labels, classes, l2=1.0):
    """Multinomial logistic regression on frozen features, solved to convergence by L-BFGS.

    features (n, D) float, labels (n,) int in 0..classes-1. Minimises the summed cross-entropy + l2/2 * |weight|^2 on
    standardised features (scikit-learn's C is 1/l2); the bias is free. Returns (weight (classes, D), bias (classes,)) for
    the features as given: scores = features @ weight.T + bias. Raises ValueError for fewer than two classes.
    """
    if len(labels) == 0 or classes < 2:
        raise ValueError(f"a linear probe needs examples of two classes at least, found {len(labels)} examples, {classes} classes")
    features, labels = features.float(), labels.long()
    mean, std = features.mean(0), features.std(0, unbiased=False).clamp_min(1e-6)
    standard = (features - mean) / std
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-5, tolerance_change=1e-9, history_size=10,
                               line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(standard @ weight.T + bias, labels) + 0.5 * l2 / len(labels) * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    weight = weight.detach() / std
    return weight, bias.detach() - weight @ mean
