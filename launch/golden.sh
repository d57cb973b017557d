#!/usr/bin/env bash
# Compares the smoke study of two checkouts on this machine: packed files by hash, EERs by value.
#
# Runs each with the active environment's python. On one machine a study gives the same bits every time. Files are compared
# whatever their names. CONFIG is configs/quickstart.py:smoke where it is left out.
#
# Usage: launch/golden.sh OLD_CHECKOUT NEW_CHECKOUT [CONFIG]
# Example: launch/golden.sh ../before .
set -euo pipefail
old=$(cd "$1" && pwd) new=$(cd "$2" && pwd) config=${3:-configs/quickstart.py:smoke}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for side in old new; do
  (cd "${!side}" && python -m kmq_jax.study --config="$config" --workdir="$work/$side" >"$work/$side.log" 2>&1) ||
    { tail -n 20 "$work/$side.log"; exit 1; }
done
files() { (cd "$work/$1" && find . -name '*.kmq' | xargs sha256sum | cut -d' ' -f1 | sort); }
eers() { (cd "$work/$1" && grep -rhoE '"(reference_)?eer": [0-9.]+' --include='*.json' metrics | sort); }
diff <(files old) <(files new) && diff <(eers old) <(eers new) &&
  echo "the same: $(files new | wc -l) packed files, $(eers new | wc -l) EERs"
