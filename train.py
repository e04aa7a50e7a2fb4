"""train.py: the alternating loop. Each modality brings unpaired data of its own; one trunk learns from all.

    python train.py sample_configs/letters_text.py            # offline, a minute or two on two CPU cores
    python train.py sample_configs/cifar_text.py              # the same on a GPU runs bf16 and compiled
    python train.py sample_configs/letters_text.py --resume   # go on after an interruption, bit for bit

Writes out/NAME/: last.pt (the newest checkpoint; prev.pt the one before, until the end), best.pt (the best on
validation), config.json, log.jsonl, result.json.

Sections: config, slots, batches, optimisation, evaluation, the run. That is how a run learns. What
comes after keeps long runs safe and measures them: checkpoints, several processes and signals, benchmark.
"""
import contextlib
import ctypes
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
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

# Before torch loads OpenMP: a thread that waits gives up its core early. On a busy machine a step takes half
# the time (150 instead of 280 ms on two cores beside three other jobs), on an idle one the same.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# glibc keeps freed buffers instead of returning them to the kernel: no page faults in a step where there were
# 1,200 and more, and 7% less time a letters_text picture step (0 to 2% at the reference shape).
if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    libc.mallopt(-3, 1 << 30) and libc.mallopt(-1, -1)  # M_MMAP_THRESHOLD, and M_TRIM_THRESHOLD off

import numpy as np

from prepare import (LOG_MEL_RANGE, MODALITIES, PREPARE_KEYS, SLOT_NAME, UserError, above, active_slots,
                     at_least, below, exit_on_user_error, load_split, locked, modality_of,
                     one_of, patchify, peak_memory, plain_name, prepare, print_help, read_config, read_json,
                     read_meta, shard_folder, tell, unpatchify, write_file, write_json, writing)

CHECKPOINT_FORMAT = 4  # raise it when what a checkpoint holds, or what its weights mean, changes

# ------------------------------------------------------------------------------------------------------------
# config: these keys and prepare.py's make a run; sample_configs/*.py set some, --key=value overrides any

OBJECTIVES = ("next", "reconstruct", "label")  # as in model.py, which --help does not wait for
objectives = (f"one or more of {', '.join(OBJECTIVES)}, joined by '+'",
              lambda value: set(value.split("+")) <= set(OBJECTIVES))
SLOT_KEYS = {f"{slot}_{end}": key for slot, (loss, _) in MODALITIES.items() for end, key in dict(
    loss=(loss, f"objectives of the {slot} slot", objectives),
    weight=(1.0, f"factor on the {slot} loss", above(0)),
    updates=(1, "steps per target step under schedule='alternate' (target: 1)", at_least(0)),
    batch=(64, f"{slot} items in a step", at_least(1)),
    examples=(-1, "training items: nested, even over classes (-1: all, 0: off)", at_least(-1)),
).items()}
KEYS = dict(
    **PREPARE_KEYS,
    # slots
    target=("image", "the slot whose representation we want; all other slots are auxiliaries"),
    **SLOT_KEYS,
    control=(False, "destroy the auxiliaries' structure, keep their marginals: probe.py compare's control"),
    apart=(False, "a trunk of its own for every auxiliary: then only the label head is shared"),
    unseen_classes=(0, "target classes that get no labelled target examples; reported apart", at_least(0)),
    # augmentation
    image_shift=(4, "pictures are shifted by up to this many pixels", at_least(0)),
    image_flip=(False, "pictures are mirrored at random (wrong for letters, and for left against right)"),
    image_affine=(0.0, "standard deviation of a random affine map of each picture", at_least(0), below(1)),
    audio_shift=(6, "recordings are moved by up to this many frames", at_least(0)),
    audio_gain=(6.0, "loudness changes by up to this many decibels", at_least(0)),
    audio_mask=(8, "a band of up to this many mels and a span of as many frames are blanked", at_least(0)),
    # model
    width=(128, "channels C of the trunk", at_least(1)),
    layers=(4, "blocks of the trunk (0: none, for features of a frozen encoder)", at_least(0)),
    heads=(4, "attention heads", at_least(1)),
    image_embed=("linear", "a matrix a patch; conv: a ConvNet, for label losses", one_of("linear", "conv")),
    audio_embed=("linear", "a matrix a token; conv: likewise, on log-mels", one_of("linear", "conv")),
    temperature=(False, "learn a temperature of the label logits per slot"),
    label_smoothing=(0.0, "share of a label that is spread over the slot's classes", at_least(0), below(1)),
    head_from=("", "slot whose class means start the label head at the first target step ('zero-shot init')"),
    mask_ratio=(0.5, "share of tokens hidden in 'reconstruct'", above(0), below(1)),
    # training
    seed=(0, "of parameters, examples, batches and augmentation", at_least(0)),
    steps=(1000, "target updates; the log counts the warm start too", at_least(1)),
    warm_start_steps=(0, "updates on the auxiliaries alone, before the first target update", at_least(0)),
    schedule=("alternate", "or joint: one step on the weighted sum of losses", one_of("alternate", "joint")),
    learning_rate=(1e-3, "peak of each phase's cosine, after a linear warm-up of 5%", above(0)),
    weight_decay=(0.05, "AdamW, on matrices only", at_least(0)),
    init_from=("", "out_dir of a finished run whose trunk this one starts from"),
    # running
    out_dir=("", "where the run is written (default: out/CONFIG_NAME)"),
    eval_interval=(100, "steps between validations, each with a checkpoint", at_least(1)),
    log_interval=(50, "steps between log lines", at_least(1)),
    stop_after=(0, "save and stop after this many steps, warm start included (0: run on)", at_least(0)),
    resume=(False, "go on from last.pt; from scratch if there is none"),
    score_test=(True, "score the target's test split, once, at the end (False: never open it)"),
    benchmark=(False, "do not train: measure speed, and where a step's time goes"),
    device=("auto", "where to train", one_of("auto", "cpu", "cuda", "mps")),
    compile=(None, "torch.compile (None: on GPU; on CPU it does not pay within runs of minutes)"),
    threads=(0, "torch CPU threads (0: torch's choice)", at_least(0)),
)
# Keys in which a run and its repetition, or its continuation, may differ: where and how long, not what.
FREE_KEYS = {"out_dir", "resume", "stop_after", "benchmark", "log_interval", "raw_dir", "data_dir", "verify",
             "workers"}
FREE_ON_RESUME = FREE_KEYS | {"eval_interval", "device", "steps", "threads"}

if __name__ == "__main__" and ("--help" in sys.argv or "-h" in sys.argv or len(sys.argv) == 1):
    exit_on_user_error(lambda: print_help(__doc__, KEYS))
    sys.exit()  # before torch is loaded, which takes more than a second

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import UML, linear_probe


def read_run_config(argv, keys=KEYS):
    """argv -> the full config of a run, out_dir filled in."""
    cfg = read_config(argv, keys)
    if not cfg["out_dir"]:
        files = [arg for arg in argv if not arg.startswith("--")] or ["run"]
        cfg["out_dir"] = os.path.join("out", os.path.splitext(os.path.basename(files[0]))[0])
    return cfg


def resolve(cfg, say=tell):
    """Check what keys ask of each other, leave out what has no effect: the config that identifies the run."""
    cfg = dict(cfg)
    for slot in active_slots(cfg):
        if cfg[f"{slot}_examples"] == 0:
            cfg[slot] = ""
    slots, target, head_from = active_slots(cfg), cfg["target"], cfg["head_from"]
    auxiliaries = [slot for slot in slots if slot != target]
    if target not in slots:
        raise UserError(f"target='{target}' is not a slot with a source and examples (there are: "
                        f"{', '.join(slots) or 'none'})")
    unfit = head_from not in auxiliaries or "label" not in cfg[f"{head_from}_loss"]
    if head_from and auxiliaries and unfit:
        raise UserError(f"head_from='{head_from}' must name an auxiliary slot with a label loss")
    if cfg.get("audio_test_group") == "each":  # cross-validation: seed 0 is tested on the first speaker, ...
        cfg.update(audio_test_group=f"#{cfg['seed']}", audio_val_group=f"#{cfg['seed'] + 1}")

    # keys of slots that are off go; those of a modality (text_length) stay while any slot of it is on
    used = {*slots, *map(modality_of, slots)}
    owners = {key: key.split("_")[0] for key in cfg if key not in MODALITIES}
    idle = [key for key, owner in owners.items() if SLOT_NAME.fullmatch(owner) and owner not in used]
    # a target alone has nothing to start from, and nothing to be kept apart from
    reset = [] if auxiliaries else ["warm_start_steps", "head_from", "apart"]
    ignored = [key for key in [*idle, *reset] if key not in KEYS or cfg[key] != KEYS[key][0]]
    if ignored:
        say(f"ignored, since their slot has no source or examples: {', '.join(sorted(ignored))}")
    cfg.update({key: KEYS[key][0] for key in reset})
    return {key: value for key, value in cfg.items() if key not in idle}


# ------------------------------------------------------------------------------------------------------------
# slots: a source's shards, the examples this run may use, and how its classes map to rows of the label head

EXAMPLES, ORDER, BATCH, CONTROL = range(4)  # what a stream of random numbers is for


def stream(seed, name, *purpose):
    """A random generator that depends on these values alone: no slot and no purpose disturbs another."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *purpose])


def choose_examples(labels, n, count, seed, name, banned=()):
    """Rows of the training split a run may use: the first `count` of an order in which classes take turns.

    So the draw is even over classes, decided by (seed, the slot's name), and nested: a larger count contains
    every smaller one. labels (n,) or None; banned: classes left out; count=-1: all.
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
        raise UserError(f"{name}_examples={count}, but its training split offers {len(order)}: lower it "
                        "(-1: all)")
    return order if count < 0 else order[:count]


def open_slots(cfg, say):
    """Prepare what is missing, open train and val -> ({name: slot}, classes of the label head)."""
    slots, target = {}, cfg["target"]
    for name in sorted(active_slots(cfg), key=lambda name: name != target):  # the target first
        folder, loss = prepare(cfg, name, say), cfg[f"{name}_loss"]
        slot = SimpleNamespace(name=name, folder=folder, meta=read_meta(folder), cfg=cfg, banned=[],
                               loss=loss, objectives=loss.split("+"), batch=cfg[f"{name}_batch"],
                               train=load_split(folder, "train"), val=load_split(folder, "val"))
        source, classes = f"{name}={cfg[name]}", slot.meta["classes"]
        if len({plain_name(c) for c in classes}) < len(classes):
            raise UserError(f"{source} has classes that differ only in case, spaces, '_' or '-': rename them")
        if "label" in slot.objectives and len(classes) < 2:
            raise UserError(f"{source} has {len(classes)} classes, its label loss needs at least two: choose "
                            f"--{name}_loss=next or reconstruct")
        if name == target and cfg["unseen_classes"]:
            if cfg["unseen_classes"] > len(classes) - 2:
                raise UserError(f"unseen_classes={cfg['unseen_classes']} leaves fewer than two of "
                                f"{len(classes)} classes")
            shuffled = stream(cfg["seed"], "unseen classes").permutation(len(classes))
            slot.banned = sorted(shuffled[:cfg["unseen_classes"]].tolist())
        labels, n = slot.train.get("labels"), len(slot.train["tokens"])
        slot.rows = choose_examples(labels, n, cfg[f"{name}_examples"], cfg["seed"], name, slot.banned)
        if cfg["control"] and name != target:
            destroy_structure(slot, cfg["seed"])
        slots[name] = slot
        role = " (target)" if name == target else ""
        say(f"{source}, {len(slot.rows):,} training items, loss {loss}{role}")
    return slots, match_classes(slots, target, say)


def match_classes(slots, target, say):
    """The label head's classes: the target's first, then what other slots with a label loss add.

    Names compare in plain form. Each such slot gets head_rows (classes,), the row of each of its classes.
    """
    theirs = {plain_name(c): c for c in slots[target].meta["classes"]}
    known = dict(theirs)  # {plain name: name}, a row of the label head each
    for slot in slots.values():
        if slot.name != target and "label" not in slot.objectives:
            continue
        own = {plain_name(c): c for c in slot.meta["classes"]}
        for name, shown in own.items():
            known.setdefault(name, shown)
        rows = {name: row for row, name in enumerate(known)}
        slot.head_rows = np.array([rows[name] for name in own], np.int64)
        extra = [c for name, c in own.items() if name not in theirs]
        lacking = [c for name, c in theirs.items() if name not in own]
        if lacking and len(lacking) == len(theirs):
            say(f"warning: {slot.name} and the target share no class name, so no label teaches both (such as "
                f"{extra[0]}, and the target's {lacking[0]})")
        elif theirs and (extra or lacking):
            say(f"warning: classes of {slot.name} that are not the target's: {len(extra)} "
                f"({', '.join(extra[:5])}); of the target that are not {slot.name}'s: {len(lacking)} "
                f"({', '.join(lacking[:5])})")
    return list(known.values())


def destroy_structure(slot, seed):
    """Shuffle an auxiliary's examples in place: labels if it has a label loss, tokens if it predicts tokens
    (over all real places of all examples). Each label and token stays as frequent as it was."""
    rng, arrays, rows = stream(seed, slot.name, CONTROL), slot.train, slot.rows
    if "label" in slot.objectives:
        arrays["labels"] = arrays["labels"].copy()
        arrays["labels"][rows] = rng.permutation(arrays["labels"][rows])
    if slot.objectives != ["label"]:
        arrays["tokens"] = arrays["tokens"][np.arange(len(arrays["tokens"]))]  # out of the memory map
        tokens, T = arrays["tokens"][rows], arrays["tokens"].shape[1]
        lengths = arrays["lengths"][rows] if "lengths" in arrays else np.full(len(rows), T)
        real = np.arange(T) < lengths[:, None]
        # an item of one token has no other place: there every number is shuffled over the items by itself
        tokens[real] = rng.permutation(tokens[real]) if T > 1 else rng.permuted(tokens[real], axis=0)
        arrays["tokens"][rows] = tokens


def is_joined(slot):
    """Does the conv stem join an item of this slot into one token?"""
    embed = slot.cfg.get(f"{modality_of(slot.name)}_embed")
    return embed == "conv" and ("patch" in slot.meta or "mels" in slot.meta)  # features have neither


def model_slots(slots):
    """What model.py must know of each slot, plain enough to be stored in a checkpoint."""
    out = {}
    for name, slot in slots.items():
        shape = slot.meta["arrays"]["tokens"]["shape"]  # of an item: (T, D), or (T,) of ids
        known = {k: slot.meta[k] for k in ("kind", "vocab", "mean", "std", "patch", "mels") if k in slot.meta}
        out[name] = dict(known, loss=slot.loss, length=shape[0])
        if slot.meta["kind"] == "continuous":
            out[name]["dim"] = shape[1]
        if is_joined(slot):
            out[name]["embed"] = "conv"
        if "label" in slot.objectives:
            out[name]["rows"] = np.unique(slot.head_rows[slot.train["labels"][slot.rows]]).tolist()
    return out


# ------------------------------------------------------------------------------------------------------------
# batches: a pure function of (seed, slot, the slot's own update count), whatever else happens


def train_batch(slot, seed, update, device):
    """The slot's update-th training batch, augmented, on the device: the keyword arguments of UML.forward."""
    rng = stream(seed, slot.name, BATCH, update)
    return collate(slot, slot.train, batch_rows(slot, seed, update), device, rng, augment=True)


def next_batch(parts, name, update):
    """train_batch(); where a GPU trains, a thread builds the slot's next one meanwhile, the same bits."""
    build = functools.partial(train_batch, parts.slots[name], parts.cfg["seed"], device=parts.device)
    if not parts.thread:  # on a CPU it would take cores from the training, to hide 0.3 to 3% of a step
        return build(update)
    batch = parts.ahead.pop((name, update), None) or parts.thread.submit(build, update)
    parts.ahead[name, update + 1] = parts.thread.submit(build, update + 1)
    return batch.result()  # raises here what went wrong there


def batch_rows(slot, seed, update):
    """Rows (B,) of a batch: permutations of the slot's examples, laid end to end, cut into batches."""
    n = len(slot.rows)
    epochs, places = np.divmod(update * slot.batch + np.arange(slot.batch), n)  # it may reach into the next
    drawn = [epoch_order(seed, slot.name, e, n)[place] for e, place in zip(epochs.tolist(), places)]
    return slot.rows[drawn]


@functools.lru_cache(maxsize=16)
def epoch_order(seed, name, epoch, n):
    """The order in which a slot's n examples come in an epoch."""
    return stream(seed, name, ORDER, epoch).permutation(n)


def collate(slot, arrays, rows, device, rng=None, augment=False):
    """Items -> the keyword arguments of UML.forward; rng: of augmentation and of what "reconstruct" hides."""
    cfg, meta, batch = slot.cfg, slot.meta, {}
    tokens = arrays["tokens"][rows]  # (B, T, D) or (B, T) ids: one read of the memory map
    lengths = arrays["lengths"][rows] if "lengths" in arrays else None  # (B,) real tokens; None: all are
    if augment and "patch" in meta:
        tokens = shift_and_flip(tokens, meta["patch"], cfg["image_shift"], cfg["image_flip"], rng)
    if augment and "mels" in meta:
        tokens, lengths = move_and_mask(tokens, lengths, meta["mels"], cfg["audio_shift"], cfg["audio_gain"],
                                        cfg["audio_mask"], rng)
    if lengths is not None and not is_joined(slot):  # the stem reads a whole recording, padding as silence
        if device.type == "cpu":  # short batches are cheap; compiled GPU code wants one shape
            tokens = tokens[:, :max(2, lengths.max())]  # "next" needs one token to read and one to predict
        batch["real"] = np.arange(tokens.shape[1]) < lengths[:, None]  # (B, T)
    if "label" in slot.objectives:
        batch["labels"] = slot.head_rows[arrays["labels"][rows]]  # (B,) rows of the label head
    if rng is not None and "reconstruct" in slot.objectives:
        batch["hidden"] = rng.random(tokens.shape[:2]) < cfg["mask_ratio"]  # (B, T)
    if meta["kind"] == "discrete":
        tokens = tokens.astype(np.int64)
        if tokens.max() >= meta["vocab"]:
            raise UserError(f"{slot.folder} holds token {tokens.max()}, its vocabulary ends at "
                            f"{meta['vocab'] - 1}: delete it")
    batch["tokens"] = tokens
    batch = {key: to_device(value, device) for key, value in batch.items()}
    if augment and "patch" in meta and cfg["image_affine"] > 0:  # where it is fast: on the device
        jitter = rng.normal(0, cfg["image_affine"], (len(rows), 2, 3)).astype(np.float32)
        batch["tokens"] = affine(batch["tokens"], meta["patch"], to_device(jitter, device))
    return batch


def to_device(array, device):
    """An array as a tensor; to a GPU from pinned memory, so that the copy does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def shift_and_flip(tokens, patch, shift, flip, rng):
    """Shift pictures (B, T, D) by up to `shift` pixels each (edges repeat), mirror half of them if `flip`."""
    pictures = unpatchify(tokens, patch)  # (B, S, S, c)
    B, S = pictures.shape[:2]
    padded = np.pad(pictures, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
    rows = rng.integers(0, 2 * shift + 1, (B, 1)) + np.arange(S)
    columns = rng.integers(0, 2 * shift + 1, (B, 1)) + np.arange(S)
    if flip:
        columns = np.where(rng.random((B, 1)) < 0.5, columns[:, ::-1], columns)
    return patchify(padded[np.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]], patch)


def affine(tokens, patch, jitter):
    """Map pictures (B, T, D) by identity + jitter (B, 2, 3), in units of half a picture each -> float32."""
    pictures = unpatchify(tokens, patch).permute(0, 3, 1, 2).float()  # (B, c, S, S)
    grid = F.affine_grid(torch.eye(2, 3, device=jitter.device) + jitter, pictures.shape, align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    return patchify(moved.permute(0, 2, 3, 1), patch)


def move_and_mask(tokens, lengths, mels, shift, gain, mask, rng):
    """Augment recordings (B, T, group*mels) uint8 -> (tokens, lengths): move them by up to `shift` frames
    (edges repeat), make them up to `gain` dB louder or softer, blank up to `mask` mels and up to `mask`
    frames (SpecAugment, arXiv 1904.08779)."""
    B, T, D = tokens.shape
    group, count = D // mels, T * D // mels
    frames, moves = tokens.reshape(B, count, mels), rng.integers(-shift, shift + 1, B)
    frames = frames[np.arange(B)[:, None], (np.arange(count) - moves[:, None]).clip(0, count - 1)]
    # dB -> natural logarithm of power -> levels of uint8
    levels_per_db = math.log(10) / 10 * 255 / (LOG_MEL_RANGE[1] - LOG_MEL_RANGE[0])
    frames = (frames + rng.uniform(-gain, gain, (B, 1, 1)) * levels_per_db).clip(0, 255)
    for axis, size in ((2, mels), (1, count)):
        wide, start = rng.integers(0, mask + 1, (B, 1)), rng.integers(0, size, (B, 1))
        blank = (np.arange(size) >= start) & (np.arange(size) < start + wide)
        frames = np.where(np.expand_dims(blank, 3 - axis), frames.mean((1, 2), keepdims=True), frames)
    ends = -(-(lengths * group + moves) // group)  # in tokens, rounded up
    return frames.astype(np.uint8).reshape(B, T, D), ends.clip(1, T)


# ------------------------------------------------------------------------------------------------------------
# optimisation


def make_optimizer(model, cfg, device):
    """AdamW over every parameter once: matrices decay, the rest (norms, biases, positions) does not.

    A slot that is idle in a step has no gradient (None): AdamW passes it over, it neither decays nor drifts.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        decays = parameter.dim() >= 2 and not name.startswith("position")
        (matrices if decays else others).append(parameter)
    groups = [dict(params=matrices, weight_decay=cfg["weight_decay"]), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg["learning_rate"], betas=(0.9, 0.99),
                             fused=device.type in ("cpu", "cuda"))


def learning_rate(cfg, step):
    """Each phase, the warm start and the main one, has its own linear warm-up (5%) and cosine to zero."""
    warm = cfg["warm_start_steps"]
    at, length = (step, warm) if step < warm else (step - warm, cfg["steps"])
    rising, falling = (at + 1) / max(1, length // 20), 0.5 + 0.5 * math.cos(math.pi * at / length)
    return cfg["learning_rate"] * min(rising, falling)


def pattern(cfg, slots, step):
    """The slots of a step by optimizer update: [["image"], ["text"]]; if joint, [["image", "text"]].

    A warm-start step is one update on the auxiliaries, in turn; a later one a target update and its company.
    """
    auxiliaries = [name for name in slots if name != cfg["target"]]
    turns = [name for name in auxiliaries for _ in range(cfg[f"{name}_updates"])]
    if step < cfg["warm_start_steps"]:
        turns = turns or auxiliaries
        return [auxiliaries] if cfg["schedule"] == "joint" else [[turns[step % len(turns)]]]
    if cfg["schedule"] == "joint":
        return [[cfg["target"], *auxiliaries]]
    return [[name] for name in [cfg["target"], *turns]]


# ------------------------------------------------------------------------------------------------------------
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
    """The linear probe on `known`, of four penalties, that is best on `val`: (weight, bias).

    known and val: (features (n, C), labels (n,)).
    """
    probes = [linear_probe(*known, classes, l2) for l2 in (1.0, 10.0, 100.0, 1000.0)]
    right = [(val[0] @ weight.T + bias).argmax(1).eq(val[1]).sum() for weight, bias in probes]
    return probes[np.argmax(right)]


# what evaluate() says and a result repeats of validation and test, where it applies
REPORTED = ("accuracy", "balanced_accuracy", "unseen_accuracy", "unseen_among_unseen", "harmonic_mean",
            "seen_with_offset", "unseen_with_offset")


@torch.no_grad()
def evaluate(model, slot, arrays, device, chosen=None):
    """How good the target is on a split -> dict(score, accuracy, ..., and the chosen probe, unseen_offset).

    With a label loss the label head answers, over the target's classes; without, a linear probe fitted on
    the run's own training examples. Penalty and offset are the best on this split, unless `chosen`, what
    evaluate() said of validation, is handed in. Without labels the score is minus the loss. score and
    accuracy count items of classes that have labelled examples; of the others see unseen_report().
    """
    labels, rows, classes = arrays.get("labels"), np.arange(len(arrays["tokens"])), len(slot.meta["classes"])
    if labels is None or classes < 2:
        loss = 0.0
        for i, part in enumerate(np.array_split(rows, -(-len(rows) // 500))):
            batch = collate(slot, arrays, part, device, np.random.default_rng([i]))  # hides the same always
            loss += len(part) / len(rows) * model(slot.name, **batch).item()
        return dict(score=-loss, accuracy=None, balanced_accuracy=None, probe=None)
    features = extract(model, slot, arrays, rows, device)
    truth, unseen = torch.from_numpy(labels).long(), torch.from_numpy(np.isin(labels, slot.banned))

    if "label" in slot.objectives:
        probe = [p[:classes].float().cpu() for p in (model.label_head.weight, model.label_head.bias)]
    elif chosen is None:
        known_labels = torch.from_numpy(slot.train["labels"][slot.rows])
        known = extract(model, slot, slot.train, slot.rows, device), known_labels
        probe = fit_probe(known, (features[~unseen], truth[~unseen]), classes)
    else:
        probe = chosen["probe"]
    scores = features @ probe[0].T + probe[1]  # (n, classes)
    right = (scores.argmax(1) == truth).float()
    accuracy = right[~unseen].mean().item()
    balanced = torch.stack([right[truth == c].mean() for c in truth[~unseen].unique()]).mean().item()
    found = dict(score=accuracy, accuracy=accuracy, balanced_accuracy=balanced, probe=probe)
    if unseen.any() and (chosen is None or "unseen_offset" in chosen):  # validation may have had none
        found.update(unseen_report(scores, truth, slot.banned, chosen["unseen_offset"] if chosen else None))
    return found


def unseen_report(scores, truth, banned, offset=None):
    """Accuracy where some classes had no labelled examples (generalised zero-shot, arXiv 1605.04253).

    scores (n, classes), truth (n,), banned: the unseen classes. Seen classes outshout them, so `offset` is
    taken off their scores; None chooses the best harmonic mean here, on labels of unseen classes too.
    """
    is_banned = torch.zeros(scores.shape[1], dtype=torch.bool)
    is_banned[banned] = True
    unseen = is_banned[truth]
    best_seen, seen_class = scores.masked_fill(is_banned, -torch.inf).max(1)
    best_unseen, unseen_class = scores.masked_fill(~is_banned, -torch.inf).max(1)
    gap = best_seen - best_unseen  # the offset at which an item's answer turns from seen to unseen

    def with_offset(value):
        right = torch.where(gap > value, seen_class, unseen_class) == truth
        a, b = right[~unseen].float().mean().item(), right[unseen].float().mean().item()
        return 2 * a * b / max(a + b, 1e-9), a, b

    if offset is None:
        candidates = torch.quantile(gap, torch.linspace(0, 1, 201)).tolist()
        offset = max(candidates, key=lambda value: with_offset(value)[0])
    harmonic, seen_accuracy, unseen_accuracy = with_offset(offset)
    among = (unseen_class == truth)[unseen].float().mean().item()
    return dict(unseen_accuracy=with_offset(0.0)[2], unseen_among_unseen=among, unseen_offset=offset,
                harmonic_mean=harmonic, seen_with_offset=seen_accuracy, unseen_with_offset=unseen_accuracy)


# ------------------------------------------------------------------------------------------------------------
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
    # on CPUs without bf16 matrix units half precision is slower
    half = name.startswith("cuda") and torch.cuda.is_bf16_supported()
    autocast = torch.autocast(name.split(":")[0], torch.bfloat16, enabled=half)
    return torch.device(name), autocast, f"{name}, {'bf16' if half else 'fp32'}"


def build_model(cfg, slots, classes):
    """A fresh UML from a config and model_slots(); UserError for a combination that cannot work."""
    keys = ("width", "layers", "heads", "temperature", "label_smoothing", "apart", "seed")
    try:
        return UML(slots, len(classes), **{key: cfg[key] for key in keys if key in cfg})
    except ValueError as problem:
        raise UserError(str(problem)) from None


@torch.no_grad()
def start_head_from(model, slot, device):
    """Rows of the label head become the slot's class means, less that of all, at unit length; biases stay."""
    features = extract(model, slot, slot.train, slot.rows, device)  # (n, C)
    labels = slot.head_rows[slot.train["labels"][slot.rows]]
    for row in np.unique(labels):
        mean = features[labels == row].mean(0) - features.mean(0)
        model.label_head.weight[row] = (mean / mean.norm().clamp_min(1e-6)).to(device)


def set_up(cfg, say, saved=None):
    """All a step needs, a SimpleNamespace. saved: the checkpoint to go on from, if there is one."""
    threads = cfg["threads"] or (saved["threads"] if saved else 0)
    if threads:  # going on: what torch chose then, since another number rounds differently
        torch.set_num_threads(threads)
    device, autocast, device_line = pick_device(cfg)
    slots, classes = open_slots(cfg, say)
    for slot in slots.values():
        if slot.batch < ranks()[1]:
            raise UserError(f"{slot.name}_batch={slot.batch} is less than one item for each of the "
                            f"{ranks()[1]} processes: raise it")
    model = build_model(cfg, model_slots(slots), classes)
    if folder := cfg["init_from"]:  # whatever slots that run had
        other, checkpoint = load_model(os.path.join(folder, "best.pt"))
        if any(checkpoint["config"][key] != cfg[key] for key in ("width", "layers", "heads")):
            raise UserError(f"init_from={folder} has a trunk of another width, depth or number of heads")
        model.trunk.load_state_dict(other.trunk.state_dict())
    optimizer = make_optimizer(model.to(device), cfg, device)
    if saved:
        try:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError, KeyError) as problem:
            why = str(problem).split("\n")[0]
            raise UserError(f"{cfg['out_dir']} is of another architecture ({why}): delete it") from None
    compiled = cfg["compile"] if cfg["compile"] is not None else device.type == "cuda"
    loss_of = torch.compile(model) if compiled else model  # `model` itself is what we evaluate and save
    every, shared = (sum(p.numel() for p in module.parameters()) for module in (model, model.trunk))
    say(f"{every:,} parameters, {shared:,} of them in the shared trunk; {device_line}, "
        f"{torch.get_num_threads()} threads, {'compiled' if compiled else 'eager'}")
    return SimpleNamespace(cfg=cfg, device=device, autocast=autocast, slots=slots, classes=classes,
                           model=model, loss_of=loss_of, optimizer=optimizer,
                           thread=ThreadPoolExecutor(1) if device.type == "cuda" else None, ahead={})


def train_step(parts, at):
    """One step, an optimizer update for each group in the pattern -> {slot: [losses, on the device]}."""
    cfg, losses = parts.cfg, {}
    for group in parts.optimizer.param_groups:
        group["lr"] = learning_rate(cfg, at.step)
    for names in pattern(cfg, parts.slots, at.step):
        parts.optimizer.zero_grad(set_to_none=True)
        for name in names:
            slot, batch = parts.slots[name], my_part(next_batch(parts, name, at.updates[name]))
            with parts.autocast:
                loss = parts.loss_of(name, **batch)
            (cfg[f"{name}_weight"] * loss).backward()  # joint: adds to the gradients of the slots before it
            losses.setdefault(name, []).append(loss.detach())  # not read here: that would wait for a GPU
            at.updates[name] += 1
            at.items += slot.batch
        # Several processes: each has its part of the sums. An idle slot has no gradient in any of them.
        add_up(*(p.grad for p in parts.model.parameters() if p.grad is not None))
        torch.nn.utils.clip_grad_norm_(parts.model.parameters(), 1.0)
        parts.optimizer.step()
    add_up(*(loss for values in losses.values() for loss in values))
    at.step += 1
    return losses


def run(cfg, say=tell):
    """Train one config to its end -> the result, also in result.json; None if stop_after came first.

    SIGINT and SIGTERM end it after the step, saved, with exit code 130 or 143. Under torchrun only process 0
    says anything, writes, and returns the result.
    """
    first = ranks()[0] == 0
    say = say if first else lambda line: None
    cfg = resolve(cfg, say)
    cfg["shards"] = shard_names(cfg)  # other data, another run
    parent, name = os.path.split(os.path.abspath(cfg["out_dir"]))
    busy = f"another process is training into {cfg['out_dir']}: wait for it or choose another --out_dir"
    with locked(os.path.join(parent, f".{name}.lock"), busy) if first else contextlib.nullcontext():
        result = train(cfg, first, say)
    return result if first else None


def train(cfg, first, say):
    """The run itself, top to bottom; cfg is resolved and out_dir ours alone. first: this is process 0."""
    folder = cfg["out_dir"]
    finished, saved = earlier_run(cfg, say)
    if finished:
        return finished

    # 1. data, model, optimizer, and where an earlier run left off
    parts = set_up(cfg, say, saved)
    model, slots, device, target = parts.model, parts.slots, parts.device, parts.slots[cfg["target"]]
    warm, total = cfg["warm_start_steps"], cfg["warm_start_steps"] + cfg["steps"]
    # all of a run's state that is no weight: batches follow from `updates`, no sampler or generator is saved
    at = SimpleNamespace(step=0, best=None, updates=dict.fromkeys(slots, 0), seconds=0.0, items=0)
    if saved:
        vars(at).update({key: saved[key] for key in vars(at)})
    if dist.is_initialized():
        dist.barrier()  # all have read what process 0 goes on to write
    if at.step > total:  # said before anything is written
        raise UserError(f"{folder} is at step {at.step}, beyond the {total} asked for: change --out_dir")
    if first:
        begin_folder(cfg, at.step)
    order = " then ".join("+".join(names) for names in pattern(cfg, slots, warm))
    say((f"{warm} steps on the auxiliaries alone, then " if warm else "") + f"{cfg['steps']} of {order}")

    def note(line, **entry):
        """Show a line; what it says goes to log.jsonl as well."""
        say(line)
        path, entry = os.path.join(folder, "log.jsonl"), json.dumps(entry) + "\n"
        with writing(path, len(entry)), open(path, "a", encoding="utf-8") as f:
            f.write(entry)

    def save(name, keep=None):
        save_checkpoint(os.path.join(folder, name), keep, model=model.state_dict(), slots=model.slots,
                        optimizer=parts.optimizer.state_dict(), config=cfg, classes=parts.classes,
                        target_classes=len(target.meta["classes"]), threads=torch.get_num_threads(),
                        **vars(at))

    def validate():
        """Note how good the target is on validation, and keep the model as best.pt if it never was better."""
        found = evaluate(model, target, target.val, device)
        scores = {f"val_{key}": found[key] for key in ("score", *REPORTED) if key in found}
        keys = [key for key in ("accuracy", "unseen_accuracy", "harmonic_mean") if found.get(key) is not None]
        shown = ", ".join(f"{key} {found[key]:.4f}" for key in keys or ["score"])
        note(f"step {at.step}/{total} | validation {shown}", step=at.step, **scores)
        if at.best is None or found["score"] > at.best["score"]:
            at.best = dict(step=at.step, score=found["score"])
            save("best.pt")

    # 2. the loop
    recent, logged = [], SimpleNamespace(**vars(at))  # (step, slot, loss) since, and state as of the last log
    clock, stopping = time.perf_counter(), at.step == total or 0 < cfg["stop_after"] <= at.step
    with signals_caught():
        while not stopping:
            if at.step == warm and cfg["head_from"]:
                start_head_from(model, slots[cfg["head_from"]], device)
            for name, losses in train_step(parts, at).items():
                recent += [(at.step, name, loss) for loss in losses]  # on the device

            asked = torch.tensor(float(len(SIGNALS)))  # on the CPU, where reading it waits for no GPU
            add_up(asked)  # whichever process got the signal, all leave the loop after the same step
            done, main_step = at.step == total, at.step - warm
            stopping = done or 0 < cfg["stop_after"] <= at.step or asked.item() > 0
            logging = done or at.step % cfg["log_interval"] == 0
            evaluating = done or (main_step > 0 and main_step % cfg["eval_interval"] == 0)
            saving = stopping or evaluating or (main_step < 0 and at.step % cfg["eval_interval"] == 0)
            if not (logging or saving):
                continue
            at.seconds += read_clock(device) - clock  # it stands still until the next step
            for step, name, loss in recent:
                if not loss.isfinite():
                    raise UserError(f"the {name} loss became {loss.item()} in step {step}: lower "
                                    f"--learning_rate (now {cfg['learning_rate']}); {folder} keeps the "
                                    "checkpoint before it")
            if logging and first:
                means = {}
                for name in dict.fromkeys(name for _, name, _ in recent):
                    losses = [loss for _, slot, loss in recent if slot == name]
                    means[name] = (sum(losses) / len(losses)).item()
                shown = " | ".join(f"{name} {mean:.4f}" for name, mean in means.items())
                seconds, lr = at.seconds - logged.seconds, learning_rate(cfg, at.step - 1)
                ms, rate = 1e3 * seconds / (at.step - logged.step), (at.items - logged.items) / seconds
                note(f"step {at.step}/{total} | {shown} | lr {lr:.1e} | {ms:.0f} ms/step | {rate:,.0f} "
                     "samples/s", step=at.step, loss=means, lr=lr, ms_per_step=ms, samples_per_second=rate)
            if logging:
                recent, logged = [], SimpleNamespace(**vars(at))
            if evaluating and first:
                validate()
            if saving and first:
                save("last.pt", keep=os.path.join(folder, "prev.pt"))
            clock = time.perf_counter()
    if at.step < total:
        say(f"stopped after step {at.step} of {total}, saved: the same command with --resume goes on")
        if SIGNALS:
            sys.exit(128 + SIGNALS[0])
    if at.step < total or not first:
        return None

    # 3. the end: the best checkpoint by validation, and the target's test split for the first and only time
    if at.best is None:  # resumed exactly at its end, never evaluated
        validate()
    model.load_state_dict(load_checkpoint(os.path.join(folder, "best.pt"))["model"])
    result = score_run(parts, at)
    write_json(os.path.join(folder, "result.json"), result)
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, "prev.pt"))
    return result


def read_clock(device):
    """Seconds, once the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def score_run(parts, at):
    """The result dict of a finished run: what the model scores on validation and test, and what it took."""
    cfg, slots, model, device = parts.cfg, parts.slots, parts.model, parts.device
    target = slots[cfg["target"]]
    val, test = evaluate(model, target, target.val, device), {}
    if cfg["score_test"]:
        test = evaluate(model, target, load_split(target.folder, "test"), device, val)
    classes = len(target.meta["classes"])
    result = dict(name=os.path.basename(os.path.normpath(cfg["out_dir"])), target=target.name,
                  losses={name: slot.loss for name, slot in slots.items()}, seed=cfg["seed"],
                  steps=cfg["steps"], warm_start_steps=cfg["warm_start_steps"],
                  examples={name: len(slot.rows) for name, slot in slots.items()},
                  best_step=at.best["step"], chance=1 / classes if classes > 1 else None)
    for key in REPORTED:
        if key in val:
            result.update({f"val_{key}": val[key], f"test_{key}": test.get(key)})
    if "unseen_offset" in val:
        result["unseen_offset"] = val["unseen_offset"]
    if val["accuracy"] is None:
        result.update(val_loss=-val["score"], test_loss=-test["score"] if test else None)

    # what it took: a slot's updates all cost what its first batch costs
    flops = sum(at.updates[name] * count_flops(model, name, train_batch(slot, cfg["seed"], 0, device))
                for name, slot in slots.items())
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    return dict(result, flops=flops, seconds=round(at.seconds, 2), peak_memory=memory,
                samples_per_second=round(at.items / at.seconds, 1))


# ------------------------------------------------------------------------------------------------------------
# checkpoints, and the folder of a run


def save_checkpoint(path, keep=None, **state):
    """Write a checkpoint whole or not at all, and only finite weights; the old one is moved to `keep`."""
    if broken := [name for name, value in state["model"].items() if not value.isfinite().all()]:
        raise UserError(f"{broken[0]} is no longer finite after step {state['step']}: lower --learning_rate "
                        f"(now {state['config']['learning_rate']}); {path} keeps the checkpoint before it")
    data = io.BytesIO()
    torch.save(dict(state, format=CHECKPOINT_FORMAT), data)
    write_file(path, data.getvalue(), keep)


def load_checkpoint(path):
    """What save() in train() put into a checkpoint, a dict. Only tensors and plain values are unpickled."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"format {saved['format']!r} where this code writes {CHECKPOINT_FORMAT}")
        for key in ("optimizer", "step", "config", "slots", "classes", "target_classes", "best", "updates",
                    "seconds", "items", "threads"):
            saved[key]  # KeyError if it is missing
        if broken := [name for name, value in saved["model"].items() if not value.isfinite().all()]:
            raise ValueError(f"{broken[0]} is not finite")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as problem:  # torch.load raises many kinds; all mean the same to the user
        why = f"{type(problem).__name__}: {problem}".split("\n")[0]
        raise UserError(f"{path} is damaged or no checkpoint of this project ({why}): delete it") from None
    return saved


def load_model(path):
    """The model of a checkpoint file, on the CPU, ready to embed -> (UML, checkpoint dict)."""
    checkpoint = load_checkpoint(path)
    try:
        model = build_model(checkpoint["config"], checkpoint["slots"], checkpoint["classes"])
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError, ZeroDivisionError) as problem:
        why = str(problem).split("\n")[0]
        raise UserError(f"{path}: weights and config do not fit ({why}): delete it") from None
    return model.eval(), checkpoint


def earlier_run(cfg, say):
    """What out_dir holds of this run -> (its result if it is finished, the checkpoint to go on from).

    Either is None if it is not there. UserError for another run, and for this one if it may not go on.
    """
    folder = cfg["out_dir"]
    config, result, *checkpoints = (os.path.join(folder, name) for name in (
        "config.json", "result.json", "last.pt", "prev.pt"))
    try:
        there, found = (dict(read_json(path)) if os.path.exists(path) else {} for path in (config, result))
    except (ValueError, TypeError, RecursionError) as problem:  # dict(): they are mappings
        raise UserError(f"{folder} has a damaged config.json or result.json ({problem}): delete it") from None
    if there and "steps" not in differing_keys(there, cfg) and found:
        say(f"{folder} is finished; its result again:")
        return found, None
    checkpoints = [path for path in checkpoints if os.path.exists(path)]
    if checkpoints and not cfg["resume"]:
        raise UserError(f"{folder} holds an unfinished run of this config: add --resume, or delete it")
    if not checkpoints:
        if cfg["resume"]:
            say(f"nothing to resume in {folder}: starting from scratch")
        return None, None
    try:
        saved = load_checkpoint(checkpoints[0])
    except UserError as problem:
        if len(checkpoints) == 1:
            raise
        say(f"{problem}; going back to {checkpoints[1]}")
        saved = load_checkpoint(checkpoints[1])
    say(f"resuming {folder} at step {saved['step']}")
    if differing := differing_keys(saved["config"], cfg):
        say(f"changed since step {saved['step']}: {', '.join(differing)}")
    return None, saved


def differing_keys(there, cfg):
    """The keys, not free to, in which cfg differs from the config in out_dir; UserError: another run."""
    keys = (there.keys() | cfg.keys()) - FREE_KEYS
    differing = sorted(key for key in keys if there.get(key) != cfg.get(key))
    refused = [key for key in differing if not cfg["resume"] or key not in FREE_ON_RESUME]
    if refused:
        raise UserError(f"{cfg['out_dir']} holds a run of another config (different: {', '.join(refused)}): "
                        "choose another --out_dir or delete it")
    return differing


def shard_names(cfg):
    """{slot: the name of its shard folder}, which is a hash of all that decides the data."""
    return {slot: os.path.basename(shard_folder(cfg, slot)[0]) for slot in active_slots(cfg)}


def begin_folder(cfg, step):
    """Make out_dir ready for a run that starts, or goes on, at a step: config.json and the log so far."""
    folder, kept = cfg["out_dir"], []
    with writing(folder, 0):
        os.makedirs(folder, exist_ok=True)
        # a result is of fewer steps, now resumed; the others are what a killed process left half-written
        for name in ("result.json", "result.json.tmp", "last.pt.tmp", "best.pt.tmp"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))
    write_json(os.path.join(folder, "config.json"), cfg)

    # the log up to this step: what is later, or was cut short by a kill, the resumed run writes again
    path = os.path.join(folder, "log.jsonl")
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if json.loads(line)["step"] <= step and line.endswith("\n"):
                        kept.append(line)
    write_file(path, "".join(kept).encode())


# ------------------------------------------------------------------------------------------------------------
# several processes, and signals. Under torchrun all processes draw the same batch and each takes its part of
# it, so that a run does not depend on how many there are (to floating-point tolerance).

SIGNALS = []  # those caught so far


@contextlib.contextmanager
def signals_caught():
    """Meanwhile the first SIGINT or SIGTERM asks for an end after this step, the second ends it now."""
    def on_signal(number, frame):
        SIGNALS.append(number)
        if len(SIGNALS) > 1:
            raise KeyboardInterrupt

    SIGNALS.clear()
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ranks():
    """(the number of this process, how many share the run); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(*tensors):
    """Sum each tensor over the processes, in place, all of them in one call."""
    if ranks()[1] > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def my_part(batch):
    """This process's items of a batch, and what each objective counts in the whole of it: UML.forward."""
    rank, world = ranks()
    if world == 1:
        return batch
    tokens = batch["tokens"]
    every = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)  # (B, T)
    real = batch.get("real", every)
    rebuilt = real & batch.get("hidden", every)
    counts = dict(label=len(tokens), next=real[:, 1:].sum().clamp_min(1),
                  reconstruct=rebuilt.sum().clamp_min(1))
    return dict({key: value[rank::world] for key, value in batch.items()}, counts=counts)


# ------------------------------------------------------------------------------------------------------------
# benchmark: where a step's time goes


def count_flops(model, name, batch):
    """FLOPs of forward and backward on a batch, counted by torch, operation by operation."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # attention as its matmuls
        model(name, **batch).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def benchmark(cfg, say=tell, repeats=20):
    """Time the steps of every slot, print where the time goes -> the dict that the last line prints as JSON.

    GFLOP/s is count_flops() of the slot's batch over the median step time. The peak it is held against is the
    best of 20 square matmuls (2 n^3 FLOPs) in this process, at the same dtype and threads. The device waits
    for data until its batch is there: on a CPU all that makes it, on a GPU what the thread did not finish.
    """
    parts = set_up(resolve(cfg, say), say)
    times, matrix = [], torch.randn(2048, 2048, device=parts.device)
    for _ in range(21):
        times.append(read_clock(parts.device))
        with parts.autocast:
            matrix @ matrix
    peak, out = 2 * 2048**3 / np.diff(times).min() / 1e9, {}
    say(f"matmul peak {peak:,.0f} GFLOP/s")
    for name, slot in parts.slots.items():
        steps = []  # seconds of each part of a step
        for update in range(4 + repeats):
            times = [read_clock(parts.device)]
            batch = next_batch(parts, name, update)
            times.append(read_clock(parts.device))
            with parts.autocast:
                loss = parts.loss_of(name, **batch)
            times.append(read_clock(parts.device))
            parts.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            times.append(read_clock(parts.device))
            torch.nn.utils.clip_grad_norm_(parts.model.parameters(), 1.0)
            parts.optimizer.step()
            times.append(read_clock(parts.device))
            steps.append(np.diff(times))
        steps = np.array(steps[4:])  # (repeats, 4); the first are slower, and hold the compilation if any
        ms = 1e3 * np.median(steps.sum(1))
        gflops = count_flops(parts.model, name, train_batch(slot, cfg["seed"], 0, parts.device)) / ms / 1e6
        shares = (steps.sum(0) / steps.sum()).round(4).tolist()
        shares = dict(zip(("waiting for data", "forward", "backward", "optimizer"), shares))
        out[name] = dict(ms_per_step=ms, gflops=gflops, fraction_of_peak=gflops / peak, share=shares)
        say(f"{name}: {ms:.1f} ms/step, {gflops:,.0f} GFLOP/s = {gflops / peak:.0%} of peak; "
            + ", ".join(f"{part} {share:.1%}" for part, share in shares.items()))
    return dict(out[cfg["target"]], peak_gflops=peak, peak_memory=peak_memory(), slots=out)


def main():
    cfg = read_run_config(sys.argv[1:])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun says so; gloo on CPU, NCCL on GPU
        # Before there is a group, or this module's defaults keep hold of it (torch loads it while training):
        # its threads would outlive destroy_process_group, and now and then abort the process as it ends.
        import torch.distributed.nn
        dist.init_process_group(timeout=datetime.timedelta(days=1))  # process 0 may prepare for hours
    try:
        result = benchmark(cfg) if cfg["benchmark"] else run(cfg)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if result is not None:
        tell(json.dumps(result))


if __name__ == "__main__":
    exit_on_user_error(main)
