#!/bin/sh
# Runs a compilation by nvcc and keeps what ptxas says of each kernel in OBJECT.ptxas, where a test
# reads it. Everything else that the compiler says comes out as usual.
previous=
object=
for argument in "$@"; do
  if [ "$previous" = -o ]; then object=$argument; fi
  previous=$argument
done
"$@" 2> "$object.ptxas"
status=$?
grep -v -e '^ptxas info' -e 'bytes stack frame' "$object.ptxas" >&2
exit $status
