"""A PEFT LoRA adapter: its keys, its configuration, checking, merging and exporting it."""
