"""Spoken digits of an unheard speaker, 200 labelled clips of four others, beside pictures of something else: no help to be seen.

FSDD (10 MB) is fetched once. Two CPU cores: about half a minute. Mean test accuracy over the six speakers (seeds 0 to 5): 0.63 with
pictures of shapes or of CIFAR-10, 0.64 without; from 0.3 to 0.9, speakers differ far more.
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
