"""Spoken digits of an unheard speaker, 200 labelled clips of four others, helped by pictures of anything.

FSDD (10 MB) and CIFAR-10 (170 MB) are fetched once; offline, --image=shapes. Untuned, and not compared yet: claims nothing.
    python train.py sample_configs/digits_audio_image.py
    python train.py sample_configs/digits_audio_image.py --image= --out_dir=out/digits_alone
"""
target = "audio"
audio = "fsdd"
image = "cifar10"
audio_test_group = "each"  # seed 0 is tested on the first speaker and validated on the second, seed 1 ...
audio_examples = 200
image_loss = "next"

width = 96
layers = 3
learning_rate = 2e-3
warm_start_steps = 400
steps = 600
eval_interval = 100
