"""Emoji as a data set: a colour picture of each by three designers, and what Unicode says about them.

    npm pack emoji-datasource-facebook@16.0.0 emoji-datasource-apple@16.0.0 emoji-datasource-google@16.0.0
    npm pack emojilib@4.0.3                              # 280 MB in all; nothing need be unpacked
    python assets/results/emoji.py OUT_DIR --packages=FOLDER [--set=base]

OUT_DIR/emoji/{train,val,test}/CLASS/*.png   64 pixels, one picture a class: Facebook's to train on,
                                             Apple's for validation, Google's for the test
OUT_DIR/emoji.json    {class: [sentence, ...]}: its name, then that with each of its groups and keywords

--set=all: 3,642 emoji, 1,785 of them a skin tone of another. --set=base: 1,596, without skin tones and
without the flags of countries and regions. Use: --image=folder:OUT_DIR/emoji --text=file:OUT_DIR/emoji.json
"""
import collections
import io
import json
import os
import re
import shutil
import sys

from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from prepare import (UserError, exit_on_user_error, file_sha256, one_of, print_help, read_archive,
                     read_config, tell, write_json)

VENDORS = dict(train="facebook", val="apple", test="google")
# {npm package: (version, sha256 of the .tgz file that `npm pack` writes)}
PACKAGES = {
    "emoji-datasource-facebook": (
        "16.0.0", "017038cf5a4e7fcf03dd9133cbed43d4c281c4b3ce7b927c7160261b92b8821e"),
    "emoji-datasource-apple": (
        "16.0.0", "b34d1665e136f163b0d4433318df151895b785186e8c729b2211b43017945075"),
    "emoji-datasource-google": (
        "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "emojilib": (
        "4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303"),
}
KEYS = dict(
    packages=("", "folder of the .tgz files (empty: OUT_DIR)"),
    set=("all", "all emoji, or without skin tones and flags", one_of("all", "base")),
)
TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark",
         "1F3FF": "dark"}
# Class names must differ in more than case, "-" and "_", because train.py ignores these. Two do not.
RENAMED = {"icecream": "soft_ice_cream", "e-mail": "e-mail_symbol"}


def package_path(folder, name):
    """The path of a package's .tgz in a folder; UserError where it is missing or another file."""
    version, checksum = PACKAGES[name]
    path = os.path.join(folder, f"{name}-{version}.tgz")
    cure = f"run `npm pack {name}@{version}` in {os.path.abspath(folder)}, or pass --packages=FOLDER"
    if not os.path.isfile(path):
        raise UserError(f"there is no {path}: {cure}")
    if (found := file_sha256(path)) != checksum:
        raise UserError(f"wrong checksum: {path} has sha256 {found}, not {checksum}: remove it and {cure}")
    return path


def list_emoji(entries, which):
    """The entries of emoji.json -> [dict(name, tones, base, image, code, group, subgroup), ...].

    An emoji is in the list if all three vendors drew it. tones is [] for the yellow one and for things, and
    base is the name without tones. name is the class, as in "woman-golfing_medium_dark".
    """
    def drawn(entry):
        return all(entry[f"has_img_{vendor}"] for vendor in VENDORS.values())

    names = collections.Counter(entry["name"] for entry in entries)
    found = []
    for entry in filter(drawn, entries):
        if which == "base" and entry["subcategory"] in ("country-flag", "subdivision-flag"):
            continue
        short = RENAMED.get(entry["short_name"], entry["short_name"])
        # where two emoji have one name ("MAN IN TUXEDO" is twice there), the short one tells them apart
        words = entry["name"].lower() if names[entry["name"]] == 1 else short.replace("_", " ")
        shared = dict(base=words, code=entry["unified"], group=entry["category"],
                      subgroup=entry["subcategory"])
        found.append(dict(shared, name=short, tones=[], image=entry["image"]))
        for codes, variant in entry.get("skin_variations", {}).items():
            if which == "all" and drawn(variant):
                tones = [TONES[code] for code in codes.split("-")]  # one, or two where two people are shown
                name = f"{short}_{' and '.join(tones)}".replace(" ", "_")
                found.append(dict(shared, name=name, tones=tones, image=variant["image"]))
    return found


def sentences(emoji, keywords):
    """What is said about an emoji -> [sentence, ...]; keywords: those of emojilib for its base."""
    tone = ", ".join(f"{tone} skin tone" for tone in emoji["tones"])
    name = f"{emoji['base']}: {tone}" if tone else emoji["base"]
    found = [name] + [f"{group.lower().replace('-', ' ')}, {name}" for group in
                      (emoji["subgroup"], emoji["group"])]
    if tone:
        found.append(f"{tone} {emoji['base']}")
    # Each keyword stands with the name: alone, "doctor" would describe 18 emoji. Eight or nine sentences also
    # leave enough to learn from, since prepare.py takes two of each class for validation and test.
    words = [word.replace("_", " ").strip() for word in keywords]
    words = [word for word in dict.fromkeys(words) if re.search("[a-z]", word) and word != emoji["base"]]
    return found + [f"{name}, {word}" for word in words[:5]]


def twins(pictures):
    """How many of these PNG files show, to the last pixel, what an earlier one shows."""
    return len(pictures) - len({Image.open(io.BytesIO(data)).convert("RGBA").tobytes() for data in pictures})


def main():
    argv = sys.argv[1:]
    if "--help" in argv:
        print_help(__doc__, KEYS)
        return
    folders = [arg for arg in argv if not arg.startswith("--")]
    if len(folders) != 1:
        raise UserError("name one folder to write: python assets/results/emoji.py OUT_DIR")
    out_dir = folders[0]
    cfg = read_config([arg for arg in argv if arg.startswith("--")], KEYS)
    target = os.path.join(out_dir, "emoji")
    if os.path.exists(target):
        raise UserError(f"{target} is there already: remove it, or name another folder")

    paths = {name: package_path(cfg["packages"] or out_dir, name) for name in PACKAGES}
    file = "emoji-en-US.json"
    keywords = json.loads(read_archive(paths["emojilib"], [file])[file])
    file = "emoji.json"  # the same in the packages of all vendors
    entries = json.loads(read_archive(paths["emoji-datasource-facebook"], [file])[file])
    emoji = list_emoji(entries, cfg["set"])

    unfinished = target + ".tmp"  # moved into place when whole
    shutil.rmtree(unfinished, ignore_errors=True)
    for part, vendor in VENDORS.items():
        pictures = read_archive(paths[f"emoji-datasource-{vendor}"], {one["image"] for one in emoji})
        for one in emoji:
            folder = os.path.join(unfinished, part, one["name"])
            os.makedirs(folder)  # an error where two classes have one name
            with open(os.path.join(folder, one["image"]), "wb") as f:
                f.write(pictures[one["image"]])
        same = twins(list(pictures.values()))
        tell(f"{part}: {len(emoji)} pictures by {vendor}, {same} of them the same as another")

    texts = {}
    for one in emoji:
        character = "".join(chr(int(code, 16)) for code in one["code"].split("-"))
        texts[one["name"]] = sentences(one, keywords.get(character, []))
    toned = sum(bool(one["tones"]) for one in emoji)
    write_json(os.path.join(out_dir, "emoji.json"), texts)
    os.replace(unfinished, target)
    count = sum(map(len, texts.values()))
    tell(f"wrote to {out_dir}: {len(emoji)} emoji, {toned} with a skin tone, and {count} sentences")


if __name__ == "__main__":
    exit_on_user_error(main)
