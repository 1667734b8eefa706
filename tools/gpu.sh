#!/usr/bin/env bash
# What a CUDA card does with this workbook, in one call of so many minutes, without a network:
#
#   tools/gpu.sh [MINUTES] [--dry] [FOLDER OF WHEELS]
#
# From the folder of wheels (or WHEELS=FOLDER) it installs what Python cannot import yet. PYTHON
# names the interpreter: .venv's if there is one, else python3. DRY=1 is --dry. What comes out, and
# where: tools/gpu.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wheels=${WHEELS:-} words=()
for word in "$@"; do
  if [[ -d $word ]]; then wheels=$word; else words+=("$word"); fi
done
[[ ${DRY:-0} == 0 || ${DRY:-} == '' ]] || words+=(--dry)
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

missing() {  # packages that cannot be imported: those that lm_nb needs, or those that are named
  "$python" - "$@" <<'PY'
import importlib.util, re, sys, tomllib
project = tomllib.load(open('pyproject.toml', 'rb'))['project']
needed = [re.match(r'[\w-]+', line)[0] for line in project['dependencies']] + ['pytest']
for name in sys.argv[1:] or needed:
    if importlib.util.find_spec(name.replace('-', '_')) is None: print(name)
PY
}
install() {
  PIP_BREAK_SYSTEM_PACKAGES=1 "$python" -m pip install -q --no-index --find-links "$wheels" "$@"
}

if needed=$(missing) && [[ -n $needed ]]; then
  [[ -n $wheels ]] || {
    echo "tools/gpu.sh: not installed:" $needed "(WHEELS=FOLDER names a folder of wheels)" >&2
    exit 2
  }
  install $needed
fi
if [[ -n $wheels && -n $(missing transformers) ]]; then
  install transformers || echo "tools/gpu.sh: goes on without the transformers library" >&2
fi
exec "$python" tools/gpu.py --spent "$SECONDS" ${words[@]+"${words[@]}"}
