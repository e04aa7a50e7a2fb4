"""test_uml.py: what the code promises, each promise a test that tells its story in one line. Offline, about two minutes.

    python -m pytest -q                    # all
    python -m pytest -q -k resume          # one promise
    python -m pytest -q --durations=10     # what takes the time
"""
import contextlib
import http.server
import io
import json
import os
import pickle  # only to forge a hostile checkpoint
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import model as M
import prepare as P
import probe as B
import train as T

HERE = os.path.dirname(os.path.abspath(__file__))
quiet = lambda line: None


@pytest.fixture(scope="session", autouse=True)
def small_world():
    """A world of a few hundred scenes instead of thousands."""
    P.SHAPES_COUNTS.update(image=704, text=1280, audio=704, test=256)
    torch.set_num_threads(1)  # these models are too small for more


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


def config(data, out, *more):
    """A run of seconds: 192 pictures and all sentences of the small world through a trunk of width 32."""
    return T.read_run_config(["--image=shapes", "--text=shapes", "--image_examples=192", "--width=32", "--layers=2", "--heads=2", "--steps=6",
                              "--warm_start_steps=3", "--eval_interval=3", "--log_interval=2", "--image_batch=16", "--text_batch=16",
                              "--text_loss=label", f"--data_dir={data}", f"--out_dir={out}", *more])


def train(*args):
    return T.run(config(*args), say=quiet)


def refusal(*argv, script="train.py"):
    """Run a script that must refuse: exit code 2 and one sentence, which is returned."""
    done = subprocess.run([sys.executable, os.path.join(HERE, script), *map(str, argv)], capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def picture_folder(path, classes=("cat", "dog"), count=6, parts=("train", "test")):
    for part in parts:
        for i, name in enumerate(classes):
            os.makedirs(os.path.join(path, part, name))
            for k in range(count):
                colour = (40 + 150 * i, 10 * k, 90)
                Image.new("RGB", (40, 30), colour).save(os.path.join(path, part, name, f"{k}.png"))
    return str(path)


# -- config -----------------------------------------------------------------------------------------------------------


def test_config_names_the_key_you_meant():
    with pytest.raises(P.UserError, match="did you mean 'learning_rate'"):
        P.read_config(["--learning_rat=0.1"], T.KEYS)
    with pytest.raises(P.UserError, match="did you mean 'image_size'"):
        P.read_config(["--image_siz=8"], P.PREPARE_KEYS)


@pytest.mark.parametrize("argument, wanted", [("--steps=1.5", "whole number"), ("--steps=True", "whole number"), ("--image_flip=1", "True or False"),
                                              ("--learning_rate=fast", "a number"), ("--compile=maybe", "True, False or None")])
def test_config_refuses_the_wrong_type(argument, wanted):
    with pytest.raises(P.UserError, match=wanted):
        P.read_config([argument], T.KEYS)


def test_config_takes_ints_for_floats_bare_switches_and_values_with_equals():
    cfg = P.read_config(["--learning_rate=1", "--resume", "--text=file:/a=b.txt", "--text2=pydoc", "--text2_batch=3"], T.KEYS)
    assert cfg["learning_rate"] == 1.0 and cfg["resume"] is True and cfg["text"] == "file:/a=b.txt"
    assert cfg["text2_batch"] == 3 and cfg["text2_loss"] == cfg["text_loss"]


def test_config_files_are_read_and_never_executed(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(f"steps = __import__('os').system('touch {tmp_path}/ran') or 5\n")
    with pytest.raises(P.UserError, match="line 1.*not executed"):
        P.read_config([str(path)], T.KEYS)
    assert not (tmp_path / "ran").exists()
    path.write_text('"""Words."""\nsteps = 7\n')
    assert P.read_config([str(path), "--seed=3"], T.KEYS)["steps"] == 7


def test_prepare_leaves_training_keys_to_train_but_catches_typos_of_its_own(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("steps = 7\nimage_size = 8\n")
    assert P.read_config([str(path)], P.PREPARE_KEYS, strict=False)["image_size"] == 8
    path.write_text("image_siz = 8\n")
    with pytest.raises(P.UserError, match="image_size"):
        P.read_config([str(path)], P.PREPARE_KEYS, strict=False)


@pytest.mark.parametrize("path", sorted(os.listdir(os.path.join(HERE, "sample_configs"))))
def test_every_sample_config_is_valid(path):
    cfg = T.read_run_config([os.path.join(HERE, "sample_configs", path)])
    assert T.resolve(cfg, quiet)["out_dir"] == os.path.join("out", path[:-3])


def test_features_as_shipped_show_the_papers_main_regime(tmp_path):
    """Frozen vectors, one labelled picture a class: sentences through the shared label head lift seed 0 by more than 3 points."""
    argv = [os.path.join(HERE, "sample_configs", "features.py"), "--threads=1", "--steps=300", "--score_test=False", f"--data_dir={tmp_path}/d"]
    uml = T.run(T.read_run_config([*argv, f"--out_dir={tmp_path}/uml"]), quiet)
    alone = T.run(T.read_run_config([*argv, "--text=", f"--out_dir={tmp_path}/alone"]), quiet)
    assert uml["val_accuracy"] > alone["val_accuracy"] + 0.03 and alone["val_accuracy"] > 5 * alone["chance"]


# -- prepare ----------------------------------------------------------------------------------------------------------


def prepared(data, *argv):
    cfg = P.read_config([*argv, f"--data_dir={data}"], P.PREPARE_KEYS)
    (slot,) = P.active_slots(cfg)
    return P.prepare(cfg, slot, quiet)


def all_bytes(folder):
    return {f: open(os.path.join(folder, f), "rb").read() for f in sorted(os.listdir(folder))}


@pytest.mark.parametrize("source", ["--image=shapes", "--text=shapes", "--audio=shapes", "--text=pydoc", "--image=frozen", "--text=frozen"])
def test_offline_sources_prepare_and_are_byte_equal_twice(tmp_path, source):
    one, two = prepared(tmp_path / "a", source), prepared(tmp_path / "b", source)
    assert all_bytes(one) == all_bytes(two) and not [f for f in os.listdir(tmp_path / "a") if "tmp" in f]
    meta = P.read_meta(one)
    for split in ("train", "val", "test"):
        arrays = P.load_split(one, split)
        assert len(arrays["tokens"]) == meta["splits"][split]["count"] > 0
        if meta["kind"] == "discrete":
            assert arrays["lengths"].min() > 0 and arrays["tokens"][np.arange(len(arrays["tokens"]))].max() < meta["vocab"]


def test_modalities_of_shapes_cannot_be_paired(data):
    """Row order, latents and labels of any two modalities agree no more than chance, and no scene occurs in both."""
    splits = [P.load_split(prepared(data, f"--{m}=shapes"), "train") for m in ("image", "text", "audio")]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        n = min(len(splits[one]["labels"]), len(splits[two]["labels"]))
        assert (splits[one]["labels"][:n] == splits[two]["labels"][:n]).mean() < 5 / 64
        assert not {tuple(row) for row in splits[one]["latents"]} & {tuple(row) for row in splits[two]["latents"]}


def test_patchify_is_undone_by_unpatchify():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), np.uint8)
    tokens = P.patchify(pictures, 4)
    assert tokens.shape == (3, 9, 48) and np.array_equal(P.unpatchify(tokens, 4), pictures)
    assert np.array_equal(tokens[0, 1].reshape(4, 4, 3), pictures[0, :4, 4:8])  # second token: to the right of the first


def test_many_small_shards_read_like_one(tmp_path):
    tokens, labels = np.arange(7000 * 100, dtype=np.uint16).reshape(7000, 100), np.arange(7000, dtype=np.int32) % 3
    every = dict(tokens=tokens, labels=labels, lengths=np.full(7000, 100, np.int32))
    few = {name: array[:3] for name, array in every.items()}
    meta = dict(modality="text", kind="discrete", vocab=65536, bpe_sha256="0" * 64, classes=["a", "b", "c"])
    P.write_shards(str(tmp_path), meta, dict(train=every, val=few, test=few), shard_mb=1)
    assert (tmp_path / "train_001.bin").exists()
    split, rows = P.load_split(str(tmp_path), "train"), np.array([6999, 0, 5242, 5243, 17])
    assert np.array_equal(split["tokens"][rows], tokens[rows]) and np.array_equal(split["labels"], labels)


def test_a_shard_that_does_not_match_meta_is_named(tmp_path):
    folder = prepared(tmp_path, "--image=shapes")
    with open(os.path.join(folder, "train_000.bin"), "ab") as f:
        f.write(b"x")
    with pytest.raises(P.UserError, match=r"train_000.bin has \d+ bytes where meta.json says \d+"):
        P.load_split(folder, "train")


def test_bpe_round_trips_and_has_no_special_tokens(tmp_path):
    path = tmp_path / "t.txt"
    documents = [f"document {i} says <|endoftext|> naïve 日本 {'word ' * (i % 40)}".strip() for i in range(60)]
    path.write_text("\n".join(documents), encoding="utf-8-sig")
    folder = prepared(tmp_path, f"--text=file:{path}", "--text_length=16", "--vocab_size=300")
    bpe, split = P.load_bpe(folder), P.load_split(folder, "train")
    whole = b"".join(bpe.decode_bytes(row[:k].tolist()) for row, k in zip(split["tokens"][np.arange(len(split["tokens"]))], split["lengths"])).decode()
    back = re.findall(r"document.*?(?=document|$)", whole)
    assert P.read_meta(folder)["vocab"] == 300 and len(back) > 40 and set(back) <= set(documents) and not bpe.special_tokens_set


def test_windows_of_one_document_stay_in_one_split(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({c: [f"{c}{i}mark " * 30 for i in range(20)] for c in ("x", "y")}))
    folder = prepared(tmp_path, f"--text=file:{path}", "--text_length=8", "--vocab_size=600")
    bpe, seen = P.load_bpe(folder), {}
    for split in ("train", "val", "test"):
        arrays = P.load_split(folder, split)
        assert len(arrays["labels"]) == len(arrays["tokens"])
        seen[split] = {m for row in arrays["tokens"][np.arange(len(arrays["tokens"]))] for m in re.findall(r"[xy]\d+mark", bpe.decode(row.tolist()))}
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"] and not seen["val"] & seen["test"]


def cifar_archive(path, rows, skip=""):
    """An archive laid out like the official one, with `rows` pictures a file; the first byte of each record is its label."""
    os.makedirs(os.path.dirname(path))
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w:gz") as archive:
        for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin", "batches.meta.txt"]:
            records = rng.integers(0, 256, (rows, 3073), np.uint8)
            records[:, 0] = np.arange(rows) % 10
            body = records.tobytes() if name.endswith(".bin") else "\n".join(f"class{i}" for i in range(10)).encode()
            if name != skip:
                info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
    return records


def test_cifar10_is_read_from_its_archive_planes_and_all(tmp_path, monkeypatch):
    path = str(tmp_path / "raw/cifar10/cifar-10-binary.tar.gz")
    cifar_archive(path, 40)
    digest = P.hashlib.sha256(open(path, "rb").read()).hexdigest()
    monkeypatch.setattr(P, "CIFAR10_SHA256", digest), monkeypatch.setattr(P, "CIFAR10_ROWS", 40)
    folder = prepared(tmp_path, "--image=cifar10", f"--raw_dir={tmp_path}/raw")
    meta, test = P.read_meta(folder), P.load_split(folder, "test")
    assert [meta["splits"][s]["count"] for s in ("train", "val", "test")] == [180, 20, 40] and meta["classes"][3] == "class3"
    with tarfile.open(path) as archive:
        first = archive.extractfile("cifar-10-batches-bin/test_batch.bin").read(3073)
    red = np.frombuffer(first, np.uint8)[1:1025].reshape(32, 32)
    assert np.array_equal(P.unpatchify(test["tokens"][np.array([0])], 8)[0, :, :, 0], red) and test["labels"][0] == first[0]


def test_a_wrong_archive_is_refused_by_its_checksum(tmp_path):
    cifar_archive(str(tmp_path / "raw/cifar10/cifar-10-binary.tar.gz"), 2)
    assert "sha256" in refusal("--image=cifar10", f"--raw_dir={tmp_path}/raw", f"--data_dir={tmp_path}/d", script="prepare.py")
    assert not os.path.exists(tmp_path / "d")


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(P, "CIFAR10_URL", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(P.UserError, match="by hand, name the folder .* or run the offline config"):
        prepared(tmp_path / "d", "--image=cifar10", f"--raw_dir={tmp_path}/raw")
    assert not [f for _, _, files in os.walk(tmp_path) for f in files]


def test_folders_in_every_layout_mode_and_size(tmp_path):
    root = picture_folder(tmp_path / "split")
    Image.new("L", (5, 90), 7).save(f"{root}/train/cat/grey.png")
    Image.new("P", (33, 33), 1).save(f"{root}/train/cat/palette.gif")
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(f"{root}/train/cat/deep.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(f"{root}/train/dog/clear.png")
    meta = P.read_meta(prepared(tmp_path / "d", f"--image=folder:{root}", "--image_size=16"))
    assert meta["classes"] == ["cat", "dog"] and meta["splits"]["test"]["count"] == 12 and meta["arrays"]["tokens"]["shape"] == [4, 192]
    unsplit = picture_folder(tmp_path / "unsplit", parts=("",))
    assert P.read_meta(prepared(tmp_path / "d", f"--image=folder:{unsplit}"))["splits"]["test"]["class_counts"] == [1, 1]
    flat = P.read_meta(prepared(tmp_path / "d", f"--image=folder:{unsplit}/cat"))
    assert flat["classes"] == [] and "labels" not in flat["arrays"]
    assert (P.read_picture(f"{root}/train/dog/clear.png", 8) == 255).all() and (P.read_picture(f"{root}/train/cat/deep.png", 8) == 155).all()


def test_editing_prepare_does_not_disturb_a_process_that_runs(tmp_path):
    """Names of shards once hashed the file as it lay on disk: lines inserted above a source gave a running process other names."""
    copy, code = tmp_path / "prepare.py", open(os.path.join(HERE, "prepare.py"), encoding="utf-8").read()
    copy.write_text(code, encoding="utf-8")
    asks = ("import prepare as P; cfg = P.read_config(['--image=shapes'], P.PREPARE_KEYS); before = P.shard_folder(cfg, 'image')[0]; "
            f"open({str(copy)!r}, 'r+').write('# inserted' + chr(10) * 30 + open({str(copy)!r}).read()); print(before == P.shard_folder(cfg, 'image')[0])")
    done = subprocess.run([sys.executable, "-c", asks], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_a_folder_that_changed_is_prepared_anew(tmp_path):
    root = picture_folder(tmp_path / "p")
    one = prepared(tmp_path / "d", f"--image=folder:{root}")
    Image.new("RGB", (9, 9)).save(f"{root}/train/cat/new.png")
    assert prepared(tmp_path / "d", f"--image=folder:{root}") != one


def write_wave(path, width=2, channels=1, rate=8000, seconds=0.3, pitch=440):
    """A tone as PCM WAV of any sample width."""
    clock = np.arange(int(rate * seconds)) / rate
    tone = np.repeat(0.5 * np.sin(2 * np.pi * pitch * clock)[:, None], channels, 1).ravel()
    whole = (tone * 127 + 128).astype(np.uint8) if width == 1 else (tone * (2 ** (8 * width - 1) - 1)).astype("<i4")
    data = whole.tobytes() if width == 1 else whole.view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with P.wave.open(str(path), "wb") as f:
        f.setnchannels(channels), f.setsampwidth(width), f.setframerate(rate)
        f.writeframes(data)
    return str(path)


AUDIO = P.read_config([], P.PREPARE_KEYS)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels, rate", [(1, 8000), (2, 8000), (1, 22050)])
def test_wave_files_of_every_width_channel_count_and_rate_sound_the_same(tmp_path, width, channels, rate):
    path = write_wave(tmp_path / "a.wav", width, channels, rate)
    with open(path, "rb") as f:
        samples = P.read_recording(AUDIO, f, path)
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2400) / 8000)
    assert len(samples) == pytest.approx(2400, abs=2) and np.abs(samples[100:2300] - wanted[100:2300]).max() < 0.02


def test_recordings_become_log_mel_tokens_with_their_true_length():
    """A higher tone lies in a higher band; a clip of 0.3 s has 30 frames, so 8 tokens of 4; padding is zero."""
    tones = [0.5 * np.sin(2 * np.pi * pitch * np.arange(2400) / 8000).astype(np.float32) for pitch in (300, 2000)]
    arrays, info = P.encode_recordings(AUDIO, dict(train=tones + [np.zeros(100000, np.float32)]))
    tokens, lengths = arrays["train"]["tokens"], arrays["train"]["lengths"]
    assert tokens.shape == (3, 16, 160) and tokens.dtype == np.uint8 and lengths.tolist() == [8, 8, 16] and not tokens[0, 8:].any()
    bands = tokens[:2, :7].reshape(2, 28, 40).astype(int).mean(1).argmax(1)
    assert bands[0] < bands[1] and len(info["mean"]) == 40


def test_a_probe_reads_uint8_log_mels_as_well_as_floats():
    """Sounds of the shapes world, the timbre (one of eight) to be told: within a point of full precision."""
    from torchaudio.transforms import MelSpectrogram
    scenes, _, rng = P.draw_scenes("audio", "quantised", 1200)
    sounds, timbre = P.sound_scenes(scenes, rng), torch.from_numpy(scenes[:, 0]).long()
    stored = P.encode_recordings(AUDIO, dict(train=list(sounds)))[0]["train"]["tokens"].reshape(1200, 64, 40)
    exact = MelSpectrogram(8000, n_fft=512, win_length=200, hop_length=80, n_mels=40)(torch.from_numpy(sounds)).clamp_min(1e-6).log()[:, :, :64].transpose(1, 2)
    low, high = P.LOG_MEL_RANGE
    stored, right = torch.from_numpy(stored) / 255 * (high - low) + low, []
    assert (stored - exact).abs().max() < 0.51 * (high - low) / 255
    for frames in (stored, exact):
        features = torch.cat([frames.mean(1), frames.std(1)], 1)
        weight, bias = M.linear_probe(features[:800], timbre[:800], 8, 10.0)
        right.append(((features[800:] @ weight.T + bias).argmax(1) == timbre[800:]).float().mean().item())
    assert right[1] > 0.4 and abs(right[0] - right[1]) <= 0.01, right


def test_recordings_of_any_rate_and_length_go_through_training(tmp_path, capsys):
    """16 kHz, 24 mels, tokens of 8 frames; clips of 0.3 s cut at 0.24 s are announced; every audio key arrives."""
    root = speaker_folder(tmp_path / "r")
    result = T.run(T.read_run_config(["--target=audio", f"--audio=folder:{root}", "--audio_rate=16000", "--audio_mels=24", "--audio_frames=24", "--audio_group=8",
                                      "--audio_shift=2", "--audio_gain=3.0", "--audio_mask=2", "--audio_weight=0.5", "--split_seed=1", "--width=16", "--layers=1",
                                      "--heads=2", "--steps=2", "--audio_batch=4", f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/o"]), say=quiet)
    (folder,) = [f for f in os.listdir(tmp_path / "d") if f.startswith("audio")]
    assert P.read_meta(tmp_path / "d" / folder)["arrays"]["tokens"]["shape"] == [3, 8 * 24] and result["test_accuracy"] is not None
    assert "100% of the recordings last longer than 0.24 s and are cut there" in capsys.readouterr().out


def speaker_folder(path, speakers=("ann", "bob", "cy", "di")):
    for k, digit in enumerate(("one", "two")):
        for i, name in enumerate(speakers):
            for take in range(3):
                write_wave(os.path.join(path, digit, f"{digit}_{name}_{take}.wav"), pitch=300 * (k + 1) + 20 * i)
    return str(path)


def test_folders_of_recordings_are_split_by_speaker(tmp_path, capsys):
    root = speaker_folder(tmp_path / "r")
    argv = [f"--audio=folder:{root}", r"--audio_groups=_([a-z]+)_", "--audio_test_group=cy", "--audio_val_group=ann"]
    meta = P.read_meta(prepared(tmp_path / "d", *argv))
    assert [meta["splits"][s]["count"] for s in ("train", "val", "test")] == [12, 6, 6] and meta["classes"] == ["one", "two"]
    for words, more in (("'eve' is not there", "--audio_test_group=eve"), ("both 'ann'", "--audio_test_group=ann"), ("must find a group", "--audio_groups=x(y)"),
                        ("must find a group", "--audio_groups=x(y)?|_[a-z]+_")):
        with pytest.raises(P.UserError, match=words):
            prepared(tmp_path / "d", *argv, more)
    with pytest.raises(P.UserError, match="cannot be split by speaker"):
        prepared(tmp_path / "d", argv[0], argv[2])
    with pytest.raises(P.UserError, match="three of them"):
        prepared(tmp_path / "d", f"--audio=folder:{speaker_folder(tmp_path / 'solo', ['ann'])}", argv[1])


def test_bad_recordings_are_named(tmp_path):
    """Empty, cut short, not sound at all, no samples, silence, an hour long, not PCM."""
    root = speaker_folder(tmp_path / "r")
    whole = open(f"{root}/one/one_ann_0.wav", "rb").read()
    for body, words in ((b"", "not a readable PCM WAV"), (whole[:1000], "cut short"), (b"hello" * 99, "not a readable PCM WAV"), (whole[:44], "cut short")):
        open(f"{root}/one/bad.wav", "wb").write(body)
        with pytest.raises(P.UserError, match=f"bad.wav.*{words}"):
            prepared(tmp_path / "d", f"--audio=folder:{root}")
    assert P.read_meta(prepared(tmp_path / "d", f"--audio=folder:{root}", "--skip_bad=True"))["splits"]["train"]["count"] > 0
    os.rename(f"{root}/one/bad.wav", f"{root}/one/bad.mp3")
    with pytest.raises(P.UserError, match="convert it with .ffmpeg"):
        prepared(tmp_path / "d", f"--audio=folder:{root}")
    os.remove(f"{root}/one/bad.mp3")
    for seconds, pitch, words in ((3600, 440, "more than 600"), (0.3, 0, "only silence")):
        write_wave(f"{root}/one/bad.wav", seconds=seconds, pitch=pitch)
        with pytest.raises(P.UserError, match=f"bad.wav .*{words}"):
            prepared(tmp_path / "d", f"--audio=folder:{root}")


def test_fsdd_is_checked_and_split_by_speaker(tmp_path, monkeypatch):
    names = [f"{d}_{s}_0.wav" for d in range(10) for s in ("theo", "lucas", "george", "jackson")]
    digest = P.hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + open(write_wave(tmp_path / "raw/fsdd/recordings" / name), "rb").read())
    with pytest.raises(P.UserError, match="holds 40 recordings"):
        prepared(tmp_path / "d", "--audio=fsdd", f"--raw_dir={tmp_path}/raw")
    monkeypatch.setattr(P, "FSDD_COUNT", 40), monkeypatch.setattr(P, "FSDD_SHA256", digest.hexdigest())
    meta = P.read_meta(prepared(tmp_path / "d", "--audio=fsdd", f"--raw_dir={tmp_path}/raw"))
    assert [meta["splits"][s]["count"] for s in ("train", "val", "test")] == [20, 10, 10] and meta["classes"][7] == "seven"


def test_npz_features_come_in_with_labels_names_and_splits(tmp_path):
    rng, path = np.random.default_rng(0), str(tmp_path / "f.npz")
    good = dict(features=rng.normal(3, 2, (60, 5)), labels=np.arange(60) % 3, classes=np.array(["a", "b", "c"]), split=np.array(["train", "train", "val", "test"] * 15))
    np.savez(path, **good)
    folder = prepared(tmp_path / "d", f"--image=npz:{path}")
    meta, train = P.read_meta(folder), P.load_split(folder, "train")
    assert meta["classes"] == ["a", "b", "c"] and meta["arrays"]["tokens"]["shape"] == [1, 5] and len(train["labels"]) == 30
    assert np.allclose(train["tokens"][np.arange(2)][:, 0], good["features"][:2], atol=1e-5)
    for change, words in ((dict(features=np.full((60, 5), np.nan)), "NaN"), (dict(labels=np.arange(59)), "60 whole numbers"), (dict(labels=np.arange(60)), "expected 0 to 2"),
                          (dict(split=np.array(["dev"] * 60)), "train, test and perhaps val"), (dict(labels=np.array(["a"] * 60)), "whole numbers"), (dict(features=np.zeros(60)), "needs an array")):
        np.savez(path, **{**good, **change})
        with pytest.raises(P.UserError, match=words):
            prepared(tmp_path / "d", f"--image=npz:{path}")
    np.save(path, np.zeros((4, 4)))
    os.replace(path + ".npy", path)
    with pytest.raises(P.UserError, match="not a readable .npz"):
        prepared(tmp_path / "d", f"--image=npz:{path}")
    np.savez(path, features=np.array([{"a": 1}], dtype=object))
    with pytest.raises(P.UserError, match="not a readable .npz"):
        prepared(tmp_path / "d", f"--image=npz:{path}")


def test_bad_input_is_refused_in_one_sentence(tmp_path):
    """Empty folder, text as image, one class, a class without test pictures, bad UTF-8, too few examples, unknown source."""
    def refused(words, *argv):
        with pytest.raises(P.UserError, match=words):
            T.run(T.read_run_config([*argv, f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/o"]), quiet)

    os.makedirs(tmp_path / "empty")
    refused("is empty", f"--image=folder:{tmp_path}/empty")
    refused("no folder", f"--image=folder:{tmp_path}/nowhere")
    root = picture_folder(tmp_path / "p")
    with open(f"{root}/train/cat/6.png", "w") as f:
        f.write("not a picture")
    refused("6.png is not a readable image", f"--image=folder:{root}")
    assert not os.path.exists(tmp_path / "d") or not os.listdir(tmp_path / "d")
    refused("offers 10", f"--image=folder:{root}", "--skip_bad=True", "--image_examples=11")
    refused("1 classes", f"--image=folder:{picture_folder(tmp_path / 'one', classes=('cat',))}")
    os.rename(f"{root}/test/dog", f"{root}/test/cow")
    refused("cow, dog", f"--image=folder:{root}")
    refused("too few items", f"--image=folder:{picture_folder(tmp_path / 'few', count=2, parts=('',))}")
    (tmp_path / "t.txt").write_bytes(b"caf\xe9\n" * 20)
    refused("not UTF-8", "--image=shapes", f"--text=file:{tmp_path}/t.txt")
    refused("did you mean 'shapes'", "--image=shape")
    refused("label loss needs at least two", "--image=shapes", "--text=pydoc", "--text_loss=label")
    refused("not a slot with a source", "--image=shapes", "--target=text")
    assert not os.path.exists(tmp_path / "o")
    assert "cannot read config" in refusal("sample_configs/nothing.py")


# -- model ------------------------------------------------------------------------------------------------------------


def tiny(loss="label", embed="linear", seed=0, **more):
    slots = dict(image=dict(kind="continuous", dim=12, length=16, patch=2, mean=[100.0], std=[50.0], loss=loss, rows=[0, 1, 2]),
                 text=dict(kind="discrete", vocab=50, length=9, loss=loss, rows=[1, 2, 3]))
    return M.UML(slots, classes=4, width=16, layers=2, heads=2, image_embed=embed, seed=seed, **more)


def text_batch(length=9, n=5):
    tokens = torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(1))
    return dict(tokens=tokens, labels=torch.arange(n) % 3 + 1, hidden=torch.arange(n * length).reshape(n, length) % 3 == 0)


@pytest.mark.parametrize("loss, more", [("label", {}), ("next", {}), ("reconstruct", {}), ("next+label+reconstruct", {}),
                                        ("reconstruct", dict(bottleneck=3, mask_ratio=0.0))])
def test_padding_changes_nothing(loss, more):
    """Extra padding, whatever ids stand in it, leaves loss and features as they were: it is in no mean, softmax or sum."""
    model, batch = tiny(loss, **more), text_batch(6)
    lengths = torch.tensor([6, 2, 4, 3, 5])
    real = torch.arange(6) < lengths[:, None]
    wide = dict(tokens=torch.cat([batch["tokens"].where(real, torch.tensor(7)), torch.full((5, 3), 49)], 1), labels=batch["labels"],
                hidden=torch.cat([batch["hidden"], torch.ones(5, 3, dtype=torch.bool)], 1))
    if more:  # mask_ratio=0: nothing is hidden
        del batch["hidden"], wide["hidden"]
    assert torch.allclose(model("text", real=real, **batch), model("text", real=torch.arange(9) < lengths[:, None], **wide), atol=1e-5)
    short = [model.features("text", batch["tokens"][i:i + 1, :k]) for i, k in enumerate(lengths)]
    assert torch.allclose(torch.cat(short), model.features("text", wide["tokens"], torch.arange(9) < lengths[:, None]), atol=1e-5)


def test_next_never_sees_the_future():
    model, tokens = tiny("next"), text_batch()["tokens"]
    other = tokens.clone()
    other[:, 5:] = 3
    assert torch.equal(model.states("text", tokens, causal=True)[-1][:, :5], model.states("text", other, causal=True)[-1][:, :5])


@pytest.mark.parametrize("embed", ["linear", "conv"])
def test_reconstruct_never_sees_what_it_rebuilds(embed):
    """The convolutional stem looks at neighbours, so a hidden patch must be blanked before it, not after."""
    model, hidden = tiny("reconstruct", embed), torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 5] = True
    tokens = torch.randn(1, 16, 12)
    other = tokens.clone()
    other[0, 5] = 9.0
    assert torch.equal(model.states("image", tokens, hidden=hidden)[-1], model.states("image", other, hidden=hidden)[-1])


def test_a_slot_leaves_classes_it_has_no_examples_of_alone():
    """Row 3 belongs to text only; a picture's label loss gives it no gradient, else pictures would unlearn it."""
    model = tiny()
    model("image", tokens=torch.randn(4, 16, 12), labels=torch.tensor([0, 1, 2, 0])).backward()
    assert model.label_head.weight.grad[3].abs().max() == 0 and model.label_head.weight.grad[:3].abs().min() > 0


def test_initialisation_depends_on_seed_and_name_alone():
    both, alone = tiny(), M.UML(dict(image=tiny().slots["image"]), classes=3, width=16, layers=2, heads=2)
    mine, theirs = both.state_dict(), alone.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs if k.startswith(("trunk", "norm", "embed.image", "position.image")))
    assert torch.equal(mine["label_head.weight"][:3], theirs["label_head.weight"])
    assert not torch.equal(tiny(seed=1).state_dict()["trunk.0.qkv.weight"], mine["trunk.0.qkv.weight"])


@pytest.mark.parametrize("kwargs, words", [(dict(loss="nxt"), "none of next, reconstruct, label"), (dict(loss="next", embed="conv"), "cannot hold 'next'"),
                                           (dict(loss="reconstruct", mask_ratio=0.0), "set mask_ratio or bottleneck")])
def test_combinations_that_cannot_work_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        tiny(**kwargs)


def test_linear_probe_finds_the_known_optimum():
    """At the optimum the gradient of the objective in its docstring is zero; and separable classes are separated."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 5, generator=rng) * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0]) + 4
    features[:, 0] += 2.0 * labels
    weight, bias = M.linear_probe(features, labels, 3, l2=2.0)
    mean, std = features.mean(0), features.std(0, unbiased=False)
    w = (weight * std).requires_grad_()
    loss = torch.nn.functional.cross_entropy((features - mean) / std @ w.T + bias + weight @ mean, labels, reduction="sum") + w.square().sum()
    assert torch.autograd.grad(loss, w)[0].abs().max() < 0.05
    assert (M.linear_probe(torch.eye(3).repeat(20, 1), torch.arange(60) % 3, 3)[0].argmax(0) == torch.arange(3)).all()
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return
    theirs = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(((features - mean) / std).numpy(), labels.numpy())
    assert np.allclose(w.detach().numpy(), theirs.coef_, atol=1e-2)


# -- train ------------------------------------------------------------------------------------------------------------


def test_examples_are_nested_even_over_classes_and_a_function_of_the_seed():
    labels = np.random.default_rng(0).integers(0, 7, 500)
    few, many = (T.choose_examples(labels, 500, n, 3, "image") for n in (14, 100))
    assert np.array_equal(many[:14], few) and (np.bincount(labels[few]) == 2).all()
    assert not np.array_equal(few, T.choose_examples(labels, 500, 14, 4, "image"))
    assert not np.isin(labels[T.choose_examples(labels, 500, -1, 3, "image", banned=[2])], [2]).any()


def test_every_epoch_is_a_permutation_of_the_examples():
    slot = T.SimpleNamespace(name="image", batch=8, rows=np.arange(100, 130))
    stream = np.concatenate([T.batch_rows(slot, 0, u) for u in range(15)])
    assert all(sorted(stream[e * 30:(e + 1) * 30]) == list(range(100, 130)) for e in range(4)) and not np.array_equal(stream[:30], stream[30:60])


def opened(data, *more):
    cfg = T.resolve(config(data, "unused", *more), quiet)
    return cfg, *T.open_slots(cfg, quiet)


def test_adding_a_modality_changes_no_other_modalitys_batches(data):
    (_, alone, _), (_, both, _) = opened(data, "--text="), opened(data)
    for update in (0, 7):
        one, two = (T.train_batch(slots["image"], 0, update, B.CPU) for slots in (alone, both))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_shift_and_flip_move_pixels_and_invent_none():
    pictures = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)
    moved = P.unpatchify(T.shift_and_flip(P.patchify(pictures, 4), 4, 2, True, np.random.default_rng(1)), 4)
    for before, after in zip(pictures, moved):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)), mode="edge")
        views = [padded[i:i + 8, j:j + 8] for i in range(5) for j in range(5)]
        assert any(np.array_equal(after, v) or np.array_equal(after, v[:, ::-1]) for v in views)


def test_moving_and_masking_recordings_keeps_their_length_true():
    tokens = np.random.default_rng(0).integers(1, 255, (200, 16, 160)).astype(np.uint8)
    same, lengths = T.move_and_mask(tokens, np.full(200, 9), 40, 0, 0.0, 0, np.random.default_rng(1))
    assert np.array_equal(same, tokens) and (lengths == 9).all()
    moved, lengths = T.move_and_mask(tokens, np.full(200, 9), 40, 8, 0.0, 0, np.random.default_rng(1))
    assert set(lengths) == {7, 8, 9, 10, 11}
    i = int(np.flatnonzero(lengths == 11)[0])  # moved 8 frames, two tokens, or a little less, to the right
    frames = lambda t: t.reshape(64, 40)
    assert any(np.array_equal(frames(moved[i])[m:], frames(tokens[i])[:64 - m]) for m in range(5, 9))
    masked, _ = T.move_and_mask(tokens, np.full(200, 9), 40, 0, 0.0, 8, np.random.default_rng(1))
    assert 0.02 < (masked != tokens).mean() < 0.3


def test_slots_alternate_in_the_printed_order():
    cfg = dict(target="image", text_updates=2, audio_updates=1, warm_start_steps=4, schedule="alternate")
    slots = dict(image=0, text=0, audio=0)
    assert [T.pattern(cfg, slots, s) for s in range(4)] == [[["text"]], [["text"]], [["audio"]], [["text"]]]
    assert T.pattern(cfg, slots, 4) == [["image"], ["text"], ["text"], ["audio"]]
    assert T.pattern(dict(cfg, schedule="joint"), slots, 4) == [["image", "text", "audio"]]


def test_each_parameter_is_in_one_group_and_a_step_reaches_just_its_slot(data):
    cfg, slots, classes = opened(data, "--text_loss=next")
    model = T.build_model(cfg, T.model_slots(slots), classes)
    groups = [p for g in T.make_optimizer(model, cfg, B.CPU).param_groups for p in g["params"]]
    assert len(groups) == len(set(map(id, groups))) == len(list(model.parameters()))
    for name, others in (("image", ("embed.text", "position.text")), ("text", ("embed.image", "position.image", "label_head"))):
        model.zero_grad(set_to_none=True)
        model(name, **T.train_batch(slots[name], 0, 0, B.CPU)).backward()
        assert {k for k, p in model.named_parameters() if p.grad is None} == {k for k, _ in model.named_parameters() if k.startswith(others)}


def test_the_trunk_is_shared_and_idle_parameters_do_not_drift(data):
    """A text step changes what the model makes of pictures, though the image embed stays as it is to the last bit."""
    cfg, slots, classes = opened(data)
    model = T.build_model(cfg, T.model_slots(slots), classes)
    optimizer, batch = T.make_optimizer(model, cfg, B.CPU), T.train_batch(slots["image"], 0, 0, B.CPU)
    before = model.features("image", batch["tokens"])
    model("image", **batch).backward()
    optimizer.step()  # gives the image embed moments that could make it drift
    embed = model.embed["image"].weight.clone()
    optimizer.zero_grad(set_to_none=True)
    middle = model.features("image", batch["tokens"])
    model("text", **T.train_batch(slots["text"], 0, 0, B.CPU)).backward()
    optimizer.step()
    assert torch.equal(model.embed["image"].weight, embed) and not torch.allclose(model.features("image", batch["tokens"]), middle)
    assert not torch.allclose(before, middle)


def weights(out, file="last.pt"):
    return T.load_checkpoint(os.path.join(out, file))["model"]


@pytest.mark.parametrize("schedule", ["alternate", "joint"])
def test_a_stopped_and_resumed_run_equals_an_undisturbed_one(data, tmp_path, schedule):
    """Bitwise, stopped in the warm start and again in the main phase, whatever the evaluation interval."""
    whole = train(data, f"{tmp_path}/whole", f"--schedule={schedule}")
    for stop in (2, 5):
        assert train(data, f"{tmp_path}/parts", f"--schedule={schedule}", f"--stop_after={stop}", "--resume") is None
    parts = train(data, f"{tmp_path}/parts", f"--schedule={schedule}", "--resume")
    one, two = weights(f"{tmp_path}/whole"), weights(f"{tmp_path}/parts")
    assert all(torch.equal(one[key], two[key]) for key in one)
    timing = {"seconds", "samples_per_second", "peak_memory", "name"}
    assert {k: v for k, v in whole.items() if k not in timing} == {k: v for k, v in parts.items() if k not in timing}
    train(data, f"{tmp_path}/often", f"--schedule={schedule}", "--eval_interval=1", "--log_interval=1")
    assert all(torch.equal(one[key], value) for key, value in weights(f"{tmp_path}/often").items())


def test_joint_is_one_step_on_the_weighted_sum(data, tmp_path):
    """One step of run() equals one step taken by hand on image loss + 0.5 * text loss."""
    more = ["--text_weight=0.5", "--schedule=joint", "--warm_start_steps=0", "--steps=1", "--eval_interval=1"]
    train(data, f"{tmp_path}/o", *more)
    cfg, slots, classes = opened(data, *more)
    model = T.build_model(cfg, T.model_slots(slots), classes)
    optimizer = T.make_optimizer(model, cfg, B.CPU)
    batches = {name: T.train_batch(slot, 0, 0, B.CPU) for name, slot in slots.items()}
    (model("image", **batches["image"]) + 0.5 * model("text", **batches["text"])).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    taken = weights(f"{tmp_path}/o")
    assert all(torch.allclose(value, taken[key], atol=1e-5) for key, value in model.state_dict().items())


def test_a_run_leaves_what_it_promises(data, tmp_path):
    result = train(data, f"{tmp_path}/run")
    assert set(os.listdir(tmp_path / "run")) == {"last.pt", "best.pt", "config.json", "log.jsonl", "result.json"}
    wanted = {"name", "target", "losses", "seed", "steps", "examples", "val_accuracy", "test_accuracy", "chance", "seconds", "samples_per_second", "peak_memory"}
    assert wanted <= set(result) == set(json.load(open(tmp_path / "run/result.json")))
    assert 0 <= result["test_accuracy"] <= 1 and result["chance"] == 1 / 64 and result["examples"] == dict(image=192, text=len(opened(data)[1]["text"].rows))
    assert {"model", "optimizer", "step", "config"} <= set(torch.load(tmp_path / "run/last.pt", weights_only=True))
    assert [json.loads(line)["step"] for line in open(tmp_path / "run/log.jsonl") if "val_accuracy" in line] == [6, 9]
    said = []
    assert T.run(config(data, f"{tmp_path}/run"), said.append) == result and "again" in said[0]  # finished: the same result
    with pytest.raises(P.UserError, match="another config .*steps"):
        train(data, f"{tmp_path}/run", "--steps=7")


def test_more_steps_go_on_from_a_finished_run_and_fewer_are_refused(data, tmp_path):
    """A stale result must not be taken for the new one, and a run past its last step must not go on for ever."""
    train(data, f"{tmp_path}/o")
    assert train(data, f"{tmp_path}/o", "--steps=8", "--resume", "--stop_after=10") is None
    assert train(data, f"{tmp_path}/o", "--steps=8", "--resume")["steps"] == 8
    with pytest.raises(P.UserError, match="is at step 11, beyond the 7 asked for"):
        train(data, f"{tmp_path}/o", "--steps=4", "--resume")
    assert train(data, f"{tmp_path}/o", "--steps=8")["steps"] == 8  # the refusal left the finished run as it was
    assert train(data, f"{tmp_path}/p", "--stop_after=7", "--eval_interval=6") is None  # before its first evaluation
    assert train(data, f"{tmp_path}/p", "--steps=4", "--resume", "--eval_interval=6")["best_step"] == 7


def test_a_run_whose_data_changed_is_another_run(tmp_path):
    """Else the old result would come back, or former training pictures would be tested on."""
    root = picture_folder(tmp_path / "p", count=8)
    argv = [f"--image=folder:{root}", "--width=16", "--layers=1", "--heads=2", "--steps=2", "--image_batch=4", f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/o"]
    T.run(T.read_run_config(argv), quiet)
    Image.new("RGB", (9, 9)).save(f"{root}/train/cat/new.png")
    with pytest.raises(P.UserError, match="different: shards"):
        T.run(T.read_run_config(argv), quiet)
    with pytest.raises(P.UserError, match="has changed since"):
        B.open_run(f"{tmp_path}/o")


def test_class_names_that_differ_only_in_form_are_refused(tmp_path):
    root = picture_folder(tmp_path / "p", classes=("a cat", "A_Cat"))
    with pytest.raises(P.UserError, match="differ only in case"):
        T.run(T.read_run_config([f"--image=folder:{root}", f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/o"]), quiet)


def test_without_auxiliaries_their_keys_and_the_warm_start_are_ignored_in_one_line(data, tmp_path):
    said = []
    cfg = T.resolve(config(data, f"{tmp_path}/x", "--text="), said.append)
    assert len(said) == 1 and "warm_start_steps" in said[0] and cfg["warm_start_steps"] == 0 and not [k for k in cfg if k.startswith("text_")]


def test_score_test_false_never_opens_the_test_split(tmp_path):
    data = str(tmp_path / "d")
    folder = opened(data)[1]["image"].folder
    for file in os.listdir(folder):
        if file.startswith("test"):
            os.remove(os.path.join(folder, file))
    assert train(data, f"{tmp_path}/o", "--score_test=False")["test_accuracy"] is None


@pytest.mark.parametrize("loss", ["next", "reconstruct"])
def test_a_target_without_label_loss_is_judged_by_a_linear_probe(data, tmp_path, loss):
    assert train(data, f"{tmp_path}/o", f"--image_loss={loss}", f"--text_loss={loss}")["test_accuracy"] is not None


def test_text_can_be_the_target_and_images_the_auxiliary(data, tmp_path):
    assert train(data, f"{tmp_path}/o", "--target=text")["target"] == "text"


def test_one_two_and_three_slots_run_through_the_same_lines(data, tmp_path):
    assert set(train(data, f"{tmp_path}/1", "--text=")["losses"]) == {"image"}
    three = train(data, f"{tmp_path}/3", "--text2=pydoc", "--text2_loss=next", "--text2_batch=8")
    assert three["losses"] == dict(image="label", text="label", text2="next")


def test_sound_can_be_the_target_with_pictures_and_text_beside_it(data, tmp_path):
    result = train(data, f"{tmp_path}/o", "--target=audio", "--audio=shapes", "--audio_examples=128", "--audio_batch=16", "--image_loss=next", "--text2=shapes")
    assert result["losses"] == dict(audio="label", image="next", text="label", text2="next") and result["examples"]["audio"] == 128
    report, _ = B.analyse(f"{tmp_path}/o")
    assert set(report["robustness"]) == set(B.SOUND_CORRUPTIONS) and set(report["alignment"]) == {"image", "text", "text2"}


def test_frozen_features_through_a_bare_head_learn_and_start_from_class_means(tmp_path):
    """With layers=0, head_from and temperature this is the paper's frozen-encoder setting; text says where classes lie."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (6, 8))
    for name, n in (("image", 120), ("text", 300)):
        labels = np.arange(n) % 6
        np.savez(tmp_path / f"{name}.npz", features=centres[labels] + rng.normal(0, 0.3, (n, 8)), labels=labels)
    argv = [f"--image=npz:{tmp_path}/image.npz", f"--text=npz:{tmp_path}/text.npz", "--text_loss=label", "--layers=0", "--width=32", "--head_from=text",
            "--temperature=True", "--image_examples=30", "--steps=150", "--learning_rate=0.01", f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/o"]
    assert T.run(T.read_run_config(argv), quiet)["test_accuracy"] > 0.8
    np.save(tmp_path / "new.npy", centres)  # embed takes what the source gave, as an array
    B.embed(f"{tmp_path}/o", f"{tmp_path}/new.npy")
    assert [row.split(",")[1] for row in open(tmp_path / "o/embed.csv").read().splitlines()[1:]] == list("012345")
    np.save(tmp_path / "new.npy", centres[:, :5])
    for path, words in (("new.npy", r"\(n, 1, 8\), found \(6, 1, 5\)"), ("image.npz", "no .npy array"), ("none.npy", "no .npy array")):
        with pytest.raises(P.UserError, match=words):
            B.embed(f"{tmp_path}/o", f"{tmp_path}/{path}")
    cfg, slots, classes = (c := T.resolve(T.read_run_config(argv), quiet)), *T.open_slots(c, quiet)
    model = T.build_model(cfg, T.model_slots(slots), classes)
    T.start_head_from(model, slots["text"], B.CPU)
    features = T.extract(model, slots["text"], slots["text"].val, np.arange(24), B.CPU)
    assert ((features @ model.label_head.weight.T).argmax(1).numpy() == slots["text"].val["labels"][:24]).mean() > 0.8
    with pytest.raises(P.UserError, match="must name an auxiliary slot"):
        T.run(T.read_run_config([*argv, "--head_from=audio"]), quiet)


def test_a_handful_of_pictures_is_learned_by_heart(data):
    cfg, slots, classes = opened(data, "--image_examples=64", "--text=", "--image_shift=0", "--image_batch=64")
    model = T.build_model(cfg, T.model_slots(slots), classes)
    optimizer = T.make_optimizer(model, dict(cfg, learning_rate=5e-3), B.CPU)
    for update in range(120):
        optimizer.zero_grad()
        loss = model("image", **T.train_batch(slots["image"], 0, update, B.CPU))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_the_linear_world_runs_through_the_ordinary_loop(tmp_path):
    """An autoencoder whose bottleneck holds as many units as x has latents must read nearly all of them."""
    argv = ["--image=gaussian:x", "--text=gaussian:y", "--image_loss=reconstruct", "--text_loss=reconstruct", "--mask_ratio=0", "--bottleneck=6", "--gaussian_shared=4",
            "--gaussian_private=2", "--gaussian_weak=1.0", "--gaussian_count=2000", "--width=32", "--layers=1", "--heads=2", "--steps=400", "--eval_interval=400",
            "--learning_rate=5e-3", f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/o"]
    result = T.run(T.read_run_config(argv), quiet)
    assert result["test_accuracy"] is None and result["test_r2"] > 0.9
    one, two = (P.load_split(prepared(tmp_path / "d", f"--image=gaussian:{side}", "--gaussian_count=2000"), "train")["latents"] for side in "xy")
    assert not {tuple(row) for row in one} & {tuple(row) for row in two}


def test_unseen_classes_have_no_labelled_examples(data):
    _, slots, _ = opened(data, "--unseen_classes=8", "--image_examples=112")
    slot = slots["image"]
    assert len(slot.banned) == 8 and not np.isin(slot.train["labels"][slot.rows], slot.banned).any()
    assert len(T.model_slots(slots)["image"]["rows"]) == 56 and len(T.model_slots(slots)["text"]["rows"]) == 64


def test_the_keys_of_the_linear_world_decide_what_it_shows():
    """30 dimensions of which 6 vary beyond the noise of 0.2; two shared latents are seen in full, the other two at a tenth."""
    cfg = P.read_config([f"--gaussian_{k}={v}" for k, v in dict(observed=30, shared=4, private=2, noise=0.2, clear=2, weak=0.1).items()], P.PREPARE_KEYS)
    raw = P.gaussian_source(cfg, "image", "x")
    seen, latents = raw["train"][0], raw["train_latents"]
    spread = np.linalg.eigvalsh(np.cov(seen.T))
    assert seen.shape == (11111, 30) and spread[:24] == pytest.approx(0.04, rel=0.15) and spread[24] > 0.1
    strength = np.linalg.norm(np.linalg.lstsq(latents, seen, rcond=None)[0], axis=1)
    assert strength[:2].min() > 3 and strength[2:] == pytest.approx(30**0.5 / 10, rel=0.4)


def test_the_control_keeps_marginals_and_destroys_structure(data):
    (_, plain, _), (_, control, _) = (opened(data, "--text_loss=next+label", "--text_examples=640", *more) for more in ([], ["--control=True"]))
    a, b, rows = plain["text"].train, control["text"].train, plain["text"].rows
    real = np.arange(32) < a["lengths"][rows][:, None]
    before, after = a["tokens"][rows], b["tokens"][rows]
    assert np.array_equal(np.sort(before[real]), np.sort(after[real])) and (before != after)[real].mean() > 0.5
    assert np.array_equal(np.bincount(a["labels"][rows]), np.bincount(b["labels"][rows])) and (a["labels"] == b["labels"])[rows].mean() < 0.1
    assert np.array_equal(plain["image"].train["labels"], control["image"].train["labels"])


def test_the_control_shuffles_items_of_one_token_number_by_number(tmp_path):
    """Whole vectors in another order are the same data: once the linear world's control was no control at all."""
    argv = ["--image=gaussian:x", "--text=gaussian:y", "--image_loss=reconstruct", "--text_loss=reconstruct", "--bottleneck=4", "--gaussian_count=300"]
    (plain, _), (control, _) = (T.open_slots(T.resolve(T.read_run_config([*argv, *more, f"--data_dir={tmp_path}"]), quiet), quiet)
                                for more in ([], ["--control=True"]))
    rows = plain["text"].rows
    before, after = plain["text"].train["tokens"][rows][:, 0], control["text"].train["tokens"][rows][:, 0]
    assert np.array_equal(np.sort(before, 0), np.sort(after, 0))
    assert abs(np.corrcoef(before.T) - np.eye(50)).max() > 0.6 and abs(np.corrcoef(after.T) - np.eye(50)).max() < 0.4


def test_init_from_takes_the_trunk_and_freeze_keeps_it(data, tmp_path):
    train(data, f"{tmp_path}/text", "--target=text", "--image=")
    train(data, f"{tmp_path}/image", "--text=", f"--init_from={tmp_path}/text", "--freeze_trunk=True")
    one, two = weights(f"{tmp_path}/text", "best.pt"), weights(f"{tmp_path}/image")
    assert all(torch.equal(one[k], two[k]) for k in one if k.startswith("trunk") and "norm" not in k)
    assert not torch.equal(one["norm.weight"], two["norm.weight"])
    with pytest.raises(P.UserError, match="another width"):
        train(data, f"{tmp_path}/wide", "--width=64", f"--init_from={tmp_path}/text")


# -- probe ------------------------------------------------------------------------------------------------------------


def test_measures_know_their_answers():
    """Identical, rotated and random inputs give what theory says."""
    a = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))[0]
    noise = torch.randn(40, 12, generator=torch.Generator().manual_seed(2))
    assert B.cka(a, a) == pytest.approx(1, abs=1e-4) and B.cka(a, 3 * a @ rotation + 5) == pytest.approx(1, abs=1e-4) and B.cka(a, noise) < 0.5
    assert B.mutual_knn(a, a @ rotation, 5) == 1 and B.mutual_knn(a, noise, 5) < 0.4
    assert torch.allclose(B.unit_agreement(a, 2 * a + 1), torch.ones(12), atol=1e-5) and B.unit_agreement(a, noise).abs().mean() < 0.3
    assert B.permutation_p(B.cka, a, a @ rotation)[1] < 0.01 and B.permutation_p(B.cka, a, noise)[1] > 0.05
    labels = torch.arange(40) % 2
    split = noise + 20 * labels[:, None]
    assert B.knn_accuracy(split, labels, split, labels) > 0.9 and B.class_spread(split, labels) > 20 * B.class_spread(noise, labels)
    weight, bias = torch.tensor([[0.0], [2.0]]), torch.tensor([0.0, 0.0])
    x = torch.tensor([[-1.0], [1.0], [3.0], [-3.0]])
    assert torch.allclose(B.margins(x, torch.tensor([0, 1, 1, 0]), weight, bias) * x.std(), torch.tensor([1.0, 1.0, 3.0, 3.0]), atol=1e-5)
    assert B.few_shot(split, labels, split, labels, shots=(4,))[4][0] == 1


def test_statistics_agree_with_tables():
    assert B.t_tail(2.776, 4) == pytest.approx(0.05, abs=1e-4) and B.t_tail(0, 9) == pytest.approx(1) and B.t_tail(3.250, 9) == pytest.approx(0.01, abs=1e-4)
    mean, half = B.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5, rel=1e-3)
    d = B.paired([2, 3, 4, 5.5], [1, 2, 3, 4])
    assert d["mean"] == 1.125 and d["sign_flip_p"] == d["sign_flip_floor"] == 0.125 and d["p"] < 0.01


@pytest.mark.parametrize("kind", B.PICTURE_CORRUPTIONS)
def test_corruptions_grow_with_severity(kind):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    damage = [np.abs(B.corrupt_pictures(pictures, kind, s).astype(int) - pictures).mean() for s in (1, 2, 3)]
    assert 0 < damage[0] < damage[1] < damage[2]


@pytest.mark.parametrize("kind", B.SOUND_CORRUPTIONS)
def test_sound_corruptions_grow_with_severity(kind):
    tokens = np.random.default_rng(0).integers(60, 200, (4, 16, 160)).astype(np.uint8)
    damage = [np.abs(B.corrupt_frames(tokens, 40, kind, s).astype(int) - tokens).mean() for s in (1, 2, 3)]
    assert 0 < damage[0] < damage[1] < damage[2]


def test_theory_agrees_with_what_can_be_worked_out_by_hand(tmp_path, capsys):
    """No nuisance: information is A'A / noise^2. A nuisance hides its direction. Rates: 1/w^2 in a direction of strength w."""
    eye, none = np.eye(3), np.zeros((3, 1))
    assert np.allclose(B.information(eye, none, 0.5), 4 * eye)
    assert np.allclose(B.information(eye, eye[:, :1], 1.0), np.diag([0, 1, 1]))  # a private cause of the first coordinate drowns it
    rates, vectors = B.exchange_rates(B.information(eye * [1, 0.1, 0], none, 1.0), B.information(eye, none, 1.0))
    assert np.allclose(np.sort(rates)[:2], [1, 100]) and np.isinf(rates).sum() == 1 and abs(vectors[2, np.isinf(rates)]) > 0.99
    bound = np.trace(np.linalg.inv(200 * 4 * eye))
    mean, error = B.monte_carlo([(eye, none, 0.5, 200)], 50_000)
    assert abs(mean / bound - 1) < 0.02 and error < 0.01 * bound
    with pytest.raises(P.UserError, match="no modality sees the direction"):
        B.exchange_rates(np.diag([1.0, 0]), np.diag([1.0, 0]))
    with pytest.raises(P.UserError, match="must be positive"):
        B.information(eye, none, 0.0)
    out = B.theory(str(tmp_path), repetitions=50_000)
    assert all(abs(row["measured"] / row["bound"] - 1) < 0.02 for row in out["traces"]) and out["loewner_gain"][0] > 0
    assert out["exchange_rates"].count(None) == 1 and out["slope"] == pytest.approx(-2, abs=0.1) and (tmp_path / "theory.png").exists()


def test_probe_refuses_what_it_would_not_use(tmp_path, monkeypatch):
    """`probe.py RUN --threads=1` took the key for a run, minutes later; `compare --seed=3` silently ran eight seeds."""
    monkeypatch.setattr(sys, "argv", ["probe.py", str(tmp_path), "--threads=1"])
    with pytest.raises(P.UserError, match="takes no keys"):
        B.main()
    with pytest.raises(P.UserError, match="did you mean --seeds=3"):
        B.compare(["--image=shapes", "--text=shapes", "--seed=3"])


def test_the_worth_of_an_example_is_read_off_the_line_through_alone():
    """Alone gains 0.1 with every doubling, uml is half of that above or below it; beyond the ends of the line nothing is claimed."""
    arm = lambda mean: dict(mean=mean, half=0.0)
    results = lambda gain: [dict(examples=10 * k, chance=0.1, arms=dict(alone=arm(0.1 * i), uml=arm(0.1 * i + gain))) for i, k in enumerate((1, 2, 4))]
    assert "1 are worth 1.4; 2 are worth 2.8; 4 are worth more than 4." in B.worth(results(0.05))
    assert "1 are worth fewer than 1; 2 are worth 1.4; 4 are worth 2.8." in B.worth(results(-0.05))
    with pytest.raises(P.UserError, match="do not rise"):
        B.worth(results(0.05)[::-1])


def test_holm_keeps_what_stays_significant_among_many():
    """0.01 of three passes 0.05 / 3, 0.02 then passes 0.05 / 2, and 0.06 does not pass 0.05."""
    row = lambda title, p, mean: (title, dict(arms=dict(uml=dict(minus_alone=dict(p=p, mean=mean)))))
    assert "below 0.05: b; a (harm)." in B.holm([row("a", 0.02, -1), row("b", 0.01, 1), row("c", 0.06, 1)])


def test_exchange_recovers_the_known_rate_of_the_linear_world():
    """One direction, x shows it with strength 0.5 and y in full: a y sample is worth 4 of x, and the fit must say so."""
    n_x, n_y = np.array([(x, y) for x in (50, 200, 800) for y in (0, 50, 200, 800)], float).T
    one, none = np.ones((1, 1)), np.zeros((1, 1))
    measured = [B.monte_carlo([(0.5 * one, none, 1.0, x), (one, none, 1.0, max(y, 1e-9))], 20_000, seed=i)[0] for i, (x, y) in enumerate(zip(n_x, n_y))]
    fit = B.fit_exchange(n_x, n_y, -np.log(measured))
    assert fit["gamma"] == 1 and fit["rho"] == pytest.approx(4, rel=0.15) and fit["b1"] == pytest.approx(1, abs=0.05)
    with pytest.raises(P.UserError, match="no exchange rate"):
        B.fit_exchange(n_x, 0 * n_y, -n_x)


def test_exchange_runs_a_grid(tmp_path, monkeypatch, capsys):
    argv = ["--image=shapes", "--text=shapes", "--text_loss=label", "--width=16", "--layers=1", "--heads=2", "--steps=3", "--image_batch=8", "--text_batch=8",
            "--seeds=2", f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/o"]
    for words, more in (("exactly two lists", ["--image_examples=[64,128]"]), ("no grid to fit", ["--image_examples=[64,128]", "--text_examples=[0,64]"]),
                        ("no grid to fit", ["--image_examples=[64,128,192]", "--text_examples=[0,-1]"]),
                        ("whole numbers", ["--image_examples=[64,x]", "--text_examples=[0,64]"]),
                        ("image_examples=9999", ["--image_examples=[64,128,9999]", "--text_examples=[0,64]"])):
        with pytest.raises(P.UserError, match=words):
            B.exchange(argv + more)
    assert not list(tmp_path.glob("o/compare/run-*"))  # refused before anything was trained
    monkeypatch.setattr(B, "fit_exchange", lambda *cells: dict(rho=0.1, gamma=1.0, b0=0.0, b1=0.1, residual=0.0))  # three steps teach nothing to fit
    out = B.exchange([*argv, "--image_examples=[64,128,192]", "--text_examples=[0,64]"])
    assert len(out["cells"]) == 6 and out["rate"] == pytest.approx(0.1) and 3 < out["words_per_item"] < 20 and (tmp_path / "o/exchange.png").exists()
    assert "words" in capsys.readouterr().out


@pytest.mark.parametrize("alone, control, seeds, words", [
    ((0.03, 0.001), (0.02, 0.01), 8, "data helped: uml minus alone is +3.0 [+2.0, +4.0] points"), ((0.03, 0.001), (0.02, 0.2), 8, "not shown"),
    ((0.03, 0.001), (-0.02, 0.01), 8, "not shown"), ((0.03, 0.001), None, 8, "no control"), ((0.03, 0.2), (0.02, 0.01), 8, "no effect"),
    ((-0.03, 0.001), (0.02, 0.01), 8, "hurt"), ((0.03, 0.001), (0.02, 0.01), 5, "too few seeds")])
def test_the_verdict_claims_help_only_above_alone_and_above_the_control(alone, control, seeds, words):
    arms = dict(uml=dict(minus_alone=dict(mean=alone[0], half=0.01, p=alone[1])))
    if control:
        arms["control"] = dict(uml_minus=dict(mean=control[0], half=0.01, p=control[1]))
    assert words in B.verdict(dict(arms=arms, chance=0.1, seeds=seeds))
    assert "+0.030" in (said := B.verdict(dict(arms=arms, chance=None, seeds=seeds))) or alone[0] < 0, said


def test_compare_gives_every_speaker_a_turn_and_chooses_within_each_fold(tmp_path):
    """With audio_test_group='each', seed k is tested on the k-th speaker, and its rate is chosen on its own validation speaker."""
    root = speaker_folder(tmp_path / "r", speakers=("1", "2", "3"))
    argv = [f"--audio=folder:{root}", "--audio_groups=_([0-9])_", "--audio_test_group=each", "--target=audio", "--text=pydoc", "--text_batch=4", "--width=16",
            "--layers=1", "--heads=2", "--steps=2", "--audio_batch=4", "--arms=alone,uml", f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/o"]
    out = B.compare([*argv, "--seeds=3", "--search=1,2"])
    made = [json.load(open(tmp_path / "o/compare" / run / "config.json")) for run in os.listdir(tmp_path / "o/compare")]
    assert {(c["seed"], c["audio_test_group"], c["audio_val_group"]) for c in made} == {(k, f"#{k}", f"#{k + 1}") for k in range(3)}
    assert np.shape(out["arms"]["uml"]["search_scores"]) == (3, 2) and out["folds"] == 3
    out = B.compare([*argv, "--seeds=6", "--search=1"])  # two seeds a speaker are averaged before speakers are compared
    means = np.reshape(out["arms"]["alone"]["scores"], (2, 3)).mean(0)
    assert out["folds"] == 3 and out["arms"]["alone"]["half"] == pytest.approx(B.t_interval(means)[1]) and "too few speakers" in out["verdict"]


def test_compare_searches_without_the_test_split_shares_warm_starts_and_is_cached(tmp_path, monkeypatch, capsys):
    """During the search the test files are gone; a second call runs nothing; the verdict waits for six seeds."""
    argv = ["--image=shapes", "--text=shapes", "--text_loss=label", "--image_examples=128", "--width=16", "--layers=1", "--heads=2", "--steps=3", "--eval_interval=3",
            "--warm_start_steps=2", "--image_batch=8", "--text_batch=8", f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/o",
            "--seeds=2", "--search=learning_rate=1e-3,weight_decay=0.5;learning_rate=2e-3,text_updates=2", "--arms=alone,uml,control,longer,init,frozen"]
    folder = prepared(f"{tmp_path}/d", "--image=shapes")
    tests, ran = [f for f in os.listdir(folder) if f.startswith("test")], []

    def guarded(cfg):
        ran.append(cfg)
        hide = not cfg["score_test"]
        for f in tests if hide else []:
            os.rename(os.path.join(folder, f), os.path.join(tmp_path, f))
        try:
            return T.run(cfg, say=quiet)
        finally:
            for f in tests if hide else []:
                os.rename(os.path.join(tmp_path, f), os.path.join(folder, f))

    monkeypatch.setattr(B, "quiet_run", guarded)
    out = B.compare(argv)
    assert list(out["arms"]) == ["alone", "uml", "control", "longer", "init", "frozen"] and "too few seeds" in out["verdict"]
    assert out["arms"]["longer"]["gflops"] >= 0.6 * out["arms"]["uml"]["gflops"] > out["arms"]["alone"]["gflops"]
    warm = [c for c in ran if "warm-" in c["out_dir"]]
    assert len(warm) == len({c["out_dir"] for c in warm})  # never twice, and fewer than arms times seeds times candidates
    assert len(warm) <= 14 and {c["weight_decay"] for c in ran} == {0.5, T.KEYS["weight_decay"][0]}
    monkeypatch.setattr(T, "set_up", None)  # whatever still trained would end in a TypeError
    assert B.compare(argv) == out
    assert out["command"].count("'") == 2  # its ';' does not end the command in a shell
    assert os.path.exists(tmp_path / "o/compare.png") and "verdict" in capsys.readouterr().out


def test_probe_reads_runs_side_by_side_and_embeds_new_files(data, tmp_path, monkeypatch, capsys):
    train(data, f"{tmp_path}/uml"), train(data, f"{tmp_path}/alone", "--text=")
    monkeypatch.setattr(sys, "argv", ["probe.py", f"{tmp_path}/uml", f"{tmp_path}/alone"])
    B.main()
    reports = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert len(reports) == 2 and len(reports[0]["layers"]) == 3 and reports[0]["alignment"]["text"]["classes"] == 64 and not reports[1]["alignment"]
    assert {"confusion.png", "pca.png", "side_by_side.png"} <= set(os.listdir(tmp_path / "uml"))
    pictures = picture_folder(tmp_path / "new")
    train(data, f"{tmp_path}/next", "--text=", "--image_loss=next")  # no label head of its own: embed fits a probe
    B.embed(f"{tmp_path}/next", pictures)
    B.embed(f"{tmp_path}/uml", pictures)
    features = np.load(tmp_path / "uml/embed.npy")
    rows = open(tmp_path / "uml/embed.csv").read().splitlines()
    assert features.shape == (24, 32) and len(rows) == 25 and rows[0] == "file,class,probability" and rows[1].split(",")[1] in P.SHAPE_CLASSES
    snippet = re.search(r"```python\n(import numpy.*?)```", open(os.path.join(HERE, "README.md"), encoding="utf-8").read(), re.S)[1]
    run = snippet.replace("out/shapes_text", f"{tmp_path}/uml") + "print(features.shape[1])"
    assert subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, cwd=HERE).stdout.strip() == "32"


def test_probe_says_where_there_is_no_run(tmp_path):
    assert "no finished run" in refusal(tmp_path, script="probe.py")


# -- README -----------------------------------------------------------------------------------------------------------


def test_the_readmes_commands_parse_and_its_tables_are_current(tmp_path, monkeypatch):
    """Every python command in a code block names a file that exists and keys that exist; `report` changes nothing."""
    monkeypatch.chdir(HERE)
    text = open("README.md", encoding="utf-8").read()
    commands = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.split("\n")]
    commands = [c.split("&&")[-1].split() for c in commands if "python " in c]
    assert len(commands) > 8 and not re.search("«|%%|NUMBERS|FEATURES", text)  # no figure left to fill in
    for words in commands:
        script, args = words[1], words[2:]
        if script in ("prepare.py", "train.py"):
            P.read_config([a for a in args], P.PREPARE_KEYS if script == "prepare.py" else T.KEYS, strict=script == "train.py")
        elif script == "probe.py" and args[0] == "compare":
            P.read_config(args[1:], dict(T.KEYS, **B.COMPARE_KEYS))
        else:
            assert script in ("probe.py", "-m"), words
    copy = tmp_path / "README.md"
    copy.write_text(text, encoding="utf-8")
    os.mkdir(tmp_path / "assets")  # where the curves go: beside the README that was given
    B.report(str(copy))
    assert copy.read_text(encoding="utf-8") == text and len(os.listdir(tmp_path / "assets")) == text.count("<!-- curve ")


def test_the_readmes_sizes_are_true():
    """Lines a file, within 5%: the README once gave the numbers of two sessions before."""
    text = open(os.path.join(HERE, "README.md"), encoding="utf-8").read().split("## Size, and what is left out")[1].split("The aim was")[0]
    said = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:lines )?of", text)]
    files = [open(os.path.join(HERE, name), encoding="utf-8").read().count("\n") for name in ("model.py", "prepare.py", "train.py", "probe.py", "test_uml.py")]
    assert len(said) == 5 and said == [pytest.approx(n, rel=0.05) for n in files]


def test_the_readmes_new_modality_runs_as_written(tmp_path):
    """Its three blocks are put where they say they belong, in a copy, and trained."""
    readme = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
    line, source, cfg = (re.search(rf"```python\n# {where}\n(.*?)```", readme, re.S)[1] for where in
                         ("prepare.py, in MODALITIES", "prepare.py, after SOURCES", "sample_configs/walks.py"))
    for name in ("prepare.py", "model.py", "train.py"):
        code = open(os.path.join(HERE, name), encoding="utf-8").read()
        if name == "prepare.py":
            code = code.replace("MODALITIES = dict(\n", "MODALITIES = dict(\n" + line, 1).replace("WITH_PATH = ", source + "\n\nWITH_PATH = ", 1)
        (tmp_path / name).write_text(code, encoding="utf-8")
    (tmp_path / "walks.py").write_text(cfg)
    done = subprocess.run([sys.executable, "train.py", "walks.py", "--threads=1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["test_accuracy"] > 0.6


@pytest.mark.parametrize("script", ["prepare.py", "train.py", "probe.py"])
def test_help_lists_the_keys(script):
    done = subprocess.run([sys.executable, os.path.join(HERE, script), "--help"], capture_output=True, text=True, cwd=HERE)
    keys = dict(P.PREPARE_KEYS if script == "prepare.py" else B.COMPARE_KEYS if script == "probe.py" else T.KEYS)
    assert done.returncode == 0 and all(f"  {key} = " in done.stdout for key in keys) and "Sections:" in done.stdout


# -- several processes ------------------------------------------------------------------------------------------------


def test_parts_of_a_batch_add_up_to_the_gradient_of_the_whole(data, monkeypatch):
    """Whatever the objective counts: items, real tokens or hidden ones."""
    cfg, slots, classes = opened(data, "--image_loss=label+reconstruct", "--text_loss=next+label+reconstruct")
    model = T.build_model(cfg, T.model_slots(slots), classes).double()
    for name, slot in slots.items():
        batch, grads = T.train_batch(slot, 0, 0, B.CPU), []
        for world in (1, 3):
            model.zero_grad(set_to_none=True)
            for rank in range(world):
                monkeypatch.setattr(T, "ranks", lambda: (rank, world))
                model(name, **(batch if world == 1 else T.my_part(batch))).backward()
            grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys() and all(torch.allclose(grads[0][k], grads[1][k], rtol=1e-9, atol=1e-12) for k in grads[0])


def test_two_processes_equal_one_and_resume_as_one(data, tmp_path):
    """In float64, with gloo, through the command line; the losses too, because AdamW would hide a wrong scale."""
    code = "import sys, torch; torch.set_default_dtype(torch.float64); sys.path.insert(0, sys.argv.pop(1)); import train; train.main()"
    argv = ["--image=shapes", "--text=shapes", "--image_examples=192", "--width=32", "--layers=2", "--heads=2", "--steps=6", "--image_batch=15",
            "--log_interval=1", "--text_batch=16", "--text_loss=next+label", f"--data_dir={data}", "--threads=1"]
    def free_port():  # asked for right before it is used, so that nobody else takes it meanwhile
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return s.getsockname()[1]
    def start(port, out, stop, rank=0, world=1):
        env = dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        return subprocess.Popen([sys.executable, "-c", code, HERE, *argv, f"--out_dir={tmp_path}/{out}", f"--stop_after={stop}", "--resume"],
                                env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    T.open_slots(T.resolve(T.read_run_config(argv), quiet), quiet)  # the small world, before the children meet the big one
    for runs in ([("two", 2, 0, 2), ("two", 2, 1, 2), ("one", 3)], [("two", 3)]):
        port = free_port()
        for job in [start(port, *one) for one in runs]:
            said, _ = job.communicate(timeout=120)
            assert job.returncode == 0, said
    one, two = weights(f"{tmp_path}/one"), weights(f"{tmp_path}/two")
    assert all(torch.allclose(one[k], two[k], rtol=1e-7, atol=1e-10) for k in one) and one["norm.weight"].dtype == torch.float64
    loss = lambda out: [list(json.loads(line)["loss"].values()) for line in open(tmp_path / out / "log.jsonl")]
    assert np.allclose(loss("one"), loss("two"), rtol=1e-9, atol=0), (loss("one"), loss("two"))


# -- faults: nothing is lost, and nothing half-written is taken for whole ---------------------------------------------


def test_interrupted_terminated_and_killed_a_run_ends_in_the_same_bits(data, tmp_path):
    """SIGINT and SIGTERM finish the step and save, kill -9 does not; --resume leads all to the weights of an undisturbed run."""
    argv = [sys.executable, os.path.join(HERE, "train.py"), "--image=shapes", "--text=shapes", "--image_examples=192", "--width=32", "--layers=2",
            "--heads=2", "--steps=120", "--warm_start_steps=20", "--eval_interval=10", "--log_interval=2", "--image_batch=16", "--text_batch=16",
            f"--data_dir={data}", "--threads=1"]
    whole = T.run(T.read_run_config([*argv[2:], f"--out_dir={tmp_path}/whole"]), quiet)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9), (None, 0)):
        job = subprocess.Popen([*argv, f"--out_dir={tmp_path}/o", "--resume"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said = ""
        while number and not re.search(r"step \d+/140 .*(ms/step)", said):
            said += job.stdout.readline()
        if number:
            job.send_signal(number)
        more, wrong = job.communicate(timeout=120)
        assert job.returncode == code, said + more + wrong
        assert "--resume goes on" in more or number in (signal.SIGKILL, None)
    result = json.load(open(tmp_path / "o/result.json"))
    timing = {"seconds", "samples_per_second", "peak_memory", "name"}
    assert {k: v for k, v in whole.items() if k not in timing} == {k: v for k, v in result.items() if k not in timing}
    one, two = weights(f"{tmp_path}/whole"), weights(f"{tmp_path}/o")
    assert all(torch.equal(one[k], two[k]) for k in one)


@contextlib.contextmanager
def disk_of(bytes_):
    """No file may grow beyond this: what a full disk does, without needing one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_named_and_costs_nothing_that_was_saved(data, tmp_path):
    assert train(data, f"{tmp_path}/o", "--stop_after=4") is None
    before = weights(f"{tmp_path}/o")
    with disk_of(20_000), pytest.raises(P.UserError, match=r"cannot write .*o/(last|best)\.pt .*: [\d,]+ bytes needed, [\d,]+ free"):
        train(data, f"{tmp_path}/o", "--resume")
    assert all(torch.equal(before[k], v) for k, v in weights(f"{tmp_path}/o").items())
    assert train(data, f"{tmp_path}/o", "--resume")
    with disk_of(20_000), pytest.raises(P.UserError, match="cannot write .*train_000.bin .* bytes needed"):
        prepared(tmp_path / "d", "--image=shapes")
    assert not os.path.exists(tmp_path / "d")


def test_a_folder_that_cannot_be_written_is_named(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for argv in (["--data_dir", f"{tmp_path}/file/d"], ["--out_dir", f"{tmp_path}/file/o"]):
        with pytest.raises(P.UserError, match="cannot write .*file/.*(Not a directory|File exists)"):
            T.run(dict(config(data, f"{tmp_path}/o"), **{argv[0][2:]: argv[1]}), quiet)


def test_two_processes_in_one_folder_wait_or_are_refused(data, tmp_path):
    with P.locked(f"{tmp_path}/.o.lock", "busy"), pytest.raises(P.UserError, match="another process is training into"):
        train(data, f"{tmp_path}/o")
    cfg = P.read_config(["--image=shapes", f"--data_dir={tmp_path}/d"], P.PREPARE_KEYS)
    folder = P.shard_folder(cfg, "image")[0]
    second = threading.Thread(target=P.prepare, args=(cfg, "image", quiet))
    with P.locked(f"{tmp_path}/d/.{os.path.basename(folder)}.lock", "busy"):
        second.start()
        time.sleep(0.5)
        assert second.is_alive() and not os.path.exists(folder)
    second.join()
    assert P.read_meta(folder)["splits"]["train"]["count"] and os.listdir(tmp_path / "d") == [os.path.basename(folder)]


def test_what_a_killed_prepare_left_is_swept_away(data, tmp_path):
    folder = P.shard_folder(P.read_config(["--image=shapes", f"--data_dir={tmp_path}/d"], P.PREPARE_KEYS), "image")[0]
    for rest in (f"{folder}.tmp", folder):
        os.makedirs(rest)
        (open(f"{rest}/train_000.bin", "w")).write("half")
    open(f"{tmp_path}/d/.{os.path.basename(folder)}.lock", "w").close()
    assert prepared(tmp_path / "d", "--image=shapes") == folder and os.listdir(tmp_path / "d") == [os.path.basename(folder)]
    whole = prepared(data, "--image=shapes")
    assert all(open(f"{whole}/{f}", "rb").read() == open(f"{folder}/{f}", "rb").read() for f in os.listdir(whole))


def test_a_flipped_bit_is_found_by_verify(tmp_path):
    folder = prepared(tmp_path, "--image=shapes")
    path = f"{folder}/val_000.bin"
    body = bytearray(open(path, "rb").read())
    body[0] ^= 1
    open(path, "wb").write(body)
    prepared(tmp_path, "--image=shapes")  # by size alone all is well
    with pytest.raises(P.UserError, match="wrong checksum"):
        prepared(tmp_path, "--image=shapes", "--verify=True")


def spoil(path, change):
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(data, tmp_path):
    whole = train(data, f"{tmp_path}/whole")
    train(data, f"{tmp_path}/o", "--stop_after=4"), train(data, f"{tmp_path}/o", "--stop_after=7", "--resume")
    last, said = f"{tmp_path}/o/last.pt", []
    open(last, "r+b").truncate(3000)
    result = T.run(dict(config(data, f"{tmp_path}/o"), resume=True), said.append)
    assert result["test_accuracy"] == whole["test_accuracy"] and any("last.pt is damaged" in line and "going back to" in line for line in said)
    one, two = weights(f"{tmp_path}/whole"), weights(f"{tmp_path}/o")
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_run_goes_on_with_another_number_of_threads(data, tmp_path):
    """Whoever finds the machine busy may resume with --threads=1; without the key the stored number is used again."""
    train(data, f"{tmp_path}/o", "--threads=1", "--stop_after=4")
    said = []
    T.run(config(data, f"{tmp_path}/o", "--stop_after=5", "--resume"), said.append)
    assert torch.get_num_threads() == 1
    assert T.run(config(data, f"{tmp_path}/o", "--threads=2", "--resume"), said.append)["test_accuracy"] is not None
    torch.set_num_threads(1)
    assert any("changed since step 5: threads" in line for line in said)


def test_checkpoints_that_do_not_fit_are_refused(data, tmp_path):
    def halt(change, words, *more):
        train(data, f"{tmp_path}/o", "--stop_after=2")
        spoil(f"{tmp_path}/o/last.pt", change)
        with pytest.raises(P.UserError, match=words):
            train(data, f"{tmp_path}/o", "--resume", *more)
        P.shutil.rmtree(tmp_path / "o")
    halt(lambda s: s["model"]["norm.weight"].fill_(torch.nan), "norm.weight is not finite")
    halt(lambda s: s.update(format=0), "format 0 where this code writes")
    halt(lambda s: s.pop("updates"), "KeyError: 'updates'")
    halt(lambda s: s["model"].update({"norm.weight": torch.ones(7)}), "of another architecture")
    halt(lambda s: s["config"].update(seed=3), "another config .different: seed")
    halt(lambda s: None, "another config .different: width", "--width=16")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(data, tmp_path, monkeypatch):
    train(data, f"{tmp_path}/o", "--stop_after=4")
    before, forward = weights(f"{tmp_path}/o"), M.UML.forward
    monkeypatch.setattr(M.UML, "forward", lambda self, slot, tokens, **more: forward(self, slot, tokens, **more) * (torch.nan if slot == "text" else 1))
    with pytest.raises(P.UserError, match="the text loss became nan in step 5: lower --learning_rate"):
        train(data, f"{tmp_path}/o", "--resume")
    assert all(torch.equal(before[k], v) for k, v in weights(f"{tmp_path}/o").items())


def test_a_reader_that_leaves_and_a_terminal_without_utf8_do_not_end_a_run(data, tmp_path):
    """`| head`, stdout closed, a folder with blanks and Chinese letters, an ASCII locale."""
    env = dict(os.environ, PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    argv = [sys.executable, os.path.join(HERE, "train.py"), "--image=shapes", "--image_examples=192", "--width=16", "--layers=1", "--heads=2",
            "--steps=6", "--log_interval=1", f"--data_dir={data}", "--threads=1"]
    left = subprocess.Popen([*argv, f"--out_dir={tmp_path}/ein Lauf 中文"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    left.stdout.readline()
    left.stdout.close()
    closed = subprocess.Popen([*argv, f"--out_dir={tmp_path}/closed"], stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    for job, name in ((left, "ein Lauf 中文"), (closed, "closed")):
        wrong = job.communicate(timeout=120)[1]
        assert job.returncode == 0 and not wrong, wrong
        assert json.load(open(tmp_path / name / "result.json"))["steps"] == 6


# -- inputs from strangers --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(answer):
    """answer(handler) replies to every GET on the address this yields."""
    class Handler(http.server.BaseHTTPRequestHandler):
        do_GET = lambda self: answer(self)
        log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{s.server_port}/file"
        s.shutdown()


def test_downloads_that_go_wrong_leave_nothing_and_a_right_one_stays(tmp_path, monkeypatch):
    """An HTML page with status 200, a body cut short, an error, a stall; then a redirect to the right file."""
    monkeypatch.setattr(P, "PATIENCE", 0.3)
    cfg, body = dict(raw_dir=str(tmp_path / "raw")), b"right" * 1000
    sha256 = P.hashlib.sha256(body).hexdigest()
    def reply(status=200, data=b"", length=None, **headers):
        def answer(handler):
            handler.send_response(status)
            for key, value in dict({"Content-Length": str(len(data) if length is None else length)}, **headers).items():
                handler.send_header(key, value)
            handler.end_headers()
            handler.wfile.write(data)
        return answer
    def stall(handler):
        reply(200, body[:9], len(body))(handler)
        time.sleep(1)
    for answer, words in ((reply(data=b"<html>log in first</html>"), "wrong checksum"), (reply(data=body[:99], length=len(body)), "99 of 5000|IncompleteRead"),
                          (reply(404), "404"), (stall, "timed out")):
        with server(answer) as url, pytest.raises(P.UserError, match=f"({words}).*by hand"):
            P.raw_file(cfg, "s", "f", url, sha256)
        assert not os.path.exists(tmp_path / "raw/s")
    with server(lambda h: reply(data=body)(h) if h.path == "/right" else reply(302, Location="/right")(h)) as url:
        path = P.raw_file(cfg, "s", "f", url, sha256)
    assert open(path, "rb").read() == body and os.listdir(tmp_path / "raw/s") == ["f"]


def test_archives_are_never_extracted_and_their_sizes_are_capped(tmp_path, monkeypatch):
    """Names with .., links, a member that claims too much, a gzip bomb: refused or passed over, nothing lands on the disk."""
    path = tmp_path / "raw/cifar10/cifar-10-binary.tar.gz"
    os.makedirs(path.parent)
    monkeypatch.setattr(P, "CIFAR10_SHA256", None)
    link = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    bomb = tarfile.TarInfo("cifar-10-batches-bin/data_batch_2.bin")
    bomb.size = 50_000_000
    for member, words in ((tarfile.TarInfo("../../escaped"), "lacks"), (link, "lacks"), (bomb, "claims 50000000 bytes, more than")):
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
        with pytest.raises(P.UserError, match=words):
            prepared(tmp_path / "d", "--image=cifar10", f"--raw_dir={tmp_path}/raw")
    assert [f for _, _, files in os.walk(tmp_path) for f in files] == ["cifar-10-binary.tar.gz"]


def test_pictures_of_every_odd_kind_are_read_or_refused(tmp_path):
    def save(name, picture, **more):
        picture.save(tmp_path / name, **more)
        return P.read_picture(str(tmp_path / name), 8)
    assert save("cmyk.jpg", Image.new("CMYK", (20, 20), (0, 0, 0, 0))).min() > 240
    assert (save("clear.png", Image.new("P", (20, 20), 0), transparency=0) == 255).all()
    assert save("dot.png", Image.new("RGB", (1, 1), "red"))[4, 4].tolist() == [255, 0, 0]
    assert save("wide.png", Image.new("L", (20000, 3), 9)).shape == (8, 8, 3)
    half = Image.new("RGB", (16, 16), "white")
    half.paste("black", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    assert save("turned.jpg", half, exif=exif)[:, 0].mean() > 200 > 100 > save("upright.jpg", half)[0].mean()
    assert (save("moves.gif", Image.new("L", (9, 9), 7), save_all=True, append_images=[Image.new("L", (9, 9), 200)]) == 7).all()
    whole = (tmp_path / "wide.png").read_bytes()
    for name, body in (("empty.png", b""), ("cut.png", whole[:60]), ("text.png", b"hello")):
        (tmp_path / name).write_bytes(body)
        with pytest.raises(P.UserError, match=f"{name} is not a readable image"):
            P.read_picture(str(tmp_path / name), 8)
    ihdr = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)  # 10 GB once decoded
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", P.zlib.crc32(kind + data))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", P.zlib.compress(b"x")) + chunk(b"IEND", b""))
    with pytest.raises(P.UserError, match="bomb.png is not a readable image .*decompression bomb"):
        P.read_picture(str(tmp_path / "bomb.png"), 8)


def test_wave_headers_that_lie_are_refused():
    """No channels, no rate, one that would need a filter of terabytes, sizes beyond the file, odd widths, a header cut short."""
    def header(channels=1, rate=8000, bits=16, size=200, kind=1):
        block = channels * bits // 8
        return (b"RIFF" + struct.pack("<I", (36 + size) % 2**32) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, kind, channels, rate, rate * block, block, bits)
                + b"data" + struct.pack("<I", size))
    cfg = P.read_config([], P.PREPARE_KEYS)
    for head in (header(channels=0), header(rate=0), header(rate=10_000_019, size=50), header(size=2**31), header(size=2**32 - 1),
                 header(bits=12), header(bits=0), header(bits=64), header()[:30]):
        with pytest.raises(P.UserError, match="a.wav"):
            P.read_recording(cfg, io.BytesIO(head + bytes(range(50))), "a.wav")


def test_odd_text_is_text(tmp_path):
    """A byte-order mark, NUL, empty lines, a line of 10 MB, and words that other tokenizers take for commands."""
    odd = "<|endoftext|> and <s>"
    (tmp_path / "t.txt").write_text("\ufeff" + odd + "\n\n\x00 in here\n" + "ab " * 3_500_000 + "\n" + "plain line\n" * 30, encoding="utf-8")
    folder = prepared(tmp_path / "d", f"--text=file:{tmp_path}/t.txt", "--vocab_size=300")
    assert P.read_meta(folder)["splits"]["train"]["count"] > 20 and P.load_bpe(folder).decode(P.load_bpe(folder).encode_ordinary(odd)) == odd


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_files_from_strangers_execute_nothing(tmp_path):
    """A checkpoint, features, a config and shard descriptions that try."""
    mark = str(tmp_path / "executed")
    torch.save(dict(model=Attack(mark)), tmp_path / "best.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Attack(mark)))
    np.savez(tmp_path / "f.npz", features=np.array([Attack(mark)], object))
    (tmp_path / "c.py").write_text(f"import os\nos.mkdir({mark!r})\n")
    for attempt in (lambda: T.load_model(tmp_path / "best.pt"), lambda: T.load_model(tmp_path / "raw.pt"),
                    lambda: prepared(tmp_path / "d", f"--image=npz:{tmp_path}/f.npz"), lambda: T.read_run_config([f"{tmp_path}/c.py"])):
        with pytest.raises(P.UserError):
            attempt()
    folder = prepared(tmp_path / "d", "--text=pydoc")
    meta = P.read_meta(folder)
    meta["splits"]["train"]["files"]["tokens"][0]["file"] = "../../train_000.bin"
    P.write_json(f"{folder}/meta.json", meta)
    with pytest.raises(P.UserError, match="damaged .*files of train"):
        P.load_split(folder, "train")
    assert not os.path.exists(mark)


# -- fuzzing: whatever comes in, it works or is refused with the project's own sentence. UML_FUZZ=10000 for the long run -----

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError:
    fuzz = lambda **strategies: pytest.mark.skip("hypothesis is not installed")
    st = None
else:
    def fuzz(**strategies):
        often = settings(max_examples=int(os.environ.get("UML_FUZZ", 60)), deadline=None, database=None,
                         suppress_health_check=list(HealthCheck))
        return lambda test: often(given(**strategies)(test))

anything = st and st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                               lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3), max_leaves=6)


def survives(attempt):
    """True if it worked, False if it was refused in one sentence; anything else is the traceback we look for."""
    try:
        attempt()
        return True
    except P.UserError as problem:
        assert str(problem)
        return False


def damaged(data, body):
    """body with some bytes changed, cut off or added."""
    body = bytearray(body)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, max(0, len(body) - 1)))
        kind = data.draw(st.sampled_from(("change", "cut", "add")))
        if kind == "cut" and data.draw(st.booleans()):
            del body[at:]
        elif kind == "add":
            body[at:at] = data.draw(st.binary(max_size=9))
        elif body:
            body[at % len(body)] = data.draw(st.integers(0, 255))
    return bytes(body)


@fuzz(data=st and st.data())
def test_fuzz_configs_and_overrides(data, tmp_path_factory):
    keys = st.sampled_from(list(T.KEYS)) | st.text(max_size=12)
    lines = data.draw(st.lists(st.tuples(keys, anything.map(repr) | st.text(max_size=20)), max_size=4))
    path = tmp_path_factory.getbasetemp() / "fuzz.py"
    path.write_text("\n".join(f"{key} = {value}" for key, value in lines), encoding="utf-8", errors="replace")
    argv = [str(path)] * data.draw(st.booleans()) + [f"--{key}={value}" for key, value in data.draw(st.lists(st.tuples(keys, st.text(max_size=20)), max_size=3))]
    survives(lambda: T.resolve(T.read_run_config(argv), quiet))


@pytest.fixture(scope="session")
def sacrifice(tmp_path_factory):
    """A text and a picture folder that fuzzing may spoil, with what meta.json and shards held."""
    base = tmp_path_factory.mktemp("fuzz")
    folders = [prepared(base, "--text=shapes"), prepared(base, "--image=shapes")]
    return [(f, {name: open(f"{f}/{name}", "rb").read() for name in os.listdir(f)}) for f in folders]


def read_everything(folder):
    cfg = T.resolve(T.read_run_config(["--image=shapes"]), quiet)
    for split in ("train", "val", "test"):
        arrays, meta = P.load_split(folder, split), P.read_meta(folder)
        slot = T.SimpleNamespace(name="image", folder=folder, meta=meta, objectives=["next"], cfg=cfg)
        T.collate(slot, arrays, np.arange(min(9, len(arrays["tokens"]))), B.CPU, np.random.default_rng(0), augment=True)
    P.verify_shards(folder, P.read_meta(folder))
    if meta["modality"] == "text":
        P.load_bpe(folder)


@fuzz(data=st and st.data())
def test_fuzz_meta_json_and_shards(data, sacrifice):
    folder, files = data.draw(st.sampled_from(sacrifice))
    name = data.draw(st.sampled_from(sorted(files)))
    if name == "meta.json" and data.draw(st.booleans()):  # valid JSON with one value replaced
        meta = json.loads(files[name])
        at, depth = meta, data.draw(st.integers(1, 6))
        while True:
            key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            depth -= 1
            if not depth or not isinstance(at[key], (dict, list)) or not at[key]:
                break
            at = at[key]
        at[key] = data.draw(anything)
        body = json.dumps(meta).encode()
    else:
        body = damaged(data, files[name])
    open(f"{folder}/{name}", "wb").write(body)
    try:
        survives(lambda: read_everything(folder))
    finally:
        open(f"{folder}/{name}", "wb").write(files[name])


@fuzz(data=st and st.data())
def test_fuzz_pictures_recordings_texts_and_features(data, tmp_path_factory):
    base, cfg = tmp_path_factory.getbasetemp(), P.read_config([], P.PREPARE_KEYS)
    kind = data.draw(st.sampled_from(("png", "jpg", "gif", "wav", "json", "txt", "npz")))
    path, whole = str(base / f"fuzz-in.{kind}"), str(base / f"fuzz-whole.{kind}")
    if kind in ("png", "jpg", "gif"):
        Image.new("RGB", (12, 9), (9, 99, 200)).save(whole)
    elif kind == "wav":
        write_wave(whole)
    elif kind == "npz":
        np.savez(whole, features=np.ones((12, 4)), labels=np.arange(12) % 2)
    else:
        open(whole, "w").write(json.dumps({"cat": ["a cat"] * 9, "dog": ["a dog"] * 9}, indent=0))
    open(path, "wb").write(damaged(data, open(whole, "rb").read()))
    read = dict(wav=lambda: P.read_recordings(cfg, [path]), npz=lambda: P.npz_source(cfg, "image", path), json=lambda: P.file_source(cfg, "text", path),
                txt=lambda: P.file_source(cfg, "text", path)).get(kind, lambda: P.read_picture(path, 8))
    survives(read)
