"""probe.py: what did a run learn, and did the unpaired data help?

    python probe.py out/letters_text out/letters_alone             # analyse finished runs, side by side
    python probe.py compare sample_configs/letters_text.py         # alone, uml and control, with a verdict
    python probe.py preflight sample_configs/letters_text.py       # minutes: is such a comparison worth it?
    python probe.py embed out/letters_text /my/pictures            # features and predictions for new files
    python probe.py export out/letters_text                        # the model as a folder for the Hub
    python probe.py --help                                         # every key of compare, and its arms

Analyses use frozen features of the target's test split (of validation, if the run must never open test).
Probes are fitted on the run's own training examples, their penalty is chosen on validation, and items of
unseen classes are left out. Two analyses take in every class: few-shot probes, which draw from the whole
training split, and alignment. All numbers of an analysis are in analysis.json of the first run's folder.

Sections: statistics, compare, preflight, many runs, measures, corruptions, analyses, embed, export, figures,
commands.
"""
import contextlib
import csv
import difflib
import hashlib
import io
import itertools
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch loads OpenMP; train.py says why

import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm import tqdm

from model import mean_over_real
from prepare import (LEVELS_PER_DB, WITH_PATH, UserError, active_slots, at_least, encode_features,
                     encode_text, encoded_chunks, encoder_sha256, exit_on_user_error, explained, file_sha256,
                     file_source, imported, is_clutter, levels_of, load_bpe, log_mel_of, modality_of,
                     open_encoder, patchify, plain_name, prepare, print_help, read_config, read_json,
                     read_meta, read_picture, read_recording, read_text, real_places, reasons, skipping,
                     tell, unpatchify, write_file, write_json, writing)
from train import (EXPORTED, FREE_KEYS, KEYS, REPORTED, TRAINING_VERSION, Slot, choose_examples,
                   count_right, evaluate, extract, fit_probe, linear_probe, load_checkpoint, load_model,
                   open_slots, pick_device, read_run_config, resolve, score_lines, shard_names, too_few,
                   train_config, worded)


def quiet(line):
    """A `say` that prints nothing."""


# ------------------------------------------------------------------------------------------------------------
# statistics for a handful of seeds


def t_interval(values):
    """Mean of the values (n,) and half the width of its 95% t-interval; half is None for a single value."""
    from scipy import stats  # takes a second to load, and --help need not wait for it
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else None
    return float(np.mean(values)), half


def paired(a, b):
    """Differences of scores a (n,) - b (n,), seed by seed -> mean, half of the 95% interval, p of the t-test.

    sign_flip_p: how often random signs before the differences bring their mean as far from 0; it needs no
    normal distribution. sign_flip_floor: the smallest value it can take with n differences.
    """
    from scipy import stats
    differences = np.asarray(a, float) - np.asarray(b, float)
    n = len(differences)
    mean, half = t_interval(differences)
    p, flip_p, floor = 1.0, 1.0, 2.0 ** (1 - min(n, 16))
    if np.ptp(differences) > 0:
        p = float(stats.ttest_1samp(differences, 0).pvalue)
        flips = stats.permutation_test((differences,), np.mean, permutation_type="samples",
                                       n_resamples=2**16, rng=np.random.default_rng(0))
        flip_p = float(flips.pvalue)
    elif n > 1 and mean != 0:  # the same difference every time
        p, flip_p = 0.0, floor
    return dict(mean=mean, half=half, p=p, sign_flip_p=flip_p, sign_flip_floor=floor)


# ------------------------------------------------------------------------------------------------------------
# compare: the same config with and without the unpaired data, in several arms

COMPARE_KEYS = dict(
    seeds=(8, "runs an arm", at_least(1)),
    first_seed=(0, "seed of the first run of an arm, the others follow", at_least(0)),
    arms=("alone,uml,control", "arms to train; alone and uml are always among them"),
    unrelated=("", "the source of the auxiliary in the arm 'unrelated'"),
    search=("0.5,1,2", "candidates of each arm, chosen on validation with a seed never reported (with "
            "audio_test_group='each': by every seed): factors on learning_rate, or settings "
            "'learning_rate=1e-3,weight_decay=0.5;learning_rate=...'"),
    jobs=(0, "runs at a time (0: on a GPU one, else one a core, of one thread each)", at_least(0)),
)


def auxiliaries_of(cfg):
    """The names of all slots but the target."""
    return [slot for slot in active_slots(cfg) if slot != cfg["target"]]


def target_only(cfg, options):
    """Changes that take every auxiliary out."""
    return {slot: "" for slot in auxiliaries_of(cfg)}


def target_only_for_longer(cfg, options):
    """Changes that take every auxiliary out and spend uml's FLOPs on more steps."""
    longer = {key: round(cfg[key] * options["flops_ratio"]) for key in ("steps", "eval_interval")}
    return target_only(cfg, options) | longer


def target_after_start(cfg):
    """Changes that leave the auxiliaries without a single update after the warm start."""
    return dict({f"{slot}_updates": 0 for slot in auxiliaries_of(cfg)}, schedule="alternate")


def warm_start_only(cfg, options):
    """Changes that let the auxiliaries train in the warm start and never after it."""
    if not cfg["warm_start_steps"]:
        raise UserError("arm 'init' needs warm_start_steps above 0")
    return target_after_start(cfg)


def head_start_only(cfg, options):
    """Changes that use an auxiliary for nothing but the first values of the label head: its class means."""
    labelled = [slot for slot in active_slots(cfg) if "label" in cfg[f"{slot}_loss"].split("+")]
    start = cfg["head_from"] or next((slot for slot in labelled if slot != cfg["target"]), None)
    if cfg["target"] not in labelled or start is None:
        raise UserError("arm 'head' needs a label loss of the target and of an auxiliary")
    return dict(target_after_start(cfg), warm_start_steps=0, head_from=start)


def unrelated_source(cfg, options):
    """Changes that give every auxiliary another source, whose classes are not the target's."""
    if not options["unrelated"]:
        raise UserError("arm 'unrelated' needs --unrelated=SOURCE")
    changes = dict(head_from="")
    for slot in auxiliaries_of(cfg):
        changes.update({slot: options["unrelated"], f"{slot}_loss": "next", f"{slot}_embed": "linear"})
        changes.update({f"{slot}_{key}": "" for key in ("encoder", "column", "label")})
    return changes


# arm: (one line for --help, the changes it makes to the config). The changes are a dict, or a function of the
# config and of the options from own_keys() that returns one.
ARMS = {
    "alone": ("the target only, through the very layers of uml", target_only),
    "uml": ("the config as it stands", {}),
    "control": ("the auxiliary with its structure destroyed", dict(control=True)),
    "apart": ("every slot with a trunk of its own, only the label head shared", dict(share="head")),
    "attention": ("of the trunk only attention is shared, and the label head", dict(share="attention")),
    "feedforward": ("of the trunk only the feed-forward layers", dict(share="feedforward")),
    "norms": ("of the trunk only the norms", dict(share="norms")),
    "added": ("the target's matrices are W + lambda W', the auxiliary's", dict(share="added")),
    "none": ("nothing is shared, not even the label head: alone, bit for bit",
             dict(share="none", head_from="", schedule="alternate")),
    "longer": ("alone, with all the FLOPs of uml (of the first seed)", target_only_for_longer),
    "init": ("trunk warm-started on the auxiliary, then the target alone", warm_start_only),
    "unrelated": ("a real auxiliary of another domain", unrelated_source),
    "head": ("label head started at an auxiliary's class means, then the target alone", head_start_only),
    "stages": ("alone, with the phases of uml and all its updates", dict(stages=True, head_from="")),
    "nearest": ("of features: the nearest neighbour by cosine of standardised features", {}),
    "linear": ("of features: the linear probe, nothing trained", {}),
}
FROZEN = {"nearest", "linear"}  # a target of features gets these two without being asked


def arm_config(cfg, arm, options):
    """cfg changed into one arm. UserError if cfg or the options lack what the arm needs."""
    _, changes = ARMS[arm]
    return cfg | (changes(cfg, options) if callable(changes) else changes)


SET_BY_COMPARE = {"seed", "score_test", "out_dir", "control", "stages", "stop_after", "resume"}
SEARCH_SEED = 1000  # settings are chosen with this seed, which is never reported
MIN_SEEDS = 6  # with 5 the sign-flip test cannot reach 0.05: its floor is 2 / 2^5 = 0.06


def compare(argv):
    """Choose settings for every arm on validation, train every seed, score the test split once a run.

    Writes compare.json and compare.png, prints the table and the verdict -> what compare.json holds. After
    Ctrl-C or a kill the same command goes on. UserError for a config or keys that do not fit.
    """
    cfg, options = read_comparison(argv, COMPARE_KEYS, "compare")
    wanted = {"alone", "uml", *options["arms"].split(",")}
    if unknown := wanted - ARMS.keys():
        raise UserError(f"unknown arm '{min(unknown)}' (there are: {', '.join(ARMS)})")
    arms = [arm for arm in ARMS if arm in wanted]
    settings = candidates(options["search"], cfg)
    # With audio_test_group="each" every speaker is the test speaker of some seed. One choice of settings for
    # all seeds would have seen test data, so there every seed chooses on its own validation speaker.
    per_seed = cfg["audio_test_group"] == "each" and modality_of(cfg["target"]) == "audio"
    if per_seed and len(settings) > 1 and not cfg["score_test"]:
        raise UserError("each seed chooses on its own validation speaker, who would be reported as well: "
                        "leave --score_test=False out, or give --search=1")
    if SEARCH_SEED in options["seeds"] and len(settings) > 1 and not per_seed:
        raise UserError(f"seed {SEARCH_SEED} chooses settings and is not reported: lower first_seed or seeds")
    for arm in arms:  # refuse now what would fail hours later
        resolve(arm_config(cfg, arm, options), say=quiet)
    if target_is_features(cfg):
        arms = [arm for arm in ARMS if arm in wanted | FROZEN]
    elif wanted & FROZEN:
        raise UserError("arms 'nearest' and 'linear' need a target of features with classes, as npz: gives")

    results, chosen, searched = run_arms(cfg, options, arms, settings, per_seed)
    folds = test_folds(cfg, options["seeds"]) if per_seed else np.arange(len(options["seeds"]))
    out = summary(cfg, arms, results, chosen, searched, folds)
    out.update(version=TRAINING_VERSION, first_seed=options["first_seed"], candidates=settings,
               command=shlex.join(["python", "probe.py", "compare", *argv]), hardware=hardware(cfg),
               config={key: value for key, value in cfg.items() if key not in KEYS or value != KEYS[key][0]})
    out["verdict"] = verdict(out)
    write_json(os.path.join(cfg["out_dir"], "compare.json"), out)
    draw_compare(os.path.join(cfg["out_dir"], "compare.png"), out)
    show_compare(out)
    print(f"wrote compare.json and compare.png in {cfg['out_dir']}")
    return out


def hardware(cfg):
    """In words: the processor, torch, and the GPU where the runs use one."""
    gpu = f", {torch.cuda.get_device_name()}" if pick_device(cfg)[0].type == "cuda" else ""
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}{gpu}"


def read_comparison(argv, keys, command):
    """argv of compare or preflight -> (the config, their own options). UserError for what neither can use."""
    cfg = read_run_config(argv, dict(KEYS, **keys))
    if len(active_slots(cfg)) < 2 or len(active_slots(resolve(cfg, quiet))) < 2:
        raise UserError(f"{command} needs a config with a target and an auxiliary: probe.py {command} CONFIG")
    arms = cfg.get("arms", "control").split(",")  # preflight has a control as well
    if cfg["stages"] or (cfg["control"] and "control" in arms):
        may = " (control=True may stay where --arms names no control)" if command == "compare" else ""
        raise UserError("stages=True and control=True are for one run, here every arm would get them: leave "
                        f"them out{may}")
    return cfg, own_keys(cfg)


def own_keys(cfg):
    """Move the keys of compare out of cfg into a dict, seeds as a range; set the keys compare decides."""
    options = {key: cfg.pop(key) for key in COMPARE_KEYS if key in cfg}
    if cfg["seed"] != KEYS["seed"][0]:
        raise UserError(f"seed={cfg['seed']} is set run by run here: did you mean --seeds={cfg['seed']} or "
                        f"--first_seed={cfg['seed']}?")
    cfg["stop_after"] = 0
    if options["jobs"] == 0 and pick_device(cfg)[0].type == "cpu":
        cfg["threads"] = cfg["threads"] or 1
        options["jobs"] = torch.get_num_threads() // cfg["threads"]  # torch counts the cores
    options["jobs"] = max(1, options["jobs"])
    options["seeds"] = range(options["first_seed"], options["first_seed"] + options["seeds"])
    options["flops_ratio"] = 1.0  # FLOPs of uml over those of alone, once both are trained
    return options


def candidates(text, cfg):
    """The settings that a search tries, a list of dicts such as {"learning_rate": 0.001}. text: factors on
    the config's learning rate such as '0.5,1,2', or settings 'KEY=VALUE,...;KEY=VALUE,...'."""
    if "=" not in text:
        with explained(f"search='{text}' must be numbers joined by commas, or settings by ';'"):
            rates = [cfg["learning_rate"] * float(factor) for factor in text.split(",")]
        text = ";".join(f"learning_rate={rate}" for rate in rates)
    settings = []
    for part in text.split(";"):
        pairs = [pair.strip() for pair in part.split(",")]
        values = read_config([f"--{pair}" for pair in pairs], KEYS)  # the other keys at their defaults
        names = [pair.split("=")[0] for pair in pairs]
        if taken := SET_BY_COMPARE & set(names):
            raise UserError(f"search='{text}': {min(taken)} is set run by run here: leave it out")
        settings.append({name: values[name] for name in names})
    return settings


def run_arms(cfg, options, arms, settings, per_seed):
    """Choose each arm's settings among the candidates, then train every seed with them.

    per_seed: every seed chooses for itself. Returns three dicts by arm: the results, one a seed; the
    settings, one a seed; the search scores, an array (searches, candidates).
    """
    seeds, trained = options["seeds"], [arm for arm in arms if arm not in FROZEN]
    search_seeds = seeds if per_seed else [SEARCH_SEED]
    if len(settings) == 1:
        search_seeds = []  # nothing to choose
    total = len(trained) * (len(search_seeds) * len(settings) + len(seeds))
    bar = tqdm(total=total, unit="run", delay=0.001)  # none where all runs are finished
    folder, jobs = os.path.join(cfg["out_dir"], "compare"), options["jobs"]
    results, chosen, searched = {}, {}, {}
    # longer comes last, because it needs the FLOPs of alone and uml; all others may train side by side
    for wave in ([arm for arm in trained if arm != "longer"], [arm for arm in trained if arm == "longer"]):
        if results:
            options["flops_ratio"] = results["uml"][0]["flops"] / results["alone"][0]["flops"]
        trials = [arm_config(cfg | setting | dict(seed=seed, score_test=False), arm, options)
                  for arm, seed, setting in itertools.product(wave, search_seeds, settings)]
        scores = [score_of(result, "val") for result in run_all(trials, folder, jobs, bar)]
        scores = np.reshape(scores, (len(wave), len(search_seeds), len(settings)))
        runs = []
        for arm, arm_scores in zip(wave, scores):
            best = [settings[i] for i in arm_scores.argmax(1)] or settings  # of each search
            searched[arm] = arm_scores
            chosen[arm] = best if len(best) == len(seeds) else best * len(seeds)  # or one search for all
            for seed, setting in zip(seeds, chosen[arm]):
                runs.append(arm_config(cfg | setting | dict(seed=seed), arm, options))
        finished = iter(run_all(runs, folder, jobs, bar))
        for arm in wave:
            results[arm] = [next(finished) for _ in seeds]
    bar.close()
    for arm in FROZEN & set(arms):
        scored = {}  # seeds that have the same examples are scored once
        results[arm] = [score_features(cfg | dict(seed=seed), arm, scored) for seed in seeds]
        chosen[arm], searched[arm] = [{}] * len(seeds), np.array([])  # nothing to choose
    return results, chosen, searched


def target_is_features(cfg):
    """Whether the target's items are numbers that an encoder gave, with classes: no pictures, no sound."""
    meta = read_meta(prepare(resolve(cfg, quiet), cfg["target"]))
    return meta["kind"] == "continuous" and not {"patch", "mels"} & set(meta) and len(meta["classes"]) > 1


def score_features(cfg, arm, scored):
    """'nearest' or 'linear' on the examples that a run of this config would have -> a result like a run's.
    scored: {what decides the result: result} of earlier calls."""
    slot = open_slots(resolve(cfg, quiet), quiet)[0][cfg["target"]]
    split = "test" if cfg["score_test"] else "val"
    decides = (slot.folder, np.sort(slot.examples).tobytes(), tuple(slot.unseen))
    if decides in scored:
        return scored[decides]
    known, val, (new, truth) = (raw_vectors(slot, part) for part in ("train", "val", split))
    if arm == "linear":
        weight, bias = fit_probe(known, val, len(slot.meta["classes"]), slot.measure(), False)
        answers = (new @ weight.T + bias).argmax(1)
    else:
        answers = nearest_labels(*known, new)
    counted = {f"{split}_{key}": value for key, value in count_right(answers, truth).items()}
    scored[decides] = dict(counted, measure=slot.measure(), flops=0, seconds=0)
    return scored[decides]


def nearest_labels(known, labels, new):
    """Of each of new (m, D) the label of its nearest by cosine among known (n, D), labels (n,) -> (m,)."""
    directions = torch.nn.functional.normalize(known, dim=1)
    # a new item's own length changes nothing in its order of cosines
    nearest = [(part @ directions.T).argmax(1) for part in new.split(1000)]
    return labels[torch.cat(nearest)]


def seen_rows(slot, part):
    """Rows (n,) of a split, without items of classes that have no labelled examples."""
    return np.flatnonzero(~np.isin(slot.split(part)["labels"], slot.unseen))


def test_folds(cfg, seeds):
    """The test speaker of each seed, as a number (seeds,) from 0."""
    folders = [prepare(resolve(dict(cfg, seed=seed), quiet), cfg["target"], quiet) for seed in seeds]
    checksums = [str(read_meta(folder)["splits"]["test"]["files"]["tokens"]) for folder in folders]
    return np.unique(checksums, return_inverse=True)[1]


def summary(cfg, arms, results, chosen, searched, folds):
    """What compare.json holds, but for the verdict. folds (seeds,): a number for what each is tested on.

    Seeds that are tested on the same speaker are averaged first: the statistics are over speakers. These
    share most of their training data, so they are not independent, and p is if anything too small.
    """
    target, first = cfg["target"], results["alone"][0]
    split = "test" if cfg["score_test"] else "val"  # the config may say never to open test
    measures = {result["measure"] for arm in arms for result in results[arm]}  # a fold may be uneven
    measure = "balanced_accuracy" if len(measures) > 1 else first["measure"]
    out = dict(
        kind="compare", name=os.path.basename(cfg["out_dir"]), split=split, measure=measure,
        target=f"{target}={cfg[target]}", target_loss=cfg[f"{target}_loss"],
        auxiliaries={slot: f"{cfg[slot]} ({cfg[f'{slot}_loss']})" for slot in auxiliaries_of(cfg)},
        examples=first["examples"][target], seeds=len(folds), folds=int(folds.max()) + 1,
        chance=first["chance"], majority=first.get(f"{split}_majority"), items=first.get(f"{split}_items"),
        fewest=first.get(f"{split}_fewest"), unseen_classes=first["unseen_classes"],
        steps=cfg["steps"], warm_start_steps=cfg["warm_start_steps"], arms={})
    fold_means = {}  # {arm: (folds,)}
    for arm in arms:
        scores = [score_of(dict(result, measure=measure), split) for result in results[arm]]
        fold_means[arm] = np.bincount(folds, scores) / np.bincount(folds)
        mean, half = t_interval(fold_means[arm])
        entry = dict(scores=scores, mean=mean, half=half, settings=chosen[arm],
                     search_scores=searched[arm].tolist(),
                     gflops=float(np.mean([result["flops"] for result in results[arm]])) / 1e9,
                     seconds=float(np.mean([result["seconds"] for result in results[arm]])))
        if arm not in FROZEN:
            entry["runs"] = [result["name"] for result in results[arm]]  # folders in OUT_DIR/compare
        for key in REPORTED:
            if results[arm][0].get(f"{split}_{key}") is not None:
                entry[key] = [result[f"{split}_{key}"] for result in results[arm]]
        if arm != "alone":
            entry["minus_alone"] = paired(fold_means[arm], fold_means["alone"])
        if arm not in ("uml", "alone"):
            entry["uml_minus"] = paired(fold_means["uml"], fold_means[arm])
        out["arms"][arm] = entry
    return out


def score_of(result, split):
    """What a run's result is judged by on a split: its measure, or minus the loss."""
    value = result[f"{split}_{result['measure']}"]
    return -value if result["measure"] == "loss" else value


def verdict(out):
    """One sentence on what compare.json says. Help is claimed only where uml is above alone AND above the
    control, each with p < 0.05."""
    alone, control = out["arms"]["uml"]["minus_alone"], out["arms"].get("control", {}).get("uml_minus")
    count = out["folds"]

    def signed(value):
        """An accuracy in points, a loss as it is."""
        return f"{100 * value:+.1f}" if out["chance"] else f"{value:+.3f}"

    said = "" if out["measure"] != "balanced_accuracy" else "balanced accuracy: "
    said += f"uml minus alone is {signed(alone['mean'])}"
    if alone["half"] is not None:
        said += f" [{signed(alone['mean'] - alone['half'])}, {signed(alone['mean'] + alone['half'])}]"
    if out["chance"]:
        said += " points"
    if count < MIN_SEEDS:
        kind = "seeds" if count == out["seeds"] else "speakers"
        return f"too few {kind} for a verdict ({count}; {MIN_SEEDS} are needed): {said}"
    said += f", p = {alone['p']:.3g}"
    if alone["p"] >= 0.05:
        return f"no effect shown: {said}"
    if alone["mean"] < 0:
        return f"the unpaired data hurt: {said}"
    if control is None:
        return f"uml is above alone, but no control was run to say why: {said}"
    said += f", and {signed(control['mean'])} against the control, p = {control['p']:.3g}"
    if control["mean"] <= 0 or control["p"] >= 0.05:
        return f"uml is above alone, but it is not shown that the auxiliary's structure helped: {said}"
    return f"the unpaired data helped: {said}"


def at_the_edge(out):
    """[(arm, 'KEY=VALUE')]: where the smallest or largest of three or more values tried is an arm's best in
    most searches. What lies beyond may be better, and an arm that is searched too little loses unfairly."""
    found = []
    for key in dict.fromkeys(key for candidate in out["candidates"] for key in candidate):
        tried = {candidate[key] for candidate in out["candidates"] if key in candidate}
        if len(tried) < 3 or not all(type(value) in (int, float) for value in tried):
            continue
        for arm, entry in out["arms"].items():
            best = [setting.get(key) for setting in entry["settings"]]
            found += [(arm, f"{key}={edge}") for edge in (min(tried), max(tried))
                      if best.count(edge) > len(best) / 2]
    return found


def show_auxiliaries(out):
    """'text=letters (label)' from what compare.json holds."""
    return ", ".join(f"{slot}={short_source(source)}" for slot, source in out["auxiliaries"].items())


def short_source(source):
    """'folder:/my/pictures' -> 'folder:pictures', for tables and titles."""
    name, colon, path = source.partition(":")
    return name + colon + os.path.basename(path.rstrip("/"))


def show_compare(out):
    """Print the comparison as a table, an arm a line, and the verdict."""
    yardsticks = also = ""
    if out["chance"]:
        yardsticks = f"; guessing has {out['chance']:.4f}, always the largest class {out['majority']:.4f}"
        also = [key for key in REPORTED if "unseen" in key or key in ("harmonic_mean", "seen_with_offset")]
        if out["measure"] == "balanced_accuracy":
            also = ["accuracy", *also]
    speakers = f" on {out['folds']} speakers" if out["folds"] != out["seeds"] else ""
    measure = worded(out["measure"]) if out["chance"] else "MINUS the loss (higher is better)"
    print(f"{out['target']}, {out['examples']} examples, {out['target_loss']}; auxiliary "
          f"{show_auxiliaries(out)}; {out['seeds']} seeds{speakers}, {measure} on the {out['split']} split"
          f"{yardsticks}; intervals are over {'speakers' if speakers else 'seeds'}")
    print(f"{'arm':10}{'mean +- 95%':>19}{'minus alone':>20}{'t-test p':>10}{'sign-flip p (floor)':>21}"
          f"{'GFLOP':>9}{'s':>7}  setting")

    def half(entry):
        return "?" if entry["half"] is None else f"{entry['half']:.4f}"

    for arm, entry in out["arms"].items():
        line = f"{arm:10}{entry['mean']:10.4f} +- {half(entry)}"
        if minus := entry.get("minus_alone"):
            line += (f"{minus['mean']:+11.4f} +- {half(minus)}{minus['p']:10.3g}"
                     f"{minus['sign_flip_p']:12.3g} ({minus['sign_flip_floor']:.3g})")
        settings = [", ".join(f"{key}={value}" for key, value in one.items()) for one in entry["settings"]]
        settings = " or ".join(dict.fromkeys(settings))  # each once: most seeds of an arm have the same
        line = f"{line:80}{entry['gflops']:9,.0f}{entry['seconds']:7.0f}  {settings}"
        for key in also:
            if key in entry:
                line += f"; {worded(key)} {np.mean(entry[key]):.4f}"
        print(line)
    warnings = too_few(out["split"], out["items"], out["fewest"], out["measure"]) if out["items"] else []
    if edges := at_the_edge(out):
        warnings += ["warning: best at the edge of what was tried: " + ", ".join(map(" ".join, edges))
                     + ": search further (what has run is not run again)"]
    print(*warnings, "verdict: " + out["verdict"], sep="\n")


# ------------------------------------------------------------------------------------------------------------
# preflight: will it help? Minutes of small runs, before anyone trains for hours

PREFLIGHT_KEYS = dict(seeds=(3, "runs an arm", at_least(3)), first_seed=COMPARE_KEYS["first_seed"],
                      jobs=COMPARE_KEYS["jobs"])
SHOTS = (1, 2, 4)  # labelled examples a class


def preflight(argv):
    """Guess what compare would find: small runs, each a quarter of the config's steps, at 1, 2 and 4 examples
    a class, judged on validation. Writes preflight.json, prints it and a sentence -> what the file holds.

    Nothing is searched: all arms have the config's rate and decay. The test split is never opened.
    """
    cfg, options = read_comparison(argv, PREFLIGHT_KEYS, "preflight")
    target, *others = open_slots(resolve(cfg, quiet), quiet)[0].values()
    if target.measure() == "loss":
        raise UserError(f"preflight needs a target with classes, {target.name}={cfg[target.name]} has none")
    labels, seen = target.split("train")["labels"], len(target.meta["classes"]) - len(target.unseen)
    every = np.bincount(labels, minlength=len(target.meta["classes"]))
    counts = np.delete(every, target.unseen)
    shots = [k for k in SHOTS if k == 1 or k <= every.min()]  # whatever classes a seed leaves out
    arms = ["alone", "uml", "control"]
    labelled = [slot for slot in others if "label" in slot.objectives]
    if "label" in target.objectives and labelled and cfg["share"] != "none":
        arms.insert(1, "head")
    steps = math.ceil(cfg["steps"] / 4)
    small = dict(steps=steps, eval_interval=steps, warm_start_steps=cfg["warm_start_steps"] // 4)
    configs, nearest = [], []
    for k in shots:
        few = cfg | small | {"score_test": False, f"{target.name}_examples": int(min(k * seen, counts.sum()))}
        for seed in options["seeds"]:
            seeded = few | dict(seed=seed)
            nearest.append(raw_nearest(open_slots(resolve(seeded, quiet), quiet)[0][target.name]))
            configs += [arm_config(seeded, arm, options) for arm in arms]
    with tqdm(total=len(configs), unit="run", delay=0.001) as bar:
        results = run_all(configs, os.path.join(cfg["out_dir"], "preflight"), options["jobs"], bar)
    scores = np.reshape([score_of(result, "val") for result in results],
                        (len(shots), len(options["seeds"]), len(arms)))
    out = dict(kind="preflight", version=TRAINING_VERSION, target=f"{target.name}={cfg[target.name]}",
               auxiliaries={slot.name: f"{cfg[slot.name]} ({cfg[f'{slot.name}_loss']})" for slot in others},
               measure=target.measure(), classes=seen, chance=1 / len(target.meta["classes"]),
               examples_a_class=len(target.examples) / seen,
               shots=shots, steps=steps, scores={arm: scores[:, :, i].tolist() for i, arm in enumerate(arms)},
               nearest=np.reshape(nearest, scores.shape[:2]).tolist(), features=target_is_features(cfg),
               items=results[0]["val_items"], fewest=results[0]["val_fewest"],
               command=shlex.join(["python", "probe.py", "preflight", *argv]), hardware=hardware(cfg))
    out["forecast"] = forecast(out)
    write_json(os.path.join(cfg["out_dir"], "preflight.json"), out)
    show_preflight(out)
    return out


def forecast(out):
    """One sentence on what preflight.json holds, beginning with likely, unlikely or cannot tell.

    Of features uml must beat the nearest neighbour as well. On raw data the small runs were wrong too often
    by themselves: there the rule of thumb must agree, and uml be above the neighbour.
    """
    uml, alone, control = (np.mean(out["scores"][arm], axis=0) for arm in ("uml", "alone", "control"))
    gains = {"alone": paired(uml, alone), "the control": paired(uml, control)}  # over seeds
    if out["features"]:
        gains["the nearest neighbour"] = paired(uml, np.mean(out["nearest"], axis=0))
    said = [f"{100 * gain['mean']:+.1f} ± {100 * gain['half']:.1f} to {name}"
            for name, gain in gains.items()]
    said = f"in small runs uml is, in points, {', '.join(said)} ({len(uml)} seeds)"
    word = "cannot tell"
    if min(gain["mean"] for gain in gains.values()) < 0.005:
        word = "unlikely"
    elif max(gain["p"] for gain in gains.values()) < 0.05:
        word = "likely"
    if not out["features"]:
        thumb = rule_of_thumb(out["classes"], out["examples_a_class"])
        said += f"; the rule of thumb, 50 classes or more and at most 4 examples of each, says {thumb}"
        untrained = np.mean(uml) < np.mean(out["nearest"])
        if untrained:
            said += "; uml is below the nearest neighbour: too few steps to learn"
        if untrained or word != thumb:
            word = "cannot tell"
    return f"{word}: {said}" if word == "cannot tell" else f"{word} to help: {said}"


def rule_of_thumb(classes, examples_a_class):
    """"likely" or "unlikely" to help, without any training: few labels of many classes."""
    return "likely" if classes >= 50 and examples_a_class <= 4 else "unlikely"


def show_preflight(out):
    """Print the small runs as a table, a number of examples a line, the yardsticks and the forecast."""
    print(f"{out['target']}, {out['classes']} classes, {out['examples_a_class']:.3g} examples each in the "
          f"config; auxiliary {show_auxiliaries(out)}; {worded(out['measure'])} on validation after "
          f"{out['steps']} steps, mean of {len(out['scores']['uml'][0])} seeds; guessing has "
          f"{out['chance']:.2g}")
    print("examples a class", *(f"{arm:>8}" for arm in out["scores"]), "  nearest neighbour")
    for i, k in enumerate(out["shots"]):
        means = [f"{np.mean(rows[i]):8.3f}" for rows in out["scores"].values()]
        print(f"{k:<16}", *means, f"{np.mean(out['nearest'][i]):19.3f}")
    lines = too_few("validation", out["items"], out["fewest"], out["measure"])
    if out["examples_a_class"] > 1.5 * out["shots"][-1]:
        lines += ["the config has more examples a class than these runs; with more, unpaired data adds less"]
    if np.mean(out["scores"]["alone"]) < np.mean(out["nearest"]):
        lines += ["alone is still below the nearest neighbour: part of what uml gains may be its extra steps"]
    print(*lines, out["forecast"], sep="\n")


def raw_nearest(slot):
    """What the class of the nearest labelled example scores on validation, before anything is learned."""
    (known, labels), (new, truth) = raw_vectors(slot, "train"), raw_vectors(slot, "val")
    return count_right(nearest_labels(known, labels, new), truth)[slot.measure()]


def raw_vectors(slot, part):
    """The examples, or the items of another split whose classes have examples, before anything is learned.

    -> (vectors (n, D), labels (n,)). Of pictures normalised pixels, of recordings and features the mean over
    real tokens, normalised as in the model: by all training items, of which few may have labels. Of text how
    often each id stands there.
    """
    arrays, rows = slot.split(part), slot.examples if part == "train" else seen_rows(slot, part)
    labels = torch.from_numpy(arrays["labels"][rows]).long()
    tokens = torch.from_numpy(arrays["tokens"][rows])  # (n, T, D) or (n, T) ids
    real = None
    if "lengths" in arrays:
        real = torch.from_numpy(real_places(arrays["lengths"][rows], slot.length))
    if slot.meta["kind"] == "discrete":
        counts = torch.zeros(len(tokens), slot.meta["vocab"])
        return counts.scatter_add_(1, tokens.long(), real.float()), labels
    mean, std = (torch.tensor(slot.meta[key]) for key in ("mean", "std"))  # repeated up to D
    tokens = ((tokens.unflatten(2, (-1, len(mean))) - mean) / std).flatten(2)
    return tokens.flatten(1) if "patch" in slot.meta else mean_over_real(tokens, real), labels


# ------------------------------------------------------------------------------------------------------------
# many runs: finished ones are read back, begun ones go on, and several may train at a time


def run_all(configs, folder, jobs, bar):
    """Run every config to its end, in sub-folders of folder -> their results, in the order of the configs.
    If two give the same run, it is trained once. Finished ones are taken off the total of bar, a tqdm."""
    os.makedirs(folder, exist_ok=True)
    configs = [resolve(cfg, say=quiet) for cfg in configs]
    waiting = {}  # {folder: config} of the runs that are not finished
    for cfg in configs:
        cfg.update(out_dir=run_folder(cfg, folder), resume=True)
        if not os.path.exists(os.path.join(cfg["out_dir"], "result.json")):
            waiting[cfg["out_dir"]] = cfg
    bar.total -= len(configs) - len(waiting)
    if waiting:
        bar.refresh()
    if jobs > 1:
        run_in_processes(waiting.values(), jobs, bar)
    else:
        for cfg in waiting.values():
            try:
                train_config(cfg, quiet)
            except SystemExit:  # a signal ended it, saved
                tell("interrupted: the same command again goes on from what is saved")
                raise
            bar.update()
    return [train_config(cfg, quiet) for cfg in configs]  # reads the result of a finished run, or scores it


def run_folder(cfg, parent):
    """PARENT/run-HASH of a resolved config. The hash is of all that decides what the run learns: not of paths
    and logging, nor of score_test (a run of a search that is chosen is scored, not trained again)."""
    decisive = {key: value for key, value in cfg.items() if key not in FREE_KEYS | {"score_test"}}
    files = [os.path.join(prepare(cfg, slot, say=quiet), "meta.json") for slot in active_slots(cfg)]
    if cfg["init_from"]:
        files.append(os.path.join(cfg["init_from"], "best.pt"))
    checksums = [file_sha256(file) for file in files]
    pretrained = [cfg["trunk"], *(cfg[f"{slot}_embed"] for slot in active_slots(cfg))]
    checksums += [encoder_sha256(spec) for spec in pretrained if ":" in spec]
    text = json.dumps([TRAINING_VERSION, decisive, checksums], sort_keys=True)
    return os.path.join(parent, f"run-{hashlib.sha256(text.encode()).hexdigest()[:12]}")


def run_in_processes(configs, jobs, bar):
    """Run `python train.py` for every config, `jobs` at a time; each prints into FOLDER.log. However this
    ends, runs at work get SIGTERM: they finish their step and save. UserError if one fails."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
    waiting = list(configs)
    working = {}  # {path of the log: process}
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                cfg = waiting.pop(0)
                keys = [f"--{key}={value}" for key, value in cfg.items()]
                log = cfg["out_dir"] + ".log"
                with open(log, "wb") as file:
                    # In a session of its own a run gets no Ctrl-C from the terminal. With our SIGTERM that
                    # would be two signals, and the second ends a run without saving.
                    working[log] = subprocess.Popen([sys.executable, script, *keys], stdout=file, stderr=file,
                                                    start_new_session=True)
            time.sleep(0.1)
            for log in [log for log, process in working.items() if process.poll() is not None]:
                code = working.pop(log).returncode
                if code != 0:
                    last_line = read_text(log).strip().split("\n")[-1].removeprefix("error: ")
                    raise UserError(f"a run ended with exit code {code} (-9: killed, perhaps for lack of "
                                    f"memory; lower jobs={jobs}), see {log}: {last_line}")
                bar.update()
    finally:
        for process in working.values():
            process.terminate()
        for process in working.values():
            process.wait()


# ------------------------------------------------------------------------------------------------------------
# measures on features (n, C) and labels (n,): torch tensors on the CPU


def few_shot(features_at, labels, new, truth, pool, shots=(1, 2, 4, 8, 16), draws=3):
    """Accuracy on new (m, C), truth (m,) of probes fitted on few examples a class: {examples: {mean, std}}.

    features_at(rows) gives features (k, C) of rows of the training split, labels (n,) are its classes. mean
    and standard deviation are over draws of the examples, which pool works on side by side.
    """
    classes, fewest = int(labels.max()) + 1, np.bincount(labels).min()
    shots = [k for k in shots if k <= fewest and k * classes <= 2500]  # beyond, it would take minutes

    def one_draw(draw):
        rows, accuracies = choose_examples(labels, len(labels), shots[-1] * classes, draw, "few-shot"), []
        features, known = features_at(rows), torch.from_numpy(labels[rows]).long()
        for k in shots:  # the first k a class are those of a smaller draw
            weight, bias = linear_probe(features[:k * classes], known[:k * classes], classes, l2=1.0)
            accuracies.append(((new @ weight.T + bias).argmax(1) == truth).float().mean().item())
        return accuracies

    found = np.array(list(pool.map(one_draw, range(draws)))) if shots else np.empty((draws, 0))
    return {k: dict(mean=float(accuracies.mean()), std=float(accuracies.std(ddof=1)))
            for k, accuracies in zip(shots, found.T)}


def margins(features, labels, weight, bias):
    """Distances (n,) of items to the boundary with the best wrong class; positive where classified right.

    weight (classes, C), bias (classes,): a linear classifier. Features are standardised first, so that runs
    of different feature scale compare. Gupta et al. 2025 (section 5): unpaired data widens margins.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    features = (features - mean) / std
    weight, bias = weight * std, bias + weight @ mean  # the same scores, from standardised features
    scores = features @ weight.T + bias  # (n, classes)
    true_score = scores.gather(1, labels[:, None])[:, 0]
    rival_score, rival = scores.scatter(1, labels[:, None], -torch.inf).max(1)
    return (true_score - rival_score) / (weight[labels] - weight[rival]).norm(dim=1).clamp_min(1e-9)


def cka(a, b):
    """Linear centred kernel alignment of two (k, C) matrices, row by row; 1 for rotations of each other.
    Kornblith et al. 2019 (arXiv 1905.00414, section 3)."""
    a, b = a - a.mean(0), b - b.mean(0)
    return ((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()).clamp_min(1e-12)).item()


def neighbours(a, k):
    """(n, n) bool: whether column j is among the k nearest (by cosine) of row i of a (n, C)."""
    rows = torch.nn.functional.normalize(a - a.mean(0), dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-2)  # no row is its own neighbour
    return torch.zeros_like(cosines, dtype=torch.bool).scatter(1, cosines.topk(k, dim=1).indices, True)


def unit_agreement(a, b):
    """Correlation over classes of each unit's mean activations in two slots, (k, C) and (k, C) -> (C,)."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)


def permutation_p(measure, n, draws=200, seed=0):
    """measure(order) of the order 0..n-1, and its p: how often another order gives at least as much."""
    rng = np.random.default_rng(seed)
    value = measure(np.arange(n))
    shuffled = [measure(rng.permutation(n)) for _ in range(draws)]
    return value, (1 + sum(other >= value for other in shuffled)) / (draws + 1)


def class_words(classes):
    """The words of each class name, without those that all names share: a list of lists."""
    words = [name.replace("_", " ").split() for name in classes]
    shared = set(words[0]).intersection(*words) if len(words) > 2 else set()
    return [[word for word in name if word not in shared] for name in words]


# ------------------------------------------------------------------------------------------------------------
# corruptions of pictures (n, S, S, c) and recordings (n, T, group * mels), uint8, each in three severities

PICTURE_CORRUPTIONS = ("noise", "blur", "contrast", "pixelate")
SOUND_CORRUPTIONS = ("noise", "gain", "bandlimit")


def corrupt_pictures(pictures, kind, severity):
    """One of PICTURE_CORRUPTIONS, severity 1 to 3, after Hendrycks & Dietterich 2019 (arXiv 1903.12261)."""
    i, size = severity - 1, pictures.shape[1]
    images = [Image.fromarray(picture.squeeze()) for picture in pictures]  # Pillow's greys have two axes
    if kind == "noise":
        changed = pictures + np.random.default_rng(severity).normal(0, (10, 20, 40)[i], pictures.shape)
    elif kind == "contrast":
        mean = pictures.mean((1, 2, 3), keepdims=True)
        changed = mean + (pictures - mean) * (0.6, 0.4, 0.2)[i]
    elif kind == "blur":
        changed = [image.filter(ImageFilter.GaussianBlur((0.7, 1.2, 2.0)[i])) for image in images]
    else:  # pixelate
        side = max(1, int(size * (0.6, 0.45, 0.3)[i]))
        small = [image.resize((side, side), Image.Resampling.BOX) for image in images]
        changed = [image.resize((size, size), Image.Resampling.NEAREST) for image in small]
    return np.stack(changed).reshape(pictures.shape).clip(0, 255).astype(np.uint8)


def corrupt_frames(tokens, mels, kind, severity):
    """One of SOUND_CORRUPTIONS, severity 1 to 3: noise (signal to noise 20, 10, 0 dB), gain (-6, -12, -18 dB)
    or bandlimit (only the lower 80, 60, 40% of the mels stay)."""
    i = severity - 1
    levels = tokens.reshape(*tokens.shape[:2], -1, mels)  # (n, T, group, mels)
    if kind == "noise":
        is_real = levels.any(3, keepdims=True)  # padding is 0 throughout, recorded silence is not
        power = np.exp(log_mel_of(levels))
        mean_power = power.mean((1, 2, 3), where=is_real, keepdims=True)
        noise = np.random.default_rng(severity).exponential(mean_power / (100, 10, 1)[i], levels.shape)
        levels = levels_of(np.log(power + noise))
    elif kind == "gain":
        levels = (levels - (6, 12, 18)[i] * LEVELS_PER_DB).round().clip(0, 255)
    else:  # bandlimit
        levels = np.where(np.arange(mels) < mels * (0.8, 0.6, 0.4)[i], levels, 0)
    return levels.astype(np.uint8).reshape(tokens.shape)


# ------------------------------------------------------------------------------------------------------------
# analyses of finished runs, side by side


@dataclass
class FinishedRun:
    """A finished run: its best model, and the data its analyses may read."""
    folder: str
    name: str               # the last part of folder
    cfg: dict
    checkpoint: dict
    slots: dict             # {name: train.Slot}
    model: torch.nn.Module  # the UML of best.pt, on the CPU
    target: Slot
    split: str              # "test", or "val" if the run was told never to open test
    held: dict              # that split of the target: tokens, labels, perhaps lengths
    seen: np.ndarray        # rows of `held` whose class had labelled training examples
    # what analyse() finds
    report: dict = None         # what is printed
    margins: np.ndarray = None  # of the rows `seen`
    answers: np.ndarray = None  # the class that the run gives each item of `held`


def open_run(folder):
    """The FinishedRun in a folder. UserError if it is not finished, if its data has changed since, or if its
    target has no classes."""
    result, cfg = finished_result(folder), config_of(folder)
    model, checkpoint = load_model(os.path.join(folder, "best.pt"))
    check_shards(folder, cfg)
    slots, _ = open_slots(cfg, quiet)
    target, split = slots[cfg["target"]], result["split"]
    if len(target.meta["classes"]) < 2:
        raise UserError(f"{folder}: the target {target.name}={cfg[target.name]} has no classes to probe for")
    return FinishedRun(folder, os.path.basename(os.path.normpath(folder)), cfg, checkpoint, slots, model,
                       target, split, target.split(split), seen_rows(target, split))


def finished_result(folder):
    """The result of a run. UserError if it is not finished."""
    path = os.path.join(folder, "result.json")
    if not os.path.exists(path):
        raise UserError(f"{folder} holds no finished run (no result.json): train one first, for example "
                        "`python train.py sample_configs/letters_text.py`, or finish it with --resume")
    return read_own(path)


def config_of(folder):
    """The config of a run as it was last gone on with; that in best.pt may be of before a --resume."""
    return read_own(os.path.join(folder, "config.json"))


def read_own(path):
    """The JSON of a file that a run or compare wrote. UserError if it is damaged."""
    with explained(f"{path} is damaged"):
        return read_json(path)


def check_shards(folder, cfg):
    """UserError if a run's data has changed: a new draw could put its training items into its test split."""
    for slot, name in shard_names(cfg).items():
        if name != cfg["shards"][slot]:
            raise UserError(f"{folder} was trained on {cfg['shards'][slot]}, but {slot}={cfg[slot]} has "
                            "changed since: train it again")


def analyse(run, pool, bar):
    """All analyses of one FinishedRun -> the same, its report, margins and answers filled in. The threads of
    pool work on the probes side by side; bar is told of every analysis that is done."""
    model, target, train = run.model, run.target, run.target.split("train")
    labels, classes = torch.from_numpy(run.held["labels"]).long(), len(run.target.meta["classes"])
    parts = [(train, target.examples), (target.split("val"), seen_rows(target, "val")), (run.held, None)]
    known, val, held = pool.map(lambda part: extract(model, target, *part, every=True), parts)
    known_labels, val_labels = (torch.from_numpy(arrays["labels"][rows]) for arrays, rows in parts[:2])
    bar.update()

    def probe_of(layer):
        judged = (val[layer], val_labels)
        weight, bias = fit_probe((known[layer], known_labels), judged, classes, target.measure())
        right = (held[layer, run.seen] @ weight.T + bias).argmax(1) == labels[run.seen]
        return right.float().mean().item(), weight, bias

    layers = list(pool.map(probe_of, range(len(held))))
    bar.update()
    # from here on: the last layer
    _, weight, bias = layers[-1]
    margin = margins(held[-1, run.seen], labels[run.seen], weight, bias)
    low, median, high = margin.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    chosen = dict(probe=(weight, bias), unseen_offset=0.0)
    scored = evaluate(model, target, run.held, chosen)
    features_at = lambda rows: extract(model, target, train, rows)
    shots = few_shot(features_at, train["labels"], held[-1], labels, pool)
    bar.update()
    changed = robustness(run, chosen, scored["accuracy"], pool)
    bar.update()
    others = [slot for slot in run.slots.values() if slot is not target and "labels" in slot.split("train")]
    own_means = class_means(target, held[-1], labels)
    run.report = dict(name=run.name, split=run.split, items=len(run.seen), accuracy=scored["accuracy"],
                      balanced_accuracy=scored["balanced_accuracy"], majority=scored["majority"],
                      unseen_accuracy=scored.get("unseen_accuracy"), layers=[layer[0] for layer in layers],
                      few_shot=shots, margin={"10%": low, "median": median, "90%": high}, robustness=changed,
                      alignment={slot.name: alignment(run, own_means, slot) for slot in others})
    bar.update()
    weight, bias = scored["probe"]  # the label head where there is one
    run.margins, run.answers = margin.numpy(), (held[-1] @ weight.T + bias).argmax(1).numpy()
    return run


def robustness(run, chosen, clean, pool):
    """{corruption: accuracy at severities 0 (which is `clean`) to 3}; {} for other slots than pictures and
    sound. chosen: the probe, as evaluate() takes it. pool works on them side by side."""
    meta, tokens = run.target.meta, run.held["tokens"][np.arange(len(run.held["tokens"]))]
    kinds = PICTURE_CORRUPTIONS if "patch" in meta else SOUND_CORRUPTIONS if "mels" in meta else ()

    def accuracy(kind_and_severity):
        if "patch" in meta:
            pictures = unpatchify(tokens, meta["patch"])
            changed = patchify(corrupt_pictures(pictures, *kind_and_severity), meta["patch"])
        else:
            changed = corrupt_frames(tokens, meta["mels"], *kind_and_severity)
        return evaluate(run.model, run.target, dict(run.held, tokens=changed), chosen)["accuracy"]

    found = pool.map(accuracy, itertools.product(kinds, (1, 2, 3)))  # in this order
    return {kind: [clean, next(found), next(found), next(found)] for kind in kinds}


def alignment(run, target_means, other):
    """Do classes lie alike in the target and in another slot, although no items were ever paired? Measures on
    class_means() of both, each with its p; None if under 4 classes are common."""
    arrays = other.split(run.split)
    other_means = class_means(other, extract(run.model, other, arrays), torch.from_numpy(arrays["labels"]))
    names = sorted(target_means.keys() & other_means.keys())
    if len(names) < 4:
        return None
    a, b = (torch.stack([means[name] for name in names]) for means in (target_means, other_means))
    k = max(1, len(names) // 8)
    near_a, near_b = neighbours(a, k), neighbours(b, k)
    measures = dict(
        cka=lambda order: cka(a, b[order]),
        # share of a class's k nearest on which both agree (arXiv 2405.07987)
        mutual_knn=lambda order: (near_a & near_b[order][:, order]).sum().item() / near_a.sum().item(),
        unit_agreement=lambda order: unit_agreement(a, b[order]).mean().item())
    out = dict(classes=len(names), k=k)
    for name, measure in measures.items():
        out[name], out[f"{name}_p"] = permutation_p(measure, len(names))
    return out


def class_means(slot, features, labels):
    """{plain name of a class: mean feature (C,) of its items} from features (n, C), labels (n,)."""
    names = [plain_name(name) for name in slot.meta["classes"]]
    return {names[label]: features[labels == label].mean(0) for label in labels.unique()}


def show_reports(reports):
    """Print reports of runs side by side, in groups, each with a sentence on what it says."""
    first, width = reports[0], max(18, *(len(report["name"]) + 2 for report in reports))

    def row(title, values, show="{:.3f}".format):
        if any(value is not None for value in values):
            cells = ["-" if value is None else show(value) for value in values]
            print(f"  {title:22}" + "".join(f"{cell:>{width}}" for cell in cells))

    def rows_of(part):  # [(key, what every report has of it, or None)]
        keys = dict.fromkeys(itertools.chain(*(report[part] for report in reports)))
        return [(key, [report[part].get(key) for report in reports]) for key in keys]

    row("", [report["name"] for report in reports], str)
    print(f"the run's own answers on the {first['split']} split ({first['items']:,} items)")
    for title, key in (("accuracy", "accuracy"), ("balanced accuracy", "balanced_accuracy"),
                       ("always largest class", "majority"), ("unseen classes", "unseen_accuracy")):
        row(title, [report[key] for report in reports])
    print("a linear probe on each layer: from where on the classes can be read")
    for layer, values in enumerate(itertools.zip_longest(*(report["layers"] for report in reports))):
        row(f"block {layer}" if layer else "embed", values)
    print("a linear probe on few labelled examples a class, mean +- standard deviation of three draws")
    for k, values in rows_of("few_shot"):
        row(f"{k} a class", values, "{mean:.3f} +- {std:.3f}".format_map)
    print("margins: how far items lie from the boundary, in standardised features (below 0: wrong)")
    for key, values in rows_of("margin"):
        row(key, values)
    if any(report["robustness"] for report in reports):
        print("accuracy on changed items, weakly, more and strongly")
    for kind, values in rows_of("robustness"):
        row(kind, values, lambda found: " ".join(f"{value:.3f}" for value in found[1:]))
    for slot, values in rows_of("alignment"):
        if any(values):
            print(f"do classes lie as in {slot}, though nothing was paired? 1: yes "
                  "(p: if classes are shuffled)")
        for key in ("cka", "mutual_knn", "unit_agreement"):
            row(worded(key), values, lambda found: f"{found[key]:.3f} (p {found[f'{key}_p']:.3f})")


def analyse_all(folders):
    """Analyse finished runs, print them side by side, and draw figures into the first one's folder."""
    torch.set_num_threads(1)  # many small solves: threads of torch would only wait for each other
    runs = [open_run(folder) for folder in folders]  # what is wrong with the last one shows now
    into = runs[0].folder
    tell("linear probes of every layer, few examples, corruptions, alignment; seconds to minutes a run")
    workers = min(4, os.cpu_count())  # each may hold a whole split, changed
    with tqdm(total=5 * len(runs), disable=None) as bar, ThreadPoolExecutor(workers) as pool:
        reports = [analyse(run, pool, bar).report for run in runs]
    show_reports(reports)
    if len({(run.target.folder, run.split) for run in runs}) > 1:
        print("warning: these runs were tested on different items, so their scores do not compare")
    write_json(os.path.join(into, "analysis.json"), reports)
    drawings = {"side_by_side.png": draw_side_by_side, "curves.png": draw_curves}
    if "patch" in runs[0].target.meta or "mels" in runs[0].target.meta:
        drawings["predictions.png"] = draw_predictions
    for name, draw in drawings.items():
        draw(os.path.join(into, name), runs)
    print(f"wrote {', '.join(['analysis.json', *drawings])} in {into}")


# ------------------------------------------------------------------------------------------------------------
# embed: features and predictions for items the run has never seen


def embed(folder, path):
    """Write FOLDER/embed.npy (n, C) and, if the run knows classes, embed.csv with file, class, probability.

    path: a text file (one item a line), a folder of pictures or recordings, or an .npy array, whichever the
    target slot takes. UserError if there is nothing to read.
    """
    model, checkpoint = load_model(os.path.join(folder, "best.pt"))
    cfg, name = config_of(folder), checkpoint["config"]["target"]
    slot, classes = checkpoint["slots"][name], checkpoint["classes"][:checkpoint["target_classes"]]
    if modality_of(name) == "text" and slot["kind"] == "discrete":
        arrays, items = read_new_texts(folder, path, cfg)
    elif "patch" in slot or "mels" in slot or (cfg[f"{name}_encoder"] and os.path.isdir(path)):
        if cfg[f"{name}_encoder"]:
            check_shards(folder, cfg)  # the encoder must be the one that the run was trained on
        arrays, items = read_new_files(path, dict(cfg, skip_bad=True), slot)
    else:
        arrays, items = read_new_numbers(path, slot)
    inputs = [torch.from_numpy(arrays["tokens"]).split(500)]
    if "lengths" in arrays and slot.get("embed", "linear") == "linear":  # a ConvNet reads padding as silence
        inputs.append(torch.from_numpy(real_places(arrays["lengths"], slot["length"])).split(500))
    scores = None
    with torch.no_grad():
        features = torch.cat([model.features(name, *part) for part in zip(*inputs)])
        if "label" in slot["loss"]:
            scores = model.label_scores(name, features)[:, :len(classes)]
    if scores is None and len(classes) > 1:  # no label head: a linear probe on the run's training examples
        run = open_run(folder)
        weight, bias = evaluate(run.model, run.target, run.target.split("val"))["probe"]
        scores = features @ weight.T + bias

    written, array = [os.path.join(folder, "embed.npy")], io.BytesIO()
    np.save(array, features.numpy())
    write_file(written[0], array.getvalue())
    if scores is not None:
        written.append(os.path.join(folder, "embed.csv"))
        table = io.StringIO(newline="")
        probabilities, best = scores.softmax(1).max(1)
        rows = zip(items, (classes[i] for i in best), (f"{share:.4f}" for share in probabilities.tolist()))
        csv.writer(table).writerows([("file", "class", "probability"), *rows])
        write_file(written[1], table.getvalue().encode(errors="surrogateescape"))
    print(f"{len(items):,} items: wrote {' and '.join(written)}"
          + (" (file, class, probability)" if scores is not None else ""))
    print(json.dumps(dict(items=len(items), features=list(features.shape), written=written)))


def read_new_texts(folder, path, cfg):
    """The texts of a file, as text=file:PATH reads it -> {"tokens" (n, T), "lengths" (n,)}, the texts."""
    check_shards(folder, cfg)  # the BPE is kept with the shards
    own = dict(cfg, column=cfg[f"{cfg['target']}_column"], label="")
    lines = file_source(own, "text", path, labelled=False)["items"]
    if not lines:
        raise UserError(f"{path} is empty: expected one text a line")
    arrays = encode_text(cfg, lines, load_bpe(prepare(cfg, cfg["target"])))
    _, first = np.unique(arrays["item"], return_index=True)  # of a long text only its first window counts
    return dict(tokens=arrays["tokens"][first].astype(np.int64), lengths=arrays["lengths"][first]), lines


def read_new_files(path, cfg, slot):
    """A folder of pictures or recordings -> {"tokens" (n, T, D), perhaps "lengths" (n,)}, the files read.
    Where the run has a frozen encoder, that encodes them as it did when the run's shards were made."""
    name, modality, files, skipped = cfg["target"], modality_of(cfg["target"]), [], {}
    if modality not in ("image", "audio"):
        raise UserError(f"the {name} slot reads no folder: give the encoder's outputs as an .npy array")
    source, change = dict(labels=None, encode=modality, skipped=skipped), lambda item: item
    if cfg[f"{name}_encoder"]:
        change, source["encoder"] = open_encoder(cfg, name)
        source["encode"] = "features"

    def make(file):
        with skipping(cfg, skipped, file, "file"):
            if modality == "audio":
                return change(read_recording(cfg, file))
            channels = slot["dim"] // slot["patch"] ** 2 if "patch" in slot else 3
            return change(read_picture(cfg, file, channels))

    for parent, _, names in os.walk(path, followlinks=True):
        files += [os.path.join(parent, file) for file in names if not is_clutter(file)]
    source.update(items=sorted(files), make=make)
    with tqdm(total=len(files), unit="file", disable=None, leave=False) as bar:
        parts = list(encoded_chunks(cfg, source, range(len(files)), None, bar))
    if not parts:
        found = reasons(skipped) if skipped else "found none"
        raise UserError(f"{path} must be a folder of files that the {name} slot can read: {found}")
    if skipped:
        tell(f"skipped {len(skipped)} of {len(files)}: {reasons(skipped)}")
    kept = parts[0].keys() & {"tokens", "lengths"}
    read = [file for file in source["items"] if file not in skipped]
    return {key: np.concatenate([part[key] for part in parts]) for key in kept}, read


def read_new_numbers(path, slot):
    """An .npy array, such as features of a frozen encoder -> {"tokens" (n, T, D)}, row numbers."""
    wanted = f"{path} must be an .npy array of finite numbers (n, {slot['length']}, {slot['dim']})"
    with explained(wanted):
        tokens = encode_features({}, np.load(path, allow_pickle=False), None)["tokens"]
    if tokens.shape[1:] != (slot["length"], slot["dim"]) or not np.isfinite(tokens).all() or not len(tokens):
        raise UserError(f"{wanted}, found {tokens.shape}")
    return dict(tokens=tokens), range(len(tokens))


# ------------------------------------------------------------------------------------------------------------
# export: the model of a finished run as a folder that others can read and that the Hub shows

def export(folder, into):
    """Write a run's best model into a folder: model.safetensors, config.json and README.md, a card."""
    save = imported("safetensors.torch", "export").save
    result = finished_result(folder)
    saved = load_checkpoint(os.path.join(folder, "best.pt"))
    for name in ("README.md", "config.json"):
        path = os.path.join(into, name)
        if os.path.exists(path) and not os.path.exists(os.path.join(into, "model.safetensors")):
            raise UserError(f"{path} is there already and belongs to no exported model: name another folder")
    with writing(into):
        os.makedirs(into, exist_ok=True)
    weights = {name: value.clone() for name, value in saved["model"].items()}
    write_file(os.path.join(into, "model.safetensors"), save(weights, dict(format="pt")))
    about, cfg = {key: saved[key] for key in EXPORTED}, config_of(folder)
    write_json(os.path.join(into, "config.json"), dict(about, config=without_paths(cfg)))
    write_file(os.path.join(into, "README.md"), card(folder, cfg, result).encode())
    print(f"wrote model.safetensors, config.json and README.md, a card, in {into}")


def without_paths(cfg):
    """A run's config for others to read: sources and encoders by their names, no folder of this machine."""
    private = ("raw_dir", "data_dir", "out_dir", "init_from")

    def public(value):
        kind, _, path = str(value).partition(":")
        # an encoder of the Hub keeps its organisation: hf:sentence-transformers/all-MiniLM-L6-v2
        local = path.count("/") > 1 or os.path.isdir(path)
        ours = kind in WITH_PATH or (kind in ("timm", "hf") and local)
        return short_source(value) if ours else value

    return {key: public(value) for key, value in cfg.items() if key not in private}


def card(folder, full_cfg, result):
    """README.md of an exported run, in Markdown with the header that the Hub reads."""
    cfg, slots, target = without_paths(full_cfg), active_slots(full_cfg), full_cfg["target"]
    examples = result["examples"][target]
    facts = dict(target=f"{target}={full_cfg[target]}", steps=cfg["steps"], examples=examples)
    others = {slot: f"{full_cfg[slot]} ({cfg[f'{slot}_loss']})" for slot in auxiliaries_of(full_cfg)}
    here = hardware(dict(cfg, device="auto"))  # it may have trained on a GPU that is not here
    verdict = "no comparison with the target alone was found"
    for parent in ("", "..", "../.."):  # compare keeps its runs two folders below compare.json
        path = os.path.join(folder, parent, "compare.json")
        out = read_own(path) if os.path.exists(path) else {}
        if facts.items() <= out.items() and others.items() <= out["auxiliaries"].items():
            verdict = f"{out['verdict']} ({out['seeds']} seeds)"
            break
    changed = [f"--{key}={value}" for key, value in cfg.items() if key not in {*FREE_KEYS, "shards"}
               and (key not in KEYS or value != KEYS[key][0])]
    return f"""---
license: other  # yours to choose: it depends on the data
library_name: nanouml
tags: [multimodal, unpaired, {", ".join(map(modality_of, slots))}]
---
# {result["name"]}

A unified multimodal learner (arXiv 2510.08492) of {" and ".join(cfg[slot] for slot in slots)}, never paired.
In a checkout of nanoUML: `model, saved = train.load_model("this folder")`.

- command: `{shlex.join(["python", "train.py", *changed])}`
- seed {cfg["seed"]}, trained in {result["seconds"]:.0f} s; exported on {here}
- {"; ".join(score_lines(result))}
- compare (of uml, whichever arm this run is): {verdict}
"""


# ------------------------------------------------------------------------------------------------------------
# figures


@contextlib.contextmanager
def figure(path, width, height, **grid):
    """(fig, axes) to draw on, without a screen; written to path at the end. width, height: in inches."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    fig, axes = plt.subplots(figsize=(width, height), layout="constrained", facecolor="white", **grid)
    yield fig, axes
    data = io.BytesIO()
    fig.savefig(data, format="png", dpi=130, bbox_inches="tight")  # "tight" keeps texts below an axis
    plt.close(fig)
    write_file(path, data.getvalue())


def draw_compare(path, out):
    """Every seed a point, every arm a column, means with their 95% intervals."""
    with figure(path, 1.5 + 1.3 * len(out["arms"]), 4.2) as (_, ax):
        for i, entry in enumerate(out["arms"].values()):
            places = i + np.linspace(-0.12, 0.12, out["seeds"])
            ax.plot(places, entry["scores"], "o", ms=4, alpha=0.6, color=f"C{i}")
            ax.errorbar(i + 0.27, entry["mean"], entry["half"] or 0, fmt="s", ms=5, capsize=4, color="black")
        if out["chance"]:
            balanced = out["measure"] == "balanced_accuracy"
            ax.axhline(out["chance"] if balanced else out["majority"], ls=":", color="grey", lw=1,
                       label="guessing" if balanced else "always the largest class")
            ax.legend(fontsize=7)
            low, high = ax.get_ylim()
            ax.set_ylim(max(low, -0.02), min(high, 1.02))
        ax.set_xticks(range(len(out["arms"])), out["arms"])
        minus = "minus " if out["measure"] == "loss" else ""
        ax.set_ylabel(f"{minus}{out['split']} {worded(out['measure'])}")
        title = f"{short_source(out['target'])}, {out['examples']} examples\nwith {show_auxiliaries(out)}"
        ax.set_title(title.replace("$", r"\$"), fontsize=9)  # else $...$ would be a formula


def draw_side_by_side(path, runs):
    """Few-shot curves, margins and robustness of several runs in one figure."""
    shots = max((list(run.report["few_shot"]) for run in runs), key=len)  # the others have the first of these
    # the bulk: a few far items would squeeze all others; bins in common, so that heights compare
    bulk = np.quantile(np.concatenate([run.margins for run in runs]), (0.005, 0.995))
    with figure(path, 12, 3.6, ncols=3) as (_, (left, middle, right)):
        for run in runs:
            means = [entry["mean"] for entry in run.report["few_shot"].values()]
            spreads = [entry["std"] for entry in run.report["few_shot"].values()]
            left.errorbar(shots[:len(means)], means, spreads, marker="o", capsize=3, label=run.name)
            middle.hist(run.margins, np.linspace(*bulk, 31), density=True, histtype="step", label=run.name)
            if run.report["robustness"]:
                right.plot(np.mean(list(run.report["robustness"].values()), 0), marker="o", label=run.name)
        left.set(xscale="log", xlabel="examples a class", ylabel="few-shot probe accuracy", ylim=(0, None))
        left.set_xticks(shots, shots)
        left.minorticks_off()
        middle.axvline(0, ls=":", color="grey", lw=1)
        middle.set(xlabel="margin, middle 99% (0: on the boundary)", ylabel="density")
        right.set(xlabel="severity of the corruption (mean over kinds)", ylabel="accuracy", ylim=(0, None))
        right.set_xticks(range(4), ["none", 1, 2, 3])
        left.legend()


def draw_predictions(path, runs, rows=4, columns=6):
    """A sheet of held-out items of seen classes, drawn at random. Below each, every run that was tested on
    the same items has a tick if it is right, or a cross and the class it gives instead; above all, totals."""
    first, meta, held = runs[0], runs[0].target.meta, runs[0].held
    same_items = [run for run in runs
                  if (run.target.folder, run.split) == (first.target.folder, first.split)]
    # the words that tell each class from the others, in lines that fit below a picture; $...$ is no formula
    names = zip(meta["classes"], class_words(meta["classes"]))
    short = [textwrap.fill(" ".join(words) or name, 24).replace("$", r"\$") for name, words in names]
    chosen = np.random.default_rng(0).permutation(first.seen)[:rows * columns]
    totals = []
    for run in same_items:
        right = run.answers == held["labels"]
        totals.append(f"{run.name}: {right[run.seen].mean():.1%} of {len(run.seen):,} right, "
                      f"{right[chosen].sum()} of the {len(chosen)} shown")
    height = rows * (1.35 + 0.32 * len(same_items)) + 0.25 * len(totals)
    with figure(path, 1.9 * columns, height, nrows=rows, ncols=columns) as (fig, axes):
        fig.suptitle("\n".join(totals), fontsize=10)
        for ax in axes.flat[len(chosen):]:
            ax.axis("off")
        for ax, item in zip(axes.flat, chosen):
            tokens, truth = held["tokens"][np.array([item])], held["labels"][item]
            if "patch" in meta:
                ax.imshow(unpatchify(tokens, meta["patch"])[0].squeeze(), cmap="gray", vmin=0, vmax=255)
            else:
                ax.imshow(tokens[0].reshape(-1, meta["mels"]).T, origin="lower", aspect="auto")
            ax.set_title(short[truth], fontsize=7)
            ax.set(xticks=[], yticks=[])
            for line, run in enumerate(same_items):
                text, style = f"✓ {run.name}", dict(color="#1a6e2e")
                if run.answers[item] != truth:
                    text = f"✗ {run.name}: {short[run.answers[item]]}"
                    style = dict(color="#a02020", weight="bold")
                ax.text(0.5, -0.06 - 0.27 * line, textwrap.fill(text, 32), transform=ax.transAxes, fontsize=6,
                        ha="center", va="top", **style)


def draw_curves(path, runs):
    """Loss of every slot and validation accuracy over target steps, from each run's log.jsonl. A colour is a
    run, a dash is a slot."""
    slots = dict.fromkeys(slot for run in runs for slot in run.slots)
    dashes = dict(zip(slots, itertools.cycle(("-", "--", ":", "-."))))
    # where the target begins; in stages it trains from the first step on
    starts = [0 if run.cfg["stages"] else run.cfg["warm_start_steps"] for run in runs]
    with figure(path, 9, 3.4, ncols=2) as (_, (left, right)):
        for i, (run, warm) in enumerate(zip(runs, starts)):
            losses, scores = read_log(os.path.join(run.folder, "log.jsonl"))
            for slot, values in losses.items():
                left.plot(np.array(list(values)) - warm, list(values.values()), dashes[slot], color=f"C{i}")
            right.plot(np.array(list(scores)) - warm, list(scores.values()), marker="o", ms=3, color=f"C{i}")
            left.plot([], [], color=f"C{i}", lw=6, label=run.name)
        for slot, dash in dashes.items():
            left.plot([], [], dash, color="black", label=f"loss of {slot}")
        if max(starts):
            left.axvspan(-max(starts), 0, color="0.92", label="warm start")
        left.set(xlabel="steps of the target", ylabel="training loss")
        right.set(xlabel="steps of the target", ylabel="validation score", xlim=(0, None), ylim=(0, None))
        left.legend(fontsize=7)


def read_log(path):
    """log.jsonl -> {slot: {step: loss}}, {step: validation score}. A killed and resumed run logs some steps
    twice: the last line counts. A line cut short is skipped."""
    losses, scores = {}, {}
    for line in read_text(path).splitlines():
        with contextlib.suppress(ValueError):  # cut short
            entry = json.loads(line)
            for slot, loss in entry.get("loss", {}).items():
                losses.setdefault(slot, {})[entry["step"]] = loss
            if "val_score" in entry:
                scores[entry["step"]] = entry["val_score"]
    return losses, scores


# ------------------------------------------------------------------------------------------------------------
# commands


def main():
    """Do what the command line says; the top of this file shows what it may say."""
    argv = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that compare stops its runs before it ends
    if not argv or "--help" in argv or "-h" in argv:
        print_help(__doc__, COMPARE_KEYS, "Keys of compare (of preflight: seeds = 3, first_seed, jobs), "
                   "besides every key of train.py:")
        for arm, (line, _) in ARMS.items():
            print(f"  arm {arm:30} {line}")
    elif argv[0] == "compare":
        compare(argv[1:])
    elif argv[0] == "preflight":
        preflight(argv[1:])
    elif any(arg.startswith("--") for arg in argv):
        raise UserError("only compare and preflight take keys; the other commands take folders and paths")
    elif argv[0] == "embed" and len(argv) == 3:
        embed(*argv[1:])
    elif argv[0] == "export" and len(argv) in (2, 3):
        export(argv[1], argv[2] if len(argv) == 3 else os.path.join(argv[1], "export"))
    elif argv[0] in ("embed", "export"):
        raise UserError("usage: python probe.py embed OUT_DIR PATH, or export OUT_DIR [FOLDER]")
    elif argv[0].endswith(".py"):
        raise UserError(f"{argv[0]} is a config: python train.py {argv[0]}, or "
                        f"python probe.py compare {argv[0]}")
    elif not os.path.isdir(argv[0]):
        commands = ("compare", "preflight", "embed", "export")
        near = difflib.get_close_matches(argv[0], commands, n=1)
        raise UserError(f"{argv[0]} is no command (there are: {', '.join(commands)}) and no folder of a run"
                        + (f": did you mean {near[0]}?" if near else ""))
    else:
        analyse_all(argv)


if __name__ == "__main__":
    exit_on_user_error(main)
