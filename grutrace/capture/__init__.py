"""Find the GRUs of a live model, observe their calls and record them."""
