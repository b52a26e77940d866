"""Trained policies as functions of observations."""
