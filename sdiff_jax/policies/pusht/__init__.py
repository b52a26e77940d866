"""The Push-T environment, its scripted expert, observations and rollouts."""
