"""Programming problems: completions by the models, run under limits, counted as pass@1 before and after."""
