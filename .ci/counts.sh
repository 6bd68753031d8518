# shellcheck shell=bash
# Counts test cases over several runs. Sourced; $counts is a file with a line "passed failed skipped"
# for each run. A caller may name a file in TANDEM_TEST_COUNTS that gets the totals too.
counts=$(mktemp)

record() {  # record <passed> <failed> <skipped>
  echo "$1 $2 $3" >>"$counts"
}

# The line that closes a run; fails where a test failed or none ran.
print_totals() {
  cat "$counts" >>"${TANDEM_TEST_COUNTS:-/dev/null}"
  awk '{ passed += $1; failed += $2; skipped += $3 }
       END { printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped
             exit failed > 0 || passed == 0 }' "$counts"
}

# run_ctest <build directory> [arguments of ctest...]: runs tests, as many at once as there are cores, and
# records their cases; threads that wait leave their core to the other tests. A program of GoogleTest counts each of its cases, every other test counts as one; a program that crashed before it
# wrote its report counts as one failure.
run_ctest() {
  local build=$1 reports
  shift
  reports=$(mktemp -d)
  OMP_WAIT_POLICY=passive GTEST_OUTPUT="xml:$reports/" ctest --test-dir "$build" -j"$(nproc)" \
    --output-on-failure --no-tests=error --output-junit "$reports/ctest.junit" "$@"
  local status=$?
  if [ ! -s "$reports/ctest.junit" ]; then
    record 0 1 0
    return 1
  fi
  cat "$reports"/*.xml 2>/dev/null | awk -v junit="$reports/ctest.junit" '
    function attribute(name) {
      return match($0, " " name "=\"[0-9]+\"") ? substr($0, RSTART + length(name) + 3) + 0 : 0
    }
    BEGIN {
      while ((getline <junit) > 0) {
        if (/^[ \t]*tests="/) total = number()
        if (/^[ \t]*failures="/) failed = number()
        if (/^[ \t]*(skipped|disabled)="/) skipped += number()
      }
      passed = total - failed - skipped
    }
    function number() { match($0, /[0-9]+/); return substr($0, RSTART, RLENGTH) + 0 }
    /<testsuites / {  # one program
      if (attribute("failures") > 0) --failed; else --passed
      cases += attribute("tests"); bad += attribute("failures"); not_run += attribute("disabled")
    }
    /<testcase / && /result="skipped"/ { ++not_run }
    END { print cases - bad - not_run + passed, bad + (failed > 0 ? failed : 0), not_run + skipped }
  ' >>"$counts"
  rm -rf "$reports"
  return $status
}
