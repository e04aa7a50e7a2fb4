"""The theory's linear world through the ordinary loop: a shared autoencoder; x shows nine of the ten shared latents at a twentieth.

The bottleneck has room for all 15 causes of an item and one more; with room for 10 alone is the better. R^2 of the
shared latents, four seeds: 0.57 from 5,000 x + 5,000 y, 0.49 from 10,000 x. Without the block (layers=0) or at 3,000 steps they do not differ.
Offline. Two CPU cores: half a minute.
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
bottleneck = 16
image_batch = 256
text_batch = 256
width = 64
layers = 1
learning_rate = 1e-3
steps = 1000
eval_interval = 500
