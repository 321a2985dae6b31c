"""Quantised checkpoints: which stored tensors make up which weight, and how its numbers come out of the codes.

Everything but ``decoding`` works on headers alone and imports no torch.
"""
