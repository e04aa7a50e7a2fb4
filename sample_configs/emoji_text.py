"""Emoji in colour, ONE picture each of 3,242, drawn by one designer; 400 more have no picture, only a name.

Trained on Facebook's drawings, tested on Google's. assets/results/emoji.py makes the folder and the texts
from npm packages. It is also an example of own data: any folder of pictures and any .json of texts will do.
Two to four minutes on one thread. Test accuracy 0.28 with names, 0.25 without; a plain ConvNet has 0.29.
    python assets/results/emoji.py data/emoji --packages=FOLDER
    python train.py sample_configs/emoji_text.py
    python train.py sample_configs/emoji_text.py --text= --out_dir=out/emoji_alone
"""
image = "folder:data/emoji/emoji"
text = "file:data/emoji/emoji.json"
image_loss = "label"
text_loss = "label"       # names say of what an emoji is composed: "woman health worker: dark skin tone"
unseen_classes = 400      # or: --unseen_classes=0 '--unseen_like=_medium(_and|$)', no medium skin tone
image_embed = "conv"
standard_weights = True   # better for pictures in colour
equal_contrast = False    # brightness and colour tell skin tones apart
image_shift = 2
image_affine = 0.06
label_smoothing = 0.1

width = 128
layers = 1
learning_rate = 1e-3
weight_decay = 1.5
warm_start_steps = 300    # names alone
steps = 3000
eval_interval = 1000
