"""TensorBoard and Weights & Biases: what a run is told of, sent on to those that the recipe names (`report_to`)."""

from moe_svd_distill.tracking.run import require_trackers, tracked

__all__ = ["require_trackers", "tracked"]
