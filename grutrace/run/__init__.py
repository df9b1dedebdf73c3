"""`grutrace run`: an unchanged script, with the GRUs of every model in it traced."""
