"""Copy the readable part of a damaged trace to a new file."""
