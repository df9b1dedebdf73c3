"""Makes hostile trace files and judges how grutrace reads them: ``python -m tools.hostile``."""
