#!/usr/bin/env bash
# Installs what is needed, builds everything, and compares every kernel on every device of this
# machine with the f64 oracle, on the queries, keys and values of a real model.
#   examples/minilm/compare.sh [more options of tandem compare...]
set -euo pipefail
cd "$(dirname "$0")/../.."

.ci/install_dependencies
cmake --preset release >/dev/null
cmake --build --preset release
data=examples/minilm/data
exec build/release/bin/tandem compare --q $data/q.npy --k $data/k.npy --v $data/v.npy \
  --mask $data/mask.npy "$@"
