"""Pictures of coloured shapes, helped by sentences about other coloured shapes."""
image = "shapes"
text = "shapes"
image_loss = "label"
text_loss = "label"
image_examples = 560
unseen_classes = 8
image_embed = "conv"
image_flip = True
steps = 800
warm_start_steps = 300
