"""Spoken digits of an unheard speaker, 200 labelled clips of four others, beside pictures of something else: it does NOT help.

FSDD (10 MB) is fetched once. Two CPU cores: about half a minute. On validation (folds 0, 2, 4) alone reaches 0.68, with shapes pictures 0.63,
with CIFAR-10 pictures 0.60.
    python train.py sample_configs/digits_audio_image.py
    python train.py sample_configs/digits_audio_image.py --image=cifar10 --out_dir=out/digits_cifar
    python train.py sample_configs/digits_audio_image.py --image= --out_dir=out/digits_alone
"""
target = "audio"
audio = "fsdd"
image = "shapes"
audio_test_group = "each"  # seed 0 is tested on the first speaker and validated on the second, seed 1 ...
audio_examples = 200
image_loss = "next"
image_batch = 32

width = 96
layers = 3
learning_rate = 5e-3
weight_decay = 0.5
warm_start_steps = 200     # pictures alone
steps = 400
eval_interval = 50
