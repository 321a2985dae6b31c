"""MoE-SVD-Distill."""
