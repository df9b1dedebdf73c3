"""Which sequence each batch row of a call belongs to."""
