"""A start for your own data: pictures in class folders, and sentences about these classes. Copy it and edit.

Pictures are /my/pictures/CLASS/*; a tenth of each class is kept for validation, a tenth for the test. The
sentences are a .json of {class: [sentence, ...]}, or a .csv or .jsonl with text and label; none belongs to a
picture. Some hundred pictures take two CPU cores half a minute. Compare the accuracy at the end with the
share of your largest class, and with a run without text. One such pair proves little: compare runs enough.
    python train.py sample_configs/mine.py --image=folder:/my/pictures --text=file:/my/sentences.csv
    python train.py sample_configs/mine.py --image=folder:/my/pictures --text= --out_dir=out/mine_alone
    python probe.py compare sample_configs/mine.py --image=folder:/my/pictures --text=file:/my/sentences.csv
Recordings of 3 s: --target=audio --image= --audio=folder:/my/sounds --audio_embed=conv --audio_frames=300
"""
image = "folder:/my/pictures"     # or parquet:, npz:
text = "file:/my/sentences.json"  # empty: pictures alone
image_loss = "label"      # the folders' names are the labels
text_loss = "label"       # its classes are named as the folders; "next" for sentences without classes
image_examples = -1       # all; 100 answers "what if I had labelled only 100?"
image_size = 32           # 64 shows more and takes four times as long
image_fit = "pad"         # the whole picture, with white margins: "crop" fills the square and cuts heads off
image_embed = "conv"      # a small ConvNet makes one token of a picture
standard_weights = True   # worth six points on photographs, costs three on grey letters
image_flip = False        # True helps where left and right are alike (animals, not letters or hands)
image_affine = 0.1        # pictures are turned and stretched a little ...
image_shift = 4           # ... and moved by up to four pixels
label_smoothing = 0.1     # a label is believed to 90%

width = 128               # of the trunk that pictures and text share
layers = 1                # of it; deeper is slower, and few items do not need it
learning_rate = 2e-3      # lower it if the loss jumps
weight_decay = 0.5        # letters, one each, like 4.0: compare '--search=weight_decay=0.5;weight_decay=4.0'
image_batch = 64          # ten thousand pictures and more: 128 or 256
text_batch = 16
warm_start_steps = 100    # on text alone, before the first picture
steps = 600               # 100 times through 400 pictures; for ten thousand start with 3000
eval_interval = 100       # of these validations the best is tested, so too many steps cost only time
