"""Sounds of the shapes world, 4 labelled ones a class, helped by sentences about other scenes.

Offline. Minutes on two CPU cores. Untuned, and not compared yet: claims nothing.
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
learning_rate = 6e-3
warm_start_steps = 300
steps = 1000
eval_interval = 200
