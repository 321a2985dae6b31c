"""A pass as a program of its own, to be killed: ``python -m tests.streaming.driver MODEL ADAPTER IDS FOLDER LAYERS``.

Prints a line when a layer's results are on the disk, and waits for its end after as many layers as it is told.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from moe_svd_distill.checkpoints import open_checkpoint
from moe_svd_distill.streaming import PassSettings, ScaledAdapter, stream_states
from tests.support.passes import one_thread_and_a_journal_of_every_layer


def main() -> None:
    """Run the pass."""
    model, adapter, ids, folder, layers = sys.argv[1:]

    def show(done: int, total: int) -> None:
        print("done", done, flush=True)
        if done == int(layers):
            time.sleep(600)

    sequences = np.load(ids)
    settings = PassSettings(batch_tokens=2 * sequences.shape[1])
    with one_thread_and_a_journal_of_every_layer():
        stream_states(
            open_checkpoint(model),
            sequences,
            Path(folder),
            settings,
            adapter=ScaledAdapter(Path(adapter)),
            on_progress=show,
        )


if __name__ == "__main__":
    main()
