"""Attention in O(L) memory with forward-mode, reverse-mode and mixed derivatives."""
