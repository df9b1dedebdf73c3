"""Find the sequence that each batch row of a call belongs to."""
