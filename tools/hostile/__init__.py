"""Make hostile trace files and judge how grutrace reads them: ``python -m tools.hostile``."""
