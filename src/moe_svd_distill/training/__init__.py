"""One trainer for the stages on text: LoRA pairs and the head, from any layer on, the student in memory or streamed."""
