"""Text as both models see it: reading, dividing, tokenising."""
