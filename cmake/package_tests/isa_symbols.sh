#!/usr/bin/env bash
# Object files compiled for an instruction set beyond the baseline define no weak symbol: the linker
# might choose that copy of an inline function for a caller that runs on any CPU.
#   isa_symbols.sh <object files...>
set -euo pipefail
if [ $# -eq 0 ]; then
  echo "no object files given" >&2
  exit 1
fi
found=0
for object in "$@"; do
  # W, V: weak; u: unique; of those, only what this object defines.
  if weak=$(nm -C --defined-only "$object" | grep -E '^[0-9a-f]+ [WVu] '); then
    echo "$object defines weak symbols:" >&2
    head -5 <<<"$weak" >&2
    found=1
  fi
done
[ "$found" -eq 0 ] && echo "$# object files define no weak symbol"
exit "$found"
