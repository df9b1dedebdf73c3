"""Programs for those who develop grutrace. None of them is installed."""
