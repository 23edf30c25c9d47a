#!/bin/sh
# Says in a line each which system tools are missing and which Debian package has them, and whether
# the paths can be worked with. Exit code 1 if anything was said. Usage: check_tools.sh PYTHON
python=${1:-python3}
status=0

say() {
    echo "$*" >&2
    status=1
}

missing() {
    say "missing: $1; on Debian: apt-get install $2"
}

if ! command -v "$python" >/dev/null; then
    missing "$python (Python 3.10 or newer)" python3
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    missing "Python 3.10 or newer ($python is older)" python3
elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    missing "Python's venv module" python3-venv
fi
for tool in g++ make perl; do
    command -v $tool >/dev/null || missing $tool $tool
done

# `make` and Verilator's scripts take no such characters in a path, whatever the quoting.
for what in "checkout:$PWD" "TMPDIR:${TMPDIR:-/tmp}"; do
    case ${what#*:} in
        *[[:space:]\"\'\\\`\$\#%:\;\&\|\<\>\(\)\*\?\[\]]*)
            say "${what%%:*} ${what#*:}: a path with spaces, quotes or other special characters does" \
                "not work with make; use another folder" ;;
    esac
done
exit $status
