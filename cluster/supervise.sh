#!/usr/bin/env bash
# Keeps one node running: starts it, starts it again when it dies (sooner at first, later if it dies again and
# again), and stops it when told to stop. Started by up.sh, one for each node.
# Usage: supervise.sh NAME PROGRAM ARGUMENT...
set -uo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
name=$1
shift

child=
stopping=
stop() {
    stopping=1
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap stop TERM INT HUP
note() { printf '%s supervisor of %s: %s\n' "$(date -u +%FT%TZ)" "$name" "$*"; }

record_pid "$run_dir/$name.supervisor.pid" $$
delay=1
while [ -z "$stopping" ]; do
    begun=$SECONDS
    "$@" &
    child=$!
    record_pid "$run_dir/$name.pid" "$child"
    note "started, pid $child"
    # A trapped signal ends `wait` early: wait again until the node itself has ended.
    while :; do
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    child=
    rm -f "$run_dir/$name.pid"
    [ -z "$stopping" ] || break
    case $code in
    2 | 7)
        # 2: its settings are wrong. 7: it is no longer a member, or its data is not for it.
        rm -f "$run_dir/$name.supervisor.pid"
        note "ended with code $code: starting it again would change nothing; see the lines above"
        exit "$code"
        ;;
    esac
    [ $((SECONDS - begun)) -lt 30 ] || delay=1
    note "died with code $code; starting it again in $delay s"
    sleep "$delay" &
    child=$!
    wait "$child"
    child=
    delay=$((delay < 16 ? delay * 2 : 16))
done
rm -f "$run_dir/$name.supervisor.pid"
note "stopped"
