"""CIFAR-10, 1,000 labelled pictures, beside 97,840 sentences (CuPL) on the classes of 14 picture datasets.

CIFAR-10 (170 MB) and CuPL (8 MB) are fetched once. Two CPU cores: a minute or two.
Expect about 0.60 with these sentences, 0.61 without: ten classes have no structure that text could name.
With all 45,000 labels (--image_examples=-1 --steps=6000 --learning_rate=2e-3 --weight_decay=0.5): 0.80.
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
standard_weights = True   # worth six points on photographs

width = 128
layers = 1
text_batch = 16
learning_rate = 4e-3
weight_decay = 3.0
warm_start_steps = 300    # text alone
steps = 800
eval_interval = 200
