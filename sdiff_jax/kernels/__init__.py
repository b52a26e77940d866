"""Attention kernels with a tangent."""
