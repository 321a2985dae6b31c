"""Fits from cached states: what a little text and one pass of each model say about the student's weights.

Nothing here runs a model; it works on final hidden states that `streaming` has left on the disk.
"""
