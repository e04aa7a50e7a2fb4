"""The paper's frozen-encoder setting: one vector an item from any encoder, through a projection per slot and one shared label head.

As shipped, offline: the shapes world through encoders that nobody trained (random filters, random word vectors), 1 labelled picture a
class. Two CPU cores: half a minute to prepare, once, then seconds. Test accuracy over seeds 10 to 17: 0.27 to 0.30, without text 0.20 to
0.24. At 4 a class (--image_examples=256) 0.48 and 0.46, at 10 no difference.
    python train.py sample_configs/features.py
    python train.py sample_configs/features.py --text= --out_dir=out/features_alone
With an encoder of yours, here `encoder` for pictures (the text file likewise, with the same `classes`):
    features, labels = [], []
    with torch.inference_mode():
        for pictures, targets in loader:               # any DataLoader
            features.append(encoder(pictures).float().cpu())
            labels.append(targets)
    numpy.savez("image.npz", features=torch.cat(features).numpy(), labels=torch.cat(labels).numpy(),
                classes=numpy.array(["cat", "dog"]))   # optional: split=numpy.array(["train", "test", ...]) for every row
    python train.py sample_configs/features.py --image=npz:image.npz --text=npz:text.npz --image_examples=200
With one labelled emoji of each of 58 classes, EfficientNet-Lite0 and MiniLM features, test accuracy over seeds 0 to 7: 0.26 +- 0.02,
without text 0.23 +- 0.02 (result emoji_frozen_1).
"""
image = "frozen"
text = "frozen"
text_loss = "label"
image_examples = 64       # one a class
layers = 0                # a projection per slot and the shared label head, nothing else
width = 384
head_from = "text"        # the head starts at the text's class means
temperature = True
learning_rate = 3e-3
weight_decay = 1.0
steps = 1000
eval_interval = 100
