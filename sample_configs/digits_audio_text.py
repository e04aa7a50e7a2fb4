"""Spoken digits of an unheard speaker, 200 labelled clips of four others, helped by sentences about digits.

FSDD (10 MB) is fetched once, the sentences are generated. Two CPU cores: about a minute. Test accuracy over six speakers, three seeds each
(seeds 0 to 17): mean 0.69, without text 0.64, p = 0.04. A speaker matters more: their means go from 0.40 to 0.85, without text from 0.31 to 0.82.
    python train.py sample_configs/digits_audio_text.py
    python train.py sample_configs/digits_audio_text.py --text= --out_dir=out/digits_alone
"""
target = "audio"
audio = "fsdd"
text = "digits"            # names, neighbours and sounds of the ten digits
audio_test_group = "each"  # seed 0 is tested on the first speaker and validated on the second, seed 1 ...
audio_examples = 200
text_loss = "next+label"   # either alone helped less, or not at all

width = 96
layers = 3
text_batch = 32
learning_rate = 5e-3
weight_decay = 0.5
warm_start_steps = 200     # text alone
steps = 400
eval_interval = 50
