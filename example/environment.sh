# Sourced by the scripts: makes the virtual environment .venv at the repository's root, installs
# what the named requirement files ask for, and sets PYTHON. A second call does nothing.
#
#   source example/environment.sh requirements.txt [requirements-dev.txt]

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$root/.venv/bin/python"

find_python() {
  local name
  for name in python3 python3.12 python3.11; do
    if "$name" -c 'import sys; raise SystemExit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
      2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: Python 3.11 or 3.12 is needed and was not found; install one of them" >&2
  return 1
}

if [ ! -x "$PYTHON" ]; then
  echo "making the virtual environment .venv"
  "$(find_python)" -m venv "$root/.venv"
fi

wanted="$(mktemp)"
for file in "$@"; do
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    sed 's/ *; extra == "gpu"//' "$root/$file" >>"$wanted"
  else
    cat "$root/$file" >>"$wanted"
  fi
done
stamp="$root/.venv/installed-$(cksum <"$wanted" | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
  echo "installing $* (a few minutes, once)"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$wanted"
  touch "$stamp"
fi
rm -f "$wanted"
