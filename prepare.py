"""prepare.py: turn the raw data of ONE modality into binary shards of tokens. Nothing here ever sees two modalities.

    python prepare.py sample_configs/shapes_text.py                  # a generated world: offline, seconds
    python prepare.py sample_configs/cifar_text.py                   # real pictures and sentences, fetched once
    python prepare.py sample_configs/cifar_text.py --image=folder:/my/images --text=file:/my/notes.txt

A slot (image, text, audio, text2, ...) names a source; a source becomes data/MODALITY-SOURCE-HASH8/ with
    meta.json                       what the shards hold, with a checksum of each; written last
    {train,val,test}_000.bin        tokens: (n, T, D) uint8 patches, or (n, T) uint16 BPE ids padded on the right
    {train,val,test}_labels_000.bin and _lengths, _latents where the source has them; bpe.tiktoken beside text
train.py calls prepare() for a source that is missing, so running this file by hand is optional.

Sections: errors, config, shards, pictures, text, audio, the shapes world, sources, prepare. That is how data become shards. What
comes after it keeps them whole: files, raw files.
"""
import ast
import base64
import contextlib
import difflib
import fcntl
import functools
import hashlib
import http.client
import inspect
import io
import json
import math
import os
import re
import resource
import shutil
import sys
import tarfile
import time
import urllib.request
import warnings
import wave
import zlib

import numpy as np
import rustbpe
import tiktoken
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

FORMAT = 2  # of the shards; part of every folder name, so raise it when you change how a source or its tokens are made

# ---------------------------------------------------------------------------------------------------------------------
# errors: everything a user can get wrong ends in one clear sentence and exit code 2


class UserError(Exception):
    """What was found, where, and what to do about it, in one sentence."""


def exit_on_user_error(main):
    """Run main(); print a UserError as its sentence and exit with code 2; exit with 130 after Ctrl-C."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
        stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 shows \\u4e2d, not a traceback
    try:
        main()
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as problem:  # OSError: a file that cannot be read; it names it
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on (train.py: with --resume, from the last checkpoint)", file=sys.stderr)
        sys.exit(130)


def tell(line):
    """print() for work that must outlive its reader: a closed pipe (`| head`) ends the printing, not the run."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# config: `key = literal` lines, read with ast and never executed; any key can be overridden as --key=value

# modality: (its objective unless the config says otherwise, what --help says of its sources). A new one is a line here.
MODALITIES = dict(
    image=("label", "shapes, frozen, cifar10, folder:PATH; any slot also takes npz:PATH, encoded data; image2 ... are further slots"),
    text=("next", "shapes, frozen, cupl, pydoc, digits, file:PATH"),
    audio=("label", "shapes, fsdd, folder:PATH"),
)

# key: (default, one line of help). train.py adds its own keys to these.
PREPARE_KEYS = dict(
    **{modality: ("", f"source of the {modality} slot (empty: off): {sources}") for modality, (_, sources) in MODALITIES.items()},
    raw_dir=("data/raw", "where raw files lie, one folder a source"),
    data_dir=("data", "where shards are written"),
    image_size=(32, "pictures are resized and centre-cropped to this many pixels a side"),
    patch_size=(8, "side of the square patches that are an image's tokens"),
    text_length=(32, "longest text item in tokens; longer documents are cut into windows"),
    vocab_size=(4096, "upper bound on the BPE vocabulary, trained on the source's own training text"),
    audio_rate=(8000, "recordings are resampled to this many samples a second"),
    audio_mels=(40, "mel bands of a log-mel frame; there is a frame every 10 ms"),
    audio_frames=(64, "recordings are cut or padded to this many frames"),
    audio_group=(4, "frames in a token"),
    audio_groups=("", "regular expression whose first group, in a file's name, names its speaker; then splits are by speaker"),
    audio_test_group=("", "the speaker of the test split: a name, #N for the N-th by name, or each: #SEED"),
    audio_val_group=("", "the speaker of the validation split, likewise"),
    gaussian_count=(10000, "items of gaussian:x and gaussian:y, the linear world of the theory (val and test besides)"),
    gaussian_observed=(50, "its observed dimensions"),
    gaussian_shared=(10, "its latents that x and y share"),
    gaussian_private=(5, "its latents that only one of them has"),
    gaussian_noise=(0.09, "standard deviation of its noise"),
    gaussian_clear=(1, "shared latents that x shows in full; the others are attenuated"),
    gaussian_weak=(0.05, "the factor of that attenuation"),
    val_fraction=(0.1, "share of the items that becomes the validation split (and, where a source has none, the test split)"),
    split_seed=(0, "seed of the draw of the validation split (and of the test split where a source has none)"),
    verify=(False, "compare every shard with its checksum before use (sizes are always checked)"),
    skip_bad=(False, "skip (and count) unreadable files instead of stopping at the first"),
    shard_mb=(256, "largest shard file in MiB"),
)
SLOT_NAME = re.compile(rf"({'|'.join(MODALITIES)})\d?")
SLOT_SUFFIXES = ("", "_loss", "_weight", "_updates", "_batch", "_examples")  # what every slot, numbered or not, has


def modality_of(slot):
    """'text2' -> 'text'."""
    return slot.rstrip("0123456789")


def active_slots(cfg):
    """The slots of cfg that hold a source, in the order of MODALITIES, then numbered ones."""
    names = [key for key in cfg if SLOT_NAME.fullmatch(key) and cfg[key]]
    return sorted(names, key=lambda name: (name[-1].isdigit(), list(MODALITIES).index(modality_of(name)), name))


def read_assignments(path):
    """The `key = literal` lines of a config file -> [(key, value, where)]; parsed, never executed."""
    try:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read(), path)
    except OSError as problem:
        raise UserError(f"cannot read config file {path} ({problem.strerror}): sample_configs/ has some to start from") from None
    except (SyntaxError, ValueError) as problem:
        raise UserError(f"{path}: not a config file of `key = literal` lines ({problem})") from None
    lines = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path} line {node.lineno}"
        try:
            (target,) = node.targets
            lines.append((target.id, ast.literal_eval(node.value), where))
        except (AttributeError, TypeError, ValueError):
            raise UserError(f"{where}: only `key = literal` lines are allowed, config files are not executed") from None
    return lines


def checked(key, value, default, where):
    """value as the type of default; an int is welcome where a float is wanted, nothing else is converted."""
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is None and value in (None, True, False):  # a switch whose third position is "decide by yourself"
        return value
    if type(value) is not type(default):
        names = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}
        wanted = names.get(type(default), "True, False or None")
        raise UserError(f"{where}: {key} must be {wanted}, found {value!r}")
    return value


def read_config(argv, keys, strict=True):
    """Read `[CONFIG.py] --key=value ...` into a flat dict that holds every key.

    keys: {key: (default, help)}. A numbered slot (text2, text2_loss, ...) takes the defaults of its modality.
    strict=False leaves unknown keys of the FILE to another script, unless they look like a typo of a known one.
    Raises UserError for an unknown key, a wrong type, a missing file, or a line that is not `key = literal`.
    """
    files = [arg for arg in argv if not arg.startswith("--")]
    if len(files) > 1:
        raise UserError(f"expected one config file, found {len(files)}: {' '.join(files)} (keys are written --key=value, without a blank)")
    lines = [(*line, strict) for path in files for line in read_assignments(path)]
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            lines.append((key, text if equals else "True", "command line", True))  # --resume means --resume=True

    cfg = {key: default for key, (default, _) in keys.items()}
    for key, *_ in lines:  # text2_loss brings text2 with all its keys
        slot = key.split("_")[0]
        if slot not in cfg and SLOT_NAME.fullmatch(slot):
            cfg.update({slot + end: cfg[modality_of(slot) + end] for end in SLOT_SUFFIXES if modality_of(slot) + end in cfg})
    defaults = dict(cfg)
    for key, value, where, must_be_known in lines:
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.6 if must_be_known else 0.85)
            if near or must_be_known:
                advice = f", did you mean '{near[0]}'?" if near else "; --help lists all"
                raise UserError(f"{where}: unknown key '{key}'{advice}")
            continue
        if where == "command line" and not isinstance(defaults[key], str):
            try:
                value = ast.literal_eval(value)
            except (SyntaxError, ValueError):
                pass  # stays text, which checked() refuses
        cfg[key] = checked(key, value, defaults[key], where)
    return cfg


def print_help(doc, keys, title="Every key, for a config file or as --key=value:"):
    """What --help prints: the file's own docstring, then every key with its default and one line."""
    print(doc)
    print(title)
    for key, (default, text) in keys.items():
        print(f"  {key + ' = ' + repr(default):34} {text}")


# ---------------------------------------------------------------------------------------------------------------------
# shards: flat arrays on disk, described and checksummed by meta.json


def write_shards(folder, meta, splits, shard_mb):
    """Write {split: {array name: array}} as shards of at most shard_mb MiB and meta.json; returns the finished meta."""
    meta = dict(format=FORMAT, **meta, arrays={}, splits={})
    for split, arrays in splits.items():
        files = {}
        rows = max(1, shard_mb * 2**20 // max(1, arrays["tokens"][:1].nbytes))
        for name, array in arrays.items():
            array = np.ascontiguousarray(array)
            meta["arrays"][name] = dict(dtype=array.dtype.name, shape=list(array.shape[1:]))
            files[name] = []
            for i, start in enumerate(range(0, len(array), rows)):
                part = array[start:start + rows]
                file = f"{split}_{i:03d}.bin" if name == "tokens" else f"{split}_{name}_{i:03d}.bin"
                write_file(os.path.join(folder, file), memoryview(part).cast("B"))
                files[name].append(dict(file=file, count=len(part), sha256=hashlib.sha256(part).hexdigest()))
        meta["splits"][split] = dict(count=len(arrays["tokens"]), files=files)
        if "labels" in arrays:
            meta["splits"][split]["class_counts"] = np.bincount(arrays["labels"], minlength=len(meta["classes"])).tolist()
    write_json(os.path.join(folder, "meta.json"), meta)
    return meta


def read_meta(folder):
    """meta.json of a shard folder, whose every value is checked: it may come from a stranger. UserError says what is wrong."""
    path = os.path.join(folder, "meta.json")
    try:
        meta = read_json(path)
        if meta["format"] != FORMAT:
            raise UserError(f"{path} is of format {meta['format']!r}, this code reads {FORMAT}: delete {folder}, it is made again")
        check_meta(meta)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: delete {folder} to prepare it again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise UserError(f"{path} is damaged ({type(problem).__name__}: {problem}): delete {folder} to prepare it again") from None
    return meta


def check_meta(meta):
    """ValueError, KeyError, TypeError or AttributeError unless meta describes shards that this code could have written."""
    def must(good, what):
        if not good:
            raise ValueError(what)
    count = lambda n, most=2**40: type(n) is int and 0 < n <= most
    for name, array in meta["arrays"].items():
        must(array["dtype"] in ("uint8", "uint16", "int32", "int64", "float32"), f"{name} is of dtype {array['dtype']!r}")
        must(len(array["shape"]) <= 2 and all(count(n, 2**24) for n in array["shape"]), f"{name} has rows of shape {array['shape']}")
        must(name not in ("labels", "lengths") or (array["dtype"], array["shape"]) == ("int32", []), f"{name} are {array}")
    shape, classes = meta["arrays"]["tokens"]["shape"], meta["classes"]
    must(type(classes) is list and all(type(c) is str for c in classes), "classes are not names")
    must(meta["kind"] in ("discrete", "continuous") and len(shape) == (1 if meta["kind"] == "discrete" else 2), "no such kind of tokens")
    if meta["kind"] == "discrete":
        must(count(meta["vocab"], 65536) and re.fullmatch("[0-9a-f]{64}", meta["bpe_sha256"]), f"vocab is {meta['vocab']!r}")
    else:
        length, width = shape
        for key in ("mean", "std"):
            must(type(meta[key]) is list and meta[key] and width % len(meta[key]) == 0, f"{key} does not fit tokens of {width}")
            must(all(type(v) in (int, float) and abs(v) < 1e30 for v in meta[key]), f"{key} is not finite")
        must(min(meta["std"]) > 0, "std is not above 0")
        patch, mels = meta.get("patch", 1), meta.get("mels", 1)
        must(count(patch) and width % patch**2 == 0 and ("patch" not in meta or round(length**0.5) ** 2 == length), f"patch is {patch!r}")
        must(count(mels) and width % mels == 0, f"mels is {mels!r}")
    for part in ("train", "val", "test"):
        split = meta["splits"][part]
        must(count(split["count"]) and "tokens" in split["files"], f"{part} has no items")
        for name, files in split["files"].items():
            named = all(re.fullmatch(rf"{part}(_[a-z]+)?_\d+\.bin", e["file"]) and count(e["count"]) for e in files)
            must(named, f"files of {part} {name}")
            must(sum(e["count"] for e in files) == split["count"] and name in meta["arrays"], f"count of {part} {name}")
            must(all(re.fullmatch("[0-9a-f]{64}", e["sha256"]) for e in files), f"checksums of {part} {name}")
        must(("labels" in split["files"]) == bool(classes), f"labels of {part}")
        must("labels" not in split["files"] or len(split["class_counts"]) == len(classes), f"class_counts of {part}")
        must("lengths" in split["files"] or (meta["kind"] != "discrete" and "mels" not in meta), f"lengths of {part}")


def verify_shards(folder, meta):
    """Compare every file with its checksum; the size, which Shards checks at every start, does not show a flipped bit."""
    sums = [(entry["file"], entry["sha256"]) for split in meta["splits"].values() for files in split["files"].values() for entry in files]
    if meta["kind"] == "discrete":
        sums.append(("bpe.tiktoken", meta["bpe_sha256"]))
    for file, sha256 in sums:
        with open(os.path.join(folder, file), "rb") as f:
            check_sha256(f, sha256, f"{folder}/{file}: delete {folder} to prepare it again")


class Shards:
    """The rows of one array over all its shard files, e.g. tokens (n, T, D); the files stay on disk (np.memmap)."""

    def __init__(self, folder, files, dtype, shape):
        self.dtype, self.row_shape = np.dtype(dtype), tuple(shape)
        row_bytes = self.dtype.itemsize * int(np.prod(self.row_shape, dtype=np.int64))
        self.maps = []
        for entry in files:
            path = os.path.join(folder, entry["file"])
            found, wanted = os.path.getsize(path) if os.path.exists(path) else 0, entry["count"] * row_bytes
            if found != wanted:
                raise UserError(f"{path} has {found} bytes where meta.json says {wanted}: delete {folder} to prepare it again")
            self.maps.append(np.memmap(path, self.dtype, "r", shape=(entry["count"], *self.row_shape)))
        self.starts = np.cumsum([0] + [len(m) for m in self.maps])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, rows):
        """rows: (k,) integer array -> (k, *shape) array in memory; one read per shard touched."""
        if len(self.maps) == 1:
            return self.maps[0][rows]
        out, which = np.empty((len(rows), *self.row_shape), self.dtype), np.searchsorted(self.starts, rows, side="right") - 1
        for i in np.unique(which):
            out[which == i] = self.maps[i][rows[which == i] - self.starts[i]]
        return out


def load_split(folder, split):
    """One split of a shard folder: {"tokens": Shards, and where there are any "labels", "lengths", "latents": arrays}."""
    meta = read_meta(folder)
    arrays = {name: Shards(folder, files, **meta["arrays"][name]) for name, files in meta["splits"][split]["files"].items()}
    arrays = {name: a if name == "tokens" else a[np.arange(len(a))] for name, a in arrays.items()}
    for name, low, high in (("labels", 0, len(meta["classes"]) - 1), ("lengths", 1, arrays["tokens"].row_shape[0])):
        if name in arrays and not low <= arrays[name].min() <= arrays[name].max() <= high:
            raise UserError(f"{folder}: {split} {name} run from {arrays[name].min()} to {arrays[name].max()}, expected {low} to {high}: "
                            "delete it to prepare it again")
    return arrays


# ---------------------------------------------------------------------------------------------------------------------
# pictures: uint8 (n, S, S, 3) <-> tokens (n, T, patch*patch*3), patches in reading order


def patchify(pictures, patch):
    """(n, S, S, 3) -> (n, T, patch*patch*3) with T = (S/patch)**2."""
    n, size, _, channels = pictures.shape
    grid = size // patch
    cut = pictures.reshape(n, grid, patch, grid, patch, channels).swapaxes(2, 3)
    return cut.reshape(n, grid * grid, patch * patch * channels)


def unpatchify(tokens, patch):
    """The inverse of patchify: (n, T, patch*patch*3) -> (n, S, S, 3)."""
    n, length, width = tokens.shape
    grid = int(round(length**0.5))
    cut = tokens.reshape(n, grid, grid, patch, patch, width // patch**2).swapaxes(2, 3)
    return cut.reshape(n, grid * patch, grid * patch, width // patch**2)


def read_picture(path, size):
    """Any image file -> (size, size, 3) uint8: upright, transparency on white, resized and centre-cropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.draft("RGB", (size, size))  # lets the JPEG decoder skip resolution nobody will see
                picture = ImageOps.exif_transpose(picture)
                if picture.mode.startswith("I") or picture.mode == "F":  # 16-bit greys: 65535 becomes 255
                    picture = Image.fromarray((np.asarray(picture).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
                if "A" in picture.getbands() or "transparency" in picture.info:
                    picture = picture.convert("RGBA")
                    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
                return np.asarray(ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.BICUBIC))
    except Exception as problem:  # Pillow's decoders raise nearly every kind; all mean the same to the user
        raise UserError(f"{path} is not a readable image ({problem})") from None


def read_files(cfg, paths, read, what):
    """read(path) of every path -> (list of items, kept (n,) bool); UserError at the first bad one unless skip_bad.

    A plain loop: for small files the interpreter is the bottleneck, and threads only make it slower.
    """
    items, kept = [], np.ones(len(paths), bool)
    for i, path in enumerate(tqdm(paths, desc=f"reading {what}s", disable=None, leave=False)):
        try:
            items.append(read(path))
        except (UserError, OSError) as problem:
            if not cfg["skip_bad"]:
                raise UserError(f"{problem}: remove it, or pass --skip_bad=True") from None
            kept[i] = False
    if not kept.all():
        tell(f"skipped {(~kept).sum()} of {len(paths)} files: not readable {what}s")
    if not items:
        raise UserError(f"none of the {len(paths)} files is a readable {what}")
    return items, kept


def read_pictures(cfg, paths):
    """Image files -> (pictures (k, S, S, 3), kept (n,) bool)."""
    pictures, kept = read_files(cfg, paths, lambda path: read_picture(path, cfg["image_size"]), "image")
    return np.stack(pictures), kept


def encode_pictures(cfg, splits):
    """{split: pictures} -> ({split: {"tokens"}}, what the model must know of the tokens)."""
    size, patch = cfg["image_size"], cfg["patch_size"]
    if size <= 0 or patch <= 0 or size % patch:
        raise UserError(f"image_size={size} is not a multiple of patch_size={patch}")
    for split, pictures in splits.items():
        if pictures.shape[1] != size:
            raise UserError(f"this source has pictures of {pictures.shape[1]} pixels a side, found image_size={size}")
    # mean and spread of each colour from its histogram: exact, and without a float copy of every pixel
    share = np.stack([np.bincount(splits["train"][..., c].ravel(), minlength=256) for c in range(3)]) / splits["train"][..., 0].size
    mean = share @ np.arange(256)
    std = np.sqrt(share @ np.arange(256) ** 2 - mean**2) + 1e-3
    info = dict(kind="continuous", patch=patch, mean=mean.tolist(), std=std.tolist())
    return {split: {"tokens": patchify(pictures, patch)} for split, pictures in splits.items()}, info


# ---------------------------------------------------------------------------------------------------------------------
# text: byte-pair encoding trained by rustbpe, run by tiktoken

# Words with their leading space, digits in threes, punctuation, white space. No look-ahead, which halves the time.
WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


def train_bpe(documents, vocab_size, path):
    """Train at most vocab_size tokens on documents; save them as lines of `base64 rank`, the .tiktoken format."""
    if vocab_size < 256 or vocab_size > 65536:
        raise UserError(f"vocab_size={vocab_size}: must lie between 256 (the bytes) and 65536 (what uint16 holds)")
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(documents), vocab_size=vocab_size, pattern=WORDS)
    write_file(path, b"".join(base64.b64encode(bytes(token)) + f" {rank}\n".encode() for token, rank in tokenizer.get_mergeable_ranks()))


def load_bpe(folder):
    """The tiktoken.Encoding of a text folder. Parsed here: tiktoken's loader caches by path and would return a stale table."""
    path = os.path.join(folder, "bpe.tiktoken")
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in read_text(path).splitlines())}
    except ValueError:
        ranks = {}
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise UserError(f"{path} is damaged: delete {folder} to prepare it again")
    return tiktoken.Encoding(name=path, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})


def encode_text(cfg, splits, folder):
    """{split: documents} -> ({split: {"tokens" (n, T) uint16, "lengths" (n,), "document" (n,)}}, info).

    A document longer than text_length becomes several windows, all in its split. encode_ordinary has no special tokens,
    so '<|endoftext|>' in a document is just these characters.
    """
    length = cfg["text_length"]
    if length < 2:
        raise UserError(f"text_length={length}: must be at least 2")
    path = os.path.join(folder, "bpe.tiktoken")
    train_bpe(splits["train"], cfg["vocab_size"], path)
    bpe = load_bpe(folder)
    arrays = {}
    for split, documents in splits.items():
        coded = [bpe.encode_ordinary(document) for document in documents]  # a plain loop beats encode_ordinary_batch
        windows = [(i, ids[start:start + length]) for i, ids in enumerate(coded) for start in range(0, len(ids), length)]
        tokens = np.zeros((len(windows), length), np.uint16)
        for row, (_, ids) in zip(tokens, windows):
            row[:len(ids)] = ids
        arrays[split] = {"tokens": tokens, "lengths": np.array([len(ids) for _, ids in windows], np.int32),
                         "document": np.array([i for i, _ in windows], np.int64)}
    with open(path, "rb") as f:
        return arrays, dict(kind="discrete", vocab=bpe.n_vocab, bpe_sha256=hashlib.sha256(f.read()).hexdigest())


# ---------------------------------------------------------------------------------------------------------------------
# audio: recordings -> log-mel frames -> tokens (n, T, group*mels) uint8, with the true length in tokens

LOG_MEL_RANGE = (-14.0, 8.0)  # natural log of power, stored in 255 steps of 0.09: a probe reads the same off float16


def read_recording(cfg, file, name):
    """A PCM WAV file (8, 16, 24 or 32 bit, any channels and rate) -> (k,) float32 in [-1, 1] at audio_rate.

    The standard library reads PCM; anything else goes to torchaudio where its decoder is installed. No more is read than
    audio_frames need. Raises UserError for what is empty, cut short or no recording.
    """
    seconds = cfg["audio_frames"] / 100 + 0.1
    try:
        with wave.open(file, "rb") as f:
            rate, channels, width = f.getframerate(), f.getnchannels(), f.getsampwidth()
            if rate <= 0 or channels <= 0:
                raise wave.Error(f"{rate} samples a second, {channels} channels")
            if f.getnframes() > 600 * rate:
                raise UserError(f"{name} lasts {f.getnframes() / rate:,.0f} s, more than 600: cut it into clips")
            wanted = min(f.getnframes(), int(seconds * rate))
            data = f.readframes(wanted)
        if len(data) < wanted * channels * width:
            raise wave.Error(f"cut short: {len(data)} bytes of {wanted * channels * width}")
        whole = np.frombuffer(data, np.uint8).reshape(-1, width)
        if width == 1:  # 8 bit is unsigned
            samples = (whole[:, 0].astype(np.float32) - 128) / 128
        else:  # little-endian signed: put the bytes at the top of an int32
            padded = np.zeros((len(whole), 4), np.uint8)
            padded[:, 4 - width:] = whole
            samples = padded.view("<i4")[:, 0].astype(np.float32) / 2**31
        samples = samples.reshape(-1, channels).mean(1)
    except (wave.Error, EOFError, ValueError, OverflowError, RuntimeError, ZeroDivisionError) as problem:
        if name.lower().endswith(".wav") and "unknown format" not in str(problem):  # format 3, floats, is for torchaudio
            raise UserError(f"{name} is not a readable PCM WAV file ({problem or 'empty'})") from None
        samples, rate = decode_other(file, name)
    if not np.isfinite(samples).all():
        raise UserError(f"{name} holds values that are not numbers")
    if not samples.any():
        raise UserError(f"{name} holds no sound, only silence, in its first {seconds:.2f} s: trim it, or raise --audio_frames")
    if rate != cfg["audio_rate"]:
        if rate * cfg["audio_rate"] // math.gcd(rate, cfg["audio_rate"]) ** 2 > 10**7:  # the size of the resampling filter
            raise UserError(f"{name} has {rate} samples a second, which cannot be resampled to {cfg['audio_rate']}: convert it")
        import torch
        from torchaudio.functional import resample
        samples = resample(torch.from_numpy(samples.astype(np.float32)), rate, cfg["audio_rate"]).numpy()
    return samples[:int(seconds * cfg["audio_rate"])].astype(np.float32)


def decode_other(file, name):
    """Anything that is not PCM WAV, by torchaudio where its decoder is installed -> ((k,) samples, rate); else UserError."""
    try:
        import torchaudio
        file.seek(0)
        samples, rate = torchaudio.load(file)
    except Exception as problem:  # no decoder installed, or nothing it knows
        raise UserError(f"{name} is not PCM WAV and torchaudio cannot decode it here ({type(problem).__name__}): "
                        f"convert it with `ffmpeg -i {name} -ac 1 -c:a pcm_s16le out.wav`") from None
    return samples.mean(0).numpy(), rate


def read_recordings(cfg, paths):
    """Sound files -> (list of (k,) float32, kept (n,) bool)."""
    def read(path):
        with open(path, "rb") as f:
            return read_recording(cfg, f, path)
    return read_files(cfg, paths, read, "recording")


def encode_recordings(cfg, splits):
    """{split: list of (k,) float32} -> ({split: {"tokens" (n, T, group*mels) uint8, "lengths" (n,) in tokens}}, info)."""
    import torch
    from torchaudio.transforms import MelSpectrogram
    rate, mels, frames, group = (cfg[f"audio_{key}"] for key in ("rate", "mels", "frames", "group"))
    hop, (low, high) = rate // 100, LOG_MEL_RANGE
    to_mel = MelSpectrogram(rate, n_fft=512 if rate <= 16000 else 2048, win_length=hop * 5 // 2, hop_length=hop, n_mels=mels)
    arrays = {}
    if long := [len(r) for recordings in splits.values() for r in recordings if len(r) > frames * hop]:
        tell(f"{len(long) / sum(map(len, splits.values())):.0%} of the recordings last longer than {frames / 100:.2f} s and are cut there: "
             "--audio_frames=N keeps N hundredths of a second")
    for split, recordings in splits.items():
        tokens, lengths = np.zeros((len(recordings), frames, mels), np.uint8), np.zeros(len(recordings), np.int32)
        for start in range(0, len(recordings), 256):  # in batches, padded with silence
            part = [r[:frames * hop] for r in recordings[start:start + 256]]
            padded = np.zeros((len(part), frames * hop), np.float32)
            for row, r in zip(padded, part):
                row[:len(r)] = r
            log_mel = to_mel(torch.from_numpy(padded)).clamp_min(1e-6).log()[:, :, :frames].transpose(1, 2)  # (n, frames, mels)
            real = np.array([min(frames, -(-len(r) // hop)) for r in part])
            quantised = ((log_mel.numpy() - low) / (high - low) * 255).round().clip(0, 255).astype(np.uint8)
            quantised[np.arange(frames) >= real[:, None]] = 0
            tokens[start:start + 256], lengths[start:start + 256] = quantised, -(-real // group)
        arrays[split] = {"tokens": tokens.reshape(len(tokens), frames // group, group * mels), "lengths": lengths}
    real = np.arange(frames // group) < arrays["train"]["lengths"][:, None]
    flat = arrays["train"]["tokens"][real].reshape(-1, mels)
    return arrays, dict(kind="continuous", mels=mels, mean=flat.mean(0).tolist(), std=(flat.std(0) + 1e-3).tolist())


def encode_features(splits):
    """{split: (n, D) or (n, T, D) floats} -> one or T continuous tokens an item, stored as float32."""
    arrays = {split: {"tokens": (f[:, None] if f.ndim == 2 else f).astype(np.float32)} for split, f in splits.items()}
    flat = arrays["train"]["tokens"].reshape(-1, arrays["train"]["tokens"].shape[-1])
    return arrays, dict(kind="continuous", mean=flat.mean(0).tolist(), std=(flat.std(0) + 1e-6).tolist())


# ---------------------------------------------------------------------------------------------------------------------
# the shapes world: latent scenes, shown as noisy pictures or told in English, never the same scene in both
#
# A class is a composition (8 shapes x 8 colours = 64); size, place, angle, ground and clutter vary freely. Pictures show
# what a scene looks like; sentences name its parts. That is the method's assumption (one reality, several projections)
# made visible, and it was designed to show the effect.

SHAPES = dict(circle="disc ball", square="box block", triangle="wedge pyramid", star="asterisk starlet",
              cross="plus crucifix", ring="hoop loop", crescent="moon sickle", bar="stick rod")
COLOURS = dict(red="scarlet crimson", orange="amber tangerine", yellow="golden lemon", green="emerald lime",
               cyan="turquoise aqua", blue="navy azure", purple="violet plum", white="pale chalky")
RGB = np.array([(214, 40, 40), (240, 135, 30), (235, 210, 50), (50, 165, 60),
                (50, 200, 205), (45, 75, 215), (145, 55, 185), (232, 232, 232)], np.float32)
SIZES, GROUNDS = ("small", "medium", "large"), ("dark", "grey", "stormy")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
SHAPE_CLASSES = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
LATENTS = ("shape", "colour", "size", "row", "column", "ground", "angle", "clutter")


def draw_scenes(modality, part, count):
    """count scenes from the stream of this modality alone -> (latents (count, 8) as in LATENTS, labels (count,), that stream).

    Each modality and part has its own random stream, so no picture ever shares its scene with a sentence; classes are
    as even as count allows.
    """
    rng = np.random.default_rng([zlib.crc32(f"shapes {modality} {part}".encode())])
    labels = rng.permutation(np.arange(count) % len(SHAPE_CLASSES))
    scenes = [labels // len(COLOURS), labels % len(COLOURS)] + [rng.integers(0, 3, count) for _ in range(4)]
    return np.stack(scenes + [rng.uniform(-1, 1, count), rng.integers(0, 3, count)], 1).astype(np.float32), labels, rng


CIRCLE = np.stack([np.cos(2 * np.pi * np.arange(60) / 60), np.sin(2 * np.pi * np.arange(60) / 60)], 1)
OUTLINES = (  # in the order of SHAPES: corners in [-1, 1]
    CIRCLE, 0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), np.array([(0, -1), (0.95, 0.75), (-0.95, 0.75)]),
    CIRCLE[::6] * np.where(np.arange(10) % 2, 0.42, 1.05)[:, None],
    np.array([(-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
              (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33)]),
    CIRCLE,  # the ring's hole is drawn later
    np.concatenate([CIRCLE[15:46], CIRCLE[15:46][::-1] * (0.35, 1)]),  # the left arc, and back along a shallower one
    np.array([(-1, -0.32), (1, -0.32), (1, 0.32), (-1, 0.32)]))


def shape_outline(shape, angle):
    """Corners of a shape (number in SHAPES), turned by angle * 20 degrees; (k, 2)."""
    sin, cos = np.sin(angle * np.pi / 9), np.cos(angle * np.pi / 9)
    return OUTLINES[shape] @ np.array([(cos, sin), (-sin, cos)])


def paint_scenes(scenes, rng):
    """Scenes (n, 8) -> noisy pictures (n, 32, 32, 3) uint8, drawn four times larger and averaged down."""
    pictures, side = np.empty((len(scenes), 32, 32, 3), np.uint8), 128
    for picture, (shape, colour, big, row, column, ground, angle, clutter) in zip(pictures, scenes):
        base = np.array([(45, 45, 50), (120, 120, 120), (70, 80, 105)][int(ground)]) + rng.normal(0, 12, 3)
        canvas = Image.new("RGB", (side, side), tuple(int(v) for v in base.clip(0, 255)))
        pen = ImageDraw.Draw(canvas)
        for _ in range(int(clutter)):  # grey strokes that mean nothing
            grey, ends = int(rng.integers(60, 190)), rng.integers(0, side, 4)
            pen.line([int(v) for v in ends], fill=(grey, grey, grey), width=int(rng.integers(2, 9)))
        radius = side * (0.18, 0.23, 0.29)[int(big)] * rng.uniform(0.9, 1.1)
        centre = side * (np.array([0.34, 0.5, 0.66])[[int(column), int(row)]] + rng.normal(0, 0.03, 2))
        fill = tuple(int(v) for v in (RGB[int(colour)] * rng.uniform(0.75, 1.05) + rng.normal(0, 14, 3)).clip(0, 255))
        pen.polygon([tuple(p) for p in centre + radius * shape_outline(int(shape), angle)], fill=fill)
        if shape == 5:
            hole = [tuple(p) for p in centre + 0.55 * radius * shape_outline(0, 0)]
            pen.polygon(hole, fill=canvas.getpixel((1, 1)))
        clean = np.asarray(canvas.resize((32, 32), Image.Resampling.BOX), np.float32)
        picture[:] = (clean + rng.normal(0, 12, clean.shape)).clip(0, 255).astype(np.uint8)
    return pictures


def tell_scenes(scenes, rng):
    """Scenes (n, 8) -> documents: several phrasings and lengths, synonyms, some of more than one sentence."""
    shapes, colours = [[n, *s.split()] for n, s in SHAPES.items()], [[n, *s.split()] for n, s in COLOURS.items()]
    documents = []
    for shape, colour, big, row, column, ground, _, clutter in scenes.astype(int):
        pick = lambda words: words[int(rng.choice(len(words), p=(0.6, 0.2, 0.2)))]
        s, c, size = pick(shapes[shape]), pick(colours[colour]), SIZES[big]
        place = f"{ROWS[row]} {COLUMNS[column]}"
        first = [f"a {c} {s}", f"a {size} {c} {s}", f"the {s} is {c}", f"there is a {c} {s} at the {place}",
                 f"a {size} {s}, {c} in colour, on a {GROUNDS[ground]} ground", f"at the {place} we see something {c}: a {s}",
                 f"this {s} is {size} and {c}", f"look, a {s}! it is {c}"][int(rng.integers(8))]
        more = [f"it lies at the {place}.", f"it is {size}.", f"the ground is {GROUNDS[ground]}.",
                f"there are {clutter} grey lines." if clutter != 1 else "there is one grey line."]
        rng.shuffle(more)
        documents.append(". ".join([first] + [" ".join(more[:int(rng.integers(1, 4))])]) if rng.random() < 0.4 else first)
    return [re.sub(r"\ba (?=[aeiou])", "an ", document) for document in documents]


def sound_scenes(scenes, rng, rate=8000, seconds=0.64):
    """Scenes (n, 8) -> short noisy sounds (n, rate*seconds): shape is the timbre, colour the pitch, size the loudness, column
    the moment of the tone, row the rhythm (one, two or three strokes), ground the colour of the noise, clutter its clicks."""
    clock = np.arange(int(rate * seconds)) / rate
    sounds = np.empty((len(scenes), len(clock)), np.float32)
    for sound, (shape, colour, big, row, column, ground, angle, clutter) in zip(sounds, scenes):
        pitch = 170 * 2 ** ((colour + 0.25 * angle + rng.normal(0, 0.08)) / 4)  # a quarter octave apart
        h = np.arange(1, 9)  # harmonics
        weights = (h == 1, h % 2 / h**2, h % 2 / h, 1 / h, h <= 3, (h == 1) | (h == 6), h % 2 == 0, np.exp(-((h - 4) ** 2) / 2))[int(shape)]
        weights = weights * (h * pitch < 0.47 * rate)
        waves = np.sin(2 * np.pi * pitch * np.outer(h, clock) + rng.uniform(0, 6.28, (8, 1)))
        tone = weights / np.linalg.norm(weights) @ waves
        start, strokes = (0.04, 0.14, 0.24)[int(column)] + rng.normal(0, 0.01), int(row) + 1
        since = clock - start
        beat = 0.33 / strokes
        envelope = np.where((since > 0) & (since < 0.33), np.exp(-3 * (since % beat) / beat), 0)
        noise = rng.normal(0, 1, len(clock))
        if ground != 1:  # dark: the noise is smoothed; stormy: it is sharpened
            noise = (noise + (1 if ground == 0 else -1) * np.roll(noise, 1)) / 2**0.5
        sound[:] = (0.15, 0.25, 0.4)[int(big)] * envelope * tone + 0.06 * noise
        sound[rng.integers(0, len(clock), int(clutter))] += 0.7
    return sounds.clip(-1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# sources: functions of (cfg, modality, path) -> dict(train=(items, labels or None), test=the same, or None to have it drawn,
# classes=[names]), and perhaps train_latents and test_latents; groups (n,) to split by, with default_groups=(test, val);
# encode="features" for items that are encoded already. Items are pictures (n, S, S, 3) uint8, a list of documents, a list of
# sounds (k,) float32, or numbers (n, D) or (n, T, D). A new source is a function here and a line in SOURCES.


SHAPES_COUNTS = dict(image=8000, text=20000, audio=8000, test=2560)


def shapes_source(cfg, modality, _):
    """The generated world: 8,000 pictures or sounds or 20,000 documents to train on, 2,560 of each to test."""
    if modality == "audio" and cfg["audio_rate"] != 8000:
        raise UserError(f"the sounds of shapes have 8000 samples a second, found audio_rate={cfg['audio_rate']}")
    out = dict(classes=SHAPE_CLASSES)
    for part, count in dict(train=SHAPES_COUNTS[modality], test=SHAPES_COUNTS["test"]).items():
        scenes, labels, rng = draw_scenes(modality, part, count)
        items = dict(image=paint_scenes, text=tell_scenes, audio=sound_scenes)[modality](scenes, rng)
        out[part], out[f"{part}_latents"] = (items, labels), scenes
    return out


def frozen_source(cfg, modality, _):
    """The shapes world as a frozen encoder that nobody trained would give it: random filters of pictures, random vectors of words; (n, 384)."""
    world = shapes_source(cfg, modality, None)
    filters = np.random.default_rng([zlib.crc32(b"frozen image")]).normal(0, 1, (108, 384)).astype(np.float32)
    vector = functools.lru_cache(None)(lambda word: np.random.default_rng([zlib.crc32(word.encode())]).normal(0, 1, 384))

    def encode_some(pictures):
        """Filters of 6 x 6 pixels at every second place, rectified; their mean over the picture for one half, the maximum for the other."""
        places = np.lib.stride_tricks.sliding_window_view(pictures / np.float32(255) - 0.5, (6, 6), axis=(1, 2))[:, ::2, ::2]
        answers = np.maximum(places.reshape(len(pictures), -1, 108) @ filters, 0)  # (k, places, 384)
        return np.concatenate([answers.mean(1)[:, :192], answers.max(1)[:, 192:]], 1)

    for part in ("train", "test"):
        items, labels = world[part]
        if modality == "image":
            features = np.concatenate([encode_some(items[i:i + 250]) for i in range(0, len(items), 250)])
        else:
            features = np.stack([np.mean([vector(word) for word in re.findall(r"\w+", document)], 0) for document in items])
        world[part] = features, labels
    return dict(world, encode="features")


CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_ROWS = 10000  # pictures in each of the six files


def cifar10_source(cfg, modality, _):
    """CIFAR-10 from the official binary archive: 50,000 + 10,000 pictures; named members are read, nothing is extracted."""
    path = raw_file(cfg, "cifar10", "cifar-10-binary.tar.gz", CIFAR10_URL, CIFAR10_SHA256, 170_052_171)
    row, wanted = 1 + 3072, [f"cifar-10-batches-bin/{n}" for n in
                             [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin", "batches.meta.txt"]]
    found = read_archive(path, lambda name: name in wanted, largest=max(row * CIFAR10_ROWS, 4096))
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"{path} lacks {missing[0]}: remove it to fetch it again")

    def part(names):
        records = np.frombuffer(b"".join(found[name] for name in names), np.uint8).reshape(-1, row)
        if len(records) != CIFAR10_ROWS * len(names):
            raise UserError(f"{path} holds {len(records)} pictures in {len(names)} files, expected {CIFAR10_ROWS} in each")
        return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0].astype(np.int64)

    return dict(train=part(wanted[:5]), test=part(wanted[5:6]), classes=found[wanted[6]].decode().split())


CUPL_URL = "https://raw.githubusercontent.com/sarahpratt/CuPL/719619c829792ff8f37298266e941b7f077c7f5c/all_prompts/full_prompts/"
CUPL_SHA256 = dict(
    airplane="d86833c2483c1d12907abeb6198412f1d0a020bd12999a3f170967a7f549e3b8",
    bird="830d654a8ad729b7aa211dcf7d6a4dc33b6e0ff68bcb848115faf7c3d12d93b5",
    cal="f0995df6482ae36ec969d7bbdc01fd37ec8724430d6d2369e0043eee1f542834",
    cars="10c77fcbd845283b59148e9bf714ec521971a34f0c9e691d46f65c8371d9e52d",
    cifar100="cbecac9d1d8a39341a27160d5760f360380e613bdf1317ca4662b495a021c2f2",
    cifar10="c624136b3e25b016df3f8634e15472d415f85fc425e34471433c5c80a6e1a233",
    flower="439e88a1ac5f7058da59d0bcdc4fa848283e4e8f29fc8711ebac4274137a2bbf",
    food="67cb17f323b7f0726e4b152224365fda289658ff92b0d14ee264910a16af96dc",
    kinetics="746f1f2c1f067baf0b8c163d74490f26982e9aba008da2c75d76c05910e4f2d0",
    pets="b53cbe7f37e807c13a3f02e511c6058e6a50bafea3f8c4363cb85bf32920c6c6",
    res45="c63269cd327f6c2c9015bdee1bcec1ad2a1a1da22bf596754b246a2f90c8351b",
    sun="e6b1a95febe8e9420799fcf3be6647a73dc1aa9a6a9ac100d264c3ff78faf011",
    texture="dabdcafded7babd67046d0f90abeb510b648bdaaf397b884f265f3460a7942a9",
    ucf="8f2b130ee0c7573c3f0d4a6353c9bdda64ea63b771155207befa579f2a35c985",
)


def cupl_source(cfg, modality, _):
    """CuPL (Pratt et al. 2022): 97,840 sentences that GPT-3 wrote to describe the classes of 14 image datasets."""
    folder, files = os.path.join(cfg["raw_dir"], "cupl"), {f"{name}_prompts_full.json": sha256 for name, sha256 in CUPL_SHA256.items()}
    if missing := [file for file in files if not os.path.exists(os.path.join(folder, file))]:
        tell(f"CuPL is {len(files)} files in {folder}; to fetch: {', '.join(missing)}")
    described = {}
    for file, sha256 in files.items():
        with open(raw_file(cfg, "cupl", file, CUPL_URL + file, sha256), encoding="utf-8") as f:
            for label, sentences in json.load(f).items():
                described.setdefault(plain_name(label), (label, []))[1].extend(sentences)
    if (count := sum(len(sentences) for _, sentences in described.values())) != 97840:
        raise UserError(f"CuPL came out as {count} sentences, expected 97840")
    return described_documents(dict(described.values()))


def described_documents(described):
    """{class: [document, ...]} -> a source's dict."""
    classes = list(described)
    labels = np.repeat(np.arange(len(classes)), [len(described[name]) for name in classes])
    return dict(train=([document for name in classes for document in described[name]], labels), test=None, classes=classes)


def plain_name(name):
    """The form in which class names compare: 'Light_Video ' and 'light-video' are one class."""
    return re.sub(r"[\s_-]", "", name.lower())


def pydoc_source(cfg, modality, _):
    """The Python language reference that ships inside CPython: real prose, always there, unlabelled."""
    from pydoc_data.topics import topics
    paragraphs = [" ".join(p.split()) for _, text in sorted(topics.items()) for p in text.split("\n\n")]
    return dict(train=([p for p in paragraphs if len(p) > 40], None), test=None, classes=[])


def file_source(cfg, modality, path):
    """Text from a file: .txt with one document a line (unlabelled), or .json {class: [document, ...]}."""
    text = read_text(path)
    if not path.endswith(".json"):
        documents = [line.strip() for line in text.splitlines() if line.strip()]
        if len(documents) < 10:
            raise UserError(f"{path} holds {len(documents)} documents (one a line), at least 10 are needed")
        return dict(train=(documents, None), test=None, classes=[])
    try:
        described = json.loads(text)
    except ValueError as problem:
        raise UserError(f"{path} is not JSON ({problem})") from None
    if not (isinstance(described, dict) and described and all(isinstance(v, list) and v and all(isinstance(s, str) and s.strip()
            for s in v) for v in described.values())):
        raise UserError(f"{path} is not of the form {{class: [document, ...]}} with at least one document a class")
    return described_documents(described)


def folder_source(cfg, modality, path):
    """Pictures or recordings from folders: PATH/{train,test}/CLASS/*, or PATH/CLASS/*, or a flat PATH/* without labels.

    audio_groups, a regular expression on file names, makes the splits by group (speaker) instead of by draw.
    """
    read = read_pictures if modality == "image" else read_recordings

    def listing(folder, wanted):
        names = sorted(entry.name for entry in os.scandir(folder) if wanted(entry) and not entry.name.startswith("."))
        return [os.path.join(folder, name) for name in names]

    def part(folder, classes):
        files = [listing(os.path.join(folder, name), os.DirEntry.is_file) for name in classes]
        for name, inside in zip(classes, files):
            if not inside:
                raise UserError(f"class folder {os.path.join(folder, name)} holds no files: fill or remove it")
        flat = [file for inside in files for file in inside]
        items, kept = read(cfg, flat)
        labels = np.repeat(np.arange(len(classes)), [len(inside) for inside in files])[kept]
        return (items, labels), [file for file, k in zip(flat, kept) if k]

    if not os.path.isdir(path):
        raise UserError(f"there is no folder {path}")
    folders = [os.path.basename(f) for f in listing(path, os.DirEntry.is_dir)]
    if not folders:
        files = listing(path, os.DirEntry.is_file)
        if not files:
            raise UserError(f"folder {path} is empty: expected files for the {modality} slot in PATH/CLASS/* or PATH/*")
        return dict(train=(read(cfg, files)[0], None), test=None, classes=[])
    if ("train" in folders) != ("test" in folders):
        there, missing = ("train", "test") if "train" in folders else ("test", "train")
        raise UserError(f"{path} has {there}/ but no {missing}/: add it, or name {os.path.join(path, there)} to have it split")
    if "train" not in folders:
        train, files = part(path, folders)
        groups = speakers(cfg["audio_groups"], files) if modality == "audio" and cfg["audio_groups"] else None
        return dict(train=train, test=None, classes=folders, groups=groups)
    train, test = os.path.join(path, "train"), os.path.join(path, "test")
    classes = [os.path.basename(f) for f in listing(train, os.DirEntry.is_dir)]
    test_classes = [os.path.basename(f) for f in listing(test, os.DirEntry.is_dir)]
    if classes != test_classes or not classes:
        odd = sorted(set(classes) ^ set(test_classes)) or ["no class folder at all"]
        raise UserError(f"{path}: train/ and test/ must hold the same class folders, they differ in {', '.join(odd[:5])}")
    return dict(train=part(train, classes)[0], test=part(test, classes)[0], classes=classes)


def speakers(pattern, files):
    """The first group of a regular expression in each file's name; UserError where it does not match."""
    found = []
    for name in map(os.path.basename, files):
        try:
            found.append(re.search(pattern, name)[1] + "")  # TypeError: no match, or a group that took no part in it
        except (re.error, IndexError, TypeError) as problem:
            raise UserError(f"audio_groups='{pattern}' must find a group in every file name, but not in {name} ({problem})") from None
    return np.array(found)


FSDD_URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz"
FSDD_SHA256 = "45a9b976ba3397a2fd5c70a9f2e43c34f442a3a6be47392ecfc41174b678f37e"  # of all names and recordings, sorted
FSDD_COUNT = 3000
DIGITS = "zero one two three four five six seven eight nine".split()


def fsdd_source(cfg, modality, _):
    """Free Spoken Digit Dataset: 3,000 recordings of ten digits by six speakers; tested on theo, validated on lucas unless set."""
    folder, archive = (os.path.join(cfg["raw_dir"], "fsdd", name) for name in ("recordings", "v1.0.10.tar.gz"))
    files = {}
    if os.path.isdir(folder):
        for name in sorted(os.listdir(folder)):
            if name.endswith(".wav"):
                with open(os.path.join(folder, name), "rb") as f:
                    files[name] = f.read()
    else:
        found = read_archive(raw_file(cfg, "fsdd", "v1.0.10.tar.gz", FSDD_URL, None), lambda name: re.search(r"/recordings/[^/]*\.wav$", name))
        files = {os.path.basename(name): data for name, data in found.items()}
    names, digest = sorted(files), hashlib.sha256()
    for name in names:
        digest.update(name.encode() + files[name])
    if len(names) != FSDD_COUNT or digest.hexdigest() != FSDD_SHA256:
        where = folder if os.path.isdir(folder) else archive
        raise UserError(f"{where} holds {len(names)} recordings of digest {digest.hexdigest()[:12]}, expected {FSDD_COUNT} of "
                        f"{FSDD_SHA256[:12]}: remove it, and put the recordings/ folder of {FSDD_URL} at {folder}")
    items = [read_recording(cfg, io.BytesIO(files[name]), name) for name in names]
    labels = np.array([int(name[0]) for name in names])
    return dict(train=(items, labels), test=None, classes=DIGITS, groups=speakers(cfg["audio_groups"] or r"_([a-z]+)_", names),
                default_groups=("theo", "lucas"))


SPOKEN = "z ih r ow, w ah n, t uw, th r iy, f ao r, f ay v, s ih k s, s eh v ah n, ey t, n ay n".split(", ")  # as ARPAbet spells it


def digits_source(cfg, modality, _):
    """4,000 draws of 80 sentences about the digits zero to nine: names, numerals, neighbours, sounds. For an auxiliary: its splits overlap."""
    rng, described = np.random.default_rng([zlib.crc32(b"digits text")]), {}
    for i, (name, sound) in enumerate(zip(DIGITS, SPOKEN)):
        before, after, sounds = DIGITS[i - 1], DIGITS[(i + 1) % 10], sound.split()
        phrasings = [f"the word {name}", f"{name} comes after {before} and before {after}", f"it sounds {sound}", f"{name} {after}",
                     f"{name} begins with the sound {sounds[0]} and ends with {sounds[-1]}", f"count {before} {name} {after}",
                     f"{i} is read {name}", f"say {sound} for {name}"]
        described[name] = [phrasings[k] for k in rng.integers(0, len(phrasings), 400)]
    return described_documents(described)


def npz_source(cfg, modality, path):
    """Anything already encoded: an .npz with `features` (n, D) or (n, T, D), and if known `labels` (n,) whole numbers, `classes`
    (their names) and `split` (n,) of train, val, test. Made with numpy.savez; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as f:
            found = {key: f[key] for key in f.files}
    except Exception as problem:  # zipfile and numpy raise nearly every kind; all mean the same to the user
        raise UserError(f"{path} is not a readable .npz file ({problem})") from None
    features, labels, split = found.get("features"), found.get("labels"), found.get("split")
    if features is None or features.ndim not in (2, 3) or features.dtype.kind not in "fiu" or not features.size:
        shape = "none" if features is None else f"{features.dtype} {features.shape}"
        raise UserError(f"{path} needs an array `features` of numbers, (n, D) or (n, T, D), found {shape}")
    usable = np.abs(features.astype(np.float64)) < 1e30  # what float32 holds with room to spare
    if not usable.all():
        raise UserError(f"{path}: `features` has NaN, infinite or huge values, first in row {np.argwhere(~usable)[0][0]}")
    classes = []
    if labels is not None:
        if labels.shape != features.shape[:1] or labels.dtype.kind not in "iu":
            raise UserError(f"{path}: `labels` must be {len(features)} whole numbers, found {labels.dtype} {labels.shape}")
        names = found.get("classes", np.arange(min(max(0, int(labels.max())), 10**5) + 1)).ravel()
        if labels.min() < 0 or labels.max() >= len(names):
            raise UserError(f"{path}: `labels` run from {labels.min()} to {labels.max()}, expected 0 to {len(names) - 1}")
        classes = [str(name) for name in names]
    if split is None:
        return dict(train=(features, labels), test=None, classes=classes, encode="features")
    names = np.array([str(s) for s in np.atleast_1d(split)])
    if split.shape != features.shape[:1] or not {"train", "test"} <= set(names) <= {"train", "val", "test"}:
        raise UserError(f"{path}: `split` must hold train, test and perhaps val, one for each of the {len(features)} rows")
    return dict(train=(features, labels), test=None, classes=classes, encode="features", groups=names,
                default_groups=("test", "val" if "val" in names else None))


def gaussian_mixing(cfg, side):
    """(A_c, A_private) of one side of the linear world: (observed, shared), (observed, private). x attenuates most of theta_c."""
    rng = np.random.default_rng([zlib.crc32(f"gaussian mixing {side}".encode())])
    shared, private = (rng.normal(0, 1, (cfg["gaussian_observed"], cfg[f"gaussian_{k}"])) for k in ("shared", "private"))
    if side == "x":
        shared = shared * np.where(np.arange(cfg["gaussian_shared"]) < cfg["gaussian_clear"], 1, cfg["gaussian_weak"])
    return shared, private


def gaussian_source(cfg, modality, side):
    """The linear world of the theory: x = A_c theta_c + A_x theta_x + noise, or y likewise, of its own independent latents."""
    if side not in ("x", "y"):
        raise UserError(f"gaussian:{side} is not there: there are gaussian:x and gaussian:y")
    if min(cfg[f"gaussian_{k}"] for k in ("count", "observed", "shared", "private")) < 1 or not cfg["gaussian_noise"] > 0:
        raise UserError(f"gaussian_noise={cfg['gaussian_noise']} must be above 0, and every dimension and count at least 1")
    shared, private = gaussian_mixing(cfg, side)
    out = dict(classes=[], encode="features")
    for part, count in dict(train=round(cfg["gaussian_count"] / (1 - cfg["val_fraction"])), test=5000).items():
        rng = np.random.default_rng([zlib.crc32(f"gaussian {side} {part}".encode())])
        theta_c, theta_own = rng.normal(0, 1, (count, shared.shape[1])), rng.normal(0, 1, (count, private.shape[1]))
        noise = rng.normal(0, cfg["gaussian_noise"], (count, len(shared)))
        out[part], out[f"{part}_latents"] = (theta_c @ shared.T + theta_own @ private.T + noise, None), theta_c.astype(np.float32)
    return out


with open(__file__, encoding="utf-8") as own_file:  # as it is now: whoever edits it must not disturb a process that runs
    OWN_LINES = own_file.readlines()
SOURCES = {  # source: (function, modalities it can fill)
    "shapes": (shapes_source, ("image", "text", "audio")), "cifar10": (cifar10_source, ("image",)),
    "cupl": (cupl_source, ("text",)), "pydoc": (pydoc_source, ("text",)), "fsdd": (fsdd_source, ("audio",)),
    "digits": (digits_source, ("text",)), "frozen": (frozen_source, ("image", "text")),
    "folder": (folder_source, ("image", "audio")), "file": (file_source, ("text",)),
    "npz": (npz_source, tuple(MODALITIES)),
    "gaussian": (gaussian_source, tuple(MODALITIES)),
}
WITH_PATH = ("folder", "file", "npz", "gaussian")
MADE_BY = dict(image=("image_size", "patch_size"), text=("text_length", "vocab_size"),
               audio=tuple(key for key in PREPARE_KEYS if key.startswith("audio_")))  # keys that decide a modality's bytes

# ---------------------------------------------------------------------------------------------------------------------
# prepare: one slot's source -> its shard folder


def draw_split(labels, free, fraction, seed):
    """(n,) bool: about `fraction` of the items that are free (n,), the same share of every class (at least one where it has three)."""
    rng, drawn = np.random.default_rng([seed]), np.zeros(len(free), bool)
    for rows in [free] if labels is None else [free & (labels == c) for c in np.unique(labels[free])]:
        rows, take = np.flatnonzero(rows), int(round(fraction * rows.sum()))
        drawn[rng.permutation(rows)[:max(take, 1) if len(rows) >= 3 else 0]] = True
    return drawn


def draw_groups(cfg, slot, raw):
    """(in_test, in_val) by group: the groups named in the config, else the source's default, else the first two by name."""
    groups, there = raw["groups"], sorted(set(raw["groups"].tolist()))
    if len(there) < 2 or "default_groups" not in raw and len(there) < 3:
        raise UserError(f"{slot}={cfg[slot]}: a split by speaker needs three of them at least, found {', '.join(there)}")
    test, val = raw.get("default_groups", there[:2])
    if modality_of(slot) == "audio" and raw.get("encode") != "features":
        number = lambda name: there[int(name[1:]) % len(there)] if re.fullmatch(r"#\d+", name) else name
        test, val = number(cfg["audio_test_group"]) or test, number(cfg["audio_val_group"]) or val
    for key, group in (("audio_test_group", test), ("audio_val_group", val)):
        if group is not None and group not in there:
            raise UserError(f"{key}='{group}' is not there: {slot}={cfg[slot]} has {', '.join(there)}")
    if test == val:
        raise UserError(f"audio_test_group and audio_val_group are both '{test}': name two of {', '.join(there)}")
    in_test = groups == test
    if val is not None:
        return in_test, groups == val
    return in_test, draw_split(raw["train"][1], ~in_test, cfg["val_fraction"], cfg["split_seed"])


def shard_folder(cfg, slot):
    """(folder, description) of a slot's shards; its name is a hash of all that decides the bytes."""
    modality, source = modality_of(slot), cfg[slot]
    name, _, path = source.partition(":")
    if name not in SOURCES or modality not in SOURCES[name][1] or bool(path) != (name in WITH_PATH):
        fitting = [s + (":x or :y" if s == "gaussian" else ":PATH" if s in WITH_PATH else "") for s in SOURCES if modality in SOURCES[s][1]]
        near = difflib.get_close_matches(name, fitting, n=1)
        if os.path.exists(source):
            near = [f"{'file' if modality == 'text' else 'folder'}:{source}"]
        raise UserError(f"{slot}='{source}' is no source of {modality}" + (f", did you mean '{near[0]}'?" if near else "")
                        + f" (there are {', '.join(fitting)})")
    keys = [key for key in PREPARE_KEYS if key.startswith("gaussian_")] if name == "gaussian" else MADE_BY.get(modality, ())
    made_from = dict(format=FORMAT, modality=modality, source=source, skip_bad=cfg["skip_bad"], shard_mb=cfg["shard_mb"],
                     **{key: cfg[key] for key in (*keys, "val_fraction", "split_seed")})
    if path and name != "gaussian":  # the user's own files: names, sizes and times, so that a changed folder is prepared anew
        files = sorted(os.path.join(d, f) for d, _, inside in os.walk(path) for f in inside) if os.path.isdir(path) else [path]
        listing = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files if os.path.exists(f)]
        made_from["files"] = hashlib.sha256(repr(listing).encode()).hexdigest()
    # an edited source makes other shards; this sees its own lines only, so after an edit of what it calls raise FORMAT
    code = inspect.getblock(OWN_LINES[SOURCES[name][0].__code__.co_firstlineno - 1:])
    made_from["code"] = hashlib.sha256("".join(code).encode()).hexdigest()[:8]
    made_from["version"] = dict(cifar10=CIFAR10_SHA256, cupl=CUPL_URL, fsdd=FSDD_URL, pydoc=sys.version.split()[0]).get(name, "")
    hash8 = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:8]
    label = re.sub(r"\W+", "-", name + ("-" + os.path.basename(path.rstrip("/")) if path else "")).strip("-")
    return os.path.join(cfg["data_dir"], f"{modality}-{label}-{hash8}"), made_from


def prepare(cfg, slot, say=tell):
    """Make the shards of one slot unless they exist; returns their folder. Raises UserError, leaving nothing half-written."""
    folder, made_from = shard_folder(cfg, slot)
    if not os.path.exists(os.path.join(folder, "meta.json")):
        lock = os.path.join(cfg["data_dir"], f".{os.path.basename(folder)}.lock")
        with locked(lock, f"another process is preparing {slot}={cfg[slot]}", wait=True):
            if not os.path.exists(os.path.join(folder, "meta.json")):
                make_shards(cfg, slot, folder, made_from, say)
    elif cfg["verify"]:
        verify_shards(folder, read_meta(folder))
    return folder


def make_shards(cfg, slot, folder, made_from, say):
    """Run a source, split and encode what it gives, and write the shards to folder."""
    if not 0 < cfg["val_fraction"] < 1 or cfg["split_seed"] < 0 or cfg["shard_mb"] < 1:
        raise UserError(f"val_fraction={cfg['val_fraction']} must lie between 0 and 1, split_seed={cfg['split_seed']} be at least 0, "
                        f"shard_mb={cfg['shard_mb']} at least 1")
    if modality_of(slot) == "audio":
        rate, mels, frames, group = (cfg[f"audio_{key}"] for key in ("rate", "mels", "frames", "group"))
        if not 1000 <= rate <= 48000 or min(mels, group, frames) < 1 or frames % group:
            raise UserError(f"audio_frames={frames} must be a multiple of audio_group={group}, audio_rate={rate} lie between 1000 and 48000, "
                            f"audio_mels={mels} be at least 1")
    say(f"preparing {slot}={cfg[slot]} in {folder}")
    start = time.perf_counter()
    name, _, path = cfg[slot].partition(":")
    raw = SOURCES[name][0](cfg, modality_of(slot), path)
    items, labels = raw["train"]
    latents = raw.get("train_latents")
    splits, count = {}, len(items)
    take = lambda rows: (items[rows] if isinstance(items, np.ndarray) else [items[i] for i in np.flatnonzero(rows)],
                         None if labels is None else labels[rows], None if latents is None else latents[rows])
    if raw.get("groups") is not None:  # by speaker, or as the data says
        in_test, in_val = draw_groups(cfg, slot, raw)
        splits["test"] = take(in_test)
    else:
        if modality_of(slot) == "audio" and any(cfg[f"audio_{key}"] for key in ("groups", "test_group", "val_group")):
            raise UserError(f"{slot}={cfg[slot]} cannot be split by speaker: that needs PATH/CLASS/* folders and --audio_groups; to have it "
                            "split at random, leave audio_groups, audio_test_group and audio_val_group empty")
        in_test = np.zeros(count, bool)
        if raw["test"] is None:
            in_test = draw_split(labels, ~in_test, cfg["val_fraction"], cfg["split_seed"] + 1)
            splits["test"] = take(in_test)
        else:
            splits["test"] = (*raw["test"], raw.get("test_latents"))
        in_val = draw_split(labels, ~in_test, cfg["val_fraction"], cfg["split_seed"])
    splits["val"], splits["train"] = take(in_val), take(~in_test & ~in_val)
    for split, (part, *_) in splits.items():
        if not len(part):
            raise UserError(f"{slot}={cfg[slot]}: too few items ({count}) to leave any for the {split} split: about {2 / cfg['val_fraction']:.0f} "
                            "are needed, three of every class at least")
    small = [f"{split} has {len(splits[split][0])}" for split in ("val", "test") if labels is not None and len(splits[split][0]) < 50]
    if small and cfg.get("target", slot) == slot:
        say(f"warning: {slot}={cfg[slot]}: {', '.join(small)} items, too few to tell runs apart; raise --val_fraction or add files")

    making = f"{folder}.tmp"
    shutil.rmtree(making, ignore_errors=True)  # what a killed process left; the lock says that nobody is at work there
    os.mkdir(making)
    try:
        parts = {split: splits[split][0] for split in ("train", "val", "test")}
        encode = dict(text=lambda: encode_text(cfg, parts, making), image=lambda: encode_pictures(cfg, parts),
                      audio=lambda: encode_recordings(cfg, parts), features=lambda: encode_features(parts))
        arrays, info = encode[raw.get("encode", modality_of(slot))]()
        for split, (_, split_labels, split_latents) in splits.items():
            rows = arrays[split].pop("document", slice(None))  # the document of each window
            if split_labels is not None:
                arrays[split]["labels"] = split_labels[rows].astype(np.int32)
            if split_latents is not None:
                arrays[split]["latents"] = split_latents[rows]
        meta = write_shards(making, dict(modality=modality_of(slot), classes=raw["classes"], made_from=made_from, **info),
                            arrays, cfg["shard_mb"])
        verify_shards(making, meta)
        shutil.rmtree(folder, ignore_errors=True)  # what is left of a damaged folder
        os.replace(making, folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    say(f"{describe(folder, meta)}; {time.perf_counter() - start:.1f} s, peak memory {peak_memory() / 2**20:,.0f} MiB")


def describe(folder, meta):
    """The one line of counts a reader should see after prepare."""
    counts = ", ".join(f"{meta['splits'][split]['count']:,} {split}" for split in ("train", "val", "test"))
    tokens = " x ".join(str(n) for n in meta["arrays"]["tokens"]["shape"])
    words = f", {meta['vocab']:,} BPE tokens" if meta["kind"] == "discrete" else ""
    return f"{folder}: {counts} items of {tokens} {meta['arrays']['tokens']['dtype']}, {len(meta['classes'])} classes{words}"


# ---------------------------------------------------------------------------------------------------------------------
# files: written under a temporary name and moved into place, so that whoever looks finds a whole one or none


@contextlib.contextmanager
def writing(path, size):
    """A full or read-only disk met within becomes one sentence: the path, the bytes that were to be written, those free."""
    try:
        yield
    except OSError as problem:
        folder = os.path.dirname(os.path.abspath(path))
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        raise UserError(f"cannot write {path} ({problem.strerror or problem}): {size:,} bytes needed, "
                        f"{shutil.disk_usage(folder).free:,} free there") from None


def write_file(path, data, keep=None):
    """Put bytes into a file; the old one stays until the new one is whole and on the disk (then as `keep`, where given)."""
    with writing(path, len(data)):
        try:
            with open(path + ".tmp", "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            if keep and os.path.exists(path):
                os.replace(path, keep)
            os.replace(path + ".tmp", path)
        except OSError:
            with contextlib.suppress(OSError):
                os.remove(path + ".tmp")
            raise


def write_json(path, value):
    """Write a value as JSON, whole or not at all."""
    write_file(path, json.dumps(value, indent=1).encode())


def read_json(path):
    """The JSON of a file; ValueError where it is none, or larger than anything we write."""
    with open(path, "rb") as f:
        data = f.read(2**26 + 1)
    if len(data) > 2**26:
        raise ValueError(f"more than {2**26} bytes")
    return json.loads(data)


@contextlib.contextmanager
def locked(path, busy, wait=False):
    """Hold the lock file `path`; where another process holds it, say `busy` and wait, or refuse. A kill releases it (flock)."""
    while True:
        with writing(path, 0):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            lock = open(path, "ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(busy) from None
            tell(f"{busy}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                break
        lock.close()  # its holder has removed it meanwhile: lock the new one
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.remove(path)
            os.rmdir(os.path.dirname(path))  # if nothing came of it
        lock.close()


def peak_memory():
    """The most memory this process has held, in bytes (mapped shards included)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------------
# raw files: used where they lie in raw_dir with the right checksum, else downloaded once


PATIENCE = 30  # seconds without a byte


def raw_file(cfg, source, name, url, sha256, size=None):
    """Path of RAW_DIR/SOURCE/NAME with the given sha256 (None: not known), downloaded if missing. UserError has the way out."""
    path = os.path.join(cfg["raw_dir"], source, name)
    way_out = (f"put the file from {url}{f' (sha256 {sha256})' if sha256 else ''} at {path} by hand, "
               "name the folder it lies under with --raw_dir=FOLDER, or run the offline config sample_configs/shapes_text.py")
    if os.path.exists(path):
        with open(path, "rb") as f:
            check_sha256(f, sha256, f"{path}: remove it and {way_out}")
        return path
    with locked(f"{path}.lock", f"another process is fetching {path}", wait=True):
        if not os.path.exists(path):
            download(path, url, sha256, size, way_out)
    return path


def download(path, url, sha256, size, way_out):
    """Fetch url to path, by way of memory; only what has the right length and checksum is written."""
    body = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as response:
            total = int(response.headers.get("Content-Length") or 0) or size or 0
            with tqdm(total=total, unit="B", unit_scale=True, desc=f"fetching {os.path.basename(path)}") as bar:
                while (chunk := response.read(1 << 20)) and len(body) < 2**30:
                    body += chunk
                    bar.update(len(chunk))
        if total and len(body) != total:
            raise OSError(f"{len(body)} of {total} bytes came")
    except (OSError, http.client.HTTPException) as problem:  # urllib's URLError is an OSError
        raise UserError(f"cannot fetch {os.path.basename(path)} ({problem}): {way_out}") from None
    check_sha256(io.BytesIO(body), sha256, f"what {url} sent: {way_out}")
    write_file(path, body)


def check_sha256(file, sha256, way_out):
    """UserError, ending with way_out, unless an open binary file has this checksum (None: any)."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    if sha256 and digest.hexdigest() != sha256:
        raise UserError(f"wrong checksum: {file.tell()} bytes of sha256 {digest.hexdigest()}, expected {sha256}, in {way_out}")


def read_archive(path, wanted, largest=10**6):
    """{name: bytes} of the files of a tar.gz whose name is wanted, at most `largest` bytes each; nothing is extracted to disk."""
    found = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.isfile() and wanted(member.name):
                    if member.size > largest:
                        raise UserError(f"{path}: {member.name} claims {member.size} bytes, more than {largest}: remove it to fetch it again")
                    found[member.name] = archive.extractfile(member).read(member.size)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as problem:
        raise UserError(f"{path} is not a readable tar.gz archive ({problem}): remove it to fetch it again") from None
    return found


def read_text(path):
    """The text of a UTF-8 file, with or without a byte-order mark."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            return f.read()
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is not UTF-8 (byte {problem.start}): convert it with `iconv -f latin1 -t utf-8`") from None
    except OSError as problem:
        raise UserError(f"cannot read {path} ({problem.strerror})") from None


def main():
    if "--help" in sys.argv or "-h" in sys.argv or len(sys.argv) == 1:
        return print_help(__doc__, PREPARE_KEYS)
    cfg = read_config(sys.argv[1:], PREPARE_KEYS, strict=False)
    if not active_slots(cfg):
        raise UserError("no slot holds a source: name one, for example --image=shapes --text=shapes")
    if cfg["audio_test_group"] == "each":
        cfg.update(audio_test_group="#0", audio_val_group="#1")
    for slot in active_slots(cfg):
        lines = []
        folder = prepare(dict(cfg, verify=True), slot, say=lambda line: (lines.append(line), tell(line)))
        if not lines:  # it was there already
            tell(f"{describe(folder, read_meta(folder))}; checksums right")


if __name__ == "__main__":
    exit_on_user_error(main)
