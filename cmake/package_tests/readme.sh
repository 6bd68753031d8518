#!/usr/bin/env bash
# The programs that README.md shows are the ones that are built and run.
#   readme.sh <source directory>
set -euo pipefail
cd "$1"
for language in cpp c; do
  shown=$(awk -v fence="\`\`\`$language" '$0 == fence { on = 1; next } /^```/ { on = 0 } on' README.md)
  if ! diff <(echo "$shown") examples/consumer/attention.$language; then
    echo "README.md does not show examples/consumer/attention.$language as it is" >&2
    exit 1
  fi
done
# Every file that the documents link to exists.
missing=0
for document in README.md CONTRIBUTING.md docs/*.md docs/decisions/*.md; do
  while read -r link; do
    if [ ! -e "$(dirname "$document")/$link" ]; then
      echo "$document links to $link, which is not there" >&2
      missing=1
    fi
  done < <(grep -oE '\]\([A-Za-z0-9_./-]+\)' "$document" | sed -E 's/^\]\(|\)$//g')
done
[ "$missing" -eq 0 ] && echo "README.md shows the consumer's programs, and every link leads somewhere"
exit "$missing"
