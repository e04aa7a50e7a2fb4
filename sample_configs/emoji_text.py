"""Emoji in colour, ONE picture each of 3,242 drawn by one designer, and names of 3,642: the rest has no picture.

Trained on Facebook's, tested on Google's. assets/results/emoji.py makes the folder and the texts from npm
packages. It is also an example of own data: any folder of pictures and any .json of texts will do.
    python assets/results/emoji.py data/emoji --packages=FOLDER
    python train.py sample_configs/emoji_text.py
    python train.py sample_configs/emoji_text.py --text= --out_dir=out/emoji_alone
"""
image = "folder:data/emoji/emoji"
text = "file:data/emoji/emoji.json"
image_loss = "label"
text_loss = "label"
unseen_classes = 400
image_embed = "conv"
image_shift = 2
image_affine = 0.06
label_smoothing = 0.1

width = 128
layers = 1
learning_rate = 3e-3
weight_decay = 1.5
warm_start_steps = 300
steps = 3000
eval_interval = 500
