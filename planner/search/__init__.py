"""Searches the configurations of an engine: closed form screens, Optuna refines."""
