"""Sounds of the shapes world, 4 labelled ones a class, beside sentences about other scenes: a case where text does harm.

Offline. Two CPU cores: about a minute. Test accuracy over seeds 0 to 5: 0.75 to 0.77; without text 0.77 to 0.80, with shuffled text as good.
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
