# SPDX-License-Identifier: Apache-2.0
"""What scripts/demo prints: three containers on one host, and what each sees of its GPUs; or one with a script."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from containers import Bundle, make_image

_LOOK = """
echo '$ nvidia-smi -L'
nvidia-smi -L
echo '$ ls /dev | grep nvidia'
ls /dev | grep nvidia || echo '(none)'
echo '$ ldconfig -p | grep libcuda.so.1'
ldconfig -p | grep libcuda.so.1 || echo '(not found)'
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtime", type=Path, help="nvidia-container-runtime as installed")
    parser.add_argument("--config", type=Path, help="config.toml of a simulated host")
    parser.add_argument("--script", type=Path, help="run this in one container with all GPUs, and nothing else")
    options = parser.parse_args()
    if options.config:
        print(f"This machine has no NVIDIA GPU. Simulated host: {options.config.parent}, two A100, driver 550.163.01.")
    else:
        version = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
        print(f"Real host: {os.uname().nodename}. {version}")
    failed = False
    with tempfile.TemporaryDirectory(prefix="nvhook-demo-") as name:
        place = Path(name)
        place.chmod(0o755)
        requests = ("all",) if options.script else ("all", "0", None)
        for number, devices in enumerate(requests):
            image = make_image("debian", place / f"rootfs{number}")
            env = {} if devices is None else {"NVIDIA_VISIBLE_DEVICES": devices}
            print(f"\n=== a container with {'no request' if devices is None else f'NVIDIA_VISIBLE_DEVICES={devices}'}")
            script = _LOOK if devices is not None else _LOOK.replace("nvidia-smi -L\necho", "nvidia-smi -L 2>&1\necho")
            if options.script:
                script = options.script.read_text()
            result = (
                Bundle(place / f"bundle{number}", image)
                .write(["/bin/sh", "-c", script], env)
                .run(options.config, wrapper=options.runtime)
            )
            print(result.stdout, end="")
            if result.returncode:
                failed = True
                print(result.stderr, file=sys.stderr, end="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
