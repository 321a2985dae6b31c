"""A pair of real models: the product beside a plain PEFT LoRA, on the same text, measured by neither's code."""
