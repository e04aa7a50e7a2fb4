"""The rows of the tables: the command of each, whether it measured what is printed; and to measure it.

    python assets/results/run_all.py                                # list all rows; runs nothing
    python assets/results/run_all.py --data=FOLDER run letters_1    # measure some
    python assets/results/run_all.py --data=FOLDER run              # measure all that are not: most of a day

Interrupted, the same command goes on. A measured row becomes NAME.json beside this file; then make.py writes
the tables. FOLDER stands for /path/to in a command and holds: cifar10-jpg/ and cifar_small/ (its first 200 of
a class) as {train,test}/CLASS/*.jpg; emoji64/ (58 categories, names.json; nothing here makes it); emoji_all/
and emoji_base/, which emoji.py writes; raw/, for what prepare.py fetches; cifar10_prompts_full.json, of CuPL;
and encoders/{lite0,minilm}, which encoders.py writes. Minutes are for two cores.
"""
import itertools
import json
import os
import re
import shlex
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, ROOT)
from prepare import UserError, exit_on_user_error, read_json, read_text, tell, write_json
from train import TRAINING_VERSION

LETTERS = "probe.py compare sample_configs/letters_text.py"
NUMBERS = "probe.py compare sample_configs/numbers_audio_text.py"
NUMBERS_IMAGE = NUMBERS.replace("text", "image")
PRINTED = "probe.py compare sample_configs/numbers_image_audio.py"
CIFAR_FILES = "sample_configs/cifar_text.py --image=folder:/path/to/cifar10-jpg"
EMOJI_FILES = ("sample_configs/emoji_text.py --image=folder:/path/to/emoji_all/emoji "
               "--text=file:/path/to/emoji_all/emoji.json")
CIFAR, EMOJI = f"probe.py compare {CIFAR_FILES}", f"probe.py compare {EMOJI_FILES}"


def search(*keys):
    """The candidates of a search: every combination of the given settings, each a list of KEY=VALUE."""
    return "'--search=" + ";".join(map(",".join, itertools.product(*keys))) + "'"


def each(key, *values):
    return [f"{key}={value}" for value in values]


DECAYS = search(each("weight_decay", 0.5, 1.5, 4.0))  # alone and uml may each want another
# spoken numbers want more, and most of all with two clips a number
TO_16 = search(each("weight_decay", 0.5, 1.5, 4.0, 16.0))
TO_32 = search(each("weight_decay", 0.5, 1.5, 4.0, 16.0, 32.0))
DOSES = "--arms=alone,apart,norms,attention,feedforward,added,uml --search=1"
FRAMES = f"{DOSES} --seeds=6 --audio_embed=linear --audio_examples=400 --weight_decay=4.0"
# frozen encoders and a projection a slot; a fine-tuned picture encoder; a language model as the trunk
LITE0, MINILM = "timm:/path/to/encoders/lite0", "hf:/path/to/encoders/minilm"
ENCODERS = (f"--text_encoder={MINILM} --text_loss=label --text_batch=256 --layers=0 --width=384 "
         "--head_from=text --label_smoothing=0.1 --arms=alone,head,uml,control")
FROZEN = f"{ENCODERS} --image_encoder={LITE0} --temperature=True --steps=300 --eval_interval=50"
TUNED = (f"{ENCODERS} --image_embed={LITE0} --image_size=64 --patch_size=16 --weight_decay=0.1 --steps=200 "
         "--eval_interval=200 --warm_start_steps=100 --seeds=6")
TRUNK = (f"--trunk={MINILM} --width=384 --image_size=32 --patch_size=8 --image_examples=1000 "
         "--image_flip=True --image_batch=32 --text_loss=label --text_batch=8 --weight_decay=0.1 --steps=150 "
         "--eval_interval=75 " + search(each("learning_rate", "3e-4", "1e-3")))
SMALL = "probe.py compare --image=folder:/path/to/cifar_small --text=file:/path/to/cifar10_prompts_full.json"
EMOJI58 = "probe.py compare --image=folder:/path/to/emoji64 --text=file:/path/to/emoji64/names.json"
BASE = "probe.py compare --image=folder:/path/to/emoji_base/emoji --text=file:/path/to/emoji_base/emoji.json"
SMALL_GRID = search(each("learning_rate", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2"),
                    ["weight_decay=0.1", "weight_decay=1.0", "weight_decay=1.0,text_weight=0.2"])
EMOJI58_GRID = search(each("learning_rate", "1e-3", "3e-3", "1e-2"), each("weight_decay", 0.3, 1.0, 3.0))
BASE_GRID = search(each("learning_rate", "1e-3", "3e-3", "1e-2"))
FACTORS = search(["learning_rate=2e-3"], [*each("encoder_learning_rate", 0.03, 0.1, 0.3),
                                          "encoder_learning_rate=1.0,encoder_batchnorm=True"])
CIFAR_GRID = search(["learning_rate=2e-3,weight_decay=1.5", "learning_rate=4e-3,weight_decay=1.5",
                     "learning_rate=4e-3,weight_decay=3.0", "learning_rate=8e-3,weight_decay=3.0"])
CONVNET = "assets/results/convnet.py"

SHARED = {
    "share_letters": (24, f"{LETTERS} {DOSES}"),
    "share_numbers": (13, f"{NUMBERS} {DOSES} --seeds=6 --weight_decay=16.0"),
    "share_numbers_image": (14, f"{NUMBERS_IMAGE} {DOSES} --seeds=6 --weight_decay=4.0"),
    # does attention matter once the target is many tokens and not one?
    "share_frames": (10, f"{NUMBERS} {FRAMES}"),
}

# {name: (minutes, command)}. The seeds are 0, 1, ...; a setting is chosen with seed 1000, or, where each seed
# has a test speaker of its own (numbers), on that seed's validation speaker: never on a voice that tests it.
# With --search=1 nothing is chosen; the numbers configs' own settings were, once, on the validation voices of
# seeds 1000 and 1001, which are the test voices of seeds 5 and 0; a decay of 16 on those of seeds 0 to 5,
# each of which tests another seed.
ROWS = {
    "letters_1": (16, f"{LETTERS} --arms=alone,uml,control,apart {DECAYS}"),
    "letters_1_wide": (22, f"{LETTERS} " + search(each("learning_rate", "3e-3", "6e-3"),
                                                  each("weight_decay", 4.0, 8.0),
                                                  each("image_affine", 0.06, 0.1, 0.15))),
    "letters_2": (14, f"{LETTERS} --image_examples=1016 --arms=alone,uml,control {DECAYS}"),
    **{f"letters_{k}": (25, f"{LETTERS} --image_examples={508 * k} --steps=1600 --eval_interval=800 {DECAYS}")
       for k in (4, 8, 16)},
    "letters_1_longer": (18, f"{LETTERS} --arms=longer,init,head,stages {DECAYS}"),
    "letters_next": (15, f"{LETTERS} --unseen_classes=0 --image_loss=next --text_loss=next --seeds=3 "
                     "--image_embed=linear --patch_size=4 --image_examples=4512 "
                     + search(each("learning_rate", "1e-3", "3e-3"), each("weight_decay", 0.05, 1.5))),
    "numbers_1": (50, f"{NUMBERS} --audio_examples=100 --seeds=18 {DECAYS}"),
    "numbers_2": (70, f"{NUMBERS} --arms=alone,uml,control,apart,head,init,longer --seeds=6 {TO_32}"),
    "numbers_4": (24, f"{NUMBERS} --audio_examples=400 --seeds=6 {TO_16}"),
    "numbers_8": (24, f"{NUMBERS} --audio_examples=800 --seeds=6 {TO_16}"),
    "numbers_2_image": (35, f"{NUMBERS_IMAGE} --seeds=6 {TO_32}"),
    "numbers_2_both": (38, f"probe.py compare sample_configs/numbers_trimodal.py --seeds=6 {TO_32}"),
    "numbers_4_unseen": (25, f"{NUMBERS} --audio_examples=320 --unseen_classes=20 --search=1 --seeds=6 "
                         "--weight_decay=4.0"),
    **SHARED,
    **{f"{name}_control": (minutes, f"{row} --control=True") for name, (minutes, row) in SHARED.items()},
    "share_numbers_none": (8, f"{NUMBERS} --layers=0 --arms=alone,uml --search=1 --seeds=6 "
                           "--weight_decay=4.0"),
    "printed_1": (10, f"{PRINTED} --search=1 --seeds=8"),
    "printed_1_text": (8, f"{PRINTED} --audio= --text=numbers --search=1 --seeds=8"),
    "cifar_20": (10, f"{CIFAR} --image_examples=200 --steps=400 --eval_interval=100 {CIFAR_GRID} --seeds=3"),
    "cifar_100": (15, f"{CIFAR} {CIFAR_GRID} --seeds=3"),
    "cifar_full": (45, f"{CIFAR} --image_examples=-1 --steps=6000 --eval_interval=1000 "
                   "--learning_rate=2e-3 --weight_decay=0.5 --search=1 --seeds=3"),
    "emoji": (47, f"{EMOJI} --seeds=6 " + search(["learning_rate=3e-3,weight_decay=1.5", *each(
        "learning_rate=1e-3,weight_decay", 0.5, 1.5, 4.0)])),
    "emoji_fast": (40, f"{EMOJI} --seeds=6 --learning_rate=3e-3 " + search(each("weight_decay", 1.5, 3.0))),
    "emoji_more": (30, f"{EMOJI} --arms=apart,head,longer --search=1 --seeds=6"),
    "emoji_tone": (27, f"{EMOJI} --unseen_classes=0 '--unseen_like=_medium(_and|$)' "
                   "--search=1 --seeds=6"),
    **{f"cifar_frozen_{k}": (2, f"{SMALL} {FROZEN} --image_examples={k}0 {SMALL_GRID}") for k in (1, 4, 16)},
    **{f"emoji58_frozen_{k}": (2, f"{EMOJI58} {FROZEN} --image_examples={58 * k} {EMOJI58_GRID}")
       for k in (1, 2, 4)},
    "emoji_frozen_minilm": (6, f"{BASE} {FROZEN} --weight_decay=1.0 {BASE_GRID}"),
    "cifar_finetuned": (25, f"{SMALL} {TUNED} --image_examples=40 --image_batch=32 --image_flip=True "
                        f"--temperature=True {FACTORS}"),
    "emoji_finetuned": (50, f"{BASE} {TUNED} --image_shift=4 --image_affine=0.05 {FACTORS}"),
    **{f"cifar_trunk_{part}": (10, f"{SMALL} {TRUNK} --trunk_train={part} --arms=alone,uml --seeds=3")
       for part in ("all", "norms")},
    "cifar_trunk_none": (18, f"{SMALL} {TRUNK} --trunk_train=none --arms=alone,head,uml,control --seeds=6"),
    "cifar_trunk_random": (8, f"{SMALL} {TRUNK} --trunk_start=random --arms=alone,uml --seeds=3"),
    "convnet_cifar_20": (3, f"{CONVNET} {CIFAR_FILES} --image_examples=200 --steps=400 --eval_interval=100 "
                         "--seeds=3"),
    "convnet_cifar_100": (8, f"{CONVNET} {CIFAR_FILES} --seeds=3"),
    "convnet_cifar_full": (40, f"{CONVNET} {CIFAR_FILES} --image_examples=-1 --steps=6000 "
                           "--eval_interval=1000 --seeds=3"),
    "convnet_emoji": (20, f"{CONVNET} {EMOJI_FILES} --seeds=3"),
    "convnet_letters_1": (5, f"{CONVNET} sample_configs/letters_text.py"),
    "convnet_letters_2": (3, f"{CONVNET} sample_configs/letters_text.py --image_examples=1016 --seeds=3"),
    **{f"convnet_letters_{k}": (7, f"{CONVNET} sample_configs/letters_text.py --image_examples={508 * k} "
                                "--steps=1600 --eval_interval=800 --seeds=3") for k in (4, 8)},
    **{f"convnet_numbers_{k}": (12, f"{CONVNET} sample_configs/numbers_audio_text.py --audio_examples={k}00 "
                                "--seeds=6") for k in (1, 4)},
    "convnet_numbers_2": (12, f"{CONVNET} sample_configs/numbers_audio_text.py --seeds=6"),
}


def file_of(name):
    return os.path.join(HERE, f"{name}.json")


def state_of(name):
    """"measured", or why a row is not."""
    if not os.path.exists(file_of(name)):
        return "missing"
    found, seeds = read_json(file_of(name)), re.search(r"--seeds=(\d+)", ROWS[name][1])
    wanted = int(seeds[1]) if seeds else 8
    if found.get("version") != TRAINING_VERSION or "convnet" in name and "searched" not in found:
        return "by earlier code"
    if found["seeds"] < wanted:
        return f"{found['seeds']} of {wanted} seeds"
    return "measured" if found.get("row") == ROWS[name][1] else "another command"


def measure(name, data):
    """Run a row's command to its end and put what it found into NAME.json."""
    folder = os.path.join(ROOT, "out", "all", name)
    command = [word.replace("/path/to", data) for word in shlex.split(ROWS[name][1])]
    command += ["--threads=1", f"--raw_dir={data}/raw", f"--out_dir={folder}"]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # compare has got it as well: its runs save what they have
        process.wait()
        raise
    if code:
        raise UserError(f"{name} ended with exit code {code}: the same command goes on")
    text = read_text(os.path.join(folder, "convnet.json" if "convnet" in name else "compare.json"))
    found = json.loads(text.replace(data, "/path/to").replace(f"{ROOT}/", ""))
    write_json(file_of(name), dict(found, row=ROWS[name][1]))


def main():
    options = dict(arg[2:].split("=", 1) for arg in sys.argv[1:] if re.match("--data=.", arg))
    words = [arg for arg in sys.argv[1:] if not re.match("--data=.", arg)]
    if words[:1] not in ([], ["run"]) or set(words[1:]) - ROWS.keys():
        raise UserError(f"usage: run_all.py [--data=FOLDER] [run [ROW ...]]; rows are {', '.join(ROWS)}")
    wanted = words[1:] or [name for name in ROWS if state_of(name) != "measured"]
    if not words:
        for name, (minutes, command) in ROWS.items():
            print(f"{name:28}{state_of(name):18}{minutes:4} min  python {command}")
        others = sorted({file[:-5] for file in os.listdir(HERE) if file.endswith(".json")} - ROWS.keys())
        print("Of earlier editions or other scripts: " + ", ".join(others))
    else:
        data = os.path.abspath(options.get("data", "data"))
        for i, name in enumerate(wanted):
            minutes = sum(ROWS[row][0] for row in wanted[i:])
            tell(f"{name}, {i + 1} of {len(wanted)}; about {minutes} minutes to go")
            measure(name, data)
    left = [name for name in ROWS if state_of(name) != "measured"]
    hours = sum(ROWS[name][0] for name in left) / 60
    tell(f"{len(ROWS) - len(left)} of {len(ROWS)} rows are measured; the others take about {hours:.0f} hours")


if __name__ == "__main__":
    exit_on_user_error(main)
