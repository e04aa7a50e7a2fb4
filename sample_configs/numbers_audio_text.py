"""A hundred numbers, spoken by someone never heard before: TWO labelled clips each, beside how they read.

A clip is two real recordings of one speaker (Free Spoken Digit Dataset), joined by us: "three", "seven" is
'three seven'. Text says "37", "thirty-seven", "seven after three"; nothing pairs the two. FSDD (10 MB) is
fetched once. The seed chooses the speakers of test and validation. Two CPU cores: a minute or two.
Test accuracy over six speakers, decay 16 or 32: 0.41 to 0.71, mean 0.60; without text 0.21 to 0.46, 0.37.
    python train.py sample_configs/numbers_audio_text.py
    python train.py sample_configs/numbers_audio_text.py --text= --out_dir=out/numbers_alone
    python probe.py compare sample_configs/numbers_audio_text.py --seeds=6
"""
target = "audio"
audio = "numbers"
text = "numbers"
audio_loss = "label"
text_loss = "label"       # through the same label head: text says of which two words a number is made
audio_examples = 200      # two clips for each of 100 numbers; 1 clip: 100, 4: 400
audio_test_group = "each"
audio_frames = 128        # 1.28 s: cuts a quarter of what the slowest speaker says, little of the rest
audio_embed = "conv"
label_smoothing = 0.1

width = 128
layers = 1
learning_rate = 3e-3
weight_decay = 16.0       # with one clip a number 1.5
warm_start_steps = 300    # text alone
steps = 700
eval_interval = 350
