"""train.py: the alternating loop. Every modality brings data of its own, never paired; one trunk learns all.

    python train.py sample_configs/letters_text.py            # offline, a minute or two on two CPU cores
    python train.py sample_configs/letters_text.py --resume   # go on after an interruption, bit for bit
    torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node=2 train.py CONFIG  # two processes, one run

On a GPU the same commands compute in bf16 and compile the model for long runs. A run writes out/NAME/:
last.pt (the newest checkpoint), best.pt (the best on validation), config.json, log.jsonl, result.json.

Sections, in the order in which a run happens: config, slots and their batches, optimisation, THE LOOP,
evaluation, checkpoints, several processes and signals.
"""
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import functools
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

# Before torch loads OpenMP: a thread that waits gives up its core early. On a busy machine a step then takes
# half the time (150 instead of 280 ms on two cores beside three other jobs), on an idle one the same.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# Let glibc keep freed buffers instead of returning them to the kernel: without page faults a picture step of
# letters_text takes 7% less time. -3 is M_MMAP_THRESHOLD; -1 is M_TRIM_THRESHOLD, switched off.
if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    libc.mallopt(-3, 1 << 30)
    libc.mallopt(-1, -1)

import numpy as np
from tqdm import tqdm

from prepare import (LEVELS_PER_DB, MODALITIES, PREPARE_KEYS, SLOT_NAME, UserError, above, active_slots,
                     at_least, below, exit_on_user_error, explained, imported, load_split, locked,
                     modality_of, one_of, open_hf, open_timm, patchify, peak_memory, plain_name, prepare,
                     print_help, read_config, read_json, read_meta, real_places, shard_folder, tell,
                     unpatchify, write_file, write_json, writing)

CHECKPOINT_FORMAT = 6  # raise it when what a checkpoint holds, or what its weights mean, changes
TRAINING_VERSION = 2   # raise it when a change makes results differ: compare then trains its runs again

# ------------------------------------------------------------------------------------------------------------
# config: these keys and prepare.py's make a run; sample_configs/*.py set some, --key=value overrides any

SLOT_KEYS = {f"{slot}_{end}": key for slot, (loss, _) in MODALITIES.items() for end, key in dict(
    loss=(loss, f"objectives of the {slot} slot, joined by '+': next, reconstruct, label"),
    weight=(1.0, f"factor on the {slot} loss", above(0)),
    updates=(1, "steps per target step under schedule='alternate' (target: 1)", at_least(0)),
    batch=(64, f"{slot} items in an update", at_least(1)),
    examples=(-1, "training items, all classes together: nested, even over classes (-1: all, 0: off)",
              at_least(-1)),
    embed=("linear", "one matrix for all tokens (a table for ids), or one vector an item: a ConvNet, timm",
           ("linear, conv or timm:NAME_OR_PATH", lambda value: re.fullmatch("linear|conv|timm:.+", value))),
).items()}
KEYS = dict(
    **PREPARE_KEYS,
    # slots
    target=("image", "the slot whose representation we want; all other slots are auxiliaries"),
    **SLOT_KEYS,
    control=(False, "shuffle the auxiliaries' labels or tokens: the arm control of probe.py compare"),
    share=("trunk", "what auxiliaries share of the target's trunk, besides the head (none: nor the head)",
           one_of("trunk", "attention", "feedforward", "norms", "added", "head", "none")),
    stages=(False, "replace each auxiliary update by one more on the target: a baseline as long"),
    unseen_classes=(0, "target classes, drawn at random, that get no labelled target examples", at_least(0)),
    unseen_like=("", "regular expression: target classes with such names get none either"),
    # augmentation
    image_shift=(4, "pictures are shifted by up to this many pixels", at_least(0)),
    image_flip=(False, "pictures are mirrored at random (wrong for letters, and for left against right)"),
    image_affine=(0.0, "standard deviation of a random affine map of each picture", at_least(0), below(1)),
    image_crop=(1.0, "pictures are cropped at random to this share of their area or more", at_least(0.01, 1)),
    image_colour=(0.0, "brightness, contrast, saturation change by factors 1 +- this", at_least(0), below(1)),
    audio_shift=(6, "recordings are moved by up to this many frames", at_least(0)),
    audio_gain=(6.0, "loudness changes by up to this many decibels", at_least(0)),
    audio_mask=(8, "a band of up to this many mels and a span of as many frames are blanked", at_least(0)),
    # model
    width=(128, "channels C of the trunk", at_least(1)),
    layers=(4, "blocks of the trunk (0: none, for features of a frozen encoder)", at_least(0)),
    heads=(4, "attention heads", at_least(1)),
    standard_weights=(False, "conv embeds: standardised weights, better on photographs, worse on letters"),
    equal_contrast=(True, "conv embeds: every item gets the same brightness and contrast"),
    encoder_learning_rate=(0.1, "factor on the rate of a timm: embed's weights (0: frozen)", at_least(0)),
    encoder_batchnorm=(False, "a timm: embed's BatchNorm learns statistics (those of process 0)"),
    trunk=("", "a language model of transformers is the trunk (width must be its own)",
           ("empty or hf:NAME_OR_PATH", re.compile("(hf:.+)?").fullmatch)),
    trunk_start=("pretrained", "or random: the same language model, fresh", one_of("pretrained", "random")),
    trunk_train=("all", "which weights of the trunk learn", one_of("all", "norms", "none")),
    temperature=(False, "learn a temperature of the label logits per slot"),
    label_smoothing=(0.0, "share of a label that is spread over the slot's classes", at_least(0), below(1)),
    head_from=("", "slot whose class means start the label head at the first target step ('zero-shot init')"),
    mask_ratio=(0.5, "share of tokens hidden in 'reconstruct'", above(0), below(1)),
    # training
    seed=(0, "of parameters, examples, batches and augmentation", at_least(0)),
    steps=(1000, "target steps; the log counts the warm start too", at_least(1)),
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
    score_test=(True, "score the target's test split, once, at the end (False: not yet; --resume can later)"),
    device=("auto", "where to train", one_of("auto", "cpu", "cuda", "mps")),
    fsdp=(False, "torchrun: each process trains its part of every block; one whole copy is kept to evaluate"),
    compile=(None, "torch.compile (None: on GPU from 10,000 steps on; in shorter runs it does not pay)"),
    report_to=("", "also send what log.jsonl holds there; tensorboard writes below out_dir",
               one_of("", "tensorboard", "trackio", "wandb")),
    threads=(0, "torch CPU threads (0: torch's choice)", at_least(0)),
)
# Keys that do not change the result: paths, logging, when to stop.
FREE_KEYS = {"out_dir", "resume", "stop_after", "log_interval", "raw_dir", "data_dir", "verify", "workers",
             "report_to"}
# Keys that may change when a run goes on.
FREE_ON_RESUME = FREE_KEYS | {"eval_interval", "device", "steps", "threads", "score_test"}

if __name__ == "__main__" and ("--help" in sys.argv or "-h" in sys.argv or len(sys.argv) == 1):
    exit_on_user_error(lambda: print_help(__doc__, KEYS))
    sys.exit()  # before torch is loaded, which takes more than a second

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from model import OBJECTIVES, UML

CPU = torch.device("cpu")


def read_run_config(argv, keys=KEYS):
    """argv -> the full config of a run, out_dir filled in."""
    cfg = read_config(argv, keys)
    if not cfg["out_dir"]:
        files = [arg for arg in argv if not arg.startswith("--")] or ["run"]
        cfg["out_dir"] = os.path.join("out", os.path.splitext(os.path.basename(files[0]))[0])
    cfg["out_dir"] = os.path.normpath(cfg["out_dir"])
    return cfg


def resolve(cfg, say=tell):
    """Check keys against each other, drop those without effect -> the config by which runs are told apart."""
    cfg = dict(cfg)
    cfg.update({slot: "" for slot in active_slots(cfg) if cfg[f"{slot}_examples"] == 0})
    slots, target, head_from = active_slots(cfg), cfg["target"], cfg["head_from"]
    auxiliaries = [slot for slot in slots if slot != target]
    if target not in slots:
        raise UserError(f"target='{target}' is not a slot with a source and examples (there are: "
                        f"{', '.join(slots) or 'none'})")
    for slot in slots:
        for objective in cfg[f"{slot}_loss"].split("+"):
            if objective not in OBJECTIVES:
                raise UserError(f"{slot}_loss='{cfg[f'{slot}_loss']}': '{objective}' is no objective (there "
                                f"are: {', '.join(OBJECTIVES)}, joined by '+')")
    for slot in slots if cfg["schedule"] == "joint" else [target]:
        if cfg[f"{slot}_updates"] != 1:
            raise UserError(f"{slot}_updates={cfg[f'{slot}_updates']}: a step is one update on the target, "
                            "and under schedule='joint' one on every slot: leave it out")
    if head_from and auxiliaries:
        if head_from not in auxiliaries or "label" not in cfg[f"{head_from}_loss"].split("+"):
            raise UserError(f"head_from='{head_from}' must name an auxiliary slot with a label loss")
    if (share := cfg["share"]) not in ("trunk", "head", "none"):
        for key in ("trunk", "fsdp"):
            if cfg[key]:
                raise UserError(f"share='{share}' takes our own trunk apart, which {key}={cfg[key]} does not "
                                "allow: choose trunk, head or none")
    if share == "added" and cfg["init_from"]:
        raise UserError("share='added' builds another trunk than init_from has: leave one out")
    if share == "none" and head_from:
        raise UserError("share='none' shares no label head that head_from could start: leave one out")
    if cfg.get("audio_test_group") == "each":  # cross-validation: seed 0 is tested on the first speaker, ...
        cfg.update(audio_test_group=f"#{cfg['seed']}", audio_val_group=f"#{cfg['seed'] + 1}")

    # Keys of slots that are off go; those of a modality (text_length) stay while any slot of it is on.
    used = {*slots, *map(modality_of, slots)}
    owners = {key: key.split("_")[0] for key in cfg if key not in MODALITIES}
    idle = [key for key, owner in owners.items() if SLOT_NAME.fullmatch(owner) and owner not in used]
    # These keys are about auxiliaries; where there are none they get their defaults.
    reset = [] if auxiliaries else ["warm_start_steps", "head_from", "share", "stages", "control"]
    default = lambda key: KEYS[re.sub(r"^([a-z]+)\d", r"\1", key)][0]  # text2_loss has that of text_loss
    ignored = [key for key in [*idle, *reset] if cfg[key] != default(key)]
    if ignored:
        say("ignored, since nothing in this run uses them: " + ", ".join(sorted(ignored)))
    cfg.update({key: KEYS[key][0] for key in reset})
    return {key: value for key, value in cfg.items() if key not in idle}


# ------------------------------------------------------------------------------------------------------------
# slots: a source's shards, the examples a run may use, and how they become batches

EXAMPLES, ORDER, BATCH, CONTROL = range(4)  # what a stream of random numbers is for


def stream(seed, name, *purpose):
    """A random generator that depends on these values alone: no slot and no purpose disturbs another."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *purpose])


@functools.lru_cache(maxsize=16)
def epoch_order(seed, name, epoch, n):
    """The order in which a slot's n examples come in an epoch."""
    return stream(seed, name, ORDER, epoch).permutation(n)


class Slot:
    """One slot of a run: its shards, the examples the run may use, and the batches made of them.

    A batch is a pure function of (seed, slot, the slot's own update count), so nothing else that a run does
    changes it, and a resumed run goes on with the same batches without any saved state.
    """

    def __init__(self, cfg, name, device, say):
        self.cfg, self.name, self.device = cfg, name, device
        self.folder = prepare(cfg, name, say)
        self.meta = read_meta(self.folder)
        self.length = self.meta["arrays"]["tokens"]["shape"][0]  # tokens of an item, T
        self.objectives = tuple(cfg[f"{name}_loss"].split("+"))
        self.labelled = any(OBJECTIVES[objective].labels for objective in self.objectives)
        self.hides = any(OBJECTIVES[objective].hides for objective in self.objectives)
        self.batch_size = cfg[f"{name}_batch"]
        self.joined = cfg[f"{name}_embed"] != "linear"  # its embed makes one token of an item
        self.splits = {}
        self.head_rows = None  # (classes,) the row of the label head of each class: match_classes() sets it
        self.check()
        # classes of the target that get no labelled examples; they are reported apart
        self.unseen = self.choose_unseen() if name == cfg["target"] else []
        train = self.split("train")
        # rows of the training split that the run may use
        self.examples = choose_examples(train.get("labels"), len(train["tokens"]), cfg[f"{name}_examples"],
                                        cfg["seed"], name, self.unseen)

    def check(self):
        """UserError where the config asks for what this source does not have."""
        cfg, name, classes = self.cfg, self.name, self.meta["classes"]
        source = f"{name}={cfg[name]}"
        alike = sorted(classes, key=plain_name)
        for one, other in zip(alike, alike[1:]):
            if plain_name(one) == plain_name(other):
                raise UserError(f"{source}: the classes '{one}' and '{other}' differ only in case, spaces, "
                                "'_' or '-': rename one")
        if self.labelled and len(classes) < 2:
            raise UserError(f"{source} has {len(classes)} classes, {name}_loss={'+'.join(self.objectives)} "
                            "needs at least two: a folder has them as PATH/CLASS/*, a table in a column that "
                            f"--{name}_label names; without labels choose --{name}_loss=next or reconstruct "
                            f"and --{name}_embed=linear")
        if name == cfg["target"] and not self.meta.get("held_out", True):
            raise UserError(f"{source} has one or two items of every class, so none is left to test a target "
                            "on: give three of each")
        embed = cfg[f"{name}_embed"]
        readable = dict(linear=True, conv="patch" in self.meta or "mels" in self.meta)
        if not readable.get(embed, "patch" in self.meta):
            reads = "pictures and log-mels" if embed == "conv" else "pictures"
            raise UserError(f"{name}_embed='{embed}' reads {reads}, {source} holds none: choose "
                            f"--{name}_embed=linear")
        if self.batch_size % ranks()[1]:
            raise UserError(f"{name}_batch={self.batch_size} cannot be shared evenly by {ranks()[1]} "
                            "processes: make it a multiple of their number")

    def choose_unseen(self):
        """The numbers of the classes that unseen_classes and unseen_like name, in order."""
        cfg, classes = self.cfg, self.meta["classes"]
        shuffled = stream(cfg["seed"], "unseen classes").permutation(len(classes))
        unseen = set(shuffled[:cfg["unseen_classes"]].tolist())
        if pattern := cfg["unseen_like"]:
            with explained(f"unseen_like='{pattern}' is no regular expression"):
                alike = [number for number, name in enumerate(classes) if re.search(pattern, name)]
            if not alike:
                raise UserError(f"unseen_like='{pattern}' finds none of {len(classes)} classes, such as "
                                f"'{(classes or [''])[0]}'")
            unseen |= set(alike)
        if (cfg["unseen_classes"] or unseen) and len(unseen) > len(classes) - 2:
            raise UserError(f"unseen_classes={cfg['unseen_classes']} leaves fewer than two of {len(classes)} "
                            f"classes" + (f", with unseen_like='{pattern}'" if pattern else ""))
        return sorted(unseen)

    def split(self, part):
        """"train", "val" or "test" -> {"tokens": Shards, and perhaps "labels", "lengths": (n,) arrays}."""
        if part not in self.splits:
            self.splits[part] = load_split(self.folder, part)
        return self.splits[part]

    def measure(self):
        """What the slot is judged by: "accuracy"; "balanced_accuracy", the mean of the classes' accuracies,
        where the largest class of the source has over 1.5 times its even share; without classes "loss"."""
        labels, classes = self.split("train").get("labels"), len(self.meta["classes"])
        if labels is None or classes < 2:
            return "loss"
        counts = np.bincount(labels, minlength=classes)
        return "balanced_accuracy" if counts.max() > 1.5 * counts.mean() else "accuracy"

    def batch(self, update):
        """The slot's update-th training batch, augmented, on the device: what UML.forward takes.

        Of several processes each makes only its share of the batch: every N-th item.
        """
        seed, n = self.cfg["seed"], len(self.examples)
        # Epochs, each a permutation of the examples, are laid end to end and cut into batches.
        places = update * self.batch_size + np.arange(self.batch_size)
        rows = np.array([self.examples[epoch_order(seed, self.name, place // n, n)[place % n]]
                         for place in places.tolist()])
        changes = self.draw_changes(stream(seed, self.name, BATCH, update))
        rank, world = ranks()
        mine = {key: values[rank::world] for key, values in changes.items()}
        return self.load(self.split("train"), rows[rank::world], mine)

    def evaluation_batches(self, arrays, rows=None):
        """Batches of up to 500 items of a split, in order and not augmented. rows: only these (None: all)."""
        rows = np.arange(len(arrays["tokens"])) if rows is None else rows
        for start in range(0, len(rows), 500):
            part, hidden = rows[start:start + 500], {}
            if self.hides:  # the same tokens at every evaluation
                random = np.random.default_rng([start]).random((len(part), self.length))
                hidden = dict(hidden=random < self.cfg["mask_ratio"])
            yield self.load(arrays, part, hidden)

    def draw_changes(self, rng):
        """The random numbers of a batch's augmentation: {what: (B, ...)}.

        They are drawn for the whole batch, so that they are the same however many processes share it.
        """
        cfg, B, changes = self.cfg, self.batch_size, {}
        if "patch" in self.meta:  # one map (x, y, 1) -> (x, y) a picture, in units of half a picture
            pixel = 2 / (self.meta["patch"] * math.isqrt(self.length))
            shift = rng.integers(-cfg["image_shift"], cfg["image_shift"] + 1, (B, 2))
            warp = np.eye(2, 3) + rng.normal(0, cfg["image_affine"], (B, 2, 3))
            warp[:, :, 2] += pixel * shift
            if cfg["image_flip"]:
                warp[:, 0, :2] *= rng.choice([-1, 1], (B, 1))
            if cfg["image_crop"] < 1:
                side = np.sqrt(rng.uniform(cfg["image_crop"], 1, (B, 1)))  # of the crop, as a share
                warp[:, :, :2] *= side[:, :, None]
                warp[:, :, 2] += rng.uniform(-1, 1, (B, 2)) * (1 - side)
            changes["warp"] = warp.astype(np.float32)
            if cfg["image_colour"] > 0:
                low, high = 1 - cfg["image_colour"], 1 + cfg["image_colour"]
                changes["colour"] = rng.uniform(low, high, (B, 3)).astype(np.float32)
        if "mels" in self.meta:
            shift, gain, mask = cfg["audio_shift"], cfg["audio_gain"], cfg["audio_mask"]
            changes["move"] = rng.integers(-shift, shift + 1, B)  # frames to the right
            changes["gain"] = rng.uniform(-gain, gain, B)  # decibels
            changes["blank_size"] = rng.integers(0, mask + 1, (B, 2))  # frames and mels
            changes["blank_start"] = rng.random((B, 2))  # as a share of all frames and mels
        if self.hides:
            changes["hidden"] = rng.random((B, self.length)) < cfg["mask_ratio"]
        return changes

    def load(self, arrays, rows, changes):
        """Read items from the shards, change them as drawn -> the keyword arguments of UML.forward."""
        batch = {key: changes[key] for key in ("hidden", "warp", "colour") if key in changes}
        tokens = arrays["tokens"][rows]  # (B, T, D) or (B, T) ids: one read of the memory map
        lengths = arrays["lengths"][rows] if "lengths" in arrays else None  # (B,) real tokens; None: all are
        if "move" in changes:
            tokens, lengths = change_recordings(tokens, lengths, self.meta["mels"], changes)
        if self.labelled:
            batch["labels"] = self.head_rows[arrays["labels"][rows]]  # (B,) rows of the label head
        if self.meta["kind"] == "discrete":
            tokens = tokens.astype(np.int64)
            if tokens.max() >= self.meta["vocab"]:
                raise UserError(f"{self.folder} holds token {tokens.max()}, its vocabulary ends at "
                                f"{self.meta['vocab'] - 1}: delete it")
        batch["tokens"] = tokens
        if lengths is not None and not self.joined:  # a conv embed reads all, padding as silence
            batch["real"] = real_places(lengths, self.length)
            if self.device.type == "cpu":  # cut off what is padding in all; a GPU wants one shape
                longest = max(2, lengths.max())  # "next" needs one token to read and one to predict
                for key in batch.keys() & {"tokens", "real", "hidden"}:
                    batch[key] = batch[key][:, :longest]
        batch = {key: to_device(value, self.device) for key, value in batch.items()}
        if "warp" in batch:  # on the device, where it is fast
            batch["tokens"] = warp_pictures(batch["tokens"], self.meta["patch"], batch.pop("warp"))
        if "colour" in batch:
            batch["tokens"] = change_colours(batch["tokens"], self.meta["patch"], batch.pop("colour"))
        return batch

    def destroy_structure(self):
        """Shuffle an auxiliary's examples: labels if it reads them, tokens if it predicts tokens (over all
        real places of all examples). Each label and token stays as frequent as it was."""
        rng, arrays, rows = stream(self.cfg["seed"], self.name, CONTROL), self.split("train"), self.examples
        if self.labelled:
            arrays["labels"][rows] = rng.permutation(arrays["labels"][rows])
        predicts = any(OBJECTIVES[objective].head for objective in self.objectives)
        if not self.labelled and not predicts:
            raise UserError(f"control: {self.name}_loss={'+'.join(self.objectives)} reads no labels and "
                            "predicts no tokens, so there is nothing to destroy")
        if predicts:
            arrays["tokens"] = arrays["tokens"][np.arange(len(arrays["tokens"]))]  # out of the memory map
            tokens = arrays["tokens"][rows]
            lengths = arrays["lengths"][rows] if "lengths" in arrays else np.full(len(rows), self.length)
            real = real_places(lengths, self.length)
            if self.length > 1:
                tokens[real] = rng.permutation(tokens[real])
            else:  # an item of one token has no other place: every number is shuffled over the items
                tokens[real] = rng.permuted(tokens[real], axis=0)
            arrays["tokens"][rows] = tokens


def read_ahead(batch):
    """Slot.batch for a GPU: a thread builds the next batch, the same bits, while the GPU trains on this."""
    thread, waiting = ThreadPoolExecutor(1), {}

    def batch_read_ahead(update):
        job = waiting.pop(update, None) or thread.submit(batch, update)
        waiting[update + 1] = thread.submit(batch, update + 1)
        return job.result()  # raises here what went wrong there

    return batch_read_ahead


def to_device(array, device):
    """An array as a tensor; to a GPU from pinned memory, so that the copy does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def warp_pictures(tokens, patch, warp):
    """Draw pictures (B, T, D) anew -> float32. warp (B, 2, 3), in units of half a picture, says where in the
    old picture each place of the new one is read; beyond its edges they repeat."""
    pictures = unpatchify(tokens, patch).permute(0, 3, 1, 2).float()  # (B, c, S, S)
    grid = F.affine_grid(warp, pictures.shape, align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    return patchify(moved.permute(0, 2, 3, 1), patch)


def change_colours(tokens, patch, factors):
    """Brightness, contrast and saturation of pictures (B, T, D), 0 to 255, by factors (B, 3)."""
    pictures = unpatchify(tokens, patch)  # (B, S, S, c)
    brightness, contrast, saturation = factors.T[:, :, None, None, None]
    pictures = pictures * brightness
    mean, grey = pictures.mean((1, 2, 3), keepdim=True), pictures.mean(3, keepdim=True)
    pictures = mean + (grey + (pictures - grey) * saturation - mean) * contrast
    return patchify(pictures.clamp(0, 255), patch)


def change_recordings(tokens, lengths, mels, changes):
    """Move recordings (B, T, group*mels) uint8 in time (edges repeat), change their loudness, blank a band
    of mels and a span of frames (SpecAugment, arXiv 1904.08779) -> (tokens, lengths)."""
    B, T, D = tokens.shape
    group, count = D // mels, T * D // mels
    move = changes["move"][:, None]  # (B, 1)
    frames = tokens.reshape(B, count, mels)
    frames = frames[np.arange(B)[:, None], (np.arange(count) - move).clip(0, count - 1)]
    frames = (frames + changes["gain"][:, None, None] * LEVELS_PER_DB).clip(0, 255)
    for axis, size in ((2, mels), (1, count)):
        start = (changes["blank_start"][:, axis - 1, None] * size).astype(int)  # (B, 1)
        end = start + changes["blank_size"][:, axis - 1, None]
        blank = (np.arange(size) >= start) & (np.arange(size) < end)  # (B, size)
        mean = frames.mean((1, 2), keepdims=True)
        frames = np.where(np.expand_dims(blank, 3 - axis), mean, frames)
    ends = np.ceil((lengths * group + changes["move"]) / group).astype(int)  # in tokens
    return frames.astype(np.uint8).reshape(B, T, D), ends.clip(1, T)


def choose_examples(labels, n, count, seed, name, banned=()):
    """Rows of the training split a run may use: the first `count` of an order in which classes take turns.

    So the draw is even over classes, decided by (seed, the slot's name), and nested: a larger count contains
    every smaller one. labels (n,) or None; banned: classes left out; count=-1: all.
    """
    order = stream(seed, name, EXAMPLES).permutation(n)
    if labels is not None:
        shuffled = labels[order]
        by_class = np.argsort(shuffled, kind="stable")  # classes together, each in its shuffled order
        turn = np.empty(n, np.int64)  # 0 for the first item of its class, 1 for the second, ...
        turn[by_class] = np.arange(n) - np.searchsorted(shuffled[by_class], shuffled[by_class])
        order = order[np.argsort(turn, kind="stable")]  # first everyone's first, then everyone's second, ...
        order = order[~np.isin(labels[order], list(banned))]
    if count > len(order):
        raise UserError(f"{name}_examples={count}, but its training split offers {len(order)}: lower it "
                        "(-1: all)")
    return order if count < 0 else order[:count]


def open_slots(cfg, say, device=CPU):
    """Prepare what is missing, open all slots -> ({name: Slot}, target first; classes of the label head)."""
    slots, target = {}, cfg["target"]
    for name in sorted(active_slots(cfg), key=lambda name: name != target):
        slots[name] = slot = Slot(cfg, name, device, say)
        if cfg["control"] and name != target:
            slot.destroy_structure()
        role = " (target)" if name == target else ""
        say(f"{name}={cfg[name]}, {len(slot.examples):,} training items, loss {cfg[f'{name}_loss']}{role}")
        if slot.labelled and cfg[f"{name}_examples"] > 0:
            wanted = len(slot.meta["classes"]) - len(slot.unseen)
            without = wanted - len(np.unique(slot.split("train")["labels"][slot.examples]))
            if without > 0:
                say(f"warning: {name}_examples={cfg[f'{name}_examples']}, of all classes together, leaves "
                    f"{without} of {wanted} classes without an example")
    return slots, match_classes(slots, target, say)


def match_classes(slots, target, say):
    """The label head's classes: the target's first, then what other slots with labels add.

    Names compare in plain form. Each such slot gets head_rows (classes,), the row of each of its classes.
    """
    targets = [plain_name(c) for c in slots[target].meta["classes"]]
    known = dict(zip(targets, slots[target].meta["classes"]))  # {plain name: name}, a row of the head each
    for slot in slots.values():
        if slot.name != target and not slot.labelled:
            continue
        names = [plain_name(c) for c in slot.meta["classes"]]
        for name, shown in zip(names, slot.meta["classes"]):
            known.setdefault(name, shown)
        row_of = {name: row for row, name in enumerate(known)}
        slot.head_rows = np.array([row_of[name] for name in names], np.int64)
        extra = [known[name] for name in names if name not in targets]
        lacking = [known[name] for name in targets if name not in names]
        if targets and (extra or lacking):
            none_common = len(lacking) == len(targets)
            counted = lambda names: f"{len(names)} ({', '.join(names[:5])})" if names else "none"
            cure = "; no label teaches both: give classes the same names in both" if none_common else ""
            say(f"warning: classes of {slot.name} that are not the target's: {counted(extra)}; of the target "
                f"that are not {slot.name}'s: {counted(lacking)}{cure}")
    return list(known.values())


# ------------------------------------------------------------------------------------------------------------
# model and optimisation


def model_slots(slots):
    """What model.py must know of each slot, plain enough to be stored in a checkpoint."""
    plain = {}
    for name, slot in slots.items():
        kept = [key for key in ("kind", "vocab", "mean", "std", "patch", "mels") if key in slot.meta]
        plain[name] = dict({key: slot.meta[key] for key in kept}, loss=slot.objectives, length=slot.length)
        if slot.meta["kind"] == "continuous":
            plain[name]["dim"] = slot.meta["arrays"]["tokens"]["shape"][1]  # of (T, D)
        if slot.joined:
            plain[name]["embed"] = slot.cfg[f"{name}_embed"].split(":")[0]
            plain[name].update({key: slot.cfg[key] for key in ("standard_weights", "equal_contrast")})
        if slot.labelled:
            labels = slot.split("train")["labels"][slot.examples]
            plain[name]["rows"] = np.unique(slot.head_rows[labels]).tolist()
    return plain


def build_model(cfg, slots, classes, trunk=None):
    """A fresh UML from a config, model_slots() and perhaps the configuration of a language model as trunk."""
    keys = ("width", "layers", "heads", "temperature", "label_smoothing", "share", "seed")
    try:
        model = UML(slots, len(classes), trunk=trunk, **{key: cfg[key] for key in keys})
    except ImportError as problem:
        raise UserError(f"this model needs {problem.name}: pip install {problem.name}") from None
    except ValueError as problem:
        raise UserError(str(problem)) from None
    for name, parameter in model.named_parameters():
        if ".embed.net." in name and cfg["encoder_learning_rate"] == 0:
            parameter.requires_grad_(False)
        is_norm = "norm" in name.lower() or "ln_" in name  # ln_1: GPT-2's word for it
        learns = dict(all=True, norms=is_norm, none=False)[cfg["trunk_train"]]
        if name.startswith(("trunk.", "own_trunk.")) and not learns:
            parameter.requires_grad_(False)
    return model


def build_pretrained_model(cfg, slots, classes):
    """build_model() with the weights of other people's encoders and language models in their places."""
    encoders, language_model, trunk = {}, None, None
    for name, slot in slots.items():
        if slot.get("embed") == "timm":
            spec, size = cfg[f"{name}_embed"], cfg["image_size"]
            encoder, about = open_timm(spec)
            cure = f": its own size is {about['size']}"  # some resample their positions, others take any
            with torch.no_grad(), explained(f"{spec} refuses pictures of image_size={size}", cure):
                if about["fixed_size"] and hasattr(encoder, "set_input_size"):
                    encoder.set_input_size(img_size=size)
                    about["arguments"]["img_size"] = size
                encoder(torch.zeros(1, 3, size, size))
            encoders[name] = encoder
            # the encoder scales numbers from 0 to 1 itself
            slot.update(encoder=about, mean=[0.0], std=[255.0], batchnorm=cfg["encoder_batchnorm"])
    if cfg["trunk"]:
        language_model, _, trunk = open_hf(cfg["trunk"])
    model = build_model(cfg, slots, classes, trunk)
    for name, encoder in encoders.items():
        model.adapters[name].embed.net.load_state_dict(encoder.state_dict())
    if language_model and cfg["trunk_start"] == "pretrained":
        weights = language_model.state_dict()
        for part in (model.trunk, *model.own_trunk.values()):
            part.net.load_state_dict({key: weights[key] for key in part.net.state_dict()})
    return model


def make_optimizer(model, cfg):
    """AdamW over every parameter once: matrices decay, the rest (norms, biases, our positions) does not.

    A slot that is idle in a step has no gradient (None): AdamW passes it over, it neither decays nor drifts.
    (But with share="added" a target's step is one of the auxiliary's trunk as well.)
    """
    groups = {}  # {(decays?, factor on the learning rate): parameters}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and not name.endswith("position")
            factor = cfg["encoder_learning_rate"] if ".embed.net." in name else 1.0
            groups.setdefault((decays, factor), []).append(parameter)
    groups = [dict(params=parameters, weight_decay=cfg["weight_decay"] if decays else 0.0, factor=factor)
              for (decays, factor), parameters in groups.items()]
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=cfg["learning_rate"], betas=(0.9, 0.99), fused=fused)


def learning_rate(cfg, step):
    """The warm start and the main phase each rise for 5% of their steps, then fall by a cosine to 0."""
    warm = cfg["warm_start_steps"]
    place, length = (step, warm) if step < warm else (step - warm, cfg["steps"])
    rising = (place + 1) / max(1, length // 20)
    falling = 0.5 + 0.5 * math.cos(math.pi * place / length)
    return cfg["learning_rate"] * min(rising, falling)


def pattern(cfg, slots, step):
    """The slots of a step by optimizer update: [["image"], ["text"]]; if joint, [["image", "text"]].

    A warm-start step is one update on an auxiliary, in turn; a later one is an update on the target, then
    those of the auxiliaries.
    """
    auxiliaries = [name for name in slots if name != cfg["target"]]
    turns = [name for name in auxiliaries for _ in range(cfg[f"{name}_updates"])]
    if step < cfg["warm_start_steps"]:
        turns = turns or auxiliaries
        groups = [auxiliaries] if cfg["schedule"] == "joint" else [[turns[step % len(turns)]]]
    elif cfg["schedule"] == "joint":
        groups = [[cfg["target"], *auxiliaries]]
    else:
        groups = [[name] for name in [cfg["target"], *turns]]
    if cfg["stages"]:  # a baseline: the auxiliaries' updates go to the target
        groups = [[cfg["target"]] * len(group) for group in groups]
    return groups


# ------------------------------------------------------------------------------------------------------------
# THE LOOP


@dataclasses.dataclass
class Run:
    """A run under way: what it is made of, and how far it is."""
    cfg: dict
    device: torch.device
    autocast: torch.autocast
    slots: dict               # {name: Slot}, the target first
    classes: list             # names of the label head's rows
    model: UML                # what is evaluated and saved
    engine: torch.nn.Module   # what computes losses: the model, perhaps compiled, perhaps shared by processes
    optimizer: torch.optim.Optimizer
    bar: tqdm                 # on a terminal
    report: object            # function of (step, {name: number}), or None: report_to
    total: int                # steps of the whole run
    # What a checkpoint keeps besides weights. Batches follow from `updates`: no sampler has a state.
    step: int = 0             # steps done, the warm start's included
    updates: dict = None      # {slot: its own updates}
    best: dict = None         # step and validation score of best.pt
    seconds: float = 0.0      # of training; evaluation and saving do not count
    items: int = 0            # examples trained on


def train(run, say):
    """Train to the end, or to stop_after, or until a signal asks for an end after the step."""
    cfg, slots, optimizer, first = run.cfg, run.slots, run.optimizer, ranks()[0] == 0
    warm, end = cfg["warm_start_steps"], min(run.total, cfg["stop_after"] or run.total)
    recent = {}  # {slot: its losses since the last log line}
    logged = (run.step, run.seconds, run.items)  # at the last log line
    clock = read_clock(run.device)
    for step in range(run.step, end):
        if step == warm and cfg["head_from"]:
            start_head_from(run, slots[cfg["head_from"]])
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(cfg, step)
        for names in pattern(cfg, slots, step):  # [["image"], ["text"]]; if joint, [["image", "text"]]
            optimizer.zero_grad(set_to_none=True)
            for name in names:
                batch = slots[name].batch(run.updates[name])
                # Several processes average their gradients once an update, after its last slot.
                with gradients_shared(run.engine, name == names[-1]):
                    with run.autocast:
                        loss = run.engine(name, **batch)
                    (cfg[f"{name}_weight"] * loss).backward()
                run.updates[name] += 1
                run.items += slots[name].batch_size
                recent.setdefault(name, []).append(loss.detach())  # not read here: that would wait for a GPU
            torch.nn.utils.clip_grad_norm_(run.engine.parameters(), 1.0)
            optimizer.step()
        run.step = step + 1
        run.bar.update()

        # All processes agree on a signal, so that they leave the loop after the same step.
        ending = run.step == end or mean_over_processes(torch.tensor(float(len(SIGNALS)))).item() > 0
        # counted from the first target step, so that arms with and without a warm start are read alike
        on_interval = (run.step - warm) % cfg["eval_interval"] == 0
        if ending or on_interval or run.step % cfg["log_interval"] == 0:
            run.seconds += read_clock(run.device) - clock  # the clock stands still until the next step
            log_losses(run, recent, logged, say)
            recent, logged = {}, (run.step, run.seconds, run.items)
            if ending or on_interval:
                optimizer_state = whole_state(run)
                if first and (run.step == run.total or (on_interval and run.step > warm)):
                    validate(run, say, optimizer_state)
                if first:
                    save(run, "last.pt", optimizer_state)
            clock = read_clock(run.device)
        if ending:
            break


def log_losses(run, recent, logged, say):
    """One line: the mean loss of every slot since the last line, over all processes, and the pace.

    UserError where a loss is no longer a number; the checkpoint on disk is then the one before it.
    """
    means = {name: mean_over_processes(torch.stack(losses).mean()).item() for name, losses in recent.items()}
    for name, mean in means.items():
        if not math.isfinite(mean):
            raise UserError(f"the {name} loss is no longer finite by step {run.step}: lower --learning_rate "
                            f"(now {run.cfg['learning_rate']}); {run.cfg['out_dir']} keeps the checkpoint "
                            "before it")
    step, seconds, items = logged
    ms = 1e3 * (run.seconds - seconds) / (run.step - step)
    pace = (run.items - items) / (run.seconds - seconds)
    rate = learning_rate(run.cfg, run.step - 1)
    shown = " | ".join(f"{name} {mean:.4f}" for name, mean in means.items())
    note(run, say, f"{shown} | lr {rate:.1e} | {ms:.0f} ms/step | {pace:,.0f} samples/s",
         loss=means, lr=rate, ms_per_step=ms, samples_per_second=pace)


def validate(run, say, optimizer_state):
    """Note how good the target is on validation, and keep the model as best.pt if it never was better."""
    target = run.slots[run.cfg["target"]]
    scores = evaluate(run.model, target, target.split("val"))
    also = [f", {key} {scores[key]:.4f}" for key in ("unseen_accuracy", "harmonic_mean") if key in scores]
    note(run, say, f"validation {worded(target.measure())} {abs(scores['score']):.4f}{''.join(also)}",
         **{f"val_{key}": scores[key] for key in ("score", *REPORTED) if key in scores})
    if run.best is None or scores["score"] > run.best["score"]:
        run.best = dict(step=run.step, score=scores["score"])
        save(run, "best.pt", optimizer_state)


def note(run, say, line, **entry):
    """Show a line; what it says goes to log.jsonl as well (after a resume a step may stand there twice)."""
    if run.bar.disable:
        say(f"step {run.step}/{run.total} | {line}")
    elif "loss" in entry:
        run.bar.set_postfix_str(line)
    else:  # a validation: it stays on the screen, above the bar
        run.bar.write(f"step {run.step}/{run.total} | {line}")
    if ranks()[0] == 0:
        path, line = os.path.join(run.cfg["out_dir"], "log.jsonl"), json.dumps(dict(step=run.step, **entry))
        with writing(path), open(path, "a", encoding="utf-8") as f:
            f.write(line + "\n")
        if run.report:
            losses = {f"loss/{slot}": loss for slot, loss in entry.pop("loss", {}).items()}
            run.report(run.step, losses | {key: value for key, value in entry.items() if value is not None})


@contextlib.contextmanager
def reporting(cfg):
    """Where report_to wants the log, while it is open: a function of (step, {name: number}), or None."""
    where, folder = cfg["report_to"], cfg["out_dir"]
    if not where or ranks()[0]:
        yield None
    elif where == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        with SummaryWriter(folder) as writer:
            yield lambda step, numbers: [writer.add_scalar(key, numbers[key], step) for key in numbers]
    else:
        tracker = imported(where, f"report_to='{where}'")
        tracker.init(project="nanouml", name=os.path.basename(folder), config=cfg)
        try:
            yield lambda step, numbers: tracker.log(numbers, step=step)
        finally:
            tracker.finish()


def read_clock(device):
    """Seconds, once the device has done all that it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


@torch.no_grad()
def start_head_from(run, slot):
    """Each class's row of the label head becomes its mean feature in the slot, less the mean of all, scaled
    to length 1; biases stay."""
    whole_state(run)
    arrays = slot.split("train")
    features = extract(run.model, slot, arrays, slot.examples)  # (n, C)
    rows = slot.head_rows[arrays["labels"][slot.examples]]
    head = run.model.label_head.weight
    for row in np.unique(rows):
        mean = features[rows == row].mean(0) - features.mean(0)
        head[row] = mean / mean.norm().clamp_min(1e-6)
    if dist.is_initialized():  # an encoder's BatchNorm has gathered other statistics in every process
        dist.broadcast(head, 0)
    if run.cfg["fsdp"]:
        run.engine.label_head.weight.copy_(shard_like(run.engine.label_head.weight, head))


def train_config(cfg, say=tell):
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
        finished, saved = earlier_run(cfg, say)
        if finished:
            return finished if first else None
        run = set_up(cfg, say, saved)
        if cfg["report_to"]:
            imported(cfg["report_to"], f"report_to='{cfg['report_to']}'")  # refuse before anything is written
        begin_folder(cfg)
        order = " then ".join("+".join(names) for names in pattern(cfg, run.slots, cfg["warm_start_steps"]))
        warm = f"{cfg['warm_start_steps']} steps on the auxiliaries alone, then "
        say(f"{warm if cfg['warm_start_steps'] else ''}{cfg['steps']} of {order}")
        with signals_caught(), run.bar, reporting(cfg) as run.report:
            train(run, say)
        result = None
        if run.step < run.total:
            say(f"stopped at step {run.step} of {run.total}, saved: the same command with --resume goes on")
        elif first:
            # The best checkpoint by validation, and the target's test split for the first and only time.
            run.model.load_state_dict(load_checkpoint(os.path.join(cfg["out_dir"], "best.pt"))["model"])
            result = score_run(run)
            write_json(os.path.join(cfg["out_dir"], "result.json"), result)
            if SIGNALS:  # it came during the last step or after
                say(f"interrupted, but {cfg['out_dir']} is finished: the same command shows its result")
        if SIGNALS:
            sys.exit(128 + SIGNALS[0])
        return result


def set_up(cfg, say, saved=None):
    """A Run, ready for its next step. saved: the checkpoint to go on from, if there is one."""
    threads = cfg["threads"] or (saved["threads"] if saved else 0)
    if threads:  # going on: as many as before, since another number rounds differently
        torch.set_num_threads(threads)
    device, autocast, device_line = pick_device(cfg)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    slots, classes = open_slots(cfg, say, device)
    if saved:
        model = build_model(cfg, saved["slots"], classes, saved["trunk"])
    else:
        model = build_pretrained_model(cfg, model_slots(slots), classes)
    if (folder := cfg["init_from"]) and not saved:  # whatever slots that run had
        other, checkpoint = load_model(os.path.join(folder, "best.pt"))
        if any(checkpoint["config"][key] != cfg[key] for key in ("width", "layers", "heads")):
            raise UserError(f"init_from={folder} has a trunk of another width, depth or number of heads")
        with explained(f"init_from={folder} has a trunk of another kind"):
            for trunk in (model.trunk, *model.own_trunk.values()):
                trunk.load_state_dict(other.trunk.state_dict())
    model.to(device)
    misfit = f"{cfg['out_dir']} holds a checkpoint that does not fit its config"
    if saved:
        with explained(misfit, ": delete it"):
            model.load_state_dict(saved["model"])
    # compiling took 50 s on an H200 and then saved a seventh of every step
    pays = device.type == "cuda" and cfg["steps"] >= 10_000
    compiled = (pays if cfg["compile"] is None else cfg["compile"]) and not cfg["fsdp"]
    engine = torch.compile(model) if compiled else model
    if cfg["fsdp"]:
        engine = sharded_copy(model)
    elif dist.is_initialized():  # slots take turns, so in every update some parameters are unused
        engine = DistributedDataParallel(engine, find_unused_parameters=True, broadcast_buffers=False)
    optimizer = make_optimizer(engine, cfg)
    if saved:
        with explained(misfit, ": delete it"):
            optimizer.load_state_dict(saved["optimizer"])
        for parameter, moments in optimizer.state.items():
            if isinstance(parameter, DTensor):  # of the whole moments each process keeps its part
                for key in ("exp_avg", "exp_avg_sq"):
                    moments[key] = shard_like(parameter, moments[key])
    if device.type == "cuda":
        for slot in slots.values():
            slot.batch = read_ahead(slot.batch)
    every, shared = (sum(p.numel() for p in module.parameters()) for module in (model, model.trunk))
    say(f"{every:,} parameters, {shared:,} of them in the trunk; {device_line}, "
        f"{torch.get_num_threads()} threads, {'compiled' if compiled else 'eager'}")
    state = {key: saved[key] for key in STATE} if saved else dict(updates=dict.fromkeys(slots, 0))
    total = cfg["warm_start_steps"] + cfg["steps"]
    bar = tqdm(total=total, initial=state.get("step", 0), unit="step", delay=1,
               disable=None if say is tell else True)  # None: only on a terminal
    run = Run(cfg, device, autocast, slots, classes, model, engine, optimizer, bar, None, total, **state)
    # Refused before anything is written. At its last step a run with a best.pt may go on to its score.
    if run.step > run.total or (run.step == run.total and run.best is None):
        raise UserError(f"{cfg['out_dir']} is at step {run.step}, not before the {run.total} asked for: "
                        "raise --steps, or change --out_dir")
    return run


def pick_device(cfg):
    """(device, autocast context, a line that names device and precision)."""
    name = cfg["device"]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda', but torch finds no GPU here: use --device=cpu")
    # on CPUs without bf16 matrix units half precision is slower
    half = name == "cuda" and torch.cuda.is_bf16_supported()
    autocast = torch.autocast(name, torch.bfloat16, enabled=half)
    # by its number: the thread that reads ahead has a current GPU of its own
    device = torch.device(name, torch.cuda.current_device() if name == "cuda" else None)
    return device, autocast, f"{name}, {'bf16' if half else 'fp32'}"


# ------------------------------------------------------------------------------------------------------------
# evaluation: the target only


@contextlib.contextmanager
def evaluating(model):
    """Meanwhile the BatchNorm of an encoder uses the statistics that it has gathered."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def extract(model, slot, arrays, rows=None, every=False):
    """Frozen features of the given rows of a split (None: all), on the CPU: (n, C); every: of all layers,
    (layers + 1, n, C)."""
    with evaluating(model):
        parts = [model.features(slot.name, batch["tokens"], batch.get("real"), every).float().cpu()
                 for batch in slot.evaluation_batches(arrays, rows)]
    return torch.cat(parts, dim=-2)


def linear_probe(features, labels, classes, l2=1.0, standardise=True):
    """Multinomial logistic regression on frozen features, solved to convergence by L-BFGS.

    features (n, D) float, labels (n,) int in 0..classes-1. Minimises the summed cross-entropy + l2/2 *
    |weight|^2 on standardised features (scikit-learn's C is 1/l2); the bias is free. standardise=False: the
    caller has standardised them. Returns (weight (classes, D), bias (classes,)) for the features as given:
    scores = features @ weight.T + bias. Raises ValueError for fewer than two classes.
    """
    if len(labels) == 0 or classes < 2:
        raise ValueError("a linear probe needs examples of two classes at least, found "
                         f"{len(labels)} examples, {classes} classes")
    features, labels = features.float(), labels.long()
    mean, std = torch.zeros(features.shape[1]), torch.ones(features.shape[1])
    if standardise:
        mean, std = features.mean(0), features.std(0, unbiased=False).clamp_min(1e-6)
    standard = (features - mean) / std
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-5, tolerance_change=1e-9,
                               history_size=10, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(standard @ weight.T + bias, labels)
        loss = loss + 0.5 * l2 / len(labels) * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    weight = weight.detach() / std
    return weight, bias.detach() - weight @ mean


def fit_probe(known, val, classes, measure, standardise=True):
    """The linear probe on `known`, of four penalties, that is best on `val` by a measure: (weight, bias).

    known and val: (features (n, C), labels (n,)). standardise as in linear_probe().
    """
    probes = [linear_probe(*known, classes, l2, standardise) for l2 in (1.0, 10.0, 100.0, 1000.0)]
    scores = [count_right((val[0] @ weight.T + bias).argmax(1), val[1])[measure] for weight, bias in probes]
    return probes[np.argmax(scores)]


# keys of evaluate() that a result repeats as val_KEY and test_KEY, where there are such
REPORTED = ("accuracy", "balanced_accuracy", "unseen_accuracy", "unseen_among_unseen", "harmonic_mean",
            "seen_with_offset", "unseen_with_offset", "majority", "right", "items", "fewest")


def count_right(answers, truth):
    """answers (n,) and truth (n,) as class numbers -> accuracy, balanced accuracy, and their yardsticks.

    majority: the accuracy of whoever always answers the largest class.
    """
    right, counts = answers == truth, torch.bincount(truth)
    of_class = torch.bincount(truth, right.double()) / counts  # nan where a class has no items
    return dict(accuracy=right.float().mean().item(), balanced_accuracy=of_class.nanmean().item(),
                majority=counts.max().item() / len(truth), right=right.sum().item(), items=len(truth))


def worded(measure):
    """'balanced_accuracy' -> 'balanced accuracy'."""
    return measure.replace("_", " ")


@torch.no_grad()
def evaluate(model, slot, arrays, chosen=None):
    """How good the target is on a split -> dict(score, accuracy, ..., and the chosen probe, unseen_offset).

    With a label loss the label head answers, over the target's classes; without, a linear probe fitted on
    the run's own training examples. Penalty and offset are the best on this split, unless `chosen`, what
    evaluate() said of validation, is handed in. The score is what slot.measure() says; without labels
    minus the loss. score and accuracy leave out items of unseen_classes; of those see unseen_report().
    """
    labels, classes, measure = arrays.get("labels"), len(slot.meta["classes"]), slot.measure()
    if measure == "loss":
        loss = 0.0
        with evaluating(model):
            for batch in slot.evaluation_batches(arrays):
                share = len(batch["tokens"]) / len(arrays["tokens"])
                loss += share * model(slot.name, **batch).item()
        return dict(score=-loss, accuracy=None, balanced_accuracy=None, probe=None)
    features = extract(model, slot, arrays)
    truth, unseen = torch.from_numpy(labels).long(), torch.from_numpy(np.isin(labels, slot.unseen))
    if unseen.all():
        raise UserError(f"{slot.folder}: a split holds items of unseen classes only: lower unseen_classes")
    if "label" in slot.objectives:
        probe = [p[:classes].float().cpu() for p in (model.label_head.weight, model.label_head.bias)]
    elif chosen is None:
        train = slot.split("train")
        known = extract(model, slot, train, slot.examples)
        known_labels = torch.from_numpy(train["labels"][slot.examples])
        val = features[~unseen], truth[~unseen]
        probe = fit_probe((known, known_labels), val, classes, measure)
    else:
        probe = chosen["probe"]
    scores = features @ probe[0].T + probe[1]  # (n, classes)
    found = count_right(scores.argmax(1)[~unseen], truth[~unseen])
    fewest = np.delete(np.bincount(labels, minlength=classes), slot.unseen).min().item()  # 0: one is untested
    found.update(score=found[measure], fewest=fewest, probe=probe)
    if unseen.any() and (chosen is None or "unseen_offset" in chosen):  # validation may have had none
        found.update(unseen_report(scores, truth, slot.unseen, chosen["unseen_offset"] if chosen else None))
    return found


def unseen_report(scores, truth, banned, offset=None):
    """Accuracy where some classes had no labelled examples (generalised zero-shot, arXiv 1605.04253).

    scores (n, classes), truth (n,), banned: the unseen classes. A model prefers classes that it has seen, so
    `offset` is subtracted from their scores; None: choose here the one with the best harmonic mean, which
    reads labels of unseen classes too.
    """
    is_banned = torch.isin(torch.arange(scores.shape[1]), torch.tensor(banned))
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


def score_run(run):
    """The result dict of a finished run: what the model scores on validation and test, and what it took."""
    cfg, slots, model = run.cfg, run.slots, run.model
    target = slots[cfg["target"]]
    val, test = evaluate(model, target, target.split("val")), {}
    if cfg["score_test"]:
        test = evaluate(model, target, target.split("test"), val)
    classes = len(target.meta["classes"])
    result = dict(name=os.path.basename(cfg["out_dir"]), target=target.name,
                  split="test" if test else "val", measure=target.measure(),
                  unseen_classes=len(target.unseen),
                  losses={name: cfg[f"{name}_loss"] for name in slots}, seed=cfg["seed"],
                  steps=cfg["steps"], warm_start_steps=cfg["warm_start_steps"],
                  examples={name: len(slot.examples) for name, slot in slots.items()},
                  best_step=run.best["step"], chance=1 / classes if classes > 1 else None)
    for key in REPORTED:
        if key in val:
            result.update({f"val_{key}": val[key], f"test_{key}": test.get(key)})
    if "unseen_offset" in val:
        result["unseen_offset"] = val["unseen_offset"]
    if val["accuracy"] is None:
        result.update(val_loss=-val["score"], test_loss=-test["score"] if test else None)
    # Every update of a slot is counted as its first batch; of several processes each has an equal share.
    flops = ranks()[1] * sum(run.updates[name] * count_flops(model, name, slot.batch(0))
                             for name, slot in slots.items())
    memory = torch.cuda.max_memory_allocated() if run.device.type == "cuda" else peak_memory()
    return dict(result, flops=flops, seconds=round(run.seconds, 2), peak_memory=memory,
                samples_per_second=round(run.items / run.seconds, 1))


def too_few(name, items, fewest, measure):
    """[a warning] if a split is too small to judge by, else []. fewest: items of its smallest class."""
    if items >= 100 and fewest and (measure == "accuracy" or fewest >= 5):
        return []
    return [f"warning: {name} has {items} items, {fewest} of its smallest class: too few to tell good from "
            "better"]


def score_lines(result):
    """How good a run is, and against what, as sentences."""
    of_split = lambda key: result.get(f"{result['split']}_{key}")
    name = dict(test="test", val="validation")[result["split"]]
    if result["measure"] == "loss":
        lines = [f"{name}: loss {of_split('loss'):.4f} (the target has no classes, so there is no accuracy)"]
    else:
        right, items, fewest = of_split("right"), of_split("items"), of_split("fewest")
        from scipy import stats  # takes a second to load
        low, high = stats.binomtest(right, items).proportion_ci(method="wilson")
        lines = [f"{name}: accuracy {of_split('accuracy'):.3f}: {right:,} of {items:,} right (95% interval "
                 f"{low:.3f} to {high:.3f}), where guessing has {result['chance']:.2g}"]
        if result["measure"] == "balanced_accuracy":
            lines[0] += f" and always the largest class {of_split('majority'):.2g}"
            lines += ["the classes are uneven, so runs are compared by balanced accuracy, the mean over "
                      f"classes: {of_split('balanced_accuracy'):.3f}"]
        if "label" not in result["losses"][result["target"]].split("+"):
            lines += ["the answers are those of a linear probe, since the target has no label loss"]
        lines += too_few(name, items, fewest, result["measure"])
    if of_split("unseen_accuracy") is not None:
        count = result["unseen_classes"]
        among = f"{of_split('unseen_among_unseen'):.3f} are right among themselves"
        lines += [f"{count} classes had no labelled example: of their items {among} (guessing: "
                  f"{1 / count:.2g}), {of_split('unseen_accuracy'):.3f} among all classes"]
    return lines


def closing_lines(result, folder, argv):
    """What a person reads at the end of a run: how good it is, where it lies, and what next."""
    lines = score_lines(result)
    lines += [f"in {folder}: best.pt (step {result['best_step']}), last.pt, log.jsonl, result.json"]
    set_by_compare = ("seed", "control", "stages")
    dropped = {f"--{key}" for key in ("out_dir", "resume", *set_by_compare)}
    kept = [arg for arg in argv if arg.split("=")[0] not in dropped]
    of_file = read_config(kept, KEYS)  # where the config file sets one, it is set back
    kept += [f"--{key}={KEYS[key][0]}" for key in set_by_compare if of_file[key] != KEYS[key][0]]
    compare = shlex.join(["python", "probe.py", "compare", *kept])
    if len(result["losses"]) > 1:
        lines += [f"next: does the other data help? {compare}"]
    elif result["measure"] != "loss":
        lines += [f"next: python probe.py {folder}"]
    return lines


def count_flops(model, name, batch):
    """FLOPs of forward and backward on a batch, counted by torch, operation by operation."""
    # MATH: attention as its matmuls
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(name, **batch).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------------
# checkpoints, and the folder of a run

STATE = ("step", "updates", "best", "seconds", "items")  # the part of Run that a checkpoint keeps
# what an export keeps of a checkpoint, as JSON beside the weights
EXPORTED = ("format", "config", "slots", "trunk", "classes", "target_classes")


def save(run, name, optimizer_state):
    """Write a checkpoint whole or not at all, and only finite weights."""
    path, weights = os.path.join(run.cfg["out_dir"], name), run.model.state_dict()
    for key, value in weights.items():
        if not value.isfinite().all():
            raise UserError(f"{key} is no longer finite after step {run.step}: lower --learning_rate (now "
                            f"{run.cfg['learning_rate']}); {path} keeps the checkpoint before it")
    target = run.slots[run.cfg["target"]]
    data = io.BytesIO()
    torch.save(dict(format=CHECKPOINT_FORMAT, model=weights, slots=run.model.slots, config=run.cfg,
                    trunk=run.model.trunk_config, optimizer=optimizer_state, classes=run.classes,
                    target_classes=len(target.meta["classes"]), threads=torch.get_num_threads(),
                    **{key: getattr(run, key) for key in STATE}), data)
    write_file(path, data.getvalue())


def load_checkpoint(path):
    """What save() put into a file, or `probe.py export` into a folder -> a dict; an export has no optimizer
    and no state. Only tensors and plain values are unpickled."""
    exported = os.path.isdir(path)
    if not exported and not os.path.exists(path):
        raise UserError(f"there is no checkpoint {path}")
    if os.path.exists(of_run := os.path.join(path, "best.pt")):
        raise UserError(f"{path} is the folder of a run: did you mean {of_run}?")
    load_file = imported("safetensors.torch", f"reading {path}").load_file if exported else None
    cure = "" if exported else ": delete it"
    with explained(f"{path} is damaged or nothing that this project wrote", cure):
        if exported:
            saved = read_json(os.path.join(path, "config.json"))
            saved["model"] = load_file(os.path.join(path, "model.safetensors"))
        else:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"format {saved['format']!r} where this code writes {CHECKPOINT_FORMAT}")
        for key in EXPORTED if exported else (*EXPORTED, "model", "optimizer", "threads", *STATE):
            saved[key]  # KeyError if it is missing
    return saved


def load_model(path):
    """The model of a checkpoint file, or of a folder that `probe.py export` wrote, on the CPU, ready to embed
    -> (UML, load_checkpoint()'s dict)."""
    saved = load_checkpoint(path)
    with explained(f"{path}: weights and config do not fit"):
        model = build_model(saved["config"], saved["slots"], saved["classes"], saved["trunk"])
        model.load_state_dict(saved["model"])
    return model.eval(), saved


def earlier_run(cfg, say):
    """What out_dir holds of this run -> (its result if it is finished, the checkpoint to go on from).

    Either is None if it is not there. UserError for another run, and for this one if it may not go on.
    """
    folder = cfg["out_dir"]
    config, result, last = (os.path.join(folder, name) for name in ("config.json", "result.json", "last.pt"))
    if os.path.exists(config):
        with explained(f"{folder} holds a damaged config.json or result.json", f": delete {folder}"):
            before = dict(read_json(config))
            finished = dict(read_json(result)) if os.path.exists(result) else None
        differing = {key for key in before.keys() | cfg.keys() if before.get(key) != cfg.get(key)} - FREE_KEYS
        refused = differing - FREE_ON_RESUME if cfg["resume"] else differing
        if refused:
            raise UserError(f"{folder} holds a run of another config (different: {', '.join(sorted(refused))}"
                            "): choose another --out_dir or delete it")
        if differing:
            say(f"changed since the run began: {', '.join(sorted(differing))}")
        if finished and "steps" in differing:
            say(f"warning: its rate has fallen to 0 over {before['steps']} steps and rises again to go on: a "
                f"fresh run of {cfg['steps']} steps would end elsewhere")
        untested = finished and cfg["score_test"] and finished["split"] == "val"
        if finished and not untested and "steps" not in differing:
            say(f"{folder} is finished; its result again:")
            return finished, None
    if not os.path.exists(last):
        if cfg["resume"]:
            say(f"nothing to resume in {folder}: starting from scratch")
        return None, None
    if not cfg["resume"]:
        raise UserError(f"{folder} holds an unfinished run of this config: add --resume, or delete it")
    saved = load_checkpoint(last)
    say(f"resuming {folder} at step {saved['step']}")
    return None, saved


def shard_names(cfg):
    """{slot: the name of its shard folder}, which is a hash of all that decides the data."""
    for slot in active_slots(cfg):  # find a typo before the other slots are prepared
        path = cfg[slot].partition(":")[2]
        if path and not os.path.exists(path):
            raise UserError(f"{slot}={cfg[slot]}: there is no folder or file {path}")
    return {slot: os.path.basename(shard_folder(cfg, slot)[0]) for slot in active_slots(cfg)}


def begin_folder(cfg):
    """Make out_dir ready for a run that starts or goes on; all processes wait until it is."""
    folder = cfg["out_dir"]
    if ranks()[0] == 0:
        with writing(folder):
            os.makedirs(folder, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # a result of fewer steps, now resumed
            os.remove(os.path.join(folder, "result.json"))
        write_json(os.path.join(folder, "config.json"), cfg)
    if dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------------------------------------------------------
# Several processes, under torchrun: each takes an equal share of every batch, and DistributedDataParallel
# averages their gradients. So label losses equal those of one process, to rounding; token losses are the mean
# of the processes' means, which differ a little where the shares hold different numbers of real tokens.

SIGNALS = []  # those caught so far


def ranks():
    """(the number of this process, how many share the run); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gradients_shared(engine, now):
    """A context in which backward averages gradients over the processes, or only adds them up (not now)."""
    if now or not isinstance(engine, DistributedDataParallel):
        return contextlib.nullcontext()
    return engine.no_sync()


def sharded_copy(model):
    """A copy of the model whose weights are spread over the processes (FSDP2), block by block."""
    if not dist.is_initialized():
        raise UserError("fsdp=True shards weights over processes: start them with "
                        "`torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node=2 train.py ...`")
    copied = copy.deepcopy(model)
    encoders = [adapter.embed.net for adapter in copied.adapters.values() if hasattr(adapter.embed, "net")]
    for block in blocks_of(copied.trunk) + blocks_of(copied.own_trunk) + sum(map(blocks_of, encoders), []):
        fully_shard(block)
    return fully_shard(copied)


def blocks_of(network):
    """The modules in the outermost lists of a network, such as the blocks of a transformer."""
    blocks = []
    for child in network.children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)):
            blocks += [block for block in child if any(True for _ in block.parameters())]
        else:
            blocks += blocks_of(child)
    return blocks


def shard_like(parameter, whole):
    """This process's part of a whole tensor, as it has one of a parameter."""
    return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)


def whole_state(run):
    """The optimizer's state, whole, and with fsdp the engine's weights gathered into run.model; all processes
    must call this at the same time."""
    optimizer_state = run.optimizer.state_dict()
    if run.cfg["fsdp"]:
        gather = lambda value: value.full_tensor().cpu() if isinstance(value, DTensor) else value
        run.model.load_state_dict(tree_map(gather, run.engine.state_dict()))
        optimizer_state = tree_map(gather, optimizer_state)
    return optimizer_state


def mean_over_processes(value):
    """The mean of a scalar tensor over the processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value / ranks()[1]


@contextlib.contextmanager
def signals_caught():
    """Meanwhile the first SIGINT or SIGTERM is only noted, the second raises KeyboardInterrupt."""
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


def main():
    cfg = read_run_config(sys.argv[1:])
    if "RANK" in os.environ:  # torchrun says so; gloo on CPU, NCCL on GPU
        # Load this before there is a group: loaded later, it would keep the group's threads alive past
        # destroy_process_group(), and now and then abort the process as it ends.
        import torch.distributed.nn
        if torch.cuda.is_available() and cfg["device"] != "cpu":  # each process has a GPU of its own
            here = int(os.environ["LOCAL_RANK"])
            if here >= torch.cuda.device_count():
                raise UserError(f"torchrun started process {here + 1} where torch finds "
                                f"{torch.cuda.device_count()} GPUs: lower --nproc_per_node, or --device=cpu")
            torch.cuda.set_device(here)
        dist.init_process_group(timeout=datetime.timedelta(days=1))  # process 0 may prepare for hours
    try:
        result = train_config(cfg)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if result is not None:
        for line in closing_lines(result, cfg["out_dir"], sys.argv[1:]):
            tell(line)
        tell(json.dumps(result))


if __name__ == "__main__":
    exit_on_user_error(main)
