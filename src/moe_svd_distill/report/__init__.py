"""The pages about a run: the adapter's model card and one self-contained HTML file."""
