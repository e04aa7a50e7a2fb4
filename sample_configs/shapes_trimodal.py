"""Three modalities, none paired: pictures of shapes (4 labelled ones a class), sentences and sounds of other scenes.

Offline. Minutes on two CPU cores. Untuned, and not compared yet: claims nothing.
    python train.py sample_configs/shapes_trimodal.py
    python train.py sample_configs/shapes_trimodal.py --audio= --out_dir=out/shapes_bimodal
"""
image = "shapes"
text = "shapes"
audio = "shapes"
text_loss = "label"
audio_loss = "label"
image_examples = 256
image_embed = "conv"
image_flip = True

width = 96
layers = 3
text_batch = 32
learning_rate = 6e-3
warm_start_steps = 300
steps = 1000
eval_interval = 200
