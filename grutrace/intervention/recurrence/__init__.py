"""The recurrence of one direction of a layer, step by step, with values that are set."""
