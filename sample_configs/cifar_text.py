"""CIFAR-10 pictures, helped by 97,840 sentences that describe the classes of 14 datasets; nothing is paired."""
image = "cifar10"
text = "cupl"
image_loss = "label"
text_loss = "next"
image_examples = 1000
image_embed = "conv"
image_flip = True
width = 96
layers = 3
steps = 1200
warm_start_steps = 600
eval_interval = 200
