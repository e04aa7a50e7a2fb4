"""The paper's frozen-encoder setting: a vector an item from any encoder, a projection a slot, one label head.

Make two .npz files, then train: seconds. For pictures, with an encoder of yours (the text file likewise,
from sentences about the same `classes`; no sentence belongs to a picture):
    features, labels = [], []
    with torch.inference_mode():
        for pictures, targets in loader:               # any DataLoader
            features.append(encoder(pictures).float().cpu())
            labels.append(targets)
    numpy.savez("image.npz", features=torch.cat(features).numpy(), labels=torch.cat(labels).numpy(),
                classes=numpy.array(["cat", "dog"]))   # optional: split=numpy.array(["train", "test", ...])
    python train.py sample_configs/features.py --image_examples=58
    python train.py sample_configs/features.py --image_examples=58 --text= --out_dir=out/features_alone
With one labelled emoji of each of 58 classes, EfficientNet-Lite0 and MiniLM features, seeds 0 to 7: test
accuracy 0.26 +- 0.02, without text 0.23 +- 0.02 (emoji_frozen_1.json, with its command: 300 steps at a lower
rate; emoji_frozen_again_1: +1.6, fresh seeds).
"""
image = "npz:image.npz"
text = "npz:text.npz"
text_loss = "label"
layers = 0                # a projection per slot and the shared label head, nothing else
width = 384
head_from = "text"        # the head starts at the text's class means
temperature = True
learning_rate = 3e-3
weight_decay = 1.0
steps = 1000
eval_interval = 100
