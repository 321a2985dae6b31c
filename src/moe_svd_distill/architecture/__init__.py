"""What a model is made of, derived from transformers' own modules on the meta device: no entry for any architecture."""
