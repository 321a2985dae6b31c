"""GGUF files, the format of llama.cpp, as checkpoints: names, configuration and numbers as transformers has them.

Imported when a GGUF file is opened, and nothing but numpy with it: torch comes with the first tensor, transformers with
the tokenizer.
"""
