"""From recorded arrays to results."""
