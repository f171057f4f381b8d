"""Run what the README shows: each line of its bash blocks, and its Python blocks as scripts on two ranks.

python -m tests.run_readme --skip "bash tests/run.sh" "bash launch/quickstart.sh"
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A gloo thread that frees its last work while the interpreter shuts down aborts the process, with or without a hook
# (1 exit in 30 here; pytorch/pytorch 157193 and others). By this line the block has done all that it shows.
LEAVE = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def main(skip: set[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        for number, block in enumerate(blocks("python")):
            script = Path(folder) / f"snippet_{number}.py"
            script.write_text(block + LEAVE)
            print(f"README: Python block {number + 1}", flush=True)
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
            subprocess.run(launch, check=True, env=environment, cwd=folder)
    for command in "".join(blocks("bash")).splitlines():
        if command.split("  #")[0].strip() not in skip:
            print(f"README: {command}", flush=True)
            subprocess.run(["bash", "-c", command], check=True, cwd=ROOT)


if __name__ == "__main__":
    main(set(sys.argv[2:]) if sys.argv[1:2] == ["--skip"] else set())
