"""Programs for developers of grutrace. They are not installed."""
