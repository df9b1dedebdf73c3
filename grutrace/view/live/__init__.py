"""The live view of a trace in a browser."""
