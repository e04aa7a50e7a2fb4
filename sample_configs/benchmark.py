"""The reference shape for speed: batch 64, 64 continuous tokens, width 128, 4 layers, 4 heads, next patch.

    python assets/results/speed.py sample_configs/benchmark.py    # ms a step, GFLOP/s, where the time goes
"""
image = "letters"
image_loss = "next"
patch_size = 4
image_batch = 64
width = 128
layers = 4
heads = 4
