"""The theory's linear world through the ordinary loop: a shared autoencoder. y's structure helps x a little; more steps on x help more.

x shows one of the ten shared latents in full and nine at a twentieth, y shows all; 16 units have room for the 15 causes of an item. R^2 of
the shared latents, seeds 10 to 17: 0.54 from 5,000 x + 5,000 y, 0.46 from 5,000 x, 0.47 from 10,000; 0.38 with y's numbers shuffled, 0.73
from 5,000 x alone with as many FLOPs. Offline. Two CPU cores: half a minute.
    python train.py sample_configs/gaussian.py                                                                     # 5,000 x + 5,000 y
    python train.py sample_configs/gaussian.py --text= --image_examples=10000 --out_dir=out/gaussian_alone         # 10,000 x
    python probe.py compare sample_configs/gaussian.py --arms=alone,uml,control,longer
"""
image = "gaussian:x"       # no picture: a slot's name is only a name
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
