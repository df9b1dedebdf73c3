"""Watching a live model: finding its GRUs, listening to their calls, recording what they did."""
