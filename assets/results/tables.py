"""The tables that make.py writes, as lists of lines. rows is {name: (title, what NAME.json holds)}.

    python assets/results/make.py    # writes them all
"""
import os

import numpy as np

from figures import DOSES, per_class
from prepare import UserError, read_json
from probe import forecast, paired, rule_of_thumb, show_auxiliaries, t_interval, verdict

HERE = os.path.dirname(os.path.abspath(__file__))
# How a sentence of verdict() begins: a word or two for it.
VERDICTS = {
    "too few": "too few seeds",
    "no effect shown": "no effect shown",
    "the unpaired data hurt:": "**hurts**",
    "the unpaired data helped:": "**helps**",
    "uml is above alone, but no control": "no control",
    "uml is above alone, but it is not": "not above control",
}


def result_of(name):
    """What NAME.json beside this file holds: a compare.json, under another name."""
    path = os.path.join(HERE, f"{name}.json")
    if not os.path.exists(path):
        raise UserError(f"a page wants {path}, which is not there: copy the run's compare.json to it")
    return read_json(path)


def control_of(name):
    """What NAME_control.json holds: a comparison's arms, all with control=True; None if there is none."""
    path = os.path.join(HERE, f"{name}_control.json")
    return read_json(path) if os.path.exists(path) else None


def paired_over_common(scores, others, folds):
    """paired() over the seeds that both have, the first of each; {} of no others.

    Seeds s, s + folds, s + 2 folds, ... are tested on the same speaker: they are averaged first.
    """
    if not others:
        return {}
    n = min(len(scores), len(others))
    folds = min(n, folds)
    means = [[np.mean(values[fold:n:folds]) for fold in range(folds)] for values in (scores, others)]
    return paired(*np.array(means))


def convnet_of(name):
    """The reference of TARGET_EXAMPLES...: a plain ConvNet on the same items; {} where none was trained."""
    first_two_words = "_".join(name.split("_")[:2])
    path = os.path.join(HERE, f"convnet_{first_two_words}.json")
    if not os.path.exists(path):
        return {}
    scores = read_json(path)["scores"]
    mean, half = t_interval(scores)
    return dict(mean=mean, half=half, seeds=len(scores))


def percent(entry):
    """'71.2 ± 1.3' of a mean, '**+5.6** ± 1.0 (2e-06)' of a difference, '-' of nothing."""
    if not entry:
        return "-"
    half = "" if entry["half"] is None else f" ± {100 * entry['half']:.1f}"
    if "p" in entry:
        return f"**{100 * entry['mean']:+.1f}**{half} ({entry['p']:.1g})"
    return f"{100 * entry['mean']:.1f}{half}"


def table_of(columns, rows):
    """Markdown of a table whose cells are given."""
    first, *others = ["| " + " | ".join(map(str, cells)) + " |" for cells in (columns, *rows)]
    return [first, "|---" * len(columns) + "|", *others]


def seeds_of(result):
    """'8', or '18 on 6 speakers'."""
    folds = result["folds"]
    return f"{result['seeds']}" + (f" on {folds} speakers" if folds != result["seeds"] else "")


def results_table(rows):
    lines = []
    for name, (title, result) in rows.items():
        alone, control, uml = (result["arms"].get(arm, {}) for arm in ("alone", "control", "uml"))
        convnet = "-"
        if reference := convnet_of(name):
            fewer = f" ({reference['seeds']} seeds)" if reference["seeds"] < result["folds"] else ""
            convnet = f"{100 * reference['mean']:.1f}{fewer}"
        scores = percent(alone), convnet, percent(control), percent(uml)
        above = percent(uml["minus_alone"]), percent(control.get("uml_minus"))
        lines.append([title, show_auxiliaries(result), *scores, *above, seeds_of(result)])
    return table_of(["target", "beside it", "alone", "ConvNet", "control", "uml", "uml - alone (p)",
                     "uml - control (p)", "seeds"], lines)


def summary(rows):
    """The table of all regimes, as lines, and what draw_summary() takes."""
    lines, drawn = [], []
    for name, (title, result) in rows.items():
        arms, sentence = dict(result["arms"], convnet=convnet_of(name)), verdict(result)
        word = next(word for start, word in VERDICTS.items() if sentence.startswith(start))
        reference = percent(arms["convnet"])
        if "nearest" in arms and not arms["convnet"]:
            reference = f"{percent(arms['nearest'])} (nearest)"
        alone, control, uml = (percent(arms.get(arm)) for arm in ("alone", "control", "uml"))
        lines.append([title, alone, reference, control, uml, word, seeds_of(result)])
        drawn.append((title, arms, word.strip("*")))
    columns = ["regime", "alone", "ConvNet or nearest", "control", "uml", "verdict", "seeds"]
    return table_of(columns, lines), drawn


def commands_of(rows):
    lines = [f"- {title}: `{result['command']}` ({result['hardware']})" for title, result in rows.values()]
    return ["", "<details><summary>commands and hardware</summary>", "", *lines, "", "</details>"]


def arms_table(rows):
    lines = []
    for title, result in rows.values():
        for arm, entry in result["arms"].items():
            minus = result["arms"]["uml"]["minus_alone"] if arm == "alone" else entry.get("uml_minus")
            settings = []
            for setting in entry["settings"]:
                settings.append(", ".join(f"{key}={value}" for key, value in setting.items()))
            different = " or ".join(dict.fromkeys(settings))
            lines.append([title, arm, percent(entry), percent(minus), f"{entry['gflops']:,.0f}", different])
    return table_of(["", "arm", "accuracy", "uml minus it (p)", "GFLOP", "setting"], lines)


def unseen_table(rows):
    keys = dict(mean="seen among all", unseen_among_unseen="unseen among themselves",
                unseen_accuracy="unseen among all", unseen_with_offset="unseen with the offset",
                seen_with_offset="seen with the offset", harmonic_mean="harmonic mean")
    lines = []
    for title, result in rows.values():
        for arm in ("alone", "control", "uml"):
            if entry := result["arms"].get(arm):
                lines.append([title, arm, *(f"{100 * np.mean(entry[key]):.1f}" for key in keys)])
    return table_of(["", "arm", *keys.values()], lines)


def doses_table(rows):
    """Two lines a comparison, and two more where NAME_control.json has the same arms with control=True."""
    lines = []
    for name, (title, result) in rows.items():
        arms = [result["arms"][arm] for arm in DOSES]
        lines.append([title, *(percent(entry) for entry in arms)])
        lines.append(["minus nothing (p)", *(percent(entry.get("minus_alone")) for entry in arms)])
        if control := control_of(name):
            entries = [{}] + [control["arms"][arm] for arm in list(DOSES)[1:]]  # nothing shared: no control
            above = []
            for entry, its_control in zip(arms, entries):
                others = its_control.get("scores")
                above.append(paired_over_common(entry["scores"], others, result["folds"]))
            lines.append(["its control", *map(percent, entries)])
            lines.append(["minus its control (p)", *map(percent, above)])
    return table_of(["shared", *DOSES.values()], lines)


def forecasts_table(words):
    """A line a comparison: what preflight and a rule of thumb foretold, what was found; and a tally.

    "cannot tell" counts as neither right nor wrong, and so do comparisons of too few seeds.
    """
    lines, tally = [], []  # of each comparison with a verdict (features?, foretold?, right?, thumb right?)
    for word in words:
        name, rows = word.split(":")
        guess = result_of(name)
        for row in rows.split(","):
            result = result_of(row)
            found = next(word for start, word in VERDICTS.items() if verdict(result).startswith(start))
            classes, k = guess["classes"], per_class(result)
            said = forecast(dict(guess, examples_a_class=k)).split(" to help")[0].split(":")[0]
            thumb = rule_of_thumb(classes, k)
            if found != "too few seeds":
                truth = "likely" if found == "**helps**" else "unlikely"
                tally.append((guess["features"], said != "cannot tell", said == truth, thumb == truth))
            gain = 100 * np.mean(np.subtract(guess["scores"]["uml"], guess["scores"]["alone"]))
            cells = row, classes, f"{k:.3g}", f"{gain:+.1f}", said, thumb, found
            lines.append(cells)
    table = table_of(["comparison", "classes", "examples a class", "small runs: uml - alone", "preflight",
                      "rule of thumb", "found"], lines)
    sentences = []
    for features, where in ((False, "from raw data"), (True, "on features of a pretrained encoder")):
        foretold, right, thumb = np.sum([row[1:] for row in tally if row[0] == features], axis=0)
        count = sum(row[0] == features for row in tally)
        sentences.append(f"Of {count} comparisons {where} with a verdict preflight foretold {foretold} and "
                         f"was right on {right}, the rule of thumb on {thumb}.")
    return [*table, "", " ".join(sentences)]
