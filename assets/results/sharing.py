"""What do the slots of finished runs share? Gradients on the trunk, and words in the rows of the label head.

    python assets/results/sharing.py out/numbers_text out/numbers_control

Of each run: do batches of two slots pull the trunk the same way (the cosine of their gradients, before and
after training)? Do classes whose names share a word have similar rows in the label head? The last line is
JSON. gradients.py follows the first question through a run, and draws it.
"""
import copy
import json
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from prepare import UserError, exit_on_user_error, tell
from probe import class_words, open_run, permutation_p
from train import build_model, model_slots

BATCHES = 8  # in the mean of a gradient


def gradient_agreement(model, one, other):
    """Cosine of two mean gradients on each block of the trunk: a list of floats, below 0 where they conflict.

    one, other: lists of (slot name, keyword arguments of UML.forward). The cosine is taken once, of the mean
    gradients: single batches are noisy, and the mean of their cosines would be drawn towards 0. After Yu et
    al. 2020 (arXiv 2001.06782).
    """
    def mean_gradient(batches):
        model.zero_grad()
        for name, batch in batches:
            model(name, **batch).backward()  # adds up: a sum has the same cosine as a mean
        blocks = [torch.cat([p.grad.flatten() for p in block.parameters()]) for block in model.trunk.blocks]
        model.zero_grad()
        return blocks
    pairs = zip(mean_gradient(one), mean_gradient(other))
    return [F.cosine_similarity(left, right, dim=0).item() for left, right in pairs]


def draw_batches(slot, seed):
    """The first training batches of a slot as this seed orders and augments them: [(name, batch), ...]."""
    slot = copy.copy(slot)
    slot.cfg = dict(slot.cfg, seed=seed)
    return [(slot.name, slot.batch(update)) for update in range(BATCHES)]


def slots_agreement(model, slots, cfg, classes):
    """{pair of slots: {"fresh": [cosine of their gradients on each block of the trunk], "best": [...]}}.

    fresh: at the config's initial weights; best: at the model's. Pairs are the target and each auxiliary, and
    each slot with itself, which is the most that noise allows. At a minimum of the sum of the losses all
    gradients cancel, so training by itself brings two slots towards -1. {} without a common trunk.
    """
    if len(slots) < 2 or len(model.own_trunk) or not getattr(model.trunk, "blocks", None):
        return {}
    target, seed = cfg["target"], cfg["seed"]
    # Two draws of each slot, under two seeds. Two halves of one epoch would have no item in common: near an
    # optimum, where all gradients together are zero, such halves point away from each other.
    draws = {name: [draw_batches(slot, seed), draw_batches(slot, seed + 1)] for name, slot in slots.items()}
    pairs = {f"{target}-{name}": list(zip(draws[target], draws[name])) for name in slots}
    pairs.update({f"{name}-{name}": [draws[name]] for name in slots})
    models = dict(fresh=build_model(cfg, model_slots(slots), classes), best=model)
    out = {}
    for pair, sides in pairs.items():
        out[pair] = {}
        for state, one in models.items():
            cosines = [gradient_agreement(one, left, right) for left, right in sides]  # [draw][block]
            out[pair][state] = np.mean(cosines, 0).tolist()
    return out


def head_geometry(weight, classes):
    """Do classes that share a word have like rows in the label head? weight (k, C), classes: k names.

    Returns the mean cosine of two rows, less the mean row, over pairs of classes with only the "first" word
    in common, only the "last", and "neither"; and p, how often shuffled classes tell pairs that share a word
    from the others as well (the test of Mantel 1967). None where no pair shares just one word, or none
    shares neither.
    """
    ends = [(words[0], words[-1]) if words else ("", "") for words in class_words(classes)]
    numbers = [np.unique(words, return_inverse=True)[1] for words in zip(*ends)]
    codes = np.stack(numbers, 1)  # (k, 2): first and last word, as numbers
    i, j = np.triu_indices(len(codes), 1)  # (pairs,) each
    rows = F.normalize(weight - weight.mean(0), dim=1)
    cosine = (rows @ rows.T).numpy()[i, j]  # (pairs,)

    def gap(cosine, codes):
        first, last = (codes[i] == codes[j]).T  # (pairs,) each
        return cosine[first != last].mean() - cosine[~first & ~last].mean()

    first, last = (codes[i] == codes[j]).T
    groups = dict(first=first & ~last, last=last & ~first, neither=~first & ~last)
    if not (first != last).any() or not groups["neither"].any():
        return None
    found = {name: float(cosine[group].mean()) if group.any() else None for name, group in groups.items()}
    return dict(found, p=permutation_p(lambda order: gap(cosine, codes[order]), len(codes))[1])


def report_of(run):
    with_head = any("label" in slot.objectives for slot in run.slots.values())
    classes = run.checkpoint["classes"]
    head = head_geometry(run.model.label_head.weight.detach(), classes) if with_head else None
    gradients = slots_agreement(run.model, run.slots, run.cfg, classes)
    return dict(name=run.name, gradients=gradients, head=head)


def main():
    if "--help" in sys.argv:
        return print(__doc__)
    folders = sys.argv[1:]
    if not folders:
        raise UserError("name finished runs: python assets/results/sharing.py out/letters_text")
    runs, reports = [open_run(folder) for folder in folders], []
    for run in runs:
        tell(f"{run.folder}: gradients of its slots, rows of its label head ...")
        reports.append(report_of(run))
    print(json.dumps(reports[0] if len(reports) == 1 else reports))


if __name__ == "__main__":
    exit_on_user_error(main)
