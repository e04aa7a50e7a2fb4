"""The reference shape for speed: batch 64, 64 continuous tokens, width 128, 4 layers, 4 heads, next patch.

    python train.py sample_configs/benchmark.py --benchmark=True
"""
image = "letters"
image_loss = "next"
patch_size = 4
image_batch = 64
width = 128
layers = 4
heads = 4
