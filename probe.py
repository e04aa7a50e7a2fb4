"""probe.py: what did a run learn, and did unpaired data help? Frozen features, and train.run.

    python probe.py out/letters_text [out/letters_alone ...]         # analyses of finished runs, side by side
    python probe.py compare sample_configs/letters_text.py --seeds=3 # alone, uml, control: with the verdict
    python probe.py embed out/letters_text /my/pictures              # features and predictions for new files
    python probe.py theory                                           # the linear world, exactly and learned
    python probe.py exchange CONFIG '--image_examples=[508,1016,2032]' '--text_examples=[0,1000,3943]'

compare and exchange take every key of train.py and those that --help lists, exchange two of them as lists.

Analyses read the target's test split (val, if the run was told never to open test). Probes are fitted on the
run's own training examples, their penalty is chosen on validation, and items of unseen classes are left out.
Only few-shot probes (penalty 1, draws from the whole training split) and alignment take in all classes. The
last line is JSON, except of compare, which writes compare.json.

Sections: statistics, compare, many runs, measures on features, corruptions, runs side by side, theory,
exchange, embed, figures, commands.
"""
import contextlib
import csv
import difflib
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch loads OpenMP; train.py says why

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageFilter

from model import linear_probe
from prepare import (LOG_MEL_RANGE, UserError, active_slots, at_least, encode_features, encode_pictures,
                     encode_recordings, encode_text, exit_on_user_error, file_sha256, load_bpe, load_split,
                     modality_of, patchify, plain_name, prepare, print_help, read_config, read_meta,
                     read_picture, read_recording, read_text, tell, unpatchify, write_file, write_json)
from train import (FREE_KEYS, KEYS, SIGNALS, build_model, choose_examples, evaluate, extract, fit_probe,
                   load_checkpoint, load_model, open_slots, pick_device, read_run_config, resolve, run,
                   save_checkpoint, shard_names, train_batch)

CPU = torch.device("cpu")


def quiet(line):
    """What work within work gets as `say`: it prints nothing."""


# ------------------------------------------------------------------------------------------------------------
# statistics for a handful of seeds


def t_interval(values):
    """(mean, half width of the 95% t-interval). One value says nothing of the spread: None."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, None
    from scipy import stats  # a second, which --help and workers need not wait for
    return mean, float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def paired(a, b):
    """The differences a - b seed by seed: mean, 95% half width, p of the t-test and of sign flips."""
    from scipy import stats
    d = np.asarray(a, float) - np.asarray(b, float)
    mean, half = t_interval(d)
    floor = 2.0 ** (1 - min(len(d), 16))
    if len(d) < 2 or np.ptp(d) == 0:  # no spread to hold the mean against
        p, flip_p = (1.0, 1.0) if len(d) < 2 or mean == 0 else (0.0, floor)
    else:
        p = float(stats.ttest_1samp(d, 0).pvalue)
        flip_p = float(stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=2**16,
                                              rng=np.random.default_rng(0)).pvalue)
    return dict(mean=mean, half=half, p=p, sign_flip_p=flip_p, sign_flip_floor=floor)


# ------------------------------------------------------------------------------------------------------------
# compare: the same config, seeds, target examples and target updates, with and without the unpaired data

COMPARE_KEYS = dict(
    seeds=(8, "runs an arm", at_least(1)),
    first_seed=(0, "seed of the first run of an arm, the others follow", at_least(0)),
    arms=("alone,uml,control", "compare: also apart, longer, init, unrelated"),
    unrelated=("", "compare: the source of the auxiliary in the arm 'unrelated'"),
    search=("0.5,1,2", "compare: candidates of each arm, chosen on validation with a seed that is not "
                       "reported: factors on learning_rate, or settings "
                       "'learning_rate=1e-3,weight_decay=0.5;learning_rate=...'"),
    jobs=(0, "runs at a time (0: on a GPU one, else one a core, of one thread each)", at_least(0)),
)
ARMS = dict(
    alone="the target only", uml="the config as it stands", control="auxiliary with its structure destroyed",
    apart="every slot with a trunk of its own, only the label head shared",
    longer="alone, with all the FLOPs of uml",
    init="trunk warm-started on the auxiliary, then the target alone",
    unrelated="a real auxiliary of another domain")
SEARCH_SEED = 1000
ALSO_SHOWN = ("balanced_accuracy", "unseen_accuracy", "unseen_among_unseen", "harmonic_mean",
              "seen_with_offset", "unseen_with_offset")
MIN_SEEDS = 6  # with 5 not even the sign-flip test can reach 0.05: its floor is 2 / 2^5 = 0.06


def compare(argv):
    """Search each arm on validation, then run every seed, test split scored once; tables and the verdict."""
    cfg = read_run_config(argv, dict(KEYS, **COMPARE_KEYS))
    if len(active_slots(cfg)) < 2:
        raise UserError("compare needs a config with a target and an auxiliary: probe.py compare CONFIG")
    own = own_keys(cfg)
    seeds, wanted = own["seeds"], {"alone", "uml", *own["arms"].split(",")}
    if unknown := wanted - set(ARMS):
        raise UserError(f"unknown arm '{min(unknown)}' (there are: {', '.join(ARMS)})")
    arms = [arm for arm in ARMS if arm in wanted]
    settings = candidates(own["search"], cfg)
    # Under "each" every speaker is tested in turn, so no seed is free of test data: each chooses on its own
    # validation speaker.
    per_seed = cfg["audio_test_group"] == "each" and modality_of(cfg["target"]) == "audio"
    if SEARCH_SEED in seeds and len(settings) > 1 and not per_seed:
        raise UserError(f"seed {SEARCH_SEED} is the one that chooses settings: pick another first_seed than "
                        f"{own['first_seed']}")
    for arm in arms:  # what is wrong shows now, not hours later
        resolve(arm_config(cfg, arm, own["unrelated"]), say=quiet)
    results, chosen, searched = run_arms(cfg, own, arms, seeds, settings, per_seed)
    folds = list(seeds)  # what each seed is tested on
    if per_seed:
        metas = [read_meta(prepare(resolve(dict(cfg, seed=seed), quiet), cfg["target"])) for seed in seeds]
        folds = [str(meta["splits"]["test"]["files"]["tokens"]) for meta in metas]  # checksums among them
    out = dict(summary(cfg, arms, results, chosen, searched, folds), first_seed=own["first_seed"],
               candidates=settings, command=shlex.join(["python", "probe.py", "compare", *argv]),
               hardware=f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
               config={key: value for key, value in cfg.items() if key not in KEYS or value != KEYS[key][0]})
    out["verdict"] = verdict(out)
    write_json(os.path.join(cfg["out_dir"], "compare.json"), out)
    draw_compare(os.path.join(cfg["out_dir"], "compare.png"), out)
    show_compare(out)
    print(f"wrote compare.json and compare.png in {cfg['out_dir']}")
    return out


def own_keys(cfg):
    """Take the keys of compare and exchange out of cfg; seeds as a range."""
    own = {key: cfg.pop(key) for key in COMPARE_KEYS}
    if cfg["seed"] != KEYS["seed"][0]:
        raise UserError(f"seed={cfg['seed']} is set run by run here: did you mean --seeds={cfg['seed']} or "
                        f"--first_seed={cfg['seed']}?")
    cfg.update(stop_after=0, benchmark=False)  # keys of single runs
    if not own["jobs"]:
        on_cpu = pick_device(cfg)[0].type == "cpu"
        cfg["threads"] = cfg["threads"] or int(on_cpu)
        own["jobs"] = max(1, torch.get_num_threads() // cfg["threads"]) if on_cpu else 1  # torch counts cores
    own["seeds"] = range(own["first_seed"], own["first_seed"] + own["seeds"])
    return own


def candidates(text, cfg):
    """'0.5,1,2' -> [{learning_rate: ...}, ...]; 'learning_rate=1e-3,text_updates=2;...' -> these settings."""
    if "=" not in text:
        try:
            return [dict(learning_rate=cfg["learning_rate"] * float(factor)) for factor in text.split(",")]
        except ValueError:
            raise UserError(f"search='{text}' must be numbers joined by commas, or settings by ';'") from None
    out = []
    for part in text.split(";"):
        pairs = [pair.strip() for pair in part.split(",")]
        read = read_config([f"--{pair}" for pair in pairs], KEYS)
        out.append({key: read[key] for key in (pair.split("=")[0] for pair in pairs)})
    return out


def auxiliaries_of(cfg):
    return [slot for slot in active_slots(cfg) if slot != cfg["target"]]


def arm_config(cfg, arm, unrelated="", flops_ratio=1.0):
    """cfg changed into one arm of the comparison."""
    if arm == "init" and not cfg["warm_start_steps"]:
        raise UserError("arm 'init' needs warm_start_steps above 0")
    if arm == "unrelated" and not unrelated:
        raise UserError("arm 'unrelated' needs --unrelated=SOURCE")
    auxiliaries = auxiliaries_of(cfg)
    off = {slot: "" for slot in auxiliaries}
    longer = {key: round(cfg[key] * flops_ratio) for key in ("steps", "eval_interval")}
    idle = {f"{slot}_updates": 0 for slot in auxiliaries}
    other = {slot: unrelated for slot in auxiliaries}
    unlabelled = {f"{slot}_loss": "next" for slot in auxiliaries}  # its classes are not the target's
    changes = dict(alone=off, uml={}, control=dict(control=True), apart=dict(apart=True), longer=off | longer,
                   init=dict(idle, schedule="alternate"), unrelated=dict(other | unlabelled, head_from=""))
    return dict(cfg, **changes[arm])


def run_arms(cfg, own, arms, seeds, settings, per_seed):
    """Every arm: its candidate settings on validation, then every seed with the best of them.

    per_seed: every seed chooses for itself, on its own validation split. Returns {arm: results}, {arm: the
    settings of each seed}, {arm: search scores (searches, candidates)}.
    """
    results, chosen, searched = {}, {}, {}
    search_seeds = seeds if per_seed else [SEARCH_SEED]
    tries = list(itertools.product(search_seeds, settings)) if len(settings) > 1 else []
    progress = start_progress(cfg, own, len(arms) * (len(tries) + len(seeds)))

    def configs(arm, pairs, **change):
        ratio = results["uml"][0]["flops"] / results["alone"][0]["flops"] if arm == "longer" else 1.0
        return [arm_config(dict(cfg, **setting, seed=seed, **change), arm, own["unrelated"], ratio)
                for seed, setting in pairs]

    later = [arm for arm in arms if arm not in ("alone", "uml")]  # `longer` needs the others' FLOPs
    for wave in (["alone", "uml"], later):
        found = iter(run_all([c for arm in wave for c in configs(arm, tries, score_test=False)], progress))
        for arm in wave:
            scores = [score_of(next(found), "val") for _ in tries]
            searched[arm] = np.array(scores).reshape(-1, len(settings))
            best = searched[arm].argmax(1).tolist() or [0]  # one for each search; without, the only setting
            chosen[arm] = [settings[i] for i in best] * (len(seeds) // len(best))
        found = iter(run_all([c for arm in wave for c in configs(arm, zip(seeds, chosen[arm]))], progress))
        results.update({arm: [next(found) for _ in seeds] for arm in wave})
    return results, chosen, searched


def summary(cfg, arms, results, chosen, searched, folds):
    """What compare.json holds. folds: what each seed is tested on.

    Seeds that are tested on the same speaker are averaged first: the statistics are over speakers. Folds
    share most of their training speakers, so they are not independent, and p is if anything too small.
    """
    split, target, first = "test" if cfg["score_test"] else "val", cfg["target"], results["alone"][0]
    folds = np.unique(folds, return_inverse=True)[1]  # (seeds,) numbers from 0
    out = dict(kind="compare", name=os.path.basename(cfg["out_dir"]), split=split,
               measure="loss" if first[f"{split}_accuracy"] is None else "accuracy",
               target=f"{target}={cfg[target]}", target_loss=cfg[f"{target}_loss"],
               auxiliaries={slot: f"{cfg[slot]} ({cfg[f'{slot}_loss']})" for slot in auxiliaries_of(cfg)},
               examples=first["examples"][target], seeds=len(folds), folds=int(folds.max()) + 1,
               chance=first["chance"], steps=cfg["steps"], warm_start_steps=cfg["warm_start_steps"], arms={})
    units = {}  # {arm: a score for each fold}
    for arm in arms:
        scores = [score_of(result, split) for result in results[arm]]
        units[arm] = np.bincount(folds, scores) / np.bincount(folds)
        mean, half = t_interval(units[arm])
        entry = dict(scores=scores, mean=mean, half=half, settings=chosen[arm],
                     search_scores=searched[arm].tolist(),
                     gflops=float(np.mean([result["flops"] for result in results[arm]])) / 1e9,
                     seconds=float(np.mean([result["seconds"] for result in results[arm]])))
        for key in ALSO_SHOWN:
            if results[arm][0].get(f"{split}_{key}") is not None:
                entry[key] = [result[f"{split}_{key}"] for result in results[arm]]
        if arm != "alone":
            entry["minus_alone"] = paired(units[arm], units["alone"])
        if arm not in ("uml", "alone"):
            entry["uml_minus"] = paired(units["uml"], units[arm])
        out["arms"][arm] = entry
    return out


def score_of(result, split):
    """Accuracy; without labels minus the loss."""
    accuracy = result[f"{split}_accuracy"]
    return -result[f"{split}_loss"] if accuracy is None else accuracy


def verdict(out):
    """One sentence. Help is claimed only above alone AND above the control, each with p < 0.05."""
    d, n = out["arms"]["uml"]["minus_alone"], out.get("folds", out["seeds"])
    c = out["arms"].get("control", {}).get("uml_minus")
    unit, digits, points = (100, 1, " points") if out["chance"] else (1, 3, "")
    signed = lambda value: f"{unit * value:+.{digits}f}"
    half = d["half"]
    interval = "" if half is None else f" [{signed(d['mean'] - half)}, {signed(d['mean'] + half)}]"
    said = f"uml minus alone is {signed(d['mean'])}{interval}{points}"
    if n < MIN_SEEDS:
        kind = "seeds" if n == out["seeds"] else "speakers"
        return f"too few {kind} for a verdict ({n}; {MIN_SEEDS} are needed): {said}"
    said += f", p = {d['p']:.3g}"
    if d["p"] >= 0.05:
        return f"no effect shown: {said}"
    if d["mean"] < 0:
        return f"the unpaired data hurt: {said}"
    if c is None:
        return f"uml is above alone, but no control was run to say why: {said}"
    said += f", and {signed(c['mean'])} against the control, p = {c['p']:.3g}"
    if c["mean"] <= 0 or c["p"] >= 0.05:
        return f"uml is above alone, but it is not shown that the auxiliary's structure helped: {said}"
    return f"the unpaired data helped: {said}"


def show_auxiliaries(out):
    return ", ".join(f"{slot}={short_source(source)}" for slot, source in out["auxiliaries"].items())


def short_source(source):
    """'folder:/my/pictures' -> 'folder:pictures': what a table or title shows."""
    name, colon, path = source.partition(":")
    return name + colon + os.path.basename(path.rstrip("/"))


def show_compare(out):
    """Print the comparison as a table, an arm a line, and the verdict."""
    chance = f", chance {out['chance']:.4f}" if out["chance"] else ""
    speakers = f" on {out['folds']} speakers" if out["folds"] != out["seeds"] else ""
    print(f"{out['target']}, {out['examples']} examples, {out['target_loss']}; auxiliary "
          f"{show_auxiliaries(out)}; {out['seeds']} seeds{speakers}, {out['measure']} on the {out['split']} "
          f"split{chance}")
    print(f"{'arm':10}{'mean +- 95%':>19}{'minus alone':>20}{'t-test p':>10}{'sign-flip p (floor)':>21}"
          f"{'GFLOP':>9}{'s':>7}  setting")
    half = lambda e: "?" if e["half"] is None else f"{e['half']:.4f}"
    for arm, e in out["arms"].items():
        line = f"{arm:10}{e['mean']:10.4f} +- {half(e)}"
        if d := e.get("minus_alone"):
            line += (f"{d['mean']:+11.4f} +- {half(d)}{d['p']:10.3g}{d['sign_flip_p']:12.3g} "
                     f"({d['sign_flip_floor']:.3g})")
        settings = [", ".join(f"{k}={v}" for k, v in setting.items()) for setting in e["settings"]]
        line = f"{line:80}{e['gflops']:9,.0f}{e['seconds']:7.0f}  {' or '.join(dict.fromkeys(settings))}"
        print(line + "".join(f"; {key} {np.mean(e[key]):.4f}" for key in ALSO_SHOWN if key in e))
    print("verdict: " + out["verdict"])


# ------------------------------------------------------------------------------------------------------------
# many runs: some at a time, finished ones read back, begun ones resumed, equal warm starts shared


def start_progress(cfg, own, total):
    """Where run_all() keeps runs, how many at a time, and what it counts: how many are done, of how many."""
    folder = os.path.join(cfg["out_dir"], "compare")
    os.makedirs(folder, exist_ok=True)
    return SimpleNamespace(folder=folder, jobs=own["jobs"], total=total, done=0, start=time.perf_counter())


def run_all(configs, progress):
    """Run every config to its result; the results in their order.

    A run's folder is named by what decides its result: the config (without paths), this code, the shards and
    init_from. A warm start that arms share runs once; they begin with copies of its checkpoint.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    code = [file_sha256(os.path.join(here, name)) for name in ("prepare.py", "model.py", "train.py")]
    tasks, starting = [], []  # starting: [(config, config of its warm start)] of those that have not begun
    for cfg in configs:
        cfg = resolve(cfg, say=quiet)
        files = [os.path.join(prepare(cfg, slot, say=quiet), "meta.json") for slot in active_slots(cfg)]
        if cfg["init_from"]:
            files.append(os.path.join(cfg["init_from"], "best.pt"))
        decides = code + [file_sha256(file) for file in files]

        def named(kind, values):
            text = json.dumps([values, decides], sort_keys=True)
            return os.path.join(progress.folder, f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}")

        identity = {key: value for key, value in cfg.items() if key not in FREE_KEYS}
        cfg.update(out_dir=named("run", identity), resume=True)
        tasks.append(cfg)
        if cfg["warm_start_steps"] and not os.path.exists(os.path.join(cfg["out_dir"], "last.pt")):
            # what only the main phase uses is set alike, so that arms agree on the warm start where they can
            same = dict(identity, steps=1, eval_interval=cfg["warm_start_steps"], score_test=False)
            updates = [f"{slot}_updates" for slot in auxiliaries_of(cfg)]
            if not any(cfg[key] for key in updates):  # the arm init warms up as if they had one
                same.update({key: 1 for key in updates})
            warm = dict(cfg, **same, out_dir=named("warm", same), stop_after=cfg["warm_start_steps"])
            starting.append((cfg, warm))
    once = {}  # {out_dir: config} of the warm starts that have not run to their end yet
    for _, warm in starting:
        path = os.path.join(warm["out_dir"], "last.pt")
        if not os.path.exists(path) or load_checkpoint(path)["step"] < warm["warm_start_steps"]:
            once[warm["out_dir"]] = warm
    progress.total += len(once)
    run_pool(list(once.values()), progress)
    for cfg, warm in starting:
        os.makedirs(cfg["out_dir"], exist_ok=True)
        shutil.copyfile(os.path.join(warm["out_dir"], "log.jsonl"), os.path.join(cfg["out_dir"], "log.jsonl"))
        begun = load_checkpoint(os.path.join(warm["out_dir"], "last.pt"))
        begun.update(config=dict(cfg, shards=shard_names(cfg)))
        save_checkpoint(os.path.join(cfg["out_dir"], "last.pt"), **begun)
    return run_pool(tasks, progress)


def run_pool(configs, progress):
    """The results of configs in their order; each new one makes a line."""
    new = {cfg["out_dir"]: cfg for cfg in configs
           if not os.path.exists(os.path.join(cfg["out_dir"], "result.json"))}
    found = {cfg["out_dir"]: quiet_run(cfg) for cfg in configs if cfg["out_dir"] not in new}  # read back
    progress.total -= len(configs) - len(new)

    def finished(out_dir, result):
        found[out_dir] = result
        progress.done += 1
        left = (time.perf_counter() - progress.start) * (progress.total / progress.done - 1)
        tell(f"{progress.done} of {progress.total} runs finished, about {left / 60:.0f} minutes to go")

    if progress.jobs == 1 or len(new) < 2:
        for out_dir, cfg in new.items():
            finished(out_dir, quiet_run(cfg))
        return [found[cfg["out_dir"]] for cfg in configs]
    with ProcessPoolExecutor(progress.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(quiet_run, cfg): out_dir for out_dir, cfg in new.items()}
        try:
            for future in as_completed(futures):
                finished(futures[future], future.result())
        except BrokenProcessPool:
            raise UserError(f"a run was killed, perhaps for lack of memory: lower jobs={progress.jobs}; the "
                            "same command goes on") from None
        except BaseException:  # a refusal or Ctrl-C: those at work finish a step and save, no other begins
            pool.shutdown(cancel_futures=True)
            raise
    return [found[cfg["out_dir"]] for cfg in configs]


def quiet_run(cfg):
    """One run in a worker; a worker that was told to stop begins nothing more."""
    if SIGNALS:
        sys.exit(128 + SIGNALS[0])
    try:
        return run(cfg, say=quiet)
    except KeyboardInterrupt:  # before run() caught signals itself
        SIGNALS.append(signal.SIGINT)
        raise


# ------------------------------------------------------------------------------------------------------------
# measures on features (n, D) and labels (n,): torch tensors on the CPU


def few_shot(features, labels, new, truth, shots=(1, 2, 4, 8, 16), draws=3):
    """{shots a class: (mean, standard deviation) of probe accuracy over draws of the training items}."""
    classes, out = int(labels.max()) + 1, {}
    for k in shots:
        if k > torch.bincount(labels, minlength=classes).min() or k * classes > 2500:
            break  # some class has fewer examples, or the probes would take minutes
        right = []
        for draw in range(draws):
            rows = choose_examples(labels.numpy(), len(labels), k * classes, draw, "few-shot")
            weight, bias = linear_probe(features[rows], labels[rows], classes)
            right.append(((new @ weight.T + bias).argmax(1) == truth).float().mean().item())
        out[k] = (float(np.mean(right)), float(np.std(right, ddof=1)))
    return out


def margins(features, labels, weight, bias):
    """Distances (n,) of items to the boundary with the best other class; positive where classified right.

    (score of the truth - score of the rival) / |difference of their weights|, on standardised features, so
    that runs of different feature scale compare. Gupta et al. 2025 (section 5): unpaired data widens them.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    weight, bias, features = weight * std, bias + weight @ mean, (features - mean) / std
    scores = features @ weight.T + bias  # (n, classes)
    true = scores.gather(1, labels[:, None])[:, 0]
    best, rival = scores.scatter(1, labels[:, None], -torch.inf).max(1)
    return (true - best) / (weight[labels] - weight[rival]).norm(dim=1).clamp_min(1e-9)


def cka(a, b):
    """Linear centred kernel alignment of two (k, D) matrices, row by row; 1 for rotations of each other.

    Kornblith et al. 2019 (arXiv 1905.00414, section 3).
    """
    a, b = a - a.mean(0), b - b.mean(0)
    return ((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()).clamp_min(1e-12)).item()


def mutual_knn(a, b, k):
    """Share of a row's k nearest rows (cosine) that a and b have in common (Huh et al. 2024, 2405.07987)."""
    def nearest(m):
        m = F.normalize(m - m.mean(0), dim=1)
        return (m @ m.T).fill_diagonal_(-2).topk(k, dim=1).indices.tolist()
    return np.mean([len(set(p) & set(q)) / k for p, q in zip(nearest(a), nearest(b))])


def unit_agreement(a, b):
    """Per unit, how its activations in two slots correlate over classes: two (k, C) centroids -> (C,)."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)


def permutation_p(measure, a, b, draws=200, seed=0):
    """(measure(a, b), p): how often shuffled rows of b give at least as much, 1 / (draws + 1) or more."""
    rng, found = np.random.default_rng(seed), measure(a, b)
    null = [measure(a, b[rng.permutation(len(b))]) for _ in range(draws)]
    return found, (1 + sum(value >= found for value in null)) / (draws + 1)


def gradient_agreement(model, batches_of_one, batches_of_other):
    """Cosine of two mean gradients on each trunk block: a list of floats, below 0 where they conflict.

    Batches are keyword arguments of UML.forward, `slot` among them. Yu et al. 2020 (arXiv 2001.06782). Means
    first, one cosine then: the noise of single batches would draw the cosine of each pair towards 0.
    """
    def flat(batches):
        model.zero_grad()
        for batch in batches:
            model(**batch).backward()  # adds up; a cosine is blind to the scale
        blocks = [torch.cat([p.grad.flatten() for p in block.parameters()]) for block in model.trunk.blocks]
        model.zero_grad()
        return blocks
    pairs = zip(flat(batches_of_one), flat(batches_of_other))
    return [F.cosine_similarity(one, other, dim=0).item() for one, other in pairs]


def class_words(classes):
    """The words of each class name, without those that all names share: a list of lists."""
    words = [name.replace("_", " ").split() for name in classes]
    common = set.intersection(*map(set, words)) if len(words) > 2 else set()
    return [[word for word in own if word not in common] for own in words]


def head_geometry(weight, classes):
    """Do classes that share a word have like rows in the label head? weight (k, C), classes: k names.

    Cosines of two rows, less the mean row -> dict: their mean over pairs of classes with only the "first"
    word in common, only the "last", and "neither"; p that sharing one is worth nothing, from shuffled
    classes (Mantel 1967). None where no pair shares just one.
    """
    ends = [(own[0], own[-1]) if own else ("", "") for own in class_words(classes)]
    codes = np.stack([np.unique(words, return_inverse=True)[1] for words in zip(*ends)], 1)  # (k, 2) numbers
    i, j = np.triu_indices(len(codes), 1)
    rows = F.normalize(weight - weight.mean(0), dim=1)
    cosine = (rows @ rows.T).numpy()[i, j]  # (pairs,)

    def gap(cosine, codes):
        first, last = (codes[i] == codes[j]).T  # (pairs,) each
        return cosine[first != last].mean() - cosine[~first & ~last].mean()

    first, last = (codes[i] == codes[j]).T
    groups = dict(first=first & ~last, last=last & ~first, neither=~first & ~last)
    if not ((first != last).any() and groups["neither"].any()):
        return None
    found = {name: float(cosine[group].mean()) if group.any() else None for name, group in groups.items()}
    return dict(found, p=permutation_p(gap, cosine, codes)[1])


# ------------------------------------------------------------------------------------------------------------
# corruptions of pictures (n, S, S, c) and recordings (n, T, group*mels) uint8, three severities each

PICTURE_CORRUPTIONS = ("noise", "blur", "contrast", "pixelate")
SOUND_CORRUPTIONS = ("noise", "gain", "bandlimit")


def corrupt_pictures(pictures, kind, severity):
    """One of PICTURE_CORRUPTIONS, severity 1..3, after Hendrycks & Dietterich 2019 (arXiv 1903.12261)."""
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
    return np.clip(np.stack(changed).reshape(pictures.shape), 0, 255).astype(np.uint8)


def corrupt_frames(tokens, mels, kind, severity):
    """Noise (20, 10, 0 dB SNR), gain (-6, -12, -18 dB) or bandlimit (the lower 80, 60, 40% of the mels)."""
    i, (low, high) = severity - 1, LOG_MEL_RANGE
    log_mel = tokens.reshape(*tokens.shape[:2], -1, mels) / 255 * (high - low) + low  # (n, T, group, mels)
    if kind == "noise":
        heard = tokens.reshape(log_mel.shape).any(3, keepdims=True)  # padding is 0, recorded silence is not
        power = np.exp(log_mel).mean((1, 2, 3), where=heard, keepdims=True) / 10 ** ((2, 1, 0)[i])
        noise = np.random.default_rng(severity).exponential(1, log_mel.shape)
        log_mel = np.log(np.exp(log_mel) + power * noise)
    elif kind == "gain":
        log_mel = log_mel - (6, 12, 18)[i] * math.log(10) / 10
    else:  # bandlimit
        log_mel = np.where(np.arange(mels) < mels * (0.8, 0.6, 0.4)[i], log_mel, low)
    levels = ((log_mel - low) / (high - low) * 255).round().clip(0, 255)
    return levels.astype(np.uint8).reshape(tokens.shape)


# ------------------------------------------------------------------------------------------------------------
# runs side by side


def check_shards(folder, cfg):
    """Refuse a run whose data has changed: a new draw would let training items into its test."""
    for slot, name in shard_names(cfg).items():
        if name != cfg["shards"][slot]:
            raise UserError(f"{folder} was trained on {cfg['shards'][slot]}, but {slot}={cfg[slot]} has "
                            "changed since: train it again")


def open_run(folder):
    """A finished run: its config, slots, best model, and the split its analyses may read."""
    if not os.path.exists(os.path.join(folder, "result.json")):
        if os.path.exists(os.path.join(folder, "last.pt")):
            raise UserError(f"the run in {folder} is not finished: wait for it, or go on with --resume")
        raise UserError(f"{folder} holds no finished run (no result.json): train one first, for example "
                        "`python train.py sample_configs/letters_text.py`")
    model, checkpoint = load_model(os.path.join(folder, "best.pt"))
    cfg = checkpoint["config"]
    check_shards(folder, cfg)
    slots, classes = open_slots(cfg, say=quiet)
    split, target = "test" if cfg["score_test"] else "val", slots[cfg["target"]]
    if len(target.meta["classes"]) < 2:
        raise UserError(f"{folder}: the target {target.name}={cfg[target.name]} has no classes to probe for")
    held = load_split(target.folder, split)
    # rows of items whose class had labelled examples
    seen, seen_val = (np.flatnonzero(~np.isin(part["labels"], target.banned)) for part in (held, target.val))
    return SimpleNamespace(folder=folder, name=os.path.basename(os.path.normpath(folder)), slots=slots,
                           model=model, target=target, split=split, held=held, seen=seen, seen_val=seen_val,
                           cfg=cfg, classes=classes)


def features_of(run_, slot, arrays, rows=None, layer=-1):
    """(features (n, C), labels (n,)) of some rows of a split."""
    rows = np.arange(len(arrays["tokens"])) if rows is None else rows
    labels = torch.from_numpy(arrays["labels"][rows]).long()
    return extract(run_.model, slot, arrays, rows, CPU, layer), labels


def analyse(folder):
    """All analyses of one run -> its report, margins, and answers (n,) on held-out items."""
    run_ = open_run(folder)
    target = run_.target
    tell(f"{folder}: probing every layer, few examples, corruptions, alignment, gradients ...")
    layers = []
    for layer in [*range(len(run_.model.trunk.blocks)), -1]:
        known = features_of(run_, target, target.train, target.rows, layer)
        val = features_of(run_, target, target.val, run_.seen_val, layer)
        new, truth = features_of(run_, target, run_.held, run_.seen, layer)
        weight, bias = fit_probe(known, val, len(target.meta["classes"]))
        right = (new @ weight.T + bias).argmax(1) == truth
        layers.append(dict(linear=right.float().mean().item()))
    # from here on of the last layer
    margin = margins(new, truth, weight, bias)
    chosen = dict(probe=(weight, bias), unseen_offset=0.0)
    scored = evaluate(run_.model, target, run_.held, CPU, chosen)
    every, held = features_of(run_, target, target.train), features_of(run_, target, run_.held)
    labelled = [name for name in run_.slots if name != target.name and "labels" in run_.slots[name].train]
    with_head = any("label" in slot.objectives for slot in run_.slots.values())
    head = head_geometry(run_.model.label_head.weight.detach(), run_.classes) if with_head else None
    report = dict(name=run_.name, split=run_.split, accuracy=scored["accuracy"],
                  unseen_accuracy=scored.get("unseen_accuracy"), layers=layers,
                  few_shot=few_shot(*every, *held),
                  margin=[margin.quantile(q).item() for q in (0.1, 0.5, 0.9)],
                  robustness=robustness(run_, chosen, scored["accuracy"]),
                  alignment={name: alignment(run_, run_.slots[name]) for name in labelled},
                  gradients=slots_agreement(run_), head=head)
    weight, bias = scored["probe"]  # the label head where there is one
    answers = (held[0] @ weight.T + bias).argmax(1)
    return SimpleNamespace(run=run_, report=report, margin=margin.numpy(), answers=answers.numpy())


def robustness(run_, chosen, clean):
    """{corruption: accuracy at severities 0 (clean) .. 3} of a picture or sound target."""
    meta, tokens = run_.target.meta, run_.held["tokens"][np.arange(len(run_.held["tokens"]))]
    pictures = unpatchify(tokens, meta["patch"]) if "patch" in meta else None
    kinds = PICTURE_CORRUPTIONS if "patch" in meta else SOUND_CORRUPTIONS if "mels" in meta else ()
    out = {kind: [clean] for kind in kinds}
    for kind, severity in itertools.product(kinds, (1, 2, 3)):
        if "patch" in meta:
            changed = patchify(corrupt_pictures(pictures, kind, severity), meta["patch"])
        else:
            changed = corrupt_frames(tokens, meta["mels"], kind, severity)
        scored = evaluate(run_.model, run_.target, dict(run_.held, tokens=changed), CPU, chosen)
        out[kind].append(scored["accuracy"])
    return out


def alignment(run_, other):
    """Do classes lie alike in the target and in another slot, never paired? None if under 4 are common."""
    a, b = class_centroids(run_, run_.target), class_centroids(run_, other)
    names = sorted(a.keys() & b.keys())
    if len(names) < 4:
        return None
    a, b = (torch.stack([centroids[name] for name in names]) for centroids in (a, b))  # (k, C)
    k = max(1, len(names) // 8)
    cka_value, cka_p = permutation_p(cka, a, b)
    knn_value, knn_p = permutation_p(lambda p, q: mutual_knn(p, q, k), a, b, draws=50)
    agree, unit_p = permutation_p(lambda p, q: unit_agreement(p, q).mean().item(), a, b)
    return dict(classes=len(names), cka=cka_value, cka_p=cka_p, mutual_knn=knn_value, mutual_knn_p=knn_p, k=k,
                unit_agreement=agree, unit_p=unit_p)


def class_centroids(run_, slot):
    """{plain name of a class: mean feature (C,) of its held-out items} in one slot."""
    arrays = run_.held if slot is run_.target else load_split(slot.folder, run_.split)
    features, labels = features_of(run_, slot, arrays)
    return {plain_name(slot.meta["classes"][c]): features[labels == c].mean(0) for c in labels.unique()}


def slots_agreement(run_):
    """{pair of slots: {"fresh": [cosine of their gradients on each trunk block], "best": [...]}}.

    fresh: at this config's initial weights, best: at best.pt. The target's training batches against those of
    each auxiliary; the yardstick is every slot against itself, which noise alone keeps from 1. Each gradient
    is the mean of eight batches, so noise damps all alike. Where the sum of the losses has its minimum
    gradients cancel, so training by itself brings slots towards -1. {} without a common trunk.
    """
    if len(run_.slots) < 2 or len(run_.model.own_trunk) or not len(run_.model.trunk.blocks):
        return {}
    target, seed = run_.target.name, run_.cfg["seed"]
    # Two draws under different seeds: two halves of one epoch share no item, and near an optimum, where they
    # sum to nothing, their gradients would point away from each other.
    halves = {name: [[dict(train_batch(slot, draw, i, CPU), slot=name) for i in range(8)]
                     for draw in (seed, seed + 1)] for name, slot in run_.slots.items()}
    pairs = {f"{target}-{name}": list(zip(halves[target], halves[name])) for name in halves}
    pairs.update({f"{name}-{name}": [halves[name]] for name in halves})
    models = dict(fresh=build_model(run_.cfg, run_.model.slots, run_.classes), best=run_.model)
    return {pair: {state: np.mean([gradient_agreement(model, *sides) for sides in both], 0).tolist()
                   for state, model in models.items()} for pair, both in pairs.items()}


def flat(report, label=""):
    """A nested report as {label: value}: {"layers": [{"linear": 0.7}]} -> {"layers 0 linear": 0.7}."""
    if not isinstance(report, (dict, list, tuple)):
        return {label: report}
    names = dict(margin=("10%", "median", "90%"), few_shot=("mean", "std")).get(label.split(" ")[0])
    parts = report.items() if isinstance(report, dict) else zip(names or itertools.count(), report)
    rows = {}
    for key, part in parts:
        rows.update(flat(part, f"{label} {key}".strip()))
    return rows


def analyse_all(folders):
    """Analyse finished runs, print them side by side, draw what is worth looking at."""
    torch.set_num_threads(1)  # many small solves: threads would only wait for each other
    for folder in folders:
        open_run(folder)  # what is wrong with the last one shows now, not minutes later
    found = [analyse(folder) for folder in folders]
    reports, first = [one.report for one in found], found[0].run
    columns = [flat(report) for report in reports]
    for label in dict.fromkeys(label for column in columns for label in column):
        values = [column.get(label) for column in columns]
        shown = ["-" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v)[-17:] for v in values]
        print(f"{label:34}" + "".join(f"{value:>18}" for value in shown))
    draw_side_by_side(os.path.join(first.folder, "side_by_side.png"), found)
    draw_curves(os.path.join(first.folder, "curves.png"), found)
    if "patch" in first.target.meta or "mels" in first.target.meta:
        draw_predictions(os.path.join(first.folder, "predictions.png"), found)
    if any(report["gradients"] or report["head"] for report in reports):
        draw_sharing(os.path.join(first.folder, "sharing.png"), reports)
    print("wrote side_by_side.png, curves.png and, where they apply, predictions.png and sharing.png in "
          f"{first.folder}")
    print(json.dumps(reports[0] if len(reports) == 1 else reports))


# ------------------------------------------------------------------------------------------------------------
# theory: what unpaired data adds in a linear world, exactly


def information(shared, private, noise):
    """What ONE sample of a modality says about theta_c: the Schur complement j = I_cc - I_cx I_xx^+ I_xc.

    A sample is x = A_c theta_c + A_x theta_x + e, e ~ N(0, noise^2 I), with A_c = shared (D, d) and A_x =
    private (D, p); I_cx = A_c'A_x / noise^2 and so on are blocks of the Fisher information. theta_x is a
    nuisance; eliminating it leaves j. N samples say J = N j. Two modalities share neither nuisance nor noise,
    hence J_{X,Y} = J_X + J_Y: never less than J_X in the Loewner order, and strictly more wherever J_Y v != 0
    (Gupta et al. 2025, section 3).
    """
    if not noise > 0:
        raise UserError(f"noise={noise} must be positive: without it one sample would say everything")
    project = np.eye(len(shared)) - private @ np.linalg.pinv(private)  # removes what theta_x can explain
    return shared.T @ project @ shared / noise**2


def exchange_rates(j_x, j_y):
    """What a Y sample is worth in X samples, in generalised eigenvectors of (j_Y, j_X) -> (rates, vectors).

    j_Y v = rate j_X v. Both are diagonal in these directions, so only there does the ratio of informations
    speak of variances. With S = j_X + j_Y and S^(-1/2) j_X S^(-1/2) = U mu U', v = S^(-1/2) u and rate =
    (1 - mu) / mu, infinite where X is blind (mu = 0). S is singular where neither ever sees a direction.
    """
    value, vector = np.linalg.eigh(j_x + j_y)
    if value[0] < 1e-9 * value[-1]:
        unseen = np.round(vector[:, 0], 2).tolist()
        raise UserError(f"no modality sees the direction {unseen} of theta_c: nothing can estimate it")
    root = vector / np.sqrt(value) @ vector.T
    mu, u = np.linalg.eigh(root @ j_x @ root)
    mu = np.where(mu < 1e-9, 0, mu)
    with np.errstate(divide="ignore"):
        return (1 - mu) / mu, root @ u


def monte_carlo(sides, repetitions, seed=0):
    """(trace of the sample covariance, its standard error) of the maximum-likelihood estimate of theta_c.

    sides: [(shared, private, noise, N)]. The mean of N samples is sufficient; with M = I - A_x A_x^+, which
    projects the nuisance out, the estimate solves (sum J) theta = sum N A_c' M mean / noise^2. Its covariance
    is the Cramer-Rao bound (sum J)^-1.
    """
    rng, total, score = np.random.default_rng(seed), 0, 0
    truth = rng.normal(0, 1, sides[0][0].shape[1])
    for shared, private, noise, n in sides:
        means = shared @ truth + private @ rng.normal(0, 1, private.shape[1])
        means = means + rng.normal(0, noise / n**0.5, (repetitions, len(shared)))
        project = np.eye(len(shared)) - private @ np.linalg.pinv(private)
        total = total + n * information(shared, private, noise)
        score = score + n * means @ project @ shared / noise**2
    squares = ((score @ np.linalg.inv(total) - truth) ** 2).sum(1)
    return squares.mean(), squares.std() / repetitions**0.5


def theory(argv):
    """What the linear model says, exactly (seconds), then learned (two minutes a seed)."""
    keys = dict(seeds=(1, "seeds of the learned part (0: leave it out)", at_least(0)),
                repetitions=(100_000, "of the Monte Carlo estimate", at_least(2)))
    cfg, folder = read_config(argv, keys), "out/theory"
    os.makedirs(folder, exist_ok=True)
    torch.set_num_threads(1)
    out = dict(kind="theory", exact=exact_theory(cfg["repetitions"]), learned={})
    for arm, setting in LEARNED.items() if cfg["seeds"] else ():
        runs = [learned_world(seed=seed, **setting) for seed in range(cfg["seeds"])]
        out["learned"][arm] = dict(runs=runs)
        r2, clear, error = (np.mean([r[key] for r in runs]) for key in ("r2", "r2_clear", "error"))
        counts = f"{setting['n_x']:,} x + {setting['n_y']:,} y"
        print(f"4. {arm:12} {counts}: R^2 of the shared latents {r2:.3f} as trained, {clear:.3f} on x "
              f"without attenuation, which is rebuilt with error {error:.2f}")
    draw_theory(os.path.join(folder, "theory.png"), out)
    write_json(os.path.join(folder, "theory.json"), out)
    print(f"wrote theory.png and theory.json in {folder}")
    return out


def exact_theory(repetitions):
    """Bounds, blind directions and exchange rates of one small linear world, in float64; prints them."""
    rng, d, observed, private, noise = np.random.default_rng(0), 6, 12, 3, 0.5
    a_x, b_y, b_c, full = (rng.normal(0, 1, (observed, width)) for width in (private, private, d, d))
    weak = np.array([1, 1, 0.5, 0.2, 0.05, 0.0])  # how strongly X shows each direction
    a_c, n_x, n_y = full * weak, 200, 200
    j_x, j_y = information(a_c, a_x, noise), information(b_c, b_y, noise)
    print(f"theta_c has {d} directions; X shows them with strengths {weak.tolist()}, Y in full; "
          f"{n_x} samples of either, noise {noise}")
    gain = np.linalg.eigvalsh(n_y * j_y)  # J_XY - J_X, since informations of independent samples add up
    print(f"1. J_XY - J_X has eigenvalues from {gain[0]:.1f} to {gain[-1]:.1f}: all positive, so adding Y "
          "helps in every direction")
    x_seen, y_seen = (a_c[:, :5], a_x, noise), (b_c[:, :5], b_y, noise)  # what X sees at all

    def bound(n, y):
        """Trace of the Cramer-Rao bound with n samples of X and y of Y."""
        return np.trace(np.linalg.inv(n * information(*x_seen) + y * information(*y_seen)))

    rows = []
    for label, n, y in (("X alone", n_x, 0), ("Y alone", 0, n_y), ("X and Y, unpaired", n_x, n_y)):
        sides = [(*world, count) for world, count in ((x_seen, n), (y_seen, y)) if count]
        measured, error = monte_carlo(sides, repetitions)
        rows.append(dict(data=label, bound=bound(n, y), measured=measured, error=error))
        print(f"   {label:18} trace of the covariance: Cramer-Rao {bound(n, y):.5f}, "
              f"measured {measured:.5f} +- {error:.5f}")

    print("2. information about the worst direction: no number of X samples identifies what X is blind to")
    blind = []
    for n in (10, 1000, 100000):
        alone, both = (float(np.linalg.eigvalsh(j)[0]) for j in (n * j_x, n * j_x + n_y * j_y))
        blind.append(dict(n_x=n, x_alone=alone, x_and_y=both))
        print(f"   N_x = {n}: {abs(alone):.1g} from X alone, {both:.3g} with {n_y} Y")
    rates, _ = exchange_rates(j_x, j_y)
    print("3. one Y sample is worth this many X samples, along each generalised eigenvector: "
          + ", ".join("unbounded" if np.isinf(r) else f"{r:.3g}" for r in rates))
    strengths = np.geomspace(0.02, 1, 25)
    curves = {noise_y: [best_rate(w, noise, noise_y) for w in strengths] for noise_y in (0.25, 0.5, 1.0)}
    slope = np.polyfit(np.log(strengths[:8]), np.log(curves[0.5][:8]), 1)[0]
    print(f"   the best rate grows as strength^{slope:.2f}; quieter Y is worth more")
    budget = list(range(0, 401, 25))
    return dict(traces=rows, loewner_gain=[gain[0], gain[-1]], blind=blind, slope=slope, budget=budget,
                variance={n: [bound(n, y) for y in budget] for n in (50, 200)},
                strengths=strengths.tolist(), curves=curves,
                exchange_rates=[None if np.isinf(r) else r for r in rates])


def best_rate(strength, noise_x, noise_y, width=4, private=3, draws=20):
    """The largest rate where X shows one direction with this strength; geometric mean over random mixings."""
    rng, logs = np.random.default_rng(1), []
    weak = np.where(np.arange(width) < width - 1, 1, strength)
    for _ in range(draws):
        x, x_own, y, y_own = (rng.normal(0, 1, (24, k)) for k in (width, private, width, private))
        rates, _ = exchange_rates(information(x * weak, x_own, noise_x), information(y, y_own, noise_y))
        logs.append(np.log(rates.max()))
    return float(np.exp(np.mean(logs)))


# The arms of the learned linear world: equal budgets of samples, and alone with the FLOPs of uml. The linear
# ones cannot end where ReLU does: with most units clipping half of the items, two of them to a direction.
LEARNED = {
    "alone": dict(n_x=10000, n_y=0), "longer": dict(n_x=5000, n_y=0, steps=8000),
    "uml": dict(n_x=5000, n_y=5000), "control": dict(n_x=5000, n_y=5000, shuffle=True),
    "uml 1:9": dict(n_x=1000, n_y=9000), "control 1:9": dict(n_x=1000, n_y=9000, shuffle=True),
    "alone linear": dict(n_x=10000, n_y=0, relu=False), "uml linear": dict(n_x=5000, n_y=5000, relu=False),
    "control linear": dict(n_x=5000, n_y=5000, shuffle=True, relu=False)}


def learned_world(n_x, n_y, seed, steps=4000, shuffle=False, relu=True):
    """The linear world, learned: an autoencoder of x and of unpaired y that share encoder and decoder.

    x = A_c (w * theta_c) + A_x theta_x + noise shows one of ten shared latents in full, the others at a
    twentieth (w); y shows all. Both have 50 dimensions and 5 private latents. shuffle: y's numbers move to
    other items. Returns the R^2 with which theta_c is read linearly off the bottleneck of held-out x, as
    trained and without attenuation (clear), the squared error with which clear x is rebuilt, and the share
    of the encoder's units that are on for nearly all of x (always_on).
    """
    torch.manual_seed(seed)
    w, full = torch.full((10,), 0.05), torch.ones(10)
    w[0] = 1.0
    mix = {side: (torch.randn(10, 50), torch.randn(5, 50)) for side in "xy"}

    def draw(side, n, weak):
        theta, (shared, private) = torch.randn(n, 10), mix[side]
        return (theta * weak) @ shared + torch.randn(n, 5) @ private + 0.09 * torch.randn(n, 50), theta

    data = {"x": draw("x", n_x, w)[0], "y": draw("y", n_y, full)[0]}  # (n, 50) each
    if shuffle:
        data["y"] = torch.stack([column[torch.randperm(n_y)] for column in data["y"].T], 1)
    held, clear = draw("x", 5000, w), draw("x", 5000, full)

    embed = nn.ModuleDict({side: nn.Linear(50, 128) for side in "xy"})
    bend = nn.ReLU() if relu else nn.Identity()
    encode = nn.Sequential(nn.Linear(128, 10), bend, nn.Linear(10, 10))  # shared
    decode = nn.Sequential(nn.Linear(10, 10), bend, nn.Linear(10, 128))  # shared
    head = nn.ModuleDict({side: nn.Linear(128, 50) for side in "xy"})
    optimizer = torch.optim.Adam(nn.ModuleList([embed, encode, decode, head]).parameters(), lr=1e-3)

    def loss_of(side, items):
        rebuilt = head[side](decode(encode(embed[side](items))))
        return (rebuilt - items).square().mean()

    def r2(items, theta):
        """Least squares of theta_c on the bottleneck, fitted on half of the items, scored on the rest."""
        code = torch.cat([encode(embed["x"](items)), torch.ones(len(items), 1)], 1)
        half = len(items) // 2
        wanted, found = theta[half:], code[half:] @ torch.linalg.lstsq(code[:half], theta[:half]).solution
        spread = (wanted - wanted.mean(0)).square().sum(0)  # (10,)
        return (1 - (found - wanted).square().sum(0) / spread).mean().item()

    errors = []
    for step in range(steps + 1):
        if step % 500 == 0:
            with torch.no_grad():
                errors.append(loss_of("x", clear[0]).item())
        optimizer.zero_grad()
        for side in "xy":
            if len(data[side]):
                rows = torch.randint(len(data[side]), (512,))
                loss_of(side, data[side][rows]).backward()
        optimizer.step()
    with torch.no_grad():
        on = (encode[:2](embed["x"](held[0])) > 0).float().mean(0)  # (10,)
        return dict(r2=r2(*held), r2_clear=r2(*clear), error=errors[-1], errors=errors,
                    always_on=(on > 0.9).float().mean().item())


# ------------------------------------------------------------------------------------------------------------
# exchange: how many words is an image worth?


def fit_exchange(n_x, n_y, scores):
    """Fit score = b0 + b1 log(n_x + rho n_y^gamma), b1 > 0: y counts as x, of falling worth if gamma < 1.

    n_x, n_y, scores: (k,) of the grid's cells. Least squares in (b0, b1) for every rho and gamma of a fine
    grid; residual is the root mean square error. In the linear world the variance along one direction is
    1 / (n_x j_x + n_y j_y): gamma = 1 and rho = j_y / j_x exactly.
    """
    best = None
    for gamma in (1.0, 0.75, 0.5, 0.35, 0.25):
        for rho in np.concatenate([[0.0], np.geomspace(1e-5, 1e4, 181)]):
            design = np.stack([np.ones(len(n_x)), np.log(n_x + rho * n_y**gamma)], 1)
            (b0, b1), *_ = np.linalg.lstsq(design, scores, rcond=None)
            error = float(np.sqrt(np.mean((design @ (b0, b1) - scores) ** 2)))
            # ties go to gamma = 1 and the smaller rho
            if b1 > 0 and (best is None or error < best["residual"] * (1 - 1e-9)):
                best = dict(rho=float(rho), gamma=gamma, b0=float(b0), b1=float(b1), residual=error)
    if best is None:
        raise UserError("more examples never scored better on this grid: there is no exchange rate to fit")
    return best


def mean_words(cfg, slot):
    """Words in a training item of a text slot, on average; None for other modalities."""
    folder = prepare(cfg, slot, say=quiet)
    if "vocab" not in read_meta(folder):
        return None
    train, bpe = load_split(folder, "train"), load_bpe(folder)
    tokens = train["tokens"][np.arange(min(1000, len(train["tokens"])))]
    texts = [bpe.decode(row[:length].tolist()) for row, length in zip(tokens, train["lengths"])]
    return float(np.mean([len(text.split()) for text in texts]))


def read_grid(argv):
    """argv of exchange -> (config, own keys, the target's key, its values, the auxiliary's key, values)."""
    texts = dict(arg[2:].split("=", 1) for arg in argv if arg.startswith("--") and "=[" in arg)
    cfg = read_run_config([arg for arg in argv if "=[" not in arg], dict(KEYS, **COMPARE_KEYS))
    own = own_keys(cfg)
    x_key, y_keys = f"{cfg['target']}_examples", {f"{slot}_examples" for slot in auxiliaries_of(cfg)}
    if len(texts) != 2 or x_key not in texts or not texts.keys() & y_keys:
        raise UserError(f"exchange takes exactly two lists, --{x_key}=[200,...] and "
                        "--SLOT_examples=[0,1000,...] of an auxiliary")
    (y_key,) = texts.keys() - {x_key}
    try:
        x, y = (sorted({int(value) for value in texts[key].strip("[]").split(",")}) for key in (x_key, y_key))
    except ValueError:
        raise UserError(f"the lists of exchange must hold whole numbers, found {texts}") from None
    if len(x) < 3 or len(y) < 2 or x[0] < 1 or y[0] < 0:
        raise UserError(f"no grid to fit: {x_key} needs three values above 0, {y_key} two of at least 0 (a "
                        f"number for 'all'), found {x} and {y}")
    return cfg, own, x_key, x, y_key, y


def exchange(argv):
    """Train a grid of two example counts and fit it: what is an example of one worth in the other?"""
    cfg, own, x_key, counts_x, y_key, counts_y = read_grid(argv)
    cells = list(itertools.product(counts_x, counts_y))
    runs = [dict(cfg, **{x_key: x, y_key: y, "seed": seed}) for x, y in cells for seed in own["seeds"]]
    open_slots(resolve(runs[-1]), say=quiet)  # too many examples show now, not hours later
    results = run_all(runs, start_progress(cfg, own, len(runs)))
    split = "test" if cfg["score_test"] else "val"
    scores = np.array([score_of(r, split) for r in results]).reshape(len(cells), -1)
    path = os.path.join(cfg["out_dir"], "exchange.json")
    out = dict(kind="exchange", cells=cells, scores=scores.tolist(),
               command=shlex.join(["python", "probe.py", "exchange", *argv]))
    write_json(path, out)  # what was measured stays, fitted or not

    n_x, n_y = np.array(cells, float).T
    fit, at = fit_exchange(n_x, n_y, scores.mean(1)), float(np.median(n_y[n_y > 0]))
    rate = fit["rho"] * fit["gamma"] * at ** (fit["gamma"] - 1)  # of one more y, at this many of them
    words = mean_words(cfg, y_key.removesuffix("_examples"))
    explained = 1 - fit["residual"] ** 2 / scores.mean(1).var()
    out.update(fit=fit, at=at, rate=rate, words_per_item=words, explained=explained)
    print(f"score = {fit['b0']:.3f} + {fit['b1']:.3f} log({x_key} + {fit['rho']:.3g} {y_key}^{fit['gamma']})"
          f", residual {fit['residual']:.4f}, {explained:.0%} of the variance explained")
    if explained < 0.9:
        print("warning: the grid does not follow this law, so the rate below means little")
    print(f"at {at:,.0f} {y_key}, one of them is worth {rate:.3g} {x_key}")
    if words and rate:
        print(f"one {cfg['target']} example is worth {words / rate:,.0f} words")
    write_json(path, out)
    draw_exchange(os.path.join(cfg["out_dir"], "exchange.png"), cells, scores.mean(1), fit, x_key, y_key)
    return out


# ------------------------------------------------------------------------------------------------------------
# embed: features and predictions for files the run has never seen


def read_new(folder, path, cfg, name, slot):
    """New items for a slot of a run -> (tokens as stored, real (n, T) bool or None, a name for each item)."""
    if modality_of(name) == "text" and slot["kind"] == "discrete":
        check_shards(folder, cfg)  # the BPE lies with the shards
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if not names:
            raise UserError(f"{path} is empty: expected one text a line")
        arrays = encode_text(cfg, names, load_bpe(prepare(cfg, name)))
        first = np.unique(arrays["item"], return_index=True)[1]  # a long text has several windows
        if cut := int((np.bincount(arrays["item"]) > 1).sum()):
            tell(f"{cut} of {len(names)} texts are cut at {slot['length']} tokens")
        arrays = dict(tokens=arrays["tokens"][first].astype(np.int64), lengths=arrays["lengths"][first])
    elif "patch" in slot or "mels" in slot:
        items, names = read_files(path, cfg, name, slot)
        arrays = (encode_pictures if "patch" in slot else encode_recordings)(cfg, items, None)
    else:  # numbers, such as features of a frozen encoder
        try:
            arrays = encode_features(cfg, np.load(path, allow_pickle=False), None)
        except (OSError, ValueError, TypeError) as problem:
            raise UserError(f"{path} is no .npy array of numbers ({problem}), which {name}={cfg[name]} of "
                            f"{folder} needs") from None
        found = arrays["tokens"]
        if found.shape[1:] != (slot["length"], slot["dim"]) or not np.isfinite(found).all() or not len(found):
            raise UserError(f"{path} must hold finite numbers (n, {slot['length']}, {slot['dim']}), found "
                            f"{found.shape}")
        names = range(len(found))
    tokens, real = torch.from_numpy(arrays["tokens"]), None
    if "lengths" in arrays and slot.get("embed") != "conv":  # the stem reads padding as silence
        real = torch.arange(slot["length"]) < torch.from_numpy(arrays["lengths"])[:, None]
    return tokens, real, names


def read_files(path, cfg, name, slot):
    """A folder of pictures or recordings -> (what could be read, the files it is from)."""
    if not os.path.isdir(path):
        raise UserError(f"{path} is no folder: embed takes a folder of files for the {name} slot")
    files = [os.path.join(parent, file) for parent, _, found in os.walk(path) for file in found
             if not file.startswith(".")]
    read = {}
    for file in sorted(files):
        with contextlib.suppress(UserError):
            if "patch" in slot:
                read[file] = read_picture(cfg, file, slot["dim"] // slot["patch"] ** 2)
            else:
                read[file] = read_recording(cfg, file)
    if not read:
        raise UserError(f"folder {path} holds no readable files for the {name} slot ({len(files)} others)")
    if len(read) < len(files):
        tell(f"skipped {len(files) - len(read)} of {len(files)} files: not readable")
    return list(read.values()), list(read)


def embed(folder, path):
    """Write FOLDER/embed.npy (n, C) and, if the run knows classes, embed.csv with file, class, probability.

    path: a text file (one item a line), a folder of pictures or recordings, or else an .npy array.
    """
    model, checkpoint = load_model(os.path.join(folder, "best.pt"))
    cfg, name = checkpoint["config"], checkpoint["config"]["target"]
    slot, classes = checkpoint["slots"][name], checkpoint["classes"][:checkpoint["target_classes"]]
    tokens, real, names = read_new(folder, path, cfg, name, slot)
    chunks = zip(tokens.split(500), itertools.repeat(None) if real is None else real.split(500))
    scores = None
    with torch.no_grad():  # not inference_mode: a linear probe may be fitted in here
        features = torch.cat([model.features(name, *chunk) for chunk in chunks])
        if "label" in slot["loss"]:
            scores = model.label_scores(name, features)[:, :len(classes)]
        elif len(classes) > 1:  # no label head of its own: a linear probe on the run's training examples
            run_ = open_run(folder)
            weight, bias = evaluate(run_.model, run_.target, run_.target.val, CPU)["probe"]
            scores = features @ weight.T + bias

    written, array, table = [os.path.join(folder, "embed.npy")], io.BytesIO(), io.StringIO(newline="")
    np.save(array, features.numpy())
    write_file(written[0], array.getvalue())
    if scores is not None:
        written.append(os.path.join(folder, "embed.csv"))
        writer = csv.writer(table)
        writer.writerow(["file", "class", "probability"])
        for item, chances in zip(names, scores.softmax(1)):
            writer.writerow([item, classes[int(chances.argmax())], f"{chances.max().item():.4f}"])
        write_file(written[1], table.getvalue().encode(errors="surrogateescape"))
    print(json.dumps(dict(items=len(names), features=list(features.shape), written=written)))


# ------------------------------------------------------------------------------------------------------------
# figures


@contextlib.contextmanager
def figure(path, width, height, **grid):
    """(fig, axes) to draw on, without a screen, on white; written whole at the end."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    fig, axes = plt.subplots(figsize=(width, height), layout="constrained", facecolor="white", **grid)
    yield fig, axes
    data = io.BytesIO()
    fig.savefig(data, format="png", dpi=130, bbox_inches="tight")  # texts below an axis count too
    plt.close(fig)
    write_file(path, data.getvalue())


def draw_compare(path, out):
    """Every seed a point, every arm a column, means with their 95% intervals."""
    with figure(path, 1.5 + 1.3 * len(out["arms"]), 4.2) as (_, ax):
        for i, e in enumerate(out["arms"].values()):
            places = i + np.linspace(-0.12, 0.12, out["seeds"])
            ax.plot(places, e["scores"], "o", ms=4, alpha=0.6, color=f"C{i}")
            ax.errorbar(i + 0.27, e["mean"], e["half"] or 0, fmt="s", ms=5, capsize=4, color="black")
        if out["chance"]:
            ax.axhline(out["chance"], ls=":", color="grey", lw=1)
        ax.set_xticks(range(len(out["arms"])), out["arms"])
        ax.set_ylabel(f"{'minus ' if out['measure'] == 'loss' else ''}{out['split']} {out['measure']}")
        title = f"{short_source(out['target'])}, {out['examples']} examples\nwith {show_auxiliaries(out)}"
        ax.set_title(title, fontsize=9)


def draw_side_by_side(path, found):
    """Few-shot curves, margins and robustness of several runs in one figure."""
    with figure(path, 12, 3.6, ncols=3) as (_, (left, middle, right)):
        for one in found:
            name, shots = one.report["name"], one.report["few_shot"]
            means, spreads = zip(*shots.values()) if shots else ((), ())
            left.errorbar(list(shots), means, spreads, marker="o", capsize=3, label=name)
            middle.hist(one.margin, bins=60, density=True, histtype="step", label=name)
            if one.report["robustness"]:
                right.plot(np.mean(list(one.report["robustness"].values()), 0), marker="o", label=name)
        left.set(xscale="log", xlabel="examples a class", ylabel="few-shot probe accuracy")
        left.set_xticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
        middle.set(xlabel="margin of held-out items (0: on the boundary)", ylabel="density")
        right.set(xlabel="severity of the corruption (mean over kinds)", ylabel="accuracy", xticks=range(4))
        left.legend()


def draw_predictions(path, found, rows=4, columns=6):
    """A sheet of held-out items, drawn by lot: each run has a tick, or a cross and what it says instead."""
    first = found[0].run
    meta, held, items = first.target.meta, first.held, (first.target.folder, first.split)
    found = [one for one in found if (one.run.target.folder, one.run.split) == items]
    classes, labels, words = meta["classes"], held["labels"], class_words(meta["classes"])
    short = [textwrap.fill(" ".join(own) or name, 24) for own, name in zip(words, classes)]
    chosen = np.random.default_rng(0).permutation(len(labels))[:rows * columns]
    height = rows * (1.35 + 0.32 * len(found))
    with figure(path, 1.9 * columns, height, nrows=rows, ncols=columns) as (_, axes):
        for ax, i in zip(axes.flat, chosen):
            tokens = held["tokens"][np.array([i])]
            if "patch" in meta:
                ax.imshow(unpatchify(tokens, meta["patch"])[0].squeeze(), cmap="gray", vmin=0, vmax=255)
            else:
                ax.imshow(tokens[0].reshape(-1, meta["mels"]).T, origin="lower", aspect="auto")
            ax.set_title(short[labels[i]], fontsize=7)
            ax.set(xticks=[], yticks=[])
            for line, one in enumerate(found):
                right = one.answers[i] == labels[i]
                said = f"✓ {one.run.name}" if right else f"✗ {one.run.name}: {short[one.answers[i]]}"
                ax.text(0.5, -0.06 - 0.27 * line, textwrap.fill(said, 32), transform=ax.transAxes, fontsize=6,
                        ha="center", va="top", color="#1a6e2e" if right else "#a02020",
                        weight="normal" if right else "bold")


def draw_curves(path, found):
    """Loss of every slot and validation accuracy over steps, from each run's log.jsonl."""
    styles = ("-", "--", ":", "-.")
    with figure(path, 9, 3.4, ncols=2) as (_, (left, right)):
        for i, one in enumerate(found):
            log = read_text(os.path.join(one.run.folder, "log.jsonl"))
            lines = [json.loads(line) for line in log.splitlines()]
            for style, slot in zip(styles, one.run.slots):
                there = [line for line in lines if slot in line.get("loss", {})]
                losses = [(line["step"], line["loss"][slot]) for line in there]
                if losses:  # a slot without updates has none
                    left.plot(*zip(*losses), style, color=f"C{i}", label=f"{one.run.name}, {slot}")
            scores = [(line["step"], line["val_score"]) for line in lines if "val_score" in line]
            right.plot(*zip(*scores), styles[i % 4], marker="o", ms=3, color=f"C{i}", label=one.run.name)
        left.set(xlabel="step", ylabel="training loss")
        right.set(xlabel="step", ylabel="validation accuracy", ylim=(0, None))
        left.legend(fontsize=7)
        right.legend(fontsize=7)


def draw_sharing(path, reports):
    """Left: how gradients of slots agree, hollow before and full after training; right: the label head."""
    bars = [{f"{pair}\nblock {block + 1}": ends for pair, pull in report["gradients"].items()
             for block, ends in enumerate(zip(pull["fresh"], pull["best"]))} for report in reports]
    names = list(dict.fromkeys(name for own in bars for name in own))
    wide, groups = max(2, len(names)), ("first", "last", "neither")
    with figure(path, 6.5 + 0.9 * wide, 3.6, ncols=2, width_ratios=[wide, 4]) as (_, (left, right)):
        for i, (report, own) in enumerate(zip(reports, bars)):
            mark, color = "os^Dv*"[i % 6], f"C{i % 6}"  # not by colour alone
            for name, ends in own.items():
                x = names.index(name) + 0.6 * ((i + 1) / (len(reports) + 1) - 0.5)
                left.plot([x, x], ends, mark + "-", color=color, lw=1)
                left.plot(x, ends[0], mark, color=color, mfc="white")
            if report["head"]:
                heights = np.array([report["head"][key] for key in groups], float)  # None becomes nan
                right.plot(heights, mark, color=color, label=report["name"])
                right.legend(fontsize=7)
        left.set_xticks(range(len(names)), names, fontsize=7)
        left.set(ylabel="cosine of gradients", xlim=(-0.5, wide - 0.5), ylim=(-1.05, 1.05))
        left.set_title("hollow: fresh weights, full: best", fontsize=9)
        right.set_xticks(range(3), ("same first word", "same last word", "neither"), fontsize=8)
        right.set(xlabel="two classes, by their names", xlim=(-0.5, 2.5),
                  ylabel="mean cosine of label head rows")
        for ax in (left, right):
            ax.axhline(0, ls=":", color="grey", lw=1)


def draw_theory(path, out):
    """Variance over Y samples, exchange rate over attenuation, error of the learned world over steps."""
    exact = out["exact"]
    with figure(path, 12, 3.6, ncols=3) as (_, (left, middle, right)):
        for n, values in exact["variance"].items():
            left.plot(exact["budget"], values, label=f"{n} X samples")
        left.set(xlabel="unpaired Y samples", ylabel="bound on the variance (trace)", yscale="log")
        for noise, values in exact["curves"].items():
            middle.loglog(exact["strengths"], values, label=f"noise of Y {noise}")
        middle.axhline(1, color="grey", lw=0.8, ls=":")
        middle.set(xlabel="strength with which X shows the direction", ylabel="X samples a Y sample is worth")
        for arm, entry in out["learned"].items():
            errors = np.mean([run_["errors"] for run_ in entry["runs"]], 0)
            right.plot(np.linspace(0, 1, len(errors)), errors, label=arm)
        right.set(xlabel="share of training", ylabel="error on x without attenuation")
        for ax in (left, middle, right):
            if ax.lines:
                ax.legend(fontsize=8)


def draw_exchange(path, cells, means, fit, x_key, y_key):
    """The fitted surface as curves of equal score, the measured means as numbers."""
    n_x, n_y = np.array(cells, float).T
    grid_x, grid_y = np.geomspace(n_x.min(), n_x.max(), 60), np.linspace(0, n_y.max(), 60)
    surface = fit["b0"] + fit["b1"] * np.log(grid_x[None] + fit["rho"] * grid_y[:, None] ** fit["gamma"])
    with figure(path, 6, 4.2) as (_, ax):
        ax.clabel(ax.contour(grid_x, grid_y, surface, levels=8, cmap="viridis"), fontsize=7)
        for (x, y), mean in zip(cells, means):
            ax.annotate(f"{mean:.3f}", (x, y), fontsize=7, ha="center")
        ax.set(xscale="log", xlabel=x_key, ylabel=y_key, xlim=(n_x.min() / 1.3, n_x.max() * 1.3),
               ylim=(-0.06 * n_y.max(), 1.06 * n_y.max()))
        ax.set_title("curves of equal score of the fit; measured means as numbers", fontsize=9)
        ax.set_xticks(np.unique(n_x), [f"{n:,.0f}" for n in np.unique(n_x)])
        ax.minorticks_off()


# ------------------------------------------------------------------------------------------------------------
# commands


def main():
    argv = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that compare stops its workers
    if not argv or "--help" in argv or "-h" in argv:
        print_help(__doc__, COMPARE_KEYS, "Keys of compare and exchange, besides every key of train.py:")
    elif argv[0] == "compare":
        compare(argv[1:])
    elif argv[0] == "embed":
        if len(argv) != 3:
            raise UserError("usage: python probe.py embed OUT_DIR PATH")
        embed(*argv[1:])
    elif argv[0] == "exchange":
        print(json.dumps(exchange(argv[1:])))
    elif argv[0] == "theory":
        print(json.dumps(theory(argv[1:])))
    elif near := difflib.get_close_matches(argv[0], ("compare", "embed", "exchange", "theory"), n=1):
        raise UserError(f"'{argv[0]}' is no command, did you mean '{near[0]}'?")
    elif argv[0].endswith(".py"):
        raise UserError(f"{argv[0]} is a config: python train.py {argv[0]}, or "
                        f"python probe.py compare {argv[0]}")
    elif keys := [arg for arg in argv if arg.startswith("--")]:
        raise UserError(f"{keys[0]}: the analysis of runs takes no keys, only folders of runs; compare and "
                        "exchange take keys")
    else:
        analyse_all(argv)


if __name__ == "__main__":
    exit_on_user_error(main)
