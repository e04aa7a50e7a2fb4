"""Spoken digits of an unheard speaker, 200 labelled clips of four others, helped by unpaired text.

FSDD (10 MB) and CuPL are fetched once. Untuned, and not compared yet: claims nothing.
    python train.py sample_configs/digits_audio_text.py
    python train.py sample_configs/digits_audio_text.py --text= --out_dir=out/digits_alone
"""
target = "audio"
audio = "fsdd"
text = "cupl"
audio_test_group = "each"  # seed 0 is tested on the first speaker and validated on the second, seed 1 ...
audio_examples = 200
text_loss = "next"

width = 96
layers = 3
learning_rate = 2e-3
warm_start_steps = 400
steps = 600
eval_interval = 100
