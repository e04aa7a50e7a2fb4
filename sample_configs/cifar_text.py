"""CIFAR-10, 1,000 labelled pictures, beside 97,840 sentences (CuPL) on the classes of 14 picture datasets.

CIFAR-10 (170 MB) and CuPL (8 MB) are fetched once. Two CPU cores: about three minutes.
Expect about 0.52 with these sentences and without: ten classes have no structure that text could name.
    python train.py sample_configs/cifar_text.py
    python train.py sample_configs/cifar_text.py --text= --out_dir=out/cifar_alone
"""
image = "cifar10"
text = "cupl"
image_loss = "label"
text_loss = "next"        # "label" would use the text's own 2,478 classes, CIFAR's ten among them
image_examples = 1000
image_embed = "conv"
image_flip = True

width = 128
layers = 1
text_batch = 16
learning_rate = 2e-3
weight_decay = 1.5
warm_start_steps = 300    # text alone
steps = 800
eval_interval = 200
