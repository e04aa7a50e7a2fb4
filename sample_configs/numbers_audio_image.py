"""As numbers_audio_text.py, with the same numbers in print beside the clips instead of in words.

The pictures are '00' to '99' in eight typefaces, like careless scans, all labelled; none belongs to a clip.
Test accuracy over six speakers, decay 4 to 32: 0.42 to 0.77, mean 0.61; without pictures 0.21 to 0.46, 0.37.
    python train.py sample_configs/numbers_audio_image.py
    python probe.py compare sample_configs/numbers_audio_image.py --seeds=6
"""
target = "audio"
audio = "numbers"
image = "numbers"
audio_loss = "label"
image_loss = "label"      # through the same label head
audio_examples = 200
audio_test_group = "each"
audio_frames = 128
audio_embed = "conv"
image_embed = "conv"
image_batch = 32          # half the default: a picture costs as much as a clip, so a run takes two minutes
image_shift = 2
image_affine = 0.06
label_smoothing = 0.1

width = 128
layers = 1
learning_rate = 3e-3
weight_decay = 16.0
warm_start_steps = 300    # pictures alone
steps = 700
eval_interval = 350
