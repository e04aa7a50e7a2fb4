"""A hundred numbers spoken by someone never heard before, TWO labelled clips each; beside them how they read.

    python train.py sample_configs/numbers_audio_text.py
"""
target = "audio"
audio = "numbers"
text = "numbers"
audio_loss = "label"
text_loss = "label"       # through the same label head: text says that every number is made of two digits
audio_examples = 200      # two clips for each of 100 numbers
audio_test_group = "each"
audio_frames = 112        # two digits take about a second
audio_embed = "conv"
label_smoothing = 0.1

width = 128
layers = 1
learning_rate = 3e-3
weight_decay = 1.5
warm_start_steps = 300    # text alone
steps = 800
eval_interval = 400
