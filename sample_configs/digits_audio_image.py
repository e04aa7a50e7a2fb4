"""Spoken digits of an unheard speaker, 200 labelled clips of four others, helped by pictures of anything.

FSDD (10 MB) and CIFAR-10 (170 MB) are fetched once; offline, --image=shapes. Untuned, and not compared yet: claims nothing.
    python train.py sample_configs/digits_audio_image.py
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
warm_start_steps = 200
steps = 400
eval_interval = 50
