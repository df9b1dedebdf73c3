"""`grutrace run`: run an unchanged script, and trace the GRUs of every model in it."""
