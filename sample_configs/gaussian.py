"""The theory's linear world through the ordinary loop: a shared autoencoder, x attenuates nine of the ten shared latents.

At equal sample budgets this trunk has shown no gain so far (R^2 of the latents 0.44 against 0.46 alone, one seed).

Offline. Two CPU cores: about a minute.
    python train.py sample_configs/gaussian.py                                                                     # 5,000 x + 5,000 y
    python train.py sample_configs/gaussian.py --text= --image_examples=10000 --out_dir=out/gaussian_alone         # 10,000 x
"""
image = "gaussian:x"
text = "gaussian:y"
image_loss = "reconstruct"
text_loss = "reconstruct"
image_examples = 5000
text_examples = 5000
mask_ratio = 0.0
bottleneck = 10
image_batch = 256
text_batch = 256
width = 64
layers = 1
learning_rate = 3e-3
steps = 2000
eval_interval = 500
