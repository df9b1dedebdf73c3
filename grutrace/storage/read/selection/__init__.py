"""Selections: some sequences of a trace, as a trace of their own."""
