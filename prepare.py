"""prepare.py: turn the raw data of ONE modality into binary shards of tokens. Nothing here ever sees two.

    python prepare.py sample_configs/letters_text.py    # typefaces, names from Unicode: offline, seconds
    python prepare.py sample_configs/cifar_text.py      # real pictures and sentences, fetched once
    python prepare.py sample_configs/cifar_text.py --image=folder:/my/images --text=file:/my/notes.txt

A slot (image, text, audio, text2, ...) names a source; a source becomes data/MODALITY-SOURCE-HASH8/ with
    meta.json                   what the shards hold, with a checksum of each; written last
    {train,val,test}_000.bin    tokens: (n, T, D) uint8 patches or frames, or (n, T) uint16 BPE ids, padded
    {train,val,test}_labels_000.bin and _lengths where the source has them; bpe.tiktoken beside text
train.py calls prepare() for a source that is missing, so running this file by hand is optional.

Sections, in the order in which data flow: errors, config, sources, pictures, text, audio, prepare, shards.
What keeps them whole comes last: files.
"""
import ast
import base64
import concurrent.futures
import contextlib
import difflib
import hashlib
import html.entities
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import sys
import tarfile
import time
import unicodedata
import warnings
import zlib

import filelock
import numpy as np
import pooch
import rustbpe
import soundfile
import tiktoken
from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from tqdm import tqdm

# of the shards, and part of every folder name: raise it when you change how a source or its tokens are made
FORMAT = 3
PARTS = ("train", "val", "test")  # the splits, in the order in which they are written
# a picture of absurd size is refused; said here, for all threads: catch_warnings serves one at a time
warnings.simplefilter("error", Image.DecompressionBombWarning)

# ------------------------------------------------------------------------------------------------------------
# errors: everything a user can get wrong ends in one clear sentence and exit code 2


class UserError(Exception):
    """What was found, where, and what to do about it, in one sentence."""


def exit_on_user_error(main):
    """Run main(); print a UserError as its sentence and exit with code 2; exit with 130 after Ctrl-C."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
        stream.reconfigure(errors="backslashreplace")  # without UTF-8 it shows \u4e2d, not a traceback
    try:
        main()
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as problem:  # OSError: a file that cannot be read; it names it
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on (train.py: with --resume)", file=sys.stderr)
        sys.exit(130)


def tell(line):
    """print() for work that must outlive its reader: a closed pipe (`| head`) ends only the printing."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ------------------------------------------------------------------------------------------------------------
# config: `key = literal` lines, read with ast and never executed; any key can be overridden as --key=value


def at_least(low, most=math.inf):
    """The checks of a key's value are pairs: what it must be, in words; the test."""
    return f"at least {low}" if most == math.inf else f"{low} to {most}", lambda value: low <= value <= most


def above(low):
    return f"above {low}", lambda value: low < value < math.inf


def below(high):
    return f"below {high}", lambda value: value < high


def one_of(*choices):
    return "one of " + ", ".join(choices), lambda value: value in choices


# modality: (its objective unless the config says otherwise, its sources for --help); a new one is a line here
MODALITIES = dict(
    image=("label", "letters, numbers, cifar10, folder:PATH; any slot also takes npz:PATH"),
    text=("next", "letters, numbers, cupl, file:PATH"),
    audio=("label", "numbers, folder:PATH"),
)

# key: (default, one line of help, check if there is one). train.py adds its own keys to these.
PREPARE_KEYS = {key: ("", f"source of the {key} slot (empty: off): {sources}")
                for key, (_, sources) in MODALITIES.items()}
PREPARE_KEYS.update(
    raw_dir=("data/raw", "where raw files lie, one folder a source"),
    data_dir=("data", "where shards are written"),
    image_size=(32, "pictures are resized and centre-cropped to this many pixels a side", at_least(1)),
    patch_size=(8, "side of the square patches that are an image's tokens", at_least(1)),
    text_length=(32, "longest text item in tokens; longer documents are cut into windows", at_least(2)),
    # vocab_size: from the 256 bytes to what uint16 holds
    vocab_size=(4096, "largest BPE vocabulary, trained on the source's training text", at_least(256, 65536)),
    audio_rate=(8000, "recordings are resampled to this many samples a second", at_least(1000, 48000)),
    audio_mels=(40, "mel bands of a log-mel frame; there is a frame every 10 ms", at_least(1)),
    audio_frames=(64, "recordings are cut or padded to this many frames", at_least(1)),
    audio_group=(4, "frames in a token", at_least(1)),
    audio_groups=("", "regular expression: its first group, in a file's name, is the speaker to split by"),
    audio_test_group=("", "the speaker of the test split: a name, #N for the N-th by name, or each: #SEED"),
    audio_val_group=("", "the speaker of the validation split, likewise"),
    val_fraction=(0.1, "share of the items for val (and for test, if a source has none)", above(0), below(1)),
    verify=(False, "compare every shard with its checksum before use (sizes are always checked)"),
    skip_bad=(False, "skip unreadable files, name the first and count them, instead of stopping there"),
    shard_mb=(256, "largest shard file in MiB", at_least(1)),
    workers=(0, "threads that read and encode (0: one a core); the shards are the same", at_least(0)),
)
SLOT_NAME = re.compile(rf"({'|'.join(MODALITIES)})\d?")


def modality_of(slot):
    """'text2' -> 'text'."""
    return slot.rstrip("0123456789")


def active_slots(cfg):
    """The slots of cfg that hold a source, in the order of MODALITIES, then numbered ones."""
    names = [key for key in cfg if SLOT_NAME.fullmatch(key) and cfg[key]]
    order = list(MODALITIES)
    return sorted(names, key=lambda name: (name[-1].isdigit(), order.index(modality_of(name)), name))


def read_assignments(path):
    """The `key = literal` lines of a config file -> [(key, value, where)]; parsed, never executed."""
    text, where, lines = read_text(path, "config file "), path, []
    try:
        for node in ast.parse(text, path).body:
            where = f"{path} line {node.lineno}"
            value = ast.literal_eval(node.value)
            if not isinstance(node, ast.Expr):  # a docstring
                (target,) = node.targets
                lines.append((target.id, value, where))
    except Exception as problem:  # ast raises nearly every kind; all mean the same to the user
        found = f" ({problem})" if isinstance(problem, SyntaxError) else ""
        raise UserError(f"{where}: not a config file of `key = literal` lines, not executed{found}") from None
    return lines


def checked(key, value, default, checks, where):
    """value as the type of default, within its range; an int is welcome where a float is wanted."""
    if isinstance(default, float) and type(value) is int and abs(value) < 1e300:  # what a float holds
        value = float(value)
    types = (bool, type(None)) if default is None else (type(default),)  # None: "decide by yourself"
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}
    of_type = names.get(type(default), "True, False or None"), lambda value: type(value) in types
    for words, fits in (of_type, *checks):
        if not fits(value):
            raise UserError(f"{where}: {key} must be {words}, found {value!r}")
    return value


def read_config(argv, keys, strict=True):
    """Read `[CONFIG.py] --key=value ...` into a flat dict that holds every key.

    keys: {key: (default, help, checks ...)}. A numbered slot (text2, text2_loss, ...) takes the defaults of
    its modality. strict=False leaves unknown keys of the FILE to another script, unless they look like a typo
    of a known one. UserError: an unknown key, a wrong type or value, a missing file, or no literal.
    """
    files = [arg for arg in argv if not arg.startswith("--")]
    if len(files) > 1:
        raise UserError(f"expected one config file, found {' '.join(files)} (keys are written --key=value)")
    lines = [(*line, strict) for path in files for line in read_assignments(path)]
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            lines.append((key, text if equals else "True", "command line", True))  # --resume means =True

    keys = dict(keys)
    for key, *_ in lines:  # text2_loss brings text2, with the keys that every modality has
        slot = key.split("_")[0]
        if slot not in keys and SLOT_NAME.fullmatch(slot):
            modality = modality_of(slot)
            ends = [known.removeprefix(modality) for known in keys if known.startswith(modality)]
            ends = [end for end in ends if all(other + end in keys for other in MODALITIES)]
            keys.update({slot + end: keys[modality + end] for end in ends})
    cfg = {key: default for key, (default, *_) in keys.items()}

    for key, value, where, must_be_known in lines:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6 if must_be_known else 0.85)
            if near or must_be_known:
                advice = f", did you mean '{near[0]}'?" if near else "; --help lists all"
                raise UserError(f"{where}: unknown key '{key}'{advice}")
            continue
        default, _, *checks = keys[key]
        if where == "command line" and not isinstance(default, str):
            with contextlib.suppress(Exception):  # else it stays text, which checked() refuses
                value = ast.literal_eval(value)
        cfg[key] = checked(key, value, default, checks, where)
    return cfg


def print_help(doc, keys, title="Every key, for a config file or as --key=value:"):
    """What --help prints: the file's own docstring, then every key with default, one line and range."""
    print(doc)
    print(title)
    for key, (default, text, *checks) in keys.items():
        ranges = " and ".join(words for words, _ in checks)
        print(f"  {key + ' = ' + repr(default):34} {text}" + (f" ({ranges})" if ranges else ""))


# ------------------------------------------------------------------------------------------------------------
# sources: functions of (cfg, modality, path) -> dict of items; if known labels (n,), classes (their names);
# and perhaps split (n,) of "train", "val", "test" (a part that does not occur is drawn), or groups (n,), the
# speakers to split by, with default_groups=(test, val); about, for meta.json; encode="features" for items
# that are numbers. A new source is a function here and a line in SOURCES.


class Items:
    """n items, each made by make(i) when a thread asks for it; None stands for one that was skipped."""

    def __init__(self, n, make):
        self.n, self.make = n, make

    def __len__(self):
        return self.n

    def __getitem__(self, rows):
        return [self.make(int(i)) for i in rows]


# The letters: every character of this kind of name that all twelve faces contain. Tested on faces never seen.
LETTER = re.compile(r"latin (capital|small) letter ([a-z])( with .*)?")
SANS = ("", "-Bold", "-Oblique", "-BoldOblique")
FACES = dict(train=[f"DejaVu{family}{style}" for family in ("Sans", "SansMono") for style in SANS],
             val=["DejaVuSerif-Bold", "DejaVuSerif-Italic"], test=["DejaVuSerif", "DejaVuSerif-BoldItalic"])
SCANS = dict(train=4, val=2, test=2)  # of every letter in every face


def typefaces():
    """The faces that matplotlib ships: {name: path}."""
    import matplotlib
    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return {face: os.path.join(folder, f"{face}.ttf") for faces in FACES.values() for face in faces}


def common_letters(paths):
    """The letters that all of these font files contain -> {character: its Unicode name in lower case}."""
    from matplotlib.ft2font import FT2Font
    cure, charmaps = "reinstall it with `pip install --force-reinstall matplotlib`", []
    for path in paths.values():
        try:
            charmaps.append(set(FT2Font(path).get_charmap()))
        except (OSError, RuntimeError) as problem:
            raise UserError(f"matplotlib's typeface {path} cannot be read ({problem}): {cure}") from None
    shared = map(chr, sorted(set.intersection(*charmaps)))
    names = {char: unicodedata.name(char, "").lower() for char in shared}
    letters = {char: name for char, name in names.items() if LETTER.fullmatch(name)}
    if missing := [char for char in "AZaz" if char not in letters]:
        raise UserError(f"matplotlib's typefaces, {path} among them, lack the letter '{missing[0]}': {cure}")
    return letters


def letters_source(cfg, modality, _):
    """Latin letters with all their marks: drawn in real typefaces, or named by the Unicode database."""
    letters = common_letters(typefaces())
    if modality == "text":
        return described_documents({name: letter_documents(char) for char, name in letters.items()})
    return printed("letters", cfg, list(letters), list(letters.values()))


def printed(source, cfg, words, classes):
    """Scans of every word in every face: a source's dict."""
    scans = []
    for part, names in FACES.items():
        scans += itertools.product([part], names, range(len(words)), range(SCANS[part]))
    parts, faces, labels, _ = zip(*scans)
    paths, side = typefaces(), cfg["image_size"]

    def make(i):
        """A careless scan (side, side, 1) uint8: place, angle, ink, paper, noise vary."""
        rng = np.random.default_rng([zlib.crc32(f"{source} image {parts[i]}".encode()), i])
        # drawn four times larger; the size is that of the face, not of the word, so that 'o' and 'O' differ
        font = open_font(paths[faces[i]], int(rng.integers(72, 83)) * side // 32)
        canvas = Image.new("L", (4 * side, 4 * side), 0)
        place = (np.array([0.5, 0.74]) + rng.normal(0, 0.02, 2)) * canvas.width  # the baseline's middle
        ImageDraw.Draw(canvas).text(tuple(place), words[labels[i]], font=font, fill=255, anchor="ms")
        canvas = canvas.rotate(rng.normal(0, 3), Image.Resampling.BILINEAR)  # degrees
        ink = np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float32)[:, :, None] / 255
        paper, black = rng.uniform(190, 255), rng.uniform(0, 90)
        grey = paper + ink * (black - paper) + rng.normal(0, 10, ink.shape)
        return grey.clip(0, 255).astype(np.uint8)

    return dict(items=Items(len(scans), make), labels=np.array(labels), classes=classes,
                split=np.array(parts), about=dict(faces=FACES, scans=SCANS))


def open_font(path, size):
    """A typeface, anew for every scan: FreeType's are not for two threads at a time, and it takes 0.05 ms."""
    try:
        return ImageFont.truetype(path, size)
    except (ImportError, OSError) as problem:  # ImportError: a Pillow built without FreeType
        cure = "reinstall it with `pip install --force-reinstall pillow`"
        raise UserError(f"Pillow cannot open the typeface {path} ({problem}): {cure}") from None


def letter_documents(char):
    """What the Unicode database says of a letter: each fact, and every two of them joined."""
    name = unicodedata.name(char).lower()
    case, base, _ = LETTER.fullmatch(name).groups()
    parts = unicodedata.decomposition(char).split()
    canonical = [chr(int(code, 16)) for code in parts] if parts and not parts[0].startswith("<") else []
    facts = [name, f"{case} {base}"]
    for pieces in (canonical, unicodedata.normalize("NFD", char)):  # one step, and all the way down
        if len(pieces) > 1:
            facts.append(" plus ".join(unicodedata.name(piece).lower() for piece in pieces))
    facts += sorted(entity for entity, code in html.entities.name2codepoint.items() if code == ord(char))
    facts = list(dict.fromkeys(facts))
    return facts + [f"{one}, {other}" for one, other in itertools.permutations(facts, 2)]


CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_ROWS = 10000  # pictures in each of its six files


def cifar10_source(cfg, modality, _):
    """CIFAR-10 from the official binary archive: 50,000 + 10,000 pictures."""
    path = raw_file(cfg, "cifar10", "cifar-10-binary.tar.gz", CIFAR10_URL, CIFAR10_SHA256)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin", "batches.meta.txt"]
    found = read_archive(path, names)
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{path} lacks {missing[0]}: remove it to fetch it again")
    *batches, classes = [found[name] for name in names]
    records = np.frombuffer(b"".join(batches), np.uint8).reshape(-1, 1 + 3072)  # label, red, green, blue
    pictures = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (n, 32, 32, 3)
    return dict(items=pictures, labels=records[:, 0].astype(np.int64), classes=classes.decode().split(),
                split=np.repeat(["train", "test"], [5 * CIFAR10_ROWS, CIFAR10_ROWS]))


CUPL_URL = ("https://raw.githubusercontent.com/sarahpratt/CuPL/719619c829792ff8f37298266e941b7f077c7f5c/"
            "all_prompts/full_prompts/")
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
    """CuPL (Pratt et al. 2022): 97,840 sentences by GPT-3 on the classes of 14 image datasets."""
    described = {}
    for name, sha256 in CUPL_SHA256.items():
        file = f"{name}_prompts_full.json"
        sentences_of = json.loads(read_text(raw_file(cfg, "cupl", file, CUPL_URL + file, sha256)))
        for label, sentences in sentences_of.items():
            described.setdefault(plain_name(label), (label, []))[1].extend(sentences)
    return described_documents(dict(described.values()))


def described_documents(described):
    """{class: [document, ...]} -> a source's dict."""
    counts = [len(documents) for documents in described.values()]
    items = np.array([document for documents in described.values() for document in documents], object)
    return dict(items=items, labels=np.repeat(np.arange(len(counts)), counts), classes=list(described))


def plain_name(name):
    """The form in which class names compare: 'Light_Video ' and 'light-video' are one class."""
    return re.sub(r"[\s_-]", "", name.lower())


def file_source(cfg, modality, path):
    """Text from a file: .txt with one document a line (unlabelled), or .json {class: [document, ...]}."""
    text = read_text(path)
    if not path.endswith(".json"):
        documents = [line.strip() for line in text.splitlines() if line.strip()]
        if len(documents) < 10:
            raise UserError(f"{path} holds {len(documents)} documents (one a line), at least 10 are needed")
        return dict(items=np.array(documents, object))
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path} is not JSON ({problem})") from None

    def is_documents(value):
        return isinstance(value, list) and value and all(isinstance(s, str) and s.strip() for s in value)

    if not (isinstance(described, dict) and described and all(map(is_documents, described.values()))):
        raise UserError(f"{path} is not of the form {{class: [document, ...]}}, none of them empty")
    return described_documents(described)


def folder_source(cfg, modality, path):
    """Pictures or recordings: PATH/{train,val,test}/CLASS/*, PATH/CLASS/*, or a flat unlabelled PATH/*."""
    if not os.path.isdir(path):
        raise UserError(f"there is no folder {path}")
    read, what = dict(image=(read_picture, "image"), audio=(read_recording, "recording"))[modality]
    found = class_files(path) or [("train", "", file) for file in list_folder(path, os.DirEntry.is_file)]
    if not found:
        raise UserError(f"folder {path} is empty: expected {what}s in PATH/CLASS/* or PATH/*")
    split, names, files = zip(*found)
    classes, labels = np.unique(names, return_inverse=True)

    def make(i):
        try:
            return read(cfg, files[i])
        except (UserError, OSError) as problem:
            if not cfg["skip_bad"]:
                raise UserError(f"{problem}: remove this {what}, or pass --skip_bad=True") from None
            source["skipped"][i] = str(problem)

    source = dict(items=Items(len(files), make), split=np.array(split), skipped={})
    if any(names):  # else a flat folder
        source.update(labels=labels, classes=classes.tolist())
        if modality == "audio" and cfg["audio_groups"] and "test" not in split:
            source["groups"] = np.array([speaker_of(file, cfg["audio_groups"]) for file in files])
    return source


def class_files(path):
    """PATH/{train,val,test}/CLASS/* (val may lack) or PATH/CLASS/* -> [(part, class, file), ...] by name.

    [] if PATH is flat.
    """
    found, classes = [], {}
    parts = [part for part in PARTS if os.path.isdir(os.path.join(path, part))]
    for part in parts or [""]:
        folders = list_folder(os.path.join(path, part), os.DirEntry.is_dir)
        classes[part] = {os.path.basename(folder) for folder in folders}
        for folder in folders:
            files = list_folder(folder, os.DirEntry.is_file)
            if not files:
                raise UserError(f"class folder {folder} holds no files: fill or remove it")
            found += [(part or "train", os.path.basename(folder), file) for file in files]
    if parts:
        known = [classes.get(part, set()) for part in {*parts, "train", "test"}]
        if odd := set.union(*known) - set.intersection(*known):
            raise UserError(f"{path} must have both train/ and test/, with the same classes, or neither: "
                            f"they differ in {', '.join(sorted(odd)[:5])}")
    return found


def list_folder(folder, wanted):
    """Paths of what is in a folder and wanted, by name; what begins with a dot is left out."""
    found = [entry.name for entry in os.scandir(folder) if wanted(entry)]
    return [os.path.join(folder, name) for name in sorted(found) if not name.startswith(".")]


def speaker_of(file, pattern):
    """The first group of a regular expression in a file's name; UserError where it does not match."""
    name = os.path.basename(file)
    try:
        return re.search(pattern, name)[1] + ""  # TypeError: no match, or not in the group
    except (re.error, IndexError, TypeError) as problem:
        raise UserError(f"audio_groups='{pattern}' must find a group in {name} ({problem})") from None


FSDD_URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz"
FSDD_SHA256 = "45a9b976ba3397a2fd5c70a9f2e43c34f442a3a6be47392ecfc41174b678f37e"  # of names and recordings
FSDD_SPEAKERS = "george jackson lucas nicolas theo yweweler".split()
DIGITS = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
PAIRS = list(itertools.product(range(10), repeat=2))  # the hundred numbers, digit by digit: 00 to 99
TAKES = 4  # recordings of each number by each speaker


def numbers_source(cfg, modality, _):
    """The numbers 00 to 99, class 'three seven': printed in typefaces, in words, or in two spoken digits."""
    classes = [f"{DIGITS[a]} {DIGITS[b]}" for a, b in PAIRS]
    if modality == "image":
        return printed("numbers", cfg, [f"{a}{b}" for a, b in PAIRS], classes)
    if modality == "text":
        return described_documents(dict(zip(classes, itertools.starmap(number_documents, PAIRS))))
    recordings = spoken_digits(cfg)
    takes = list(itertools.product(FSDD_SPEAKERS, range(len(PAIRS)), range(TAKES)))
    speakers_of, labels, _ = zip(*takes)

    def make(i):
        """Two recordings of ONE speaker, drawn from his fifty of either digit, with a short pause between."""
        rng = np.random.default_rng([zlib.crc32(b"numbers audio"), i])
        names = [f"{digit}_{speakers_of[i]}_{rng.integers(50)}.wav" for digit in PAIRS[labels[i]]]
        first, second = (read_recording(cfg, io.BytesIO(recordings[name]), name) for name in names)
        pause = np.zeros(int(rng.uniform(0, 0.1) * cfg["audio_rate"]), np.float32)
        return np.concatenate([first, pause, second])

    return dict(items=Items(len(takes), make), labels=np.array(labels), classes=classes,
                groups=np.array(speakers_of), default_groups=("theo", "lucas"))


def number_documents(a, b):
    """How the number of digits a and b is said and written."""
    first, second, value = DIGITS[a], DIGITS[b], 10 * a + b
    if value < 20:
        word = (DIGITS + TEENS)[value]
    else:
        word = TENS[a - 2] + (f"-{second}" if b else "")
    return [f"{first} {second}", f"{a}{b}", word, f"{first} then {second}", f"first {first}, last {second}",
            f"the code {a} {b}", f"{second} after {first}"]


def spoken_digits(cfg):
    """The Free Spoken Digit Dataset, {"DIGIT_SPEAKER_NUMBER.wav": bytes}: 50 of each of ten digits by each
    of six speakers, fetched, or from RAW_DIR/fsdd/recordings."""
    folder = where = os.path.join(cfg["raw_dir"], "fsdd", "recordings")
    names = sorted(f"{d}_{who}_{i}.wav" for d in range(10) for who in FSDD_SPEAKERS for i in range(50))
    if os.path.isdir(folder):
        paths = {name: pathlib.Path(folder, name) for name in names}
        found = {name: path.read_bytes() for name, path in paths.items() if path.exists()}
    else:
        where = raw_file(cfg, "fsdd", "v1.0.10.tar.gz", FSDD_URL, None)
        found = read_archive(where, names)
    cure = f"remove it, and put the recordings/ folder of {FSDD_URL} at {folder}"
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{where} lacks {missing[0]} ({len(missing)} such files): {cure}")
    whole = b"".join(name.encode() + found[name] for name in names)
    if hashlib.sha256(whole).hexdigest() != FSDD_SHA256:
        raise UserError(f"{where} holds other recordings than v1.0.10 (wrong checksum): {cure}")
    return found


def npz_source(cfg, modality, path):
    """Anything already encoded, made with numpy.savez: `features` (n, D) or (n, T, D), and if known `labels`
    (n,) whole numbers, `classes` (their names), `split` (n,) of train, val, test. Nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as f:
            found = {key: f[key] for key in f.files}
    except Exception as problem:  # zipfile and numpy raise nearly every kind; all mean the same to the user
        raise UserError(f"{path} is not a readable .npz file ({problem})") from None

    def must(good, key, what):
        if not good:
            kind = f"{found[key].dtype} {found[key].shape}" if key in found else "none"
            raise UserError(f"{path}: `{key}`: expected {what}, found {kind}")

    numbers = found.get("features", np.empty(0))
    is_array = numbers.ndim in (2, 3) and numbers.dtype.kind in "fiu" and numbers.size
    must(is_array, "features", "an array of numbers, (n, D) or (n, T, D)")
    usable = -1e30 < numbers.min() <= numbers.max() < 1e30  # what float32 holds with room to spare, no NaN
    must(usable, "features", "no NaN, infinite or huge values")
    source, n = dict(items=numbers, encode="features"), len(numbers)
    if "labels" in found:
        source["labels"] = labels = found["labels"]
        must(labels.shape == (n,) and labels.dtype.kind in "iu", "labels", f"{n} whole numbers")
        low, high = int(labels.min()), int(labels.max())
        names = found.get("classes", np.arange(min(high, 10**5) + 1)).ravel()
        must(0 <= low and high < len(names), "labels", f"0 to {len(names) - 1}")
        source["classes"] = [str(name) for name in names]
    if "split" in found:
        source["split"] = split = np.array([str(name) for name in found["split"].ravel()])
        fits = found["split"].shape == (n,) and {"train", "test"} <= set(split) <= set(PARTS)
        must(fits, "split", f"{n} of train, test and perhaps val")
    return source


with open(__file__, encoding="utf-8") as own_file:  # as it is now: an edit must not disturb what runs
    OWN_LINES = own_file.readlines()
SOURCES = {  # source: (function, modalities it can fill)
    "letters": (letters_source, ("image", "text")), "numbers": (numbers_source, ("image", "text", "audio")),
    "cifar10": (cifar10_source, ("image",)), "cupl": (cupl_source, ("text",)),
    "folder": (folder_source, ("image", "audio")), "file": (file_source, ("text",)),
    "npz": (npz_source, tuple(MODALITIES)),
}
WITH_PATH = ("folder", "file", "npz")

# ------------------------------------------------------------------------------------------------------------
# pictures: uint8 (n, S, S, channels) <-> tokens (n, T, patch*patch*channels), patches in reading order


def patchify(pictures, patch):
    """(n, S, S, c) -> (n, T, patch*patch*c) with T = (S/patch)**2; numpy arrays or torch tensors."""
    n, size, _, channels = pictures.shape
    grid = size // patch
    cut = pictures.reshape(n, grid, patch, grid, patch, channels).swapaxes(2, 3)
    return cut.reshape(n, grid * grid, patch * patch * channels)


def unpatchify(tokens, patch):
    """The inverse of patchify: (n, T, patch*patch*c) -> (n, S, S, c)."""
    n, length, width = tokens.shape
    grid, channels = math.isqrt(length), width // patch**2
    cut = tokens.reshape(n, grid, grid, patch, patch, channels).swapaxes(2, 3)
    return cut.reshape(n, grid * patch, grid * patch, channels)


def read_picture(cfg, path, channels=3):
    """Any image file -> (S, S, channels) uint8: upright, on white, resized and centre-cropped."""
    size = cfg["image_size"]
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (size, size))  # lets the JPEG decoder skip resolution nobody will see
            ImageOps.exif_transpose(picture, in_place=True)
            if picture.mode.startswith("I") or picture.mode == "F":  # 16-bit greys: 65535 becomes 255
                grey = (np.asarray(picture).astype(np.float64) / 257).clip(0, 255)
                picture = Image.fromarray(grey.astype(np.uint8))
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            mode = "RGB" if channels == 3 else "L"
            if picture.mode != mode:  # convert() copies where it has nothing to change
                picture = picture.convert(mode)
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
            return np.asarray(picture).reshape(size, size, channels)
    except Exception as problem:  # Pillow's decoders raise nearly every kind; all mean the same to the user
        raise UserError(f"{path} is not a readable image ({problem})") from None


def encode_pictures(cfg, pictures, _):
    """Pictures (S, S, c) uint8 -> {"tokens": (n, T, patch*patch*c)}."""
    pictures = np.stack(pictures)
    if pictures.shape[1] != cfg["image_size"]:
        raise UserError(f"this source needs image_size={pictures.shape[1]}, found {cfg['image_size']}")
    return dict(tokens=patchify(pictures, cfg["patch_size"]))


# ------------------------------------------------------------------------------------------------------------
# text: byte-pair encoding trained by rustbpe, run by tiktoken

# Words with their leading space, digits in threes, punctuation, white space. No look-ahead: half the time.
WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


def train_bpe(documents, vocab_size, folder):
    """Train at most vocab_size tokens; save them as lines of `base64 rank`, the .tiktoken format."""
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(documents), vocab_size=vocab_size, pattern=WORDS)
    ranks = tokenizer.get_mergeable_ranks()
    lines = [base64.b64encode(bytes(token)) + f" {rank}\n".encode() for token, rank in ranks]
    write_file(os.path.join(folder, "bpe.tiktoken"), b"".join(lines))
    return load_bpe(folder)


def load_bpe(folder):
    """The tiktoken.Encoding of a text folder; tiktoken's own loader caches by path, its table may be old."""
    path = os.path.join(folder, "bpe.tiktoken")
    ranks = {}
    with contextlib.suppress(ValueError):
        for line in read_text(path).splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise UserError(f"{path} is damaged: delete {folder} to prepare it again")
    return tiktoken.Encoding(name=path, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})


def encode_text(cfg, documents, bpe):
    """Documents -> {"tokens" (n, T) uint16, "lengths" (n,), "item" (n,) the document of each}.

    A document longer than text_length becomes several windows. encode_ordinary has no special tokens, so
    '<|endoftext|>' in a document is just these characters.
    """
    length, windows = cfg["text_length"], []
    for i, document in enumerate(documents):
        ids = bpe.encode_ordinary(document)
        windows += [(i, ids[start:start + length]) for start in range(0, len(ids), length)]
    tokens = np.zeros((len(windows), length), np.uint16)
    for row, (_, ids) in zip(tokens, windows):
        row[:len(ids)] = ids
    item, lengths = [i for i, _ in windows], [len(ids) for _, ids in windows]
    return dict(tokens=tokens, lengths=np.array(lengths, np.int32), item=np.array(item, np.int64))


# ------------------------------------------------------------------------------------------------------------
# audio: recordings -> log-mel frames -> tokens (n, T, group*mels) uint8, with the true length in tokens

LOG_MEL_RANGE = (-14.0, 8.0)  # natural log of power, in 255 steps of 0.09: a probe reads the same off float16


def read_recording(cfg, file, name=None):
    """What libsndfile reads (WAV, FLAC, OGG, MP3 ...; a path or an open file) -> (k,) float32 at audio_rate,
    no more than audio_frames need. UserError for what is empty, cut short or no recording."""
    name, seconds = name or file, cfg["audio_frames"] / 100 + 0.1
    try:
        with soundfile.SoundFile(file) as f:
            rate, cut = f.samplerate, "(should be" in f.extra_info  # a WAV that claims more than there is
            wanted = min(f.frames, int(seconds * rate))
            samples = f.read(wanted, dtype="float32", always_2d=True).mean(1)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as problem:
        raise UserError(f"{name} is not a readable recording ({problem})") from None
    if cut or len(samples) < wanted:
        raise UserError(f"{name} is cut short: its header claims more sound than there is")
    if not np.isfinite(samples).all():
        raise UserError(f"{name} holds values that are not numbers")
    if not samples.any():
        raise UserError(f"{name} is only silence for {seconds:.2f} s: trim it, or raise --audio_frames")
    if rate != cfg["audio_rate"]:
        if rate * cfg["audio_rate"] // math.gcd(rate, cfg["audio_rate"]) ** 2 > 10**7:  # size of the filter
            raise UserError(f"{name} cannot be resampled from {rate} to {cfg['audio_rate']} Hz: convert it")
        import torch
        from torchaudio.functional import resample
        samples = resample(torch.from_numpy(samples), rate, cfg["audio_rate"]).numpy()
    return samples[:int(seconds * cfg["audio_rate"])].astype(np.float32)


def encode_recordings(cfg, recordings, _):
    """Sounds (k,) float32 -> {"tokens" (n, T, group*mels) uint8, "lengths" (n,) in tokens, "cut"}."""
    import torch
    from torchaudio.transforms import MelSpectrogram
    rate, mels, frames, group = (cfg[f"audio_{key}"] for key in ("rate", "mels", "frames", "group"))
    hop, (low, high) = rate // 100, LOG_MEL_RANGE
    to_mel = MelSpectrogram(rate, n_fft=512 if rate <= 16000 else 2048, win_length=hop * 5 // 2,
                            hop_length=hop, n_mels=mels)
    padded = np.zeros((len(recordings), frames * hop), np.float32)  # with silence
    for row, recording in zip(padded, recordings):
        row[:len(recording)] = recording[:frames * hop]
    log_mel = to_mel(torch.from_numpy(padded)).clamp_min(1e-6).log()  # (n, mels, frames + 1)
    log_mel = log_mel[:, :, :frames].transpose(1, 2).numpy()  # (n, frames, mels)
    levels = ((log_mel - low) / (high - low) * 255).round().clip(0, 255).astype(np.uint8)
    real = np.array([min(frames, math.ceil(len(recording) / hop)) for recording in recordings])
    levels[np.arange(frames) >= real[:, None]] = 0
    tokens = levels.reshape(len(levels), frames // group, group * mels)
    cut = sum(len(recording) > frames * hop for recording in recordings)  # how many were longer
    return dict(tokens=tokens, lengths=np.ceil(real / group).astype(np.int32), cut=cut)


def encode_features(cfg, numbers, _):
    """Numbers (D,) or (T, D) -> {"tokens": (n, 1 or T, D) float32}."""
    numbers = np.asarray(numbers, np.float32)
    return dict(tokens=numbers[:, None] if numbers.ndim == 2 else numbers)


# ------------------------------------------------------------------------------------------------------------
# prepare: one slot's source -> its shard folder

ENCODERS = dict(image=encode_pictures, text=encode_text, audio=encode_recordings, features=encode_features)
CHUNK = 64  # items that a thread makes and encodes at a time
MADE_BY = dict(image=("image_size", "patch_size"), text=("text_length", "vocab_size"),
               audio=tuple(key for key in PREPARE_KEYS if key.startswith("audio_")))  # they decide the bytes
SPEAKER_KEYS = ("audio_groups", "audio_test_group", "audio_val_group")
MULTIPLES = dict(image=dict(image_size="patch_size"), audio=dict(audio_frames="audio_group"))


def prepare(cfg, slot, say=tell):
    """Make one slot's shards unless they exist -> their folder; a UserError leaves nothing half-written."""
    folder, made_from = shard_folder(cfg, slot)
    meta_path = os.path.join(folder, "meta.json")
    if not os.path.exists(meta_path):
        lock = os.path.join(cfg["data_dir"], f".{os.path.basename(folder)}.lock")
        with locked(lock, f"another process is preparing {slot}={cfg[slot]}", wait=True):
            if not os.path.exists(meta_path):  # nor did the process we waited for make it
                make_shards(cfg, slot, folder, made_from, say)
    elif cfg["verify"]:
        verify_shards(folder, read_meta(folder))
        say(f"{describe(folder)}; checksums right")
    return folder


def shard_folder(cfg, slot):
    """(folder, description) of a slot's shards; its name is a hash of all that decides the bytes."""
    modality, name, path = parse_source(cfg, slot)
    keys = (*MADE_BY.get(modality, ()), "val_fraction", "skip_bad", "shard_mb")
    made_from = dict(format=FORMAT, modality=modality, source=cfg[slot], **{key: cfg[key] for key in keys})
    if path:  # the user's own files: names, sizes and times, so that a changed folder is prepared anew
        files = [path]
        if os.path.isdir(path):
            files = sorted(os.path.join(d, f) for d, _, inside_d in os.walk(path) for f in inside_d)
        listing = [(f, os.path.getsize(f), os.path.getmtime(f)) for f in files if os.path.exists(f)]
        made_from["files"] = hashlib.sha256(repr(listing).encode()).hexdigest()
    # an edited source makes other shards; of an edit of what it calls, only a higher FORMAT tells
    code = inspect.getblock(OWN_LINES[SOURCES[name][0].__code__.co_firstlineno - 1:])
    made_from["code"] = hashlib.sha256("".join(code).encode()).hexdigest()
    if name in ("letters", "numbers"):  # what decides their bytes and is not ours
        import matplotlib
        faces = f"matplotlib {matplotlib.__version__}, FreeType {features.version('freetype2')}"
        made_from["version"] = f"{faces}, Unicode {unicodedata.unidata_version}"
    hash8 = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:8]
    label = re.sub(r"\W+", "-", f"{name}-{os.path.basename(path.rstrip('/'))}").strip("-")
    return os.path.join(cfg["data_dir"], f"{modality}-{label}-{hash8}"), made_from


def parse_source(cfg, slot):
    """A slot's (modality, name of its source, path); UserError unless these fit, it says which do."""
    modality, source = modality_of(slot), cfg[slot]
    name, _, path = source.partition(":")
    _, filled = SOURCES.get(name, (None, ()))
    if modality in filled and bool(path) == (name in WITH_PATH):
        return modality, name, path
    fitting = {s: f"{s}:PATH" if s in WITH_PATH else s for s in SOURCES if modality in SOURCES[s][1]}
    near = [fitting[s] for s in difflib.get_close_matches(name, fitting, n=1)]
    if filled and modality not in filled:
        near = [f"{filled[0]}={source}"]
    if os.path.exists(source):
        near = [f"{'file' if modality == 'text' else 'folder'}:{source}"]
    advice = f", did you mean '{near[0]}'?" if near else ""
    there = ", ".join(fitting.values())
    raise UserError(f"{slot}='{source}' is no source of {modality}{advice} (there are {there})")


def make_shards(cfg, slot, folder, made_from, say):
    """Run a source, split its items, encode them chunk by chunk and write the shards to folder."""
    start, (modality, name, path) = time.perf_counter(), parse_source(cfg, slot)
    for whole, part in MULTIPLES.get(modality, {}).items():
        if cfg[whole] % cfg[part]:
            raise UserError(f"{whole}={cfg[whole]} is not a multiple of {part}={cfg[part]}")
    source = dict(labels=None, classes=[], encode=modality, about={}, skipped={})  # unless it says otherwise
    source.update(SOURCES[name][0](cfg, modality, path))  # refuses a wrong path
    say(f"preparing {slot}={cfg[slot]} in {folder}")
    split = draw_splits(cfg, slot, source)
    meta = dict(format=FORMAT, modality=modality, made_from=made_from)
    meta.update(classes=source["classes"], about=source["about"])
    making = f"{folder}.tmp"
    shutil.rmtree(making, ignore_errors=True)  # what a killed process left; by the lock, nobody is at work
    os.mkdir(making)
    try:
        meta.update(write_splits(cfg, making, source, split, say))
        write_json(os.path.join(making, "meta.json"), meta)
        verify_shards(making, read_meta(making))
        shutil.rmtree(folder, ignore_errors=True)  # what is left of a damaged folder
        os.replace(making, folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    say(f"{describe(folder)}; {time.perf_counter() - start:.1f} s")


def draw_splits(cfg, slot, source):
    """(n,) array of "train", "val", "test": as the source says, by speaker, or drawn."""
    labels, n = source["labels"], len(source["items"])
    split = source.get("split", np.full(n, "train")).astype("<U5")
    if "groups" in source:
        draw_groups(cfg, slot, source["groups"], source.get("default_groups"), split)
    elif modality_of(slot) == "audio" and any(cfg[key] for key in SPEAKER_KEYS):
        raise UserError(f"{slot}={cfg[slot]} cannot be split by speaker, that needs PATH/CLASS/* folders and "
                        f"--audio_groups: leave {', '.join(SPEAKER_KEYS)} empty to have it split at random")
    for part, seed in ("test", 1), ("val", 0):
        if part not in split:
            free = split == "train"
            drawn = draw_share(labels, free, cfg["val_fraction"], seed)
            if not drawn.any():  # one or two of every class: enough for an auxiliary, which nobody scores
                drawn = draw_share(None, free, cfg["val_fraction"], seed)
            split[drawn] = part
    if missing := [part for part in PARTS if part not in split]:
        enough = f"about {2 / cfg['val_fraction']:.0f} are needed, three of every class at least"
        raise UserError(f"{slot}={cfg[slot]}: too few items ({n}) for a {missing[0]} split: {enough}")
    return split


def draw_share(labels, free, fraction, seed):
    """(n,) bool: about `fraction` of the free items (n,), the same share of every class."""
    rng, drawn = np.random.default_rng([seed]), np.zeros(len(free), bool)
    labels = np.zeros(len(free)) if labels is None else labels
    for label in np.unique(labels[free]):
        rows = np.flatnonzero(free & (labels == label))
        if len(rows) >= 3:
            drawn[rng.permutation(rows)[:max(1, round(fraction * len(rows)))]] = True
    return drawn


def draw_groups(cfg, slot, groups, default, split):
    """Mark in split (n,) the test and val speakers: those of the config, else the source, else by name."""
    source, there = f"{slot}={cfg[slot]}", sorted(set(groups.tolist()))
    names = ", ".join(there)
    if len(there) < 3:
        raise UserError(f"{source}: a split by speaker needs three of them at least, found {names}")
    chosen = dict(zip(("test", "val"), default or there))
    for part in chosen:
        key = f"audio_{part}_group"
        if re.fullmatch(r"#\d+", cfg[key]):
            chosen[part] = there[int(cfg[key][1:]) % len(there)]
        elif cfg[key]:
            chosen[part] = cfg[key]
        if chosen[part] not in there:
            raise UserError(f"{key}='{chosen[part]}' is not there: {source} has {names}")
        split[groups == chosen[part]] = part
    if chosen["test"] == chosen["val"]:
        raise UserError(f"test and validation speaker are both '{chosen['val']}': {source} has {names}")


def write_splits(cfg, folder, source, split, say):
    """Encode and write every split's items -> what meta.json says of the tokens, arrays and files."""
    encode, bpe, info = source["encode"], None, dict(kind="continuous", splits={})
    if encode == "text":
        bpe = train_bpe(source["items"][np.flatnonzero(split == "train")], cfg["vocab_size"], folder)
        checksum = file_sha256(os.path.join(folder, "bpe.tiktoken"))
        info.update(kind="discrete", vocab=bpe.n_vocab, bpe_sha256=checksum)
    elif encode == "image":
        info["patch"] = cfg["patch_size"]
    elif encode == "audio":
        info["mels"] = cfg["audio_mels"]
    sums, cut = 0, 0
    with tqdm(total=len(split), desc=f"encoding {encode}", disable=None, leave=False) as bar:
        for part in PARTS:
            rows, files = np.flatnonzero(split == part), {}
            class_counts = np.zeros(len(source["classes"]), np.int64)
            for arrays in encoded_chunks(cfg, source, rows, bpe, info, bar):
                cut += arrays.pop("cut", 0)
                of_chunk = arrays.pop("sums", 0)
                if part == "train":  # the others must not tell the model anything
                    sums = sums + of_chunk
                if "labels" in arrays:
                    class_counts += np.bincount(arrays["labels"], minlength=len(class_counts))
                info["arrays"] = {name: dict(dtype=array.dtype.name, shape=list(array.shape[1:]))
                                  for name, array in arrays.items()}
                append(folder, part, arrays, files, cfg["shard_mb"] * 2**20)
            if not files:
                raise UserError(f"none of the {len(rows)} files for the {part} split is readable")
            for shard in itertools.chain(*files.values()):
                shard["sha256"] = shard["sha256"].hexdigest()
                path = os.path.join(folder, shard["file"])
                with writing(path, 0), open(path, "ab") as f:
                    os.fsync(f.fileno())
            info["splits"][part] = dict(count=sum(shard["count"] for shard in files["tokens"]), files=files,
                                        class_counts=class_counts.tolist())
    if skipped := source["skipped"]:
        say(f"skipped {len(skipped)} of {len(split)} files, the first: {skipped[min(skipped)]}")
    if cut:
        say(f"cut {cut} of {len(split)} recordings at audio_frames={cfg['audio_frames']}")
    if bpe is None:
        count, total, squares = sums
        variance = np.maximum(squares / count - (total / count)**2, 0)
        lift = 1e-3 if info["arrays"]["tokens"]["dtype"] == "uint8" else 1e-6  # the std will divide
        info.update(mean=(total / count).tolist(), std=(np.sqrt(variance) + lift).tolist())
    return info


def encoded_chunks(cfg, source, rows, bpe, info, bar):
    """encode_chunk() of rows, CHUNK at a time, in their order; threads work no more than a few ahead."""
    workers, running = cfg["workers"] or os.cpu_count(), []
    pool = concurrent.futures.ThreadPoolExecutor(workers)  # what takes time in items leaves Python's lock
    try:
        for start in range(0, len(rows), CHUNK):
            running.append(pool.submit(encode_chunk, cfg, source, rows[start:start + CHUNK], bpe, info))
            ahead = workers + 2 if start + CHUNK < len(rows) else 0
            while len(running) > ahead:
                count, arrays = running.pop(0).result()  # raises what is wrong with the first bad item
                bar.update(count)
                if arrays:
                    yield arrays
    finally:
        pool.shutdown(cancel_futures=True)  # a bad item or Ctrl-C waits only for the chunks at work


def encode_chunk(cfg, source, rows, bpe, info):
    """Make and encode the items of rows -> (how many these are, their arrays {name: (k, ...)})."""
    made = [(row, item) for row, item in zip(rows, source["items"][rows]) if item is not None]
    if not made:  # all were skipped
        return len(rows), {}
    kept, items = zip(*made)
    arrays = ENCODERS[source["encode"]](cfg, items, bpe)
    of_item = np.array(kept)[arrays.pop("item", slice(None))]  # a text may have become several rows
    if source["labels"] is not None:
        arrays["labels"] = source["labels"][of_item].astype(np.int32)
    if bpe is None:  # here, in a thread: for large pictures this takes as long as reading them
        arrays["sums"] = token_sums(info, arrays["tokens"], arrays.get("lengths"))
    return len(rows), arrays


def token_sums(info, tokens, lengths):
    """(3, period): count, sum and sum of squares of a chunk's real tokens (k, T, D); padding does not count.

    period: after how many of a token's numbers the same quantity comes again, such as a colour or a band.
    """
    period = info.get("mels", tokens.shape[-1] // info.get("patch", 1)**2)
    if lengths is not None:
        tokens = tokens[np.arange(tokens.shape[1]) < lengths[:, None]]
    flat = tokens.reshape(-1, tokens.shape[-1])  # never as a whole in float64: that is eight times as much
    squares = np.einsum("nd,nd->d", flat, flat, dtype=np.float64)
    sums = [np.full(len(squares), len(flat)), flat.sum(0, dtype=np.float64), squares]
    return np.reshape(sums, (3, -1, period)).sum(1)


def append(folder, part, arrays, files, shard_bytes):
    """Append a chunk's arrays {name: (k, ...)} to a split's files {name: [dict(file, count, sha256), ...]}.

    All arrays are cut at the same rows, where tokens fill a shard; its checksum is known when all is written.
    """
    most = max(1, shard_bytes // max(1, arrays["tokens"][:1].nbytes))
    for name, array in arrays.items():
        stem, shards = part if name == "tokens" else f"{part}_{name}", files.setdefault(name, [])
        while len(array):
            if not shards or shards[-1]["count"] == most:
                shards.append(dict(file=f"{stem}_{len(shards):03d}.bin", count=0, sha256=hashlib.sha256()))
            shard = shards[-1]
            fits = array[:most - shard["count"]]
            path = os.path.join(folder, shard["file"])
            with writing(path, fits.nbytes), open(path, "ab") as f:
                f.write(fits.tobytes())
            shard["sha256"].update(fits.tobytes())
            shard["count"] += len(fits)
            array = array[len(fits):]


def describe(folder):
    """The one line of counts a reader should see after prepare."""
    meta = read_meta(folder)
    counts = ", ".join(f"{meta['splits'][part]['count']:,} {part}" for part in PARTS)
    tokens = " x ".join(str(n) for n in meta["arrays"]["tokens"]["shape"])
    words = f", {meta['vocab']:,} BPE tokens" if meta["kind"] == "discrete" else ""
    return (f"{folder}: {counts} items of {tokens} {meta['arrays']['tokens']['dtype']}, "
            f"{len(meta['classes'])} classes{words}")


# ------------------------------------------------------------------------------------------------------------
# shards: flat arrays on disk, described and checksummed by meta.json

SHA256 = re.compile("[0-9a-f]{64}")


def read_meta(folder):
    """meta.json of a shard folder, every value checked, for it may come from a stranger."""
    path, cure = os.path.join(folder, "meta.json"), f"delete {folder} to prepare it again"
    try:
        meta = read_json(path)
        check_meta(meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        found = f"{type(problem).__name__}: {problem}"
        raise UserError(f"{path} is missing or damaged ({found}): {cure}") from None
    return meta


def check_meta(meta):
    """ValueError, KeyError, TypeError or AttributeError unless this code could have written these shards."""
    def must(good, what):
        if not good:
            raise ValueError(what)

    def is_count(n, most=2**40):
        return type(n) is int and 0 < n <= most

    must(meta["format"] == FORMAT, f"format {meta['format']!r}, this code reads {FORMAT}")
    arrays, classes, kind = meta["arrays"], meta["classes"], meta["kind"]
    must(type(classes) is list and all(type(name) is str for name in classes), "classes are not names")
    for name, array in arrays.items():
        dtype, shape = array["dtype"], array["shape"]
        must(dtype in ("uint8", "uint16", "int32", "float32"), f"{name} is of dtype {dtype!r}")
        must(len(shape) <= 2 and all(is_count(n, 2**24) for n in shape), f"{name} has rows of shape {shape}")
        must(name not in ("labels", "lengths") or (dtype, shape) == ("int32", []), f"{name} are {array}")
    shape = arrays["tokens"]["shape"]
    must((kind, len(shape)) in (("discrete", 1), ("continuous", 2)), "no such kind of tokens")
    if kind == "discrete":
        must(is_count(meta["vocab"], 65536), f"vocab is {meta['vocab']!r}")
        must(SHA256.fullmatch(meta["bpe_sha256"]), "checksum of the BPE")
    else:
        length, width = shape
        for key in ("mean", "std"):
            values = meta[key]
            must(type(values) is list and values and width % len(values) == 0, f"{key} does not fit {width}")
            must(all(type(v) in (int, float) and abs(v) < 1e30 for v in values), f"{key} is not finite")
        must(min(meta["std"]) > 0, "std is not above 0")
        patch, mels = meta.get("patch", 1), meta.get("mels", 1)
        must(is_count(patch) and width % patch**2 == 0, f"patch is {patch!r}")
        must("patch" not in meta or math.isqrt(length) ** 2 == length, f"{length} patches are no square")
        must(is_count(mels) and width % mels == 0, f"mels is {mels!r}")
    for part in PARTS:
        split = meta["splits"][part]
        files = split["files"]
        must(files.keys() == arrays.keys() and is_count(split["count"]), f"{part} has no items, or others")
        must(("labels" in files) == bool(classes), f"labels of {part}")
        must("lengths" in files or kind == "continuous" and "mels" not in meta, f"lengths of {part}")
        must(len(split["class_counts"]) == len(classes), f"class_counts of {part}")
        for name, shards in files.items():
            for shard in shards:
                named = re.fullmatch(rf"{part}(_[a-z]+)?_\d+\.bin", shard["file"])
                must(named and is_count(shard["count"]), f"files of {part} {name}")
                must(SHA256.fullmatch(shard["sha256"]), f"checksums of {part} {name}")
            must(sum(shard["count"] for shard in shards) == split["count"], f"count of {part} {name}")


def verify_shards(folder, meta):
    """Compare every file with its checksum; the size, which Shards checks, does not show a flipped bit."""
    lists = [shards for split in meta["splits"].values() for shards in split["files"].values()]
    sums = {shard["file"]: shard["sha256"] for shard in itertools.chain(*lists)}
    if meta["kind"] == "discrete":
        sums["bpe.tiktoken"] = meta["bpe_sha256"]
    for file, sha256 in sums.items():
        if file_sha256(os.path.join(folder, file)) != sha256:
            raise UserError(f"wrong checksum in {folder}/{file}: delete {folder} to prepare it again")


class Shards:
    """One array over all its shard files, e.g. tokens (n, T, D); the files stay on disk (np.memmap)."""

    def __init__(self, folder, files, dtype, shape):
        self.dtype, self.row_shape, self.maps = np.dtype(dtype), tuple(shape), []
        for entry in files:
            path = os.path.join(folder, entry["file"])
            found = os.path.getsize(path) if os.path.exists(path) else 0
            wanted = entry["count"] * self.dtype.itemsize * math.prod(shape)
            if found != wanted:
                sizes = f"{found} bytes where meta.json says {wanted}"
                raise UserError(f"{path} has {sizes}: delete {folder} to prepare it again")
            self.maps.append(np.memmap(path, self.dtype, "r", shape=(entry["count"], *shape)))
        self.starts = np.cumsum([0] + [len(m) for m in self.maps])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, rows):
        """rows: (k,) integer array -> (k, *shape) array in memory; one read per shard touched."""
        if len(self.maps) == 1:
            return self.maps[0][rows]
        out = np.empty((len(rows), *self.row_shape), self.dtype)
        which = np.searchsorted(self.starts, rows, side="right") - 1
        for i in np.unique(which):
            out[which == i] = self.maps[i][rows[which == i] - self.starts[i]]
        return out


def load_split(folder, split):
    """One split of a shard folder: {"tokens": Shards, and perhaps "labels", "lengths": (n,) arrays}."""
    meta = read_meta(folder)
    arrays = {}
    for name, files in meta["splits"][split]["files"].items():
        shards = Shards(folder, files, **meta["arrays"][name])
        arrays[name] = shards if name == "tokens" else shards[np.arange(len(shards))]
    ranges = dict(labels=(0, len(meta["classes"]) - 1), lengths=(1, arrays["tokens"].row_shape[0]))
    for name, (low, high) in ranges.items():
        if name in arrays and not low <= arrays[name].min() <= arrays[name].max() <= high:
            raise UserError(f"{split} {name} are not all {low} to {high}: delete {folder} to make it again")
    return arrays


# ------------------------------------------------------------------------------------------------------------
# files: written under a temporary name and moved into place, so that whoever looks finds a whole one or none


@contextlib.contextmanager
def writing(path, size):
    """A full or read-only disk met within becomes one sentence: the path, the bytes needed, those free."""
    try:
        yield
    except OSError as problem:
        folder = os.path.dirname(os.path.abspath(path))
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        raise UserError(f"cannot write {path} ({problem.strerror or problem}): {size:,} bytes needed, "
                        f"{shutil.disk_usage(folder).free:,} free there") from None


def write_file(path, data, keep=None):
    """Put bytes into a file; the old one stays until the new one is whole on the disk (then as `keep`)."""
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
    """The JSON of a file; ValueError where it is none, or cut at a size larger than anything we write."""
    with open(path, "rb") as f:
        return json.loads(f.read(2**26))


def read_text(path, what=""):
    """The text of a UTF-8 file, with or without a byte-order mark."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            return f.read()
    except UnicodeDecodeError as problem:
        cure = "convert it with `iconv -f latin1 -t utf-8`"
        raise UserError(f"{path} is not UTF-8 (byte {problem.start}): {cure}") from None
    except (OSError, ValueError) as problem:  # ValueError: a name with a NUL in it
        raise UserError(f"cannot read {what}{path} ({getattr(problem, 'strerror', problem)})") from None


@contextlib.contextmanager
def locked(path, busy, wait=False):
    """Hold a lock file; where another holds it, say `busy` and wait, or refuse. A kill releases it."""
    with writing(path, 0):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if not wait:
                raise UserError(busy) from None
            tell(f"{busy}: waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def peak_memory():
    """The most bytes this process has held (mapped shards included); None where nobody counts them."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def file_sha256(path):
    """Checksum of a file, as hexadecimal digits."""
    return pooch.file_hash(path, alg="sha256")


def raw_file(cfg, source, name, url, sha256):
    """Path of RAW_DIR/SOURCE/NAME with this checksum (None: not known), fetched if it is missing; only what
    came whole and has the checksum is moved into place."""
    folder = os.path.join(cfg["raw_dir"], source)
    path, known = os.path.join(folder, name), f"sha256:{sha256}" if sha256 else None
    way_out = (f"put the file from {url} ({known or 'no checksum'}) at {path} by hand, name the folder it "
               "lies under with --raw_dir=FOLDER, or run the offline config sample_configs/letters_text.py")
    if os.path.exists(path):
        if known and (found := file_sha256(path)) != sha256:
            raise UserError(f"wrong checksum: {path} has sha256 {found}: remove it and {way_out}")
        return path
    pooch.get_logger().setLevel("ERROR")
    with locked(f"{path}.lock", f"another process is fetching {path}", wait=True):
        try:
            tell(f"fetching {url}")
            downloader = pooch.HTTPDownloader(progressbar=True, timeout=30)  # seconds without a byte
            return pooch.retrieve(url, known, name, folder, downloader=downloader)
        except (OSError, ValueError) as problem:  # requests' errors are OSErrors; ValueError: the checksum
            raise UserError(f"cannot fetch {name} ({problem}): {way_out}") from None


def read_archive(path, names):
    """{name: bytes} of the files of a tar.gz that have these names, whatever their folder in there."""
    found, cure = {}, "remove it to fetch it again"
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = os.path.basename(member.name)
                if member.isfile() and name in names:
                    if member.size > 2**25:  # no file that we read is larger
                        raise UserError(f"{path}: {member.name} claims {member.size} bytes: {cure}")
                    found[name] = archive.extractfile(member).read(member.size)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as problem:
        raise UserError(f"{path} is not a readable tar.gz archive ({problem}): {cure}") from None
    return found


def main():
    if "--help" in sys.argv or "-h" in sys.argv or len(sys.argv) == 1:
        return print_help(__doc__, PREPARE_KEYS)
    cfg = read_config(sys.argv[1:], PREPARE_KEYS, strict=False)
    if not active_slots(cfg):
        raise UserError("no slot holds a source: name one, for example --image=letters --text=letters")
    if cfg["audio_test_group"] == "each":  # as train.py does for seed 0
        cfg.update(audio_test_group="#0", audio_val_group="#1")
    for slot in active_slots(cfg):
        prepare(dict(cfg, verify=True), slot)


if __name__ == "__main__":
    exit_on_user_error(main)
