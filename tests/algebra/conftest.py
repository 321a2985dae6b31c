"""One thread: small matrices gain nothing from more, and a busy machine loses much."""

import sklearn.cluster  # noqa: F401  loads the libraries whose threads are limited
import torch
from threadpoolctl import threadpool_limits

torch.set_num_threads(1)
threadpool_limits(1)
