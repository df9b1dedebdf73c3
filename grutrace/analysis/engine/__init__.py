"""How analyses read rows, split the work and return results."""
