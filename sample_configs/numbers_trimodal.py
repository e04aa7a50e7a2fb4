"""The same hundred numbers heard, in print and in words: three modalities in one trunk, never paired.

Test accuracy over six speakers, decay 4: 0.38 to 0.64, mean 0.55; not shown to be more than with print alone.
    python train.py sample_configs/numbers_trimodal.py
    python train.py sample_configs/numbers_trimodal.py --image= --text= --out_dir=out/numbers_alone
    python probe.py compare sample_configs/numbers_trimodal.py --seeds=6
"""
target = "audio"
audio = "numbers"
image = "numbers"
text = "numbers"
audio_loss = "label"
image_loss = "label"
text_loss = "label"       # all three through the same label head
audio_examples = 200      # two clips a number
audio_test_group = "each"
audio_frames = 128
audio_embed = "conv"
image_embed = "conv"
image_batch = 32
image_shift = 2
image_affine = 0.06
label_smoothing = 0.1

width = 128
layers = 1
learning_rate = 3e-3
weight_decay = 4.0
warm_start_steps = 300    # pictures and text in turn
steps = 700
eval_interval = 350
