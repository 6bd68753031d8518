#!/usr/bin/env bash
# libtandem.so exports every function that tandem.h declares, and nothing else.
#   exports.sh <libtandem.so> <tandem.h>
set -euo pipefail
diff <(grep -oE 'TANDEM_API [^;(]*' "$2" | grep -oE 'tandem_[a-z_0-9]+$' | sort) \
  <(nm -D --defined-only "$1" | awk '$2 == "T" { sub(/@.*/, "", $3); print $3 }' | sort)
if nm -D --defined-only "$1" | awk '$2 != "T" && $2 != "A"' | grep .; then
  echo "these are exported beside the functions of tandem.h" >&2
  exit 1
fi
echo "libtandem.so exports the functions of tandem.h and nothing else"
