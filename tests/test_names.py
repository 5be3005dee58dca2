"The code uses no name that it does not define or import, and reads without scrolling."
import subprocess, sys

import pytest

import keep

LONGEST, MOST = 120, 30  # characters of a line; lines of an export cell
RULES = "E9,F63,F7,F82,F401,F403,E501,E702,E703,E711,E712,E713,E714,E722"  # syntax, names, imports; long, joined lines
UNLESS = ["__init__.py:F401", "tests/*:F401",  # names for others; fixtures
          f"{keep.PACKAGE}/*:E501"]            # lists of names that nbdev writes; the notebooks are checked below


def ruff(*paths, rules=RULES):
    "What ruff finds in `paths`, a line for each."
    options = ["--isolated", "--no-cache", "--output-format=concise", "--exclude=_modidx.py", f"--select={rules}",
               f"--line-length={LONGEST}", *(f"--per-file-ignores={one}" for one in UNLESS)]
    command = [sys.executable, "-m", "ruff", "check", *options, *paths]
    done = subprocess.run(command, cwd=keep.ROOT, capture_output=True, text=True)
    return [] if done.returncode == 0 else (done.stdout + done.stderr).splitlines()


@pytest.mark.parametrize("path", [keep.PACKAGE, "tests", "docs", "nbs/records", "setup.py"])
def test_code_is_sound(path):
    found = ruff(path)
    assert not found, "\n".join(found)


def test_a_long_line_is_noticed(tmp_path):
    (tmp_path / "long.py").write_text("x = 1  # " + LONGEST*"-" + "\n")
    assert "E501" in ruff(tmp_path)[0]


def code(path): return [cell.source for cell in keep.code_cells(keep.read_nb(path))]


@pytest.mark.parametrize("path", keep.notebooks(), ids=lambda path: path.stem)
def test_cells_are_narrow_and_short(path):
    lines = [line for source in code(path) for line in source.splitlines() if not line.startswith("#|")]
    wide = [line for line in lines if len(line) > LONGEST]
    assert not wide, f"lines of more than {LONGEST} characters:\n" + "\n".join(wide)
    exports = [source for source in code(path) if source.startswith("#| export")]
    long = [source.splitlines()[1] for source in exports if len(source.splitlines()) > MOST]
    assert not long, f"export cells of more than {MOST} lines begin with:\n" + "\n".join(long)
