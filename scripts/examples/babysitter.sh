#!/bin/sh
#
# The babysitter as a command: it is run at each wake, with the wake as JSON on its standard input.
#
#     outlive start tests -- sh scripts/examples/babysitter.sh
#
# Exit status 0 says that the wake is taken care of.  A call id makes a call count once, also when this is run again.
set -eu

here=$(dirname "$0")
suite=$here/suite.sh
wake=$(cat)
field() { printf %s "$wake" | python3 -c "import json, sys; wake = json.load(sys.stdin); print($1)"; }
run() {
    call=$1; shift
    outlive exec -t "$thread" --call-id "$call" --wake-on exit --yield-ms 250 -- sh "$suite" "$@" >/dev/null
}

thread=$(field 'wake["thread"]')
number=$(field 'wake["number"]')
if [ "$(field 'wake["reason"]')" = start ]; then
    run "suite-$number"
    echo "started everything" >>babysitter.log
    exit
fi
process=$(field 'wake["matches"][0]["process_id"]')
output=$(outlive write -t "$thread" "$process")  # the end of a process, and what was not read of it
printf '%s\n' "$output" | tail -n 1 >>babysitter.log
failed=$(printf '%s\n' "$output" | sed -n 's/^FAILED \([a-z]*\).*/\1/p')
if [ -n "$failed" ]; then
    run "again-$number" "$failed"
    echo "started $failed" >>babysitter.log
else
    echo "all is well" >>babysitter.log
fi
