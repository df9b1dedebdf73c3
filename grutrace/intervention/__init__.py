"""Interventions: hold or change gates and states while a model runs."""
