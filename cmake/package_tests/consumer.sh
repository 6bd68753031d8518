#!/usr/bin/env bash
# Installs a build, then builds and runs examples/consumer against it by CMake and by pkg-config;
# moves the installation and does so again.
#   consumer.sh <build directory> <source directory>
set -euo pipefail
build=$1
source=$2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

expect() {  # expect <output> <command...>
  local expected=$1 actual
  shift
  actual=$("$@")
  if [ "$actual" != "$expected" ]; then
    echo "$*: expected \"$expected\", got \"$actual\"" >&2
    exit 1
  fi
}

check() {  # check <prefix> <where to build>
  local prefix=$1 work=$2 pc
  mkdir -p "$work"
  if ! { cmake -G Ninja -S "$source/examples/consumer" -B "$work/cmake" \
    -DCMAKE_PREFIX_PATH="$prefix" \
    -DCMAKE_BUILD_TYPE=Release && cmake --build "$work/cmake"; } >"$work/log" 2>&1; then
    cat "$work/log" >&2
    exit 1
  fi
  expect "0.2 0" "$work/cmake/attention_cpp"
  expect "0.2" "$work/cmake/attention_c"

  pc=$(find "$prefix" -name tandem.pc)
  local flags lib_dir
  flags=$(PKG_CONFIG_PATH=$(dirname "$pc") pkg-config --cflags --libs tandem)
  lib_dir=$(PKG_CONFIG_PATH=$(dirname "$pc") pkg-config --variable=libdir tandem)
  # shellcheck disable=SC2086  # the flags are a list
  "${CXX:-c++}" -std=c++20 "$source/examples/consumer/attention.cpp" $flags -o "$work/cpp"
  # shellcheck disable=SC2086
  "${CC:-cc}" -std=c11 "$source/examples/consumer/attention.c" $flags -o "$work/c"
  LD_LIBRARY_PATH=$lib_dir expect "0.2 0" "$work/cpp"
  LD_LIBRARY_PATH=$lib_dir expect "0.2" "$work/c"

  if [ -x "$prefix/bin/tandem" ]; then
    "$prefix/bin/tandem" info >/dev/null
  fi
}

cmake --install "$build" --prefix "$scratch/first" >/dev/null
check "$scratch/first" "$scratch/work1"
mkdir "$scratch/elsewhere"
mv "$scratch/first" "$scratch/elsewhere/second"
check "$scratch/elsewhere/second" "$scratch/work2"
echo "the installed library works by CMake and pkg-config, also from a moved prefix"
