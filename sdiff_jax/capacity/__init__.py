"""Capacity planning: memory, traffic and modeled time of programs on devices elsewhere."""
