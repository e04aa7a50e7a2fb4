"""The numbers in print, ONE labelled picture each, tested in unseen typefaces; beside them the spoken ones.

There is little to gain: test accuracy over eight seeds 0.94 to 1.00, without clips 0.90 to 0.98.
    python train.py sample_configs/numbers_image_audio.py
    python train.py sample_configs/numbers_image_audio.py --audio= --out_dir=out/printed_alone
    python train.py sample_configs/numbers_image_audio.py --audio= --text=numbers --out_dir=out/printed_text
"""
image = "numbers"
audio = "numbers"
image_loss = "label"
audio_loss = "label"
text_loss = "label"       # where text is on, see above
image_examples = 100      # one for each of 100 numbers
audio_frames = 128
image_embed = "conv"
audio_embed = "conv"
audio_batch = 32          # half the default: a clip costs as much as a picture, so a run takes two minutes
image_shift = 2
image_affine = 0.06
label_smoothing = 0.1

width = 128
layers = 1
learning_rate = 3e-3
weight_decay = 4.0
warm_start_steps = 300    # clips alone
steps = 700
eval_interval = 350
