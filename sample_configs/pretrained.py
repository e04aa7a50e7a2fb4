"""The paper's regime on your own data: DINOv2, fine-tuned on your pictures, beside sentences on the classes.

Pictures are Parquet files as `huggingface-cli download` leaves them; a folder of class folders works as well.
Sentences are a .json of {class: [sentence, ...]}; no sentence belongs to a picture. They are read once by a
frozen encoder, whose vectors are stored.
    pip install timm transformers pyarrow
    python train.py sample_configs/pretrained.py --image=parquet:/my/pictures --text=file:/my/sentences.json
    python probe.py compare sample_configs/pretrained.py --arms=alone,head,uml,control ...
For a GPU, and not measured on one by us. Memory: weights, gradients and AdamW take 16 bytes a parameter
(0.4 GB for ViT-S, 1.4 GB for ViT-B), activations of 64 pictures at 224 pixels several GB: lower image_batch
first.
encoder_learning_rate=0 freezes the encoder; torchrun with --fsdp=True shards a large one over several GPUs.
"""
image = "parquet:/my/pictures"
text = "file:/my/sentences.json"
image_embed = "timm:vit_small_patch14_dinov2.lvd142m"   # any timm name, or timm:/a/local/folder
text_encoder = "hf:sentence-transformers/all-MiniLM-L6-v2"
image_loss = "label"
text_loss = "label"
image_size = 224
patch_size = 16           # how pictures are stored; the encoder cuts its own patches
image_shift = 0
image_flip = True         # wrong where left and right matter
image_crop = 0.35         # crops of 35% of the area and more
image_colour = 0.4        # as timm's own training default

layers = 0                # no trunk: a projection per slot and the label head they share
width = 384
head_from = "text"        # the head starts at the text's class means
temperature = True
schedule = "joint"
learning_rate = 1e-3
encoder_learning_rate = 0.02   # a factor on learning_rate: 2e-5
weight_decay = 0.1
text_batch = 256
steps = 2000
eval_interval = 200
