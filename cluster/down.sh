#!/usr/bin/env bash
# Stops what up.sh started: the supervisors by their recorded ids, and with them the nodes. The data stays.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

stopped=0
for name in "${nodes[@]}"; do
    if pid=$(recorded_pid "$run_dir/$name.supervisor.pid"); then
        kill -TERM "$pid"
        stopped=$((stopped + 1))
    fi
done
for name in "${nodes[@]}"; do
    if pid=$(recorded_pid "$run_dir/$name.supervisor.pid"); then
        wait_gone "$pid" 15 || {
            say "$name: its supervisor (pid $pid) did not stop in 15 s; killing it"
            kill -KILL "$pid"
        }
    fi
    rm -f "$run_dir/$name.supervisor.pid"
    # Left behind only if the supervisor was killed.
    if pid=$(recorded_pid "$run_dir/$name.pid"); then
        say "$name: stopping the node itself (pid $pid)"
        kill -TERM "$pid"
        wait_gone "$pid" 10 || kill -KILL "$pid"
        stopped=$((stopped + 1))
    fi
    rm -f "$run_dir/$name.pid"
done

if [ "$stopped" -eq 0 ]; then
    say "no cluster is running"
else
    say "the cluster is stopped; its data is in $data_dir (delete the directory to begin anew)"
fi
