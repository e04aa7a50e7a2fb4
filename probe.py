"""probe.py: what did a run learn, and did unpaired data help? Everything here looks at frozen features or calls train.run.

    python probe.py out/shapes_text [out/shapes_alone ...]           # analyses of finished runs, side by side
    python probe.py compare sample_configs/shapes_text.py --seeds=3  # alone against uml against control, with the verdict
    python probe.py embed out/shapes_text /my/pictures               # features and predictions for new files
    python probe.py theory                                           # the linear world: bounds, blind directions, rates
    python probe.py exchange CONFIG '--image_examples=[200,1000,5000]' '--text_examples=[0,9000]'  # words an image is worth
    python probe.py scale                                            # what a step costs as things grow
    python probe.py report                                           # rewrite the README's tables from assets/results/

compare and exchange take every key of train.py and those that --help lists; exchange takes two of them as lists.

Analyses read the target's test split (val, if the run was told never to open test). Probes are fitted on the run's own
training examples, their penalty is chosen on validation, and items of unseen classes are left out. Only few-shot probes
(penalty 1, draws from the whole training split) and alignment take in all classes. The last line is JSON, except of
compare, which writes compare.json, and of report.

Sections: measures on features, corruptions, runs side by side, statistics, compare, theory, exchange, scale, embed, report, figures.
"""
import ast
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
import re
import shlex
import shutil
import signal
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch loads OpenMP; train.py says why

import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm import tqdm

from model import linear_probe
from prepare import (LOG_MEL_RANGE, SHAPE_CLASSES, UserError, active_slots, draw_scenes, encode_recordings, exit_on_user_error,
                     load_bpe, load_split, modality_of, paint_scenes, patchify, plain_name, prepare, print_help, read_config,
                     read_json, read_meta, read_pictures, read_recordings, read_text, sound_scenes, tell,
                     tell_scenes, unpatchify, write_file, write_json)
from train import (FREE_KEYS, KEYS, SIGNALS, benchmark, choose_examples, evaluate, extract, fit_probe, load_checkpoint,
                   load_model, open_slots, read_run_config, resolve, run, save_checkpoint, shard_names)

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------------------------------
# measures on features (n, D) and labels (n,): torch tensors on the CPU


def knn_accuracy(features, labels, new, truth, k=20):
    """Share of `new` whose k nearest training features (cosine), weighted by exp(similarity / 0.07), vote for the truth.

    The evaluation of Wu et al. 2018 (arXiv 1805.01978, section 3.4). k is cut to the number of training items.
    """
    a, b = torch.nn.functional.normalize(features, dim=1), torch.nn.functional.normalize(new, dim=1)
    similarity, nearest = (b @ a.T).topk(min(k, len(a)), dim=1)
    votes = torch.zeros(len(b), int(labels.max()) + 1).scatter_add_(1, labels[nearest], (similarity / 0.07).exp())
    return (votes.argmax(1) == truth).float().mean().item()


def few_shot(features, labels, new, truth, shots=(1, 2, 4, 8, 16), draws=5):
    """{shots a class: (mean, standard deviation) of linear-probe accuracy over draws of the training items}."""
    classes, out = int(labels.max()) + 1, {}
    for k in shots:
        if k > torch.bincount(labels, minlength=classes).min():
            break  # some class has fewer examples
        right = []
        for draw in range(draws):
            rows = choose_examples(labels.numpy(), len(labels), k * classes, draw, "few-shot")
            weight, bias = linear_probe(features[rows], labels[rows], classes)
            right.append(((new @ weight.T + bias).argmax(1) == truth).float().mean().item())
        out[k] = (float(np.mean(right)), float(np.std(right, ddof=1)))
    return out


def margins(features, labels, weight, bias):
    """Distances of items to the boundary with the best-scoring other class: (score of the truth - its) / |difference of weights|.

    Positive where the item is classified right; Gupta et al. 2025 (section 5) report that unpaired data widens them.
    Weights and margins are for standardised features, so that runs of different feature scale compare.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    weight, bias, features = weight * std, bias + weight @ mean, (features - mean) / std
    scores = features @ weight.T + bias
    true = scores.gather(1, labels[:, None])[:, 0]
    rival = scores.scatter(1, labels[:, None], -torch.inf).argmax(1)
    return (true - scores.gather(1, rival[:, None])[:, 0]) / (weight[labels] - weight[rival]).norm(dim=1).clamp_min(1e-9)


def class_spread(features, labels):
    """Mean squared distance between class centroids over mean squared distance of items to their own centroid."""
    known = labels.unique()
    centroids = torch.stack([features[labels == c].mean(0) for c in known])
    own = torch.stack([(features[labels == c] - m).square().sum(1).mean() for c, m in zip(known, centroids)])
    between = torch.pdist(centroids).square().mean()
    return (between / own.mean().clamp_min(1e-12)).item()


def cka(a, b):
    """Linear centred kernel alignment of two (k, D) matrices with matching rows; 1 for rotations and scalings of each other.

    Kornblith et al. 2019 (arXiv 1905.00414, section 3).
    """
    a, b = a - a.mean(0), b - b.mean(0)
    return ((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()).clamp_min(1e-12)).item()


def mutual_knn(a, b, k):
    """Mean share of a row's k nearest rows (cosine) that are the same in a and in b: Huh et al. 2024 (arXiv 2405.07987)."""
    def nearest(m):
        m = torch.nn.functional.normalize(m - m.mean(0), dim=1)
        return (m @ m.T).fill_diagonal_(-2).topk(k, dim=1).indices
    return np.mean([len(set(p.tolist()) & set(q.tolist())) / k for p, q in zip(nearest(a), nearest(b))])


def permutation_p(measure, a, b, draws=500, seed=0):
    """(measure(a, b), p): how often shuffling the rows of b gives at least as much; the floor of p is 1 / (draws + 1)."""
    rng, found = np.random.default_rng(seed), measure(a, b)
    null = [measure(a, b[rng.permutation(len(b))]) for _ in range(draws)]
    return found, (1 + sum(value >= found for value in null)) / (draws + 1)


def unit_agreement(a, b):
    """Per unit, the correlation over classes of its mean activation in two slots: (k, C) and (k, C) centroids -> (C,)."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# corruptions of pictures (n, S, S, 3) uint8, three severities each, that need no download


def corrupt_pictures(pictures, kind, severity):
    """kind: noise, blur, contrast or pixelate; severity 1..3. After Hendrycks & Dietterich 2019 (arXiv 1903.12261)."""
    rng, i = np.random.default_rng(severity), severity - 1
    if kind == "noise":
        out = pictures + rng.normal(0, (10, 20, 40)[i], pictures.shape)
    elif kind == "blur":
        soften = ImageFilter.GaussianBlur((0.7, 1.2, 2.0)[i])
        out = np.stack([np.asarray(Image.fromarray(picture).filter(soften)) for picture in pictures])
    elif kind == "contrast":
        mean = pictures.mean((1, 2, 3), keepdims=True)
        out = mean + (pictures - mean) * (0.6, 0.4, 0.2)[i]
    else:  # pixelate
        size = pictures.shape[1]
        small = (max(1, int(size * (0.6, 0.45, 0.3)[i])),) * 2
        coarse = [Image.fromarray(picture).resize(small, Image.Resampling.BOX) for picture in pictures]
        out = np.stack([np.asarray(picture.resize((size, size), Image.Resampling.NEAREST)) for picture in coarse])
    return np.clip(out, 0, 255).astype(np.uint8)


def corrupt_frames(tokens, mels, kind, severity):
    """The same for recordings (n, T, group*mels) uint8 log-mel: noise (at 20, 10, 0 dB SNR), gain (-6, -12, -18 dB), or
    bandlimit (only the lower 80, 60, 40% of the mels remain)."""
    i, (low, high) = severity - 1, LOG_MEL_RANGE
    log_mel = tokens.reshape(*tokens.shape[:2], -1, mels) / 255 * (high - low) + low
    if kind == "noise":
        heard = tokens.reshape(log_mel.shape).any(3, keepdims=True)  # padding is 0, recorded silence is not
        power = np.exp(log_mel).mean((1, 2, 3), where=heard, keepdims=True) / 10 ** ((2, 1, 0)[i])
        log_mel = np.log(np.exp(log_mel) + power * np.random.default_rng(severity).exponential(1, log_mel.shape))
    elif kind == "gain":
        log_mel = log_mel - (6, 12, 18)[i] * math.log(10) / 10
    else:  # bandlimit
        log_mel = np.where(np.arange(mels) < mels * (0.8, 0.6, 0.4)[i], log_mel, low)
    return ((log_mel - low) / (high - low) * 255).round().clip(0, 255).astype(np.uint8).reshape(tokens.shape)


PICTURE_CORRUPTIONS, SOUND_CORRUPTIONS = ("noise", "blur", "contrast", "pixelate"), ("noise", "gain", "bandlimit")

# ---------------------------------------------------------------------------------------------------------------------
# runs side by side


def check_shards(folder, cfg):
    """Refuse a run whose data has changed: a new draw of the splits would let training items into its test."""
    for slot, name in shard_names(cfg).items():
        if name != cfg["shards"][slot]:
            raise UserError(f"{folder} was trained on {cfg['shards'][slot]}, but {slot}={cfg[slot]} has changed since: train it again")


def open_run(folder):
    """A finished run: its config, slots, best model, and the split its analyses may read. UserError for one under way."""
    if not os.path.exists(os.path.join(folder, "result.json")):
        if os.path.exists(os.path.join(folder, "last.pt")):
            raise UserError(f"the run in {folder} is not finished: wait for it, or go on with --resume")
        raise UserError(f"{folder} holds no finished run (no result.json): train one first, for example "
                        "`python train.py sample_configs/shapes_text.py`")
    model, checkpoint = load_model(os.path.join(folder, "best.pt"))
    cfg = checkpoint["config"]
    check_shards(folder, cfg)
    slots, classes = open_slots(cfg, say=lambda line: None)
    split = "test" if cfg["score_test"] else "val"
    target = slots[cfg["target"]]
    held = load_split(target.folder, split)
    # items of classes that had labelled examples
    seen, seen_val = (np.flatnonzero(~np.isin(arrays.get("labels", []), target.banned)) for arrays in (held, target.val))
    return SimpleNamespace(folder=folder, name=os.path.basename(os.path.normpath(folder)), cfg=cfg, slots=slots, classes=classes,
                           model=model, target=target, split=split, held=held, seen=seen, seen_val=seen_val)


def features_of(run_, slot, arrays, rows=None, layer=-1):
    """(features, labels) of some rows of a split."""
    rows = np.arange(len(arrays["tokens"])) if rows is None else rows
    return extract(run_.model, slot, arrays, rows, CPU, layer), torch.from_numpy(arrays["labels"][rows]).long()


def layer_table(run_):
    """Linear probe and kNN accuracy after the embed and after each block."""
    target, classes, table = run_.target, len(run_.target.meta["classes"]), []
    for layer in [*range(len(run_.model.trunk)), -1]:
        known = features_of(run_, target, target.train, target.rows, layer)
        val = features_of(run_, target, target.val, run_.seen_val, layer)
        new, truth = features_of(run_, target, run_.held, run_.seen, layer)
        (weight, bias), _ = fit_probe(known, val, classes)
        table.append(dict(linear=((new @ weight.T + bias).argmax(1) == truth).float().mean().item(),
                          knn=knn_accuracy(*known, new, truth)))
    return table


def robustness(run_, probe):
    """{corruption: accuracy at severities 0 (clean) .. 3} of a picture or sound target, answered by its label head or else the probe."""
    meta = run_.target.meta
    tokens = run_.held["tokens"][np.arange(len(run_.held["tokens"]))]
    if "patch" in meta:
        pictures = unpatchify(tokens, meta["patch"])
        kinds = PICTURE_CORRUPTIONS
        corrupt = lambda kind, severity: patchify(corrupt_pictures(pictures, kind, severity), meta["patch"])
    elif "mels" in meta:
        kinds, corrupt = SOUND_CORRUPTIONS, lambda kind, severity: corrupt_frames(tokens, meta["mels"], kind, severity)
    else:
        return {}
    answer = lambda tokens: evaluate(run_.model, run_.target, dict(run_.held, tokens=tokens), CPU, probe)["accuracy"]
    clean = answer(tokens)
    return {kind: [clean] + [answer(corrupt(kind, severity)) for severity in (1, 2, 3)] for kind in kinds}


def class_centroids(run_, slot, names):
    """(k, C) mean features of the held-out items of each named class in one slot; classes by plain name."""
    arrays = run_.held if slot is run_.target else load_split(slot.folder, run_.split)
    of = {plain_name(c): i for i, c in enumerate(slot.meta["classes"])}
    features, labels = features_of(run_, slot, arrays, np.flatnonzero(np.isin(arrays["labels"], [of[n] for n in names])))
    return torch.stack([features[labels == of[n]].mean(0) for n in names])


def alignment(run_, other):
    """Do the classes lie alike in the target and in another slot, though no item was ever paired? None if under 4 are shared."""
    def held_classes(slot):
        return {plain_name(c) for c, count in zip(slot.meta["classes"], slot.meta["splits"][run_.split]["class_counts"]) if count}
    names = sorted(held_classes(run_.target) & held_classes(other))
    if len(names) < 4:
        return None
    a, b = class_centroids(run_, run_.target, names), class_centroids(run_, other, names)
    k, units = max(1, len(names) // 8), unit_agreement(a, b)
    agree, unit_p = permutation_p(lambda p, q: unit_agreement(p, q).mean().item(), a, b)
    top, shown = units.argsort(descending=True)[:8], {plain_name(c): c for c in run_.target.meta["classes"]}
    (cka_value, cka_p), (knn_value, knn_p) = permutation_p(cka, a, b), permutation_p(lambda p, q: mutual_knn(p, q, k), a, b)
    most = lambda centroids, unit: shown[names[int(centroids[:, unit].argmax())]]
    return dict(classes=len(names), cka=cka_value, cka_p=cka_p, mutual_knn=knn_value, mutual_knn_p=knn_p, k=k,
                unit_agreement=agree, unit_p=unit_p,
                units=[dict(unit=int(u), correlation=units[u].item(), target_class=most(a, u), other_class=most(b, u)) for u in top])


def analyse(folder):
    """All analyses of one run, as a dict; figures land in its folder."""
    run_ = open_run(folder)
    target, classes = run_.target, run_.target.meta["classes"]
    tell(f"{folder}: probing every layer, few examples, corruptions, alignment ...")
    if len(classes) < 2:
        raise UserError(f"{folder}: the target {target.name}={run_.cfg[target.name]} has no classes to probe for")
    known, val = features_of(run_, target, target.train, target.rows), features_of(run_, target, target.val, run_.seen_val)
    new, truth = features_of(run_, target, run_.held, run_.seen)
    (weight, bias), l2 = fit_probe(known, val, len(classes))
    margin, scores = margins(new, truth, weight, bias), new @ weight.T + bias
    every, all_held = features_of(run_, target, target.train), features_of(run_, target, run_.held)
    labelled = {name: slot for name, slot in run_.slots.items() if slot is not target and "labels" in slot.train}
    out = dict(name=run_.name, split=run_.split, layers=layer_table(run_), few_shot=few_shot(*every, *all_held), probe_l2=l2,
               margin=[margin.quantile(q).item() for q in (0.1, 0.5, 0.9)], class_spread=class_spread(new, truth),
               robustness=robustness(run_, (weight, bias)), alignment={name: alignment(run_, slot) for name, slot in labelled.items()})
    answers = evaluate(run_.model, target, run_.held, CPU, (weight, bias))  # of the label head where there is one
    out.update(accuracy=answers["accuracy"], unseen_accuracy=answers["unseen_accuracy"])
    draw_confusion(os.path.join(folder, "confusion.png"), truth, scores.argmax(1), classes)
    draw_pca(os.path.join(folder, "pca.png"), new, truth, classes)
    return out, margin.numpy()


def show_side_by_side(reports):
    """Print the analyses of one or more runs as tables with one column a run."""
    def row(label, values):
        print(f"{label:28}" + "".join(f"{value:>18}" for value in values))
    number = lambda v: "-" if v is None else f"{v:.4f}"
    row("run", [r["name"][-17:] for r in reports])
    row("split", [r["split"] for r in reports])
    row("accuracy", [number(r["accuracy"]) for r in reports])
    row("on unseen classes", [number(r["unseen_accuracy"]) for r in reports])
    for layer in range(max(len(r["layers"]) for r in reports)):
        for key in ("linear", "knn"):
            row(f"layer {layer} {key}", [number(r["layers"][layer][key]) if layer < len(r["layers"]) else "-" for r in reports])
    for k in sorted({k for r in reports for k in r["few_shot"]}):
        shown = ["{:.4f} +-{:.4f}".format(*r["few_shot"][k]) if k in r["few_shot"] else "-" for r in reports]
        row(f"few-shot {k} (std of draws)", shown)
    for i, name in enumerate(("10%", "median", "90%")):
        row(f"margin {name}", [number(r["margin"][i]) for r in reports])
    row("class spread", [number(r["class_spread"]) for r in reports])
    for kind in dict.fromkeys(kind for r in reports for kind in r["robustness"]):
        for severity in (1, 2, 3):
            row(f"{kind} {severity}", [number(r["robustness"].get(kind, [None] * 4)[severity]) for r in reports])
    for r in reports:
        for name, found in r["alignment"].items():
            if found is None:
                print(f"{r['name']}: {name} shares fewer than 4 classes with the target, no alignment to measure")
                continue
            print(f"{r['name']}: class centroids of {name} against the target's, {found['classes']} classes: CKA {found['cka']:.3f} "
                  f"(p {found['cka_p']:.3f}), mutual {found['k']}-NN {found['mutual_knn']:.3f} (p {found['mutual_knn_p']:.3f}), "
                  f"units' agreement {found['unit_agreement']:.3f} (p {found['unit_p']:.3f})")
            for unit in found["units"]:
                print(f"    unit {unit['unit']:4}  correlation {unit['correlation']:.3f}  most active for '{unit['target_class']}' "
                      f"in the target, '{unit['other_class']}' in {name}")


# ---------------------------------------------------------------------------------------------------------------------
# statistics for a handful of seeds


def t_tail(t, df):
    """Two-sided p of Student's t. With t = sqrt(df) tan(u) its density is cos(u)^(df-1) up to a constant, on (-pi/2, pi/2)."""
    u = np.linspace(0, np.pi / 2, 20001)
    density = np.cos(u) ** (df - 1)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(1 - np.interp(math.atan(abs(t) / math.sqrt(df)), u, mass) / mass[-1])


def t_interval(values):
    """(mean, half width of the 95% t-interval). One value says nothing of the spread: None."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), None
    low, high = 0.0, 1000.0
    for _ in range(60):  # bisect for the t with 5% outside
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, n - 1) > 0.05 else (low, middle)
    return float(np.mean(values)), float(high * np.std(values, ddof=1) / math.sqrt(n))


def paired(a, b):
    """Seed-by-seed difference a - b: mean, 95% half width, paired t-test p, sign-flip p and the least that it can be."""
    d = np.asarray(a, float) - np.asarray(b, float)
    mean, half = t_interval(d)
    spread = np.std(d, ddof=1) if len(d) > 1 else 0.0
    p = t_tail(mean / (spread / math.sqrt(len(d))), len(d) - 1) if spread > 0 else (1.0 if mean == 0 or len(d) < 2 else 0.0)
    if len(d) <= 16:
        signs = np.array(list(itertools.product((1, -1), repeat=len(d))))
    else:  # too many to list: a sample, with the observed signs among them so that p is never 0
        signs = np.concatenate([np.ones((1, len(d))), np.random.default_rng(0).choice((1, -1), (65535, len(d)))])
    flips = np.abs(signs @ d / len(d)) >= abs(mean) - 1e-12
    return dict(mean=mean, half=half, p=p, sign_flip_p=float(flips.mean()), sign_flip_floor=(2 if len(d) <= 16 else 1) / len(signs))


# ---------------------------------------------------------------------------------------------------------------------
# compare: the same config, seeds, target examples and target updates, with and without the unpaired data

COMPARE_KEYS = dict(
    seeds=(8, "compare: runs an arm"),
    first_seed=(0, "compare: seed of the first of them, the others follow (fresh seeds for what was tuned on the first ones)"),
    arms=("alone,uml,control", "compare: also longer, init, frozen, unrelated"),
    unrelated=("", "compare: the source of the auxiliary in the arm 'unrelated'"),
    search=("0.5,1,2", "compare: each arm's candidates, chosen on validation with a seed that is not reported: factors on "
                       "learning_rate, or settings 'learning_rate=1e-3,weight_decay=0.5;learning_rate=...'"),
    jobs=(1, "compare: runs at a time, each with `threads` threads"),
)
ARMS = dict(alone="the target only", uml="the config as it stands", control="auxiliary with its structure destroyed",
            longer="alone, with all the FLOPs of uml", init="trunk warm-started on the auxiliary, then the target alone",
            frozen="that trunk frozen: embed, norms and heads train (Lu et al. 2021, arXiv 2103.05247)",
            unrelated="a real auxiliary of another domain")
SEARCH_SEED = 1000


def arm_config(cfg, arm, unrelated="", flops_ratio=1.0):
    """cfg changed into one arm of the comparison."""
    cfg, auxiliaries = dict(cfg), [slot for slot in active_slots(cfg) if slot != cfg["target"]]
    if arm in ("alone", "longer"):
        cfg.update({slot: "" for slot in auxiliaries})
    if arm == "longer":
        cfg.update(steps=round(cfg["steps"] * flops_ratio), eval_interval=round(cfg["eval_interval"] * flops_ratio))
    if arm == "control":
        cfg["control"] = True
    if arm in ("init", "frozen"):
        if not cfg["warm_start_steps"]:
            raise UserError(f"arm '{arm}' needs warm_start_steps above 0")
        cfg.update({f"{slot}_updates": 0 for slot in auxiliaries}, schedule="alternate", freeze_trunk=arm == "frozen")
    if arm == "unrelated":
        if not unrelated:
            raise UserError("arm 'unrelated' needs --unrelated=SOURCE")
        cfg.update({slot: unrelated for slot in auxiliaries})
        cfg.update({f"{slot}_loss": "next" for slot in auxiliaries}, head_from="")  # its classes, if any, are not the target's
    return cfg


def candidates(text, cfg):
    """'0.5,1,2' -> [{learning_rate: ...}, ...]; 'learning_rate=1e-3,text_updates=2;...' -> these settings."""
    if "=" not in text:
        try:
            return [dict(learning_rate=cfg["learning_rate"] * float(factor)) for factor in text.split(",")]
        except ValueError:
            raise UserError(f"search='{text}' must be numbers joined by commas, or settings joined by ';'") from None
    out = []
    for part in text.split(";"):
        pairs = [pair.strip() for pair in part.split(",")]
        read = read_config([f"--{pair}" for pair in pairs], KEYS)
        out.append({key: read[key] for key in (pair.split("=")[0] for pair in pairs)})
    return out


def digest(*values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def file_digests(paths):
    out = []
    for path in paths:
        with open(path, "rb") as f:
            out.append(hashlib.sha256(f.read()).hexdigest())
    return out


def quiet_run(cfg):
    """One run in a worker; a worker that was told to stop begins nothing more."""
    if SIGNALS:
        sys.exit(128 + SIGNALS[0])
    try:
        return run(cfg, say=lambda line: None)
    except KeyboardInterrupt:  # before run() caught signals itself
        SIGNALS.append(signal.SIGINT)
        raise


def run_all(configs, folder, jobs, bar):
    """Run every config to its result, at most `jobs` at a time; finished ones are read back, begun ones resumed.

    A run's folder is named by what decides its result: the config (without paths), this code, the shards and init_from.
    Arms that start with the same warm start share it: it runs once, and its checkpoint is copied to where they begin.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    code, tasks, warm_of = file_digests([os.path.join(here, f) for f in ("prepare.py", "model.py", "train.py")]), [], {}
    for cfg in configs:
        cfg = resolve(cfg, say=lambda line: None)
        data = [os.path.join(prepare(cfg, slot, say=lambda line: None), "meta.json") for slot in active_slots(cfg)]
        decides = code + file_digests(data + [os.path.join(cfg["init_from"], "best.pt")] * bool(cfg["init_from"]))
        identity = {key: value for key, value in cfg.items() if key not in FREE_KEYS}
        cfg.update(out_dir=os.path.join(folder, "run-" + digest(identity, decides)), resume=True)
        tasks.append(cfg)
        if cfg["warm_start_steps"]:
            # what only the main phase uses is set alike, so that arms agree on the warm start where they can
            auxiliaries = [slot for slot in active_slots(cfg) if slot != cfg["target"]]
            all_idle = not any(cfg[f"{slot}_updates"] for slot in auxiliaries)  # init, frozen: they warm up as if they had one
            same = dict(identity, steps=1, eval_interval=cfg["warm_start_steps"], score_test=False, freeze_trunk=False,
                        **{f"{slot}_updates": 1 for slot in auxiliaries if all_idle})
            warm_of[cfg["out_dir"]] = dict(cfg, **same, out_dir=os.path.join(folder, "warm-" + digest(same, decides)),
                                           stop_after=cfg["warm_start_steps"])
    starting = [cfg for cfg in tasks if cfg["out_dir"] in warm_of and not os.path.exists(os.path.join(cfg["out_dir"], "last.pt"))]
    warm_starts = {w["out_dir"]: w for w in (warm_of[cfg["out_dir"]] for cfg in starting)}  # each once
    run_pool([w for w in warm_starts.values() if not is_warm(w)], jobs, bar)
    for cfg in starting:
        os.makedirs(cfg["out_dir"], exist_ok=True)
        there = warm_of[cfg["out_dir"]]["out_dir"]
        shutil.copyfile(os.path.join(there, "log.jsonl"), os.path.join(cfg["out_dir"], "log.jsonl"))
        begun = dict(load_checkpoint(os.path.join(there, "last.pt")), config=dict(cfg, shards=shard_names(cfg)))
        save_checkpoint(os.path.join(cfg["out_dir"], "last.pt"), **begun)
    return run_pool(tasks, jobs, bar)


def is_warm(cfg):
    path = os.path.join(cfg["out_dir"], "last.pt")
    return os.path.exists(path) and load_checkpoint(path)["step"] == cfg["warm_start_steps"]


def run_pool(configs, jobs, bar):
    """The results of configs in their order, `jobs` of them at a time. Where no bar is drawn (a log file) each makes a line."""
    bar.total += len(configs)
    bar.refresh()

    def count(*_):
        bar.update()
        if bar.disable:  # then update() counts nothing
            bar.n += 1
            tell(f"{bar.n} of the {bar.total} runs planned so far are finished")

    if jobs == 1 or len(configs) < 2:
        results = []
        for cfg in configs:
            results.append(quiet_run(cfg))
            count()
        return results
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(quiet_run, cfg) for cfg in configs]
        for future in futures:
            future.add_done_callback(count)
        try:
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise UserError(f"a run was killed, perhaps for lack of memory: lower jobs={jobs}; the same command goes on") from None
        except BaseException:  # a refusal or Ctrl-C: those at work finish their step and save, the others need not begin
            pool.shutdown(cancel_futures=True)
            raise


def own_keys(cfg):
    """Take the keys of compare and exchange out of cfg."""
    own = {key: cfg.pop(key) for key in COMPARE_KEYS}
    if cfg["seed"] != KEYS["seed"][0]:
        raise UserError(f"seed={cfg['seed']} is set run by run here: did you mean --seeds={cfg['seed']} or --first_seed={cfg['seed']}?")
    if own["seeds"] < 1 or own["jobs"] < 1 or own["first_seed"] < 0:
        raise UserError(f"seeds={own['seeds']} and jobs={own['jobs']} must be at least 1, first_seed={own['first_seed']} at least 0")
    cfg.update(stop_after=0, benchmark=False)  # keys of single runs
    return own


def compare(argv):
    """Search each arm on validation, freeze, run every seed with the test split scored once, and say what follows."""
    cfg = read_run_config(argv, dict(KEYS, **COMPARE_KEYS))
    if not active_slots(cfg)[1:]:
        raise UserError("compare needs a config with a target and an auxiliary: python probe.py compare CONFIG --key=value")
    own = own_keys(cfg)
    arms, seeds = own["arms"].split(","), range(own["first_seed"], own["first_seed"] + own["seeds"])
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UserError(f"unknown arm '{unknown[0]}' (there are: {', '.join(ARMS)})")
    arms = [arm for arm in ARMS if arm in {*arms, "alone", "uml"}]
    settings = candidates(own["search"], cfg)
    # Under "each" every speaker is tested in turn, so no seed is free of test data: each chooses on its own validation speaker.
    per_seed = cfg["audio_test_group"] == "each" and modality_of(cfg["target"]) == "audio"
    if SEARCH_SEED in seeds and len(settings) > 1 and not per_seed:
        raise UserError(f"seed {SEARCH_SEED} is the one that chooses settings: pick another first_seed than {own['first_seed']}")
    for arm in arms:
        resolve(arm_config(cfg, arm, own["unrelated"]), say=lambda line: None)  # what is wrong shows now, not hours later
    results, chosen, searched = run_arms(cfg, own, arms, seeds, settings, per_seed)
    # Seeds that are tested on the same speaker are averaged first: the statistics are over speakers. Folds share most of
    # their training speakers, so they are not independent, and p is if anything too small.
    folds = [tested_on(dict(cfg, seed=seed)) if per_seed else seed for seed in seeds]
    out = dict(summary(cfg, arms, results, chosen, searched, folds), first_seed=own["first_seed"], candidates=settings,
               command=shlex.join(["python", "probe.py", "compare", *argv]),
               hardware=f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
               config={key: value for key, value in cfg.items() if key not in KEYS or value != KEYS[key][0]})
    out["verdict"] = verdict(out)
    write_json(os.path.join(cfg["out_dir"], "compare.json"), out)
    draw_compare(os.path.join(cfg["out_dir"], "compare.png"), out)
    show_compare(out)
    print(f"wrote compare.json and compare.png in {cfg['out_dir']}")
    return out


def run_arms(cfg, own, arms, seeds, settings, per_seed):
    """Every arm: its candidates on validation, then its seeds with the best -> ({arm: results}, {arm: settings}, {arm: search scores}).

    settings: the candidates. per_seed: every seed chooses for itself, on its own validation split.
    """
    folder = os.path.join(cfg["out_dir"], "compare")
    os.makedirs(folder, exist_ok=True)
    bar = tqdm(total=0, desc="runs", disable=None)
    results, chosen, searched = {}, {}, {}

    def configs(arm, pairs, **change):
        ratio = results["uml"][0]["flops"] / results["alone"][0]["flops"] if arm == "longer" else 1.0
        return [arm_config(dict(cfg, **setting, seed=seed, **change), arm, own["unrelated"], ratio) for seed, setting in pairs]

    for wave in (["alone", "uml"], [arm for arm in arms if arm not in ("alone", "uml")]):  # `longer` needs the others' FLOPs
        if len(settings) > 1:
            pairs = [(seed, setting) for seed in (seeds if per_seed else [SEARCH_SEED]) for setting in settings]
            found = iter(run_all([c for arm in wave for c in configs(arm, pairs, score_test=False)], folder, own["jobs"], bar))
            for arm in wave:
                searched[arm] = np.array([score_of(next(found), "val") for _ in pairs]).reshape(-1, len(settings))
                chosen[arm] = [settings[i] for i in searched[arm].argmax(1)] * (1 if per_seed else len(seeds))
        else:
            for arm in wave:
                searched[arm], chosen[arm] = np.zeros((0, 1)), settings * len(seeds)
        found = iter(run_all([c for arm in wave for c in configs(arm, zip(seeds, chosen[arm]))], folder, own["jobs"], bar))
        results.update({arm: [next(found) for _ in seeds] for arm in wave})
    bar.close()
    return results, chosen, searched


def summary(cfg, arms, results, chosen, searched, folds):
    """The numbers of a comparison, as compare.json holds them. folds: what each seed is tested on; equal ones are averaged."""
    split, target, first = "test" if cfg["score_test"] else "val", cfg["target"], results["alone"][0]
    scores = {arm: [score_of(r, split) for r in results[arm]] for arm in arms}
    mean_of = lambda arm, fold: float(np.mean([score for score, f in zip(scores[arm], folds) if f == fold]))
    units = {arm: [mean_of(arm, fold) for fold in dict.fromkeys(folds)] for arm in arms}
    out = dict(kind="compare", name=os.path.basename(cfg["out_dir"]), split=split,
               measure=next(key for key in MEASURES if first.get(f"{split}_{key}") is not None),
               target=f"{target}={cfg[target]}", target_loss=cfg[f"{target}_loss"],
               auxiliaries={s: f"{cfg[s]} ({cfg[f'{s}_loss']})" for s in active_slots(cfg) if s != target},
               examples=first["examples"][target], seeds=len(folds), folds=len(units["alone"]), chance=first["chance"],
               steps=cfg["steps"], warm_start_steps=cfg["warm_start_steps"], arms={})
    for arm in arms:
        mean, half = t_interval(units[arm])
        entry = dict(scores=scores[arm], mean=mean, half=half, settings=chosen[arm], search_scores=searched[arm].tolist(),
                     gflops=float(np.mean([r["flops"] for r in results[arm]])) / 1e9,
                     seconds=float(np.mean([r["seconds"] for r in results[arm]])))
        for key in ("test_balanced_accuracy", "test_unseen_accuracy"):
            if results[arm][0].get(key) is not None:
                entry[key] = [r[key] for r in results[arm]]
        if arm != "alone":
            entry["minus_alone"] = paired(units[arm], units["alone"])
        if arm not in ("uml", "alone"):
            entry["uml_minus"] = paired(units["uml"], units[arm])
        out["arms"][arm] = entry
    return out


def tested_on(cfg):
    """The checksums of the target's test split: equal for two configs that are tested on the same items."""
    files = read_meta(prepare(resolve(cfg, say=lambda line: None), cfg["target"]))["splits"]["test"]["files"]["tokens"]
    return tuple(entry["sha256"] for entry in files)


MEASURES = dict(accuracy=1, r2=1, loss=-1)  # what arms are compared by: the first that a result has, times this


def score_of(result, split):
    """Accuracy; without labels the R^2 of the known latents; without either minus the loss."""
    for key, sign in MEASURES.items():
        if result.get(f"{split}_{key}") is not None:
            return sign * result[f"{split}_{key}"]


MIN_SEEDS = 6  # with 5 not even the sign-flip test can reach 0.05: its floor is 2 / 2^5 = 0.06


def verdict(out):
    """One sentence, for or against. Help is claimed only above alone AND above the control, each with p < 0.05."""
    d, (unit, digits) = out["arms"]["uml"]["minus_alone"], (100, 1) if out["chance"] else (1, 3)
    n, spread = out.get("folds", out["seeds"]), ""
    if d["half"] is not None:
        spread = f" [{unit * (d['mean'] - d['half']):+.{digits}f}, {unit * (d['mean'] + d['half']):+.{digits}f}]"
    said = f"{unit * d['mean']:+.{digits}f}{spread}" + (" points" if out["chance"] else "")
    if n < MIN_SEEDS:
        kind = "seeds" if n == out["seeds"] else "speakers"
        return f"too few {kind} for a verdict ({n}; {MIN_SEEDS} are needed): uml minus alone is {said}"
    if d["p"] >= 0.05:
        return f"no effect shown: uml minus alone is {said}, p = {d['p']:.3g}"
    if d["mean"] < 0:
        return f"the unpaired data hurt: uml minus alone is {said}, p = {d['p']:.3g}"
    if "control" not in out["arms"]:
        return f"uml is above alone by {said}, p = {d['p']:.3g}, but no control was run to say why"
    c = out["arms"]["control"]["uml_minus"]
    against = f"{unit * c['mean']:+.{digits}f} against the control, p = {c['p']:.3g}"
    if c["mean"] <= 0 or c["p"] >= 0.05:
        return f"uml is above alone by {said}, p = {d['p']:.3g}, but {against}: it is not shown that the auxiliary's structure helped"
    return f"the unpaired data helped: uml minus alone is {said}, p = {d['p']:.3g}, and {against}"


def show_auxiliaries(out):
    return ", ".join(f"{slot}={short_source(source)}" for slot, source in out["auxiliaries"].items())


def short_source(source):
    """'folder:/my/pictures' -> 'folder:pictures': what a table or title shows."""
    name, colon, path = source.partition(":")
    return name + colon + os.path.basename(path.rstrip("/"))


def show_seeds(out, unit=""):
    return f"{out['seeds']}{unit}" + (f" on {out['folds']} speakers" if out.get("folds", out["seeds"]) != out["seeds"] else "")


def show_half(half):
    return "?" if half is None else f"{half:.4f}"


def show_compare(out):
    print(f"{out['target']}, {out['examples']} examples, {out['target_loss']}; auxiliary {show_auxiliaries(out)}; "
          f"{show_seeds(out, ' seeds')}, {out['measure']} on the {out['split']} split" + (f", chance {out['chance']:.4f}" if out["chance"] else ""))
    print(f"{'arm':10}{'mean +- 95%':>19}{'minus alone':>20}{'t-test p':>10}{'sign-flip p (floor)':>21}{'GFLOP':>9}{'s':>7}  setting")
    for arm, e in out["arms"].items():
        line = f"{arm:10}{e['mean']:10.4f} +- {show_half(e['half'])}"
        if d := e.get("minus_alone"):
            line += (f"{d['mean']:+11.4f} +- {show_half(d['half'])}{d['p']:10.3g}"
                     f"{d['sign_flip_p']:12.3g} ({d['sign_flip_floor']:.3g})").ljust(51)
        else:
            line += " " * 51
        settings = dict.fromkeys(", ".join(f"{key}={value}" for key, value in setting.items()) for setting in e["settings"])
        line += f"{e['gflops']:9,.0f}{e['seconds']:7.0f}  " + " or ".join(settings)
        others = [key for key in ("test_balanced_accuracy", "test_unseen_accuracy") if key in e]
        print(line + "".join(f"; {key[5:]} {np.mean(e[key]):.4f}" for key in others))
    print("verdict: " + out["verdict"])


# ---------------------------------------------------------------------------------------------------------------------
# theory: what unpaired data adds in a linear world, exactly


def information(shared, private, noise):
    """What ONE sample of a modality says about theta_c: the Schur complement j = I_cc - I_cx I_xx^+ I_xc.

    A sample is x = A_c theta_c + A_x theta_x + e, e ~ N(0, noise^2 I), with A_c = shared (D, d) and A_x = private (D, p), so
    the Fisher information of (theta_c, theta_x) has the blocks I_cc = A_c'A_c / noise^2, I_cx = A_c'A_x / noise^2 and
    I_xx = A_x'A_x / noise^2. theta_x is a nuisance; eliminating it leaves j. N samples say J = N j. Two modalities share
    neither nuisance nor noise, hence J_{X,Y} = J_X + J_Y: never less than J_X in the Loewner order, and strictly more in
    every direction v with J_Y v != 0 (Gupta et al. 2025, section 3). Raises UserError for noise that is not positive.
    """
    if not noise > 0:
        raise UserError(f"noise={noise} must be positive: without it one sample would say everything")
    return (shared.T @ shared - shared.T @ private @ np.linalg.pinv(private.T @ private) @ private.T @ shared) / noise**2


def exchange_rates(j_x, j_y):
    """How many X samples one Y sample is worth, along each generalised eigenvector of (j_Y, j_X) -> (rates, vectors).

    j_Y v = rate j_X v. Both are diagonal in these directions, so only there does the ratio of informations speak of variances.
    With S = j_X + j_Y and S^(-1/2) j_X S^(-1/2) = U mu U', v = S^(-1/2) u and rate = (1 - mu) / mu, which is infinite where X is
    blind (mu = 0). Raises UserError where S itself is singular: neither modality ever sees that direction.
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
    """(traces of the sample covariance, its standard error) of the joint maximum-likelihood estimate of theta_c.

    sides: [(shared, private, noise, N)]. The mean of N samples is sufficient; with M = I - A_x A_x^+ projecting the nuisance out,
    the estimate solves (sum J) theta = sum N A_c' M mean / noise^2. Its covariance is the Cramer-Rao bound (sum J)^-1.
    """
    rng, total, score = np.random.default_rng(seed), 0, 0
    truth = rng.normal(0, 1, sides[0][0].shape[1])
    for shared, private, noise, n in sides:
        means = shared @ truth + private @ rng.normal(0, 1, private.shape[1])
        means = means + rng.normal(0, noise / n**0.5, (repetitions, len(shared)))
        project = np.eye(len(shared)) - private @ np.linalg.pinv(private)
        total, score = total + n * information(shared, private, noise), score + n * means @ project @ shared / noise**2
    squares = ((score @ np.linalg.inv(total) - truth) ** 2).sum(1)
    return squares.mean(), squares.std() / repetitions**0.5


def theory(folder="out/theory", repetitions=100_000):
    """Demonstrate, in float64 and under a minute, what the linear model says; a table, theory.png and theory.json."""
    rng, d, observed, private, noise = np.random.default_rng(0), 6, 12, 3, 0.5
    mix = lambda width: rng.normal(0, 1, (observed, width))
    a_x, b_y, b_c, full = mix(private), mix(private), mix(d), mix(d)
    weak = np.array([1, 1, 0.5, 0.2, 0.05, 0.0])  # how strongly X shows each direction of theta_c; the last one not at all
    a_c, n_x, n_y = full * weak, 200, 200
    j_x, j_y = information(a_c, a_x, noise), information(b_c, b_y, noise)
    print(f"theta_c has {d} directions; X shows them with strengths {weak.tolist()}, Y in full; {n_x} samples of either, noise {noise}")

    gain = np.linalg.eigvalsh(n_y * j_y)  # J_XY - J_X, since informations of independent samples add up
    print(f"1. J_XY - J_X has eigenvalues from {gain[0]:.1f} to {gain[-1]:.1f}: all positive, so adding Y helps in every direction")
    seen = [(a_c[:, :5], a_x, noise, n_x), (b_c[:, :5], b_y, noise, n_y)]  # the five directions that X sees at all
    rows = []
    for label, sides in (("X alone", seen[:1]), ("Y alone", seen[1:]), ("X and Y, unpaired", seen)):
        bound = np.trace(np.linalg.inv(sum(n * information(a, p, s) for a, p, s, n in sides)))
        measured, error = monte_carlo(sides, repetitions)
        rows.append(dict(data=label, bound=bound, measured=measured, error=error))
        print(f"   {label:18} trace of the covariance: Cramer-Rao {bound:.5f}, measured {measured:.5f} +- {error:.5f} "
              f"({measured / bound - 1:+.2%})")
    worst = lambda j: float(np.linalg.eigvalsh(j)[0])
    blind = [dict(n_x=n, x_alone=worst(n * j_x), x_and_y=worst(n * j_x + n_y * j_y)) for n in (10, 1000, 100000)]
    print("2. information about the worst direction: no number of X samples identifies what X is blind to; "
          + "; ".join(f"N_x = {b['n_x']}: {abs(b['x_alone']):.1g} from X alone, {b['x_and_y']:.3g} with {n_y} Y" for b in blind))
    rates, _ = exchange_rates(j_x, j_y)
    print("3. one Y sample is worth this many X samples, along each generalised eigenvector: "
          + ", ".join("unbounded" if np.isinf(r) else f"{r:.3g}" for r in rates))

    attenuations, noises, sizes = np.geomspace(0.02, 1, 25), (0.25, 0.5, 1.0), range(2, 11)
    def best_rate(w, noise_y, width, draws=20):
        """The largest exchange rate where X shows one direction with strength w; geometric mean over random mixings."""
        r, strength, logs = np.random.default_rng(1), np.where(np.arange(width) < width - 1, 1, w), []
        for _ in range(draws):
            x, x_own, y, y_own = (r.normal(0, 1, (24, k)) for k in (width, private, width, private))
            logs.append(np.log(exchange_rates(information(x * strength, x_own, noise), information(y, y_own, noise_y))[0].max()))
        return np.exp(np.mean(logs))

    curves = {s: [best_rate(w, s, 4) for w in attenuations] for s in noises}
    widths = {w: [best_rate(w, noise, k) for k in sizes] for w in (1.0, 0.3, 0.1)}
    os.makedirs(folder, exist_ok=True)
    draw_theory(os.path.join(folder, "theory.png"), seen, attenuations, curves, sizes, widths)
    slope = np.polyfit(np.log(attenuations[:8]), np.log(curves[0.5][:8]), 1)[0]
    out = dict(kind="theory", repetitions=repetitions, traces=rows, loewner_gain=[gain[0], gain[-1]], blind=blind, slope=slope,
               exchange_rates=[None if np.isinf(r) else r for r in rates])
    print(f"   the best rate grows as strength^{out['slope']:.2f}; quieter Y is worth more; {folder}/theory.png shows how")
    write_json(os.path.join(folder, "theory.json"), out)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# exchange: how many words is an image worth?


def fit_exchange(n_x, n_y, scores):
    """Fit score = b0 + b1 log(n_x + rho n_y^gamma), b1 > 0: y counts as extra samples of x, with diminishing worth if gamma < 1.

    n_x, n_y, scores: (k,) of the grid's cells. Least squares in (b0, b1) for every rho and gamma of a fine grid. In the linear
    world the variance along one direction is 1 / (n_x j_x + n_y j_y): gamma = 1 and rho = j_y / j_x exactly.
    Returns dict(rho, gamma, b0, b1, residual), residual being the root mean square error.
    """
    best = None
    for gamma in (1.0, 0.75, 0.5, 0.35, 0.25):
        for rho in np.concatenate([[0.0], np.geomspace(1e-5, 1e4, 181)]):
            design = np.stack([np.ones(len(n_x)), np.log(n_x + rho * n_y**gamma)], 1)
            (b0, b1), *_ = np.linalg.lstsq(design, scores, rcond=None)
            error = float(np.sqrt(np.mean((design @ (b0, b1) - scores) ** 2)))
            if b1 > 0 and (best is None or error < best["residual"] * (1 - 1e-9)):  # ties go to gamma = 1 and the smaller rho
                best = dict(rho=float(rho), gamma=gamma, b0=float(b0), b1=float(b1), residual=error)
    if best is None:
        raise UserError("more examples never scored better on this grid: there is no exchange rate to fit")
    return best


def exchange_rate(fit, n_y):
    """How many x examples one more y example is worth at n_y of them: rho gamma n_y^(gamma - 1)."""
    return fit["rho"] * fit["gamma"] * n_y ** (fit["gamma"] - 1)


def mean_words(cfg, slot):
    """Words in a training item of a text slot, on average; None for other modalities."""
    folder = prepare(cfg, slot, say=lambda line: None)
    if "vocab" not in read_meta(folder):
        return None
    train, bpe = load_split(folder, "train"), load_bpe(folder)
    items = zip(train["tokens"][np.arange(min(1000, len(train["tokens"])))], train["lengths"])
    return float(np.mean([len(bpe.decode(row[:length].tolist()).split()) for row, length in items]))


def exchange(argv):
    """Train a grid of two example counts, fit the surface, and report what one example of either slot is worth in the other."""
    lists = {arg[2:].split("=")[0]: arg.split("=", 1)[1] for arg in argv if arg.startswith("--") and arg.partition("=")[2].startswith("[")}
    cfg = read_run_config([arg for arg in argv if arg[2:].split("=")[0] not in lists], dict(KEYS, **COMPARE_KEYS))
    own, target = own_keys(cfg), cfg["target"]
    try:
        lists = {key: sorted({int(value) for value in ast.literal_eval(text)}) for key, text in lists.items()}
    except (SyntaxError, ValueError, TypeError):
        raise UserError(f"the lists of exchange must hold whole numbers, found {' '.join(lists.values())}") from None
    other = [key for key in lists if key != f"{target}_examples"]
    if len(lists) != 2 or len(other) != 1 or other[0][:-len("_examples")] not in active_slots(cfg):
        raise UserError(f"exchange takes exactly two lists, --{target}_examples=[200,...] and --SLOT_examples=[0,1000,...] of an auxiliary")
    x_key, y_key = f"{target}_examples", other[0]
    if len(lists[x_key]) < 3 or len(lists[y_key]) < 2 or min(lists[x_key]) < 1 or min(lists[y_key]) < 0:
        raise UserError(f"no grid to fit: {x_key} needs three values above 0, {y_key} two of at least 0 (a number for 'all'), found {lists}")
    cells = list(itertools.product(lists[x_key], lists[y_key]))
    folder, bar = os.path.join(cfg["out_dir"], "compare"), tqdm(total=0, desc="runs", disable=None)
    os.makedirs(folder, exist_ok=True)
    seeds = range(own["first_seed"], own["first_seed"] + own["seeds"])
    runs = [dict(cfg, **{x_key: x, y_key: y, "seed": seed}) for x, y in cells for seed in seeds]
    open_slots(resolve(runs[-1], say=tell), say=lambda line: None)  # the largest cell: too many examples show now, not hours later
    results = run_all(runs, folder, own["jobs"], bar)
    bar.close()
    scores = np.array([score_of(r, "test" if cfg["score_test"] else "val") for r in results]).reshape(len(cells), own["seeds"])
    out = dict(kind="exchange", cells=cells, scores=scores.tolist(), command=shlex.join(["python", "probe.py", "exchange", *argv]))
    write_json(os.path.join(cfg["out_dir"], "exchange.json"), out)  # what was measured stays, whether or not it can be fitted
    n_x, n_y = np.array(cells, float).T
    fit, rng = fit_exchange(n_x, n_y, scores.mean(1)), np.random.default_rng(0)
    at, rates = float(np.median(n_y[n_y > 0])), []
    for _ in range(100 if own["seeds"] > 2 else 0):  # two seeds have three distinct resamples: no interval
        with contextlib.suppress(UserError):  # a resample in which more examples never scored better
            rates.append(exchange_rate(fit_exchange(n_x, n_y, scores[:, rng.integers(0, own["seeds"], own["seeds"])].mean(1)), at))
    interval = np.percentile(rates, (2.5, 97.5)).tolist() if len(rates) > 50 else None
    rate, words = exchange_rate(fit, at), mean_words(cfg, y_key[:-len("_examples")])
    out.update(fit=fit, at=at, rate=rate, interval=interval, words_per_item=words)
    print(f"score = {fit['b0']:.3f} + {fit['b1']:.3f} log({x_key} + {fit['rho']:.3g} {y_key}^{fit['gamma']}), "
          f"residual {fit['residual']:.4f}")
    print(f"at {at:,.0f} {y_key}, one of them is worth {rate:.3g} {x_key}"
          + (f" [{interval[0]:.3g}, {interval[1]:.3g}] over resampled seeds" if interval else ""))
    if words and rate:
        print(f"one {target} example is worth {words / rate:,.0f} words")
    write_json(os.path.join(cfg["out_dir"], "exchange.json"), out)
    draw_exchange(os.path.join(cfg["out_dir"], "exchange.png"), cells, scores.mean(1), fit, x_key, y_key)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# scale: what a step costs as things grow


def measure_step(cfg):
    """(milliseconds a step, anonymous MiB) of one config; memory is that of Linux' RssAnon, so mapped shards do not count."""
    ms = benchmark(cfg, say=lambda line: None, repeats=8)["ms_per_step"]
    with open("/proc/self/status", encoding="ascii") as f:
        anonymous = next(int(line.split()[1]) for line in f if line.startswith("RssAnon"))
    return ms, anonymous / 1024


def scale(argv):
    """Step time against width, depth, tokens, batch and shard size, around sample_configs/benchmark.py; scale.png and scale.json."""
    here, folder = os.path.dirname(os.path.abspath(__file__)), "out/scale"
    base = read_run_config([os.path.join(here, "sample_configs", "benchmark.py"), *argv])
    # 768 floats make 3,072 bytes an item, as many as a picture of CIFAR-10 has
    linear = dict(image="gaussian:x", image_loss="reconstruct", gaussian_observed=768, mask_ratio=0.0, bottleneck=16)
    panels = {  # name: (slope that large sizes tend to, {size: changed keys})
        "width": ("1 to 2", {n: dict(width=n) for n in (64, 128, 256, 512)}),
        "layers": ("1", {n: dict(layers=n) for n in (1, 2, 4, 8)}),
        "tokens": ("1 to 2", {(32 // n) ** 2: dict(patch_size=n) for n in (8, 4, 2)}),
        "batch": ("1", {n: dict(image_batch=n) for n in (16, 64, 256)}),
        "items in the shards": ("0", {n: dict(linear, gaussian_count=n) for n in (5000, 50000, 500000)}),
    }
    out = dict(kind="scale", panels={})
    for name, (expected, sizes) in panels.items():
        found = {}
        for size, change in sizes.items():  # a fresh process each, so that memory is its own
            prepare(dict(base, **change), "image")
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found[size] = pool.submit(measure_step, dict(base, **change)).result()
            tell(f"{name} {size}: {found[size][0]:.1f} ms/step, {found[size][1]:,.0f} MiB anonymous memory")
        ms = [t for t, _ in found.values()]
        slope = math.log(ms[-1] / ms[-2]) / math.log(list(found)[-1] / list(found)[-2])
        out["panels"][name] = dict(sizes=list(found), ms=ms, mib=[m for _, m in found.values()], slope=slope, expected=expected)
    os.makedirs(folder, exist_ok=True)
    draw_scale(os.path.join(folder, "scale.png"), out)
    write_json(os.path.join(folder, "scale.json"), out)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# embed: features and predictions for files the run has never seen


def read_new(folder, path, cfg, name, slot):
    """New files for a slot of a run -> (tokens as stored, real (n, T) bool, a name for each item); see embed()."""
    if modality_of(name) == "text" and slot["kind"] == "discrete":
        check_shards(folder, cfg)  # the BPE lies with the shards
        bpe, names = load_bpe(prepare(cfg, name)), [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if not names:
            raise UserError(f"{path} is empty: expected one text a line")
        coded = [bpe.encode_ordinary(line) for line in names]
        if cut := sum(len(ids) > slot["length"] for ids in coded):
            tell(f"{cut} of {len(names)} texts are cut at {slot['length']} tokens")
        tokens = torch.zeros(len(coded), slot["length"], dtype=torch.long)
        for row, ids in zip(tokens, coded):
            row[:len(ids)] = torch.tensor(ids[:slot["length"]])
        return tokens, torch.arange(slot["length"]) < torch.tensor([[len(ids)] for ids in coded]), names
    if "patch" in slot or "mels" in slot:
        if not os.path.isdir(path):
            raise UserError(f"{path} is no folder: embed takes a folder of files for the {name} slot")
        names = sorted(os.path.join(d, f) for d, _, inside in os.walk(path) for f in inside if not f.startswith("."))
        if not names:
            raise UserError(f"folder {path} is empty: expected files for the {name} slot")
        items, kept = (read_pictures if "patch" in slot else read_recordings)(dict(cfg, skip_bad=True), names)
        names = [f for f, k in zip(names, kept) if k]
        if "patch" in slot:
            tokens = torch.from_numpy(patchify(items, slot["patch"]))
            return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), names
        arrays = encode_recordings(cfg, dict(train=items))[0]["train"]
        real = torch.arange(slot["length"]) < torch.from_numpy(arrays["lengths"])[:, None]
        return torch.from_numpy(arrays["tokens"]), real, names
    try:  # features of a frozen encoder, or of a source of one's own
        tokens = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    except (OSError, ValueError, TypeError, AttributeError) as problem:  # AttributeError: an .npz
        raise UserError(f"{path} is no .npy array of numbers ({problem}), which {name}={cfg[name]} of {folder} needs") from None
    tokens = tokens[:, None] if tokens.dim() == 2 else tokens
    if tokens.shape[1:] != (slot["length"], slot["dim"]) or not len(tokens) or not tokens.isfinite().all():
        raise UserError(f"{path} must hold finite numbers (n, {slot['length']}, {slot['dim']}), found {tuple(tokens.shape)}")
    return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), list(range(len(tokens)))


def embed(folder, path):
    """Write FOLDER/embed.npy (n, C) and, where the run knows classes, FOLDER/embed.csv with file, class, probability.

    path: a folder of pictures or recordings, a text file (one item a line), or for anything else an .npy array as the source gave it.
    """
    model, checkpoint = load_model(os.path.join(folder, "best.pt"))
    cfg, name = checkpoint["config"], checkpoint["config"]["target"]
    slot = checkpoint["slots"][name]
    tokens, real, names = read_new(folder, path, cfg, name, slot)
    with torch.no_grad():  # not inference_mode: a linear probe may be fitted in here
        parts = [model.features(name, tokens[i:i + 500], real[i:i + 500]) for i in range(0, len(tokens), 500)]
        features, scores = torch.cat(parts), None
        if "label" in slot["loss"]:
            scores = model.label_head(features) * (model.temperature[name].exp() if name in model.temperature else 1)
        elif checkpoint["target_classes"] > 1:  # no label head of its own: a linear probe on the run's training examples
            run_ = open_run(folder)
            weight, bias = evaluate(run_.model, run_.target, run_.target.val, CPU)["probe"]
            scores = features @ weight.T + bias
    written = [os.path.join(folder, "embed.npy")]
    array = io.BytesIO()
    np.save(array, features.numpy())
    write_file(written[0], array.getvalue())
    classes = checkpoint["classes"][:checkpoint["target_classes"]]
    if scores is not None:
        chances = scores[:, :len(classes)].softmax(1)
        written.append(os.path.join(folder, "embed.csv"))
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerow(["file", "class", "probability"])
        writer.writerows([n, classes[int(c.argmax())], f"{c.max().item():.4f}"] for n, c in zip(names, chances))
        write_file(written[1], table.getvalue().encode(errors="surrogateescape"))
    print(json.dumps(dict(items=len(names), features=list(features.shape), written=written)))


# ---------------------------------------------------------------------------------------------------------------------
# report: the README's tables, from numbers that commands wrote


def report(readme="README.md"):
    """Rewrite what stands in the README between `<!-- KIND ... -->` and `<!-- /KIND -->`, from assets/results/NAME.json, as compare wrote them.

    KIND is results (NAME='title' ...: a table), curve (FILE.png NAME ...: a figure and what it says), or holm (after all tables).
    """
    tabled = {}  # {name: (title, result)}

    def result_of(name):
        path = os.path.join("assets", "results", name + ".json")
        if not os.path.exists(path):
            raise UserError(f"{readme} wants {path}, which is not there: copy the run's compare.json to it")
        return read_json(path)

    def block(match):
        kind, *words = shlex.split(match[2])
        if kind == "results":
            found = {name: (title, result_of(name)) for name, title in (word.split("=", 1) for word in words)}
            tabled.update(found)
            lines = ["| target | auxiliary | alone | control | uml | uml - alone (p) | uml - control (p) | seeds |", "|---" * 8 + "|"]
            lines += [f"| [{title}](assets/results/{name}.json) {table_row(r)}" for name, (title, r) in found.items()]
            lines += ["", "<details><summary>commands and hardware</summary>", ""]
            lines += [f"- {title}: `{r['command']}` ({r['hardware']})" for title, r in found.values()] + ["", "</details>"]
        elif kind == "curve":
            results = sorted((result_of(name) for name in words[1:]), key=lambda r: r["examples"])
            draw_curve(os.path.join(os.path.dirname(os.path.abspath(readme)), "assets", words[0]), results)
            lines = [f'<img src="assets/{words[0]}" width="560" alt="accuracy against labelled examples a class">', "", worth(results)]
        else:
            lines = [holm(tabled.values())]
        return "\n".join([match[1], *lines, match[3]])

    text = re.sub(r"(<!-- ((?:results|curve|holm).*?) -->)\n.*?(<!-- /\w+ -->)", block, read_text(readme), flags=re.S)
    write_file(readme, text.encode())
    print(f"rewrote the tables of {readme}")


def holm(tabled):
    """One sentence: the rows whose uml - alone, or its negative, survives Holm's correction over all rows at 0.05 (Holm 1979)."""
    ordered, kept = sorted(tabled, key=lambda row: row[1]["arms"]["uml"]["minus_alone"]["p"]), []
    for i, (title, r) in enumerate(ordered):
        d = r["arms"]["uml"]["minus_alone"]
        if d["p"] > 0.05 / (len(ordered) - i):
            break
        kept.append(title + (" (harm)" if d["mean"] < 0 else ""))
    return (f"The p of these {len(ordered)} rows are not corrected for their number. After Holm's correction these differences to alone stay "
            f"below 0.05: {'; '.join(kept)}.")


def per_class(r):
    """Labelled target examples of a comparison, mean over the classes."""
    return r["examples"] * r["chance"]


def worth(results):
    """One sentence: how many examples a class alone needs for what uml has, read off the line through alone's means (in log examples).

    Raises UserError where alone's line does not rise.
    """
    shots, alone = np.log([per_class(r) for r in results]), np.array([r["arms"]["alone"]["mean"] for r in results])
    if not (np.diff(alone) > 0).all():
        raise UserError(f"alone's accuracies {alone.round(3).tolist()} do not rise with its examples: nothing can be read off their line")

    def needed(accuracy):
        if not alone[0] <= accuracy <= alone[-1]:
            return f"{'fewer' if accuracy < alone[0] else 'more'} than {np.exp(shots[0 if accuracy < alone[0] else -1]):.3g}"
        return f"{np.exp(np.interp(accuracy, alone, shots)):.2g}"

    said = []
    for r in results:
        mean, half = r["arms"]["uml"]["mean"], r["arms"]["uml"]["half"] or 0
        ends = needed(mean - half), needed(mean + half)
        said.append(f"{per_class(r):.3g} are worth {needed(mean)}" + (f" ({ends[0]} to {ends[1]})" if ends[0] != ends[1] else ""))
    return "Examples a class with the other data, and what they are worth without: " + "; ".join(said) + "."


def table_row(r):
    """A row of the README's table; in %, or as they are where scores are R^2."""
    unit, digits = (100, 1) if r["chance"] else (1, 3)
    half = lambda e: "" if e["half"] is None else f" ± {unit * e['half']:.{digits}f}"
    show = lambda arm: f"{unit * r['arms'][arm]['mean']:.{digits}f}{half(r['arms'][arm])}" if arm in r["arms"] else "-"
    difference = lambda d: f"**{unit * d['mean']:+.{digits}f}**{half(d)} ({d['p']:.2g})"
    above_control = difference(r["arms"]["control"]["uml_minus"]) if "control" in r["arms"] else "-"
    return (f"| {show_auxiliaries(r)} | {show('alone')} | {show('control')} | {show('uml')} | "
            f"{difference(r['arms']['uml']['minus_alone'])} | {above_control} | {show_seeds(r)} |")


# ---------------------------------------------------------------------------------------------------------------------
# figures: drawn to read on light and dark pages


def figure(width=7, height=4.2, **grid):
    """(figure, axes) that read on light and dark pages; matplotlib is imported only when something is drawn."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(figsize=(width, height), dpi=130, layout="constrained", facecolor="white", **grid)


def save_figure(fig, path):
    import matplotlib.pyplot as plt
    fig.savefig(path + ".tmp", format="png")
    os.replace(path + ".tmp", path)
    plt.close(fig)


def draw_confusion(path, truth, guess, classes):
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, (truth.numpy(), guess.numpy()), 1)
    fig, ax = figure(6, 5.2)
    image = ax.imshow(counts / np.maximum(1, counts.sum(1, keepdims=True)), cmap="Blues", vmin=0)
    if len(classes) <= 30:
        ax.set_xticks(range(len(classes)), classes, rotation=90)
        ax.set_yticks(range(len(classes)), classes)
    ax.set_xlabel("predicted by the linear probe")
    ax.set_ylabel("true class")
    fig.colorbar(image, label="share of the true class")
    save_figure(fig, path)


def draw_pca(path, features, truth, classes):
    centred = features - features.mean(0)
    _, size, axes = torch.linalg.svd(centred, full_matrices=False)
    flat, share = (centred @ axes[:2].T).numpy(), (size.square() / size.square().sum())[:2].tolist()
    fig, ax = figure(6, 5.2)
    shown = ax.scatter(*flat[:3000].T, c=truth[:3000], s=6, cmap="tab10" if len(classes) <= 10 else "hsv")
    if len(classes) <= 10:
        there = sorted(set(truth[:3000].tolist()))
        ax.legend(shown.legend_elements(num=None)[0], [classes[c] for c in there], fontsize=7, loc="best")
    ax.set_xlabel(f"first principal component ({share[0]:.0%} of the variance)")
    ax.set_ylabel(f"second ({share[1]:.0%})")
    save_figure(fig, path)


def draw_side_by_side(path, reports, margin_lists):
    """Few-shot curves, margins and robustness of several runs in one figure."""
    fig, (left, middle, right) = figure(12, 3.6, ncols=3)
    for report, margin in zip(reports, margin_lists):
        shots = sorted(report["few_shot"])
        left.errorbar(shots, *[[report["few_shot"][k][i] for k in shots] for i in (0, 1)], marker="o", capsize=3, label=report["name"])
        middle.hist(margin, bins=60, density=True, histtype="step", label=report["name"])
        if report["robustness"]:
            right.plot([0, 1, 2, 3], np.mean(list(report["robustness"].values()), 0), marker="o", label=report["name"])
    left.set(xscale="log", xlabel="examples a class", ylabel="few-shot probe accuracy")
    left.set_xticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    middle.set(xlabel="margin of held-out items (0: on the boundary)", ylabel="density")
    right.set(xlabel="severity of the corruption (mean over kinds)", ylabel="accuracy", xticks=[0, 1, 2, 3])
    left.legend()
    save_figure(fig, path)


def draw_compare(path, out):
    """Every seed a point, every arm a column, means with their 95% intervals."""
    fig, ax = figure(1.5 + 1.3 * len(out["arms"]), 4.2)
    for i, (arm, e) in enumerate(out["arms"].items()):
        ax.plot(i + np.linspace(-0.12, 0.12, out["seeds"]), e["scores"], "o", ms=4, alpha=0.6, color=f"C{i}")
        ax.errorbar(i + 0.27, e["mean"], e["half"] or 0, fmt="s", ms=5, capsize=4, color="black")
    ax.set_xticks(range(len(out["arms"])), out["arms"])
    if out["chance"]:
        ax.axhline(out["chance"], ls=":", color="grey", lw=1)
    ax.set_ylabel(dict(accuracy="{} accuracy", r2="{} R²", loss="minus {} loss")[out["measure"]].format(out["split"]))
    ax.set_title(f"{short_source(out['target'])}, {out['examples']} examples\nwith {show_auxiliaries(out)}", fontsize=9)
    save_figure(fig, path)


def draw_theory(path, seen, attenuations, curves, sizes, widths):
    """Variance against Y samples (lines: the bound, dots: measured), exchange rates against attenuation and against dimension."""
    fig, (left, middle, right) = figure(12, 3.6, ncols=3)
    budget = np.arange(0, 401, 25)
    for n, colour in ((50, "C0"), (200, "C1")):
        trace = lambda y: np.trace(np.linalg.inv(n * information(*seen[0][:3]) + y * information(*seen[1][:3])))
        left.plot(budget, [trace(y) for y in budget], color=colour, label=f"bound, {n} X samples")
        measured = [monte_carlo([(*seen[0][:3], n), (*seen[1][:3], y)], 20000)[0] for y in (100, 400)]
        left.plot([100, 400], measured, "o", color=colour)
    left.set(xlabel="unpaired Y samples", ylabel="variance of the estimate (trace)", yscale="log")
    for s, values in curves.items():
        middle.loglog(attenuations, values, label=f"noise of Y {s}")
    middle.axhline(1, color="grey", lw=0.8, ls=":")
    middle.set(xlabel="strength with which X shows the direction", ylabel="X samples that one Y sample is worth")
    for w, values in widths.items():
        right.semilogy(list(sizes), values, marker="o", ms=3, label=f"strength {w}")
    right.set(xlabel="shared dimensions", ylabel="best exchange rate")
    for ax in (left, middle, right):
        ax.legend(fontsize=8)
    save_figure(fig, path)


def draw_exchange(path, cells, means, fit, x_key, y_key):
    """The fitted surface as curves of equal score, the measured means as numbers."""
    n_x, n_y = np.array(cells, float).T
    fig, ax = figure(6, 4.2)
    grid_x, grid_y = np.geomspace(n_x.min(), n_x.max(), 60), np.linspace(0, n_y.max(), 60)
    surface = fit["b0"] + fit["b1"] * np.log(grid_x[None] + fit["rho"] * grid_y[:, None] ** fit["gamma"])
    ax.clabel(ax.contour(grid_x, grid_y, surface, levels=8, cmap="viridis"), fontsize=7)
    for (x, y), mean in zip(cells, means):
        ax.annotate(f"{mean:.3f}", (x, y), fontsize=7, ha="center")
    ax.set(xscale="log", xlabel=x_key, ylabel=y_key, xlim=(n_x.min() / 1.3, n_x.max() * 1.3), ylim=(-0.06 * n_y.max(), 1.06 * n_y.max()))
    ax.set_title("curves of equal score of the fit; measured means as numbers", fontsize=9)
    ax.set_xticks(sorted(set(n_x)), [f"{n:,.0f}" for n in sorted(set(n_x))])
    ax.minorticks_off()
    save_figure(fig, path)


def draw_scale(path, out):
    fig, axes = figure(14, 3.2, ncols=len(out["panels"]), sharey=True)
    for ax, (name, panel) in zip(axes, out["panels"].items()):
        ax.loglog(panel["sizes"], panel["ms"], marker="o")
        ax.set_title(f"slope at the end {panel['slope']:.2f} (expected {panel['expected']})", fontsize=9)
        ax.set(xlabel=name, ylabel="ms a step" if ax is axes[0] else None)
        ax.set_xticks(panel["sizes"], [f"{n:,}" for n in panel["sizes"]])
        ax.minorticks_off()
    save_figure(fig, path)


def draw_curve(path, results):
    """Accuracy against labelled target examples a class, one line an arm: what unpaired data saves is the horizontal distance."""
    fig, ax = figure(6, 3.8)
    for i, arm in enumerate(("alone", "uml", "control")):
        points = [(per_class(r), r["arms"][arm]) for r in results if arm in r["arms"]]
        shots, means, halves = [s for s, _ in points], [e["mean"] for _, e in points], [e["half"] or 0 for _, e in points]
        ax.errorbar(shots, means, halves, marker="o", ms=4, capsize=3, color=f"C{i}", label=arm)
    ax.axhline(results[0]["chance"], ls=":", color="grey", lw=1)
    ax.set(xscale="log", xlabel="labelled examples, mean over classes", ylabel=f"{results[0]['split']} accuracy",
           ylim=(0, None))
    ax.set_title(f"{short_source(results[0]['target'])} with {show_auxiliaries(results[0])}", fontsize=9)
    ticks = sorted({per_class(r) for r in results})
    ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    ax.minorticks_off()
    ax.legend()
    save_figure(fig, path)


def draw_architecture(path):
    """Two unpaired streams, one trunk, one better target."""
    from matplotlib.patches import FancyBboxPatch
    fig, ax = figure(8.6, 3.3)
    def box(x, y, width, height, words, colour):
        ax.add_patch(FancyBboxPatch((x + 0.05, y + 0.05), width - 0.1, height - 0.1, boxstyle="round,pad=0.05", facecolor=colour, lw=0.8))
        ax.text(x + width / 2, y + height / 2, words, ha="center", va="center", fontsize=9)
    def arrow(x, y, to_x, to_y):
        ax.annotate("", (to_x, to_y), (x, y), arrowprops=dict(arrowstyle="-|>", color="black", lw=1.2))
    streams = ((2.1, "image", "pictures (target)", "#cfe3f7"), (0.2, "text", "sentences, never paired\nwith any picture", "#fbe3c4"))
    for y, name, example, colour in streams:
        box(0, y, 2.1, 1, example, colour)
        box(2.6, y, 1.3, 1, f"embed\n{name}", colour)
        box(7.1, y, 1.5, 1, f"head {name}\nnext / reconstruct", colour)
        arrow(2.1, y + 0.5, 2.6, y + 0.5), arrow(3.9, y + 0.5, 4.5, y + 0.5), arrow(6.4, y + 0.5, 7.1, y + 0.5)
    box(4.5, 0.2, 1.9, 2.9, "ONE trunk\n\nthe same weights\nfor every modality,\ntaken in turn", "#d9d2e9")
    box(7.1, 1.4, 1.5, 0.5, "one label head", "#d9d2e9")
    arrow(6.4, 1.65, 7.1, 1.65), arrow(8.6, 1.65, 9.1, 1.65)
    ax.text(9.15, 1.65, "a better image\nrepresentation", va="center", fontsize=9)
    ax.set(xlim=(-0.1, 10.7), ylim=(0, 3.3))
    ax.axis("off")
    save_figure(fig, path)


def draw_world(path):
    """Pictures, spectrograms and sentences of the shapes world, every column of other scenes."""
    fig, axes = figure(11, 3.9, nrows=3, ncols=8, height_ratios=(1, 1, 0.75))
    scenes = {}
    for modality in ("image", "audio", "text"):
        latents, labels, rng = draw_scenes(modality, "figure", 64)
        scenes[modality] = latents[:8], labels[:8], rng
    pictures, sentences = paint_scenes(scenes["image"][0], scenes["image"][2]), tell_scenes(scenes["text"][0], scenes["text"][2])
    sounds = list(sound_scenes(scenes["audio"][0], scenes["audio"][2]))
    sounds = encode_recordings(read_run_config([]), dict(train=sounds))[0]["train"]["tokens"]
    for i in range(8):
        axes[0, i].imshow(pictures[i])
        axes[1, i].imshow(sounds[i].reshape(64, 40).T, origin="lower", aspect="auto")
        axes[2, i].text(0.5, 1, "\n".join(textwrap.wrap(sentences[i], 20)), ha="center", va="top", fontsize=8)
        for row, modality in ((0, "image"), (1, "audio")):
            axes[row, i].set_title(SHAPE_CLASSES[scenes[modality][1][i]], fontsize=8)
    for ax in axes.flat:
        ax.axis("off")
    save_figure(fig, path)


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
    elif argv[0] == "scale":
        print(json.dumps(scale(argv[1:])))
    elif argv[0] == "theory":
        print(json.dumps(theory()))
    elif argv[0] == "report":
        report()
        draw_architecture("assets/architecture.png")
        draw_world("assets/shapes.png")
    elif near := difflib.get_close_matches(argv[0], ("compare", "embed", "exchange", "scale", "theory", "report"), n=1):
        raise UserError(f"'{argv[0]}' is no command, did you mean '{near[0]}'?")
    elif argv[0].endswith(".py"):
        raise UserError(f"{argv[0]} is a config: python train.py {argv[0]}, or python probe.py compare {argv[0]}")
    elif keys := [arg for arg in argv if arg.startswith("--")]:
        raise UserError(f"{keys[0]}: the analysis of runs takes no keys, only folders of runs; compare and exchange take keys")
    else:
        torch.set_num_threads(1)  # many small solves: threads that wait for each other make them many times slower
        for folder in argv:
            open_run(folder)  # what is wrong with the last one shows now, not minutes later
        reports, margin_lists = zip(*[analyse(folder) for folder in argv])
        show_side_by_side(reports)
        draw_side_by_side(os.path.join(argv[0], "side_by_side.png"), reports, margin_lists)
        print(f"wrote confusion.png and pca.png of each run, and {os.path.join(argv[0], 'side_by_side.png')}")
        print(json.dumps(reports[0] if len(reports) == 1 else reports))


if __name__ == "__main__":
    exit_on_user_error(main)
