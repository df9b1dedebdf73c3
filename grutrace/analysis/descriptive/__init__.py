"""Distributions of gates and states: saturation, moments, quantiles, geometry."""
