"""Gates as tensors in the graph of the model's own forward, and gradients through them."""
