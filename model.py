"""model.py: one trunk for every modality; per slot a map in (embed) and out (head); one label head for all.

    python train.py sample_configs/letters_text.py           # trains it on pictures and names, never paired
    python train.py sample_configs/letters_text.py --text=   # the same model on pictures alone
    python -m pytest -q -k "padding or future or objective"  # what it promises

    tokens of image --embed of image--> |       | --head of image-------------> the image's own tokens
    tokens of text  --embed of text---> | trunk | --embed of text, transposed-> the text's own tokens
                                        |       | --label head----------------> classes, SAME rows for all

The trunk and the label head are where modalities meet (Gupta et al. 2025, arXiv 2510.08492,
section 3). Nothing here knows where data comes from; that the first slot is the target matters to `share`.

Sections: embeds of whole items, the trunk, objectives, one slot's own parts, the model, initialisation.
"""
import math
import zlib
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------------------
# embeds that turn a whole item into one vector: the conv stem, and a pretrained encoder of pictures

SILENCE = 2.3  # a log-mel this far below the loudest one (in standard deviations, about 40 dB) is silence


class StandardConv(nn.Conv2d):
    """A convolution that first gives the weights of each output channel mean 0 and the same length.

    Weight standardisation (arXiv 1903.10520): beside GroupNorm it does what BatchNorm is used for, without
    statistics of other items. On photographs it adds six points, on letters it takes three.
    """

    def forward(self, picture):
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5) / math.sqrt(self.weight[0].numel())
        return F.conv2d(picture, weight, None, self.stride, self.padding)


class ConvStem(nn.Module):
    """A small ConvNet that turns a whole item into ONE vector: to the trunk, a picture is like one word.

    A stage is two 3x3 convolutions with norm and ReLU, then 2x2 pooling. A picture gets as many stages as
    leave one position for each patch; a recording is read as the picture (frames, mels) of its log-mels, its
    first convolution has stride 2, and 3 stages follow. The positions that remain are joined by one linear
    map, not averaged: an average would forget where on the page a stroke was.
    """

    def __init__(self, slot, width):
        super().__init__()
        self.patch, self.mels = slot.get("patch"), slot.get("mels")
        self.equal_contrast = slot.get("equal_contrast", True)
        if self.patch:
            if self.patch < 2 or self.patch & (self.patch - 1):
                raise ValueError("embed 'conv' needs a patch_size that is a power of two, found "
                                 f"{self.patch}")
            stages, stride = int(math.log2(self.patch)), 1
            channels = slot["dim"] // self.patch**2
            rows = columns = math.isqrt(slot["length"]) * self.patch
        else:
            stages, stride, channels = 3, 2, 1
            rows, columns = slot["length"] * slot["dim"] // self.mels, self.mels
            if min(rows, columns) < 16:
                raise ValueError("embed 'conv' needs audio_mels and audio_frames of at least 16")
        # channels before the first stage and after each: for a width of 128 and 3 stages 1, 16, 32, 64
        sizes = [channels] + [max(8, width // 2 ** (stages - i)) for i in range(stages)]
        positions = [math.ceil(side / stride) // 2**stages for side in (rows, columns)]
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        conv = StandardConv if slot.get("standard_weights") else nn.Conv2d
        for before, after in zip(sizes, sizes[1:]):
            for inputs in (before, after):
                self.convs.append(conv(inputs, after, 3, stride, padding=1, bias=False))
                # GroupNorm, not BatchNorm: each picture is normalised by itself, and there are no running
                # statistics to save.
                self.norms.append(nn.GroupNorm(math.gcd(8, after), after))
                stride = 1  # only the first convolution may have another
        self.join = nn.Linear(math.prod(positions) * sizes[-1], width)

    def forward(self, tokens):
        """tokens (B, T, D), patches in reading order or groups of frames -> (B, 1, C)."""
        if self.patch:
            picture = pictures_of(tokens, self.patch)  # (B, channels, S, S)
            mean = picture.mean((1, 2, 3), keepdim=True)
        else:
            picture = tokens.reshape(len(tokens), 1, -1, self.mels)  # (B, 1, frames, mels)
            # Clip what lies far below the loudest, so that hiss looks like silence, and so does padding.
            picture = picture.maximum(picture.amax((2, 3), keepdim=True) - SILENCE)
            # A microphone and a voice colour all frames alike: each mel loses its mean over the frames.
            mean = picture.mean(2, keepdim=True)
        # a letter is the same in grey and in black; the tone of a skin is not
        if self.equal_contrast or not self.patch:
            picture = (picture - mean) / (picture.std((1, 2, 3), keepdim=True) + 1e-3)
        # Store the channels of a pixel side by side: pooling is then faster (9% of a step on one CPU thread).
        picture = picture.to(memory_format=torch.channels_last)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            picture = norm(conv(picture))
            if i % 2 == 1:  # the second convolution of a stage
                picture = F.max_pool2d(picture, 2)
            picture = F.relu(picture)  # after pooling: the same numbers, computed on a quarter of the pixels
        return self.join(picture.flatten(1))[:, None]


def pictures_of(tokens, patch):
    """Patches in reading order (B, T, D) -> pictures (B, channels, S, S)."""
    B, T, D = tokens.shape
    grid = math.isqrt(T)
    cut = tokens.view(B, grid, grid, patch, patch, D // patch**2).permute(0, 5, 1, 3, 2, 4)
    return cut.reshape(B, -1, grid * patch, grid * patch)


class PretrainedEmbed(nn.Module):
    """A timm model of whole pictures, fine-tuned as a slot's embed, and one linear map to the trunk's width.

    Here only its architecture is built; its weights come from train.py, or from a checkpoint.
    """

    def __init__(self, slot, width):
        super().__init__()
        import timm
        encoder, self.patch, self.batchnorm = slot["encoder"], slot["patch"], slot["batchnorm"]
        self.net = timm.create_model(encoder["architecture"], pretrained=False, num_classes=0,
                                     **encoder["arguments"])
        self.train()
        self.join = nn.Linear(getattr(self.net, "head_hidden_size", self.net.num_features), width)
        for key in ("mean", "std"):  # of its own training pictures, for numbers from 0 to 1
            self.register_buffer(key, torch.tensor(encoder[key])[:, None, None])

    def train(self, mode=True):
        """Without `batchnorm` all stays as in evaluation, with statistics of its own training pictures."""
        super().train(mode)
        self.net.eval()  # no dropout: it would draw numbers that no checkpoint keeps
        for part in self.net.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.train(mode and self.batchnorm)
        return self

    def forward(self, tokens):
        """tokens (B, T, D) from 0 to 1 -> (B, 1, C). Greys become three equal colours."""
        pictures = pictures_of(tokens, self.patch).expand(-1, 3, -1, -1)  # (B, 3, S, S)
        return self.join(self.net((pictures - self.mean) / self.std))[:, None]


# ------------------------------------------------------------------------------------------------------------
# the trunk: the weights that all modalities share


class Block(nn.Module):
    """Pre-norm attention and feed-forward, as in GPT-2, with ReLU and without biases in the matrices."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, h, causal, real):
        """h (B, T, C); real (B, T) bool, False on padding, or None -> (B, T, C)."""
        B, T, C = h.shape
        qkv = self.qkv(self.norm1(h)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, C / heads) each
        # Padding stands on the right, where a causal query never looks: only the other kind needs a mask.
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
        """h (B, T, C) -> [h, the states after each block], each (B, T, C), the last one normed."""
        layers = [h]
        for block in self.blocks:
            layers.append(block(layers[-1], causal, real))
        layers[-1] = self.norm(layers[-1])
        return layers


class LanguageTrunk(nn.Module):
    """A language model of transformers as the trunk, BERT- or GPT-2-like: it reads embeddings, not words.

    config: its configuration as a dict. As above, weights come from train.py or a checkpoint.
    """

    def __init__(self, config, width):
        super().__init__()
        from transformers import AutoConfig, AutoModel
        self.net = AutoModel.from_config(AutoConfig.for_model(**config)).eval()
        if not all(hasattr(self.net.config, key) for key in ("hidden_size", "max_position_embeddings")):
            raise ValueError(f"trunk='hf:...' takes models like BERT and GPT-2, not {config['model_type']}")
        if self.net.config.hidden_size != width:
            raise ValueError(f"the language model is {self.net.config.hidden_size} wide: set width to that, "
                             f"not to {width}")
        self.net.set_input_embeddings(None)  # a slot's embed stands in for its table of words
        self.net.pooler = None  # BERT's own summary; we take the mean instead

    def train(self, mode=True):
        """Dropout stays off, as in our own trunk."""
        return super().train(False)

    def forward(self, h, causal, real):
        """As Trunk.forward, but `causal` is decided by the kind of model: GPT-2 looks back only, BERT not."""
        mask = None if real is None else real.long()
        return list(self.net(inputs_embeds=h, attention_mask=mask, output_hidden_states=True).hidden_states)

    def check(self, name, adapter, length):
        """Raise ValueError where a slot asks for what this language model cannot do."""
        longest = self.net.config.max_position_embeddings
        if length > longest and adapter.position is not None:
            raise ValueError(f"{name} has items of {length} tokens, the language model reads {longest}")
        pair = torch.zeros(2, 2, self.net.config.hidden_size)
        pair[1, 1, ::2] = 9.0  # another second token: a model that looks back only does not change the first
        first, second = self(pair, True, None)[-1][:, 0]
        if "next" in adapter.objectives and not torch.allclose(first, second, atol=1e-6):
            raise ValueError(f"{name}_loss=next needs a language model that looks back only, as GPT-2 does")


# Which modules of the target's trunk an auxiliary uses too, by the value of the key `share`; of the others it
# has its own. "trunk": all of them; "added": see AddedLinear. Only with "none" the label head is not shared.
SHARES = dict(trunk=None, attention=("qkv", "proj"), feedforward=("up", "down"),
              norms=("norm1", "norm2", "norm"), head=(), none=(), added=())


class AddedLinear(nn.Linear):
    """The target's W + lambda W', where W' is an auxiliary's and lambda starts at 0 and is learned.

    Cross-modal re-parameterisation, M2PT (arXiv 2401.14405). W' learns from both modalities. After training
    W + lambda W' can be stored as one matrix.
    """

    def __init__(self, linear, others):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.others = others  # a plain list of their nn.Linear: their weights are listed once, as theirs
        self.scales = nn.Parameter(torch.empty(len(others)))

    def forward(self, h):
        weight = self.weight + sum(scale * other.weight for scale, other in zip(self.scales, self.others))
        return F.linear(h, weight)


# ------------------------------------------------------------------------------------------------------------
# objectives: functions of (model, slot name, batch) -> a scalar loss. A new one is a function here and a line
# in the table OBJECTIVES.


class Batch(NamedTuple):
    """What an objective may read."""
    tokens: torch.Tensor         # normalised (B, T, D), or ids (B, T)
    real: torch.Tensor | None    # (B, T) bool, False on padding; None: there is no padding
    places: torch.Tensor         # (B, T) bool, like real, but never None
    labels: torch.Tensor | None  # (B,) rows of the label head
    hidden: torch.Tensor | None  # (B, T) bool, True where a token is hidden from the model


def next_loss(model, name, batch):
    """Predict every token from those before it: state t has seen tokens 0 to t and predicts t + 1."""
    h = model.states(name, batch.tokens[:, :-1], causal=True)[-1]  # (B, T - 1, C)
    return token_loss(model, name, h, batch.tokens[:, 1:], batch.places[:, 1:])


def reconstruct_loss(model, name, batch):
    """Hide some tokens and rebuild them from the others."""
    h = model.states(name, batch.tokens, batch.real, hidden=batch.hidden)[-1]  # (B, T, C)
    return token_loss(model, name, h, batch.tokens, batch.hidden & batch.places)


def label_loss(model, name, batch):
    """Cross-entropy of the label, read off the mean of the trunk's last states.

    The softmax is over this slot's classes only; otherwise every picture batch would push down classes that
    only the text has.
    """
    adapter = model.adapters[name]
    pooled = mean_over_real(model.states(name, batch.tokens, batch.real)[-1], batch.real)
    scores = model.label_scores(name, pooled)[:, adapter.rows]  # (B, k)
    return F.cross_entropy(scores, adapter.place[batch.labels], label_smoothing=model.label_smoothing)


class Objective(NamedTuple):
    """An objective and what it needs of a slot."""
    loss: Callable
    labels: bool = False    # reads batch.labels, so the slot's source must have classes
    sequence: bool = False  # needs more than one token an item
    head: bool = False      # predicts tokens, so the slot needs a head
    hides: bool = False     # reads batch.hidden
    causal: bool = False    # its attention looks back only


OBJECTIVES = {
    "next": Objective(next_loss, sequence=True, head=True, causal=True),
    "reconstruct": Objective(reconstruct_loss, head=True, hides=True),
    "label": Objective(label_loss, labels=True),
}


def token_loss(model, name, h, wanted, where):
    """Predict the tokens `wanted` from states h (B, T, C): the mean over the places `where` (B, T).

    Cross-entropy for ids (B, T), squared error for numbers (B, T, D).
    """
    adapter = model.adapters[name]
    h, wanted = h[where], wanted[where]  # (n, C), (n,) or (n, D): only these places pay for the vocabulary
    count = max(1, len(wanted))
    if adapter.discrete:
        logits = F.linear(h, adapter.embed.weight)  # (n, vocab): the embed, transposed
        return F.cross_entropy(logits, wanted, reduction="sum") / count
    return F.mse_loss(adapter.head(h), wanted, reduction="sum") / (count * wanted.shape[-1])


def mean_over_real(h, real):
    """States (B, T, C) -> their mean over the real tokens (B, C)."""
    if real is None:
        return h.mean(1)
    return (h * real[..., None]).sum(1) / real.sum(1, keepdim=True)


# ------------------------------------------------------------------------------------------------------------
# one slot's own parts


class Adapter(nn.Module):
    """All that belongs to ONE slot, such as "image": its maps into and out of the trunk, and its statistics.

    embed: tokens -> (B, T, C). head: (B, T, C) -> predicted tokens; ids have none, their table serves both
    ways. position (T, C). mean, std (D,): of the training tokens. hidden (C,): stands in for a hidden token.
    log_temperature (1,): of the label scores. rows (k,): the rows of the label head that the slot has
    examples of; place[row]: where that row stands in `rows`, so that labels become numbers 0 to k - 1.
    """

    def __init__(self, name, slot, width, classes, temperature):
        super().__init__()
        self.objectives, self.discrete = tuple(slot["loss"]), slot["kind"] == "discrete"
        kind = slot.get("embed", "linear")
        joined = kind != "linear"  # the embed makes ONE token of an item
        check_objectives(name, self.objectives, slot["length"], kind)
        needs = [OBJECTIVES[objective] for objective in self.objectives]
        # "next" alone: features are read under the attention they were trained with
        self.causal = all(need.causal for need in needs)
        if self.discrete:
            self.embed = nn.Embedding(slot["vocab"], width)
        else:
            for key in ("mean", "std"):  # buffers, so that they move to the GPU with the model
                value = torch.tensor(slot[key]).repeat(slot["dim"] // len(slot[key]))
                self.register_buffer(key, value)
            if kind == "linear":
                self.embed = nn.Linear(slot["dim"], width)
            else:
                self.embed = dict(conv=ConvStem, timm=PretrainedEmbed)[kind](slot, width)
            if any(need.head for need in needs):
                self.head = nn.Linear(width, slot["dim"])
        # one token has no place among others
        self.position = None if joined else nn.Parameter(torch.empty(slot["length"], width))
        if any(need.hides for need in needs):
            self.hidden = nn.Parameter(torch.empty(width))
        self.log_temperature = None
        if "label" in self.objectives:
            self.register_buffer("rows", torch.tensor(slot["rows"], dtype=torch.long))
            self.register_buffer("place", torch.zeros(classes, dtype=torch.long))
            self.place[self.rows] = torch.arange(len(self.rows))
            if temperature:
                self.log_temperature = nn.Parameter(torch.empty(1))


def check_objectives(name, objectives, length, embed):
    """Raise ValueError, in one sentence, where a slot cannot have what its objectives need."""
    loss = f"{name}_loss='{'+'.join(objectives)}'"
    for objective in objectives:
        if objective not in OBJECTIVES:
            raise ValueError(f"{loss}: '{objective}' is none of {', '.join(OBJECTIVES)}")
        if OBJECTIVES[objective].head and embed != "linear":
            raise ValueError(f"{loss}: '{objective}' predicts tokens, but {name}_embed='{embed}' joins an "
                             f"item into one: choose {name}_embed='linear'")
        if OBJECTIVES[objective].sequence and length < 2:
            raise ValueError(f"{loss}: '{objective}' needs more than one token a sequence")


# ------------------------------------------------------------------------------------------------------------
# the model


class UML(nn.Module):
    """The unpaired multimodal learner.

    slots: {name: dict}, any number of them. Every slot has kind ("discrete" or "continuous"), length (in
        tokens) and loss (a tuple of objectives). A discrete slot has vocab; a continuous one dim, mean and
        std (lists, repeated up to dim), a picture slot patch, a recording mels, and perhaps embed="conv" and
        standard_weights and equal_contrast (bool), or embed="timm", encoder (what is needed to build it) and
        batchnorm. A slot with "label" has rows: those of the label head that it has examples of.
    classes: rows of the label head (0: none).
    temperature: learn one per slot with "label". label_smoothing: share of the target spread over a slot's
    classes. share: one of SHARES, what the other slots share with the first, the target.
    trunk: configuration of a language model that is the trunk, with layers and heads of its own; width must
    be its width.
    Raises ValueError, in one sentence, for a combination that cannot work.
    """

    def __init__(self, slots, classes=0, width=128, layers=4, heads=4, temperature=False,
                 label_smoothing=0.0, share="trunk", trunk=None, seed=0):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.slots, self.label_smoothing, self.trunk_config = slots, label_smoothing, trunk
        self.adapters = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):  # the networks of other libraries draw from torch's generator
            torch.manual_seed(seed)
            make_trunk = lambda: LanguageTrunk(trunk, width) if trunk else Trunk(width, layers, heads)
            # The trunk is made first: a module that others share is then listed, and drawn, as trunk.*
            self.trunk, self.own_trunk, self.own_head = make_trunk(), nn.ModuleDict(), nn.ModuleDict()
            for number, (name, slot) in enumerate(slots.items()):
                self.adapters[name] = Adapter(name, slot, width, classes, temperature)
                if trunk:
                    self.trunk.check(name, self.adapters[name], slot["length"])
                if share != "trunk" and number > 0:
                    own = self.own_trunk[name] = make_trunk()
                    for part, module in self.trunk.named_modules():  # such as "blocks.0.qkv"
                        if part.split(".")[-1] in SHARES[share]:
                            own.set_submodule(part, module)
                if share == "none" and number > 0 and classes:
                    self.own_head[name] = nn.Linear(width, classes)
            if share == "added" and self.own_trunk:
                for part, module in list(self.trunk.named_modules()):
                    if isinstance(module, nn.Linear):
                        theirs = [own.get_submodule(part) for own in self.own_trunk.values()]
                        self.trunk.set_submodule(part, AddedLinear(module, theirs))
        self.label_head = nn.Linear(width, classes) if classes else None
        self.init_parameters(seed)

    def forward(self, name, tokens, real=None, labels=None, hidden=None):
        """A slot's loss on a batch, a scalar: the sum of its objectives.

        tokens (B, T, D) or (B, T) as stored; real (B, T) bool or None; labels (B,) rows of the label head;
        hidden (B, T) bool, the places that "reconstruct" hides and rebuilds.
        """
        places = real
        if real is None:
            places = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        batch = Batch(self.normalise(name, tokens), real, places, labels, hidden)
        return sum(OBJECTIVES[objective].loss(self, name, batch)
                   for objective in self.adapters[name].objectives)

    def normalise(self, name, tokens):
        """Tokens as stored -> what embeds read and regressions predict: ids as they are, numbers scaled."""
        adapter = self.adapters[name]
        if adapter.discrete:
            return tokens
        return (tokens.to(adapter.mean.dtype) - adapter.mean) / adapter.std

    def states(self, name, tokens, real=None, causal=False, hidden=None):
        """Trunk states of every layer, the last one normed: list of layers + 1 tensors (B, T, C).

        tokens: normalised (B, T, D), or ids (B, T); real and hidden as in Batch. Behind an embed of whole
        items (conv, timm) T is 1.
        """
        adapter = self.adapters[name]
        h = adapter.embed(tokens)
        if hidden is not None:
            h = torch.where(hidden[..., None], adapter.hidden.to(h.dtype), h)
        if adapter.position is not None:
            h = h + adapter.position[:h.shape[1]]
        trunk = self.own_trunk[name] if name in self.own_trunk else self.trunk
        return trunk(h, causal, real)

    def label_scores(self, name, pooled):
        """Pooled states (B, C) -> scores of all classes (B, classes)."""
        head = self.own_head[name] if name in self.own_head else self.label_head
        scores = head(pooled)
        log_temperature = self.adapters[name].log_temperature
        return scores if log_temperature is None else scores * log_temperature.exp()

    def features(self, name, tokens, real=None, every=False):
        """What a probe reads of a batch as stored: trunk states, mean over the real tokens (B, C).
        every: those of all layers, from the embed on, (layers + 1, B, C)."""
        states = self.states(name, self.normalise(name, tokens), real, self.adapters[name].causal)
        if every:
            return torch.stack([mean_over_real(h, real) for h in states])
        return mean_over_real(states[-1], real)

    # -- initialisation --------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_parameters(self, seed):
        """Draw every parameter from (seed, its name) alone.

        So the trunk starts the same whatever slots stand around it, and the first rows of a longer label head
        equal those of a shorter one: all arms of a comparison share their start. numpy draws, because its
        first numbers stay the same when more are drawn, and torch's do not. (Parts of a slot are drawn as
        embed.image.weight, the name they had when the results in assets/results were made.)
        """
        for name, parameter in self.named_parameters():
            if ".net." in name:  # of a pretrained model
                continue
            is_hidden = name.endswith(".hidden")
            if parameter.dim() == 1 and not is_hidden:  # norms are 1, biases and log temperatures 0
                is_norm = "norm" in name and name.endswith("weight")
                parameter.fill_(1.0 if is_norm else 0.0)
                continue
            # parameter[0] is all inputs of one unit of a matrix or convolution, or one entry of a table
            std = 0.02 if is_hidden else 1 / math.sqrt(parameter[0].numel())
            if "blocks" in name and name.endswith(("proj.weight", "down.weight")):
                # each block adds two outputs to h: smaller weights keep h from growing with depth
                std /= math.sqrt(2 * len(self.trunk.blocks))
            parts = name.split(".")
            if parts[0] == "adapters":
                parts = [parts[2], parts[1], *parts[3:]]
            rng = np.random.default_rng([seed, zlib.crc32(".".join(parts).encode())])
            values = rng.standard_normal(parameter.shape, np.float32) * np.float32(std)
            parameter.copy_(torch.from_numpy(values))
