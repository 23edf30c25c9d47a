#!/bin/sh
# Names the first missing system tool and the Debian package that has it. Usage: check_tools.sh PYTHON
python=${1:-python3}

missing() {
    echo "missing: $1; on Debian: apt-get install $2" >&2
    exit 1
}

command -v "$python" >/dev/null || missing "$python (Python 3.10 or newer)" python3
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    missing "Python 3.10 or newer ($python is older)" python3
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing "Python's venv module" python3-venv
command -v g++ >/dev/null || missing g++ g++
command -v make >/dev/null || missing make make
command -v perl >/dev/null || missing perl perl
