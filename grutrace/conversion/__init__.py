"""nn.GRU layers from the weights of other libraries."""
