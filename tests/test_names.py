"The exported modules use no name that they do not define or import."
import subprocess, sys

import keep


def test_no_undefined_names():
    rules = "E9,F63,F7,F82,F401,F403"  # syntax, names undefined, imported for nothing or by star
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--output-format=concise",
               f"--select={rules}", "--per-file-ignores=__init__.py:F401", keep.PACKAGE]
    done = subprocess.run(command, cwd=keep.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
