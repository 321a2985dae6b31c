"""The command line. Commands are imported when they are asked for: ``--help`` answers before torch is loaded."""

from moe_svd_distill.cli.main import main

__all__ = ["main"]
