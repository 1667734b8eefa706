"""Is lm_nb/ what the notebooks export?  python tools/export.py

The export is tried in a copy, so that the answer is the same with work under way, and nothing here is touched.
"""
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'lm_nb'


def main():
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)
        for name in ('pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(ROOT / name, copy)
        for name in ("nbs", PACKAGE): shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb*"))
        env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
        subprocess.run([Path(sys.executable).parent / 'nbdev-export'], cwd=copy, env=env, check=True)
        names = sorted({p.name for d in (ROOT, copy) for p in (d / PACKAGE).glob('*.*')})
        _, differ, missing = filecmp.cmpfiles(ROOT / PACKAGE, copy / PACKAGE, names, shallow=False)
    if differ + missing: sys.exit(f'{PACKAGE}/ is not what the notebooks export: {", ".join(sorted(differ + missing))}. Run nbdev-export.')
    print(f'{len(names)} files agree')


if __name__ == '__main__': main()
