"""prepare.py: turn the raw data of ONE modality into shards: binary files of tokens, ready for train.py.

    python prepare.py sample_configs/letters_text.py    # letters drawn and described: offline, seconds
    python prepare.py sample_configs/cifar_text.py      # real pictures and sentences, fetched once
    python prepare.py sample_configs/cifar_text.py --image=folder:/my/images --text=file:/my/notes.txt

A config names a source for each slot (image, text, audio, text2, ...). A source fills one slot and
never sees another, so it cannot pair them. It becomes a folder data/MODALITY-SOURCE-HASH8/ with
    {train,val,test}_000.bin    tokens: (n, T, D) uint8 patches or frames, or float32 features of an encoder,
                                or (n, T) uint16 BPE ids, padded
    {train,val,test}_labels_000.bin and _lengths where the source has them; bpe.tiktoken beside text
    meta.json                   what these hold, with a checksum of each; written last
train.py calls prepare() for a source that is missing, so running this file by hand is optional.

Sections, in the order in which data flow: errors, config, sources, Parquet, pictures, text, audio, pretrained
encoders, prepare, shards. What all of them use comes last: files.
"""
import ast
import base64
import concurrent.futures
import contextlib
import csv
import difflib
import fractions
import functools
import glob
import hashlib
import html.entities
import importlib
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
import textwrap
import time
import unicodedata
import zlib

import filelock
import numpy as np
import pooch
import rustbpe
import soundfile
import tiktoken
from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from tqdm import tqdm

FORMAT = 5  # of the shards, and part of every folder's name: raise it when you change how tokens are made
REGISTRY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sample_configs", "registry.txt")
PARTS = ("train", "val", "test")  # the splits, in the order in which they are written
file_sha256 = pooch.file_hash  # checksum of a file, as hexadecimal digits

# ------------------------------------------------------------------------------------------------------------
# errors: whatever a user can get wrong ends in one clear sentence and exit code 2


class UserError(Exception):
    """What was found, where, and what to do about it, in one sentence."""


@contextlib.contextmanager
def explained(what, cure=""):
    """Whatever goes wrong within becomes a UserError: what is wrong (what Python says of it) and the cure."""
    try:
        yield
    except UserError:
        raise
    except Exception as problem:  # decoders raise nearly every kind; all mean the same to the user
        found = textwrap.shorten(f"{type(problem).__name__}: {problem}", 300)  # some send whole pages
        raise UserError(f"{what} ({found}){cure}") from None


def imported(module, what):
    """A module that only some configs need, so that a lean install does without."""
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        package = (problem.name or module).split(".")[0]
        raise UserError(f"{what} needs {package}: pip install {package}") from None


def exit_on_user_error(main):
    """Run main(); a UserError is printed as its sentence, without a traceback, and ends with exit code 2."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: it was closed before we started
        stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 shows \u4e2d
    try:
        main()
    except BrokenPipeError:  # the reader of our output has left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as problem:  # OSError: a file that cannot be read; it names the file
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command again (train.py: with --resume) goes on from what is saved",
              file=sys.stderr)
        sys.exit(130)


def tell(line):
    """print(), but work goes on where nobody reads it any more (`| head`): then only the printing ends."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ------------------------------------------------------------------------------------------------------------
# config: `key = literal` lines, read with ast and never executed; any key can be overridden as --key=value.
# A check of a key's value is a pair: what the value must be, in words, and a function that tests it.


def at_least(low, most=math.inf):
    words = f"at least {low}" if most == math.inf else f"{low} to {most}"
    return words, lambda value: low <= value <= most


def above(low):
    return f"above {low}", lambda value: low < value < math.inf


def below(high):
    return f"below {high}", lambda value: value < high


def one_of(*choices):
    return "one of " + ", ".join(choices), lambda value: value in choices


# modality: (its default objective, its sources as --help shows them). A new modality is a line here.
MODALITIES = dict(
    image=("label", "letters, numbers, cifar10, folder:PATH; any slot also takes parquet:PATH, npz:PATH"),
    text=("next", "letters, numbers, cupl, file:PATH"),
    audio=("label", "numbers, folder:PATH"),
)

# key: (default, one line of help, its checks). train.py adds its own keys to these.
PREPARE_KEYS = {slot: ("", f"source of the {slot} slot (empty: off): {sources}")
                for slot, (_, sources) in MODALITIES.items()}
PREPARE_KEYS.update(
    raw_dir=("data/raw", "where raw files lie, one folder a source"),
    data_dir=("data", "where shards are written"),
    image_size=(32, "pictures become squares of this many pixels a side", at_least(1)),
    image_fit=("crop", "what is not square loses its ends (crop) or gets white margins (pad)",
               one_of("crop", "pad")),
    patch_size=(8, "side of the square patches that are an image's tokens", at_least(1)),
    text_length=(32, "longest text item in tokens; longer documents are cut into windows", at_least(2)),
    # vocab_size: at least one token for each byte, at most what uint16 holds
    vocab_size=(4096, "largest BPE vocabulary, trained on the source's training text", at_least(256, 65536)),
    audio_rate=(8000, "recordings are resampled to this many samples a second", at_least(1000, 48000)),
    audio_mels=(40, "mel bands of a log-mel frame; there is a frame every 10 ms", at_least(1)),
    audio_frames=(64, "recordings are cut or padded to this many frames", at_least(1)),
    audio_group=(4, "frames in a token", at_least(1)),
    audio_groups=("", "regular expression: its first group, in a file's name, is the speaker to split by"),
    audio_test_group=("", "the speaker of the test split: a name, a number (#0: the first), or each: #SEED"),
    audio_val_group=("", "the speaker of the validation split, likewise"),
    val_fraction=(0.1, "share of the items for val (and for test, if a source has none)", above(0), below(1)),
    verify=(False, "compare every shard with its checksum before use (sizes are always checked)"),
    skip_bad=(False, "go on without unreadable files, and say how many and why, instead of refusing"),
    shard_mb=(256, "largest shard file in MiB", at_least(1)),
    workers=(0, "threads that read and encode (0: one a core); the shards are the same", at_least(0)),
)
for slot in MODALITIES:  # a modality of one's own takes "hf", and open_encoder() refuses what it cannot read
    library, tables = ("timm" if slot == "image" else "hf"), "parquet" + ", .csv, .jsonl" * (slot == "text")
    PREPARE_KEYS.update({f"{slot}_{end}": key for end, key in dict(
        column=("", f"{tables}: column of the {slot} items, where it has not the Hub's usual name"),
        label=("", f"{tables}: column of their classes (empty: 'label', if there is one)"),
        encoder=("", "a pretrained encoder; its outputs, computed once, become the items",
                 (f"empty or {library}:NAME_OR_PATH", re.compile(f"({library}:.+)?").fullmatch)),
        encoder_tokens=(False, "keep all tokens that it makes of an item instead of one vector"),
    ).items()})
SLOT_NAME = re.compile(rf"({'|'.join(MODALITIES)})\d?")


def modality_of(slot):
    """'text2' -> 'text'."""
    return slot.rstrip("0123456789")


def active_slots(cfg):
    """The slots of cfg that have a source: first in the order of MODALITIES, then the numbered ones."""
    names = [key for key in cfg if SLOT_NAME.fullmatch(key) and cfg[key]]
    order = list(MODALITIES)
    return sorted(names, key=lambda name: (name[-1].isdigit(), order.index(modality_of(name)), name))


def read_assignments(path):
    """The `key = literal` lines of a config file -> [(key, value, where it stands)]."""
    text, where, lines = read_text(path, "config file "), path, []
    try:
        for node in ast.parse(text, path).body:
            where = f"{path} line {node.lineno}"
            value = ast.literal_eval(node.value)
            if not isinstance(node, ast.Expr):  # an expression without a name is a docstring
                (target,) = node.targets
                lines.append((target.id, value, where))
    except Exception as problem:  # ast raises nearly every kind; all mean the same to the user
        found = f" ({problem})" if isinstance(problem, SyntaxError) else ""
        raise UserError(f"{where}: not a config file of `key = literal` lines, not executed{found}") from None
    return lines


def checked(key, value, default, checks, where):
    """value, if it has the type of default and passes the checks; an int is turned into a float if needed."""
    if isinstance(default, float) and type(value) is int and abs(value) < 1e300:  # a larger one overflows
        value = float(value)
    types = (bool, type(None)) if default is None else (type(default),)  # None: "decide by yourself"
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}
    of_type = names.get(type(default), "True, False or None"), lambda value: type(value) in types
    for words, fits in (of_type, *checks):
        if not fits(value):
            raise UserError(f"{where}: {key} must be {words}, found {value!r}")
    return value


def read_config(argv, keys, strict=True):
    """Read `[CONFIG.py] --key=value ...` into {key: value}; keys: {key: (default, help, checks ...)}.
    strict=False leaves unknown keys of the FILE to another script, unless they look like a typo of ours."""
    files = [arg for arg in argv if not arg.startswith("--")]
    if len(files) > 1 or (files and not files[0].endswith(".py")):  # `--steps 5` leaves a 5 here
        raise UserError(f"expected one config file NAME.py, found {' '.join(files)} (keys are written "
                        "--key=value)")
    lines = [line for path in files for line in read_assignments(path)]
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            lines.append((key, text if equals else "True", "command line"))  # --resume means --resume=True

    first = list(MODALITIES)[0]
    ends = [key.removeprefix(first) for key in keys if key.startswith(first)]  # "", "_loss", "_batch", ...
    ends = [end for end in ends if all(slot + end in keys for slot in MODALITIES)]  # not "_size"
    keys = dict(keys)
    for key, _, _ in lines:  # text2_loss brings text2 with all keys that a slot has
        slot = key.split("_")[0]
        if slot not in keys and SLOT_NAME.fullmatch(slot):
            keys.update({slot + end: keys[modality_of(slot) + end] for end in ends})

    cfg = {key: default for key, (default, *_) in keys.items()}
    for key, value, where in lines:  # the command line comes last, so it overrides the file
        by_hand = where == "command line"
        if key in keys:
            default, _, *checks = keys[key]
            if by_hand and not isinstance(default, str):
                with contextlib.suppress(Exception):  # no literal: it stays text, which checked() refuses
                    value = ast.literal_eval(value)
            cfg[key] = checked(key, value, default, checks, where)
            continue
        must_be_known = strict or by_hand
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6 if must_be_known else 0.85)
        if near or must_be_known:
            advice = f", did you mean '{near[0]}'?" if near else "; --help lists all"
            raise UserError(f"{where}: unknown key '{key}'{advice}")
    return cfg


def print_help(doc, keys, title="Every key, for a config file or as --key=value:"):
    """What --help prints: the file's own docstring, then every key with default, one line and range."""
    print(doc, title, sep="\n")
    for key, (default, text, *checks) in keys.items():
        ranges = " and ".join(words for words, _ in checks)
        print(f"  {key + ' = ' + repr(default):34} {text}" + (f" ({ranges})" if ranges else ""))


# ------------------------------------------------------------------------------------------------------------
# sources: functions of (cfg, modality, path) that return a dict. A new source is a function here and a line
# in SOURCES below. The keys of the dict, of which only items is needed:
#     items           n pictures, texts, sounds or rows of numbers, or what make() makes each of them from
#     make            function of one of items, called in a thread when its turn comes
#     labels, classes (n,) class numbers, and the names of the classes
#     split           (n,) of "train", "val", "test"; a part that does not occur is drawn at random
#     groups          (n,) the speaker of each item, if no speaker may be in two splits;
#                     default_groups=(test, val) are two of them
#     encode          "features" where the items are numbers, which need no encoder of their own
#     skipped         {item: why} of those that make() could not read, for which it returned None

# The letters are all characters with such a name that all twelve typefaces contain: "a", "É", "ế", ...
LETTER = re.compile(r"latin (capital|small) letter ([a-z])( with .*)?")
# No typeface is in two splits: the test asks whether the model reads letters in typefaces it never saw.
FACES = dict(
    train=["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
           "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"],
    val=["DejaVuSerif-Bold", "DejaVuSerif-Italic"],
    test=["DejaVuSerif", "DejaVuSerif-BoldItalic"],
)
SCANS = dict(train=4, val=2, test=2)  # how many scans there are of every letter in every typeface


def typefaces():
    """The typefaces that matplotlib ships: {name: path}."""
    import matplotlib
    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return {face: os.path.join(folder, f"{face}.ttf") for faces in FACES.values() for face in faces}


def common_letters(paths):
    """The letters that all of these typefaces contain -> {character: its Unicode name in lower case}."""
    from matplotlib.ft2font import FT2Font
    charmaps = [set(FT2Font(path).get_charmap()) for path in paths.values()]
    shared = map(chr, sorted(set.intersection(*charmaps)))
    names = {char: unicodedata.name(char, "").lower() for char in shared}
    return {char: name for char, name in names.items() if LETTER.fullmatch(name)}


def letters_source(cfg, modality, _):
    """Latin letters with all their marks: drawn in real typefaces, or described by the Unicode database."""
    letters = common_letters(typefaces())
    if modality == "text":
        return described_documents({name: letter_documents(char) for char, name in letters.items()})
    return printed("letters", cfg, list(letters), list(letters.values()))


def letter_documents(char):
    """What the Unicode database says of a letter: each fact, and every two of them joined."""
    name = unicodedata.name(char).lower()
    case, base, _ = LETTER.fullmatch(name).groups()
    facts = [name, f"{case} {base}"]
    # What it is made of: "ế" is "ê" and an acute; in the end it is "e", a circumflex and an acute.
    one_step = unicodedata.decomposition(char)  # hexadecimal numbers; after a tag <...> they are only similar
    one_step = [] if one_step.startswith("<") else [chr(int(code, 16)) for code in one_step.split()]
    for pieces in (one_step, unicodedata.normalize("NFD", char)):
        if len(pieces) > 1:
            facts.append(" plus ".join(unicodedata.name(piece).lower() for piece in pieces))
    facts += sorted(entity for entity, code in html.entities.name2codepoint.items() if code == ord(char))
    facts = list(dict.fromkeys(facts))  # without repetitions
    return facts + [f"{one}, {other}" for one, other in itertools.permutations(facts, 2)]


def printed(source, cfg, words, classes):
    """Scans of every word in every typeface: what a source returns."""
    scans = []  # (split, typeface, row of the word, number of the scan)
    for part, faces in FACES.items():
        scans += itertools.product([part], faces, range(len(words)), range(SCANS[part]))
    parts, faces, labels, _ = zip(*scans)
    paths, side = typefaces(), cfg["image_size"]

    def make(i):
        """A careless scan (side, side, 1) uint8: place, angle, ink, paper and noise vary."""
        rng = np.random.default_rng([zlib.crc32(f"{source} image {parts[i]}".encode()), i])
        # Drawn four times larger, then averaged. Every word has the same type size, so "o" and "O" differ.
        # The font is opened anew for every scan: two threads must not use one font at the same time.
        font = ImageFont.truetype(paths[faces[i]], int(rng.integers(72, 83)) * side // 32)
        canvas = Image.new("L", (4 * side, 4 * side), 0)
        place = (np.array([0.5, 0.74]) + rng.normal(0, 0.02, 2)) * canvas.width  # the middle of the base line
        ImageDraw.Draw(canvas).text(tuple(place), words[labels[i]], font=font, fill=255, anchor="ms")
        canvas = canvas.rotate(rng.normal(0, 3), Image.Resampling.BILINEAR)  # degrees
        ink = np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float32)[:, :, None] / 255
        paper, black = rng.uniform(190, 255), rng.uniform(0, 90)
        grey = paper + ink * (black - paper) + rng.normal(0, 10, ink.shape)
        return grey.clip(0, 255).astype(np.uint8)

    return dict(items=range(len(scans)), make=make, labels=np.array(labels), classes=classes,
                split=np.array(parts))


def cifar10_source(cfg, modality, _):
    """CIFAR-10 from the official binary archive: 50,000 + 10,000 pictures."""
    path = raw_file(cfg, "cifar10/cifar-10-binary.tar.gz")
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin", "batches.meta.txt"]
    found = read_archive(path, names)
    *batches, classes = [found[name] for name in names]
    records = np.frombuffer(b"".join(batches), np.uint8).reshape(-1, 1 + 3072)  # label, red, green, blue
    pictures = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (n, 32, 32, 3)
    each = len(records) // 6  # pictures in each of the six files
    return dict(items=pictures, labels=records[:, 0].astype(np.int64), classes=classes.decode().split(),
                split=np.repeat(["train", "test"], [5 * each, each]))


def cupl_source(cfg, modality, _):
    """CuPL (Pratt et al. 2022): 97,840 sentences by GPT-3 on the classes of 14 image datasets."""
    described = {}  # {name in its plain form: (name, sentences)}: several datasets have the same class
    for file in registry():
        if file.startswith("cupl/"):
            sentences_of = json.loads(read_text(raw_file(cfg, file)))
            for name, sentences in sentences_of.items():
                described.setdefault(plain_name(name), (name, []))[1].extend(sentences)
    return described_documents(dict(described.values()))


def described_documents(described):
    """{class: [document, ...]} -> what a source returns."""
    counts = np.array([len(documents) for documents in described.values()], int)
    items = np.array(list(itertools.chain(*described.values())), object)
    return dict(items=items, labels=np.repeat(np.arange(len(counts)), counts), classes=list(described))


def plain_name(name):
    """The form in which class names are compared: 'Light_Video ' and 'light-video' are one class.
    An accent may be a character of its own (macOS writes file names so) or part of its letter."""
    return re.sub(r"[\s_-]", "", unicodedata.normalize("NFC", name).casefold())


def file_source(cfg, modality, path, labelled=True):
    """Text from a file, in its order: a document a line, or rows with `text` and perhaps `label`."""
    fields = [cfg["column"] or "text", cfg["label"] or "label"]
    rows = file_rows(path, *fields)
    if rows is None:
        return dict(items=[line.strip() for line in read_text(path).splitlines() if line.strip()])
    if not labelled or not cfg["label"] and not any(fields[1] in row for _, row in rows):
        fields.pop()  # nothing has a class
    found = {field: [] for field in fields}
    for (where, row), field in itertools.product(rows, fields):
        value = row.get(field)
        filled = str("" if value is None else value).strip()
        if not filled or not isinstance(value, str) and (field == fields[0] or type(value) is not int):
            has = f"{textwrap.shorten(filled, 60) or 'nothing'} as" if field in row else "no field"
            there = ", ".join(map(repr, row)) or "none"
            first_line = "; its first line must name them" if path.endswith((".csv", ".tsv")) else ""
            wanted = "text" if field == fields[0] else "class"
            raise UserError(f"{where} has {has} '{field}' (it has {there}{first_line}): put a {wanted} "
                            f"there, or name the right ones with --{modality}_column for texts and "
                            f"--{modality}_label for classes")
        found[field].append(filled.encode(errors="replace").decode())  # half of a character becomes "?"
    texts, *names = found.values()
    if not names:
        return dict(items=texts)
    number = {name: i for i, name in enumerate(dict.fromkeys(names[0]))}  # in the order in which they come
    return dict(items=texts, labels=np.array([number[name] for name in names[0]], int), classes=list(number))


def file_rows(path, column, label):
    """[(where it stands, {field: value})] of .csv or .tsv with a header, of .jsonl or a .json list, or of
    .json {class: [document, ...]} or {class: document}; None for all else, which has a document a line."""
    end, rows = os.path.splitext(path)[1].lower(), []
    if end in (".parquet", ".xlsx", ".xls", ".ods"):
        cure = f"write parquet:{path}" if end == ".parquet" else "save it as .csv"
        raise UserError(f"{path} is no text file: {cure}")
    if end not in (".csv", ".tsv", ".json", ".jsonl"):
        return None
    text = read_text(path)
    if end == ".json":
        with explained(f"{path} is not JSON of the form {{class: [document, ...]}}"):
            found = json.loads(text)
            if not isinstance(found, dict):
                rows = [(f"{path} item {number}", row) for number, row in enumerate(found, 1)]
            else:
                for name, documents in found.items():
                    documents = (documents or [""]) if isinstance(documents, list) else [documents]
                    rows += [(f"{path} class '{name}'", {column: each, label: name}) for each in documents]
    elif end == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                with explained(f"{path} line {number} is not JSON"):
                    rows.append((f"{path} line {number}", json.loads(line)))
    else:
        csv.field_size_limit(2**30)  # documents may be long
        delimiter = max("\t" if end == ".tsv" else ",;\t", key=text.partition("\n")[0].count)
        table = csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True)
        for number in itertools.count(2):
            with explained(f"{path} row {number}"):
                if (row := next(table, None)) is None:
                    break
                if None in row:  # where DictReader puts what is beyond the header
                    raise ValueError("more fields than the header: put a text with a comma in quotes")
                if any((value or "").strip() for value in row.values()):  # spreadsheets leave empty rows
                    rows.append((f"{path} row {number}", row))
    return [(where, row if isinstance(row, dict) else {}) for where, row in rows]


def folder_source(cfg, modality, path):
    """Pictures or recordings: PATH/{train,val,test}/CLASS/*, PATH/CLASS/*, or PATH/* without labels."""
    if not os.path.isdir(path):
        raise UserError(f"there is no folder {path}")
    read, what = dict(image=(read_picture, "image"), audio=(read_recording, "recording"))[modality]
    found = class_files(path) or [("train", "", file) for file in files_in(path, "*")]
    if not found:
        raise UserError(f"folder {path} is empty: expected {what}s in PATH/CLASS/* or PATH/*")
    split, names, files = zip(*found)
    skipped = {}

    def make(file):
        with skipping(cfg, skipped, file, what):
            return read(cfg, file)

    source = dict(items=files, make=make, split=np.array(split), skipped=skipped)
    if any(names):  # else the files lie in PATH itself and have no labels
        classes, labels = np.unique(names, return_inverse=True)
        source.update(labels=labels, classes=classes.tolist())
        if modality == "audio" and cfg["audio_groups"] and "test" not in split:
            source["groups"] = np.array([speaker_of(file, cfg["audio_groups"]) for file in files])
    return source


@contextlib.contextmanager
def skipping(cfg, skipped, name, what):
    """Note an item that cannot be read in skipped {name: why} and go on. Without skip_bad the source is
    refused at the tenth, or by write_splits() once all items are read."""
    try:
        yield
    except UserError as problem:
        skipped[name] = str(problem)
        if not cfg["skip_bad"] and len(skipped) >= 10:
            refuse_bad(skipped, f"10 {what}s or more")


def refuse_bad(skipped, count):
    raise UserError(f"{count} cannot be read: {reasons(skipped, 10)}: remove them, or pass --skip_bad=True")


def reasons(skipped, most=1):
    """{name: why it cannot be read} -> how many of each kind of reason, the first in full, `most` named."""
    kinds = {}  # {what is wrong, without the name and without details: the names}
    for name, why in sorted(skipped.items()):
        kinds.setdefault(why.replace(name, "").split(":")[0], []).append(name)
    found = []
    for names in sorted(kinds.values(), key=len, reverse=True):
        also = f" (also {', '.join(names[1:most])})" if names[1:most] else ""
        found.append(f"{len(names)} like {skipped[names[0]]}{also}")
    return "; ".join(found)


def class_files(path):
    """PATH/{train,val,test}/CLASS/* (val may lack) or PATH/CLASS/* -> [(part, class, file), ...]."""
    inside = [entry.name for entry in os.scandir(path) if entry.is_dir()]
    parts = [part for part in PARTS if part in inside]
    means = {name: PART_OF[name[:2].lower()] for name in inside if SPLIT_WORD.fullmatch(name.lower())}
    misspelt = sorted(means.keys() - set(parts))  # such as Train or validation
    if misspelt and (parts or {"train", "test"} <= set(means.values())):
        raise UserError(f"{os.path.join(path, misspelt[0])} is not read: rename it {means[misspelt[0]]}")
    found, deep = [], []
    for part in parts or [""]:
        for file in files_in(path, part, "*", "*"):
            found.append((part or "train", os.path.basename(os.path.dirname(file)), file))
        for folder in glob.glob(os.path.join(glob.escape(path), part, "*", "")):
            own, below = files_in(folder, "*"), files_in(folder, "*", "**", "*")
            if own and below:
                tell(f"warning: {len(below)} files lie deeper than their class and are not read: {below[0]}")
            elif below:  # all that is in this class, or in PATH/all, lies deeper
                deep += below
            elif not own:
                tell(f"warning: the folder {folder} is empty")
    if deep and (found or len(deep) > len(files_in(path, "*"))):
        top = os.path.commonpath([os.path.dirname(os.path.dirname(file)) for file in deep])
        alone = not found and not parts and os.path.relpath(top, path) != "."
        advice = f"did you mean folder:{top}?" if alone else "move such files up"
        raise UserError(f"{min(deep)} lies too deep, a class is a folder in {os.path.join(path, *parts[:1])} "
                        f"with its files right in it: {advice}")
    if parts and not found:
        raise UserError(f"{os.path.join(path, parts[0])} holds no classes: expected PATH/{parts[0]}/CLASS/*; "
                        "and no class may be called train, val or test")
    classes = [{name for its, name, _ in found if its == part} for part in (*parts, "train", "test")]
    odd = set.union(*classes) - set.intersection(*classes)
    if parts and odd:
        raise UserError(f"{path} must have train/ and test/ (and perhaps val/), all with the same "
                        f"classes, or none of them: they differ in {', '.join(sorted(odd)[:5])}")
    return found


def files_in(path, *pattern):
    """The files that match PATH/PATTERN, without clutter, sorted by folder and name."""
    found = glob.glob(os.path.join(glob.escape(path), *pattern), recursive="**" in pattern)
    found = [file for file in found if os.path.isfile(file) and not is_clutter(os.path.basename(file))]
    return sorted(found, key=os.path.split)


def is_clutter(name):
    """Whether a file is nobody's data: hidden (.name), or what Windows leaves in folders of pictures."""
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini")


def speaker_of(file, pattern):
    """The first group of a regular expression in a file's name; UserError where it does not match."""
    name = os.path.basename(file)
    with explained(f"audio_groups='{pattern}' is no regular expression with a group"):
        found = re.search(pattern, name)
        if found and found[1]:
            return found[1]
    raise UserError(f"audio_groups='{pattern}' finds no speaker in {name}: rename it or change the pattern")


FSDD_SPEAKERS = "george jackson lucas nicolas theo yweweler".split()
DIGITS = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
PAIRS = list(itertools.product(range(10), repeat=2))  # the hundred numbers 00 to 99 as pairs of digits
TAKES = 4  # how many recordings there are of each number by each speaker


def numbers_source(cfg, modality, _):
    """The numbers 00 to 99, class 'three seven': printed in typefaces, in words, or as two spoken digits."""
    classes = [f"{DIGITS[a]} {DIGITS[b]}" for a, b in PAIRS]
    if modality == "image":
        return printed("numbers", cfg, [f"{a}{b}" for a, b in PAIRS], classes)
    if modality == "text":
        return described_documents(dict(zip(classes, itertools.starmap(number_documents, PAIRS))))
    recordings = spoken_digits(cfg)
    takes = list(itertools.product(FSDD_SPEAKERS, range(len(PAIRS)), range(TAKES)))
    speakers, labels, _ = zip(*takes)

    def make(i):
        """Two recordings of ONE speaker, drawn from the fifty of either digit, with a short pause between."""
        rng = np.random.default_rng([zlib.crc32(b"numbers audio"), i])
        names = [f"{digit}_{speakers[i]}_{rng.integers(50)}.wav" for digit in PAIRS[labels[i]]]
        first, second = (read_recording(cfg, io.BytesIO(recordings[name]), name) for name in names)
        pause = np.zeros(int(rng.uniform(0, 0.1) * cfg["audio_rate"]), np.float32)
        return np.concatenate([first, pause, second])

    return dict(items=range(len(takes)), make=make, labels=np.array(labels), classes=classes,
                groups=np.array(speakers), default_groups=("theo", "lucas"))


def number_documents(a, b):
    """How the number with the digits a and b is said and written."""
    first, second, value = DIGITS[a], DIGITS[b], 10 * a + b
    if value < 20:
        word = (DIGITS + TEENS)[value]
    else:
        word = TENS[a - 2] + (f"-{second}" if b else "")
    return [f"{first} {second}", f"{a}{b}", word, f"{first} then {second}", f"first {first}, last {second}",
            f"the code {a} {b}", f"{second} after {first}"]


def spoken_digits(cfg):
    """The Free Spoken Digit Dataset: {"DIGIT_SPEAKER_NUMBER.wav": bytes}, 50 of each digit by six speakers.
    Read from the folder RAW_DIR/fsdd/recordings if there is one, else from the archive, which is fetched."""
    archive = "fsdd/v1.0.10.tar.gz"
    checksum, url = registry()[archive]
    names = sorted(f"{d}_{who}_{i}.wav" for d in range(10) for who in FSDD_SPEAKERS for i in range(50))
    folder = where = os.path.join(cfg["raw_dir"], "fsdd", "recordings")
    if os.path.isdir(folder):
        there = sorted(set(names) & set(os.listdir(folder)))
        found = {name: pathlib.Path(folder, name).read_bytes() for name in there}
    else:
        where = raw_file(cfg, archive)
        found = read_archive(where, names)
    whole = b"".join(name.encode() + found[name] for name in sorted(found))
    if checksum != f"contents:{hashlib.sha256(whole).hexdigest()}":
        raise UserError(f"{where} holds other recordings than the {len(names)} of v1.0.10 (wrong checksum): "
                        f"remove it, and put the recordings/ folder of {url} at {folder}")
    return found


def npz_source(cfg, modality, path):
    """Anything already encoded, made with numpy.savez: `features` (n, D) or (n, T, D), and if known `labels`
    (n,) whole numbers, `classes` (their names), `split` (n,) of train, val, test. Nothing is unpickled."""
    cure = ": make it with numpy.savez(PATH, features=..., labels=...)"
    with explained(f"{path} is not a readable .npz file", cure), np.load(path, allow_pickle=False) as f:
        found = {key: f[key] for key in f.files}

    def must(good, key, what, but=""):
        if not good:
            there = f"none (there are: {', '.join(found)})"
            kind = f"{found[key].dtype} {found[key].shape}" if key in found else there
            raise UserError(f"{path}: `{key}`: expected {what}, found {kind}{but}")

    numbers = found.get("features", np.empty(0))
    is_array = numbers.ndim in (2, 3) and numbers.dtype.kind in "fiu" and numbers.size
    must(is_array, "features", "an array of numbers, (n, D) or (n, T, D)")
    usable = -1e30 < numbers.min() <= numbers.max() < 1e30  # no NaN, and what float32 holds without question
    must(usable, "features", "no NaN, infinite or huge values", ", some of which are")
    n, source = len(numbers), dict(items=numbers, encode="features")
    if "labels" in found:
        source["labels"] = labels = found["labels"]
        whole = labels.shape == (n,) and labels.dtype.kind in "iu"
        must(whole, "labels", f"{n} whole numbers (names go into `classes`)")
        names = found.get("classes", np.arange(min(int(labels.max()), 10**5) + 1)).ravel()
        span = f" from {labels.min()} to {labels.max()}"
        must(0 <= labels.min() and labels.max() < len(names), "labels", f"0 to {len(names) - 1}", span)
        source["classes"] = [str(name) for name in names]
    if "split" in found:
        source["split"] = split = found["split"].astype(str)
        fits = split.shape == (n,) and {"train", "test"} <= set(split) <= set(PARTS)
        must(fits, "split", f"{n} of train, test and perhaps val")
    return source


# ------------------------------------------------------------------------------------------------------------
# Parquet: files as the Hub keeps them, read in order and a row group at a time, so that memory stays flat

SPLIT_WORD = re.compile(r"(?<![a-z])(train|training|val|valid|validation|dev|test|testing|eval)(?![a-z])")
PART_OF = dict(tr="train", va="val", de="val", te="test", ev="test")  # by the first two letters of the word


def parquet_source(cfg, modality, path):
    """A file, or all below a folder; data/validation-00000-of-00002.parquet is of the split 'val'."""
    parquet, folder, files = imported("pyarrow.parquet", "parquet:PATH"), os.path.dirname(path), [path]
    if not os.path.isfile(path):
        folder, files = path, files_in(path, "**", "*.parquet")
    words = [SPLIT_WORD.findall(os.path.relpath(file, folder).lower())[-1:] for file in files]
    parts = [PART_OF[word[0][:2]] if word else None for word in words]
    if "train" not in parts:  # then nothing says what the files are for
        parts = ["train"] * len(files)
    if not files:
        raise UserError(f"{path} is no Parquet file, and no folder that holds *.parquet files")
    if None in parts:
        raise UserError(f"{files[parts.index(None)]} names no split (train, validation, test), where other "
                        "files do: rename it or move it away")
    groups, split, names, classes, known, skipped = [], [], [], {}, {}, {}
    for file, part in zip(files, parts):
        with explained(f"{file} is not a readable Parquet file"), parquet.ParquetFile(file) as opened:
            column, label = parquet_columns(cfg, modality, opened.schema_arrow, file)
            own_names, own_classes = parquet_labels(opened, label, file) if label else ([], [])
            counts = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        groups += [(file, column, i, count) for i, count in enumerate(counts)]
        split += [part] * sum(counts)
        names += own_names
        classes.update(dict.fromkeys(own_classes))  # a set that keeps the order
        known.setdefault(part, set()).update(own_classes)
    odd = set.union(*known.values()) - set.intersection(*known.values())
    if odd or len(names) not in (0, len(split)):
        raise UserError(f"the splits of {path} must have the same classes, or none: they differ in "
                        f"{', '.join(sorted(odd)[:5]) or 'having any'}")

    def make(item):
        name, cell = item
        if modality == "text":
            return (cell or "").strip() or None  # an empty one is left out, as in a text file
        with skipping(cfg, skipped, name, "row"):
            body = cell["bytes"] if isinstance(cell, dict) else cell
            if body is None:
                raise UserError(f"{name} holds no bytes, only {cell}")
            read = dict(image=read_picture, audio=read_recording)[modality]
            return read(cfg, io.BytesIO(body), name=name)

    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name] for name in names]) if names else None
    return dict(items=ParquetRows(groups), make=make, split=np.array(split, "<U5"), skipped=skipped,
                labels=labels, classes=list(classes))


def parquet_columns(cfg, modality, schema, file):
    """The column of the items, by its name or as the only one of its type; that of the classes, or None."""
    types, label = {field.name: str(field.type) for field in schema}, cfg["label"] or "label"
    wanted = "(large_)?string" if modality == "text" else r"(large_)?binary|struct<.*\bbytes: .*"
    fitting = [name for name, kind in types.items() if re.fullmatch(wanted, kind) and name != label]
    column = cfg["column"] or modality
    if column not in types and not cfg["column"] and len(fitting) == 1:
        column = fitting[0]  # such as "img"
    if column not in fitting or cfg["label"] not in ("", *types):
        missing = f"'{label}' of classes" if column in fitting else f"'{column}' of {modality}"
        there = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise UserError(f"{file} has no column {missing}, but {there}: name the right ones with "
                        f"--{cfg['slot']}_column and --{cfg['slot']}_label")
    return column, label if label in types else None


def parquet_labels(opened, label, file):
    """The name of each row's class, and the names of a ClassLabel, or else those that occur."""
    rows = opened.read([label])[label].to_pylist()
    about = json.loads((opened.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    names = about.get("info", {}).get("features", {}).get(label, {}).get("names")
    for row in rows:
        if type(row) not in (int, str) or row == -1 or names and row not in range(len(names)):
            raise UserError(f"{file}: column '{label}' holds {row}, which is no class (on the Hub -1 stands "
                            "for a class that is kept secret)")
    if names:
        return [names[row] for row in rows], names
    return [sys.intern(str(row)) for row in rows], [str(row) for row in sorted(set(rows))]


class ParquetRows:
    """Row i of all files is (its name, its cell). Only the row group that was read last is in memory."""

    def __init__(self, groups):
        self.groups, self.now = groups, None  # groups: (file, column, number within the file, rows)
        self.ends = np.cumsum([count for *_, count in groups])

    def __len__(self):
        return sum(count for *_, count in self.groups)

    def __getitem__(self, row):
        group = int(np.searchsorted(self.ends, row, side="right"))
        file, column, number, count = self.groups[group]
        if group != self.now:
            self.cells = None  # frees the old one before the new one is read
            with explained(f"{file} is not a readable Parquet file"):
                with imported("pyarrow.parquet", file).ParquetFile(file) as opened:
                    self.cells, self.now = opened.read_row_group(number, [column])[column], group
        place = int(row - self.ends[group] + count)
        return f"{file} row group {number} row {place}", self.cells[place].as_py()


SOURCES = {  # source: (function, modalities it can fill)
    "letters": (letters_source, ("image", "text")), "numbers": (numbers_source, ("image", "text", "audio")),
    "cifar10": (cifar10_source, ("image",)), "cupl": (cupl_source, ("text",)),
    "folder": (folder_source, ("image", "audio")), "file": (file_source, ("text",)),
    "npz": (npz_source, tuple(MODALITIES)), "parquet": (parquet_source, ("image", "text", "audio")),
}
WITH_PATH = ("folder", "file", "npz", "parquet")  # these are written SOURCE:PATH

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


def read_picture(cfg, file, channels=3, name=None):
    """Any image file -> (S, S, channels) uint8: upright, on white, resized and cropped or padded.
    With cfg["whole_pictures"], for an encoder that does the rest, a PIL image of the original size."""
    size, whole = cfg["image_size"], cfg.get("whole_pictures")
    with explained(f"{name or file} is not a readable image"), Image.open(file) as picture:
        if not whole:
            picture.draft("RGB", (size, size))  # a JPEG is decoded at a lower resolution if that is enough
        ImageOps.exif_transpose(picture, in_place=True)  # turned as the camera was held
        if picture.mode == "F":
            raise ValueError("it holds floats: save it as 8 or 16 bits")
        if picture.mode.startswith("I"):  # 16-bit greys: 65535 becomes 255
            picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB" if channels == 3 else "L")
        if whole:
            return picture
        if cfg.get("image_fit") == "pad":  # get: a run older than this key has none, and cropped
            sides = [max(1, round(side * size / max(picture.size))) for side in picture.size]
            small = picture.resize(sides, Image.Resampling.BICUBIC)
            picture = Image.new(picture.mode, (size, size), "white")
            picture.paste(small, [(size - side) // 2 for side in sides])
        else:
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(picture).reshape(size, size, channels)


def encode_pictures(cfg, pictures, _):
    """Pictures (S, S, c) uint8 -> {"tokens": (n, T, patch*patch*c)}."""
    pictures = np.stack(pictures)
    if pictures.shape[1] != cfg["image_size"]:
        raise UserError(f"this source needs image_size={pictures.shape[1]}, found {cfg['image_size']}")
    return dict(tokens=patchify(pictures, cfg["patch_size"]))


# ------------------------------------------------------------------------------------------------------------
# text: byte-pair encoding (BPE), trained by rustbpe and run by tiktoken

# What a token never crosses: a word with the space before it, up to three digits, punctuation, white space.
# GPT-4's pattern has a look-ahead besides, which doubles the time.
WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


def train_bpe(documents, vocab_size, folder):
    """Train at most vocab_size tokens; save them as lines of `base64 rank`, the .tiktoken format."""
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(documents, vocab_size=vocab_size, pattern=WORDS)
    lines = [base64.b64encode(bytes(token)) + b" %d\n" % rank for token, rank in bpe.get_mergeable_ranks()]
    write_file(os.path.join(folder, "bpe.tiktoken"), b"".join(lines))
    return load_bpe(folder)


def load_bpe(folder):
    """The tiktoken.Encoding of a text folder. (tiktoken's own loader would keep old tables in a cache.)"""
    path = os.path.join(folder, "bpe.tiktoken")
    with reading(folder):
        lines = map(str.split, read_text(path).splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        all_bytes = all(bytes([byte]) in ranks for byte in range(256))
        if not all_bytes or sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"tokens are missing: {path}")
    return tiktoken.Encoding(name=path, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})


def encode_text(cfg, documents, bpe):
    """Documents -> {"tokens" (n, T) uint16, "lengths" (n,), "item" (n,) the document of each}.
    A document longer than text_length becomes several windows."""
    length, windows, item = cfg["text_length"], [], []
    for i, document in enumerate(documents):
        ids = bpe.encode_ordinary(document)  # no special tokens: '<|endoftext|>' is just these characters
        parts = [ids[start:start + length] for start in range(0, len(ids), length)]
        windows += parts
        item += [i] * len(parts)
    lengths = np.array([len(ids) for ids in windows], np.int32)
    tokens = np.zeros((len(windows), length), np.uint16)
    tokens[real_places(lengths, length)] = np.concatenate(windows)
    return dict(tokens=tokens, lengths=lengths, item=np.array(item, np.int64))


# ------------------------------------------------------------------------------------------------------------
# audio: recordings -> log-mel frames -> tokens (n, T, group*mels) uint8, with the true length in tokens

LOWEST, HIGHEST = -14.0, 8.0  # natural log of power; 255 steps of 0.09, as good for a probe as 16-bit floats
LEVELS_PER_DB = math.log(10) / 10 * 255 / (HIGHEST - LOWEST)  # uint8 levels in a decibel


def levels_of(log_mel):
    """Log-mel numbers -> uint8 levels: LOWEST to HIGHEST becomes 0 to 255."""
    return ((log_mel - LOWEST) / (HIGHEST - LOWEST) * 255).round().clip(0, 255).astype(np.uint8)


def log_mel_of(levels):
    """The inverse of levels_of, up to rounding."""
    return levels / 255 * (HIGHEST - LOWEST) + LOWEST


def read_recording(cfg, file, name=None):
    """What libsndfile reads (WAV, FLAC, OGG, MP3 ...; a path or an open file) -> (k,) float32 at audio_rate,
    no more than audio_frames need. UserError for what is empty, cut short or no recording."""
    name, seconds = name or file, cfg["audio_frames"] / 100 + 0.1
    with explained(f"{name} is not a readable recording"), soundfile.SoundFile(file) as f:
        rate, cut = f.samplerate, "(should be" in f.extra_info  # how libsndfile says that a WAV is cut
        wanted = min(f.frames, int(seconds * rate))
        samples = f.read(wanted, dtype="float32", always_2d=True).mean(1)  # of the channels
    if cut or len(samples) < wanted:
        raise UserError(f"{name} is cut short: its header claims more sound than there is")
    if not np.isfinite(samples).all():
        raise UserError(f"{name} holds values that are not numbers")
    if len(samples) == 0:
        raise UserError(f"{name} is empty: it holds no sound")
    if not samples.any():
        raise UserError(f"{name} begins with {len(samples) / rate:.2f} s of silence, and no more is read: "
                        "trim it, or raise --audio_frames")
    if rate != cfg["audio_rate"]:
        exact = ratio = fractions.Fraction(cfg["audio_rate"], rate)
        if ratio.numerator * ratio.denominator > 10**7:  # size of the filter: 9e7 for 11,127 Hz
            ratio = ratio.limit_denominator(1000)  # no ear hears the difference
        if abs(ratio / exact - 1) > 1e-3:
            raise UserError(f"{name} cannot be resampled from {rate} to {cfg['audio_rate']} Hz: convert it")
        import torch
        from torchaudio.functional import resample
        samples = resample(torch.from_numpy(samples), ratio.denominator, ratio.numerator).numpy()
    return samples[:int(seconds * cfg["audio_rate"])].astype(np.float32)


def encode_recordings(cfg, recordings, _):
    """Sounds (k,) float32 -> {"tokens" (n, T, group*mels) uint8, "lengths" (n,) in tokens, "cut"}.
    cut: how many recordings were longer than audio_frames."""
    import torch
    from torchaudio.transforms import MelSpectrogram
    rate, mels, frames, group = (cfg[f"audio_{key}"] for key in ("rate", "mels", "frames", "group"))
    hop = rate // 100  # samples from one frame to the next: 10 ms
    window = 512 if rate <= 16000 else 2048
    if frames * hop <= window // 2:
        raise UserError(f"audio_frames={frames} is too short: at audio_rate={rate} at least "
                        f"{window // 2 // hop + 1} are needed")
    to_mel = MelSpectrogram(rate, n_fft=window, win_length=hop * 5 // 2, hop_length=hop, n_mels=mels)
    padded = np.zeros((len(recordings), frames * hop), np.float32)  # with silence
    for row, recording in zip(padded, recordings):
        row[:len(recording)] = recording[:frames * hop]
    log_mel = to_mel(torch.from_numpy(padded)).clamp_min(1e-6).log()  # (n, mels, frames + 1)
    levels = levels_of(log_mel[:, :, :frames].transpose(1, 2).numpy())  # (n, frames, mels)
    real = np.array([min(frames, math.ceil(len(recording) / hop)) for recording in recordings])
    levels[~real_places(real, frames)] = 0
    tokens = levels.reshape(len(levels), frames // group, group * mels)
    cut = sum(len(recording) > frames * hop for recording in recordings)
    return dict(tokens=tokens, lengths=np.ceil(real / group).astype(np.int32), cut=cut)


def encode_features(cfg, numbers, _):
    """Numbers (D,) or (T, D) -> {"tokens": (n, 1 or T, D) float32}."""
    numbers = np.asarray(numbers, np.float32)
    return dict(tokens=numbers[:, None] if numbers.ndim == 2 else numbers)


# ------------------------------------------------------------------------------------------------------------
# pretrained encoders: timm's for pictures, transformers' for texts and recordings. Their weights are read as
# safetensors, never unpickled, and no code that comes with them is run.

ENCODER_FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")
sha256_since = functools.lru_cache(lambda file, changed: file_sha256(file))  # once, until the file changes


def encoder_folder(spec):
    """'timm:NAME_OR_PATH' or 'hf:NAME_OR_PATH' -> a folder with config.json and weights; names fetched."""
    library, _, name = spec.partition(":")
    folder = name if os.path.isdir(name) else fetched_encoder(spec, library, name)
    key = dict(timm="architecture", hf="model_type")[library]
    for pattern in "config.json", "model*.safetensors":
        if not files_in(folder, pattern):
            raise UserError(f"{spec}: {folder} lacks {pattern}, which save_for_hf and save_pretrained write")
    with explained(f"{spec} is no model of {library}: {folder}/config.json must have '{key}'"):
        read_json(os.path.join(folder, "config.json"))[key]
    return folder


@functools.lru_cache  # asked once a process
def fetched_encoder(spec, library, name):
    """The folder where the hub's own client keeps a model: fetched, or from its cache without a network."""
    if library == "timm" and "/" not in name:
        with explained(f"{spec} is neither a folder nor a model of timm"):
            name = imported("timm", spec).get_pretrained_cfg(name, allow_unregistered=False).hf_hub_id
    hub, cure = imported("huggingface_hub", spec), ": check the name, or give the folder that holds it"
    with explained(f"{spec} is no folder, and cannot be fetched from huggingface.co", cure):
        return hub.snapshot_download(name, allow_patterns=ENCODER_FILES, ignore_patterns="*/*")


def encoder_sha256(spec):
    """The checksum of an encoder's configuration, vocabulary and weights, wherever they lie."""
    files = [file for pattern in ENCODER_FILES for file in files_in(encoder_folder(spec), pattern)]
    sums = [(os.path.basename(file), sha256_since(file, os.path.getmtime(file))) for file in files]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def open_timm(spec):
    """A timm model without its classifier -> (net, what it takes to build it again and to feed it)."""
    timm, folder = imported("timm", spec), encoder_folder(spec)
    config = read_json(os.path.join(folder, "config.json"))
    with explained(f"{spec} is no model that timm reads"):
        net = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).float().eval()
        with imported("safetensors", spec).safe_open(f"{folder}/model.safetensors", "pt") as stored:
            check_weights(net, net.state_dict().keys() - stored.keys())
        data = timm.data.resolve_model_data_config(net)
    fixed = bool(net.pretrained_cfg.get("fixed_input_size"))
    arguments = dict(in_chans=data["input_size"][0], global_pool=net.pretrained_cfg.get("global_pool"),
                     img_size=list(data["input_size"][1:]) if fixed else None) | config.get("model_args", {})
    arguments = {key: value for key, value in arguments.items() if key != "num_classes" and value is not None}
    return net, dict(architecture=config["architecture"], arguments=arguments, mean=list(data["mean"]),
                     std=list(data["std"]), size=data["input_size"][1], fixed_size=fixed)


def open_hf(spec):
    """A transformers model -> (model, its tokenizer or None, its configuration)."""
    transformers, folder, tokenizer = imported("transformers", spec), encoder_folder(spec), None
    transformers.logging.set_verbosity_error()  # what is missing, check_weights() says
    transformers.logging.disable_progress_bar()
    how = dict(trust_remote_code=False, local_files_only=True)
    with explained(f"{spec} is no model that transformers reads"):
        model, report = transformers.AutoModel.from_pretrained(folder, use_safetensors=True,
                                                               output_loading_info=True, **how)
        check_weights(model, report["missing_keys"])
    if files_in(folder, "tokenizer*.json") or files_in(folder, "vocab*"):
        with contextlib.suppress(Exception):  # what reads recordings may have a useless one
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **how)
    return model.float().eval(), tokenizer, model.config.to_dict()


def check_weights(model, missing):
    """Both libraries fill missing weights at random. A few may be missing (a pooler); if more than half are,
    the file belongs to another model."""
    if len(missing) > len(model.state_dict()) / 2:
        raise ValueError("the weights are of another architecture than config.json says")


# Each of these returns make(item), which threads call, and encode(items) -> dict(tokens (n, T, D), perhaps
# real (n, T), False for padding). keep: all tokens are wanted. They may change cfg before a source reads it.


def picture_encoder(cfg, spec, keep, device):
    """Pictures in the size, crop, mean and std of the encoder."""
    import torch
    net, about = open_timm(spec)
    from timm.data import create_transform, resolve_model_data_config
    change = create_transform(**resolve_model_data_config(net.to(device)))
    cfg["whole_pictures"] = True

    def make(picture):
        if isinstance(picture, np.ndarray):  # (S, S, 1 or 3) uint8
            picture = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
        return change(picture.convert("L" if about["arguments"]["in_chans"] == 1 else "RGB"))

    def encode(pictures):
        pixels = torch.stack(pictures).to(device)
        tokens = net.forward_features(pixels) if keep else net(pixels)[:, None]
        if tokens.ndim == 4:  # a map (n, D, H, W) or (n, H, W, D) becomes H W tokens
            tokens = tokens if getattr(net, "output_fmt", "") == "NHWC" else tokens.permute(0, 2, 3, 1)
            tokens = tokens.flatten(1, 2)
        return dict(tokens=tokens)

    return make, encode


def text_encoder(cfg, spec, keep, device):
    """Texts, cut where the encoder ends, or at text_length where all tokens are kept."""
    model, tokenizer, _ = open_hf(spec)
    if tokenizer is None or model.main_input_name != "input_ids":
        about = "no tokenizer" if tokenizer is None else "a tokenizer"
        raise UserError(f"{spec} reads no texts: it takes {model.main_input_name} and has {about}")
    model = (model.get_encoder() if model.config.is_encoder_decoder else model).to(device)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "right"
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512),
                  cfg["text_length"] if keep else math.inf)

    def encode(texts):
        batch = tokenizer(texts, max_length=longest, padding="max_length" if keep else "longest",
                          truncation=True, return_tensors="pt").to(device)
        return dict(tokens=model(**batch).last_hidden_state, real=batch["attention_mask"].bool())

    return (lambda text: text), encode


def audio_encoder(cfg, spec, keep, device):
    """Recordings at the encoder's own rate; one by one, since padding would change what many of them hear."""
    import torch
    model, _, _ = open_hf(spec)
    if model.main_input_name not in ("input_values", "input_features"):
        raise UserError(f"{spec} reads no recordings: it takes {model.main_input_name}")
    with explained(f"{spec} lacks a feature extractor"):
        extractor = imported("transformers", spec).AutoFeatureExtractor.from_pretrained(
            encoder_folder(spec), trust_remote_code=False, local_files_only=True)
        rate = cfg["audio_rate"] = extractor.sampling_rate
    model = (model.get_encoder() if model.config.is_encoder_decoder else model).to(device)
    most = cfg["audio_frames"] * rate // 100  # samples

    def frames(recording):
        """(k,) -> (T, D), without those of the silence that some extractors pad with."""
        batch = extractor(recording, sampling_rate=rate, return_attention_mask=True, return_tensors="pt")
        hidden = model(**batch.to(device)).last_hidden_state[0]
        share = batch["attention_mask"].float().mean().item() if "attention_mask" in batch else 1
        return hidden[:math.ceil(share * len(hidden))]

    def encode(recordings):
        found = [frames(recording[:most]) for recording in recordings]
        longest = [frames(np.ones(most, np.float32))] if keep else []  # T is the same for all chunks
        tokens = torch.nn.utils.rnn.pad_sequence(found + longest, batch_first=True)[:len(found)]
        lengths = torch.tensor([len(each) for each in found], device=device)
        return dict(tokens=tokens, real=torch.arange(tokens.shape[1], device=device) < lengths[:, None],
                    cut=sum(len(recording) > most for recording in recordings))

    return (lambda recording: recording), encode


PRETRAINED = dict(image=picture_encoder, text=text_encoder, audio=audio_encoder)


def open_encoder(cfg, slot):
    """make(item) and encode(cfg, items, _) of a slot's pretrained encoder, on a GPU if there is one."""
    import torch
    if modality_of(slot) not in PRETRAINED:
        raise UserError(f"{slot}_encoder: there are encoders of {', '.join(PRETRAINED)} only: leave it empty")
    spec, keep = cfg[f"{slot}_encoder"], cfg[f"{slot}_encoder_tokens"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make, encode = PRETRAINED[modality_of(slot)](cfg, spec, keep, device)

    @torch.inference_mode()
    def arrays_of(_, items, __):
        with explained(f"{spec} cannot encode what {slot}={cfg[slot]} holds"):
            arrays = encode(list(items))
        tokens, real = arrays["tokens"], arrays.pop("real", None)
        if real is not None:
            tokens, lengths = tokens * real[:, :, None], real.sum(1)
            if keep:
                arrays["lengths"] = lengths.cpu().numpy().astype(np.int32)
            else:  # the mean of the real ones
                tokens = tokens.sum(1, keepdim=True) / lengths[:, None, None]
        return arrays | dict(tokens=tokens.float().cpu().numpy())

    return make, arrays_of


# ------------------------------------------------------------------------------------------------------------
# prepare: one slot's source -> its shard folder

ENCODERS = dict(image=encode_pictures, text=encode_text, audio=encode_recordings, features=encode_features)
CHUNK = 64  # items that a thread makes and encodes at a time
SPEAKER_KEYS = ("audio_groups", "audio_test_group", "audio_val_group")
# The keys that decide the bytes of a modality's shards, besides those that every modality has.
MADE_BY = dict(image=("image_size", "patch_size"), text=("text_length", "vocab_size"),
               audio=("audio_rate", "audio_mels", "audio_frames", "audio_group", *SPEAKER_KEYS))
# The code of every function, without comments; read now, because what runs must not notice a later edit.
with open(__file__, encoding="utf-8") as own_file:
    OWN_CODE = {node.name: ast.unparse(node) for node in ast.parse(own_file.read()).body
                if isinstance(node, ast.FunctionDef)}


def prepare(cfg, slot, say=tell):
    """Make one slot's shards unless they exist -> their folder; a UserError leaves nothing half-written."""
    folder, made_from = shard_folder(cfg, slot)
    meta_path = os.path.join(folder, "meta.json")
    if not os.path.exists(meta_path):
        lock = os.path.join(cfg["data_dir"], f".{os.path.basename(folder)}.lock")
        with locked(lock, f"another process is preparing {slot}={cfg[slot]}", wait=True):
            if not os.path.exists(meta_path):  # the process we waited for may have made it
                make_shards(cfg, slot, folder, made_from, say)
    elif cfg["verify"]:
        verify_shards(folder, read_meta(folder))
        say(f"{describe(folder)}; checksums right")
    return folder


def shard_folder(cfg, slot):
    """(folder of a slot's shards, all that decides their bytes, whose hash ends the folder's name)."""
    modality, name, path = parse_source(cfg, slot)
    keys = (*MADE_BY.get(modality, ()), "val_fraction", "skip_bad", "shard_mb")
    made_from = dict(format=FORMAT, modality=modality, source=cfg[slot], **{key: cfg[key] for key in keys})
    if path:  # the user's own files: names, sizes and times, so that a changed folder is prepared anew
        files = sorted(os.path.join(inside, file) for inside, _, names in os.walk(path, followlinks=True)
                       for file in names if not is_clutter(file)) or [path]
        listing = [(f, os.path.getsize(f), os.path.getmtime(f)) for f in files if os.path.exists(f)]
        made_from["files"] = hashlib.sha256(repr(listing).encode()).hexdigest()
    if modality == "image" and cfg.get("image_fit", "crop") != "crop":  # so that older ones keep their names
        made_from["image_fit"] = cfg["image_fit"]
    if name in ("parquet", "file"):
        made_from.update({key: cfg[f"{slot}_{key}"] for key in ("column", "label")})
    if spec := cfg[f"{slot}_encoder"]:
        made_from["encoder"] = [encoder_sha256(spec), cfg[f"{slot}_encoder_tokens"]]
    # An edited source makes new shards. An edit of a function that it calls is not noticed: raise FORMAT.
    made_from["code"] = hashlib.sha256(OWN_CODE[SOURCES[name][0].__name__].encode()).hexdigest()
    if name in ("letters", "numbers"):  # drawn with the typefaces and the Unicode data that are installed
        import matplotlib
        faces = f"matplotlib {matplotlib.__version__}, FreeType {features.version('freetype2')}"
        made_from["version"] = f"{faces}, Unicode {unicodedata.unidata_version}"
    hash8 = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:8]
    label = re.sub(r"\W+", "-", f"{name}-{os.path.basename(path.rstrip('/'))}").strip("-")
    return os.path.join(cfg["data_dir"], f"{modality}-{label}-{hash8}"), made_from


def parse_source(cfg, slot):
    """'folder:/my/images' in the image slot -> ("image", "folder", "/my/images"); UserError if it is none."""
    modality, source = modality_of(slot), cfg[slot]
    name, _, path = source.partition(":")
    fitting = {known: f"{known}:PATH" if known in WITH_PATH else known
               for known, (_, modalities) in SOURCES.items() if modality in modalities}
    if name in fitting and bool(path) == (name in WITH_PATH):
        return modality, name, path
    near = [fitting[known] for known in difflib.get_close_matches(name, fitting, n=1)]
    if os.path.exists(source):
        end = os.path.splitext(source)[1][1:].lower()
        kind = end if end in fitting else "file" if modality == "text" else "folder"
        near = [f"{kind}:{source}"]
    advice = f", did you mean '{near[0]}'?" if near else ""
    known = ", ".join(fitting.values())
    raise UserError(f"{slot}='{source}' is no source of {modality}{advice} (there are {known})")


def make_shards(cfg, slot, folder, made_from, say):
    """Run a source, split its items, encode them chunk by chunk and write the shards to folder."""
    start = time.perf_counter()
    modality, name, path = parse_source(cfg, slot)
    column, label = cfg[f"{slot}_column"], cfg[f"{slot}_label"]
    if name == "file" and column and column == (label or "label"):
        raise UserError(f"{slot}_column and {slot}_label are both '{column}': texts and their classes need a "
                        "column each")
    for whole, part in (("image_size", "patch_size"), ("audio_frames", "audio_group")):
        if whole in MADE_BY.get(modality, ()) and cfg[whole] % cfg[part] and not cfg[f"{slot}_encoder"]:
            raise UserError(f"{whole}={cfg[whole]} is not a multiple of {part}={cfg[part]}")
    source = dict(make=lambda item: item, labels=None, classes=[], encode=modality, skipped={})  # defaults
    cfg = dict(cfg, slot=slot, column=column, label=label)
    encoder = open_encoder(cfg, slot) if cfg[f"{slot}_encoder"] else None
    source.update(SOURCES[name][0](cfg, modality, path))
    if encoder:
        if source["encode"] == "features":
            raise UserError(f"{slot}={cfg[slot]} holds features already: leave {slot}_encoder empty")
        read, (change, encode) = source["make"], encoder
        source.update(encode="features", encoder=encode,
                      make=lambda item: None if (made := read(item)) is None else change(made))
    say(f"preparing {slot}={cfg[slot]} in {folder}")
    split = draw_splits(cfg, slot, source, say)
    meta = dict(format=FORMAT, modality=modality, made_from=made_from, classes=source["classes"])
    making = f"{folder}.tmp"
    shutil.rmtree(making, ignore_errors=True)  # left by a killed process; thanks to the lock nobody is in it
    os.mkdir(making)
    try:
        meta.update(write_splits(cfg, making, source, split, say))
        write_json(os.path.join(making, "meta.json"), dict(meta, sha256=meta_sha256(meta)))
        shutil.rmtree(folder, ignore_errors=True)  # what is left of a folder without meta.json
        os.replace(making, folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    say(f"{describe(folder)}; {time.perf_counter() - start:.1f} s")


def draw_splits(cfg, slot, source, say):
    """(n,) array of "train", "val", "test": as the source says, by speaker, or drawn at random."""
    labels, n = source["labels"], len(source["items"])
    split = source.get("split", np.full(n, "train")).astype("<U5")
    if "groups" in source:
        draw_groups(cfg, slot, source["groups"], source.get("default_groups"), split)
        held_out = (f"{part}: {source['groups'][split == part][0]}" for part in ("test", "val"))
        say(f"{slot} is split by speaker, {', '.join(held_out)}")
    elif modality_of(slot) == "audio" and any(cfg[key] for key in SPEAKER_KEYS):
        raise UserError(f"{slot}={cfg[slot]} cannot be split by speaker, that needs PATH/CLASS/* folders and "
                        f"--audio_groups: leave {', '.join(SPEAKER_KEYS)} empty to have it split at random")
    own_test = "test" in split
    for part, seed in ("test", 1), ("val", 0):
        if part not in split:
            free = split == "train"
            drawn = draw_share(labels, free, cfg["val_fraction"], seed)
            if not drawn.any() and own_test:  # under three of every class are left: a share of all
                drawn = draw_share(None, free, cfg["val_fraction"], seed)
            elif not drawn.any() and part == "val" and labels is not None:  # a third item went to test
                gave = np.isin(labels, labels[split == "test"])
                drawn = draw_share(labels, free & gave, cfg["val_fraction"], seed, least=2)
            split[drawn] = part
    if labels is not None and "test" not in split and len(np.unique(labels)) > 1:
        say(f"{slot} has one or two items of every class: all are for training, an auxiliary needs no others")
    elif missing := [part for part in PARTS if part not in split]:
        raise UserError(f"{slot}={cfg[slot]}: too few items ({n}) for a {missing[0]} split at "
                        f"val_fraction={cfg['val_fraction']}: give more, or another --val_fraction")
    return split


def draw_share(labels, free, fraction, seed, least=3):
    """(n,) bool: about `fraction` of the items that are free (n,) bool, the same share of every class that
    has `least` of them."""
    rng, drawn = np.random.default_rng([seed]), np.zeros(len(free), bool)
    labels = np.zeros(len(free)) if labels is None else labels
    for label in np.unique(labels[free]):
        rows = np.flatnonzero(free & (labels == label))
        if len(rows) >= least:
            drawn[rng.permutation(rows)[:max(1, round(fraction * len(rows)))]] = True
    return drawn


def draw_groups(cfg, slot, groups, default, split):
    """Mark in split (n,) the test and the val speaker: as the config says, else the source, else by name."""
    speakers = sorted(set(groups.tolist()))
    there = f"{slot}={cfg[slot]} has {', '.join(speakers)}"
    chosen = dict(zip(("test", "val"), default or speakers))
    for part in chosen:
        key = f"audio_{part}_group"
        if re.fullmatch(r"#\d+", cfg[key]):  # #0 is the first by name; after the last comes the first again
            chosen[part] = speakers[int(cfg[key][1:]) % len(speakers)]
        elif cfg[key]:
            chosen[part] = cfg[key]
        if chosen[part] not in speakers:
            raise UserError(f"{key}='{chosen[part]}' is not there: {there}")
        split[groups == chosen[part]] = part
    if len(set(split)) < 3:
        both = " and ".join(chosen.values())
        raise UserError(f"a split by speaker needs three: test and val ({both}), and others: {there}")


def write_splits(cfg, folder, source, split, say):
    """Encode and write the items of every split -> what meta.json says of the tokens, arrays and files."""
    encode, bpe, info = source["encode"], None, dict(kind="continuous", splits={})
    if encode == "text":
        texts = (source["make"](source["items"][row]) for row in np.flatnonzero(split == "train"))
        bpe = train_bpe(filter(None, texts), cfg["vocab_size"], folder)
        info.update(kind="discrete", vocab=bpe.n_vocab, bpe_sha256=file_sha256(bpe.name))
    elif encode == "image":
        info["patch"] = cfg["patch_size"]
    elif encode == "audio":
        info["mels"] = cfg["audio_mels"]
    sums, cut, skipped = 0, 0, source["skipped"]
    with tqdm(total=len(split), desc=f"encoding {encode}", disable=None, leave=False) as bar:
        for part in PARTS:
            rows, files = np.flatnonzero(split == part), {}
            if not len(rows):  # too few items to split: Slot.check() refuses this source as a target
                info["held_out"], info["splits"][part] = False, info["splits"].get("train")
                continue
            for arrays in encoded_chunks(cfg, source, rows, bpe, bar):
                cut += arrays.pop("cut", 0)
                if part == "train" and bpe is None:  # nothing of val or test may reach the model
                    # a mean for each mel band, each colour, or each number of a token
                    period = info.get("mels") or arrays["tokens"].shape[-1] // info.get("patch", 1)**2
                    sums = sums + token_sums(arrays["tokens"], arrays.get("lengths"), period)
                info["arrays"] = {name: dict(dtype=array.dtype.name, shape=list(array.shape[1:]))
                                  for name, array in arrays.items()}
                append(folder, part, arrays, files, cfg["shard_mb"] * 2**20)
            if skipped and not cfg["skip_bad"]:
                continue  # to the other bad ones: refused below
            if not files:
                raise UserError(f"none of the {len(rows)} items for the {part} split is readable: "
                                f"{reasons(skipped) or 'all are empty'}")
            for shard in itertools.chain(*files.values()):
                path = os.path.join(folder, shard["file"])
                with writing(path), open(path, "rb+") as f:
                    os.fsync(f.fileno())
                shard["sha256"] = file_sha256(path)
            info["splits"][part] = dict(count=sum(shard["count"] for shard in files["tokens"]), files=files)
    if skipped and not cfg["skip_bad"]:
        refuse_bad(skipped, f"{len(skipped)} of {len(split)}")
    if skipped:
        say(f"skipped {len(skipped)} of {len(split)}: {reasons(skipped)}")
    if cut:
        say(f"cut {cut} of {len(split)} recordings at audio_frames={cfg['audio_frames']}")
    if bpe is None:
        count, total, squares = sums
        variance = np.maximum(squares / count - (total / count)**2, 0)
        lift = 1e-3 if info["arrays"]["tokens"]["dtype"] == "uint8" else 1e-6  # so that no std is 0
        info.update(mean=(total / count).tolist(), std=(np.sqrt(variance) + lift).tolist())
    return info


def encoded_chunks(cfg, source, rows, bpe, bar):
    """encode_chunk() of rows, CHUNK at a time, in their order; threads work no more than a few ahead."""
    workers, running = cfg["workers"] or os.cpu_count(), []
    pool = concurrent.futures.ThreadPoolExecutor(workers)  # decoding and drawing release Python's lock
    try:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start:start + CHUNK]
            items = [source["items"][row] for row in chunk]  # here and in order: Parquet is read only once
            running.append(pool.submit(encode_chunk, cfg, source, chunk, items, bpe))
            ahead = workers + 2 if start + CHUNK < len(rows) else 0
            while len(running) > ahead:
                count, arrays = running.pop(0).result()
                bar.update(count)
                if source["skipped"] and not cfg["skip_bad"]:
                    continue  # it will be refused: only other bad ones are still looked for
                if arrays and "encoder" in source:
                    arrays = encode_made(cfg, source, arrays, bpe)
                if arrays:
                    yield arrays
    finally:
        pool.shutdown(cancel_futures=True)  # a bad item or Ctrl-C waits only for the chunks at work


def encode_chunk(cfg, source, rows, items, bpe):
    """Make and encode the items of rows -> how many these are, and their arrays {name: (k, ...)}.
    With a pretrained encoder, which the main thread runs, [(row, item)] comes back instead of arrays."""
    made = [(row, source["make"](item)) for row, item in zip(rows, items)]
    made = [(row, item) for row, item in made if item is not None]  # None: it was skipped
    if made and "encoder" not in source:
        return len(rows), encode_made(cfg, source, made, bpe)
    return len(rows), made


def encode_made(cfg, source, made, bpe):
    """[(row, item)] -> {name: (k, ...)}: the tokens, and labels where the source has them."""
    kept, items = zip(*made)
    arrays = source.get("encoder", ENCODERS[source["encode"]])(cfg, items, bpe)
    of_item = np.array(kept)[arrays.pop("item", slice(None))]  # a text may have become several rows
    if source["labels"] is not None:
        arrays["labels"] = source["labels"][of_item].astype(np.int32)
    return arrays


def token_sums(tokens, lengths, period):
    """(3, period): count, sum and sum of squares of real tokens (k, T, D); padding does not count.
    period: numbers i and i + period of a token are the same quantity: 3 for colours, 40 for mel bands."""
    if lengths is not None:
        tokens = tokens[real_places(lengths, tokens.shape[1])]
    flat = tokens.reshape(-1, tokens.shape[-1])  # (k T, D); a copy in float64 would be eight times as large
    squares = np.einsum("nd,nd->d", flat, flat, dtype=np.float64)
    sums = [np.full(len(squares), len(flat)), flat.sum(0, dtype=np.float64), squares]
    return np.reshape(sums, (3, -1, period)).sum(1)


def append(folder, part, arrays, files, shard_bytes):
    """Append a chunk's arrays {name: (k, ...)} to a split's files {name: [dict(file, count), ...]}.
    All arrays are cut at the same rows: where the tokens fill a shard."""
    most = max(1, shard_bytes // max(1, arrays["tokens"][:1].nbytes))  # rows in a shard
    for name, array in arrays.items():
        stem, shards = part if name == "tokens" else f"{part}_{name}", files.setdefault(name, [])
        while len(array):
            if not shards or shards[-1]["count"] == most:
                shards.append(dict(file=f"{stem}_{len(shards):03d}.bin", count=0))
            shard = shards[-1]
            fits, array = np.split(array, [most - shard["count"]])
            path = os.path.join(folder, shard["file"])
            with writing(path), open(path, "ab") as f:
                f.write(fits.tobytes())
            shard["count"] += len(fits)


def describe(folder):
    """The one line of counts a reader should see after prepare."""
    meta = read_meta(folder)
    tokens = meta["arrays"]["tokens"]
    parts = PARTS if meta.get("held_out", True) else ["train"]
    counts = ", ".join(f"{meta['splits'][part]['count']:,} {part}" for part in parts)
    shape = " x ".join(map(str, tokens["shape"]))
    vocab = f", {meta['vocab']:,} BPE tokens" if "vocab" in meta else ""
    return f"{folder}: {counts} items of {shape} {tokens['dtype']}, {len(meta['classes'])} classes{vocab}"


# ------------------------------------------------------------------------------------------------------------
# shards: flat arrays on disk, described and checksummed by meta.json


def reading(folder):
    """Whatever goes wrong within, while a shard folder is read, becomes one sentence that says what to do."""
    return explained(f"{folder} is damaged", ": delete it to prepare it again")


def meta_sha256(meta):
    """The checksum of meta.json, which stands in meta.json itself: so any damage shows at the first read."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def read_meta(folder):
    """meta.json of a shard folder; UserError if it is damaged or of another FORMAT."""
    with reading(folder):
        meta = read_json(os.path.join(folder, "meta.json"))
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']!r} where this code reads {FORMAT}")
        if meta.pop("sha256") != meta_sha256(meta):
            raise ValueError("wrong checksum: meta.json")
    return meta


def verify_shards(folder, meta):
    """Compare every file with its checksum: a flipped bit does not show in the sizes that Shards checks."""
    with reading(folder):
        sums = {"bpe.tiktoken": meta["bpe_sha256"]} if "vocab" in meta else {}
        for split in meta["splits"].values():
            for shard in itertools.chain(*split["files"].values()):
                sums[shard["file"]] = shard["sha256"]
        for file, sha256 in sums.items():
            if file_sha256(os.path.join(folder, os.path.basename(file))) != sha256:
                raise ValueError(f"wrong checksum: {file}")


class Shards:
    """One array over all its shard files, e.g. tokens (n, T, D); the files stay on disk (np.memmap)."""

    def __init__(self, folder, files, dtype, shape):
        self.dtype, self.row_shape, self.maps = np.dtype(dtype), tuple(shape), []
        if self.dtype.kind not in "iuf":  # whole numbers with or without sign, floats; never objects
            raise ValueError(f"numbers of dtype {dtype}")
        for entry in files:
            path = os.path.join(folder, os.path.basename(entry["file"]))  # basename: nothing outside is read
            found, wanted = os.path.getsize(path), entry["count"] * self.dtype.itemsize * math.prod(shape)
            if found != wanted:
                raise ValueError(f"{path} has {found} bytes where meta.json says {wanted}")
            self.maps.append(np.memmap(path, self.dtype, "r", shape=(entry["count"], *shape)))
        self.starts = np.cumsum([0] + [len(m) for m in self.maps])  # the first row of each file

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, rows):
        """rows: (k,) integer array -> (k, *shape) array in memory; one read per shard touched."""
        if len(self.maps) == 1:
            return self.maps[0][rows]
        out = np.empty((len(rows), *self.row_shape), self.dtype)
        which = np.searchsorted(self.starts, rows, side="right") - 1  # (k,) the file of each row
        for i in np.unique(which):
            out[which == i] = self.maps[i][rows[which == i] - self.starts[i]]
        return out


def load_split(folder, split):
    """One split of a shard folder: {"tokens": Shards, and perhaps "labels", "lengths": (n,) int32}."""
    meta, arrays = read_meta(folder), {}
    with reading(folder):
        for name, files in meta["splits"][split]["files"].items():
            shards = Shards(folder, files, **meta["arrays"][name])
            arrays[name] = shards if name == "tokens" else shards[np.arange(len(shards))]
        ranges = dict(labels=(0, len(meta["classes"]) - 1), lengths=(1, arrays["tokens"].row_shape[0]))
        for name, (low, high) in ranges.items():
            if name in arrays and not low <= arrays[name].min() <= arrays[name].max() <= high:
                raise ValueError(f"{split} {name} are not all {low} to {high}")
    return arrays


def real_places(lengths, length):
    """The padding mask: lengths (n,) -> (n, length) bool, True for real tokens and False for padding."""
    return np.arange(length) < np.asarray(lengths)[:, None]


# ------------------------------------------------------------------------------------------------------------
# files: written under a temporary name and moved into place, so that a reader finds the whole file or none


@contextlib.contextmanager
def writing(path):
    """A full disk or a folder without permission becomes one sentence."""
    try:
        yield
    except OSError as problem:
        cure = "make room there, or choose another folder"
        raise UserError(f"cannot write {path} ({problem.strerror or problem}): {cure}") from None


def write_file(path, data):
    """Put bytes into a file; an old one stays as it is until the new one is whole and on the disk."""
    with writing(path):
        try:
            with open(path + ".tmp", "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(path + ".tmp", path)
        finally:
            pathlib.Path(path + ".tmp").unlink(missing_ok=True)  # left where something went wrong


def write_json(path, value):
    """Write a value as JSON, whole or not at all."""
    write_file(path, json.dumps(value, indent=1).encode())


def read_json(path):
    """The JSON of a file; ValueError where it is none, or larger than anything we write."""
    with open(path, "rb") as f:
        return json.loads(f.read(2**26))


def read_text(path, what=""):
    """The text of a UTF-8 file, with or without a byte-order mark."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            return f.read()
    except UnicodeDecodeError as problem:
        # spreadsheets write both
        coding = "utf-16" if problem.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        cure = f"convert it with `iconv -f {coding} -t utf-8`"
        raise UserError(f"{path} is not UTF-8 (byte {problem.start}): {cure}") from None
    except (OSError, ValueError) as problem:  # ValueError: a name with a NUL in it
        raise UserError(f"cannot read {what}{path} ({getattr(problem, 'strerror', problem)})") from None


@contextlib.contextmanager
def locked(path, busy, wait=False):
    """Hold a lock file. If another process holds it, say `busy` and wait, or refuse. A kill releases it."""
    with writing(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "ab").close()  # filelock would take one that it may not make for one that is held
        lock = filelock.FileLock(path)
        try:
            held = lock.acquire(timeout=0)
        except filelock.Timeout:
            if not wait:
                raise UserError(busy) from None
            tell(f"{busy}: waiting for it")
            held = lock.acquire()
    with held:
        yield


def peak_memory():
    """The most bytes this process has held (mapped shards included); None where nobody counts them."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def registry():
    """{"SOURCE/NAME": (checksum, address)} of all files that can be fetched, in the order of registry.txt."""
    listed = pooch.create(path="", base_url="")
    listed.load_registry(REGISTRY)
    return {name: (checksum, listed.urls[name]) for name, checksum in listed.registry.items()}


def raw_file(cfg, name):
    """Path of RAW_DIR/SOURCE/NAME for a `name` in the registry, fetched if it is missing. Only a whole
    file with the right checksum gets there; "contents:..." is for the source to check, which looks inside."""
    checksum, url = registry()[name]
    known = None if checksum.startswith("contents:") else f"sha256:{checksum}"
    path = os.path.join(cfg["raw_dir"], name)
    way_out = (f"put the file from {url} ({known or 'no checksum'}) at {path} by hand, name the folder it "
               "lies under with --raw_dir=FOLDER, or run the offline config sample_configs/letters_text.py")
    if os.path.exists(path):
        if known and (found := file_sha256(path)) != checksum:
            raise UserError(f"wrong checksum: {path} has sha256 {found}: remove it and {way_out}")
        return path
    pooch.get_logger().setLevel("ERROR")
    with locked(f"{path}.lock", f"another process is fetching {path}", wait=True):
        with explained(f"cannot fetch {name}", f": {way_out}"):
            tell(f"fetching {url}")
            downloader = pooch.HTTPDownloader(progressbar=True, timeout=30)  # seconds without a byte
            folder, file = os.path.split(path)
            return pooch.retrieve(url, known, file, folder, downloader=downloader)


def read_archive(path, names):
    """{name: bytes} of the files of a tar.gz that have these names; nothing is extracted to the disk."""
    found, cure = {}, ": remove it to fetch it again"
    with explained(f"{path} is not a readable tar.gz archive", cure), tarfile.open(path, "r:gz") as archive:
        for member in archive:
            name = os.path.basename(member.name)
            if member.isfile() and name in names and member.size < 2**25:  # no file that we read is larger
                found[name] = archive.extractfile(member).read()
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{path} lacks {missing[0]}{cure}")
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
