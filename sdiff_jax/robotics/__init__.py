"""Robots: environments, experts that show a task, and what a policy sees of it."""
