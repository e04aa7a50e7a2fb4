"""The reference column: a plain ConvNet on the same labelled items, augmentation, steps and batches.

    python assets/results/convnet.py sample_configs/letters_text.py --out_dir=out/convnet_1
    python assets/results/convnet.py sample_configs/letters_text.py --image_examples=1016 --seeds=3
    python assets/results/convnet.py sample_configs/numbers_audio_text.py --seeds=6

As `probe.py compare` does: the best candidate on validation with seed 1000, then the seeds, test scored once
each; where a seed has a test speaker of its own it chooses on its own validation speaker. Where the largest
decay of a rate is best, twice that is tried, and so on (this can stop on a plateau: then try larger ones).
The network is what people would write: three stages of two 3x3 convolutions, norm, ReLU, and 2x2 max-pooling,
then one linear layer on all positions. Channels, strides, steps and so the cost of a step are those of the
stem in model.py.
"""
import copy
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from model import SILENCE
from prepare import active_slots, exit_on_user_error, print_help, unpatchify, write_json
from train import KEYS, TRAINING_VERSION, learning_rate, make_optimizer, open_slots, read_run_config, resolve

# norm, learning rate, weight decay
CANDIDATES = [("group", 3e-3, 0.05), ("group", 3e-3, 0.5), ("batch", 3e-3, 0.05), ("batch", 1e-3, 0.5),
              ("batch", 1e-3, 1.5), ("batch", 3e-3, 1.5), ("batch", 3e-3, 4.0)]


def convnet(norm, stride, classes, planes, equal_contrast):
    """Pictures (B, planes, S, S) -> scores (B, classes)."""
    # every picture at the same brightness and contrast, where the stem has it so
    layers, before = [nn.GroupNorm(1, planes, affine=False)] if equal_contrast else [], planes
    for after in (16, 32, 64):
        for inputs in (before, after):
            norm_layer = nn.GroupNorm(8, after) if norm == "group" else nn.BatchNorm2d(after)
            layers += [nn.Conv2d(inputs, after, 3, stride, padding=1, bias=False), norm_layer, nn.ReLU()]
            stride = 1
        layers.append(nn.MaxPool2d(2))
        before = after
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(classes))


def planes_of(slot, tokens):
    """Pictures (B, c, S, S), or log-mels (B, 1, frames, mels)."""
    mean, std = (torch.tensor(slot.meta[key]) for key in ("mean", "std"))  # one a colour, or one a mel
    repeat = tokens.shape[2] // len(mean)
    tokens = (tokens.float() - mean.repeat(repeat)) / std.repeat(repeat)
    if "patch" in slot.meta:
        return unpatchify(tokens, slot.meta["patch"]).permute(0, 3, 1, 2)
    planes = tokens.reshape(len(tokens), 1, -1, slot.meta["mels"])
    # clip what lies far below the loudest, and give every mel the same mean, as in the stem
    planes = planes.maximum(planes.amax((2, 3), keepdim=True) - SILENCE)
    return planes - planes.mean(2, keepdim=True)


@torch.no_grad()
def accuracy(model, slot, arrays):
    """Over and among the classes that have labelled pictures: the scores of others were never trained."""
    model.eval()
    rows = np.flatnonzero(~np.isin(arrays["labels"], slot.unseen))
    parts = [torch.from_numpy(arrays["tokens"][part]) for part in np.array_split(rows, 8)]
    scores = torch.cat([model(planes_of(slot, part)) for part in parts])
    scores[:, slot.unseen] = -torch.inf
    model.train()
    return (scores.argmax(1).numpy() == arrays["labels"][rows]).mean().item()


def train(cfg, seed, norm, rate, decay, score_test=False):
    """-> the best validation accuracy, or the test accuracy of that moment."""
    alone = {name: "" for name in active_slots(cfg) if name != cfg["target"]}
    cfg = dict(cfg, **alone, seed=seed, learning_rate=rate, weight_decay=decay)
    quiet = lambda line: None
    cfg = resolve(cfg, quiet)  # without the warm start, which has nothing to train on
    (slot,) = open_slots(cfg, quiet)[0].values()
    torch.manual_seed(seed)
    classes = len(slot.meta["classes"])
    few = planes_of(slot, torch.from_numpy(slot.split("train")["tokens"][slot.examples[:2]]))
    model = convnet(norm, 1 if "patch" in slot.meta else 2, classes, few.shape[1], cfg["equal_contrast"])
    model(few)  # shapes the lazy layer
    optimizer, best, kept = make_optimizer(model, cfg), -1.0, None
    seen = np.setdiff1d(np.arange(classes), slot.unseen)
    place = torch.zeros(classes, dtype=torch.long)
    place[seen] = torch.arange(len(seen))
    for step in range(cfg["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        batch = slot.batch(step)
        scores = model(planes_of(slot, batch["tokens"]))[:, seen]
        loss = F.cross_entropy(scores, place[batch["labels"]], label_smoothing=cfg["label_smoothing"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % cfg["eval_interval"] == 0 or step + 1 == cfg["steps"]:
            val = accuracy(model, slot, slot.split("val"))
            if val > best:
                best, kept = val, copy.deepcopy(model.state_dict())
    if not score_test:
        return best
    model.load_state_dict(kept)
    return accuracy(model, slot, slot.split("test"))


def search(cfg, seed):
    """{candidate: validation accuracy}, of CANDIDATES and of what they lead to."""
    found = {candidate: train(cfg, seed, *candidate) for candidate in CANDIDATES}
    while True:
        norm, rate, decay = max(found, key=found.get)
        if decay < max(other[2] for other in found if other[:2] == (norm, rate)):
            return found
        found[norm, rate, 2 * decay] = train(cfg, seed, norm, rate, 2 * decay)


def main():
    own = dict(seeds=(8, "runs"), first_seed=(0, "seed of the first"))
    if "--help" in sys.argv:
        return print_help(__doc__, own, "Keys besides those of train.py:")
    cfg = read_run_config(sys.argv[1:], dict(KEYS, **own))
    torch.set_num_threads(1)
    own_speaker = cfg.get("audio_test_group") == "each"  # each seed is tested on another speaker
    searched, chosen, scores = [], [], []
    for seed in range(cfg["first_seed"], cfg["first_seed"] + cfg["seeds"]):
        if own_speaker or not searched:
            found = search(cfg, seed if own_speaker else 1000)
            searched.append([[*candidate, accuracy] for candidate, accuracy in found.items()])
            chosen.append(max(found, key=found.get))
            print(found, "chosen:", chosen[-1], flush=True)
        scores.append(train(cfg, seed, *chosen[-1], score_test=True))
        print(seed, scores[-1], flush=True)
    command = "python assets/results/convnet.py " + " ".join(sys.argv[1:])
    os.makedirs(cfg["out_dir"], exist_ok=True)
    write_json(os.path.join(cfg["out_dir"], "convnet.json"),
               dict(kind="convnet", version=TRAINING_VERSION, examples=cfg[f"{cfg['target']}_examples"],
                    steps=cfg["steps"], seeds=len(scores), first_seed=cfg["first_seed"],
                    searched=searched, settings=chosen, scores=scores,
                    mean=float(np.mean(scores)), command=command))


if __name__ == "__main__":
    exit_on_user_error(main)
