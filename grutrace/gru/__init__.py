"""The arithmetic of a GRU: its equations, the layout of its steps, and the replay of a call."""
