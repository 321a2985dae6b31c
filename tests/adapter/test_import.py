from __future__ import annotations

import subprocess
import sys


def test_the_room_opens_without_the_heavy_libraries() -> None:
    code = (
        "import sys, moe_svd_distill.adapter\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
