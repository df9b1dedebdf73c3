"""How long a state remembers: timescales, autocorrelation, ages, decomposition, updates."""
