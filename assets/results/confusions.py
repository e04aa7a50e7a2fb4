"""Which classes, and which confusions? From the runs that a comparison left behind; nothing is trained.

    python probe.py compare sample_configs/letters_text.py --arms=alone,uml,control --out_dir=out/letters_1
    python assets/results/confusions.py out/letters_1
    python assets/results/confusions.py out/emoji_tone '--like=_medium_light(_and|$)'

The name of a class falls into parts: a letter's case, base and marks, a number's two digits, an emoji's base
and skin tones. For each arm this prints the accuracy by number of marks or tones, or by first digit, and what
is wrong in the answers: one part, or more of them. "At home" is the accuracy on up to 4,000 training items
that the run did not see, of the typefaces or speakers that it did see. "Among themselves": classes without
a labelled example, told apart from each other only; then as many classes that had one, and those that --like
finds by name. Means over seeds, test split. The same as JSON: confusions.json beside compare.json.
"""
import collections
import os
import re
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from prepare import UserError, exit_on_user_error, explained, read_json, write_json
from probe import open_run
from train import extract


def parts_of(name):
    """'latin small letter a with acute' -> {case, base, marks}; 'three seven' -> {first, second};
    'farmer_medium_dark' -> {base, tones}."""
    if found := re.fullmatch(r"latin (\w+) letter (\w)(?: with (.*))?", name):
        return dict(case=found[1], base=found[2], marks=found[3] or "")
    if " " in name:
        first, second = name.split()
        return dict(first=first, second=second)
    tone = "(?:medium_light|medium_dark|medium|(?<!traffic_)(?<!rotating_)light|dark)"  # no traffic_light
    base, tones = re.fullmatch(f"(.+?)((?:_{tone}(?:_and_{tone})?)?)", name).groups()
    return dict(base=base, tones=tones)


def group_of(parts):
    """What accuracies are given by: how many marks or skin tones there are, or a number's first digit."""
    if "tones" in parts:
        if not parts["tones"]:
            return "flag" if parts["base"].startswith("flag-") else "no tone"
        return "two tones" if "_and_" in parts["tones"] else "one tone"
    if "marks" in parts:
        count = len(parts["marks"].split(" and ")) if parts["marks"] else 0
        return f"{count} marks" if count < 2 else "2 marks or more"
    return parts["first"]


def answers(run, arrays, rows, among=None):
    """(what the label head says (n,), labels (n,)) of some rows of a split, as lists.

    among: the classes that may be an answer (None: all of the target's).
    """
    features, truth = extract(run.model, run.target, arrays, rows), arrays["labels"][rows]  # (n, C), (n,)
    head = run.model.label_head
    among = np.arange(len(run.target.meta["classes"])) if among is None else np.asarray(among)
    scores = features @ head.weight[among].T + head.bias[among]
    return among[scores.argmax(1)].tolist(), truth.tolist()


def among_themselves(run, classes):
    """One bool a test item of these classes: is it told apart from the others of them?"""
    rows = np.flatnonzero(np.isin(run.held["labels"], classes))
    return [answer == label for answer, label in zip(*answers(run, run.held, rows, classes))]


def confusions(folder, like):
    """-> ({group: share right}, {what is wrong: share of all test items}) of one run, over seen classes.

    like: a regular expression, or "": see the top of this file.
    """
    run = open_run(folder)
    train, right, wrong = run.target.split("train"), collections.defaultdict(list), collections.Counter()
    names = [parts_of(name) for name in run.target.meta["classes"]]
    seen = np.flatnonzero(~np.isin(train["labels"], run.target.unseen))
    others = np.setdiff1d(seen, run.target.examples)  # of seen classes, but not trained on
    others = np.random.default_rng(0).permutation(others)[:4000]
    if len(others):
        right["at home"] = [answer == label for answer, label in zip(*answers(run, train, others))]
    for answer, label in zip(*answers(run, run.held, run.seen)):
        right[group_of(names[label])].append(answer == label)
        differs = [key for key in names[label] if names[label][key] != names[answer][key]]
        if differs:
            wrong["only the " + differs[0] if len(differs) == 1 else "more"] += 1 / len(run.seen)
    unseen = run.target.unseen
    if unseen:
        right["unseen, among themselves"] = among_themselves(run, unseen)
        drawn = np.random.default_rng(0).permutation(np.unique(train["labels"][seen]))[:len(unseen)]
        right["as many seen, among themselves"] = among_themselves(run, np.sort(drawn))
    if like:
        classes = enumerate(run.target.meta["classes"])
        with explained(f"--like={like} is no regular expression"):
            alike = [number for number, name in classes if number not in unseen and re.search(like, name)]
        if not alike:
            raise UserError(f"--like={like} finds none of the classes that had a labelled example")
        right["seen like these, among themselves"] = among_themselves(run, alike)
    return {group: np.mean(hits) for group, hits in right.items()}, wrong


@torch.inference_mode()
def main():
    options = [arg for arg in sys.argv[1:] if arg.startswith("--like=")]
    folders = [arg for arg in sys.argv[1:] if arg not in options]
    if len(folders) != 1 or not os.path.exists(os.path.join(folders[0], "compare.json")):
        raise UserError("name the out_dir of a finished `python probe.py compare`, and perhaps --like=REGEX")
    folder, like, out = folders[0], "".join(options).removeprefix("--like="), {}
    compared = read_json(os.path.join(folder, "compare.json"))
    if "runs" not in compared["arms"]["uml"]:
        raise UserError(f"{folder}/compare.json is of earlier code and does not name its runs: the same "
                        "`probe.py compare` again reads them back")
    for arm in sorted({"alone", "control", "uml"} & compared["arms"].keys()):
        paths = [os.path.join(folder, "compare", name) for name in compared["arms"][arm]["runs"]]
        rights, wrongs = zip(*(confusions(path, like) for path in paths))
        out[arm] = dict(runs=len(paths))
        for title, dicts in (("right", rights), ("wrong", wrongs)):
            keys = sorted({key for one in dicts for key in one})
            out[arm][title] = {key: float(np.mean([one.get(key, 0.0) for one in dicts])) for key in keys}
            print(arm, title, {key: round(100 * value, 1) for key, value in out[arm][title].items()})
    found = dict(kind="confusions", steps=compared["steps"], arms=out)
    write_json(os.path.join(folder, "confusions.json"), found)


if __name__ == "__main__":
    exit_on_user_error(main)
