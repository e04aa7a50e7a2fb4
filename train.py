"""train.py: the alternating loop. Each modality brings its own unpaired data; one trunk learns from all of them in turn.

    python train.py sample_configs/shapes_text.py                    # offline, 1 to 3 minutes on two CPU cores
    python train.py sample_configs/cifar_text.py                     # on a GPU the same command runs bf16 and compiled
    python train.py sample_configs/shapes_text.py --resume           # go on after an interruption, bit for bit

Writes out/NAME/: last.pt (the newest checkpoint; prev.pt the one before, until the end), best.pt (the best on validation), config.json,
log.jsonl, result.json.

Sections: config, slots, batches, optimisation, evaluation, the run. That is how a run learns. What comes after it keeps long
runs safe and measures them: checkpoints, several processes and signals, benchmark.
"""
import contextlib
import datetime
import functools
import io
import json
import math
import os
import signal
import sys
import time
import zlib
from types import SimpleNamespace

# Before torch loads OpenMP: a thread that waits gives up its core early. On a busy machine a step takes half the time (150 instead of
# 280 ms on two cores beside three other jobs), on an idle one the same (48 ms), and the bits do not change.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from model import UML, linear_probe
from prepare import (FORMAT, LOG_MEL_RANGE, MODALITIES, PREPARE_KEYS, SLOT_NAME, UserError, active_slots, exit_on_user_error,
                     load_split, locked, modality_of, patchify, peak_memory, plain_name, prepare, print_help, read_config,
                     read_json, read_meta, shard_folder, tell, unpatchify, write_file, write_json, writing)

# ---------------------------------------------------------------------------------------------------------------------
# config: these keys and prepare.py's make a run; sample_configs/*.py set some, --key=value overrides any

KEYS = dict(
    **PREPARE_KEYS,
    # slots: what each modality learns from. Numbered slots (text2_loss, ...) take the defaults of their modality.
    target=("image", "the slot whose representation we want; all other slots are auxiliaries"),
    **{f"{modality}_{key}": value for modality, (loss, _) in MODALITIES.items() for key, value in dict(
        loss=(loss, f"objectives of the {modality} slot, joined by '+': next, reconstruct, label"),
        weight=(1.0, f"factor on the {modality} loss; for schedule='joint': AdamW does not see the scale of a loss that has its step to itself"),
        updates=(1, f"{modality} steps per target step under schedule='alternate' (of the target: always 1)"),
        batch=(64, f"{modality} items in a step"),
        examples=(-1, f"training items of the {modality} slot: nested, evenly over the classes (-1: all, 0: slot off)"),
    ).items()},
    control=(False, "destroy the auxiliaries' structure and keep their marginals: the control arm of probe.py compare"),
    unseen_classes=(0, "target classes that get no labelled target examples; accuracy on them is reported apart"),
    image_shift=(4, "augmentation: pictures are shifted by up to this many pixels"),
    image_flip=(False, "augmentation: pictures are mirrored at random (wrong for digits and for left against right)"),
    audio_shift=(6, "augmentation: recordings are moved by up to this many frames"),
    audio_gain=(6.0, "augmentation: loudness changes by up to this many decibels"),
    audio_mask=(8, "augmentation: one band of up to this many mels and one span of as many frames are blanked (SpecAugment)"),
    # model
    width=(128, "channels C of the trunk"),
    layers=(4, "blocks of the trunk (0: embeds and heads only, for features of a frozen encoder)"),
    heads=(4, "attention heads"),
    image_embed=("linear", "linear: a matrix on each patch; conv: a small convolutional stem"),
    bottleneck=(0, "units a sequence must pass in 'reconstruct' (0: no bottleneck)"),
    temperature=(False, "learn a temperature of the label logits per slot"),
    head_from=("", "slot whose class means start the label head before the first target update ('zero-shot init')"),
    mask_ratio=(0.5, "share of tokens hidden in 'reconstruct'"),
    # training
    seed=(0, "of parameters, examples, batches and augmentation"),
    steps=(1000, "target updates; the log counts the warm start too"),
    warm_start_steps=(0, "updates on the auxiliaries alone, before the first target update"),
    schedule=("alternate", "alternate: one slot per optimizer step; joint: one step on the weighted sum of all losses"),
    learning_rate=(1e-3, "peak of each phase's cosine, after a linear warm-up over its first 5%"),
    weight_decay=(0.05, "AdamW, on matrices only"),
    init_from=("", "out_dir of a finished run whose trunk this one starts from"),
    freeze_trunk=(False, "after the warm start train only embeds, norms and heads"),
    # running
    out_dir=("", "where the run is written (default: out/CONFIG_NAME)"),
    eval_interval=(100, "steps between validations, each with a checkpoint"),
    log_interval=(50, "steps between log lines"),
    stop_after=(0, "save and stop after this many steps, warm start included, the schedule unchanged (0: run to the end)"),
    resume=(False, "go on from last.pt; from scratch if there is none"),
    score_test=(True, "score the target's test split, once, at the end (False: never open it)"),
    benchmark=(False, "do not train: measure speed, and where a step's time goes"),
    device=("auto", "auto, cpu, cuda or mps"),
    compile=(None, "torch.compile (None: on GPU; on CPU it does not pay within runs of minutes)"),
    threads=(0, "torch CPU threads (0: torch's choice)"),
)
# Keys that may differ between a run and its continuation or repetition: they decide where and how long, not what.
FREE_KEYS = {"out_dir", "resume", "stop_after", "benchmark", "log_interval", "raw_dir", "data_dir", "verify"}
FREE_ON_RESUME = FREE_KEYS | {"eval_interval", "device", "steps", "threads"}


def drop_inactive(cfg):
    """cfg without the keys that have no effect -> (cfg, dropped keys that were set)."""
    slots = active_slots(cfg)
    off = [slot for slot in cfg if SLOT_NAME.fullmatch(slot) and slot not in slots]
    # text_length and its like belong to a modality: they stay as long as any slot of it is on
    idle = [slot for slot in off if slot[-1].isdigit() or slot not in map(modality_of, slots)]
    dropped = [key for key in cfg if key.split("_")[0] in idle and key not in MODALITIES]
    was_set = [key for key in dropped if key not in KEYS or cfg[key] != KEYS[key][0]]
    cfg = {key: value for key, value in cfg.items() if key not in dropped}
    if len(slots) == 1:  # nothing to start from without an auxiliary
        was_set += [key for key in ("warm_start_steps", "head_from") if cfg[key]]
        cfg.update(warm_start_steps=0, head_from="")
    return cfg, sorted(was_set)


def resolve(cfg, say=tell):
    """Check cfg and leave out what has no effect; returns the config that identifies the run."""
    cfg = dict(cfg)
    for slot in active_slots(cfg):
        if cfg[f"{slot}_examples"] == 0:
            cfg[slot] = ""
    if cfg.get("audio_test_group") == "each":  # cross-validation: seed 0 is tested on the first speaker, seed 1 on the second ...
        cfg.update(audio_test_group=f"#{cfg['seed']}", audio_val_group=f"#{cfg['seed'] + 1}")
    slots = active_slots(cfg)
    if cfg["target"] not in slots:
        there = ", ".join(slots) or "none"
        raise UserError(f"target='{cfg['target']}' is not a slot with a source and examples (there are: {there})")
    cfg, was_set = drop_inactive(cfg)
    if was_set:
        say(f"ignored, since their slot has no source or examples: {', '.join(was_set)}")
    for slot in slots:
        if unknown := set(cfg[f"{slot}_loss"].split("+")) - {"next", "reconstruct", "label"}:
            raise UserError(f"{slot}_loss='{cfg[f'{slot}_loss']}': '{unknown.pop()}' is none of next, reconstruct, label")
    choices = dict(schedule=("alternate", "joint"), image_embed=("linear", "conv"), device=("auto", "cpu", "cuda", "mps"))
    for key, allowed in choices.items():
        if cfg.get(key, allowed[0]) not in allowed:
            raise UserError(f"{key}='{cfg[key]}' must be one of {', '.join(allowed)}")
    floors = dict.fromkeys(("layers", "warm_start_steps", "threads", "stop_after", "seed", "bottleneck", "mask_ratio", "image_shift",
                            "audio_shift", "audio_gain", "audio_mask", "unseen_classes", "weight_decay"), 0)
    floors.update(dict.fromkeys(("steps", "eval_interval", "log_interval", "width", "heads"), 1))
    for slot in slots:
        floors.update({f"{slot}_batch": 1, f"{slot}_updates": 0, f"{slot}_examples": -1})
        if not cfg[f"{slot}_weight"] > 0:
            raise UserError(f"{slot}_weight={cfg[f'{slot}_weight']} must be above 0: --{slot}= switches a slot off")
    for key, least in floors.items():
        if cfg.get(key, least) < least:
            raise UserError(f"{key}={cfg[key]} must be at least {least}")
    if cfg["head_from"] and (cfg["head_from"] == cfg["target"] or "label" not in cfg.get(f"{cfg['head_from']}_loss", "")):
        raise UserError(f"head_from='{cfg['head_from']}' must name an auxiliary slot with a label loss")
    if cfg["mask_ratio"] >= 1 or not cfg["learning_rate"] > 0:
        raise UserError(f"mask_ratio={cfg['mask_ratio']} must be below 1 and learning_rate={cfg['learning_rate']} above 0")
    return cfg


def read_run_config(argv, keys=KEYS):
    """argv -> the full config of a run, out_dir filled in."""
    cfg = read_config(argv, keys)
    if not cfg["out_dir"]:
        stem = next((os.path.splitext(os.path.basename(arg))[0] for arg in argv if not arg.startswith("--")), "run")
        cfg["out_dir"] = os.path.join("out", stem)
    return cfg

# ---------------------------------------------------------------------------------------------------------------------
# slots: a source's shards, the examples this run may use, and how its classes map to rows of the label head


EXAMPLES, ORDER, BATCH, CONTROL = range(4)  # what a stream of random numbers is for


def stream(seed, name, *purpose):
    """A random generator that depends on these values alone, so that no slot and no purpose disturbs another."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *purpose])


def choose_examples(labels, n, count, seed, name, banned=()):
    """Rows of the training split a run may use: the first `count` of an order in which classes take turns.

    So the draw is even over classes, decided by (seed, the slot's name), and nested: a larger count contains every smaller one.
    labels (n,) or None; banned: classes left out. count=-1 takes all. Raises UserError if there are fewer.
    """
    order = stream(seed, name, EXAMPLES).permutation(n)
    if labels is not None:
        shuffled = labels[order]
        by_class = np.argsort(shuffled, kind="stable")  # classes together, each in its shuffled order
        turn = np.empty(n, np.int64)
        turn[by_class] = np.arange(n) - np.searchsorted(shuffled[by_class], shuffled[by_class])
        order = order[np.argsort(turn, kind="stable")]  # first everyone's first, then everyone's second, ...
        order = order[~np.isin(labels[order], list(banned))]
    if count > len(order):
        raise UserError(f"{name}_examples={count}, but its training split offers {len(order)}: lower it, or -1 for all")
    return order if count < 0 else order[:count]


def open_slots(cfg, say):
    """Prepare what is missing and open every slot's train and val; returns ({name: slot}, class names of the label head).

    Raises UserError where a source, its classes or its number of examples do not fit what the config asks of them.
    """
    slots, target = {}, cfg["target"]
    for name in sorted(active_slots(cfg), key=lambda name: name != target):  # the target first
        folder = prepare(cfg, name, say)
        meta = read_meta(folder)
        loss = cfg[f"{name}_loss"]
        slot = SimpleNamespace(name=name, folder=folder, meta=meta, loss=loss, objectives=loss.split("+"), batch=cfg[f"{name}_batch"],
                               weight=cfg[f"{name}_weight"], train=load_split(folder, "train"), val=load_split(folder, "val"),
                               cfg=cfg, banned=[])
        if len({plain_name(c) for c in meta["classes"]}) < len(meta["classes"]):
            raise UserError(f"{name}={cfg[name]} has classes that differ only in case, spaces, '_' or '-': rename or merge them")
        if "label" in slot.objectives:
            if len(meta["classes"]) < 2:
                raise UserError(f"{name}={cfg[name]} has {len(meta['classes'])} classes, its label loss needs at least two: "
                                f"choose --{name}_loss=next or reconstruct")
        if name == target and meta["classes"]:
            lacking = [c for c, k in zip(meta["classes"], meta["splits"]["test"]["class_counts"]) if not k]
            if lacking and cfg["score_test"]:
                raise UserError(f"{name}={cfg[name]}: no test items of class '{lacking[0]}' ({len(lacking)} such classes): "
                                "add some, or pass --score_test=False")
            if cfg["unseen_classes"] and cfg["unseen_classes"] > len(meta["classes"]) - 2:
                raise UserError(f"unseen_classes={cfg['unseen_classes']} leaves fewer than two of {len(meta['classes'])} classes")
            slot.banned = sorted(stream(cfg["seed"], "unseen classes").permutation(len(meta["classes"]))[:cfg["unseen_classes"]].tolist())
        labels = slot.train.get("labels")
        slot.rows = choose_examples(labels, len(slot.train["tokens"]), cfg[f"{name}_examples"], cfg["seed"], name, slot.banned)
        if cfg["control"] and name != target:
            destroy_structure(slot, cfg["seed"])
        slots[name] = slot
    # The label head: the target's classes first, then what other slots with a label loss add. Names compare in plain form.
    classes = []
    for slot in slots.values():
        if slot.name == target or "label" in slot.objectives:
            known = {plain_name(c): i for i, c in enumerate(classes)}
            new = [c for c in slot.meta["classes"] if plain_name(c) not in known]
            own = {plain_name(c) for c in slot.meta["classes"]}
            lacking = [c for c in slots[target].meta["classes"] if plain_name(c) not in own]
            for missing, where in ((new, f"{slot.name} that are not the target's"), (lacking, f"the target that are not {slot.name}'s")):
                if classes and missing:
                    say(f"warning: classes of {where}: {len(missing)} ({', '.join(missing[:5])})")
            classes += new
            known = {plain_name(c): i for i, c in enumerate(classes)}
            slot.head_rows = np.array([known[plain_name(c)] for c in slot.meta["classes"]], np.int64)
    return slots, classes


def destroy_structure(slot, seed):
    """Shuffle the examples of an auxiliary in place: their labels if it has a label loss, and their tokens (over all real places
    of all examples) if it predicts tokens. Each token (of items of one token: each number) and label stays as frequent as it was."""
    rng = stream(seed, slot.name, CONTROL)
    if "label" in slot.objectives:
        slot.train["labels"] = slot.train["labels"].copy()
        slot.train["labels"][slot.rows] = rng.permutation(slot.train["labels"][slot.rows])
    if slot.objectives != ["label"]:
        all_tokens = slot.train["tokens"][np.arange(len(slot.train["tokens"]))]
        tokens, T = all_tokens[slot.rows], all_tokens.shape[1]
        lengths = slot.train["lengths"][slot.rows] if "lengths" in slot.train else np.full(len(tokens), T)
        real = np.arange(T) < lengths[:, None]
        # an item of one token has no other place to go: there every number is shuffled over the items by itself
        tokens[real] = rng.permutation(tokens[real]) if T > 1 else rng.permuted(tokens[real], axis=0)
        all_tokens[slot.rows] = tokens
        slot.train["tokens"] = all_tokens


def model_slots(slots):
    """What model.py must know of each slot, plain enough to be stored in a checkpoint."""
    out = {}
    for name, slot in slots.items():
        shape = slot.meta["arrays"]["tokens"]["shape"]
        keys = ("kind", "vocab", "mean", "std", "patch", "mels")
        out[name] = dict(loss=slot.loss, length=shape[0], **{k: slot.meta[k] for k in keys if k in slot.meta})
        if slot.meta["kind"] == "continuous":
            out[name]["dim"] = shape[1]
        if "label" in slot.objectives:
            out[name]["rows"] = np.unique(slot.head_rows[slot.train["labels"][slot.rows]]).tolist()
    return out


# ---------------------------------------------------------------------------------------------------------------------
# batches: a pure function of (seed, slot, the slot's own update count). Nothing else that happens can change them.


@functools.lru_cache(maxsize=16)
def epoch_order(seed, name, epoch, n):
    """The order in which a slot's n examples come in an epoch."""
    return stream(seed, name, ORDER, epoch).permutation(n)


def batch_rows(slot, seed, update):
    """Rows of the slot's update-th batch: the epochs' permutations of its examples laid end to end, cut into batches."""
    n = len(slot.rows)
    places = update * slot.batch + np.arange(slot.batch)  # in the endless row of epochs; a batch may reach into the next one
    epochs = places // n
    drawn = [epoch_order(seed, slot.name, int(e), n)[places[epochs == e] % n] for e in np.unique(epochs)]
    return slot.rows[np.concatenate(drawn)]


def shift_and_flip(tokens, patch, shift, flip, rng):
    """Shift each picture by up to `shift` pixels (edges repeat), mirror half of them if flip; tokens (B, T, D) uint8."""
    pictures = unpatchify(tokens, patch)
    B, S = pictures.shape[:2]
    padded = np.pad(pictures, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
    rows = rng.integers(0, 2 * shift + 1, (B, 1)) + np.arange(S)
    columns = rng.integers(0, 2 * shift + 1, (B, 1)) + np.arange(S)
    if flip:
        columns = np.where(rng.random((B, 1)) < 0.5, columns[:, ::-1], columns)
    return patchify(padded[np.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]], patch)


def move_and_mask(tokens, lengths, mels, shift, gain, mask, rng):
    """Augment recordings (B, T, group*mels) uint8 -> (tokens, lengths): move them in time by up to `shift` frames (edges repeat),
    change their loudness by up to `gain` dB, blank up to `mask` mels and up to `mask` frames (SpecAugment, arXiv 1904.08779)."""
    B, T, D = tokens.shape
    group, F = D // mels, T * D // mels
    frames, moves = tokens.reshape(B, F, mels), rng.integers(-shift, shift + 1, B)
    frames = frames[np.arange(B)[:, None], (np.arange(F) - moves[:, None]).clip(0, F - 1)]
    # dB -> natural logarithm of power -> levels of uint8
    louder = rng.uniform(-gain, gain, (B, 1, 1)) * math.log(10) / 10 * 255 / (LOG_MEL_RANGE[1] - LOG_MEL_RANGE[0])
    frames = (frames + louder).clip(0, 255)
    for axis, size in ((2, mels), (1, F)):
        wide = rng.integers(0, mask + 1, (B, 1))
        start = rng.integers(0, size, (B, 1))
        blank = (np.arange(size) >= start) & (np.arange(size) < start + wide)
        frames = np.where(np.expand_dims(blank, 3 - axis), frames.mean((1, 2), keepdims=True), frames)
    ends = lengths * group + moves  # in frames
    return frames.astype(np.uint8).reshape(B, T, D), (-(-ends // group)).clip(1, T)  # in tokens, rounded up


def collate(slot, arrays, rows, device, rng=None, augment=False):
    """Items -> the keyword arguments of UML.forward as tensors. rng decides what "reconstruct" hides and the augmentation."""
    tokens, cfg, batch = arrays["tokens"][rows], slot.cfg, {}  # (B, T, D) uint8 or float32, or (B, T) ids: one read of the memory map
    lengths = arrays["lengths"][rows] if "lengths" in arrays else None  # (B,) real tokens of each item; None: all of them
    if augment and "patch" in slot.meta:
        tokens = shift_and_flip(tokens, slot.meta["patch"], cfg["image_shift"], cfg["image_flip"], rng)
    if augment and "mels" in slot.meta:
        tokens, lengths = move_and_mask(tokens, lengths, slot.meta["mels"], cfg["audio_shift"], cfg["audio_gain"],
                                        cfg["audio_mask"], rng)
    if lengths is not None:
        if device.type == "cpu":  # short batches are cheap; compiled GPU code wants one shape
            tokens = tokens[:, :max(2, lengths.max())]  # "next" needs one token to read and one to predict
        batch["real"] = np.arange(tokens.shape[1]) < lengths[:, None]
    if "label" in slot.objectives:
        batch["labels"] = slot.head_rows[arrays["labels"][rows]]  # rows of the shared head: the source numbers its classes otherwise
    if rng is not None and "reconstruct" in slot.objectives and cfg["mask_ratio"] > 0:
        batch["hidden"] = rng.random(tokens.shape[:2]) < cfg["mask_ratio"]
    batch["tokens"] = tokens
    if slot.meta["kind"] == "discrete":
        batch["tokens"] = tokens.astype(np.int64)
        if tokens.max() >= slot.meta["vocab"]:
            raise UserError(f"{slot.folder} holds token {tokens.max()}, its vocabulary ends at {slot.meta['vocab'] - 1}: delete it")
    return {key: to_device(torch.from_numpy(np.ascontiguousarray(value)), device) for key, value in batch.items()}


def to_device(tensor, device):
    """Copy a CPU tensor; to a GPU from pinned memory, so that the copy does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def train_batch(slot, seed, update, device):
    """The slot's update-th training batch, augmented: the keyword arguments of UML.forward, on the device. Here a batch begins."""
    return collate(slot, slot.train, batch_rows(slot, seed, update), device, stream(seed, slot.name, BATCH, update), augment=True)


# ---------------------------------------------------------------------------------------------------------------------
# optimisation


def make_optimizer(model, cfg, device):
    """AdamW over every parameter once: matrices decay, the rest (norms, biases, positions) does not.

    A slot that is idle in a step has no gradient (None), and AdamW passes it over: it neither decays nor drifts.
    """
    decay = lambda name, p: p.dim() >= 2 and not name.startswith("position")
    named = list(model.named_parameters())
    groups = [dict(params=[p for name, p in named if decay(name, p)], weight_decay=cfg["weight_decay"]),
              dict(params=[p for name, p in named if not decay(name, p)], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg["learning_rate"], betas=(0.9, 0.99), fused=device.type in ("cpu", "cuda"))


def learning_rate(cfg, step):
    """Each phase, the warm start and the main one, has its own linear warm-up (5%) and cosine to zero."""
    warm = cfg["warm_start_steps"]
    at, length = (step, warm) if step < warm else (step - warm, cfg["steps"])
    return cfg["learning_rate"] * min((at + 1) / max(1, length // 20), 0.5 + 0.5 * math.cos(math.pi * at / length))


def pattern(cfg, slots, step):
    """The slots of this step, grouped by optimizer update: [["image"], ["text"]], or [["image", "text"]] if joint.

    A warm-start step is one update on the auxiliaries, in turn; a later step is one target update and what goes with it.
    """
    auxiliaries = [name for name in slots if name != cfg["target"]]
    turns = [name for name in auxiliaries for _ in range(cfg[f"{name}_updates"])]
    if step < cfg["warm_start_steps"]:
        return [auxiliaries] if cfg["schedule"] == "joint" else [[(turns or auxiliaries)[step % len(turns or auxiliaries)]]]
    return [[cfg["target"], *auxiliaries]] if cfg["schedule"] == "joint" else [[name] for name in [cfg["target"], *turns]]


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: the target only


@torch.no_grad()
def extract(model, slot, arrays, rows, device, layer=-1):
    """Frozen features of the given rows, (n, C) on the CPU."""
    parts = []
    for start in range(0, len(rows), 500):
        inputs = collate(slot, arrays, rows[start:start + 500], device)
        parts.append(model.features(slot.name, inputs["tokens"], inputs.get("real"), layer).float().cpu())
    return torch.cat(parts)


def fit_probe(known, val, classes):
    """Fit a linear probe on `known` with each of four penalties -> ((weight, bias), l2) of the one most accurate on `val`.

    Both are (features, labels).
    """
    def right(probe):
        return (val[0] @ probe[0].T + probe[1]).argmax(1).eq(val[1]).float().mean().item()
    fitted = [(linear_probe(*known, classes, l2), l2) for l2 in (1.0, 10.0, 100.0, 1000.0)]
    return max(fitted, key=lambda one: right(one[0]))


def latent_r2(model, slot, arrays, device):
    """Share of the latents' variance on a split that is read linearly off the features, mean over latents; None without latents.

    The linear map is least squares on the run's training items.
    """
    if "latents" not in arrays:
        return None
    def side(of, rows):
        features = extract(model, slot, of, rows, device).double()
        return torch.cat([features, torch.ones(len(features), 1).double()], 1), torch.from_numpy(of["latents"][rows]).double()
    (known, truth), (new, wanted) = side(slot.train, slot.rows), side(arrays, np.arange(len(arrays["tokens"])))
    found = new @ torch.linalg.lstsq(known, truth).solution
    return (1 - (found - wanted).square().sum(0) / (wanted - wanted.mean(0)).square().sum(0)).mean().item()


@torch.no_grad()
def evaluate(model, slot, arrays, device, probe=None):
    """How good the target is on a split -> dict(score, accuracy, balanced_accuracy, unseen_accuracy, probe; r2 without labels).

    With a label loss the label head answers, over the target's classes. Without, a linear probe fitted on the run's own
    training examples does; its penalty is the best on this split unless a fitted probe is handed in. Without labels the
    score is minus the loss. score and accuracy count items of classes that have labelled examples.
    """
    labels, rows, classes = arrays.get("labels"), np.arange(len(arrays["tokens"])), len(slot.meta["classes"])
    if labels is None or classes < 2:
        loss = 0.0
        for i, part in enumerate(np.array_split(rows, -(-len(rows) // 500))):
            batch = collate(slot, arrays, part, device, np.random.default_rng([i]))  # hides the same tokens every time
            loss += len(part) / len(rows) * model(slot.name, **batch).item()
        return dict(score=-loss, accuracy=None, balanced_accuracy=None, unseen_accuracy=None, probe=None,
                    r2=latent_r2(model, slot, arrays, device))
    features = extract(model, slot, arrays, rows, device)
    truth, unseen = torch.from_numpy(labels).long(), torch.from_numpy(np.isin(labels, slot.banned))

    if "label" in slot.objectives:
        probe = model.label_head.weight[:classes].cpu(), model.label_head.bias[:classes].cpu()
    elif probe is None:
        known = extract(model, slot, slot.train, slot.rows, device), torch.from_numpy(slot.train["labels"][slot.rows])
        probe, _ = fit_probe(known, (features[~unseen], truth[~unseen]), classes)
    right = ((features @ probe[0].T + probe[1]).argmax(1) == truth).float()
    balanced = torch.stack([right[truth == c].mean() for c in truth[~unseen].unique()]).mean().item()
    accuracy, unseen_accuracy = right[~unseen].mean().item(), right[unseen].mean().item() if unseen.any() else None
    return dict(score=accuracy, accuracy=accuracy, balanced_accuracy=balanced, unseen_accuracy=unseen_accuracy, probe=probe)


# ---------------------------------------------------------------------------------------------------------------------
# the run: one config, from its first batch to its result


def pick_device(cfg):
    """(device, autocast context, a line that names device and precision)."""
    name = cfg["device"]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda', but torch finds no GPU here: use --device=cpu")
    if name == "cuda" and dist.is_initialized():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)
    half = name.startswith("cuda") and torch.cuda.is_bf16_supported()  # on CPUs without bf16 matrix units half precision is slower
    return torch.device(name), torch.autocast(name.split(":")[0], torch.bfloat16, enabled=half), f"{name}, {'bf16' if half else 'fp32'}"


def build_model(cfg, slots, classes):
    """A fresh UML from a config and model_slots(); UserError for a combination that cannot work."""
    keys = ("width", "layers", "heads", "bottleneck", "mask_ratio", "image_embed", "temperature", "seed")
    try:
        return UML(slots, len(classes), **{key: cfg[key] for key in keys if key in cfg})
    except ValueError as problem:
        raise UserError(str(problem)) from None


def start_trunk_from(model, cfg, folder):
    """Copy the trunk and its last norm from a finished run's best.pt, whatever slots that run had."""
    other = load_checkpoint(os.path.join(folder, "best.pt"))
    state = {k: v for k, v in other["model"].items() if k.startswith(("trunk.", "norm."))}
    own = {k: v.shape for k, v in model.state_dict().items() if k.startswith(("trunk.", "norm."))}
    if own != {k: v.shape for k, v in state.items()} or other["config"]["heads"] != cfg["heads"]:
        raise UserError(f"init_from={folder} has a trunk of another width, depth or number of heads than this config")
    model.load_state_dict(state, strict=False)


@torch.no_grad()
def start_head_from(model, slot, device):
    """Set the label head's rows to the slot's mean feature of each class, less that of all, at unit length; biases stay.

    This is the release's 'zero-shot init'.
    """
    features, labels = extract(model, slot, slot.train, slot.rows, device), slot.head_rows[slot.train["labels"][slot.rows]]
    for row in np.unique(labels):
        mean = features[labels == row].mean(0) - features.mean(0)
        model.label_head.weight[row] = (mean / mean.norm().clamp_min(1e-6)).to(device)


def set_up(cfg, say):
    """Everything a step needs, from a resolved config -> (device, slots, classes, model, loss_of, optimizer, autocast)."""
    if cfg["threads"]:
        torch.set_num_threads(cfg["threads"])
    device, autocast, device_line = pick_device(cfg)
    slots, classes = open_slots(cfg, say)
    if small := [slot for slot in slots.values() if slot.batch < ranks()[1]]:
        raise UserError(f"{small[0].name}_batch={small[0].batch} cannot be divided among {ranks()[1]} processes: raise it")
    model = build_model(cfg, model_slots(slots), classes)
    if cfg["init_from"]:
        start_trunk_from(model, cfg, cfg["init_from"])
    model.to(device)
    compiled = cfg["compile"] if cfg["compile"] is not None else device.type == "cuda"
    loss_of = torch.compile(model) if compiled else model  # `model` itself is what we evaluate and save
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(p.numel() for p in model.trunk.parameters()):,} of them "
        f"in the shared trunk; {device_line}, {torch.get_num_threads()} threads, {'compiled' if compiled else 'eager'}")
    return device, slots, classes, model, loss_of, make_optimizer(model, cfg, device), autocast


def announce(cfg, slots, say):
    """Say what will be trained on, and in which order."""
    for slot in slots.values():
        role = " (target)" if slot.name == cfg["target"] else ""
        say(f"{slot.name}: {cfg[slot.name]}, {len(slot.rows):,} training items, loss {slot.loss}{role}")
    if warm := cfg["warm_start_steps"]:
        turns = (name for step in range(warm) for names in pattern(cfg, slots, step) for name in names)
        say(f"{warm} warm-start steps of {' and '.join(dict.fromkeys(turns))}")
    say(f"{cfg['steps']} steps of " + " then ".join("+".join(names) for names in pattern(cfg, slots, warm)))


def train_step(cfg, slots, model, loss_of, optimizer, autocast, device, at):
    """One step: every group of slots in the pattern makes one optimizer update -> {slot: [its losses, on the device]}."""
    losses = {}
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, at.step)
    for names in pattern(cfg, slots, at.step):
        optimizer.zero_grad(set_to_none=True)
        for name in names:
            batch = my_part(train_batch(slots[name], cfg["seed"], at.updates[name], device))
            with autocast:
                loss = loss_of(name, **batch)
            (slots[name].weight * loss).backward()  # adds to the gradients of the slots before it, where the schedule is joint
            losses.setdefault(name, []).append(loss.detach())  # not read here: that would wait for a GPU
            at.updates[name] += 1
            at.items += slots[name].batch
        # Several processes: each has its part of the sums. A slot that is idle has no gradient in any of them.
        add_up(*(p.grad for p in model.parameters() if p.grad is not None))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    add_up(*(loss for values in losses.values() for loss in values))
    at.step += 1
    return losses


def run(cfg, say=tell):
    """Train one config to its end -> the result dict (also in out_dir/result.json), or None if stop_after came first.

    SIGINT and SIGTERM end it after the step, saved, with exit code 130 or 143. Under torchrun only process 0 returns a result.
    """
    if ranks()[0] > 0:
        say = lambda line: None
    cfg = resolve(cfg, say)
    cfg["shards"] = shard_names(cfg)  # other data, another run
    with undisturbed(cfg["out_dir"]):
        return train(cfg, say)


def train(cfg, say):
    """The run itself, top to bottom; cfg is resolved and out_dir ours alone."""
    rank, _ = ranks()
    if (finished := finished_result(cfg)) is not None:
        say(f"{cfg['out_dir']} is finished; its result again:")
        return finished if rank == 0 else None

    # 1. data, model, optimizer, and where an earlier run left off
    if rank > 0:
        meet()  # process 0 prepares the shards first
    device, slots, classes, model, loss_of, optimizer, autocast = set_up(cfg, say)
    if rank == 0:
        meet()
    target, warm, total = slots[cfg["target"]], cfg["warm_start_steps"], cfg["warm_start_steps"] + cfg["steps"]
    # All of a run's state that is no weight. Batches follow from `updates`, so there is no sampler or generator to save.
    at = SimpleNamespace(step=0, best=None, updates=dict.fromkeys(slots, 0), seconds=0.0, items=0)
    if cfg["resume"]:
        vars(at).update(load_newest(cfg, model, optimizer, say))
    meet()  # all have read what process 0 goes on to write
    if at.step > total:  # said before anything is written
        raise UserError(f"{cfg['out_dir']} is at step {at.step}, beyond the {total} asked for: choose another --out_dir")
    last_path, prev_path, best_path = (os.path.join(cfg["out_dir"], name) for name in ("last.pt", "prev.pt", "best.pt"))
    if rank == 0:
        begin_folder(cfg, at.step)
    announce(cfg, slots, say)
    watched = sys.stdout is not None and sys.stdout.isatty() and say is tell
    bar = tqdm(total=total, initial=at.step, disable=not watched or rank > 0, leave=False)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def note(line, **entry):
        """Show a line; what it says goes to log.jsonl as well."""
        if rank == 0:
            say(line) if bar.disable else bar.write(line)
            append_line(os.path.join(cfg["out_dir"], "log.jsonl"), json.dumps(entry))

    def save(path):
        save_checkpoint(path, keep=prev_path if path == last_path else None, model=model.state_dict(), optimizer=optimizer.state_dict(),
                        config=cfg, slots=model.slots, classes=classes, target_classes=len(target.meta["classes"]),
                        threads=torch.get_num_threads(), **vars(at))

    # 2. the loop. It turns once more than there are steps, so that the last one is logged, evaluated and saved like any other.
    catch_signals()
    first, recent = at.step, {}  # recent: {slot: [(step, loss), ...]} since the last log line, left on the device until it is due
    logged = SimpleNamespace(**vars(at))  # as of that line
    clock = time.perf_counter()
    while True:
        moved, done = at.step > first, at.step == total
        evaluating = moved and at.step > warm and ((at.step - warm) % cfg["eval_interval"] == 0 or done)
        evaluating = evaluating or (done and at.best is None)  # resumed exactly at its end, never evaluated
        logging = moved and (at.step % cfg["log_interval"] == 0 or done)
        stopping = done or 0 < cfg["stop_after"] <= at.step or asked_to_stop()
        saving = stopping or evaluating or (moved and at.step < warm and at.step % cfg["eval_interval"] == 0)
        if logging or saving:  # the clock stands still meanwhile
            synchronize()
            at.seconds += time.perf_counter() - clock
            check_losses(recent, cfg)
        if logging:
            means = {name: (sum(loss for _, loss in values) / len(values)).item() for name, values in recent.items()}
            seconds, lr = at.seconds - logged.seconds, learning_rate(cfg, at.step - 1)
            ms, rate = 1e3 * seconds / (at.step - logged.step), (at.items - logged.items) / seconds
            note(f"step {at.step}/{total} | " + " | ".join(f"{name} {mean:.4f}" for name, mean in means.items())
                 + f" | lr {lr:.1e} | {ms:.0f} ms/step | {rate:,.0f} samples/s",
                 step=at.step, loss=means, lr=lr, ms_per_step=ms, samples_per_second=rate)
            recent, logged = {}, SimpleNamespace(**vars(at))
        if evaluating and rank == 0:
            now = evaluate(model, target, target.val, device)
            shown = f"loss {-now['score']:.4f}" if now["accuracy"] is None else f"accuracy {now['accuracy']:.4f}"
            shown += "" if now["unseen_accuracy"] is None else f" (unseen classes {now['unseen_accuracy']:.4f})"
            note(f"step {at.step}/{total} | validation {shown}", step=at.step, val_accuracy=now["accuracy"],
                 val_score=now["score"], val_unseen_accuracy=now["unseen_accuracy"])
            if at.best is None or now["score"] > at.best["score"]:
                at.best = dict(step=at.step, score=now["score"])
                save(best_path)
        if saving and rank == 0:
            save(last_path)
        if stopping:
            break
        if logging or saving:
            clock = time.perf_counter()

        if at.step == warm and cfg["head_from"]:
            start_head_from(model, slots[cfg["head_from"]], device)
        if cfg["freeze_trunk"] and at.step >= warm and at.step in (first, warm):  # also right after a resume
            for name, parameter in model.trunk.named_parameters():
                parameter.requires_grad = "norm" in name
        for name, values in train_step(cfg, slots, model, loss_of, optimizer, autocast, device, at).items():
            recent.setdefault(name, []).extend((at.step, loss) for loss in values)
        bar.update()
    bar.close()
    if at.step < total:
        say(f"stopped after step {at.step} of {total}, saved in {cfg['out_dir']}; the same command with --resume goes on")
        if SIGNALS:
            sys.exit(128 + SIGNALS[0])
        return None
    if rank > 0:
        return None

    # 3. the end: the best checkpoint by validation, and the target's test split for the first and only time
    model.load_state_dict(load_checkpoint(best_path)["model"])
    result = score_run(cfg, slots, model, at, device)
    write_json(os.path.join(cfg["out_dir"], "result.json"), result)
    if os.path.exists(prev_path):
        os.remove(prev_path)
    return result


def score_run(cfg, slots, model, at, device):
    """The result dict of a finished run: what the model scores on validation and test, and what it took."""
    target = slots[cfg["target"]]
    val = evaluate(model, target, target.val, device)
    test = evaluate(model, target, load_split(target.folder, "test"), device, val["probe"]) if cfg["score_test"] else {}
    flops = sum(at.updates[name] * count_flops(model, name, train_batch(slots[name], cfg["seed"], 0, device)) for name in slots)
    result = dict(name=os.path.basename(os.path.normpath(cfg["out_dir"])), target=target.name,
                  losses={name: slot.loss for name, slot in slots.items()}, seed=cfg["seed"], steps=cfg["steps"],
                  warm_start_steps=cfg["warm_start_steps"], examples={name: len(slot.rows) for name, slot in slots.items()},
                  best_step=at.best["step"], val_accuracy=val["accuracy"], test_accuracy=test.get("accuracy"),
                  chance=1 / len(target.meta["classes"]) if target.meta["classes"] else None,
                  val_balanced_accuracy=val["balanced_accuracy"], test_balanced_accuracy=test.get("balanced_accuracy"),
                  flops=flops, seconds=round(at.seconds, 2), samples_per_second=round(at.items / at.seconds, 1),
                  peak_memory=torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory())
    if target.banned:
        result.update(val_unseen_accuracy=val["unseen_accuracy"], test_unseen_accuracy=test.get("unseen_accuracy"))
    if val["accuracy"] is None:
        result.update(val_loss=-val["score"], test_loss=-test["score"] if test else None, val_r2=val["r2"], test_r2=test.get("r2"))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints, and the folder of a run


def save_checkpoint(path, keep=None, **state):
    """Write a checkpoint whole or not at all; the file it replaces is moved to `keep`. UserError if a weight is not finite."""
    if broken := [name for name, value in state["model"].items() if not value.isfinite().all()]:
        raise UserError(f"{broken[0]} is no longer finite after step {state['step']}: lower --learning_rate (now "
                        f"{state['config']['learning_rate']}); {path} keeps the checkpoint before it")
    data = io.BytesIO()
    torch.save(dict(state, format=FORMAT), data)
    write_file(path, data.getvalue(), keep)


def load_checkpoint(path):
    """What save() in train() put into a checkpoint, a dict. Only tensors and plain values are unpickled; UserError for anything else."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']!r} where this code writes {FORMAT}")
        for key in ("optimizer", "step", "config", "slots", "classes", "target_classes", "best", "updates", "seconds", "items", "threads"):
            saved[key]  # KeyError if it is missing
        if broken := [name for name, value in saved["model"].items() if not value.isfinite().all()]:
            raise ValueError(f"{broken[0]} is not finite")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as problem:  # torch.load raises many kinds; all mean the same to the user
        raise UserError(f"{path} is damaged or no checkpoint of this project ({type(problem).__name__}: "
                        f"{str(problem).splitlines()[0] if str(problem) else ''}): delete it") from None
    return saved


def load_model(path):
    """The model of a checkpoint file, on the CPU, ready to embed -> (UML, checkpoint dict)."""
    checkpoint = load_checkpoint(path)
    try:
        model = build_model(checkpoint["config"], checkpoint["slots"], checkpoint["classes"])
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as problem:
        raise UserError(f"{path}: weights and config do not fit ({str(problem).splitlines()[0]}): delete it") from None
    return model.eval(), checkpoint


def load_newest(cfg, model, optimizer, say):
    """Load out_dir/last.pt, or prev.pt if that one is damaged, into model and optimizer -> where that run was, a dict; {} if nowhere."""
    paths = [path for path in (os.path.join(cfg["out_dir"], name) for name in ("last.pt", "prev.pt")) if os.path.exists(path)]
    for path in paths:
        try:
            saved = load_checkpoint(path)
        except UserError as problem:
            if path == paths[-1]:
                raise
            say(f"{problem}; going back to {paths[-1]}")
            continue
        differing = sorted(key for key in (saved["config"].keys() | cfg.keys()) - FREE_KEYS if saved["config"].get(key) != cfg.get(key))
        if refused := set(differing) - FREE_ON_RESUME:
            raise UserError(f"{path} is of another config (different: {', '.join(sorted(refused))}): delete it or change --out_dir")
        if differing:
            say(f"changed since step {saved['step']}: {', '.join(differing)}")
        try:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError, KeyError) as problem:
            raise UserError(f"{path} is of another architecture ({str(problem).splitlines()[0]}): delete it") from None
        if not cfg["threads"]:
            torch.set_num_threads(saved["threads"])  # what torch chose then: another number would round differently
        say(f"resuming {cfg['out_dir']} at step {saved['step']}")
        return {key: saved[key] for key in ("step", "best", "updates", "seconds", "items")}
    say(f"nothing to resume in {cfg['out_dir']}: starting from scratch")
    return {}


def begin_folder(cfg, step):
    """Make out_dir ready for a run that starts, or goes on, at a step: config.json, the log so far, nothing half-written."""
    config_path, log_path, result_path, *checkpoints = (
        os.path.join(cfg["out_dir"], name) for name in ("config.json", "log.jsonl", "result.json", "last.pt", "best.pt"))
    with writing(cfg["out_dir"], 0):
        os.makedirs(cfg["out_dir"], exist_ok=True)
        for path in (result_path, *checkpoints):  # of a process that was killed
            with contextlib.suppress(FileNotFoundError):
                os.remove(path + ".tmp")
    write_json(config_path, cfg)
    write_file(log_path, log_until(log_path, step).encode())
    if os.path.exists(result_path):  # of fewer steps, now resumed
        os.remove(result_path)


def append_line(path, line):
    """Add a line to a file; UserError if the disk is full."""
    with writing(path, len(line) + 1), open(path, "a", encoding="utf-8") as f:
        f.write(line + "\n")


def log_until(path, step):
    """The lines of a log.jsonl up to a step; what is later, or was cut short by a kill, the resumed run writes again."""
    if not step or not os.path.exists(path):
        return ""
    kept = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= step and line.endswith("\n"):
                    kept.append(line)
    return "".join(kept)


def shard_names(cfg):
    """{slot: the name of its shard folder}, which is a hash of all that decides the data."""
    return {slot: os.path.basename(shard_folder(cfg, slot)[0]) for slot in active_slots(cfg)}


def finished_result(cfg):
    """The result in out_dir if this very config was finished there, else None. Refuses the folder of another run."""
    path = os.path.join(cfg["out_dir"], "config.json")
    if not os.path.exists(path):
        return None
    try:
        there, result_path = read_json(path), os.path.join(cfg["out_dir"], "result.json")
        result = read_json(result_path) if os.path.exists(result_path) else None
        if not (isinstance(there, dict) and (result is None or isinstance(result, dict))):
            raise ValueError("not a mapping")
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{cfg['out_dir']} has a damaged config.json or result.json ({problem}): delete it") from None
    differing = sorted(key for key in (there.keys() | cfg.keys()) - FREE_KEYS if there.get(key) != cfg.get(key))
    if not cfg["resume"] and differing or set(differing) - FREE_ON_RESUME:
        raise UserError(f"{cfg['out_dir']} holds a run of another config (different: {', '.join(differing)}): "
                        "choose another --out_dir or delete it")
    if "steps" not in differing and result is not None:
        return result
    if not cfg["resume"] and any(os.path.exists(os.path.join(cfg["out_dir"], name)) for name in ("last.pt", "prev.pt")):
        raise UserError(f"{cfg['out_dir']} holds an unfinished run of this config: add --resume to go on, or delete it")
    return None


def check_losses(losses, cfg):
    """UserError where one of {slot: [(step, loss tensor), ...]} is not finite: it names the first."""
    every = [(step, name, loss) for name, values in losses.items() for step, loss in values]
    if not every:
        return
    finite = torch.stack([loss for *_, loss in every]).isfinite().tolist()
    if not all(finite):
        step, name, loss = min((one for one, good in zip(every, finite) if not good), key=lambda one: one[0])
        raise UserError(f"the {name} loss became {loss.item()} in step {step}: lower --learning_rate (now "
                        f"{cfg['learning_rate']}); {cfg['out_dir']} keeps the checkpoint before it")


# ---------------------------------------------------------------------------------------------------------------------
# several processes, and signals. Under torchrun all processes draw the same batch and each takes its part of it, so that a
# run does not depend on how many there are (to floating-point tolerance).


SIGNALS = []  # those caught so far


def on_signal(number, frame):
    """The first one asks for an end after this step, the second ends it now."""
    SIGNALS.append(number)
    if len(SIGNALS) > 1:
        raise KeyboardInterrupt


def catch_signals():
    """From now on SIGINT and SIGTERM are asked for by asked_to_stop() and do not interrupt."""
    SIGNALS.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)


@contextlib.contextmanager
def undisturbed(out_dir):
    """No other process may train into out_dir meanwhile, and signals are what they were afterwards."""
    parent, name = os.path.split(os.path.abspath(out_dir))
    busy = f"another process is training into {out_dir}: wait for it or choose another --out_dir"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with locked(os.path.join(parent, f".{name}.lock"), busy) if ranks()[0] == 0 else contextlib.nullcontext():
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def ranks():
    """(the number of this process, how many share the run); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def meet():
    """Wait until every process is here."""
    if ranks()[1] > 1:
        dist.barrier()


def add_up(*tensors):
    """Sum each tensor over the processes, in place."""
    if ranks()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def my_part(batch):
    """This process's items of a batch, with what each objective counts in the whole of it: see UML.forward."""
    rank, world = ranks()
    if world == 1:
        return batch
    tokens, real, hidden = batch["tokens"], batch.get("real"), batch.get("hidden")
    real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if real is None else real
    counts = dict(label=len(tokens), next=real[:, 1:].sum().clamp_min(1),
                  reconstruct=(real if hidden is None else real & hidden).sum().clamp_min(1))
    return dict({key: value[rank::world] for key, value in batch.items()}, counts=counts)


def asked_to_stop():
    """Has a signal reached any of the processes? All must leave the loop after the same step."""
    asked = torch.tensor(float(bool(SIGNALS)))  # on the CPU, where reading it waits for no GPU
    add_up(asked)
    return asked.item() > 0


# ---------------------------------------------------------------------------------------------------------------------
# benchmark: where a step's time goes


def count_flops(model, name, batch):
    """FLOPs of forward and backward on a batch, counted by torch operation by operation (attention as its two matmuls)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(name, **batch).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def benchmark(cfg, say=tell, repeats=20):
    """Time the steps of every slot and print where the time goes; returns the dict that the last line prints as JSON.

    GFLOP/s is count_flops() of the slot's batch over the median step time. The peak it is held against is the best of
    20 square matmuls (2 n^3 FLOPs) in this process, at the same dtype and threads.
    """
    cfg = resolve(cfg, say)
    device, slots, classes, model, loss_of, optimizer, autocast = set_up(cfg, say)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def now():
        synchronize()
        return time.perf_counter()

    def step(name, update):
        """Seconds of (data, forward, backward, optimizer)."""
        times = [now()]
        batch = train_batch(slots[name], cfg["seed"], update, device)
        times.append(now())
        with autocast:
            loss = loss_of(name, **batch)
        times.append(now())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        times.append(now())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return np.diff(times + [now()])

    matrix, seconds = torch.randn(2048, 2048, device=device), []
    for _ in range(20):
        start = now()
        with autocast:
            matrix @ matrix
        seconds.append(now() - start)
    peak = 2 * 2048**3 / min(seconds) / 1e9
    say(f"matmul peak {peak:,.0f} GFLOP/s")
    out = {}
    for name, slot in slots.items():
        start = now()
        step(name, 0)
        first = now() - start  # holds the compilation, if any
        for update in range(1, 4):
            step(name, update)
        parts = np.array([step(name, update) for update in range(4, 4 + repeats)])
        low, ms, high = np.percentile(1e3 * parts.sum(1), (10, 50, 90))
        batch = train_batch(slot, cfg["seed"], 4, device)
        tokens = batch["real"].sum().item() if "real" in batch else slot.batch * batch["tokens"].shape[1]
        gflops = count_flops(model, name, batch) / ms / 1e6
        share = dict(zip(("data", "forward", "backward", "optimizer"), (parts.sum(0) / parts.sum()).round(4).tolist()))
        out[name] = dict(ms_per_step=ms, ms_p10=low, ms_p90=high, first_step_seconds=first, share=share, gflops=gflops,
                         samples_per_second=1e3 * slot.batch / ms, tokens_per_second=1e3 * tokens / ms, fraction_of_peak=gflops / peak)
        say(f"{name}: {ms:.1f} ms/step (10-90%: {low:.1f}-{high:.1f}; first {first:.1f} s), {1e3 * slot.batch / ms:,.0f} samples/s, "
            f"{1e3 * tokens / ms:,.0f} tokens/s, {gflops:,.0f} GFLOP/s = {gflops / peak:.0%} of peak")
        say("    " + ", ".join(f"{part} {value:.1%}" for part, value in share.items()))
    return dict({key: out[cfg["target"]][key] for key in ("ms_per_step", "gflops", "fraction_of_peak")}, peak_gflops=peak,
                peak_memory=peak_memory(), slots=out)


def main():
    if "--help" in sys.argv or "-h" in sys.argv or len(sys.argv) == 1:
        return print_help(__doc__, KEYS)
    cfg = read_run_config(sys.argv[1:])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun says so; gloo on CPU, NCCL on GPU; process 0 may prepare for hours
        dist.init_process_group(timeout=datetime.timedelta(days=1))
    result = benchmark(cfg) if cfg["benchmark"] else run(cfg)
    if result is not None:
        tell(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    exit_on_user_error(main)
