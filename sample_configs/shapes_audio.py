"""Sounds of the shapes world, 4 labelled ones a class, beside sentences about other scenes: a case where text does NOT help.

Offline. Two CPU cores: about a minute. On validation (seeds 1000, 1001) alone reaches 0.80, with the sentences 0.75 to 0.78.
    python train.py sample_configs/shapes_audio.py
    python train.py sample_configs/shapes_audio.py --text= --out_dir=out/shapes_audio_alone
"""
target = "audio"
audio = "shapes"
text = "shapes"
text_loss = "label"
audio_examples = 256

width = 96
layers = 3
text_batch = 32
learning_rate = 3e-3
weight_decay = 0.5
warm_start_steps = 300    # text alone
steps = 800
eval_interval = 200
