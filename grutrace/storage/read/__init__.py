"""From a file, or from memory, to traces, sites and sequences."""
