"""Gradients through time: of states, gates, pre-activations and inputs."""
