"""The refined stage: LoRA factors trained on the teacher's exact distributions, the student in memory or streamed."""
